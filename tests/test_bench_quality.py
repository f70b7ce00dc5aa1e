"""The quality bench: its measures against known values, its tables, its choices."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from wanrt.bench import quality, quality_layers, quality_requests
from wanrt.bench.pictures import psnr, ssim
from wanrt.bench.quality_requests import Row
from wanrt.errors import UsageError
from wanrt.kernels import torch_quantize
from wanrt.kernels.reference import LARGEST


def clip(seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (2, 24, 20, 3), dtype=np.uint8))


def test_psnr() -> None:
    black = torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    assert psnr(black, black) == math.inf
    assert psnr(black + 51, black) == pytest.approx(20 * math.log10(5))


def test_ssim() -> None:
    """1 for equal clips, near 0 for unrelated noise; for two flat ones only the first factor."""
    assert ssim(clip(0), clip(0)) == pytest.approx(1)
    assert abs(ssim(clip(0), clip(1))) < 0.1
    a, b = (torch.full((1, 16, 16, 3), v, dtype=torch.uint8) for v in (100, 150))
    c1 = (0.01 * 255) ** 2
    assert ssim(a, b) == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1))


def test_tables() -> None:
    row = Row("int8", 2, 0.9991, 0.9995, 0.031, 41.25, 0.98, 1.0, 1.0)
    text = quality.table([row])
    assert text.splitlines()[0].startswith("| mode | prompts | least cosine |")
    assert "| int8 | 2 | 0.9991 | 0.9995 | 0.031 | 41.25 | 0.98 | 1 | 1 |" in text
    layers = [
        quality_layers.Row("x", "ffn.0", "int8", 0.999, 0.0123),
        quality_layers.Row("x", "ffn.0", "fp8", 0.999, 0.0456),
        quality_layers.Row("x", "attention", "attention_int8", 1.0, 0.001),
        quality_layers.Row("x", "attention", "attention_int8_fp8", 1.0, 0.002),
    ]
    text = quality_layers.table(layers)
    assert "| x, error in % | int8 | fp8 |" in text and "| ffn.0 | 1.23 | 4.56 |" in text
    assert "attention_int8 0.10 %, attention_int8_fp8 0.20 %" in text


def test_a_block_and_its_formats() -> None:
    """The rotation earns its place in int8: that is what the policy says of it."""
    found = quality_layers.block_rows(("all",), ("int8", "int8-rotated"))
    rows = {(row.layers, row.format): row for row in found}
    assert rows["all", "int8-rotated"].error < 0.5 * rows["all", "int8"].error
    assert rows["all", "int8-rotated"].cosine >= 0.999


def test_what_is_not_there() -> None:
    with pytest.raises(UsageError, match="no part or mode 'pixels'"):
        quality.main(["pixels"], quality.Settings(), None)
    with pytest.raises(UsageError, match="no part or mode 'int4'"):
        quality.main([], quality.Settings(modes=("int4",)), Path("page.md"))


def test_requests_go_on_where_they_were(tmp_path: Path) -> None:
    record = tmp_path / "clips.jsonl"
    first = next(quality_requests.rows(["bf16"], 1, record))
    assert first.prompts == 1 and first.least_cosine > 0.999
    line = record.read_text()
    made = quality_requests.Clip("bf16", 1, 0.5, 0.9, 20.0, 0.9, False, True)
    record.write_text(line + json.dumps(asdict(made)) + "\n")
    row = next(quality_requests.rows(["bf16"], 2, record))
    assert record.read_text().startswith(line)
    assert (row.prompts, row.least_cosine, row.verdict) == (2, 0.5, first.verdict / 2)
    assert row.median_cosine == (0.5 + first.least_cosine) / 2


def test_small_activations_are_another_fp8() -> None:
    modes = ["fp8", "fp8 with small activations"]
    plain, small = quality_requests.rows(modes, 1)
    assert plain.least_cosine != small.least_cosine and small.least_cosine > 0.99
    assert torch_quantize.LARGEST is LARGEST  # as before
