"""Bundles from people who mean harm: each is refused, with one line, before a member is handed out.

Changed bytes, other files, other keys; zips that mean two things; graphs that name other files.
"""

import json
import os
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest
from bundle_files import (
    CONTENTS,
    EXTERNAL,
    SIGNER,
    STRANGER,
    files_of,
    manifest,
    message,
    node,
    onnx,
    plain_zip,
    write,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from wanrt import cli
from wanrt.engine import bundle
from wanrt.engine.bundle import Bundle
from wanrt.engine.manifest import parse_manifest
from wanrt.engine.onnx_check import check_self_contained
from wanrt.engine.records import canonical
from wanrt.errors import FormatError, WanrtError

ADA = "engines/block-ada.engine"
Edit = Callable[[Path], object]
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("good") / "b")


@pytest.fixture(scope="module")
def files(good: Path) -> list[tuple[str, bytes]]:
    return list(files_of(good).items())


def _open(path: Path) -> dict[str, bytes]:
    """As a program does that uses all of it, weights from where they lie."""
    opened = Bundle.open(path, {SIGNER.key})
    files = {name: opened.read(name) for name in CONTENTS if not name.endswith(".safetensors")}
    for name in set(CONTENTS) - set(files):
        place = opened.locate(name)
        files[name] = place.file.read_bytes()[place.begin : place.begin + place.size]
    assert not set(CONTENTS) - set(files)
    return files


@pytest.mark.parametrize("name", ["b", "b.zip"])
def test_a_good_one_is_read_as_it_was_written(name: str, tmp_path: Path) -> None:
    assert _open(write(tmp_path / name)) == CONTENTS


