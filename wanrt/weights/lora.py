"""One LoRA file: which weights of a transformer it changes, and the changes themselves.

A change is low-rank, `up @ down` times alpha / rank, or a plain difference, or both. The rank is
alpha where the file tells none. `lora_names.py` has the sources of the dialects.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from wanrt.config import MODELS
from wanrt.errors import FormatError
from wanrt.weights.checkpoint import Checkpoint
from wanrt.weights.lora_names import Key, Role, parse
from wanrt.weights.quantised import PlainReader

Shapes = Mapping[str, tuple[int, ...]]

LEAST_SHARE = 0.01  # of a file's keys must match
_LEAVES: dict[Role, str] = {"diff": "weight", "diff_b": "bias", "up_bias": "bias"}
_NO_DORA = "has DoRA, LoHa, LoKr or OFT parts, which wanrt does not apply"
_PARAMETERS = ("modulation", "emb_pos")  # no modules: a difference is all that they can have
_WIDENED = "patch_embedding.weight"  # image-to-video models have further input channels behind


class LowRank(NamedTuple):
    """down `[r, I]`, up `[O, r]`, fp32; alpha / rank is part of `down`, and so is a LoCon's mid."""

    down: Tensor
    up: Tensor


class Change(NamedTuple):
    """What a LoRA adds to one weight at strength 1."""

    low_rank: LowRank | None = None
    diff: Tensor | None = None  # fp32, of the weight's shape


@dataclass
class Entry:
    """The stored names of one weight's change."""

    stored: dict[Role, str] = field(default_factory=dict)

    @property
    def is_low_rank(self) -> bool:
        return bool({"down", "up", "mid"} & set(self.stored))


class Fit(NamedTuple):
    """A LoRA held against a model: weights that it changes, and stored keys without a place."""

    names: tuple[str, ...]
    unmatched: tuple[str, ...]


