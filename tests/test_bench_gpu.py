"""What `wanrt bench gpu` brings to a GPU, as far as it runs without one."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wanrt.bench import chain, chain_ways, gpu, gpu_slices, model, true_shapes, tune, vram
from wanrt.bench import compile as gate
from wanrt.errors import NumericsError, UsageError, WanrtError
from wanrt.kernels.cases import all_cases
from wanrt.kernels.target import Target

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


def test_ours_is_decoded_where_no_peer_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """And where a peer fails; one that is absent has its row."""
    asked = gpu_slices.Asked("", time.monotonic() + 60)

    def measure(device: str, peer: str | None, *_: object) -> dict[str, float]:
        if peer:
            raise NumericsError("relative error 2 is over 0.06")
        return {"wanrt_s": 1.0}

    monkeypatch.setattr(gpu_slices.vae, "measure", measure)
    monkeypatch.setattr(gpu_slices.peers, "absent", lambda p: "absent" if p == "fastvae" else None)
    ours, diffusers, fastvae = gpu_slices.decoded(asked)
    assert ours["peer"] is None and ours["wanrt_s"] == 1
    assert diffusers["note"] == "not measured: relative error 2 is over 0.06"
    assert fastvae["note"] == "absent"


Threads = partial(ThreadPoolExecutor, 1)


def test_the_tuners_slice_goes_on_where_a_key_has_no_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One key is answered, no tile of the next is right, for the third there is no time."""
    asked = gpu_slices.Asked("", time.monotonic() + 60)
    case = all_cases()["causal_conv3d-96"]
    questions = [tune.Question(k, [(1,), (2,)], case, torch.bfloat16) for k in "abc"]

    def answer(question: tune.Question, *_: object) -> tune.Answer:
        if question.key == "b":
            object.__setattr__(asked, "until", 0.0)
            raise NumericsError("b: no tile is right")
        return tune.Answer(question, {(2,): 1.0, (1,): 2.0}, ("(3,): out of resource",))

    monkeypatch.setattr(gpu_slices.torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(gpu_slices.gate, "pool", Threads)
    monkeypatch.setattr(gpu_slices.gate, "jobs", lambda *_, **__: [1, 0, 1])
    monkeypatch.setattr(gpu_slices.gate, "warm_job", bool)
    monkeypatch.setattr(gpu_slices.tune, "questions", lambda cases: questions)
    monkeypatch.setattr(gpu_slices.tune, "answer", answer)
    monkeypatch.setattr(gpu_slices.tune, "write", lambda *args: None)
    compiled, first, second, third = gpu_slices.tuned(asked)
    assert compiled.items() >= {"kernels": 3, "left": 0, "not compiled": 1}.items()
    assert first["key"] == "a" and first["tiles"][0] == {"tile": (2,), "seconds": 1.0}
    assert first["default"] == (1,) and "out of resource" in first["faults"][0]
    assert second == {"key": "b", "note": "no answer: b: no tile is right"}
    assert third == {"key": "c", "note": "not asked: out of time"}


def test_compiling_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done is told, and how much is left; the tests' kernels come after the models'."""

    def slow(job: float) -> gate.Row:
        time.sleep(job)
        return gate.Row("norm", "a", 90, 4, 9, 8, 0, (), None, ("spills 8 bytes",))

    def jobs(archs: list[int], only: str, size: str = "wan") -> list[float]:
        return [0.0, 0.0, 3.0, 0.0] if size == "wan" else [0.0] * archs[0]

    monkeypatch.setattr(gpu_slices.gate, "pool", Threads)
    monkeypatch.setattr(gpu_slices.gate, "jobs", jobs)
    monkeypatch.setattr(gpu_slices.gate, "compile_job", slow)
    monkeypatch.setattr(gpu_slices.gate, "warm_job", lambda job: True)
    monkeypatch.setattr(gpu_slices.registry, "here", lambda: Target("cuda", 90, torch.bfloat16))
    asked = gpu_slices.Asked("", time.monotonic() + 1)
    cut, *_ = gpu_slices.compiled(asked)
    assert (cut["kernels"], cut["left"]) == (2, 2)
    assert cut["faults"] == ["norm (a): spills 8 bytes"] * 2
    monkeypatch.setattr(gpu_slices.gate, "compile_job", lambda job: slow(0))
    whole, own, consumers = gpu_slices.compiled(gpu_slices.Asked("", time.monotonic() + 60))
    assert whole["left"] == 0 and (own["as"], own["kernels"]) == (90, 90)
    assert (consumers["as"], consumers["kernels"], consumers["left"]) == (89, 89, 0)


def test_ops_without_time_have_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_slices.ops, "ceilings", dict)
    rows = list(gpu_slices.measured(gpu_slices.Asked("rms_norm_rope", time.monotonic() - 1)))
    late = [row for row in rows if row.get("note") == "not measured: out of time"]
    assert {(row["case"], row["dtype"]) for row in late} == {
        ("rms_norm_rope-1536x32760", "bfloat16"),
        ("rms_norm_rope-5120x32760", "bfloat16"),
    }


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