def _refused(path: Path, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By the library and by the command line, which has exit code 3 and one line for it."""
    with pytest.raises(FormatError, match=named):
        _open(path)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["bundle", "verify", str(path), "--trust", SIGNER.key])
    shown = capsys.readouterr()
    assert (exit_.value.code, shown.out, shown.err.count("\n")) == (3, "", 1)


def _flip(path: Path, at: int = 9) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def _older(path: Path) -> None:
    """A manifest that was signed too, of a bundle without its second engine."""
    contents = {name: data for name, data in CONTENTS.items() if "ampere" not in name}
    members = bundle.members_of(contents)
    older = replace(manifest(), engines=manifest().engines[:1], members=members)
    (path / "manifest.json").write_bytes(canonical(older))
    (path / "manifest.sig").write_bytes(SIGNER.signature(canonical(older)))


def _link(path: Path, hard: bool = False) -> None:
    (path / ADA).rename(path.parent / "elsewhere")
    (os.link if hard else os.symlink)(path.parent / "elsewhere", path / ADA)


def _link_folder(path: Path) -> None:
    (path / "engines").rename(path.parent / "elsewhere")
    (path / "engines").symlink_to(path.parent / "elsewhere")


IN_FOLDERS: dict[str, tuple[Edit, str]] = {
    "byte": (lambda b: _flip(b / ADA), f"{ADA} was changed"),
    "byte of the weights": (lambda b: _flip(b / "weights/dit.safetensors"), "was changed"),
    "byte of the manifest": (lambda b: _flip(b / "manifest.json"), "signature .* does not hold"),
    "byte of the signature": (
        lambda b: _flip(b / "manifest.sig", -9),
        "does not hold|hexadecimal digits",
    ),
    "shorter": (lambda b: (b / ADA).write_bytes(b"x"), "1 bytes, its manifest says 640"),
    "extra file": (lambda b: (b / "engines/x").touch(), "does not name: 'engines/x'"),
    "extra steering file": (lambda b: (b / "\x1b[2J").touch(), r"does not name: '\\x1b\[2J'"),
    "extra .onnx.data": (lambda b: (b / "onnx/block.onnx.data").touch(), "does not name"),
    "missing file": (lambda b: (b / ADA).unlink(), f"manifest names: '{ADA}'"),
    "case": (lambda b: (b / ADA).rename(b / "engines/Block-Ada.engine"), "does not name"),
    "no signature": (lambda b: (b / "manifest.sig").unlink(), "is not signed"),
    "empty signature": (lambda b: (b / "manifest.sig").write_bytes(b""), "not valid"),
    "long signature": (lambda b: (b / "manifest.sig").write_bytes(bytes(1025)), "more than 1024"),
    "wrong key": (lambda b: bundle.sign(b, STRANGER, True), "is not trusted here"),
    "older manifest": (_older, "does not name: 'engines/block-ampere.engine'"),
    "no manifest": (lambda b: (b / "manifest.json").unlink(), "holds no manifest.json"),
    "long manifest": (lambda b: (b / "manifest.json").write_bytes(bytes(2**20 + 1)), "1048576"),
    "symbolic link": (_link, f"'{ADA}' is a symbolic link"),
    "hard link": (lambda b: _link(b, hard=True), f"'{ADA}' is a hard link"),
    "linked folder": (_link_folder, "'engines' is a symbolic link"),
    "pipe": (lambda b: os.mkfifo(b / "pipe"), "'pipe' is no regular file"),
    "no folder": (shutil.rmtree, "No such file"),
}


@pytest.mark.skipif(os.name != "posix", reason="links and pipes")
@pytest.mark.parametrize("attack", IN_FOLDERS)
def test_a_folder(
    attack: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit, named = IN_FOLDERS[attack]
    path = tmp_path / "b"
    shutil.copytree(good, path)
    _open(path)
    edit(path)
    _refused(path, named, capsys)


def test_a_signature_of_something_else_is_none_of_a_bundle(good: Path, tmp_path: Path) -> None:
    """The same key over the same bytes, for another purpose."""
    path = tmp_path / "b"
    shutil.copytree(good, path)
    raw = (path / "manifest.json").read_bytes()
    text = (path / "manifest.sig").read_text()
    other = SIGNER.sign(raw).hex()
    (path / "manifest.sig").write_text(text[: text.index('re":"') + 5] + other + '"}')
    with pytest.raises(FormatError, match="does not hold"):
        _open(path)


def _zipped(files: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    """As Python's zipfile writes it."""
    out = BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        for name, data in files:
            info = zipfile.ZipInfo(name)  # 1980-01-01
            info.compress_type = method
            file.writestr(info, data)
    return out.getvalue()


Files = list[tuple[str, bytes]]


def _overlap(files: Files) -> bytes:
    """The second entry's bytes are also inside the first one's."""
    whole = plain_zip(files)
    first = 30 + len("manifest.json")
    return whole[:18] + struct.pack("<II", *[len(files[0][1]) + 64] * 2) + whole[26:first] + (
        whole[first:]
    )  # fmt: skip


def _shifted(files: Files) -> bytes:
    """The directory says that the last file lies where the first one does."""
    data = bytearray(plain_zip(files))
    row = data.rindex(b"PK\x01\x02")
    data[row + 42 : row + 46] = bytes(4)
    return bytes(data)


def _zip64(files: Files) -> bytes:
    """Zip64 fields where sizes do not need them."""
    name, data = files[0]
    text = name.encode()
    head = struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", 45, 0, 0, 0, 0x21, 0, 2**32 - 1, 2**32 - 1,
                       len(text), 20)  # fmt: skip
    return head + text + struct.pack("<HHQQ", 1, 16, len(data), len(data)) + plain_zip(files)


def _crc(files: Files) -> bytes:
    """Another CRC in both headers of a file: nothing that SHA-256 sees."""
    crc = zlib.crc32(dict(files)[ADA])
    return plain_zip(files).replace(struct.pack("<I", crc), struct.pack("<I", crc ^ 1))


