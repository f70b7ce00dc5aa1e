"""Video, what a request returns: frames that know their rate, their making and how to be saved."""

from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wanrt.clock import Clock, added
from wanrt.media.image import to_pil
from wanrt.media.marking import REQUIRED, UNKNOWN, Marking, Origin
from wanrt.media.saving import save_video


@dataclass(frozen=True)
class Video:
    """Frames `np` uint8 `[F, H, W, 3]`, `fps`, the settings that made them, seconds per phase.

    timings: phases, then `other` and their `total`; saving adds its own. steps: those of each
    denoising step. cold: parts whose weights were read for it. provenance: what the marks of a
    saved file will say of where it comes from.
    """

    np: np.ndarray
    fps: int
    settings: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    steps: tuple[float, ...] = ()
    cold: tuple[str, ...] = ()
    provenance: Origin = UNKNOWN

    @property
    def frames(self) -> np.ndarray:
        return self.np

    @property
    def pt(self) -> Tensor:
        """float `[F, 3, H, W]` in [0, 1]."""
        return torch.from_numpy(self.np).permute(0, 3, 1, 2).float() / 255

    @property
    def pil(self) -> list[Any]:
        """One PIL image per frame."""
        return [to_pil(frame) for frame in self.np]

    def save(
        self,
        path: str | PathLike[str],
        *,
        codec: str = "h264",
        crf: int | None = None,
        overwrite: bool = False,
        marking: Marking = REQUIRED,
    ) -> Path:
        """Write a video, or a `.png` of a single frame, marked as AI-generated.

        The file appears only when it is complete and its marks have been read back.
        """
        clock = Clock()
        saved = save_video(
            self.np,
            path,
            self.fps,
            codec=codec,
            crf=crf,
            overwrite=overwrite,
            origin=self.provenance,
            marking=marking,
            clock=clock,
        )
        self.timings.update(added(self.timings, clock.timings()))
        return saved.path
