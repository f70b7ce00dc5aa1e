"""What all tests share: few threads, recorded data that only some checkouts have, and tiny models."""

import shutil
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from wanrt.config import MODELS, NANO, ClipSpec, Umt5Spec, WanSpec
from wanrt.pipeline import Pipeline
from wanrt.weights.hub import NANO_WEIGHTS
from wanrt.weights.layouts import write_model

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = NANO_WEIGHTS / "tokenizer.json"


def pytest_configure(config: pytest.Config) -> None:
    # Small shapes lose time on many threads. OMP_NUM_THREADS can ask for fewer.
    torch.set_num_threads(min(torch.get_num_threads(), 4))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of recorded real-model data beside the checkout; the test is skipped without it."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs recorded data in {folder}")
    return folder


def tiny(spec: WanSpec) -> WanSpec:
    """A released model with its inputs, task and defaults, but two layers and one head."""
    image_dim = 80 if spec.dit.image_dim else None
    return replace(
        spec,
        dit=replace(
            spec.dit,
            dim=128,
            ffn_dim=192,
            num_heads=1,
            num_layers=2,
            text_dim=48,
            image_dim=image_dim,
            vace_layers=(0,) if spec.dit.vace_layers else (),
        ),
        vae=replace(spec.vae, base_dim=4, decoder_base_dim=4),
        umt5=Umt5Spec(NANO.umt5.vocab_size, 48, 48, 64, num_heads=3, num_layers=2),
        clip=image_dim and ClipSpec(image_dim, mlp_dim=96, num_heads=1, num_layers=2),
    )


def lively(part: str, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random weights of a size that lets every input be seen in the output."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{part}/{name}".encode()))
    values = torch.empty(shape).normal_(generator=generator)
    if "norm" in name and name.endswith("weight") or name.endswith("gamma"):
        values.mul_(0.1).add_(1)
    elif len(shape) > 1 and "modulation" not in name:
        values.mul_(values[0].numel() ** -0.5)
    else:
        values.mul_(0.2)
    return values.to(dtype)


class Zoo:
    """A tiny model of every kind, with nano's tokenizer, in the original layout."""

    specs = {name: tiny(spec) for name, spec in MODELS.items()} | {"nano": NANO}

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, name: str) -> Path:
        folder = self.root / name
        if not folder.exists():
            write_model(self.specs[name], "original", folder, lively)
            shutil.copy(TOKENIZER, folder)
        return folder

    def open(self, name: str, **options: Any) -> Pipeline:
        return Pipeline.load(str(self.path(name)), **options)


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("zoo"))
