"""A VAE whose graphs run in an engine: called like `models.vae.WanVAE`, whole frames only."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wanrt.config import VaeWork
from wanrt.engine.graphs import Graphs, Runner
from wanrt.errors import FormatError, UsageError
from wanrt.models.vae import WanVAE
from wanrt.models.vae_layers import CausalState
from wanrt.vae_shapes import Section, Slot, decoder_sections, encoder_sections


class GraphVae(nn.Module):
    """Encoder and decoder as graphs, run one latent frame at a time.

    `vae` has the weights that the graphs take as inputs; of graphs that embed theirs it is asked
    for its spec alone. Graphs of whole steps are used where there are some, else those of sections,
    which need both copies of one section's caches at a time and not of all. States are the ones of
    WanVAE in the same dtype: a clip may go from one to the other.
    """

    def __init__(self, vae: WanVAE, graphs: Graphs) -> None:
        super().__init__()
        self.vae, self.spec, self._graphs = vae, vae.spec, graphs
        self._decoder = _Side("decode", "latents", "frames", decoder_sections(vae.spec))
        self._encoder = _Side("encode", "frames", "latents", encoder_sections(vae.spec))

    def encode(
        self,
        video: Tensor,
        chunk: int | None = None,
        *,
        work: VaeWork | None = None,
        still: bool = False,
    ) -> Tensor:
        """See WanVAE.encode. `still`: where there are graphs of sections, those that would repeat
        themselves are not run."""
        work = self._checked(work or VaeWork(chunk))
        return torch.cat([self._encode_one(clip, work, still) for clip in video.split(1)])

    def encode_chunks(
        self,
        video: Tensor,
        state: CausalState | None = None,
        chunk: int | None = 1,
        *,
        work: VaeWork | None = None,
    ) -> Iterator[tuple[Tensor, CausalState]]:
        """See WanVAE.encode_chunks; None is one latent frame."""
        work = self._checked(work or VaeWork(chunk), video)
        past = _Past(self._own(state or self.encoder_state()), work.host)
        yield from self._chunks(self._encoder, self._pieces(video, past.first), past, work)

    def decode(
        self, latents: Tensor, chunk: int | None = None, *, work: VaeWork | None = None
    ) -> Tensor:
        """See WanVAE.decode."""
        work = self._checked(work or VaeWork(chunk))
        return torch.cat([self._decode_one(clip, work) for clip in latents.split(1)])

    def decode_chunks(
        self,
        latents: Tensor,
        state: CausalState | None = None,
        chunk: int | None = 1,
        *,
        work: VaeWork | None = None,
    ) -> Iterator[tuple[Tensor, CausalState]]:
        """See WanVAE.decode_chunks; None is one latent frame."""
        work = self._checked(work or VaeWork(chunk), latents)
        past = _Past(self._own(state or self.decoder_state()), work.host)
        yield from self._chunks(self._decoder, list(latents.split(1, 2)), past, work)

    def encoder_state(self) -> CausalState:
        """Nothing encoded yet."""
        return CausalState((None,) * self._encoder.num_slots)

    def decoder_state(self) -> CausalState:
        """Nothing decoded yet."""
        return CausalState((None,) * self._decoder.num_slots)

    def _decode_one(self, latents: Tensor, work: VaeWork) -> Tensor:
        past = _Past(self.decoder_state(), work.host, reuse=True)
        way = self._way(self._decoder, work)
        return torch.cat([way(piece, past) for piece in latents.split(1, 2)], dim=2)

    def _encode_one(self, video: Tensor, work: VaeWork, still: bool) -> Tensor:
        past = _Past(self.encoder_state(), work.host, reuse=True)
        way = self._way(self._encoder, work, cut=still)
        latents, before = [], None
        for piece in self._pieces(video, first=True):
            same = still and before is not None and _equal(before, piece)
            latents.append(way(piece, past, same))
            before = piece
        return torch.cat(latents, dim=2)

    def _chunks(
        self, side: "_Side", pieces: list[Tensor], past: "_Past", work: VaeWork
    ) -> Iterator[tuple[Tensor, CausalState]]:
        way, size = self._way(side, work), work.chunk or 1
        for start in range(0, len(pieces), size):
            parts = [way(piece, past) for piece in pieces[start : start + size]]
            result = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
            del parts
            yield result, past.state()
            del result  # or it would wait for the next one

    def _pieces(self, video: Tensor, first: bool) -> list[Tensor]:
        """The frames of each latent frame; what is left over at the end belongs to none."""
        stride = self.spec.temporal_stride
        start = 1 if first else 0
        ends = range(start + stride, video.shape[2] + 1, stride)
        return [video[:, :, :1]][:start] + [video[:, :, end - stride : end] for end in ends]

    def _way(self, side: "_Side", work: VaeWork, cut: bool = False) -> "_Way":
        """Of graphs of a side. Raises FormatError where a bundle has neither form."""
        stride = side.scale_given(self.spec.spatial_stride)
        weights = dict(self.vae.named_parameters())
        forms = (side.whole, side.cut)
        for runs in reversed(forms) if work.host or cut else forms:
            names = [f"{run.name}.{when}" for run in runs for when in ("first", "step")]
            if all(self._graphs.has(name) for name in names):
                return _Way(self._graphs, side, runs, weights, stride)
        raise FormatError(
            f"the bundle has no graphs that {side.name} video, neither vae.{side.name}.first and"
            f" .step nor those of {len(side.cut)} sections; export the VAE into it, or use"
            " --engine native"
        )

    def _checked(self, work: VaeWork, clip: Tensor | None = None) -> VaeWork:
        """Raises UsageError for what whole frames and one clip at a time cannot keep."""
        asked = f"{work.band=} {work.order=} {work.frames=}".replace("work.", "")
        few = work.frames is not None and work.frames < self.spec.temporal_stride
        if work.band is not None or work.order == "bands" or few:
            raise UsageError(
                f"the VAE's engine codes whole frames, {self.spec.temporal_stride} at a time;"
                f" {asked} asks for less memory; use --engine native, or allow more (--vram)"
            )
        if clip is not None and len(clip) != 1:
            raise UsageError(
                f"the VAE's engine yields the chunks of one clip at a time, not of {len(clip)};"
                " hand it one after the other"
            )
        return work

    def _own(self, state: CausalState) -> CausalState:
        if state.bands:
            raise UsageError(
                f"the state is of {len(state.bands)} bands; the VAE's engine codes whole frames"
                " and goes on from a state of these alone"
            )
        return state


class _Run(NamedTuple):
    """A graph's name less `.first` or `.step`, its slots, and what enters and leaves it."""

    name: str
    slots: Mapping[int, Slot]
    given: str
    result: str


