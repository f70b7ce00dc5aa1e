"""Count the bytes of live tensors while something runs: the oracle of every plan.

It sees each result that an operator of PyTorch makes, so it counts real tensors on any device and
fake ones (`FakeTensorMode`), whose forwards at real sizes cost seconds and no memory.
"""

import weakref
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages made while it is open: `now`, and the most there were, `peak`.

    What existed before is not counted. `device` None counts tensors of every device. Sizes are
    rounded up to `granule` bytes, as an allocator does (512 is that of CUDA's).
    """

    def __init__(self, device: str | None = None, granule: int = 1) -> None:
        super().__init__()
        self.device, self.granule = device, granule
        self.now = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def ignore(self, *tensors: Tensor) -> Self:
        """These count as made before."""
        self._known.update(tensor.untyped_storage() for tensor in tensors)
        return self

    def reset_peak(self) -> None:
        self.peak = self.now

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        before = {
            x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)
        }
        result = function(*args, **kwargs)
        for x in tree_iter(result):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in before:
                self._count(x)
        return result

    def _count(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if storage in self._known or (self.device and x.device.type != self.device):
            return
        self._known.add(storage)
        size = -(-storage.nbytes() // self.granule) * self.granule
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size