ZIPS: dict[str, tuple[Callable[[Files], bytes], str]] = {
    "parent path": (lambda f: plain_zip([*f, ("../../x", b"")]), "does not name: '../../x'"),
    "absolute path": (lambda f: plain_zip([*f, ("/etc/x", b"")]), "does not name: '/etc/x'"),
    "backslash": (lambda f: plain_zip([*f, ("..\\x", b"")]), "does not name"),
    "control character": (lambda f: plain_zip([*f, ("\x1b[2J", b"")]), "name .* is odd"),
    "not ASCII": (lambda f: plain_zip([*f, ("\u202eenigne", b"")]), "name .* is odd"),
    "long name": (lambda f: plain_zip([*f, ("a" * 129, b"")]), "is long"),
    "folder entry": (lambda f: plain_zip([("engines/", b""), *f]), "does not name: 'engines/'"),
    "twice": (lambda f: plain_zip([*f, f[3]]), "twice"),
    "manifest twice": (lambda f: plain_zip([*f, f[0]]), "holds manifest.json twice"),
    "case clash": (lambda f: plain_zip([*f, ("Manifest.json", b"")]), "does not name"),
    "compressed": (lambda f: _zipped(f, zipfile.ZIP_DEFLATED), "is compressed"),
    "bomb": (lambda f: _zipped([*f, ("x", bytes(1 << 24))], zipfile.ZIP_DEFLATED), "compressed"),
    "other flags": (_zipped, "not their directory alone"),
    "before": (lambda f: b"#!/bin/sh\n" + plain_zip(f), "begins at byte 0"),
    "after": (lambda f: plain_zip(f) + b"\n", "not their directory alone"),
    "comment": (lambda f: plain_zip(f)[:-2] + b"\x03\x00abc", "not their directory alone"),
    "two directories": (lambda f: plain_zip(f) + plain_zip(f), "not their directory alone"),
    "hidden entry": (
        lambda f: plain_zip(f).replace(b"PK\x01\x02", b"PK\x01\x03", 1), "begins at byte"
    ),
    "overlap": (_overlap, "no file of a stored zip begins at byte"),
    "shifted": (_shifted, "not their directory alone"),
    "zip64 for nothing": (_zip64, "as wanrt writes"),
    "past the end": (lambda f: plain_zip(f)[:700], "truncated"),
    "empty": (lambda f: plain_zip([]), "begins at byte 0"),
    "no zip": (lambda f: b"", "begins at byte 0"),
    "crc": (_crc, f"{ADA} does not have the CRC"),
}  # fmt: skip


