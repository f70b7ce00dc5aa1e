"""What all tests share: few threads, recorded data where there is some, tiny models and inputs."""

import os
import shutil
import tempfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel's file is imported

os.environ["WANRT_CACHE"] = "off"  # tests leave nothing in the home of who runs them

from wanrt import keys
from wanrt.config import MODELS, NANO, ClipSpec, Umt5Spec, WanSpec
from wanrt.media.image import load_image, save_png
from wanrt.media.video import read_video, write_video
from wanrt.models.tokenizer import Tokenizer
from wanrt.pipeline import Pipeline
from wanrt.weights.hub import NANO_WEIGHTS
from wanrt.weights.layouts import write_model
from wanrt.weights.load import load_component

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = NANO_WEIGHTS / "tokenizer.json"


def pytest_configure(config: pytest.Config) -> None:
    marks = Path(tempfile.mkdtemp(prefix="wanrt-tests-"))  # a signing key and a ledger
    config.add_cleanup(lambda: shutil.rmtree(marks, ignore_errors=True))
    keys.init(marks / "keys")
    os.environ["WANRT_KEYS"] = str(marks / "keys")
    os.environ["WANRT_LEDGER"] = str(marks / "ledger.jsonl")
    for variable in ("XDG_CONFIG_HOME", "XDG_DATA_HOME"):
        os.environ[variable] = str(marks / variable)
    # Small shapes lose time on many threads. OMP_NUM_THREADS can ask for fewer.
    beside_others = "PYTEST_XDIST_WORKER" in os.environ
    torch.set_num_threads(1 if beside_others else min(torch.get_num_threads(), 4))
    torch.backends.cudnn.allow_tf32 = False  # a reference in fp32 is fp32 on a GPU too


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
            ffn_dim=256,
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

    @torch.inference_mode()
    def text_rows(self, name: str, prompt: str) -> Tensor:
        """Features `[n, text_dim]` of a prompt's tokens."""
        tokens = Tokenizer.load(self.path(name))([prompt])
        return load_component(self.path(name), "umt5")(tokens.ids, tokens.mask)[0]


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("zoo"))


@dataclass(frozen=True)
class Files:
    """Inputs on disk and their pixels in [-1, 1]; the clip is 9 frames of 48x32."""

    folder: Path
    clip: Tensor  # [3, 9, 32, 48]
    picture: Tensor  # [3, 32, 48]
    last: Tensor
    square: Tensor  # [3, 40, 40]
    half: Tensor  # mask [1, 1, 32, 48]: the right half
    shade: Tensor  # mask [1, 9, 32, 48] as decoded: a bar that moves

    def __getitem__(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("inputs")
    generator = torch.Generator().manual_seed(0)
    blocks = torch.rand(4, 3, 4, 6, generator=generator) * 2 - 1
    pictures = blocks.repeat_interleave(8, 2).repeat_interleave(8, 3)  # [4, 3, 32, 48]
    for name, picture in zip(("a.png", "b.png", "c.png"), pictures, strict=False):
        save_png(picture, folder / name)
    save_png(torch.rand(3, 40, 40, generator=generator) * 2 - 1, folder / "square.png")
    fade = torch.linspace(0, 1, 9)[:, None, None, None]
    clip = pictures[2] * (1 - fade) + pictures[3] * fade  # [9, 3, 32, 48]
    write_video(folder / "clip.mp4", [clip.transpose(0, 1)], 16)
    half = torch.zeros(1, 1, 32, 48)
    half[..., 24:] = 1
    save_png(half[0].expand(3, -1, -1) * 2 - 1, folder / "mask.png")
    bar = torch.full((3, 9, 32, 48), -1.0)
    for i in range(9):
        bar[:, i, :, 4 * i : 4 * i + 16] = 1
    write_video(folder / "mask.mp4", [bar], 16)
    return Files(
        folder,
        read_video(folder / "clip.mp4").frames,
        load_image(folder / "a.png"),
        load_image(folder / "b.png"),
        load_image(folder / "square.png"),
        half,
        (read_video(folder / "mask.mp4").frames[:1] + 1) / 2,
    )
