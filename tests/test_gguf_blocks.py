"""Blocks of GGUF files: to the bit what the package `gguf` makes of them."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf_files import plain, random_blocks

from wanrt.quant import gguf_blocks
from wanrt.quant.gguf_blocks import FORMATS, BlockFormat, unpack, unpack_into

formats = pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)


def same_bits(ours: torch.Tensor, theirs: np.ndarray) -> bool:
    """Equal as bits, where no NaN is; NaN equals NaN."""
    a, b = ours.numpy().ravel(), theirs.ravel()
    return bool(((a.view(np.int32) == b.view(np.int32)) | (np.isnan(a) & np.isnan(b))).all())


def test_every_format_is_known_by_its_number_and_size() -> None:
    names = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}
    assert {form.name for form in FORMATS.values()} == names
    for code, form in FORMATS.items():
        assert Type[form.name] == code
        assert gguf.GGML_QUANT_SIZES[Type(code)] == (form.numel, form.num_bytes)


@formats
def test_random_bytes(form: BlockFormat) -> None:
    """Every bit pattern, with NaN, infinity and subnormal scales among them."""
    blocks = np.random.default_rng(1).integers(0, 256, (4096, form.num_bytes), np.uint8)
    with np.errstate(all="ignore"):
        theirs = plain(blocks, form.name)
    ours = unpack(torch.from_numpy(blocks), form, torch.float32)
    assert np.isnan(theirs).any() and same_bits(ours, theirs)


@formats
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_are_rounded_once(form: BlockFormat, dtype: torch.dtype) -> None:
    blocks = random_blocks(form.name, 60, seed=2).reshape(4, 3, -1)
    theirs = torch.from_numpy(plain(blocks, form.name))
    assert torch.equal(unpack(torch.from_numpy(blocks), form, dtype), theirs.to(dtype))


@formats
def test_pieces_meet(form: BlockFormat) -> None:
    """More blocks than one piece holds, and a last piece that is not full."""
    blocks = torch.from_numpy(random_blocks(form.name, 2**18 // form.numel + 5, seed=3))
    whole = unpack(blocks, form, torch.float32)
    half = len(blocks) // 2
    parts = [unpack(rows, form, torch.float32) for rows in (blocks[:half], blocks[half:])]
    assert torch.equal(whole, torch.cat(parts))
    assert same_bits(whole, plain(blocks.numpy(), form.name))


def test_memory_that_is_there_is_filled() -> None:
    form = FORMATS[2]
    blocks = torch.from_numpy(random_blocks("Q4_0", 6, seed=4)).view(3, -1)
    place = torch.full((5, 64), torch.nan)
    unpack_into(place[1:4], blocks, form)
    assert place[[0, 4]].isnan().all()
    assert torch.equal(place[1:4], unpack(blocks, form, torch.float32))
    with pytest.raises(AssertionError):
        unpack_into(place[:1], blocks, form)


def test_no_blocks() -> None:
    for form in gguf_blocks.FORMATS.values():
        none = torch.empty(0, form.num_bytes, dtype=torch.uint8)
        assert unpack(none, form, torch.bfloat16).shape == (0, form.numel)
