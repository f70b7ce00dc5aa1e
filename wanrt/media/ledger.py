"""The ledger: one line of JSON per result, each holding the hash of the line before it.

A line that is changed, taken out or moved breaks the chain from there on. Lines cut off at the
end do not: keep the newest hash elsewhere, and `verify(head=...)` looks for it.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from wanrt.errors import FormatError, MarkingError

GENESIS = "0" * 64  # what the first line holds as the hash before it
MAX_LINE = 1 << 16
_START = b'{"number": '  # of every line


@dataclass(frozen=True)
class Entry:
    """A line: its number from 1, what was recorded, the hash of the line before and its own."""

    number: int
    record: dict[str, Any]
    previous: str
    hash: str


class Chain(NamedTuple):
    """A ledger whose every link holds: how many lines, and the hash of the last one."""

    length: int
    head: str


def append(path: Path, record: dict[str, Any]) -> Entry:
    """Add a line and bring it to the disk; other processes wait. Folders are made.

    `record` is JSON; the time (UTC) is added. What a killed process left unfinished at the end,
    which was never a line, is cut off. Raises MarkingError.
    """
    try:
        with _locked(path) as file:
            last = _last(file, path)
            number, previous = (1, GENESIS) if last is None else (last.number + 1, last.hash)
            now = datetime.now(UTC).isoformat(timespec="seconds")
            body = {"number": number, "time": now, **record, "previous": previous}
            digest = _hash(body)
            text = json.dumps({**body, "hash": digest}, ensure_ascii=False)
            line = text.encode("utf-8", "backslashreplace") + b"\n"  # JSON's own escape, too
            if len(line) > MAX_LINE:
                raise MarkingError(f"{path}: a line of {len(line)} bytes; it may have {MAX_LINE}")
            _write(file, line)
    except OSError as error:
        raise MarkingError(
            f"cannot write the ledger {path}: {error.strerror or error} "
            "(make room, or name another with --ledger)"
        ) from error
    return Entry(number, record, previous, digest)


def check(path: Path) -> None:
    """Whether lines can be added, before any work. Raises MarkingError."""
    try:
        with _locked(path) as file:
            _last(file, path)
    except OSError as error:
        raise MarkingError(
            f"cannot write the ledger {path}: {error.strerror or error} "
            "(name another with --ledger)"
        ) from error


def _write(file: BinaryIO, line: bytes) -> None:
    """All of it or nothing."""
    end = file.seek(0, os.SEEK_END)
    try:
        written = file.write(line)  # unbuffered: one call of the system
        if written != len(line):
            raise OSError(None, "no space left")
        os.fsync(file.fileno())
    except OSError:
        file.truncate(end)
        raise


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags, 0o600), "r+b", buffering=0) as file:
        if sys.platform == "win32":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)  # closing the file lets go
        yield file


def _last(file: BinaryIO, path: Path) -> Entry | None:
    """The last whole line; the beginning of another after it is cut off."""
    end = file.seek(0, os.SEEK_END)
    begin = max(0, end - 2 * MAX_LINE)
    file.seek(begin)
    tail = file.read(end - begin)
    whole = tail.rfind(b"\n") + 1
    torn = tail[whole:]
    line = tail[:whole].rstrip(b"\n").rsplit(b"\n", 1)[-1]
    try:
        if not torn.startswith(_START[: len(torn)]) or (begin and not whole):
            raise FormatError(path, "does not end as a ledger does")
        last = _entry(path, line, None) if whole else None
    except FormatError as error:
        raise MarkingError(f"{error} (move it away, or name another with --ledger)") from error
    if torn:
        file.truncate(begin + whole)
    return last


def verify(path: Path, head: str | None = None) -> Chain:
    """Check every link. `head`: a hash kept from earlier, which must be that of some line.

    Raises FormatError naming the first line that is wrong, or a file that cannot be read.
    """
    length, last, seen = 0, GENESIS, head is None
    for entry in entries(path):
        length, last = entry.number, entry.hash
        seen = seen or entry.hash == head
    if not seen:
        raise FormatError(
            path, f"no line has the hash {head}", "lines were cut off, or it is another ledger"
        )
    return Chain(length, last)


def entries(path: Path) -> Iterator[Entry]:
    """The lines in order, each checked against the one before. Raises FormatError."""
    previous, number = GENESIS, 0
    try:
        with path.open("rb") as file:
            while line := file.readline(MAX_LINE + 1):
                number += 1
                where = f"{path}, line {number}"
                if not line.endswith(b"\n"):
                    raise FormatError(where, "is not finished (the next result cuts it off)")
                entry = _entry(where, line, number)
                if entry.previous != previous:
                    raise FormatError(where, "does not follow the line before it")
                previous = entry.hash
                yield entry
    except OSError as error:
        raise FormatError(path, f"cannot be read: {error.strerror or error}") from error


def _entry(where: object, line: bytes, number: int | None) -> Entry:
    """Raises FormatError for a line that is not what its own hash says."""
    try:
        body = json.loads(line)
        stated, previous = body.pop("hash"), body["previous"]
        found = int(body["number"])
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise FormatError(where, "is not a line of a ledger") from error
    if _hash(body) != stated:
        raise FormatError(where, "was changed: its hash does not match")
    if number is not None and found != number:
        raise FormatError(where, f"has the number {found}: lines are missing or moved")
    record = {k: v for k, v in body.items() if k not in ("number", "previous")}
    return Entry(found, record, previous, stated)


def _hash(body: dict[str, Any]) -> str:
    """SHA-256 of the line without its hash: sorted keys, no spaces, ASCII."""
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
