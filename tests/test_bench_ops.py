"""The op bench: correctness before speed, and honesty where there is nothing to measure."""

import importlib.machinery
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from wanrt.bench import agreement, measure, ops, peers, rivals, vae
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


class CardIsMeta(TorchFunctionMode):
    """What asks for the card is made on the meta device; what was made on the CPU is counted."""

    def __init__(self) -> None:
        self.on_cpu, self.on_card = 0, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        wanted = kwargs.get("device")
        args = tuple("meta" if isinstance(x, str) and x == "cuda" else x for x in args)
        if wanted is not None and torch.device(wanted).type == "cuda":
            kwargs["device"] = "meta"
        result = func(*args, **kwargs)
        if func in (torch.randn, torch.rand, torch.randint):
            self.on_card += result.numel() * (result.device.type == "meta")
            self.on_cpu += result.numel() * (result.device.type == "cpu")
        return result


def test_large_cases_are_drawn_on_the_card_and_small_ones_alike_everywhere() -> None:
    with CardIsMeta() as seen:
        for case, dtype in ops.wanted():
            drawn = case.draw(dtype, "cuda")
            assert {x.device.type for x in agreement.parts(drawn)} == {"meta"}, case.id
    assert seen.on_cpu == 0 and seen.on_card > 1e10
    with CardIsMeta() as seen:
        CASE.draw(torch.bfloat16, "cuda")
    assert seen.on_card == 0 and seen.on_cpu > 0
    first, second = (CASE.draw(torch.bfloat16)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_long_runs_take_fewer_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []
    seconds = {"short": 0.001, "long": 5.0}

    def clock(device: str, run: Callable[[], object]) -> float:
        name = str(run())
        turns.append(name)
        return seconds[name]

    monkeypatch.setattr(measure, "_on_the_wall", clock)
    runs = {"short": lambda: "short", "long": lambda: "long"}
    assert measure.time_alternating(runs, "cpu") == seconds
    assert turns.count("short") == 1 + 1 + 15 and turns.count("long") == 1 + 3
    turns.clear()
    assert measure.time_alternating(runs, "cpu", 7) == seconds
    assert turns == ["short", "long"] * 8
    assert measure.time_alternating({}, "cpu") == {}


def test_a_card_is_kept_busy_while_a_run_is_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    """L2 is written over, then the card waits; the run lies between the events, nothing else."""
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("event")

        def synchronize(self) -> None:
            order.append("wait")

        def elapsed_time(self, end: "Event") -> float:
            return 2.0

    class Memory:
        def zero_(self) -> None:
            order.append("flush")

    monkeypatch.setattr(measure.torch.cuda, "Event", Event)
    monkeypatch.setattr(measure.torch.cuda, "_sleep", lambda cycles: order.append("sleep"))
    monkeypatch.setattr(measure.torch, "empty", lambda size, **_: Memory())
    found = measure.time_alternating({"a": lambda: order.append("run")}, "cuda", 1)
    assert found == {"a": 0.002}
    assert order[:6] == ["flush", "sleep", "event", "run", "event", "wait"]


def test_what_a_card_cannot_run_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's errors are no RuntimeError."""
    runtime = pytest.importorskip("triton.runtime.errors")
    right, error = registry.function, runtime.OutOfResources(200, 100, "shared memory")

    def fails(*_: object, **__: object) -> Tensor:
        raise error

    monkeypatch.setattr(
        ops.registry, "function", lambda op, name: right(op, name) if name == "torch" else fails
    )
    monkeypatch.setattr(ops.registry, "reason_against", lambda *_: None)
    triton, torch_row = ops.measure(CASE, torch.float32, "cpu")
    assert "out of resource: shared memory, Required: 200" in triton.note
    assert triton.seconds is None and torch_row.seconds > 0
    error = RuntimeError("CUDA out of memory.\n Tried")
    monkeypatch.setattr(ops.registry, "function", lambda *_: fails)
    (row,) = ops.measure(CASE, torch.float32, "cpu")
    assert row.note == "not measured: CUDA out of memory. Tried"


def test_without_triton_its_errors_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.importlib.util, "find_spec", lambda name: None)
    assert measure.faults() == (RuntimeError,)


@pytest.mark.parametrize("name", ["attention_int8-odd", "attention_int8_fp8-odd"])
def test_a_head_of_long_attention_is_compared_and_no_baseline_timed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's result of a head alone is that of the head among others; a wrong one shows."""
    case = all_cases()[name]._replace(flop=lambda *_: 1 << 60)
    tensors = case.draw(torch.bfloat16)
    whole = registry.function(case.op, "torch")(*tensors)
    head = agreement.expected(case, tensors)
    assert head.one_head and torch.equal(head.tensors[0], whole[:, :1])
    assert agreement.nearness(whole, head) == pytest.approx(1)
    right = registry.function

    def other(op: str, backend: str) -> Callable[..., Tensor]:
        factor = 1 if backend == "torch" else -1
        return lambda *tensors, **kwargs: factor * right(op, "torch")(*tensors, **kwargs)

    monkeypatch.setattr(ops.registry, "function", other)
    monkeypatch.setattr(ops.registry, "reason_against", lambda *_: None)
    triton, torch_row = ops.measure(case, torch.bfloat16, "cpu")
    assert triton.note.startswith("not timed: its result is far") and triton.cosine < -0.99
    assert torch_row.seconds is None and "one head" in torch_row.note


def test_which_cases_have_no_baseline() -> None:
    large = {
        case.id
        for case, dtype in ops.wanted("attention")
        if agreement.one_head(case, case.draw(dtype, "meta"))
    }
    assert large == {"attention_int8-14B-720p", "attention_int8_fp8-14B-720p"}


def test_every_op_has_its_turn_before_any_has_its_second() -> None:
    order = [case.op for case, _ in ops.wanted()]
    known = {case.op for case in all_cases().values() if case.size == "wan"}
    assert set(order[: len(known)]) == known
    attention = [(case.id, dtype) for case, dtype in ops.wanted("attention-1.3B")]
    assert [dtype for _, dtype in attention].index(torch.float16) > 1


def test_a_rival_that_does_not_rotate_is_compared_as_if_it_did() -> None:
    case = all_cases()["linear_quantized_out-hadamard-gelu"]
    tensors = case.draw(torch.int8)
    activation = case.kwargs["activation"]
    theirs = rivals._bf16_linear(*tensors, activation=activation)()
    target = agreement.expected(case, tensors)
    theirs = theirs.view(target.tensors[0].shape)
    assert agreement.nearness(rivals.comparable(case, theirs), target) > agreement.MIN_COSINE
    assert agreement.nearness(theirs, target) < 0.9


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


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_without_a_peer_ours_is_checked_against_the_reference(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = vae.make_decoder

    def made(who: str, name: str, device: str) -> Callable[[Tensor], Tensor]:
        decode = make(who, name, device)
        return decode if who == "reference" else lambda latents: factor * decode(latents)

    monkeypatch.setattr(vae, "make_decoder", made)
    monkeypatch.setattr(vae, "_peak_in_child", lambda *_: 1.0)
    if factor != 1:
        with pytest.raises(NumericsError, match="nothing was timed"):
            vae.measure("cpu", None, "fp32", (2, 2), 1)
        return
    assert 0 < vae.measure("cpu", None, "fp32", (2, 2), 1)["error"] < 1e-4