@pytest.mark.parametrize("attack", ZIPS)
def test_a_zip(
    attack: str, files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, named = ZIPS[attack]
    path = tmp_path / "b.zip"
    path.write_bytes(plain_zip(files))
    _open(path)
    path.write_bytes(make(files))
    _refused(path, named, capsys)


def test_a_zip_with_a_symbolic_link(files: Files, tmp_path: Path) -> None:
    out = BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, data in files:
            info = zipfile.ZipInfo(name)
            info.create_system, info.external_attr = 3, (0o120777 if name == ADA else 0) << 16
            file.writestr(info, data)
    path = tmp_path / "b.zip"
    path.write_bytes(out.getvalue())
    with pytest.raises(FormatError, match="not their directory alone|as wanrt writes"):
        _open(path)


def _in(message_of: bytes) -> bytes:
    """An attribute that holds a graph whose node has an attribute with this tensor."""
    inner = message((1, node(b"Constant", message((1, b"value"), (5, message_of)))))
    return onnx((1, node(b"If", message((1, b"then_branch"), (6, inner)))))


GRAPHS = {
    "initializer": onnx((5, EXTERNAL)),
    "location alone": onnx((5, message((8, b"w"), (14, 1)))),
    "path alone": onnx((5, message((8, b"w"), (13, b"")))),
    "sparse": onnx((15, message((1, EXTERNAL)))),
    "in a branch": _in(EXTERNAL),
    "of a function": onnx() + message((25, message((7, node(b"C", message((5, EXTERNAL))))))),
    "of training": onnx() + message((20, message((1, message((5, EXTERNAL)))))),
    "second graph": onnx() + message((7, message((5, EXTERNAL)))),
    "engine context": onnx((1, node(b"EPContext"))),
}


@pytest.mark.parametrize("attack", GRAPHS)
def test_a_graph_that_names_a_file(
    attack: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even if signed: the check does not depend on who made it."""
    contents = {**CONTENTS, "onnx/block.onnx": GRAPHS[attack]}
    with pytest.raises(FormatError, match="b: onnx/block.onnx has a .* in another file"):
        bundle.write(tmp_path / "b", manifest(contents), contents, SIGNER)
    path = write(tmp_path / "b")
    raw = canonical(manifest(contents))
    for name, data in (
        ("manifest.json", raw), ("manifest.sig", SIGNER.signature(raw)),
        ("onnx/block.onnx", GRAPHS[attack]),
    ):  # fmt: skip
        (path / name).write_bytes(data)
    _refused(path, "in another file", capsys)


def test_a_graph_that_is_whole_passes_and_rubbish_does_not() -> None:
    inline = message((1, 2), (2, 1), (4, bytes(8)), (8, b"w"), (14, 0))
    check_self_contained(onnx((5, inline)), Path("b"), "g")
    check_self_contained(_in(inline), Path("b"), "g")
    deep = message((1, node(b"If")))
    for _ in range(20):
        deep = message((1, node(b"If", message((6, deep)))))
    for rubbish, named in [
        (b"", "holds no graph"),
        (message((1, 10)), "holds no graph"),
        (message((7, 1)), "is no ONNX model"),
        (onnx()[:-1], "is no ONNX model"),
        (onnx() + b"\x0b", "is no ONNX model"),
        (onnx() + b"\xff" * 11, "is no ONNX model"),
        (message((7, deep)), "nested more than 32 deep"),
    ]:
        with pytest.raises(FormatError, match=named):
            check_self_contained(rubbish, Path("b"), "g")


@FUZZ
@given(data=st.data())
def test_a_zip_with_any_byte_changed_is_refused(data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "b.zip"
    if not path.exists():
        write(path)
    whole = path.read_bytes()
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(whole) - 1))
        changed[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(whole)) | st.just(len(whole)))
    hostile = bytes(changed[:cut]) + data.draw(st.binary(max_size=4))
    assume(hostile != whole)
    fuzzed = tmp_path / "fuzzed.zip"
    fuzzed.write_bytes(hostile)
    with pytest.raises(FormatError):
        _open(fuzzed)


NAMES = st.sampled_from(["manifest.json", "manifest.sig", ADA, "x", "../x", "ENGINES/x"])


@FUZZ
@given(listed=st.lists(st.tuples(NAMES, st.binary(max_size=40)), max_size=6))
def test_any_zip_is_refused(listed: Files, tmp_path: Path) -> None:
    path = tmp_path / "any.zip"
    path.write_bytes(plain_zip(listed))
    with pytest.raises(FormatError):
        _open(path)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


def _places(value: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Of everything within a JSON value."""
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    return [p for key, inner in items for p in [(*path, key), *_places(inner, (*path, key))]]


@FUZZ
@given(st.data())
def test_a_manifest_with_anything_changed_is_read_strictly(data: st.DataObject) -> None:
    """It is refused, or it is a record with exactly that text; signed or not."""
    value = json.loads(canonical(manifest()))
    *way, last = data.draw(st.sampled_from(_places(value)))
    holder = value
    for key in way:
        holder = holder[key]
    holder[last] = data.draw(JSON)
    raw = json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    try:
        record = parse_manifest(raw, Path("m"))
    except FormatError as error:
        assert str(error).isprintable()
        return
    assert canonical(record) == raw


@FUZZ
@given(st.data())
def test_any_bytes_as_a_graph(data: st.DataObject) -> None:
    whole = bytearray(onnx((5, EXTERNAL)))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    for raw in (bytes(whole), data.draw(st.binary(max_size=60))):
        try:
            check_self_contained(raw, Path("b"), "g")
        except WanrtError as error:
            assert isinstance(error, FormatError)