@dataclass(frozen=True)
class _Side:
    """The decoder or the encoder."""

    name: str
    given: str
    result: str
    sections: tuple[Section, ...]

    @property
    def num_slots(self) -> int:
        return sum(len(section.slots) for section in self.sections)

    @property
    def whole(self) -> tuple[_Run, ...]:
        slots = {n: slot for section in self.sections for n, slot in section.slots.items()}
        return (_Run(f"vae.{self.name}", slots, self.given, self.result),)

    @property
    def cut(self) -> tuple[_Run, ...]:
        last = len(self.sections) - 1
        return tuple(
            _Run(
                f"vae.{self.name}.{i}",
                section.slots,
                "x" if i else self.given,
                "y" if i < last else self.result,
            )
            for i, section in enumerate(self.sections)
        )

    def scale_given(self, stride: int) -> int:
        """Rows of what is coded for each latent row."""
        return stride if self.given == "frames" else 1


class _Past:
    """What a clip has left behind, while it changes; `reuse`: nobody else holds its tensors.

    Then the memory of what is forgotten serves what comes next.
    """

    def __init__(self, state: CausalState, host: bool, reuse: bool = False) -> None:
        self.slots, self.first = list(state.slots), state.first
        self._host, self._reuse = host, reuse
        self._free: list[Tensor] = []

    def room(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor of any values."""
        for i, x in enumerate(self._free):
            if (x.shape, x.dtype, x.device) == (shape, dtype, device):
                return self._free.pop(i)
        return torch.empty(shape, dtype=dtype, device=device)

    def keep(self, slot: int, frames: Tensor) -> bool:
        """Remember frames; True where the older ones were the same."""
        old = self.slots[slot]
        self.slots[slot] = frames.cpu() if self._host else frames
        if self._reuse and old is not None and not self._host:
            self._free.append(old)
        return old is not None and self._watched and _equal(old.to(frames.device), frames)

    def state(self) -> CausalState:
        return CausalState(tuple(self.slots), self.first)
