"""A request within its memory: its plan on this machine, and thriftier ones where it is refused."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch

from wanrt import env
from wanrt.components import Components
from wanrt.errors import BudgetError, NumericsError
from wanrt.kernels import registry
from wanrt.memory.budget import enough, gib
from wanrt.memory.card import enforce, free_bytes, on_card
from wanrt.memory.placement import Machine
from wanrt.memory.plan import Plan, make_plan, plan_for_any_text, relearned, step_down
from wanrt.planning import CPU, Budgets, question_of
from wanrt.request import Request

log = logging.getLogger("wanrt")
T = TypeVar("T")

_FUSED = ("layer_norm_modulate", "rms_norm_rope")  # without copies in fp32 only as one kernel


def machine_of(device: torch.device) -> Machine:
    """What is known of the machine without measuring it."""
    if device.type == "cpu":
        return CPU
    target, wanted = registry.here(torch.bfloat16, device.type), env.ops_backend()
    ours = (registry.resolve(op, target, wanted).backend == "triton" for op in _FUSED)
    return Machine(fused=all(ours))


def plan_request(
    components: Components,
    request: Request,
    budgets: Budgets,
    num_tokens: int,
    *,
    refs: int,
    encodes_text: bool,
    decodes: bool,
) -> Plan:
    """The plan that a request will follow, with what this pipeline's refusals have taught.

    num_tokens: of its longer prompt; the others as in `question_of`. On CUDA the process is held to
    the budget from here on. Raises BudgetError.
    """
    device = components.device
    question = question_of(
        components.spec,
        request,
        components.dtypes.format,
        budgets,
        machine_of(device),
        refs=refs,
        encodes_text=encodes_text,
        decodes=decodes,
        lora=components.lora_bytes(request.loras),
        packed=components.packed,
        packed_text=components.packed_text,
        engines=components.engine_bytes,
        vae=components.dtypes.vae_format,
    )
    vram = _vram_of(budgets, device)
    plan = plan_for_any_text(question, vram, components.lessons)
    rows = min(num_tokens + 1, components.spec.dit.text_len)  # the zeros behind it are one more
    if rows > plan.ask.text_rows:
        raise BudgetError(_too_long(plan, rows))
    if device.type == "cuda":
        enforce(vram, device)
    return plan


def _vram_of(budgets: Budgets, device: torch.device) -> int | None:
    """The budget asked for, as the card can keep it; where none was, what is free on it."""
    if budgets.vram is None:
        return free_bytes(device)
    return on_card(budgets.vram, device) if device.type == "cuda" else budgets.vram


def _too_long(plan: Plan, rows: int) -> str:
    whole = replace(plan.question, ask=replace(plan.ask, text_rows=rows)).least()
    return (
        f"prompt and negative have up to {rows} tokens; beside {plan.ask.width}x{plan.ask.height}, "
        f"{plan.ask.num_frames} frames, {gib(plan.budget or 0)} leave room for "
        f"{plan.ask.text_rows}; what would do: shorter texts, or --vram {enough(whole)}"
    )


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
        plan = step_down(components.plan, phase)
        peak = gib(plan.fixed + plan.options[phase].phase.peak)
        log.warning("memory ran out (%s): %s: going on within %s", phase, reason, peak)
        components.learn(plan.lessons)
        components.clear()
        components.follow(plan)


def up_to_date(plan: Plan, components: Components) -> Plan:
    """The plan with what refusals have taught, for the VAE as it now keeps its numbers.

    Raises BudgetError where that does not fit.
    """
    vae, lessons = components.dtypes.vae_format, plan.lessons.merged(components.lessons)
    if plan.question.vae in (None, vae):
        return relearned(plan, lessons)
    return make_plan(replace(plan.question, vae=vae), plan.budget, lessons)


def make_vae_safer(components: Components, where: str) -> None:
    """After NaN in the VAE: have it one notch safer from now on, by a plan for what it then holds.

    `where` is what messages call it. Raises NumericsError where nothing safer is left, BudgetError
    where that does not fit.
    """
    changed = components.safer("vae")
    if changed is None:
        raise NumericsError(f"{where} gave NaN or infinity; is the VAE's file sound?")
    log.warning("%s gave NaN or infinity; once more: %s", where, changed)
    if components.plan is not None:
        components.follow(up_to_date(components.plan, components))


def _ran_out(error: RuntimeError) -> bool:
    """PyTorch, the driver, Triton and the libraries each say it in their own way."""
    said = str(error).lower()
    signs = ("out of memory", "alloc_failed")
    return isinstance(error, torch.OutOfMemoryError) or any(sign in said for sign in signs)
