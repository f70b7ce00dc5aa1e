"""What `wanrt bench gpu` brings to a GPU, as far as it runs without one."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wanrt.bench import chain, chain_ways, gpu, model, true_shapes, vram
from wanrt.errors import NumericsError, UsageError, WanrtError

ROOT = Path(__file__).resolve().parent.parent

COMPILE = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

@triton.jit
def product(x_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i[:, None] * N + i[None, :])
    tl.store(x_ptr + i[:, None] * N + i[None, :], tl.dot(x, x).to(tl.float16))

if __name__ == "__main__":
    from wanrt.bench import consumer
    from wanrt.kernels.launch import _capability

    source = ASTSource(product, {"x_ptr": "*fp16", "N": "constexpr"}, {"N": 64})
    plain = triton.compile(source, GPUTarget("cuda", 90, 32))
    consumer.pretend(89)
    kernel = triton.compile(source, consumer.CudaDriver.get_current_target(None))
    ptx = kernel.kernel.decode()
    print(_capability(0), ".target sm_89" in ptx, "mma.sync" in ptx, "wgmma" in ptx)
    print(plain.kernel[:4], ".target sm_90a" in plain.asm["ptx"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_another_cards_kernels_are_loaded_as_its_ptx(tmp_path: Path) -> None:
    (tmp_path / "compiled.py").write_text(COMPILE)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, tmp_path / "compiled.py"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    as_89, as_90 = done.stdout.splitlines()
    assert as_89 == "89 True True False", "mma.sync is Ada's, wgmma is Hopper's alone"
    assert as_90 == r"b'\x7fELF' True", "without the plugin: machine code of the card itself"


def settings(**changes: object) -> model.Settings:
    small = {"size": "64x64", "frames": 9, "blocks": 1, "device": "cpu", "repeats": 1}
    return model.Settings(**small | {"precisions": ("bf16", "int8")} | changes)


def test_a_forward_in_each_precision_beside_diffusers() -> None:
    rows = {row.name: row for row in model.measure(settings(peers=("diffusers",), lora=True))}
    assert list(rows) == ["bf16", "int8", "int8+lora", "diffusers"]
    assert all(row.seconds > 0 and row.tokens == 3 * 4 * 4 for row in rows.values())
    assert rows["diffusers"].cosine > 0.999 and rows["diffusers"].speedup == 1
    assert rows["int8"].speedup == rows["diffusers"].seconds / rows["int8"].seconds
    assert rows["int8"].cosine != rows["int8+lora"].cosine, "the LoRA is there"


def test_what_is_far_off_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model.MIN_COSINE, "int8", 1.1)
    with pytest.raises(NumericsError, match=r"int8: cosine 0.99\d+ is under 1.1; nothing was"):
        model.measure(settings())


def test_models_that_text_alone_conditions() -> None:
    with pytest.raises(UsageError, match="needs pictures"):
        true_shapes.text_model("wan2.1-i2v-14b-480p", None)
    with pytest.raises(UsageError, match="31 blocks asked; wan2.1-t2v-1.3b has 30"):
        true_shapes.text_model("wan2.1-t2v-1.3b", 31)
    assert true_shapes.text_model("wan2.2-t2v-a14b", 2).dit.num_layers == 2


def test_a_budget_beside_none() -> None:
    """On a CPU: what the true VAE decodes in does not hold six blocks of the 1.3B, which stream."""
    asked = vram.Settings(
        size="64x64", frames=5, blocks=6, budgets=("560M", "9M"), steps=2, device="cpu"
    )
    free, kept, refused = vram.rows(asked)
    assert free.budget == "" and free.planned is None and free.slowdown == 1
    assert kept.streams > 0 and kept.copied > 0 and 0 < kept.copy < 10
    assert kept.measured <= kept.planned <= 560 << 20 < free.measured
    assert kept.cosine == pytest.approx(1)
    assert "does not fit 9 MiB" in refused.note and refused.measured == 0


def test_blocks_of_the_decoder_beside_their_rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(chain.rows("cpu", 32, 16, 1))
    assert {row.stage for row in rows} == {0, 1, 2, 3}
    assert [row.shape for row in rows if row.name == "int8"] == [
        (1, 384, 1, 2, 4),
        (1, 384, 2, 4, 8),
        (1, 192, 4, 8, 16),
        (1, 96, 4, 16, 32),
    ]
    names = {"bf16", "int8", "cudnn", "diffusers"}
    assert {row.name for row in rows} == names and all(row.seconds for row in rows)
    assert min(row.cosine for row in rows if row.name != "int8") > 0.9999
    assert all(row.over_cudnn == 1 for row in rows if row.name == "cudnn")
    monkeypatch.setitem(chain.MIN_COSINE, "int8", 1.1)
    found = [row for row in chain.rows("cpu", 32, 16, 1) if row.name == "int8"]
    assert all(row.seconds is None and row.cosine > 0.995 for row in found)


def test_a_stage_without_memory_is_a_row_and_ends_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reference of three stages finds none, in the last one way of four."""
    reference = chain_ways.reference

    def full(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def last_alone(case: chain_ways.Case) -> Tensor:
        return reference(case) if case.x.shape[1] == 96 else full()

    monkeypatch.setattr(chain_ways, "reference", last_alone)
    monkeypatch.setattr(chain_ways, "_int8_run", full)
    *failed, int8, bf16, cudnn, diffusers = chain.rows("cpu", 16, 8, 1)
    assert [row.stage for row in failed] == [0, 1, 2]
    note = "not measured: CUDA out of memory."
    assert {row.note for row in (*failed, int8)} == {note} and int8.name == "int8"
    assert bf16.name == "bf16" and cudnn.over_cudnn == 1 and diffusers.seconds > 0
    assert chain._line(int8).endswith(note) and "TFLOP/s" in chain._line(bf16)


def test_slices_run_on_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """One is fine, one dies, one takes too long; what they said before is kept."""
    code = {
        "ops": 'print(\'{"bench": "ops", "case": 1}\'); print(\'by the way\')',
        "chain": "print('{\"bench\": \"chain\"}', flush=True); raise SystemExit('bad address')",
        "vae": 'print(\'{"bench": "vae"}\', flush=True); import time; time.sleep(60)',
    }
    for name, seconds in (("ops", 30.0), ("chain", 30.0), ("vae", 2.0)):
        monkeypatch.setitem(gpu.SLICES, name, gpu.SLICES[name]._replace(seconds=seconds))
    monkeypatch.setattr(gpu, "_command", lambda name, *_: [sys.executable, "-c", code[name]])
    monkeypatch.setitem(gpu.SLICES, "tune", gpu.SLICES["tune"]._replace(seconds=1e9))
    until = time.monotonic() + 40
    assert list(gpu.run(["ops", "chain", "vae", "tune"], "", until)) == [
        {"bench": "ops", "case": 1},
        {"bench": "chain"},
        {"bench": "chain", "broken": True, "note": "bad address"},
        {"bench": "vae"},
        {"bench": "vae", "note": "not finished within 2 s"},
        {"bench": "tune", "note": "not run: out of time (--only tune)"},
    ]
    with pytest.raises(UsageError, match="no slice 'speed'; choose of compile, tests, ops,"):
        gpu.main("ops,speed", "", None)


GRANDCHILD = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print('{"bench": "vae", "pid": %d}' % child.pid, flush=True)
child.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc; Windows has no such groups")
@pytest.mark.parametrize("reads", [1, 2])
def test_a_slice_ends_with_all_that_it_started(reads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where time is over, and where its reader stops: a worker holds its output open."""
    monkeypatch.setattr(gpu, "_command", lambda *_: [sys.executable, "-c", GRANDCHILD])
    begin, lines = time.monotonic(), gpu._child("vae", 2.0, "")
    found = [next(lines) for _ in range(reads)]
    lines.close()
    assert time.monotonic() - begin < 30
    assert found[1:] == [{"bench": "vae", "note": "not finished within 2 s"}][: reads - 1]
    stat = Path(f"/proc/{found[0]['pid']}/stat")
    for _ in range(100):
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return  # gone, or waiting for its parent to hear of it
        time.sleep(0.05)
    raise AssertionError("the grandchild lives")


def test_what_failed_is_named_for_what_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A slice that breaks is no op test; failed op tests are told first."""
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.torch.cuda, "get_device_name", lambda: "a card")
    broken = {"bench": "chain", "broken": True, "note": "out of memory"}
    lines = [{"bench": "tests", "passed": 3, "failed": 0}, broken]
    monkeypatch.setattr(gpu, "run", lambda *_: iter(lines))
    with pytest.raises(WanrtError, match="ended with an error, by .*: chain") as caught:
        gpu.main("", "", tmp_path / "out.jsonl")
    assert not isinstance(caught.value, NumericsError)
    lines[0]["failed"] = 2
    with pytest.raises(NumericsError, match="2 op tests failed on a card"):
        gpu.main("", "", tmp_path / "out.jsonl")
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 4