class LoraFile:
    """A LoRA as its header tells it; tensors are read one weight at a time.

    `entries`: original name of the weight -> its keys. `second`: the same for the low-noise expert,
    where one file holds a pair. What makes a file unusable is kept as `problem` until it is to be
    used, so that it can be described.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.path = checkpoint, checkpoint.path
        self.problem: FormatError | None = None
        self.entries: dict[str, Entry] = {}
        self.second: dict[str, Entry] = {}
        self.unknown: list[str] = []
        self.dialects = Counter[str]()
        self._reader = PlainReader(checkpoint)
        for stored in self.checkpoint.tensors:
            key = parse(stored)
            if key is None:
                self.unknown.append(stored)
            else:
                self._add(key, stored)
        try:
            self._adapter = _adapter_metadata(checkpoint)
        except FormatError as error:
            self._adapter, self.problem = _Adapter({}), error

    @classmethod
    def open(cls, path: str | Path) -> "LoraFile":
        """Raises FormatError for what is no weight file."""
        return cls(Checkpoint.open(path))

    def _add(self, key: Key, stored: str) -> None:
        if key.role == "refused":
            self.problem = FormatError(self.path, f"{_NO_DORA} ({stored})", "use a plain LoRA")
            return
        entries = self.second if key.second else self.entries
        whole = key.module.endswith(_PARAMETERS)
        if whole and key.role not in ("diff", "diff_m"):
            self.unknown.append(stored)
            return
        name = key.module if whole else f"{key.module}.{_LEAVES.get(key.role, 'weight')}"
        roles = entries.setdefault(name, Entry()).stored
        role: Role = "diff" if key.role in ("diff_b", "diff_m") else key.role
        if role in roles:
            reason = f"{stored} and {roles[role]} are the same part of {name}"
            fix = "two LoRAs in one file? give each its own file"
            self.problem = FormatError(self.path, reason, fix)
        roles[role] = stored
        self.dialects[key.dialect] += 1

    @property
    def rank(self) -> int:
        """The largest; 0 for plain differences."""
        tensors, every = self.checkpoint.tensors, [*self.entries.values(), *self.second.values()]
        downs = (tensors[e.stored["down"]].shape for e in every if "down" in e.stored)
        return max((shape[0] for shape in downs if shape), default=0)

    @property
    def width(self) -> int:
        """Of the transformer it was made for; 0 where no change of an attention tells."""
        for name, entry in (*self.entries.items(), *self.second.items()):
            if name.endswith("self_attn.q.weight") and (columns := self._columns(entry)):
                return columns
        return 0

    @property
    def summary(self) -> str:
        """In a few words: for which width, whose names, how many keys mean something."""
        every = len(self.checkpoint.tensors)
        models = {spec.dit.dim: spec.id.split("-")[2] for spec in MODELS.values() if "-" in spec.id}
        size = f" ({models[self.width].upper()})" if self.width in models else ""
        said = [f"for width {self.width}{size}"] if self.width else []
        if any(".cross_attn.k_img." in name for name in self.entries):
            said.append("image to video")
        if self.second:
            said.append("both experts" if self.entries else "the low-noise expert")
        said += [f"{dialect} names" for dialect, _ in self.dialects.most_common()]
        said.append(f"{every - len(self.unknown)} of {every} keys are Wan's")
        if self.problem:
            said.append(self.problem.reason)
        return ", ".join(said)

    def fit(self, shapes: Shapes, title: str, second: bool = False) -> Fit:
        """Hold the header against a model's weights. Raises FormatError where it is another's."""
        if self.problem:
            raise self.problem
        entries = self.second if second else self.entries
        names, unmatched = [], []
        for name, entry in entries.items():
            if name not in shapes or self._is_wider(entry, name, shapes):
                unmatched += entry.stored.values()
            elif set(entry.stored) != {"alpha"}:
                self._check(name, entry, shapes[name], title)
                names.append(name)
        matched = sum(len(entries[name].stored) for name in names)
        if matched < max(1, LEAST_SHARE * len(self.checkpoint.tensors)):
            keys = [*unmatched, *self.unknown]
            reason = f"matches {title} in {matched} of its {len(self.checkpoint.tensors)} keys"
            raise FormatError(self.path, reason, f"the others: {some(keys)}")
        return Fit(tuple(names), (*unmatched, *self.unknown))

    def num_bytes(self, fit: Fit, shapes: Shapes, element: int, second: bool = False) -> int:
        """What it keeps on the device beside the weights; `element`: bytes of a block's number.

        A difference is kept, and so is the weight that it replaces; both count as fp32.
        """
        entries, total = self.second if second else self.entries, 0
        for name in fit.names:
            rows, columns = shapes[name][0], math.prod(shapes[name][1:])
            stored, size = entries[name].stored, element if "blocks." in name else 4
            if "down" in stored:
                total += self.checkpoint.tensors[stored["down"]].shape[0] * (rows + columns) * size
            if "diff" in stored or "up_bias" in stored:
                total += 2 * 4 * rows * columns
        return total

    def read(self, name: str, shape: tuple[int, ...], second: bool = False) -> Change:
        """The change of one weight of a fitting model. Raises FormatError for NaN and infinity."""
        entries = self.second if second else self.entries
        stored = entries[name].stored
        low_rank, diff = None, None
        if "down" in stored:
            low_rank = self._low_rank(stored, math.prod(shape[1:]))
        if "diff" in stored:
            diff = self._widened(self._values(stored["diff"]), shape)
        if "up_bias" in stored:
            weight = entries.get(f"{name.removesuffix('bias')}weight")
            scale = self._scale(weight.stored) if weight and "down" in weight.stored else 1.0
            bias = self._values(stored["up_bias"]).view(shape) * scale
            diff = bias if diff is None else diff + bias
        return Change(low_rank, diff)

    def _low_rank(self, stored: dict[Role, str], columns: int) -> LowRank:
        down = self._values(stored["down"]).flatten(1)
        up = self._values(stored["up"]).flatten(1)
        if "mid" in stored:  # [r, r, ...]: a convolution between two of size 1
            mid = self._values(stored["mid"])
            down = torch.einsum("rsk,si->rik", mid.flatten(2), down).flatten(1)
        down = F.pad(down, (0, columns - down.shape[1]))
        return LowRank(down * self._scale(stored), up)

    def _scale(self, stored: dict[Role, str]) -> float:
        """alpha / rank; 1 where nothing tells alpha."""
        rank = self.checkpoint.tensors[stored["down"]].shape[0]
        if "alpha" in stored:
            return float(self._values(stored["alpha"])) / rank
        return self._adapter.scale(stored["down"], rank)

    def _values(self, name: str) -> Tensor:
        values = self._reader.read(name, torch.float32)
        if not torch.isfinite(values).all():
            raise FormatError(self.path, f"{name} holds NaN or infinity", "get the file again")
        return values

    @staticmethod
    def _widened(diff: Tensor, shape: tuple[int, ...]) -> Tensor:
        missing = shape[0] * math.prod(shape[1:]) - diff.numel()
        if not missing:
            return diff.view(shape)
        return F.pad(diff.flatten(1), (0, missing // shape[0])).view(shape)

    def _is_wider(self, entry: Entry, name: str, shapes: Shapes) -> bool:
        """An image-to-video LoRA's patch embedding has no place in a text-to-video model."""
        if name != _WIDENED:
            return False
        columns = self._columns(entry)
        return columns is not None and columns > math.prod(shapes[name][1:])

    def _columns(self, entry: Entry) -> int | None:
        """Input features of a change, as stored."""
        tensors, stored = self.checkpoint.tensors, entry.stored
        part = stored.get("down", stored.get("diff"))
        if part is None:
            return None
        kernel = math.prod(tensors[stored["mid"]].shape[2:]) if "mid" in stored else 1
        return math.prod(tensors[part].shape[1:]) * kernel

    def _check(self, name: str, entry: Entry, shape: tuple[int, ...], title: str) -> None:
        """Raises FormatError unless the stored shapes make a change of this shape."""
        tensors, stored = self.checkpoint.tensors, entry.stored
        if entry.is_low_rank:
            if not {"down", "up"} <= set(stored):
                reason = f"{some(list(stored.values()))}: the other half is missing"
                raise FormatError(self.path, reason, "the file is incomplete")
            self._check_rank(stored, title)
            if len(shape) < 2:
                self._refuse(stored, "down", f"{name} there is {list(shape)}", title)
            if tensors[stored["up"]].shape[0] != shape[0]:
                self._refuse(stored, "up", f"{name} there is {list(shape)}", title)
            if not self._fits(name, self._columns(entry), shape):
                self._refuse(stored, "down", f"{name} there is {list(shape)}", title)
        for role in ("diff", "up_bias"):
            if role in stored:
                found = tuple(n for n in tensors[stored[role]].shape if n > 1)
                same = found == tuple(n for n in shape if n > 1)
                wider = name == _WIDENED and found[:1] == shape[:1]
                if not same and not (wider and self._fits(name, self._columns(entry), shape)):
                    self._refuse(stored, role, f"{name} there is {list(shape)}", title)
        if "alpha" in stored and tensors[stored["alpha"]].numel != 1:
            self._refuse(stored, "alpha", "one number was expected", title)

    def _check_rank(self, stored: dict[Role, str], title: str) -> None:
        shapes = {role: self.checkpoint.tensors[key].shape for role, key in stored.items()}
        down, up = shapes["down"], shapes["up"]
        rank = down[0] if down else 0
        if rank == 0:
            raise FormatError(self.path, f"{stored['down']} is {list(down)}: rank 0")
        if len(down) < 2 or len(up) < 2 or math.prod(up[1:]) != rank:
            self._refuse(stored, "up", f"beside a down matrix {list(down)}", title)
        if "mid" in shapes and shapes["mid"][:2] != (rank, rank):
            self._refuse(stored, "mid", f"between matrices of rank {rank}", title)

    @staticmethod
    def _fits(name: str, columns: int | None, shape: tuple[int, ...]) -> bool:
        wanted = math.prod(shape[1:])
        return columns == wanted or (name == _WIDENED and (columns or wanted + 1) < wanted)

    def _refuse(self, stored: dict[Role, str], role: Role, why: str, title: str) -> NoReturn:
        found = list(self.checkpoint.tensors[stored[role]].shape)
        reason = f"does not fit {title}: {stored[role]} is {found}, {why}"
        raise FormatError(self.path, reason, "it was made for another model")


