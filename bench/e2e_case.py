"""What both sides of `wanrt bench e2e` are asked, and how each, in its own process, tells."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from wanrt.clock import Clock

STATES = ("cold", "warm", "again")  # of the process; a new prompt in a warm one; that once more
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One request, to be made once in each state; `folder` has the weights and takes results."""

    folder: str
    device: str
    dtype: str
    prompts: tuple[str, str]  # of the cold request, and of the warm ones
    negative: str
    width: int
    height: int
    num_frames: int
    fps: int
    num_steps: int
    guidance: float
    flow_shift: float
    latent_shape: tuple[int, ...]
    seed: int = 1

    @classmethod
    def of_process(cls) -> Self:
        """As the command line of this process has it."""
        fields = json.loads(sys.argv[1])
        tuples = {name: tuple(fields[name]) for name in ("prompts", "latent_shape")}
        return cls(**fields | tuples)

    def to_argument(self) -> str:
        return json.dumps(asdict(self))

    @property
    def vae_dtype(self) -> torch.dtype:
        """What wanrt's own is on this device; the peer's is the same."""
        return DTYPES[self.dtype] if self.device == "cuda" else torch.float32

    @property
    def model(self) -> Path:
        """In the Diffusers layout, with a tokenizer.json."""
        return Path(self.folder) / "model"

    @property
    def requests(self) -> dict[str, str]:
        """State -> prompt."""
        first, other = self.prompts
        return dict(zip(STATES, (first, other, other), strict=True))

    def video(self, side: str) -> Path:
        return Path(self.folder) / f"{side}.mp4"

    def latents(self, side: str) -> Path:
        """Those of the cold request."""
        return Path(self.folder) / f"{side}.pt"

    def keep_latents(self, side: str, latents: Tensor) -> None:
        if not self.latents(side).exists():
            torch.save(latents.float().cpu(), self.latents(side))


def tell(state: str, clock: Clock) -> None:
    """To the parent: seconds by phase."""
    print(json.dumps({"state": state, "timings": clock.timings()}), flush=True)
