"""The transformer of one request: the expert that a step wants, its texts, its velocities."""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from wanrt import sampler
from wanrt.budgeted import within_memory
from wanrt.components import Components
from wanrt.conditions import Conditions
from wanrt.config import Lora
from wanrt.errors import NumericsError
from wanrt.guidance import Expert
from wanrt.request import Request
from wanrt.watch import find_culprit, healthy

log = logging.getLogger("wanrt")


class Velocities(NamedTuple):
    """With the prompt and, where guidance asks for it, without; fp32 `[1, C, T, h, w]`."""

    cond: Tensor
    uncond: Tensor | None


class _Loaded(NamedTuple):
    """An expert, and keys and values that it made of the prompt and of the negative one."""

    expert: Expert
    dit: nn.Module
    text: Any
    negative: Any


class Denoiser:
    """Computes velocities; one expert goes before the other comes.

    Where the driver refuses memory, the step is computed again by a thriftier plan: blocks that
    stayed stream from then on, and no finished step is lost.
    """

    def __init__(
        self,
        components: Components,
        conditions: Conditions,
        loras: tuple[Lora, ...] = (),
    ) -> None:
        self._components, self._conditions, self._loras = components, conditions, loras
        self._loaded: _Loaded | None = None

    def velocities(
        self, x: Tensor, t: float, expert: Expert, guided: bool, step: str = "the step"
    ) -> Velocities:
        """x: latents fp32 `[1, C, T, h, w]`; t in [0, 1000]; `step` is what messages call it.

        Where numbers go wrong, the step is computed again one notch safer. Raises NumericsError
        when no notch is left.
        """

        def compute() -> Velocities:
            return self._compute(x, t, expert, guided)

        while True:
            found = within_memory(self._components, "step", compute, self._let_go)
            if healthy(*found):
                return found
            if not healthy(x):
                raise NumericsError(f"{step}: the latents given hold NaN or infinity")
            self._be_safer(step, compute)

    def _be_safer(self, step: str, compute: Callable[[], Velocities]) -> None:
        assert self._loaded is not None
        culprit = find_culprit(self._loaded.dit, compute)
        where = f"{culprit.layer} gave {culprit.saw}" if culprit else "the velocity went wrong"
        now = self._components.dtypes.name
        self._let_go()
        changed = self._components.safer("dit")
        if changed is None:
            raise NumericsError(
                f"{step}: {where}, and nothing safer than {now} as it runs now is left; is the "
                "checkpoint sound? (try --precision fp32)"
            )
        log.warning("%s: %s in %s; once more: %s", step, where, now, changed)

    def release(self) -> None:
        """Let the transformer go, unless it fits beside everything else."""
        self._let_go()
        self._components.release("dit", "low_noise")

    def _compute(self, x: Tensor, t: float, expert: Expert, guided: bool) -> Velocities:
        loaded = self._load(expert)
        texts = [loaded.text, loaded.negative] if guided else [loaded.text]
        plan, inputs = self._components.plan, self._conditions.step_inputs(t)
        if plan is not None and plan.guidance == "interleaved":
            found = loaded.dit.forward_each(x, inputs.t, texts, **inputs.extra)
        else:
            found = [loaded.dit(x, inputs.t, text, **inputs.extra) for text in texts]
        return Velocities(found[0], found[1] if guided else None)

    def _load(self, expert: Expert) -> _Loaded:
        if self._loaded is None or self._loaded.expert != expert:
            self._let_go()
            with self._components.clock.phase("prepare"):
                dit = self._components.dit(expert, self._loras)
                self._loaded = _Loaded(expert, dit, *self._conditions.prepare(dit))
        return self._loaded

    def _let_go(self) -> None:
        self._loaded = None


def schedule_of(request: Request) -> sampler.Schedule:
    """The noise levels of a request; step-distilled models have a list of their own."""
    if request.distilled:
        count = request.num_steps
        steps = [round(1000 * (1 - i / count)) for i in range(count)]
        return sampler.distilled_schedule(steps, request.flow_shift)
    return sampler.schedule(request.solver, request.num_steps, request.flow_shift)
