"""Loading peaks at one tensor above the model, whatever the layout: measured in a child process."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf_files import write_gguf

from wanrt.config import MODELS, WanSpec
from wanrt.weights.layouts import Layout
from wanrt.weights.load import skeleton
from wanrt.weights.random import write_random

HEADROOM = 1.10
ALLOCATOR = (
    24 << 20
)  # what malloc may keep of freed buffers: some of them lie below its mmap threshold
CHILD = Path(__file__).parent / "loading_child.py"
SPEC = MODELS["wan2.1-t2v-1.3b"]

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")


def load_in_child(spec: WanSpec, layout: Layout, folder: Path, *flags: str) -> dict:
    """Write the model, load it in a fresh process, remove it."""
    write_random("wan2.1-t2v-1.3b", layout, folder, components=("dit", "vae"), spec=spec)
    try:
        return run_child(folder, "dit,vae", *flags)
    finally:
        shutil.rmtree(folder)


def run_child(path: Path, kinds: str, *flags: str) -> dict:
    environment = os.environ | {"PYTHONPATH": str(CHILD.parent.parent)}
    command = [sys.executable, str(CHILD), str(path), kinds, *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def check_peaks(result: dict) -> None:
    for kind in ("dit", "vae"):
        size, peak = result[kind]["size"], result[kind]["peak"]
        assert 0.9 * size <= peak <= HEADROOM * size, f"{kind}: {peak=:,} {size=:,}"


def test_a_true_shaped_block_loads_within_its_size(tmp_path: Path) -> None:
    """Two blocks: with a single one the largest tensor would be more than a tenth of the model."""
    spec = replace(SPEC, dit=replace(SPEC.dit, num_layers=2))
    largest = 9216 * 1536 * 4  # time_projection, fp32
    result = load_in_child(spec, "comfyui", tmp_path / "model")
    size, peak = result["dit"]["size"], result["dit"]["peak"]
    assert 0.9 * size <= peak <= size + largest + ALLOCATOR, f"{peak=:,} {size=:,}"


def test_blocks_of_a_gguf_file_load_within_their_size(tmp_path: Path) -> None:
    """Unpacked, the model and no tensor more; packed, a quarter of it and one matrix."""
    spec = replace(SPEC.dit, dim=1024, ffn_dim=4096, num_heads=8, num_layers=4, text_dim=1024)
    shapes = {n: tuple(t.shape) for n, t in skeleton("dit", spec).state_dict().items()}
    tensors = {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}
    path = tmp_path / "model.gguf"
    write_gguf(path, tensors, lambda _, t: "Q4_K" if t.ndim == 2 else "F32")
    plain = run_child(path, "dit")["dit"]
    packed = run_child(path, "dit", "--packed")["dit"]
    for result, more in ((plain, 0), (packed, 6144 * 1024 * 4)):  # time_projection, fp32
        size, peak = result["size"], result["peak"]
        assert 0.9 * size <= peak <= size + more + ALLOCATOR, f"{peak=:,} {size=:,}"
    assert packed["size"] < 0.27 * plain["size"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["original", "diffusers", "comfyui"])
def test_the_1_3b_loads_within_its_size_and_runs(layout: Layout, tmp_path: Path) -> None:
    result = load_in_child(SPEC, layout, tmp_path / "model", "--request")
    check_peaks(result)
    assert result["frames"] == [5, 64, 64, 3]
    assert result["spread"] > 0