class _Adapter(NamedTuple):
    """PEFT's settings, as Diffusers keeps them in a file's metadata."""

    alpha: dict[str, float]  # by prefix: transformer, transformer_2
    rslora: bool = False

    def scale(self, stored: str, rank: int) -> float:
        alpha = self.alpha.get(stored.partition(".")[0])
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _adapter_metadata(checkpoint: Checkpoint) -> _Adapter:
    """Source: diffusers 0.42.1 `loaders/lora_base.py` LORA_ADAPTER_METADATA_KEY."""
    try:
        settings = json.loads(checkpoint.metadata.get("lora_adapter_metadata", "{}"))
        alphas = {
            key.removesuffix(".lora_alpha"): float(value)
            for key, value in settings.items()
            if key.endswith(".lora_alpha")
        }
        patterns = [v for k, v in settings.items() if k.endswith(".alpha_pattern") and v]
        rslora = any(v for k, v in settings.items() if k.endswith(".use_rslora"))
        dora = any(v for k, v in settings.items() if k.endswith(".use_dora"))
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise FormatError(checkpoint.path, "its lora_adapter_metadata is not readable") from None
    if dora:
        raise FormatError(checkpoint.path, _NO_DORA, "use a plain LoRA")
    if patterns:
        raise FormatError(checkpoint.path, "has an alpha of its own for some modules")
    return _Adapter(alphas, rslora)


def some(names: list[str]) -> str:
    """The first five, and how many more."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
