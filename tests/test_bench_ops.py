"""The op bench: correctness before speed, and honesty where there is nothing to measure."""

import importlib.machinery
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from wanrt.bench import ops, peers, vae
from wanrt.errors import NumericsError
from wanrt.kernels import registry
from wanrt.kernels.cases import all_cases

CASE = all_cases()["rms_norm-odd"]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("rms_norm-odd", torch.float32), ("linear_quantized_out-odd", torch.int8)],
)
def test_both_backends_are_timed_when_they_agree(name: str, dtype: torch.dtype) -> None:
    triton, torch_row = ops.measure(all_cases()[name], dtype, "cpu")
    assert torch_row.seconds > 0 and torch_row.speedup == 1 and torch_row.cosine > 0.999999
    assert torch_row.gbytes_per_s > 0 and torch_row.backend == "torch"
    if triton.seconds is None:
        assert triton.note.startswith("not measured: ")
    else:
        assert triton.speedup == torch_row.seconds / triton.seconds


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = registry.function

    def wrong(op: str, backend: str) -> Callable[..., Tensor]:
        if backend == "torch":
            return right(op, "torch")
        return lambda x, *_, **__: torch.full_like(x, torch.nan)

    monkeypatch.setattr(ops.registry, "function", wrong)
    monkeypatch.setattr(ops.registry, "reason_against", lambda *_: None)
    triton, torch_row = ops.measure(CASE, torch.float32, "cpu")
    assert triton.seconds is None and triton.note.startswith("not timed: its result is far")
    assert torch_row.seconds > 0


def test_an_op_without_a_kernel_says_so() -> None:
    triton, torch_row = ops.measure(all_cases()["gelu-tanh"], torch.float32, "cpu")
    assert triton.seconds is None and triton.note == "not measured: not written; PyTorch does it"
    assert torch_row.seconds > 0


class StandInFastvae:
    """fastvae 0.1.0's interface: `FastVAEDecoder.from_vae(vae).decode(latents)`, by diffusers."""

    def __init__(self, vae: nn.Module, factor: float) -> None:
        self.vae, self.factor = vae, factor

    def decode(self, z: Tensor) -> Tensor:
        return self.vae.decode(z).sample * self.factor


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_fastvae_decodes_our_weights_and_must_agree(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("fastvae")
    module.__spec__ = importlib.machinery.ModuleSpec("fastvae", None)
    made = []

    class FastVAEDecoder:
        @classmethod
        def from_vae(cls, vae: nn.Module) -> StandInFastvae:
            made.append(type(vae).__name__)
            return StandInFastvae(vae, factor)

    module.FastVAEDecoder = FastVAEDecoder
    monkeypatch.setitem(sys.modules, "fastvae", module)
    monkeypatch.setattr(vae, "_peak_in_child", lambda *_: 1.0)
    assert peers.absent("fastvae") is None
    if factor != 1:
        with pytest.raises(NumericsError, match="nothing was timed"):
            vae.measure("cpu", "fastvae", "fp32", (2, 2), 1)
        return
    row = vae.measure("cpu", "fastvae", "fp32", (2, 2), 1)
    assert made == ["AutoencoderKLWan"] and row["error"] < 1e-4
    assert row["ratio"] == row["wanrt_s"] / row["fastvae_s"]


def test_an_absent_peer_is_a_reported_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(vae, "_peak_in_child", lambda *_: 1.0)
    vae.main("cpu", "fastvae", ["fp32"], ["16x16"], 1, False)
    out = capsys.readouterr().out
    assert "fastvae: absent (make peers): needs fastvae, diffusers" in out and "wanrt" in out
    assert "ratio" not in out
