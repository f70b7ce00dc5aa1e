"""Weights that visit the device: blocks wait in host memory or in their file and come in turn.

A pass through a model is a round of visits, one for each block. The blocks that stream share a
ring of device buffers. While one block computes, a worker copies the next ones into the buffers
that are free; a buffer is free once all work that was queued before its block was left is done.
Text encoder, CLIP tower and both transformers go through this one mechanism.
"""

import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from wanrt.memory.pinned import host_buffer, host_memory
from wanrt.memory.placement import Placement

_ALIGNMENT = 256  # bytes, as CUDA's allocator aligns


class Visit(Protocol):
    """A stop of a pass: weights that are needed from the call of a submodule to the next visit."""

    @property
    def module(self) -> str: ...

    @property
    def weights(self) -> tuple[str, ...]: ...


# The first round is a forward pass, whose blocks may stay or wait in memory; what the others visit
# is needed once per request, and waits in its file.
Rounds = Sequence[Sequence[Visit]]
_Key = tuple[int, int]  # round, visit
Read = Callable[[str], Tensor]  # a weight's name -> the weight as the module holds it, on the CPU


class _Place(NamedTuple):
    """Where a weight lies in the bytes of its visit."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def stop(self) -> int:
        return self.offset + self.shape.numel() * self.dtype.itemsize

    def view(self, buffer: Tensor) -> Tensor:
        return buffer[self.offset : self.stop].view(self.dtype).view(self.shape)


@dataclass
class _Stop:
    """A visit that streams: where its weights lie, and where they wait (None: in their file)."""

    visit: Visit
    places: dict[str, _Place]
    host: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        return max(place.stop for place in self.places.values())


@dataclass
class _Slot:
    """One buffer of the ring. `free` is the event after which it may be overwritten."""

    buffer: Tensor
    staging: Tensor | None
    free: torch.cuda.Event | None = None
    copied: torch.cuda.Event | None = None


class _Coming(NamedTuple):
    slot: _Slot
    done: Future[None]


class WeightStream:
    """The blocks of one module that do not stay on the device, and the ring they pass through."""

    def __init__(
        self,
        module: nn.Module,
        rounds: Rounds,
        placement: Placement,
        device: torch.device,
        dtype_of: Callable[[str], torch.dtype],
        read: Read,
    ) -> None:
        """`module` may be empty (meta). Allocates the ring and the host memory, reads nothing."""
        assert placement.slots > 1, f"{placement=}"
        self.module, self.device, self._read = module, device, read
        self._stops: dict[_Key, _Stop] = {}
        resident = placement.resident()
        for r, visits in enumerate(rounds):
            for i, visit in enumerate(visits):
                if r > 0 or i not in resident:
                    self._stops[r, i] = _Stop(visit, lay_out(module, visit, dtype_of))
        streamed = [stop for key, stop in self._stops.items() if key[0] == 0]
        for stop in streamed[: placement.num_pinned]:
            stop.host = host_memory(stop.num_bytes, device)
        self._stop_of = {name: stop for stop in self._stops.values() for name in stop.places}
        self._next = _successors(list(self._stops))
        size = max(stop.num_bytes for stop in self._stops.values())
        staged = max((s.num_bytes for s in self._stops.values() if s.host is None), default=0)
        self._free = [
            _Slot(
                torch.empty(size, dtype=torch.uint8, device=device),
                host_buffer(staged, device) if staged else None,
            )
            for _ in range(placement.slots)
        ]
        self._coming: dict[_Key, _Coming] = {}
        self._now: tuple[_Key, _Slot] | None = None
        self._added: dict[str, Tensor] = {}
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._copies is not None:  # fresh buffers may be memory that queued work still uses
            for slot in self._free:
                slot.free = torch.cuda.current_stream(device).record_event()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="wanrt-weights")
        weakref.finalize(self, _finish, self._worker, self._copies)

    def attach(self) -> None:
        """From now on every visit happens by itself, when its module is called."""
        for key, stop in self._stops.items():
            self._empty(stop)
            owner = self.module.get_submodule(stop.visit.module)
            owner.register_forward_pre_hook(partial(_enter, weakref.ref(self), key))

    def close(self) -> None:
        """Nothing is copied from now on; waits for what is under way. Then the memory can go."""
        self._worker.shutdown(cancel_futures=True)
        if self._copies is not None:
            self._copies.synchronize()

    def streams(self, name: str) -> bool:
        """Whether a weight is one that the module never holds for itself."""
        return name in self._stop_of

    def waits_in_memory(self, name: str) -> bool:
        """Whether `hold` must be given this weight; else it is read at every visit."""
        return name in self._stop_of and self._stop_of[name].host is not None

    def place_of(self, name: str) -> Tensor:
        """Where a weight that waits in memory lies: what is written there is kept."""
        stop = self._stop_of[name]
        assert stop.host is not None, f"{name=}"
        return stop.places[name].view(stop.host)

    def change(self, added: dict[str, Tensor]) -> None:
        """From the next visit on, add these fp32 tensors on the device to weights that stream.

        They are added in the ring, after the copy: what waits in memory or in the file stays.
        """
        self._leave()
        self._added = added

    def enter(self, key: _Key) -> None:
        """Put the weights of a visit in their places; the visit before ends with it."""
        if self._now is not None and self._now[0] == key:
            return
        self._leave()
        if key in self._coming and self._coming[key].done.exception() is not None:
            self._free.append(self._coming.pop(key).slot)  # it failed ahead of time: once more, now
        if key not in self._coming:
            self._request(key, force=True)
        coming = self._coming.pop(key)
        try:
            coming.done.result()
        except BaseException:
            self._free.append(coming.slot)
            raise
        if coming.slot.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(coming.slot.copied)
        for name, place in self._stops[key].places.items():
            weight = place.view(coming.slot.buffer)
            if name in self._added:
                weight.add_(self._added[name])
            assign(self.module, name, weight)
        self._now = (key, coming.slot)
        following = key
        while self._free and (following := self._next.get(following)) not in (None, key):
            self._request(following)

    def _leave(self) -> None:
        if self._now is None:
            return
        key, slot = self._now
        self._empty(self._stops[key])
        if self._copies is not None:
            slot.free = torch.cuda.current_stream(self.device).record_event()
        self._free.append(slot)
        self._now = None

    def _empty(self, stop: _Stop) -> None:
        """Leave nothing of a visit's weights but their shapes and dtypes."""
        for name, place in stop.places.items():
            assign(self.module, name, torch.empty(place.shape, dtype=place.dtype, device="meta"))

    def _request(self, key: _Key, force: bool = False) -> None:
        """Have a visit's weights copied, if a buffer is free; `force` takes back one not used."""
        if key in self._coming or (self._now is not None and self._now[0] == key):
            return
        if force and not self._free:
            unused = self._coming.pop(next(iter(self._coming)))
            unused.done.exception()  # whatever became of it: nobody asked for it yet
            self._free.append(unused.slot)
        if self._free:
            slot = self._free.pop(0)
            self._coming[key] = _Coming(slot, self._worker.submit(self._bring, key, slot))

    @torch.inference_mode()
    def _bring(self, key: _Key, slot: _Slot) -> None:
        """In the worker: from host memory, or from the file through the slot's staging buffer."""
        stop = self._stops[key]
        source = stop.host
        if source is None:
            if slot.copied is not None:
                slot.copied.synchronize()  # staging may still be on its way
            source = slot.staging
            for name, place in stop.places.items():
                place.view(source).copy_(self._read(name))
        size = stop.num_bytes
        if self._copies is None:
            slot.buffer[:size].copy_(source[:size])
            return
        with torch.cuda.stream(self._copies):
            if slot.free is not None:
                self._copies.wait_event(slot.free)
            slot.buffer[:size].copy_(source[:size], non_blocking=True)
            slot.copied = self._copies.record_event()


