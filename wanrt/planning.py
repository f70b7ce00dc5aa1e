"""From a request and a machine to its plan: what `--vram` and `--ram` mean."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from wanrt import env
from wanrt.components import Components, memory_bytes
from wanrt.kernels import registry
from wanrt.memory.budget import enforce, free_bytes, gib, parse_bytes
from wanrt.memory.placement import Ask, Machine
from wanrt.memory.plan import Plan, make_plan, step_down
from wanrt.request import Request

log = logging.getLogger("wanrt")
T = TypeVar("T")

HOST_SHARE = 0.8  # of the machine's memory, where --ram is silent
_FUSED = ("layer_norm_modulate", "rms_norm_rope")  # without copies in fp32 only as one kernel
_CPU = Machine(copy=8e9, read=2e9, flops=2e11, device="cpu", fused=False)


@dataclass(frozen=True)
class Budgets:
    """What the user allows, bytes; None is what the machine has."""

    vram: int | None = None
    ram: int | None = None

    @classmethod
    def parse(cls, vram: str | int | None, ram: str | int | None) -> "Budgets":
        """From `8G` and `32G`. Raises UsageError."""
        return cls(parse_bytes(vram, "--vram"), parse_bytes(ram, "--ram"))


UNLIMITED = Budgets()


def machine_of(device: torch.device) -> Machine:
    """What is known of the machine without measuring it."""
    if device.type == "cpu":
        return _CPU
    target, wanted = registry.here(torch.bfloat16, device.type), env.ops_backend()
    ours = (registry.resolve(op, target, wanted).backend == "triton" for op in _FUSED)
    return Machine(fused=all(ours))


def plan_request(components: Components, ask: Ask, budgets: Budgets) -> Plan:
    """The plan that a request of this size will follow.

    On CUDA the process is held to the budget from here on. Raises BudgetError.
    """
    device = components.device
    vram = free_bytes(device) if budgets.vram is None else budgets.vram
    ram = budgets.ram or int(HOST_SHARE * memory_bytes(torch.device("cpu")))
    plan = make_plan(components.spec, ask, components.dtypes.format, vram, ram, machine_of(device))
    if device.type == "cuda":
        enforce(vram, device)
    return plan


def within_memory(
    components: Components,
    phase: str,
    work: Callable[[], T],
    let_go: Callable[[], None] = lambda: None,
) -> T:
    """What `work` gives. Where the driver refuses memory, a thriftier plan is made and followed.

    `let_go` drops what the caller holds of the parts. Raises BudgetError when nothing is left to
    save. Without a plan the refusal is the caller's.
    """
    while True:
        try:
            return work()
        except RuntimeError as error:
            if components.plan is None or not _ran_out(error):
                raise
            reason = str(error).partition("\n")[0]
        let_go()  # not in the handler, whose traceback holds what should go
        plan = step_down(components.spec, components.plan, phase)
        peak = gib(plan.fixed + plan.options[phase].phase.peak)
        log.warning("memory ran out (%s): %s: going on within %s", phase, reason, peak)
        components.clear()
        components.follow(plan)


def _ran_out(error: RuntimeError) -> bool:
    """PyTorch, the driver, Triton and the libraries each say it in their own way."""
    said = str(error).lower()
    signs = ("out of memory", "alloc_failed")
    return isinstance(error, torch.OutOfMemoryError) or any(sign in said for sign in signs)


def ask_of(
    request: Request,
    text_rows: int,
    refs: int,
    encodes_text: bool,
    decodes: bool,
    lora: int = 0,
) -> Ask:
    """The size of a request, as plans see it; the zero rows behind a prompt are one row more."""
    return Ask(
        request.width,
        request.height,
        request.num_frames,
        guided=request.guided,
        image=request.task in ("i2v", "flf2v", "vace"),
        text_rows=text_rows + 1,
        refs=refs,
        encodes_text=encodes_text,
        decodes=decodes,
        lora=lora,
    )
