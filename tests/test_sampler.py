"""Schedules against the reference's values; solvers against diffusers and a solvable ODE."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from wanrt.errors import UsageError
from wanrt.guidance import expert_for, guidance_for, guide
from wanrt.sampler import DPMpp, Euler, UniPC, distilled_schedule, make_solver, schedule

UNIPC_50_SHIFT_5 = (
    "999 995 991 987 982 978 973 968 963 957 952 946 940 934 927 920 913 906 898 890 882 873 863 "
    "854 843 833 821 809 796 783 768 753 737 720 701 681 660 636 611 584 555 522 487 448 405 356 "
    "302 241 172 92"
)
# solver, steps, shift, first timesteps, last timesteps: the reference's
TIMESTEPS = [
    ("unipc", 50, 5.0, UNIPC_50_SHIFT_5, UNIPC_50_SHIFT_5),
    ("unipc", 50, 3.0, "999 992 985 978 971 963 956 948 939 931", "290 249 206 160 111 57"),
    ("unipc", 50, 8.0, "999 997 994 991 989 986 983", "521 470 409 337 249 140"),
    ("unipc", 50, 16.0, "999 998 997 995 994 993 991", "752 722 685 639 581 504 399 245"),
    ("unipc", 40, 3.0, "999 991 982 973 963 954", "388 345 299 249 195 136 71"),
    ("unipc", 40, 5.0, "999 994 989 983 978 972", "416 356 288 208 113"),
    ("unipc", 40, 12.0, "999 997 995 993 990 988", "717 678 631 571 492 386 235"),
    ("unipc", 10, 5.0, "999 978 952 920 882 833 768 681 555 356", ""),
    ("dpm++", 50, 5.0, "1000 995 991 987 982 978 973", "448 405 357 303 241 172 92"),
]


@pytest.mark.parametrize(("solver", "num_steps", "flow_shift", "first", "last"), TIMESTEPS)
def test_timesteps_are_the_references(
    solver: str, num_steps: int, flow_shift: float, first: str, last: str
) -> None:
    timesteps, sigmas = schedule(solver, num_steps, flow_shift)
    got, head, tail = timesteps.tolist(), first.split(), last.split()
    assert timesteps.dtype == torch.int64 and len(got) == num_steps == len(sigmas) - 1
    assert got[: len(head)] == [int(t) for t in head]
    assert got[num_steps - len(tail) :] == [int(t) for t in tail]


SIGMAS = [
    ("unipc", 5.0, [0.99979985, 0.99573237, 0.99153048, 0.98718739]),
    ("unipc", 3.0, [0.99966645]),
    ("unipc", 8.0, [0.99987489]),
    ("unipc", 16.0, [0.99993742]),
    ("dpm++", 5.0, [1.0, 0.99593496, 0.9917355]),
]


@pytest.mark.parametrize(("solver", "flow_shift", "expected"), SIGMAS)
def test_sigmas_are_the_references(solver: str, flow_shift: float, expected: list[float]) -> None:
    sigmas = schedule(solver, 50, flow_shift).sigmas
    assert torch.equal(sigmas[: len(expected)], torch.tensor(expected, dtype=torch.float32))
    assert sigmas[-1] == 0


def test_the_end_of_the_unipc_list() -> None:
    tail = schedule("unipc", 50, 5.0).sigmas[-4:].tolist()
    # The values are known to eight decimals.
    assert tail == pytest.approx([0.24174035, 0.17226514, 0.09250686, 0.0], rel=0, abs=5e-9)


def test_the_network_hears_truncated_timesteps_while_the_solver_keeps_the_sigmas() -> None:
    timesteps, sigmas = schedule("unipc", 10, 5.0)
    fraction = sigmas[:-1].double() * 1000 - timesteps
    assert fraction.min() >= 0 and 0.5 < fraction.max() < 1


def test_euler_visits_the_sigmas_of_dpmpp_with_untruncated_timesteps() -> None:
    timesteps, sigmas = schedule("euler", 50, 5.0)
    assert torch.equal(sigmas, schedule("dpm++", 50, 5.0).sigmas)
    assert torch.equal(timesteps, sigmas[:-1] * 1000)
    assert timesteps[1].item() == pytest.approx(995.93496, abs=1e-4)


def test_the_four_step_distilled_list_is_eulers() -> None:
    distilled = distilled_schedule([1000, 750, 500, 250], 5.0)
    assert distilled.sigmas.tolist() == pytest.approx([1, 0.9375, 5 / 6, 0.625, 0], abs=1e-7)
    assert torch.equal(distilled.timesteps, distilled.sigmas[:-1] * 1000)
    euler = schedule("euler", 4, 5.0)
    assert torch.equal(distilled.sigmas, euler.sigmas)
    assert torch.equal(distilled.timesteps, euler.timesteps)


def test_a_distilled_list_need_not_be_even() -> None:
    sigmas = distilled_schedule([1000, 757, 522], 8.0).sigmas.double().numpy()
    u = np.array([1.0, 0.757, 0.522])
    np.testing.assert_allclose(sigmas[:-1], 8 * u / (1 + 7 * u), rtol=1e-7)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: schedule("unipc", 0, 5.0), "0 steps"),
        (lambda: schedule("unipc", -3, 5.0), "-3 steps"),
        (lambda: schedule("dpm++", 1001, 5.0), "1001 steps"),
        (lambda: schedule("unipc", 50, 0.0), "flow shift 0.0"),
        (lambda: schedule("euler", 50, math.nan), "flow shift nan"),
        (lambda: schedule("euler", 50, 1e9), "flow shift 1000000000.0"),
        (lambda: schedule("heun", 50, 5.0), "'heun'"),
        (lambda: distilled_schedule([]), "0 steps"),
        (lambda: distilled_schedule([250, 500]), r"\[250, 500\]"),
        (lambda: distilled_schedule([1000, 500, 0]), r"\[1000, 500, 0\]"),
        (lambda: distilled_schedule([1001, 500]), r"\[1001, 500\]"),
    ],
)
def test_an_impossible_schedule_is_refused(call: Callable[[], object], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        call()


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
@pytest.mark.parametrize("flow_shift", [0.01, 1.0, 100.0])
def test_the_extremes_that_are_allowed_stay_finite(solver: str, flow_shift: float) -> None:
    latents = torch.linspace(-2, 2, 9)
    for num_steps in (1, 1000):
        sigmas = schedule(solver, num_steps, flow_shift).sigmas
        assert (sigmas.diff() < 0).all()
        assert (
            _run(make_solver(solver, sigmas), lambda x, sigma: x.tanh(), latents).isfinite().all()
        )


Field = Callable[[Tensor, Tensor], Tensor]


def _run(solver: UniPC | DPMpp | Euler, field: Field, latents: Tensor) -> Tensor:
    for sigma in solver.sigmas[:-1]:
        latents = solver.step(field(latents, sigma), latents)
    return latents


def _random_field(seed: int, channels: int) -> Field:
    mix = torch.randn(channels, channels, generator=torch.Generator().manual_seed(seed))

    def field(x: Tensor, sigma: Tensor) -> Tensor:
        mixed = torch.einsum("ij,bjthw->bithw", mix / channels**0.5, x)
        return 1.5 * torch.tanh(mixed + sigma) - 0.3 * x

    return field


def _diffusers_run(
    oracle: type[UniPCMultistepScheduler] | type[DPMSolverMultistepScheduler],
    timesteps: Tensor,
    sigmas: Tensor,
    field: Field,
    latents: Tensor,
) -> Tensor:
    scheduler = oracle(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(len(timesteps))
    scheduler.timesteps, scheduler.sigmas = timesteps, sigmas
    scheduler.set_begin_index(0)
    for t, sigma in zip(timesteps, sigmas, strict=False):
        (latents,) = scheduler.step(field(latents, sigma), t, latents, return_dict=False)
    return latents


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 10, 14, 15, 50, 68])
@pytest.mark.parametrize("flow_shift", [1.0, 3.0, 5.0, 16.0])
@pytest.mark.parametrize(
    ("solver", "oracle"),
    [("unipc", UniPCMultistepScheduler), ("dpm++", DPMSolverMultistepScheduler)],
)
def test_solver_agrees_with_diffusers(
    solver: str, oracle: type, flow_shift: float, num_steps: int
) -> None:
    timesteps, sigmas = schedule(solver, num_steps, flow_shift)
    field = _random_field(num_steps, channels=6)
    noise = torch.randn(2, 6, 3, 5, 4, generator=torch.Generator().manual_seed(1))
    expected = _diffusers_run(oracle, timesteps, sigmas, field, noise)
    got = _run(make_solver(solver, sigmas), field, noise)
    assert got.dtype == torch.float32
    # Equal bits where this was written; 1e-6 leaves room for another build's libm.
    assert (got - expected).norm() <= 1e-6 * expected.norm()


def test_equal_first_timesteps_do_not_skip_a_sigma() -> None:
    """Looking the start up by timestep, as reference and diffusers do, fails in the last step."""
    timesteps, sigmas = schedule("unipc", 68, 16.0)
    assert timesteps[0] == timesteps[1] and sigmas[0] > sigmas[1]
    assert schedule("unipc", 67, 16.0).timesteps[:2].tolist() == [999, 998]

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(68)
    scheduler.timesteps, scheduler.sigmas = timesteps, sigmas
    latents = torch.ones(1, 1, 1, 1, 1)
    for t in timesteps[:-1]:
        (latents,) = scheduler.step(0 * latents, t, latents, return_dict=False)
    with pytest.raises(AssertionError):
        scheduler.step(0 * latents, timesteps[-1], latents)

    x0, noise = torch.tensor([0.25, -3.0]), torch.tensor([1.0, 2.0])
    start = (1 - sigmas[0]) * x0 + sigmas[0] * noise
    end = _run(UniPC(sigmas), lambda x, sigma: noise - x0, start)
    torch.testing.assert_close(end, x0, rtol=0, atol=1e-5)


def _normal_variance(sigma: Tensor) -> Tensor:
    return (1 - sigma) ** 2 + sigma**2


def _normal_field(x: Tensor, sigma: Tensor) -> Tensor:
    """Exact velocity when the data are normal too: solutions are proportional to sqrt(variance)."""
    sigma = sigma.double()
    return x * (2 * sigma - 1) / _normal_variance(sigma)


@pytest.mark.parametrize(
    ("solver", "order", "bound"), [("euler", 1, 5e-3), ("dpm++", 2, 2e-5), ("unipc", 2, 1e-5)]
)
def test_order_of_convergence(solver: str, order: int, bound: float) -> None:
    def error(num_steps: int) -> float:
        sigmas = schedule(solver, num_steps, 1.0).sigmas
        start = torch.ones(1, dtype=torch.float64)
        exact = start / _normal_variance(sigmas[0].double()).sqrt()
        return (_run(make_solver(solver, sigmas), _normal_field, start) - exact).abs().item()

    fine = error(320)
    assert math.log2(error(160) / fine) == pytest.approx(order, abs=0.2)
    assert fine < bound


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
@pytest.mark.parametrize("pause", [1, 2, 6])
def test_a_solver_resumes_from_its_fields(solver: str, pause: int) -> None:
    sigmas = schedule(solver, 7, 5.0).sigmas
    field = _random_field(3, channels=4)
    noise = torch.randn(1, 4, 2, 3, 3, generator=torch.Generator().manual_seed(2))
    whole = _run(make_solver(solver, sigmas), field, noise)

    first = make_solver(solver, sigmas)
    latents = noise
    for sigma in sigmas[:pause]:
        latents = first.step(field(latents, sigma), latents)
    assert all(value is None or isinstance(value, Tensor | int) for value in vars(first).values())
    second = type(first)(**vars(first))
    for sigma in sigmas[pause:-1]:
        latents = second.step(field(latents, sigma), latents)
    assert second.index == 7
    assert torch.equal(latents, whole)


def test_guidance() -> None:
    cond, uncond = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0])
    assert guide(cond, uncond, 5.0).tolist() == [-7.0, 18.0]
    assert guide(cond, uncond, 1.0).tolist() == cond.tolist()
    assert guide(cond, uncond, 0.0).tolist() == uncond.tolist()
    assert guide(cond, None, 5.0).tolist() == cond.tolist()


# steps, shift, boundary, steps on the high-noise expert, its last t, the other's first t
ROUTES = [(40, 12.0, 0.875, 26, 877, 865), (40, 5.0, 0.900, 15, 902, 892)]


@pytest.mark.parametrize(
    ("num_steps", "flow_shift", "boundary", "num_high", "last", "first"), ROUTES
)
def test_experts_of_a14b(
    num_steps: int, flow_shift: float, boundary: float, num_high: int, last: int, first: int
) -> None:
    timesteps = schedule("unipc", num_steps, flow_shift).timesteps.tolist()
    experts = [expert_for(t, boundary) for t in timesteps]
    assert experts == ["high"] * num_high + ["low"] * (num_steps - num_high)
    assert timesteps[num_high - 1 : num_high + 1] == [last, first]


def test_the_boundary_itself_belongs_to_the_high_noise_expert() -> None:
    assert [expert_for(t, 0.875) for t in (875, 874)] == ["high", "low"]
    assert [expert_for(t, 0.900) for t in (900, 899)] == ["high", "low"]
    assert expert_for(1, None) == "high"


@pytest.mark.parametrize("boundary", [0.875, 0.900])
def test_four_distilled_steps_split_in_half(boundary: float) -> None:
    timesteps = distilled_schedule().timesteps.tolist()
    assert [expert_for(t, boundary) for t in timesteps] == ["high", "high", "low", "low"]


def test_guidance_of_each_expert() -> None:
    assert guidance_for("high", 4.0, 3.0) == 4.0
    assert guidance_for("low", 4.0, 3.0) == 3.0
    assert guidance_for("low", 5.0, None) == 5.0
    assert guidance_for("low", 5.0, 0.0) == 0.0
