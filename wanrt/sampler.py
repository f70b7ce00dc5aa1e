"""Flow-matching schedules (the sigmas a request visits) and the ODE solvers that step between them.

Convention: `x_sigma = (1 - sigma) * x0 + sigma * noise` and velocity `v = noise - x0`, hence
`x0 = x_sigma - sigma * v` and `dx/dsigma = v`. Latents are fp32 and stay on their device. Sigmas
are fp32 on the CPU, and so are the scalar coefficients, in the reference's order of operations: on
the CPU the solvers give the reference's bits.

Sources: Wan2.1 @9737cba `wan/utils/fm_solvers_unipc.py`, `wan/utils/fm_solvers.py`; LightX2V
@f8aee98 (four-step list); UniPC, arXiv 2302.04867; DPM-Solver++, arXiv 2211.01095.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from wanrt.config import Solver
from wanrt.errors import UsageError

NUM_TRAIN_STEPS = 1000
MAX_STEPS = 1000
MAX_FLOW_SHIFT = 100.0
LIGHTX2V_STEPS = (1000, 750, 500, 250)

# The reference reads it from its table of training sigmas, which is fp32.
_UNIPC_START = float(np.float32(0.999))


class Schedule(NamedTuple):
    """What the network is told, `timesteps` [N], and where the solver is, `sigmas` [N + 1] fp32."""

    timesteps: Tensor
    sigmas: Tensor


def schedule(solver: Solver, num_steps: int, flow_shift: float) -> Schedule:
    """Timesteps and sigmas of `num_steps` steps, on the CPU; the last sigma is 0.

    `unipc` and `dpm++` are the reference's lists: timesteps are int64, truncated from the float64
    sigmas; UniPC starts at 0.999 before the shift, DPM++ at exactly 1. The reference has no
    `euler`: here it visits the sigmas of `dpm++` and tells the network `1000 * sigma` as fp32. That
    is what ComfyUI does with `euler` and `simple` where `num_steps` divides 1000, and with four
    steps it is `distilled_schedule()`.
    """
    _check(num_steps, flow_shift)
    if solver not in ("unipc", "dpm++", "euler"):
        raise UsageError(f"solver {solver!r} does not exist; choose unipc, dpm++ or euler")
    start = _UNIPC_START if solver == "unipc" else 1.0
    shifted = _shift(np.linspace(start, 0.0, num_steps + 1)[:-1], flow_shift)
    if solver == "euler":
        return _untruncated(shifted)
    return Schedule(torch.from_numpy(shifted * NUM_TRAIN_STEPS).long(), _with_zero(shifted))


def distilled_schedule(steps: Sequence[int] = LIGHTX2V_STEPS, flow_shift: float = 5.0) -> Schedule:
    """Schedule of a step-distilled model, from its falling list of training steps in 1..1000.

    Timesteps are fp32, not truncated. For `Euler`, without guidance.
    """
    _check(len(steps), flow_shift)
    falling = all(a > b for a, b in zip(steps, steps[1:], strict=False))
    if not falling or steps[0] > NUM_TRAIN_STEPS or steps[-1] < 1:
        raise UsageError(
            f"distilled steps {list(steps)}: give falling numbers from {NUM_TRAIN_STEPS} to 1, "
            f"as {list(LIGHTX2V_STEPS)}"
        )
    return _untruncated(_shift(np.array(steps) / NUM_TRAIN_STEPS, flow_shift))


def _check(num_steps: int, flow_shift: float) -> None:
    if not 1 <= num_steps <= MAX_STEPS:
        raise UsageError(f"{num_steps} steps: use 1 to {MAX_STEPS} (Wan's defaults are 40 and 50)")
    if not 0 < flow_shift <= MAX_FLOW_SHIFT:
        raise UsageError(
            f"flow shift {flow_shift}: use more than 0 and at most {MAX_FLOW_SHIFT:g} "
            "(Wan's defaults are 3 to 16)"
        )


def _shift(u: np.ndarray, flow_shift: float) -> np.ndarray:
    return flow_shift * u / (1 + (flow_shift - 1) * u)


def _with_zero(sigmas: np.ndarray) -> Tensor:
    return torch.from_numpy(np.append(sigmas, 0.0).astype(np.float32))


def _untruncated(shifted: np.ndarray) -> Schedule:
    sigmas = _with_zero(shifted)
    return Schedule(sigmas[:-1] * NUM_TRAIN_STEPS, sigmas)


class FlowSolver(Protocol):
    """A solver on its way; its fields (tensors and ints) are its whole state and can be saved."""

    sigmas: Tensor
    index: int

    def step(self, velocity: Tensor, latents: Tensor) -> Tensor:
        """Latents at `sigmas[index + 1]`, given them and their velocity at `sigmas[index]`."""
        ...


def make_solver(solver: Solver, sigmas: Tensor) -> FlowSolver:
    """A solver at the start of `sigmas` [N + 1], good for N steps."""
    return {"unipc": UniPC, "dpm++": DPMpp, "euler": Euler}[solver](sigmas)


@dataclass
class Euler:
    """Order 1: `x' = x + (sigma' - sigma) * v`."""

    sigmas: Tensor
    index: int = 0

    def step(self, velocity: Tensor, latents: Tensor) -> Tensor:
        sigma, sigma_next = self.sigmas[self.index], self.sigmas[self.index + 1]
        self.index += 1
        return latents + (sigma_next - sigma) * velocity


@dataclass
class DPMpp:
    """DPM-Solver++, multistep, order 2 in midpoint form; order 1 in the first and the last step."""

    sigmas: Tensor
    index: int = 0
    x0: Tensor | None = None  # prediction of the step before

    def step(self, velocity: Tensor, latents: Tensor) -> Tensor:
        i, lam = self.index, _log_snr(self.sigmas)
        h = lam[i + 1] - lam[i]
        gain = (1 - self.sigmas[i + 1]) * (torch.exp(-h) - 1)
        x0 = latents - self.sigmas[i] * velocity
        out = self.sigmas[i + 1] / self.sigmas[i] * latents - gain * x0
        if self.x0 is not None and i + 2 < len(self.sigmas):
            # After a start at sigma 1, where lambda is -inf, r is inf once and the slope 0.
            r = (lam[i] - lam[i - 1]) / h
            out = out - 0.5 * gain * ((1 / r) * (x0 - self.x0))
        self.x0 = x0
        self.index += 1
        return out


@dataclass
class UniPC:
    """UniPC of order 2 (bh2, data prediction); order 1 in the first and the last step.

    Each step first corrects the sample that it is given, then predicts the next one. Correcting
    costs no network call: it uses the prediction made at the uncorrected sample, and that one is
    kept. Costs four tensors of the size of the latents.

    NOTE: where the first two timesteps are equal (from 68 steps at shift 16, 92 at 12, 251 at 5)
    the reference mistakes the second for its start, runs out of sigmas and fails an assertion in
    its last step. There is nothing to reproduce; here the count always starts at the first sigma.
    """

    sigmas: Tensor
    index: int = 0
    order: int = 0  # of the last prediction
    sample: Tensor | None = None  # corrected sample of the step before
    x0: Tensor | None = None  # prediction of the step before
    x0_before: Tensor | None = None  # prediction of the step before that

    def step(self, velocity: Tensor, latents: Tensor) -> Tensor:
        num_steps = len(self.sigmas) - 1
        x0 = latents - self.sigmas[self.index] * velocity
        if self.x0 is not None:
            latents = self._cross(x0 - self.x0)
        self.sample, self.x0, self.x0_before = latents, x0, self.x0
        self.order = min(2, num_steps - self.index, self.index + 1)
        self.index += 1
        return self._cross(None)

    def _cross(self, change: Tensor | None) -> Tensor:
        """Sample at `sigmas[index]` from the state at `sigmas[index - 1]`.

        Predicts while the `change` of x0 over the interval is unknown (None), else corrects.
        """
        assert self.sample is not None and self.x0 is not None
        i, lam = self.index, _log_snr(self.sigmas)
        h = lam[i] - lam[i - 1]
        gain = (1 - self.sigmas[i]) * torch.expm1(-h)
        out = self.sigmas[i] / self.sigmas[i - 1] * self.sample - gain * self.x0
        if self.order == 1:
            return out if change is None else out - gain * (0.5 * change)
        assert self.x0_before is not None
        r = (lam[i - 2] - lam[i - 1]) / h
        slope = (self.x0_before - self.x0) / r
        if change is None:
            return out - gain * (0.5 * slope)
        weights = _corrector_weights(r, h)
        return out - gain * (weights[0] * slope + weights[1] * change)


def _corrector_weights(r: Tensor, h: Tensor) -> Tensor:
    """Weights [2] of the slope behind, over `r` (negative) intervals, and of the change ahead."""
    one = torch.ones_like(r)
    phi = torch.expm1(-h) / -h - 1
    moments = torch.stack([phi, (phi / -h - 0.5) * 2]) / torch.expm1(-h)
    nodes = torch.stack([torch.stack([one, one]), torch.stack([r, one])])
    return torch.linalg.solve(nodes, moments)


def _log_snr(sigmas: Tensor) -> Tensor:
    """`lambda = log(1 - sigma) - log(sigma)`: -inf at sigma 1, inf at sigma 0."""
    return torch.log(1 - sigmas) - torch.log(sigmas)
