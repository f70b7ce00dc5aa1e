"""The bundle: written, read back, signed, trusted, and its manifest as canonical text."""

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from bundle_files import (
    CONTENTS,
    RELEASE,
    SIGNER,
    STRANGER,
    TOKENS,
    engine,
    manifest,
    plain_zip,
    write,
)

from wanrt import cli, env
from wanrt.engine import bundle, trust, zip_layout
from wanrt.engine.bundle import Bundle, Host
from wanrt.engine.manifest import Input, parse_manifest
from wanrt.engine.records import canonical
from wanrt.errors import FormatError, MarkingError, OutputError, UsageError

FORMS = ("b", "b.zip")
TRUSTED = {SIGNER.key}


@pytest.mark.parametrize("form", FORMS)
def test_what_was_written_is_read(form: str, tmp_path: Path) -> None:
    opened = Bundle.open(write(tmp_path / form), TRUSTED)
    opened.verify()
    assert opened.manifest == manifest() and opened.key == SIGNER.key
    assert {name: opened.read(name) for name in CONTENTS} == CONTENTS
    with pytest.raises(UsageError, match="no member 'manifest.json'"):
        opened.read("manifest.json")
    with pytest.raises(UsageError, match="768 bytes; 767 are read"):
        opened.read("weights/dit.safetensors", limit=767)


def test_a_zip_is_the_same_bytes_each_time_and_opens_elsewhere(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.zip"), tmp_path / "b.zip"
    sources = {name: tmp_path / str(i) for i, name in enumerate(reversed(CONTENTS))}
    for name, source in sources.items():
        source.write_bytes(CONTENTS[name])
    bundle.write(b, manifest(), sources, SIGNER)
    assert a.read_bytes() == b.read_bytes()
    with zipfile.ZipFile(a) as file:
        assert file.testzip() is None
        assert file.namelist() == ["manifest.json", "manifest.sig", *sorted(CONTENTS)]
        assert {name: file.read(name) for name in CONTENTS} == CONTENTS
        assert all(info.compress_type == zipfile.ZIP_STORED for info in file.infolist())
    other = plain_zip([("manifest.json", b"{}"), ("a", b"")])
    assert other.endswith(zip_layout.directory(_entries(other), 2 + 30 + 13 + 30 + 1))


def _entries(data: bytes) -> list[zip_layout.Entry]:
    return zip_layout.read_entries(Path("z"), BytesIO(data), len(data))


@pytest.mark.skipif(os.name != "posix", reason="files with holes")
def test_a_large_zip_has_zip64_fields_that_others_read(tmp_path: Path) -> None:
    """One file of 5 GiB that takes no room on the disk, one of 7 bytes, and their directory."""
    path, big = tmp_path / "large.zip", 5 << 30
    heads = [zip_layout.local_header("a.safetensors", big, 1), zip_layout.local_header("b", 7, 2)]
    second = len(heads[0]) + big
    entries = [zip_layout.Entry("a.safetensors", big, 1, len(heads[0]))]
    entries.append(zip_layout.Entry("b", 7, 2, second + len(heads[1])))
    with path.open("wb") as file:
        file.write(heads[0])
        file.seek(second)
        file.write(heads[1] + bytes(7))
        file.write(zip_layout.directory(entries, file.tell()))
    with path.open("rb") as file:
        assert zip_layout.read_entries(path, file, path.stat().st_size) == entries
    with zipfile.ZipFile(path) as file:
        found = [(i.filename, i.file_size, i.CRC, i.header_offset) for i in file.infolist()]
        assert found == [("a.safetensors", big, 1, 0), ("b", 7, 2, second)]
        assert file.open("a.safetensors").read(3) == bytes(3)  # the header before it agrees


def test_the_manifest_has_one_text() -> None:
    raw = canonical(manifest())
    assert parse_manifest(raw, Path("m")) == manifest()
    assert raw == json.dumps(json.loads(raw), sort_keys=True, separators=(",", ":")).encode()
    for other in (
        raw + b"\n",
        raw.replace(b":1,", b": 1,", 1),
        raw.replace(b"wan2", b"w\\u0061n2"),
    ):
        assert other != raw and json.loads(other) == json.loads(raw)
        with pytest.raises(FormatError, match="is not in its canonical form"):
            parse_manifest(other, Path("m"))


def _edit(**changes: Any) -> bytes:
    fields = json.loads(canonical(manifest())) | changes
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (_edit(format=0, old=1), "has format 0; this wanrt reads format 1"),
        (_edit(format=2, new=1), "has format 2; this wanrt reads format 1"),
        (_edit(format=True), "manifest.format is True"),
        (_edit(format=10**99), "has format 1000"),
        (_edit(format=1.0), "manifest.format is 1.0"),
        (_edit(extra=1), "has unknown 'extra'"),
        (_edit(weights=None), "manifest.weights is no list"),
        (_edit(weights=["weights/none.safetensors"]), "is no member"),
        (_edit(weights=[]), "weights/dit.safetensors is of no use"),
        (_edit(weights=["weights/dit.safetensors"] * 2), "is there twice"),
        (_edit(engines=[]), "engines/block-ada.engine is of no use"),
        (_edit(members=[]), "graph onnx/block.onnx is no member"),
        (_edit(provenance={"commit": "x", "dirty": False, "tools": []}), "commit is no git hash"),
        (canonical(manifest())[:-1] + b',"format":1}', "'format' appears twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"format":' + b"1" * 5000 + b"}", "not valid"),
        (b"\xff", "not valid"),
        (b"[]", "manifest is \\[\\]; it is an object"),
        (_edit(model="wan\x1b[2J"), "model is 'wan"),
    ],
)
def test_a_manifest_that_is_not_in_order(raw: bytes, named: str) -> None:
    with pytest.raises(FormatError, match=named):
        parse_manifest(raw, Path("m"))


