"""A LoRA held against a model: what it changes, what has no place, and whether shapes agree."""

import math
from collections.abc import Mapping
from typing import NamedTuple, NoReturn

from wanrt.errors import FormatError
from wanrt.weights.lora import LoraFile, Stored
from wanrt.weights.lora_names import Role

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]  # of every weight of a model

LEAST_SHARE = 0.01  # of a file's keys must match
_WIDENED = "patch_embedding.weight"  # image-to-video models have further input channels behind


class Fit(NamedTuple):
    """Weights that a LoRA changes, and stored keys without a place."""

    names: tuple[str, ...]
    unmatched: tuple[str, ...]


def fit(file: LoraFile, shapes: Shapes, title: str, second: bool = False) -> Fit:
    """Read nothing but the header. Raises FormatError where the LoRA is another model's.

    second: the half for the low-noise expert. A weight that the model lacks is no error (a LoRA for
    image to video on text to video), a weight of another shape is. Further input channels of the
    model's patch embedding stay as they are (a LoRA for text to video on image to video).
    """
    if file.problem:
        raise file.problem
    names, unmatched, matched = [], list(file.unknown), 0
    for name, stored in file.half(second).items():
        if name not in shapes or set(stored) == {"alpha"} or _is_wider(file, name, stored, shapes):
            unmatched += stored.values()
        else:
            _Check(file, name, stored, shapes[name], title).run()
            names.append(name)
            matched += len(stored)
    if matched < max(1, LEAST_SHARE * len(file.tensors)):
        reason = f"matches {title} in {matched} of its {len(file.tensors)} keys"
        others = unmatched or [key for stored in file.second.values() for key in stored.values()]
        raise FormatError(file.path, reason, f"the others: {some(others)}")
    return Fit(tuple(names), tuple(unmatched))


def num_bytes(
    file: LoraFile, found: Fit, shapes: Shapes, element: int, second: bool = False
) -> int:
    """What a LoRA keeps on the device beside the weights; `element`: bytes of a block's number.

    A difference is kept, and so is the weight that it replaces; both count as fp32.
    """
    total = 0
    for name in found.names:
        rows, columns = shapes[name][0], math.prod(shapes[name][1:])
        stored, size = file.half(second)[name], element if "blocks." in name else 4
        if "down" in stored:
            total += file.tensors[stored["down"]].shape[0] * (rows + columns) * size
        if "diff" in stored or "up_bias" in stored:
            total += 2 * 4 * rows * columns
    return total


def some(names: list[str]) -> str:
    """The first five, and how many more."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _is_wider(file: LoraFile, name: str, stored: Stored, shapes: Shapes) -> bool:
    """A patch embedding of image to video has no place in a text-to-video model."""
    return name == _WIDENED and (file.columns(stored) or 0) > math.prod(shapes[name][1:])


class _Check(NamedTuple):
    """The stored shapes of one change, and the weight that it is for."""

    file: LoraFile
    name: str
    stored: Stored
    shape: Shape
    title: str

    def run(self) -> None:
        """Raises FormatError unless the stored shapes make a change of this weight."""
        there = f"{self.name} there is {list(self.shape)}"
        if {"down", "up", "mid"} & set(self.stored):
            self._check_rank()
            if len(self.shape) < 2 or not self._takes(self.file.columns(self.stored)):
                self._refuse("down", there)
            if self._found("up")[0] != self.shape[0]:
                self._refuse("up", there)
        for role in ("diff", "up_bias"):
            if role in self.stored and not self._is_difference(self._found(role)):
                self._refuse(role, there)
        if "alpha" in self.stored and math.prod(self._found("alpha")) != 1:
            self._refuse("alpha", "one number was expected")

    def _found(self, role: Role) -> Shape:
        return self.file.tensors[self.stored[role]].shape

    def _check_rank(self) -> None:
        if not {"down", "up"} <= set(self.stored):
            reason = f"{some(list(self.stored.values()))}: the other half is missing"
            raise FormatError(self.file.path, reason, "the file is incomplete")
        down, up = self._found("down"), self._found("up")
        rank = down[0] if down else 0
        if rank == 0:
            reason = f"{self.stored['down']} is {list(down)}: rank 0"
            raise FormatError(self.file.path, reason, "the file is broken")
        if len(down) < 2 or len(up) < 2 or math.prod(up[1:]) != rank:
            self._refuse("up", f"beside a down matrix {list(down)}")
        if "mid" in self.stored and self._found("mid")[:2] != (rank, rank):
            self._refuse("mid", f"between matrices of rank {rank}")
        if "mid" in self.stored and math.prod(down[2:]) != 1:
            self._refuse("down", "before a middle convolution, where size 1 was expected")

    def _takes(self, columns: int | None) -> bool:
        """Whether a change of so many input features is one of this weight."""
        wanted = math.prod(self.shape[1:])
        return columns == wanted or (self.name == _WIDENED and 0 < (columns or 0) < wanted)

    def _is_difference(self, found: Shape) -> bool:
        """Dimensions of size 1 aside, the same shape."""
        same = [n for n in found if n > 1] == [n for n in self.shape if n > 1]
        wider = self.name == _WIDENED and found[:1] == self.shape[:1]
        return same or (wider and self._takes(math.prod(found[1:])))

    def _refuse(self, role: Role, why: str) -> NoReturn:
        found = list(self._found(role))
        reason = f"does not fit {self.title}: {self.stored[role]} is {found}, {why}"
        raise FormatError(self.file.path, reason, "it was made for another model")
