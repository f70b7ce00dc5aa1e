"""What fp16 sums cost, without a card that has them: a convolution that rounds as tensor cores may.

For `wanrt bench quality` on a CPU, at small sizes. A product of 16 channels is added to an fp16
sum and rounded; sums of 128 products join an fp32 total. That is the most which
`reference_vae.causal_conv3d` permits, and the most that the Triton kernels do.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from wanrt.kernels import reference_vae

_AT_ONCE, _JOINED = 16, 128  # products of a tensor-core instruction, products of an fp16 sum


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    history: Tensor | None,
    gamma: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int = 1,
    out: Tensor | None = None,
    accumulator: torch.dtype = torch.float16,
) -> tuple[Tensor, Tensor | None]:
    """`reference_vae.causal_conv3d` of fp16; only 3x3x3 taps are added up in fp16."""
    if weight.shape[2:] != (3, 3, 3):
        return reference_vae.causal_conv3d(x, weight, bias, history, gamma, residual, stride, out)
    x = x if gamma is None else reference_vae.channel_norm_silu(x, gamma)
    past = x.new_zeros(*x.shape[:2], 2, *x.shape[3:]) if history is None else history
    frames = torch.cat((past, x), 2)
    total = _sum(F.pad(frames.float(), (1, 1, 1, 1)).movedim(1, -1), weight.float(), x.shape)
    y = total.movedim(-1, 1) + bias.float().view(1, -1, 1, 1, 1)
    y = y if residual is None else y + residual.float()
    return y.to(x.dtype), frames[:, :, -2:].clone()


def _sum(frames: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
    """frames [B, T + 2, H + 2, W + 2, C], weight [O, C, 3, 3, 3] -> fp32 [B, T, H, W, O]."""
    _, channels, t, h, w = shape
    total = torch.zeros(())
    for tap in range(27):
        i, j, k = tap // 9, tap // 3 % 3, tap % 3
        seen = frames[:, i : i + t, j : j + h, k : k + w]
        columns = weight[:, :, i, j, k].T
        for first in range(0, channels, _JOINED):
            part = torch.zeros(())
            for c in range(first, min(first + _JOINED, channels), _AT_ONCE):
                products = seen[..., c : c + _AT_ONCE] @ columns[c : c + _AT_ONCE]
                part = (part + products).half().float()
            total = total + part
    return total
