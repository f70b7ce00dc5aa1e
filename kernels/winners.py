"""Which of a kernel's tiles a card runs: the first of its list, or the one that was timed fastest.

A kernel file lists the tiles that compile without spills, the default first, and asks `pick` under
a key that names the kernel and its kind of shape. `tuned/<card>.json`, which `wanrt bench tune`
writes, holds winners by key. It is read when a kernel first asks. What is not in the kernel's own
list is never run: a file with a fault is refused as a whole, with a warning, and defaults run.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from wanrt.kernels.launch import card_of

log = logging.getLogger("wanrt")

FOLDER = Path(__file__).resolve().parent / "tuned"
FORMAT = 1
_HEAD = {"format": int, "card": str, "torch": str, "triton": str, "commit": str, "date": str}
_ENTRY = {"case": str, "tile": dict, "median_s": float, "runner_up": dict, "runner_up_s": float}
T = TypeVar("T", bound=tuple)


class TuningError(ValueError):
    """A file of winners cannot be used; the message says why and what to do."""


class Winner(NamedTuple):
    """One entry of a file: sizes by the names of the tile's fields, and where they were timed."""

    tile: dict[str, int]
    case: str
    median_s: float
    runner_up: dict[str, int]
    runner_up_s: float


@dataclass
class Trial:
    """What `pick` answers instead of a file's winners, and what it was asked."""

    tiles: Mapping[str, tuple[int, ...]]
    asked: dict[str, Sequence[tuple[int, ...]]] = field(default_factory=dict)


_trial: ContextVar[Trial | None] = ContextVar("trial", default=None)


@contextmanager
def trial(tiles: Mapping[str, tuple[int, ...]] | None = None) -> Iterator[Trial]:
    """Run these tiles, elsewhere the defaults; `asked` collects every key and its list."""
    current = Trial(tiles or {})
    token = _trial.set(current)
    try:
        yield current
    finally:
        _trial.reset(token)


def pick(key: str, tiles: Sequence[T], x: Tensor) -> T:
    """The tile to run for x. No file is read while launches are recorded: that has no card."""
    current = _trial.get()
    if current is not None:
        current.asked[key] = tiles
        return current.tiles.get(key, tiles[0])
    card = card_of(x)
    winner = None if card is None else _winners(FOLDER, slug(card)).get(key)
    return tiles[0] if winner is None else _known(key, tuple(tiles), tuple(winner.tile.items()))


@cache
def slug(card: str) -> str:
    """A card's name as the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def read(path: Path) -> dict[str, Winner]:
    """The winners by key. Raises TuningError where a file is not what `wanrt bench tune` writes."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise TuningError(f"{path.name} cannot be read: {error}") from error
    _check(path, "the file", content, _HEAD | {"winners": dict})
    if content["format"] != FORMAT:
        raise TuningError(f"{path.name} has format {content['format']}; this wanrt reads {FORMAT}")
    for key, entry in content["winners"].items():
        _check(path, f"entry {key!r}", entry, _ENTRY)
        for tile in (entry["tile"], entry["runner_up"]):
            if not tile or any(type(size) is not int or size < 0 for size in tile.values()):
                raise TuningError(f"{path.name}: entry {key!r} has a tile that is no sizes: {tile}")
    return {key: Winner(**entry) for key, entry in content["winners"].items()}


def _check(path: Path, what: str, content: Any, fields: Mapping[str, type]) -> None:
    """Exactly these fields of these types."""
    if not isinstance(content, dict):
        raise TuningError(f"{path.name}: {what} is no object; make it with `wanrt bench tune`")
    for name in sorted(content.keys() ^ fields.keys()):
        fault = "is not known" if name in content else "is missing"
        raise TuningError(f"{path.name}: field {name!r} of {what} {fault}")
    for name, kind in fields.items():
        if type(content[name]) is not kind:
            raise TuningError(f"{path.name}: field {name!r} of {what} is no {kind.__name__}")


@cache
def _winners(folder: Path, name: str) -> dict[str, Winner]:
    path = folder / f"{name}.json"
    if not path.exists():
        return {}
    try:
        return read(path)
    except TuningError as error:
        log.warning("%s; the kernels run their defaults", error)
        return {}


@cache
def _known(key: str, tiles: tuple[T, ...], sizes: tuple[tuple[str, int], ...]) -> T:
    """The tile of these sizes, if the kernel lists it; else its default, with a warning."""
    for tile in tiles:
        if tile._asdict() == dict(sizes):
            return tile
    log.warning("%s: no tile of the kernel has the sizes %s; its default runs", key, dict(sizes))
    return tiles[0]
