"""Low-rank side branches: what LoRAs add to a matrix product while its weight stays as it is."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class LowRankBranch:
    """Several LoRAs of one matrix, concatenated: `y += ((x @ down^T) * strength) @ up^T`.

    down `[R, I]` and up `[O, R]` in the dtype of the product, R the sum of the ranks; strength fp32
    `[R]`, or None where every strength is 1. Cost: 2 R (I + O) FLOP per token.
    """

    down: Tensor
    up: Tensor
    ranks: tuple[int, ...]
    strength: Tensor | None = None

    @classmethod
    def join(cls, parts: Sequence[tuple[Tensor, Tensor]]) -> "LowRankBranch":
        """parts: (down `[r, I]`, up `[O, r]`) of each LoRA, all on one device."""
        downs, ups = zip(*parts, strict=True)
        ranks = tuple(down.shape[0] for down in downs)
        return cls(torch.cat(downs), torch.cat(ups, 1), ranks)

    def set_strengths(self, strengths: Sequence[float]) -> None:
        """One number for each LoRA; takes effect with the next product."""
        assert len(strengths) == len(self.ranks), f"{strengths=} {self.ranks=}"
        if all(strength == 1.0 for strength in strengths):
            self.strength = None
            return
        pairs = zip(strengths, self.ranks, strict=True)
        rows = [strength for strength, rank in pairs for _ in range(rank)]
        self.strength = torch.tensor(rows, dtype=torch.float32, device=self.down.device)

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """y [..., O] and x [..., I], as the product gave and took them -> y, overwritten if it may.

        Without autograd the only tensor made is [L, R], and the sum is rounded once.
        """
        hidden = F.linear(x.to(self.down.dtype), self.down)
        if self.strength is not None:
            hidden = (hidden * self.strength).to(self.down.dtype)
        if torch.is_grad_enabled() or y.dtype != self.up.dtype:
            return y + F.linear(hidden, self.up).to(y.dtype)
        y.view(-1, y.shape[-1]).addmm_(hidden.view(-1, hidden.shape[-1]), self.up.t())
        return y
