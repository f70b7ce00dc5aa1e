"""Classifier-free guidance, and which expert of a two-expert model takes a step."""

from typing import Literal

from torch import Tensor

from wanrt.sampler import NUM_TRAIN_STEPS

Expert = Literal["high", "low"]


def guide(cond: Tensor, uncond: Tensor | None, guidance: float) -> Tensor:
    """`uncond + guidance * (cond - uncond)`; just `cond` where there is no second branch.

    Source: Wan2.1 @9737cba `wan/text2video.py`.
    """
    if uncond is None:
        return cond
    return uncond + guidance * (cond - uncond)


def expert_for(t: float, boundary: float | None) -> Expert:
    """`high` (noise) while `t >= boundary * 1000`, then `low`; a model without boundary has one.

    Source: Wan2.2 @42bf4cf `wan/text2video.py`.
    """
    return "high" if boundary is None or t >= boundary * NUM_TRAIN_STEPS else "low"


def guidance_for(expert: Expert, guidance: float, guidance_low: float | None) -> float:
    """`guidance` is the high-noise expert's; the low-noise one follows it unless it has its own."""
    return guidance_low if expert == "low" and guidance_low is not None else guidance