@pytest.mark.parametrize(
    "name",
    ["", "/a", "a/", "a//b", "../a", "a/../b", "a/./b", "..", "A.txt", "a b", "a\\b", "c:a", "a.",
     ".a", "con", "a/nul.txt", "com1.engine", "é", "a\n", "a" * 129, "a/b/c/d/e", "a..b"],
)  # fmt: skip
def test_a_name_that_may_mean_another_file(name: str) -> None:
    with pytest.raises(ValueError, match="the name"):
        bundle.members_of({name: b""})


def test_records_that_do_not_fit_each_other() -> None:
    for wrong, named in [
        (lambda: Input("x", "bf16", (1, 9), (1, 8), (1, 16)), "min <= opt <= max"),
        (lambda: replace(TOKENS, max=(1,)), "min <= opt <= max"),
        (lambda: engine("a.engine", 89, compute_capabilities=()), "names no card"),
        (lambda: manifest(engines=(engine("engines/block-ada.engine", 89, graph="vae"),
                                   engine("engines/block-ampere.engine", 86))), "no graph 'vae'"),
        (lambda: manifest(weights=("engines/block-ada.engine",)), "not .safetensors"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=named):
            wrong()


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("a.safetensors", "a.safetensors/b.safetensors"), "a.safetensors"),
        (("manifest.json/b.safetensors",), "manifest.json"),
        (("manifest.sig",), "manifest.sig"),
    ],
)
def test_a_name_is_that_of_one_file(more: tuple[str, ...], named: str) -> None:
    contents = {**CONTENTS, **dict.fromkeys(more, b"")}
    with pytest.raises(ValueError, match=f"member {named} has the name of a folder or"):
        manifest(contents, weights=tuple(sorted({*more, "weights/dit.safetensors"})))


def test_an_engine_fits_its_release_and_card_alone(tmp_path: Path) -> None:
    opened = Bundle.open(write(tmp_path / "b"), TRUSTED)
    assert opened.engine_for("block", Host("tensorrt-rtx", RELEASE, 86)).member.endswith(
        "block-ampere.engine"
    )
    for release, card in ((RELEASE, 120), ("1.7.1.117", 89), ("1.7.1", 89)):
        with pytest.raises(FormatError, match=f"for tensorrt-rtx {release} on.*; there is: tens"):
            opened.engine_for("block", Host("tensorrt-rtx", release, card))


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_left_of_a_bundle_that_does_not_hold(form: str, tmp_path: Path) -> None:
    changed = {**CONTENTS, "weights/dit.safetensors": bytes(768)}
    with pytest.raises(FormatError, match=f"{form}: weights/dit.safetensors was changed"):
        bundle.write(tmp_path / form, manifest(), changed, SIGNER)
    with pytest.raises(FormatError, match="lacks a file"):
        bundle.write(tmp_path / form, manifest(), {}, SIGNER)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OutputError, match="no folder"):
        write(tmp_path / "none" / form)
    write(tmp_path / form)
    with pytest.raises(OutputError, match="there already"):
        write(tmp_path / form)


@pytest.mark.parametrize("form", FORMS)
def test_signing(form: str, tmp_path: Path) -> None:
    path, direct = write(tmp_path / form, by=None), tmp_path / "direct.zip"
    with pytest.raises(FormatError, match="is not signed"):
        Bundle.open(path, TRUSTED)
    assert Bundle.look(path).key is None
    bundle.sign(path, SIGNER)
    assert Bundle.open(path, TRUSTED).key == SIGNER.key
    if form == "b.zip":
        assert path.read_bytes() == write(direct).read_bytes()
    with pytest.raises(UsageError, match="is signed by"):
        bundle.sign(path, STRANGER)
    bundle.sign(path, STRANGER, overwrite=True)
    with pytest.raises(FormatError, match=f"{STRANGER.key}, which is not trusted here.*--trust"):
        Bundle.open(path, TRUSTED)
    assert Bundle.open(path, {STRANGER.key}).key == STRANGER.key


def test_a_changed_bundle_is_not_signed(tmp_path: Path) -> None:
    path = write(tmp_path / "b", by=None)
    (path / "engines/block-ada.engine").write_bytes(bytes(640))
    with pytest.raises(FormatError, match="block-ada.engine was changed"):
        bundle.sign(path, SIGNER)
    assert not (path / "manifest.sig").exists()