def _enter(stream: "weakref.ref[WeightStream]", key: _Key, *_: object) -> None:
    """The hook of a module; it does not keep the stream, which keeps the module."""
    found = stream()
    assert found is not None, f"{key=}: the weights of this module are gone"
    found.enter(key)


def _finish(worker: ThreadPoolExecutor, copies: torch.cuda.Stream | None) -> None:
    """Before the buffers go: no copy into them, or out of host memory, is under way.

    What the worker has still to do holds the stream of weights, so that now it has nothing to do.
    """
    worker.shutdown(wait=False)
    if copies is not None:
        copies.synchronize()


def lay_out(
    module: nn.Module, visit: Visit, dtype_of: Callable[[str], torch.dtype]
) -> dict[str, _Place]:
    """Where the weights of a visit lie in its buffer; the module may be empty (meta)."""
    places, offset = {}, 0
    for name in visit.weights:
        places[name] = _Place(offset, module.get_parameter(name).shape, dtype_of(name))
        offset = -(-places[name].stop // _ALIGNMENT) * _ALIGNMENT
    return places


def _successors(keys: list[_Key]) -> dict[_Key, _Key]:
    """For each stop the next one. The last one of a round leads to the first forward pass.

    A model with a single round, an encoder, is passed once: nothing follows its last stop.
    """
    rounds: dict[int, list[_Key]] = {}
    for key in keys:
        rounds.setdefault(key[0], []).append(key)
    following = {}
    for mine in rounds.values():
        following.update(pairwise(mine))
        if len(rounds) > 1:
            following[mine[-1]] = rounds[0][0]
    return following


def assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a weight in its place, whatever is there now."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
