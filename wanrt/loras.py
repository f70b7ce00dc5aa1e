"""The LoRAs of a model: which file serves which expert, and what each changes.

Those given when a pipeline is loaded are part of the model: they merge into weights that lie on the
device, and stay with it. Those of a request run as side branches, so that the next request may have
others, or other strengths, at once; so do all of them where blocks stream.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from wanrt.config import Lora, WanSpec
from wanrt.errors import UsageError
from wanrt.guidance import Expert
from wanrt.weights import lora_fit
from wanrt.weights.load import skeleton
from wanrt.weights.lora import Change, LoraFile
from wanrt.weights.lora_fit import Fit, Shapes, some
from wanrt.weights.titles import expert as expert_of

log = logging.getLogger("wanrt")


class Use(NamedTuple):
    """One LoRA on one transformer. `second`: its keys under `transformer_2`."""

    file: LoraFile
    second: bool
    fit: Fit
    strength: float

    @property
    def key(self) -> tuple[Path, int, bool]:
        """The same for the same tensors, whatever the strength."""
        return self.file.path, id(self.file), self.second

    def read(self, name: str, shape: tuple[int, ...]) -> Change:
        return self.file.read(name, shape, self.second)


@dataclass
class Shelf:
    """LoRA files of one model, opened once and held against its shapes; headers only."""

    spec: WanSpec
    quiet: bool = False

    def __post_init__(self) -> None:
        self._files: dict[tuple[str, int], LoraFile] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._told: set[str] = set()

    @property
    def shapes(self) -> Shapes:
        """Of every weight of the transformer."""
        if not self._shapes:
            module = skeleton("dit", self.spec.dit)
            self._shapes = {name: tuple(t.shape) for name, t in module.state_dict().items()}
        return self._shapes

    def check(self, loras: Sequence[Lora]) -> None:
        """Raises FormatError for a file that cannot be used, UsageError for a wrong expert."""
        for lora in loras:
            if self.spec.boundary is None and lora.expert != "auto":
                raise UsageError(
                    f"{lora.path}:{lora.expert} is for two-expert models; "
                    f"{self.spec.title} has one expert"
                )
        served = [len(self.uses(loras, expert)) for expert in self._experts()]
        if sum(served) and not all(served) and not self.quiet:
            expert, other = ("low", "high") if served[1] else ("high", "low")
            self._once(
                f"only the {expert}-noise expert has a LoRA; give the {other}-noise file too, or "
                f"write FILE:WEIGHT:both"
            )

    def uses(self, loras: Sequence[Lora], expert: Expert) -> tuple[Use, ...]:
        """The LoRAs that act on an expert; a model without two has the `high` one."""
        found = []
        for lora in loras:
            file = self._open(lora.path)
            if expert in _experts_of(lora, file, self.spec.boundary is not None):
                second = bool(file.second) and (expert == "low" or not file.entries)
                second = second and self.spec.boundary is not None
                fit = lora_fit.fit(file, self.shapes, self.spec.title, second)
                if self.spec.boundary is None:  # nothing for a second expert to do
                    idle = (key for stored in file.second.values() for key in stored.values())
                    fit = fit._replace(unmatched=(*fit.unmatched, *idle))
                self._tell(file, fit)
                found.append(Use(file, second, fit, lora.strength))
        return tuple(found)

    def num_bytes(self, loras: Sequence[Lora], element: int) -> int:
        """What branches and differences keep on the device, at most."""
        each = (
            sum(lora_fit.num_bytes(u.file, u.fit, self.shapes, element, u.second) for u in uses)
            for uses in (self.uses(loras, expert) for expert in self._experts())
        )
        return max(each)

    def merges(self, uses: Sequence[Use]) -> dict[str, Callable[[Tensor], Tensor]]:
        """For each weight that changes: from the fp32 weight to the merged one, in place."""
        names = dict.fromkeys(name for use in uses for name in use.fit.names)
        return {
            name: partial(_merge, [use for use in uses if name in use.fit.names], name)
            for name in names
        }

    def _experts(self) -> tuple[Expert, ...]:
        return ("high",) if self.spec.boundary is None else ("high", "low")

    def _open(self, path: str) -> LoraFile:
        stamp = Path(path).stat().st_mtime_ns if Path(path).is_file() else 0
        if (path, stamp) not in self._files:
            self._files[path, stamp] = LoraFile.open(path)
        return self._files[path, stamp]

    def _tell(self, file: LoraFile, fit: Fit) -> None:
        """Once per file: what of it does nothing."""
        if fit.unmatched and not self.quiet:
            keys = f"{len(fit.unmatched)} of its {len(file.tensors)} keys"
            where = self.spec.title
            self._once(f"{file.path}: {keys} have no place in {where}: {some(list(fit.unmatched))}")

    def _once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            log.warning("%s", text)


class Match(NamedTuple):
    """What a LoRA does in one transformer of a model."""

    expert: Expert
    weights: tuple[str, ...]
    unmatched: tuple[str, ...]


def match(path: Path, spec: WanSpec) -> list[Match]:
    """A LoRA held against a model, for `wanrt inspect`. Raises FormatError."""
    shelf, loras = Shelf(spec, quiet=True), [Lora(str(path))]
    experts: tuple[Expert, ...] = ("high",) if spec.boundary is None else ("high", "low")
    pairs = ((expert, use.fit) for expert in experts for use in shelf.uses(loras, expert))
    return [Match(expert, fit.names, fit.unmatched) for expert, fit in pairs]


def _experts_of(lora: Lora, file: LoraFile, two: bool) -> tuple[Expert, ...]:
    if lora.expert in ("high", "low"):
        return (lora.expert,)
    if not two:
        return ("high",)
    if lora.expert == "both":
        return ("high", "low")
    if file.second:
        return ("high", "low") if file.entries else ("low",)
    named = expert_of(Path(file.path.name)) or expert_of(file.path)
    return (named,) if named else ("high", "low")


def _merge(uses: Sequence[Use], name: str, weight: Tensor) -> Tensor:
    for use in uses:
        change = use.read(name, tuple(weight.shape))
        if change.low_rank is not None:
            down, up = (part.to(weight.device) for part in change.low_rank)
            weight.view(weight.shape[0], -1).addmm_(up, down, alpha=use.strength)
        if change.diff is not None:
            weight.add_(change.diff.to(weight.device), alpha=use.strength)
    return weight
