"""The ledger: a chain of lines in which every change but a cut at the end shows."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from wanrt.errors import FormatError, MarkingError
from wanrt.media import ledger


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """Five lines."""
    path = tmp_path / "new" / "ledger.jsonl"
    for number in range(5):
        ledger.append(path, {"event": "saved", "path": f"ä {number}.mp4", "frames": number})
    return path


def test_lines_are_read_back(book: Path) -> None:
    found = list(ledger.entries(book))
    assert [entry.number for entry in found] == [1, 2, 3, 4, 5]
    assert [entry.record["path"] for entry in found] == [f"ä {n}.mp4" for n in range(5)]
    assert found[0].previous == "0" * 64
    assert [entry.previous for entry in found[1:]] == [entry.hash for entry in found[:-1]]
    assert ledger.verify(book) == (5, found[-1].hash)
    assert book.stat().st_mode & 0o777 == 0o600
    assert "ä 0.mp4" in book.read_text("utf-8")  # for people


def test_the_hash_is_what_is_documented(book: Path) -> None:
    """SHA-256 of the line without its hash: keys sorted, no spaces, ASCII."""
    import hashlib

    body = json.loads(book.read_text("utf-8").splitlines()[2])
    stated = body.pop("hash")
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    assert hashlib.sha256(text.encode()).hexdigest() == stated


Lines = list[bytes]

CHANGES: dict[str, tuple[Callable[[Lines], Lines], str]] = {
    "a value": (lambda rows: [rows[0], rows[1].replace(b'"frames": 1', b'"frames": 7'), *rows[2:]],
                "line 2: was changed"),
    "a line taken out": (lambda rows: rows[:2] + rows[3:], "line 3: has the number 4"),
    "the first line taken out": (lambda rows: rows[1:], "line 1: has the number 2"),
    "two lines swapped": (lambda rows: [rows[1], rows[0], *rows[2:]], "line 1: has the number 2"),
    "a line twice": (lambda rows: [rows[0], *rows], "line 2: has the number 1"),
    "no JSON": (lambda rows: [*rows[:3], b"x\n", *rows[3:]], "line 4: is not a line"),
    "another shape": (lambda rows: [b"[1]\n"], "line 1: is not a line"),
    "cut within a line": (lambda rows: [*rows[:4], rows[4][:50]], "line 5: is not finished"),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_named(what: str, book: Path) -> None:
    change, reason = CHANGES[what]
    book.write_bytes(b"".join(change(book.read_bytes().splitlines(keepends=True))))
    with pytest.raises(FormatError, match=reason) as caught:
        ledger.verify(book)
    assert caught.value.exit_code == 3


def test_a_rewritten_history_does_not_link(book: Path, tmp_path: Path) -> None:
    """A changed line with a right hash of its own: the next one points elsewhere."""
    forged = tmp_path / "forged.jsonl"
    for number in range(5):
        ledger.append(forged, {"event": "saved", "path": "b.mp4", "frames": number})
    rows = book.read_bytes().splitlines(keepends=True)
    rows[1] = forged.read_bytes().splitlines(keepends=True)[1]
    book.write_bytes(b"".join(rows))
    with pytest.raises(FormatError, match="line 2: does not follow the line before it"):
        ledger.verify(book)


def test_a_cut_at_the_end_needs_a_hash_from_earlier(book: Path) -> None:
    head = ledger.verify(book).head
    book.write_bytes(b"".join(book.read_bytes().splitlines(keepends=True)[:3]))
    assert ledger.verify(book).length == 3
    with pytest.raises(FormatError, match="no line has the hash .*lines were cut off"):
        ledger.verify(book, head)
    ledger.append(book, {"event": "saved"})
    with pytest.raises(FormatError, match="no line has the hash"):
        ledger.verify(book, head)


def test_what_a_killed_process_left_is_cut_off(book: Path) -> None:
    whole = book.read_bytes()
    book.write_bytes(whole + b'{"number": 6, "time": "2026')
    ledger.append(book, {"event": "saved"})
    assert book.read_bytes().startswith(whole) and ledger.verify(book).length == 6
    book.write_bytes(b'{"numb')
    ledger.append(book, {"event": "saved"})
    assert ledger.verify(book).length == 1


@pytest.mark.parametrize("content", [b"notes", b"notes\n", b"notes\nmore", b"{}\n", b"\n" * 9])
def test_another_file_is_left_alone(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    for call in (ledger.check, lambda path: ledger.append(path, {})):
        with pytest.raises(MarkingError, match="notes.txt.*move it away, or name another"):
            call(path)
    assert path.read_bytes() == content


def test_odd_text_and_too_much_of_it(book: Path) -> None:
    ledger.append(book, {"model": "a\udcffb\x1b\n"})
    assert ledger.verify(book).length == 6
    assert [*ledger.entries(book)][-1].record["model"] == "a\udcffb\x1b\n"
    with pytest.raises(MarkingError, match="a line of 7.... bytes; it may have 65536"):
        ledger.append(book, {"model": "x" * 70_000})
    assert ledger.verify(book).length == 6


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "ledger.jsonl"):
        with pytest.raises(MarkingError, match="cannot write the ledger") as caught:
            ledger.check(path)
        assert caught.value.exit_code == 6
    with pytest.raises(FormatError, match="cannot be read: No such file"):
        ledger.verify(tmp_path / "absent")


WORKER = """
import sys
from pathlib import Path
from wanrt.media import ledger

for number in range(20):
    ledger.append(Path(sys.argv[1]), {"worker": sys.argv[2], "number of it": number})
"""


def test_processes_take_turns(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    commands = [[sys.executable, "-c", WORKER, str(path), name] for name in "abc"]
    workers = [subprocess.Popen(command) for command in commands]
    assert [worker.wait(60) for worker in workers] == [0, 0, 0]
    assert ledger.verify(path).length == 60
    rows = [entry.record["worker"] for entry in ledger.entries(path)]
    assert all(rows.count(name) == 20 for name in "abc")
