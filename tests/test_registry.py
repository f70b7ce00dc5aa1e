"""Which backend does an op, and why: decided once, with reasons, and never the interpreter."""

import json
import logging

import pytest
import torch

from wanrt import cli_machine
from wanrt.engine.kinds import LIBRARIES
from wanrt.errors import UsageError
from wanrt.kernels import registry, torch_ops
from wanrt.kernels.cases import dtypes_of
from wanrt.kernels.target import Target, UnsupportedOp
from wanrt.models import layers
from wanrt.models.vae_layers import VaeOps

CPU = Target("cpu", 0, torch.float32)


def card(arch: int, dtype: torch.dtype = torch.bfloat16) -> Target:
    return Target("cuda", arch, dtype)


@pytest.mark.parametrize("name", registry.OPS)
def test_a_cpu_gets_pytorch(name: str) -> None:
    """Even where Triton's interpreter would run, as in these tests."""
    choice = registry.resolve(name, CPU)
    assert choice.backend == "torch" and "triton" in choice.declined


@pytest.mark.parametrize("name", [op.name for op in registry.OPS.values() if op.triton])
def test_a_card_gets_triton(name: str) -> None:
    pytest.importorskip("triton")
    assert registry.resolve(name, card(89, dtypes_of(name)[-1])).backend == "triton"


@pytest.mark.parametrize(
    ("target", "backend", "reason"),
    [
        (card(75), "triton", "needs compute capability 8.0, not 7.5"),
        (card(89, torch.float64), "triton", "not torch.float64"),
        (Target("mps", 0, torch.float16), "triton", "needs an NVIDIA GPU"),
    ],
)
def test_reasons(target: Target, backend: str, reason: str) -> None:
    pytest.importorskip("triton")
    with pytest.raises(UnsupportedOp, match=reason):
        registry.resolve("rms_norm", target, backend)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None)
    choice = registry.resolve("rms_norm", card(89))
    assert choice.backend == "torch" and choice.declined == {"triton": "Triton is not installed"}


@pytest.mark.parametrize("ops", [layers.Ops, VaeOps])
def test_models_take_what_was_resolved(
    ops: type, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "wanrt")
    chosen = layers.choose(ops, torch.device("cpu"), torch.float32)
    assert chosen == ops(*(registry.function(name, "torch") for name in ops._fields))
    assert len(caplog.records) == len(ops._fields)
    monkeypatch.setenv("WANRT_OPS", "reference")
    chosen = layers.choose(ops, torch.device("cpu"), torch.float32)
    assert chosen == ops(*(registry.function(name, "reference") for name in ops._fields))


def test_a_wrong_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANRT_OPS", "cuda")
    with pytest.raises(UsageError, match="WANRT_OPS is 'cuda'; choose of auto"):
        layers.choose(layers.Ops, torch.device("cpu"), torch.float32)
    monkeypatch.setenv("WANRT_OPS", "triton")
    monkeypatch.setattr(registry, "INTERPRETING", False)
    with pytest.raises(UsageError, match="cannot run on cpu"):
        layers.choose(layers.Ops, torch.device("cpu"), torch.float32)


def test_the_verb_says_what_does_each_op(capsys: pytest.CaptureFixture[str]) -> None:
    cli_machine.ops(device="cpu", as_json=True)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    rows, engines = [row for row in rows if "op" in row], [row for row in rows if "engine" in row]
    assert [row["op"] for row in rows] == list(registry.OPS)
    assert {row["backend"] for row in rows} == {"torch"}
    assert {row["op"]: row["dtype"] for row in rows}["linear_quantized"] == "int8"
    assert [row["engine"] for row in engines] == list(LIBRARIES)
    assert all("not tested on hardware" in row["tested"] for row in engines)
    cli_machine.ops(device="cpu")
    table, _, engines = capsys.readouterr().out.partition("\n\n")
    table = table.splitlines()
    assert len(table) == 1 + len(registry.OPS) and all("yes, used" in row for row in table[1:])
    assert all(name in engines for name in LIBRARIES)
    with pytest.raises(UsageError, match="dtype 'fp4' does not exist; choose fp32"):
        cli_machine.ops(dtype="fp4")


def test_the_default_arithmetic_is_pytorchs() -> None:
    assert layers.TORCH.attention is torch_ops.attention
