"""A VAE whose graphs run in an engine: called like `models.vae.WanVAE`."""

import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from wanrt.config import VaeWork
from wanrt.engine.graphs import Graphs
from wanrt.engine.vae_way import Past, Run, Side, Way, equal
from wanrt.errors import FormatError, UsageError
from wanrt.models.vae import WanVAE
from wanrt.models.vae_layers import CausalState
from wanrt.vae_sections import RANGES, decoder_sections, encoder_sections

log = logging.getLogger("wanrt")


class GraphVae(nn.Module):
    """Encoder and decoder as graphs, run one latent frame at a time.

    `vae` has the weights that the graphs take as inputs; of graphs that embed theirs it is asked
    for its spec alone. Graphs of whole steps are used where there are some, else those of sections,
    which need both copies of one section's caches at a time and not of all: those of the narrowest
    range that has the clip's size. States are the ones of WanVAE in the same dtype: a clip may go
    from one to the other. Work that asks for less at once than the graphs take (bands, single
    frames), clips larger than all ranges, and a side whose graphs are incomplete are left to `vae`
    itself.
    """

    def __init__(self, vae: WanVAE, graphs: Graphs) -> None:
        super().__init__()
        self.vae, self.spec, self._graphs = vae, vae.spec, graphs
        self._decoder = Side("decode", "latents", "frames", 1, decoder_sections(vae.spec))
        stride, sections = vae.spec.spatial_stride, encoder_sections(vae.spec)
        self._encoder = Side("encode", "frames", "latents", stride, sections)

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
        work = work or VaeWork(chunk)
        if self._is_native(self._encoder, video, work):
            return self._native(work).encode(video, work=work, still=still)
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
        work = work or VaeWork(chunk)
        if self._is_native(self._encoder, video, work):
            yield from self._native(work).encode_chunks(video, state, work=work)
            return
        _check_single(video)
        past = Past(self._own(state or self.encoder_state()), work.host)
        yield from self._chunks(self._encoder, self._pieces(video, past.first), past, work)

    def decode(
        self, latents: Tensor, chunk: int | None = None, *, work: VaeWork | None = None
    ) -> Tensor:
        """See WanVAE.decode."""
        work = work or VaeWork(chunk)
        if self._is_native(self._decoder, latents, work):
            return self._native(work).decode(latents, work=work)
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
        work = work or VaeWork(chunk)
        if self._is_native(self._decoder, latents, work):
            yield from self._native(work).decode_chunks(latents, state, work=work)
            return
        _check_single(latents)
        past = Past(self._own(state or self.decoder_state()), work.host)
        yield from self._chunks(self._decoder, list(latents.split(1, 2)), past, work)

    def encoder_state(self) -> CausalState:
        """Nothing encoded yet."""
        return CausalState((None,) * self._encoder.num_slots)

    def decoder_state(self) -> CausalState:
        """Nothing decoded yet."""
        return CausalState((None,) * self._decoder.num_slots)

    def _decode_one(self, latents: Tensor, work: VaeWork) -> Tensor:
        way = self._way(self._decoder, latents, work)
        past = Past(self.decoder_state(), work.host, reuse=way.in_one)
        return torch.cat([way(piece, past) for piece in latents.split(1, 2)], dim=2)

    def _encode_one(self, video: Tensor, work: VaeWork, still: bool) -> Tensor:
        way = self._way(self._encoder, video, work, still)
        past = Past(self.encoder_state(), work.host, reuse=way.in_one)
        latents, before = [], None
        for piece in self._pieces(video, first=True):
            same = still and before is not None and equal(before, piece)
            latents.append(way(piece, past, same))
            before = piece
        return torch.cat(latents, dim=2)

    def _chunks(
        self, side: Side, pieces: list[Tensor], past: Past, work: VaeWork
    ) -> Iterator[tuple[Tensor, CausalState]]:
        if not pieces:
            return
        way, size = self._way(side, pieces[0], work), work.chunk or 1
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

    def _way(self, side: Side, clip: Tensor, work: VaeWork, still: bool = False) -> Way:
        """Through whole steps where there are such, else section by section.

        The other way round where caches are to wait in host memory, or a clip may stand still.
        """
        whole, cut = self._whole(side), self._cut(side, clip)
        runs = (cut or whole) if work.host or still else (whole or cut)
        assert runs is not None, f"{side.name=} {clip.shape=}"
        return Way(self._graphs, runs, dict(self.vae.named_parameters()), still)

    def _whole(self, side: Side) -> tuple[Run, ...] | None:
        return side.whole if self._there(side.whole) else None

    def _cut(self, side: Side, clip: Tensor) -> tuple[Run, ...] | None:
        """Sections of the narrowest range that there is for the clip."""
        pixels = [n // side.scale * self.spec.spatial_stride for n in clip.shape[3:]]
        ways = (side.cut(sizes) for sizes in RANGES if sizes.covers(*pixels))
        return next((runs for runs in ways if self._there(runs)), None)

    def _there(self, runs: tuple[Run, ...]) -> bool:
        return all(self._graphs.has(run.graph(first)) for run in runs for first in (True, False))

    def _is_native(self, side: Side, clip: Tensor, work: VaeWork) -> bool:
        """Whether the modules do it: it asks for less at once, or no whole set of graphs takes it.

        Raises FormatError where there is no such set for any size, nor weights for the modules.
        """
        few = work.frames is not None and work.frames < self.spec.temporal_stride
        if work.band is not None or work.order == "bands" or few:
            return True
        if self._whole(side) or self._cut(side, clip):
            return False
        if not self._bare or any(self._there(side.cut(sizes)) for sizes in RANGES):
            return True
        raise FormatError(
            "the bundle",
            f"has no graphs that {side.name}: neither vae.{side.name}.first and .step nor those of"
            f" {len(side.sections)} sections",
            "export the VAE again",
        )

    @property
    def _bare(self) -> bool:
        """The weights are within the graphs and nowhere else."""
        return self.vae.conv1.weight.is_meta

    def _native(self, work: VaeWork) -> WanVAE:
        """Raises UsageError where the weights are within the graphs and nowhere else."""
        if self._bare:
            raise UsageError(
                f"{work} asks for less at once, or for larger frames, than the VAE's graphs code "
                "with their weights in them; export it without --embed, or allow more with --vram"
            )
        log.info("%s: done by the VAE's modules, not by its engines", work)
        return self.vae

    def _own(self, state: CausalState) -> CausalState:
        if state.bands:
            raise UsageError(
                f"the state is of {len(state.bands)} bands; the VAE's engine codes whole frames"
                " and goes on from a state of these alone"
            )
        return state


def _check_single(clip: Tensor) -> None:
    if len(clip) != 1:
        raise UsageError(
            f"the VAE's engine yields the chunks of one clip at a time, not of {len(clip)};"
            " hand it one after the other"
        )
