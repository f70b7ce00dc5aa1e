"""What blocks take in memory while their matrices stay as a GGUF file packs them."""

from collections.abc import Sequence

import torch

from wanrt.memory.offload import lay_out
from wanrt.memory.packed_bytes import PackedWeights
from wanrt.weights.contents import TOKEN_TABLE, Weights
from wanrt.weights.detect import Detected
from wanrt.weights.load import skeleton


def packed_weights(files: Sequence[Detected], dtype: torch.dtype) -> PackedWeights | None:
    """Of one transformer, or of two experts the more of each; None where one packs nothing.

    dtype: of its products. Reads headers. Raises FormatError.
    """
    each = [_packed(file, dtype) for file in files]
    known = [one for one in each if one is not None]
    if not known or len(known) < len(each):
        return None
    return PackedWeights(
        tuple(map(max, zip(*(one.visits for one in known), strict=True))),
        max(one.texts for one in known),
        max(one.rest for one in known),
        any(one.matrices for one in known),
        max(one.table for one in known),
    )


def packed_text_encoder(found: Detected, dtype: torch.dtype) -> PackedWeights | None:
    """Of a text encoder; None where it packs nothing. Reads headers. Raises FormatError."""
    return _packed(found, dtype)


def _packed(found: Detected, dtype: torch.dtype) -> PackedWeights | None:
    """As `load_component` lays it out where blocks stream; a large table stays in its file."""
    if not any(info.packing for info in found.open().tensors.values()):
        return None
    assert found.kind in ("dit", "umt5"), f"{found.kind=}"
    module = skeleton(found.kind, found.spec, dtype=dtype)
    plain = {name: weight.numel() for name, weight in module.named_parameters()}
    weights = Weights(module, found, dtype, check=False)
    weights.keep_packed(module, (), tables=False)
    blocks, *apart = (
        [lay_out(module, visit, weights.dtype_of) for visit in visits] for visits in module.visits()
    )
    texts = [places for visits in apart for places in visits]
    visited = {name for places in (*blocks, *texts) for name in places}
    others = [n for n in plain if n not in visited and not weights.is_large_table(n)]
    unpacked = [
        plain[name] * weights.plain_dtype(name).itemsize
        for name in others
        if weights.stays_packed(name) and name != TOKEN_TABLE
    ]
    return PackedWeights(
        tuple(max(place.stop for place in places.values()) for places in blocks),
        max((place.stop for places in texts for place in places.values()), default=0),
        sum(module.get_parameter(n).numel() * weights.dtype_of(n).itemsize for n in others),
        any(weights.stays_packed(name) for name in visited),
        max(unpacked, default=0),
    )
