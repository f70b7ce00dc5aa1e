"""Frozen dataclasses as canonical JSON and back: one text for one record, everything else refused.

A field is a string, an integer, a truth value, a `Literal` of strings, another such dataclass or a
tuple of one of these. Strings are printable ASCII and integers natural numbers below 2^53, so that
every JSON library agrees on what they are and the canonical text is that of RFC 8785: keys sorted,
no spaces. There are no fractions, no null and no optional keys.
"""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from wanrt.errors import FormatError
from wanrt.weights.strict_json import parse_json

MAX_STRING = 256  # characters
MAX_ITEMS = 4096  # of a list
MAX_INTEGER = 2**53  # beyond it, JSON libraries with floating-point numbers disagree

T = TypeVar("T")


def canonical(record: object) -> bytes:
    """The one text of a record: ASCII, sorted keys, no spaces, no line break at the end."""
    fields_ = asdict(cast(Any, record))
    return json.dumps(fields_, sort_keys=True, separators=(",", ":")).encode("ascii")


def parse(kind: type[T], raw: bytes, path: Path, what: str) -> T:
    """The record whose canonical text is `raw`. Raises FormatError naming file and field."""
    value = parse_json(path, raw, what)
    try:
        record = _parsed(kind, value, what)
    except ValueError as error:
        raise FormatError(path, str(error), "another version of wanrt, or changed") from None
    if canonical(record) != raw:
        reason = f"the {what} is not in its canonical form (sorted keys, no spaces)"
        raise FormatError(path, reason, "it was edited; build the bundle again")
    return record


def _parsed(kind: Any, value: object, where: str) -> Any:
    """Raises ValueError that names the field."""
    if get_origin(kind) is tuple:
        return _items(get_args(kind)[0], value, where)
    if get_origin(kind) is Literal:
        legal = get_args(kind)
        if not isinstance(value, str) or value not in legal:
            raise ValueError(f"{where} is {_shown(value)}; known: {', '.join(legal)}")
        return value
    if kind is str:
        if not isinstance(value, str) or not is_plain(value):
            limit = f"at most {MAX_STRING} printable ASCII characters"
            raise ValueError(f"{where} is {_shown(value)}; it has {limit}")
        return value
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{where} is {_shown(value)}; it is true or false")
        return value
    if kind is int:
        if type(value) is not int or not 0 <= value < MAX_INTEGER:
            raise ValueError(f"{where} is {_shown(value)}; it is a natural number below 2^53")
        return value
    return _record(kind, value, where)


def _record(kind: Any, value: object, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {_shown(value)}; it is an object")
    names = {field.name for field in fields(kind)}
    for problem, found in (("lacks", names - set(value)), ("has unknown", set(value) - names)):
        if found:
            raise ValueError(f"{where} {problem} {_shown(min(found))}")
    hints = get_type_hints(kind)
    parts = {name: _parsed(hints[name], value[name], f"{where}.{name}") for name in value}
    try:
        return kind(**parts)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _items(kind: Any, value: object, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list) or len(value) > MAX_ITEMS:
        raise ValueError(f"{where} is no list of at most {MAX_ITEMS} items")
    return tuple(_parsed(kind, item, f"{where}[{i}]") for i, item in enumerate(value))


def is_plain(text: str) -> bool:
    """Printable ASCII of a bounded length: it cannot steer a terminal."""
    return len(text) <= MAX_STRING and text.isascii() and text.isprintable()


def _shown(value: object) -> str:
    return ascii(value)[:80]
