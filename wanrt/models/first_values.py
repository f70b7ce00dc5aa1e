"""First values of weights in normal numbers; on the meta device, where none are kept, none drawn.

PyTorch draws normal numbers for the meta device by way of its compiler, and imports that: 1.5 s
that every request would wait for, since a model that is loaded begins as a skeleton there.
"""

import torch
from torch import Tensor, nn


def normal(*shape: int, std: float) -> Tensor:
    """Normal numbers around zero, fp32, on the default device."""
    values = torch.empty(shape)
    return values if values.is_meta else values.normal_(std=std)


class Table(nn.Embedding):
    """An embedding whose first values are normal numbers."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()
