"""One LoRA file: which weights of a transformer it changes, and the changes themselves.

A change is low-rank, `up @ down` times alpha / rank, or a plain difference, or both. Where the file
tells no alpha it is the rank. `lora_names.py` has the sources of the dialects.
"""

import json
import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wanrt.config import MODELS
from wanrt.errors import FormatError
from wanrt.weights.checkpoint import Checkpoint
from wanrt.weights.lora_names import Key, Role, parse
from wanrt.weights.quantised import PlainReader

Stored = dict[Role, str]  # role -> the key of one weight's change

_LEAVES: dict[Role, str] = {"diff": "weight", "diff_b": "bias", "up_bias": "bias"}
_PARAMETERS = ("modulation", "emb_pos")  # no modules: a difference is all that they can have
_NO_DORA = "has DoRA, LoHa, LoKr or OFT parts, which wanrt does not apply"
_PLAIN = "use a plain LoRA"


class LowRank(NamedTuple):
    """down `[r, I]`, up `[O, r]`, fp32; alpha / rank is part of `down`, and so is a LoCon's mid."""

    down: Tensor
    up: Tensor


class Change(NamedTuple):
    """What a LoRA adds to one weight at strength 1."""

    low_rank: LowRank | None = None
    diff: Tensor | None = None  # fp32, of the weight's shape


class LoraFile:
    """A LoRA as its header tells it; tensors are read one weight at a time.

    `entries`: original name of the weight -> its keys. `second`: the same for the low-noise expert,
    where one file holds a pair. What makes a file unusable is kept as `problem` until it is to be
    used, so that it can be described.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.path = checkpoint, checkpoint.path
        self.tensors = checkpoint.tensors
        self.problem: FormatError | None = None
        self.entries: dict[str, Stored] = {}
        self.second: dict[str, Stored] = {}
        self.unknown: list[str] = []
        self._dialects = Counter[str]()
        self._reader: PlainReader | None = None
        for stored in self.tensors:
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

    def half(self, second: bool) -> dict[str, Stored]:
        return self.second if second else self.entries

    def columns(self, stored: Stored) -> int | None:
        """Input features of a change; None where it is only of a bias."""
        part = stored.get("down", stored.get("diff"))
        if part is None:
            return None
        kernel = math.prod(self.tensors[stored["mid"]].shape[2:]) if "mid" in stored else 1
        return math.prod(self.tensors[part].shape[1:]) * kernel

    @property
    def summary(self) -> str:
        """In a few words: for which width, whose names, how many keys mean something."""
        every, width = len(self.tensors), self._width()
        models = {spec.dit.dim: spec.id.split("-")[2] for spec in MODELS.values() if "-" in spec.id}
        size = f" ({models[width].upper()})" if width in models else ""
        said = [f"for width {width}{size}"] if width else []
        if any(".cross_attn.k_img." in name for name in self.entries):
            said.append("image to video")
        if self.second:
            said.append("both experts" if self.entries else "the low-noise expert")
        said += [f"{dialect} names" for dialect, _ in self._dialects.most_common()]
        said.append(f"{every - len(self.unknown)} of {every} keys are Wan's")
        if self.problem:
            said.append(self.problem.reason)
        return ", ".join(said)

    def read(self, name: str, shape: tuple[int, ...], second: bool = False) -> Change:
        """The change of one weight of a fitting model. Raises FormatError for NaN and infinity."""
        stored = self.half(second)[name]
        low_rank, diff = None, None
        if "down" in stored:
            low_rank = self._low_rank(stored, math.prod(shape[1:]))
        if "diff" in stored:
            diff = _widened(self._values(stored["diff"]), shape)
        if "up_bias" in stored:
            weight = self.half(second).get(f"{name.removesuffix('bias')}weight", {})
            scale = self._scale(weight) if "down" in weight else 1.0
            bias = self._values(stored["up_bias"]).view(shape) * scale
            diff = bias if diff is None else diff + bias
        return Change(low_rank, diff)

    def _add(self, key: Key, stored: str) -> None:
        if key.role == "refused":
            self.problem = FormatError(self.path, f"{_NO_DORA} ({stored})", _PLAIN)
            return
        whole = key.module.endswith(_PARAMETERS)
        if whole and key.role not in ("diff", "diff_m"):
            self.unknown.append(stored)
            return
        name = key.module if whole else f"{key.module}.{_LEAVES.get(key.role, 'weight')}"
        roles = self.half(key.second).setdefault(name, {})
        role: Role = "diff" if key.role in ("diff_b", "diff_m") else key.role
        if role in roles:
            reason = f"{stored} and {roles[role]} are the same part of {name}"
            fix = "two LoRAs in one file? give each its own file"
            self.problem = FormatError(self.path, reason, fix)
        roles[role] = stored
        self._dialects[key.dialect] += 1

    def _width(self) -> int:
        """Of the transformer it was made for; 0 where no change of an attention tells."""
        for name, stored in (*self.entries.items(), *self.second.items()):
            if name.endswith("self_attn.q.weight") and (columns := self.columns(stored)):
                return columns
        return 0

    def _low_rank(self, stored: Stored, columns: int) -> LowRank:
        """Source of the middle convolution: ComfyUI @6fd406f `comfy/weight_adapter/lora.py`."""
        down = self._values(stored["down"]).flatten(1)
        up = self._values(stored["up"]).flatten(1)
        if "mid" in stored:  # [r, r, ...], between two convolutions of size 1
            mid = self._values(stored["mid"])
            down = torch.einsum("rsk,si->rik", mid.flatten(2), down).flatten(1)
        down = F.pad(down, (0, columns - down.shape[1]))
        return LowRank(down * self._scale(stored), up)

    def _scale(self, stored: Stored) -> float:
        """alpha / rank; 1 where nothing tells alpha."""
        rank = self.tensors[stored["down"]].shape[0]
        if "alpha" in stored:
            return float(self._values(stored["alpha"])) / rank
        return self._adapter.scale(stored["down"], rank)

    def _values(self, name: str) -> Tensor:
        self._reader = self._reader or PlainReader(self.checkpoint)
        values = self._reader.read(name, torch.float32)
        if not torch.isfinite(values).all():
            raise FormatError(self.path, f"{name} holds NaN or infinity", "get the file again")
        return values


def _widened(diff: Tensor, shape: tuple[int, ...]) -> Tensor:
    """With zeros for the input channels that only the model has."""
    missing = math.prod(shape) - diff.numel()
    if not missing:
        return diff.view(shape)
    return F.pad(diff.flatten(1), (0, missing // shape[0])).view(shape)


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
        raise FormatError(checkpoint.path, _NO_DORA, _PLAIN)
    if patterns:
        raise FormatError(checkpoint.path, "has an alpha of its own for some modules")
    return _Adapter(alphas, rslora)