def test_keys_are_trusted_once(tmp_path: Path) -> None:
    file = tmp_path / "new" / "keys"
    assert trust.trusted_keys(file) == frozenset()
    for _ in range(2):
        assert trust.trust(SIGNER.key, "wan\n2.1", file) == file
    file.write_text("# mine\n\n" + file.read_text().rstrip())
    trust.trust(STRANGER.key, "other", file)
    assert file.read_text() == f"# mine\n\ned25519 {SIGNER.key}\ned25519 {STRANGER.key} other\n"
    assert trust.trusted_keys(file) == {SIGNER.key, STRANGER.key}
    file.write_text(f"ed25519 {SIGNER.key[:-1]}\n")
    with pytest.raises(FormatError, match="line 1 is not"):
        trust.trusted_keys(file)


@pytest.mark.skipif(os.name != "posix", reason="modes")
def test_files_that_others_reach_are_refused(tmp_path: Path) -> None:
    trusted, key = tmp_path / "keys", tmp_path / "key.pem"
    trust.trust(SIGNER.key, "", trusted)
    trusted.chmod(0o622)
    with pytest.raises(FormatError, match="others may write it"):
        trust.trusted_keys(trusted)
    public = trust.make_key(key)
    assert key.stat().st_mode & 0o777 == 0o600 and trust.load_signer(key).key == public
    key.chmod(0o644)
    with pytest.raises(MarkingError, match="can be read by others"):
        trust.load_signer(key)
    with pytest.raises(OutputError, match="is there already"):
        trust.make_key(key)
    with pytest.raises(MarkingError, match="is no Ed25519 key"):
        trust.load_signer(Path(os.environ["WANRT_KEYS"]) / "key.pem")


@pytest.fixture
def wanrt(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Runs `wanrt ARGS` inside this process, with no key trusted."""
    monkeypatch.chdir(tmp_path)
    for variable in ("XDG_CONFIG_HOME", "LOCALAPPDATA", "HOME"):
        monkeypatch.setenv(variable, str(tmp_path / "config"))

    def call(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(arg) for arg in args])
        return (exit_.value.code or 0, *capsys.readouterr())

    return call


def test_the_verbs(wanrt: Callable[..., tuple[int, str, str]]) -> None:
    write(Path("b"), by=None)
    write(Path("other.zip"), by=STRANGER)
    code, out, _ = wanrt("keys", "init", "--bundle", "mine.pem")
    key = out.strip().rpartition(" ")[2]
    assert code == 0 and out == f"mine.pem: signs bundles as {key}\n" and len(key) == 64
    assert wanrt("keys", "init", "--bundle", "x.pem", "--name", "me")[0] == 2
    assert wanrt("bundle", "verify", "b")[0] == 3
    assert wanrt("bundle", "sign", "b", "--key", "mine.pem")[1] == f"b: signed by {key}\n"

    code, out, err = wanrt("bundle", "verify", "b")
    assert (code, out) == (3, "") and f"verify b --trust {key}" in err and err.count("\n") == 1
    assert wanrt("bundle", "verify", "b", "--trust", STRANGER.key)[0] == 3
    assert wanrt("bundle", "verify", "b", "--trust", key[:12])[0] == 2
    assert not env.trusted_keys_file().exists()
    assert wanrt("bundle", "verify", "b", "--trust", key)[0] == 0
    code, out, _ = wanrt("bundle", "verify", "b")
    size = sum(map(len, CONTENTS.values()))
    assert (code, out) == (0, f"b: holds: 5 members, {size} bytes, signed by {key}\n")
    assert wanrt("bundle", "verify", "b", "--trust", STRANGER.key)[0] == 2
    assert wanrt("bundle", "verify", "other.zip")[0] == 3

    code, out, _ = wanrt(
        "bundle", "verify", "b", "--release", RELEASE, "--capability", "8.9", "--json"
    )
    assert code == 0
    assert json.loads(out) == {"path": "b", "key": key, "bytes": size, "state": "holds",
                               "fits": ["engines/block-ada.engine"]}  # fmt: skip
    assert wanrt("bundle", "verify", "b", "--release", RELEASE)[0] == 2
    assert wanrt("bundle", "verify", "b", "--release", RELEASE, "--capability", "9")[0] == 2
    code, _, err = wanrt("bundle", "verify", "b", "--release", RELEASE, "--capability", "12.0")
    assert code == 3 and "capability 12.0; there is: tensorrt-rtx 1.7.1.116 on 8.9; " in err

    code, out, _ = wanrt("bundle", "list", "other.zip")
    assert code == 0 and len(out.splitlines()) == 1 + len(CONTENTS)
    assert f"signed by {STRANGER.key}" in out and "block, tensorrt-rtx 1.7.1.116 on 8.6" in out
    shown = json.loads(wanrt("bundle", "list", "b", "--json")[1])
    assert shown["manifest"] == json.loads(canonical(manifest()))
    assert wanrt("bundle", "sign", "b", "--key", "other.zip")[0] == 6
    assert wanrt("bundle", "list", "none")[0] == 3
    shutil.rmtree("b/onnx")
    assert wanrt("bundle", "list", "b")[0] == 3
