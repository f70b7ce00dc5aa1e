"""The two loops of coding a clip, over time and over bands, in either order."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wanrt.config import VaeWork
from wanrt.models.vae_bands import Course
from wanrt.models.vae_layers import Walk
from wanrt.models.vae_repeat import Layers, Result
from wanrt.models.vae_spool import Spool

if TYPE_CHECKING:
    from wanrt.models.vae import WanVAE


def decode_pieces(
    vae: "WanVAE", pieces: Sequence[Tensor], course: Course, work: VaeWork, ends: bool = False
) -> Iterator[Tensor]:
    """Latents in pieces of time -> frames of each piece; `ends`: no further piece will come."""
    if work.order == "bands":
        yield from _decode_band_by_band(vae, pieces, course)
        return
    for i, piece in enumerate(pieces):
        course.begin(last=ends and i == len(pieces) - 1)
        yield _decode_piece(vae, piece, course)


def _decode_piece(vae: "WanVAE", latents: Tensor, course: Course) -> Tensor:
    x = _whole(vae, latents, course.whole)
    parts = [vae.decoder_to_pixels(vae.decoder.local(x, walk)) for walk in course.locals]
    course.end()
    return join(parts)


def _whole(vae: "WanVAE", latents: Tensor, walk: Walk) -> Tensor:
    return vae.decoder.whole(vae.latents_to_decoder(latents, walk), walk)


def _decode_band_by_band(
    vae: "WanVAE", pieces: Sequence[Tensor], course: Course
) -> Iterator[Tensor]:
    """One band's caches at a time; what lies between the halves, and frames, in a file."""
    with Spool() as spool:
        for i, piece in enumerate(pieces):
            _begin(course.whole, i, len(pieces))
            spool.put(i, _whole(vae, piece, course.whole))
        for b, walk in enumerate(course.bands):
            for i in range(len(pieces)):
                _begin(walk, i, len(pieces))
                x = vae.decoder.local(spool.get(i), walk)
                spool.put((i, b), vae.decoder_to_pixels(x))
                del x
        for i in range(len(pieces)):
            yield join([spool.get((i, b)) for b in range(len(course.bands))])


def encode_pieces(
    vae: "WanVAE",
    pieces: Sequence[Tensor],
    course: Course,
    work: VaeWork,
    still: bool = False,
    ends: bool = False,
) -> Iterator[Tensor]:
    """Pixels in pieces of time -> latents of each piece.

    still: see WanVAE.encode; ends: no further piece will come.
    """
    for walk in course.walks:
        walk.settled = set() if still else None
    sames = [still and _same(a, b) for a, b in zip((None, *pieces), pieces, strict=False)]
    if work.order == "bands":
        yield from _encode_band_by_band(vae, pieces, course, sames, work)
        return
    locals_ = [Layers(vae.encoder.local_steps(work.frames), walk) for walk in course.locals]
    whole = Layers(vae.encoder.whole_layers, course.whole)
    for i, (piece, same) in enumerate(zip(pieces, sames, strict=True)):
        course.begin(last=ends and i == len(pieces) - 1)
        yield _encode_piece(vae, piece, same, locals_, whole)


def _encode_piece(
    vae: "WanVAE", video: Tensor, same: bool, locals_: Sequence[Layers], whole: Layers
) -> Tensor:
    """Pixels -> latents; `locals_` are the local layers of each band."""
    results = [_encode_locally(vae, video, layers, same) for layers in locals_]
    x, same = join([r.x for r in results]), all(r.same for r in results)
    del results
    moments = whole(x, same).x
    for layers in (*locals_, whole):
        layers.walk.first = False
    return vae.moments_to_latents(moments, whole.walk)


def _encode_band_by_band(
    vae: "WanVAE", pieces: Sequence[Tensor], course: Course, sames: Sequence[bool], work: VaeWork
) -> Iterator[Tensor]:
    with Spool() as spool:
        repeats = [True] * len(pieces)
        for b, walk in enumerate(course.bands):
            layers = Layers(vae.encoder.local_steps(work.frames), walk)
            for i, piece in enumerate(pieces):
                _begin(walk, i, len(pieces))
                result = _encode_locally(vae, piece, layers, sames[i])
                repeats[i] = repeats[i] and result.same
                spool.put((i, b), result.x)
                del result
        whole = Layers(vae.encoder.whole_layers, course.whole)
        for i in range(len(pieces)):
            _begin(course.whole, i, len(pieces))
            x = join([spool.get((i, b)) for b in range(len(course.bands))])
            yield vae.moments_to_latents(whole(x, repeats[i]).x, course.whole)


def _encode_locally(vae: "WanVAE", video: Tensor, layers: Layers, same: bool) -> Result:
    walk = layers.walk
    x, same = layers(walk.enter(vae.pixels_to_encoder(video)), same)
    return Result(walk.leave(x), same)


def _begin(walk: Walk, piece: int, num: int) -> None:
    walk.first, walk.last = piece == 0, piece == num - 1


def _same(a: Tensor | None, b: Tensor) -> bool:
    return a is not None and a.shape == b.shape and torch.equal(a, b)


def join(bands: Sequence[Tensor]) -> Tensor:
    """One frame from its bands; channels last where they are."""
    return channels_last(torch.cat(list(bands), dim=3)) if len(bands) > 1 else bands[0]


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)
