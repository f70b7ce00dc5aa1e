"""When marking fails: never an unmarked file under the final name, never a destroyed one."""

import errno
import http.server
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa

from wanrt import keys
from wanrt.errors import MarkingError, OutputError, UsageError, WanrtError
from wanrt.media import ledger, mark, provenance, saving, xmp
from wanrt.media.marking import Input, Marking, Origin
from wanrt.media.output import PendingFile
from wanrt.media.saving import Marker, save_video
from wanrt.media.verification import verify
from wanrt.media.video import VideoWriter

CLIP = np.random.default_rng(0).integers(80, 176, (3, 96, 96, 3), dtype=np.uint8)


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """A ledger of the test's own."""
    return tmp_path / "books" / "ledger.jsonl"


def left_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def full(*args: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def bad(*args: object, **options: object) -> None:
    raise MarkingError("it broke")


STEPS: dict[str, tuple[object, str, Callable[..., None]]] = {
    "XMP, full disk": (xmp, "embed", full),
    "XMP, lost": (xmp, "read", lambda path: None),
    "signing, full disk": (provenance, "sign", full),
    "signing": (provenance, "sign", bad),
    "reading back": (provenance, "read", bad),
    "fsync": (os, "fsync", full),
    "rename": (os, "replace", full),
}


@pytest.mark.parametrize(
    ("step", "suffix"),
    [
        (step, end)
        for step in STEPS
        for end in (".mp4", ".png", ".mkv")[: 2 if "XMP" in step else 3]
    ],
)
def test_a_failing_step_leaves_nothing(
    step: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = tmp_path / "out"
    where.mkdir()
    (where / f"there{suffix}").write_text("precious")
    (where / "there.c2pa").write_text("precious too")
    before = left_in(where)
    marker = Marker()
    monkeypatch.setattr(*STEPS[step])
    frames = CLIP[:1] if suffix == ".png" else CLIP
    for name in ("there", "new"):
        with pytest.raises((MarkingError, OutputError)) as caught:
            marker.save(frames, where / f"{name}{suffix}", 16, overwrite=True)
        assert caught.value.exit_code in (5, 6) and "\n" not in str(caught.value)
    monkeypatch.undo()
    assert left_in(where) == before
    assert (where / f"there{suffix}").read_text() == "precious"
    assert (where / "there.c2pa").read_text() == "precious too"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with 4 MiB of room."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


STAGES: dict[str, tuple[object, str]] = {
    "encoding": (VideoWriter, "append"),
    "XMP": (xmp, "embed"),
    "signing": (provenance, "sign"),
    "commit": (PendingFile, "commit"),
}


@pytest.mark.parametrize("room", [0, 4096, 12288])
@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_that_fills_up(
    stage: str, room: int, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real one: somebody else takes the space between two steps, all of it or nearly."""
    owner, name = STAGES[stage]
    real: Callable[..., Any] = getattr(owner, name)

    def after_filling(*args: Any, **options: Any) -> Any:
        free = shutil.disk_usage(small_disk).free
        with (small_disk / "ballast").open("ab") as file:
            file.write(bytes(max(0, free - room)))
        return real(*args, **options)

    marker = Marker()
    monkeypatch.setattr(owner, name, after_filling)
    try:
        marker.save(CLIP, small_disk / "a.mp4", 16)
    except WanrtError as error:
        assert error.exit_code in (5, 6) and "no space" in str(error).lower(), error
        assert left_in(small_disk) == ["ballast"]
    else:  # there was room enough for what was left to do
        assert stage == "commit" or room == 12288, stage
        assert verify(small_disk / "a.mp4").state == "marked"


def test_a_full_disk_of_the_ledger(small_disk: Path, tmp_path: Path) -> None:
    """The file is complete and marked when its line is to be written; the error says so."""
    book = small_disk / "ledger.jsonl"
    marker = Marker(Marking(ledger=book))
    marker.save(CLIP, tmp_path / "a.mp4", 16)
    with (small_disk / "ballast").open("wb") as file:
        file.write(bytes(shutil.disk_usage(small_disk).free))
    head = ledger.verify(book)
    with pytest.raises(MarkingError, match="b.mp4 is written and marked, but: .*ledger") as caught:
        for _ in range(20):  # the ledger's last page takes a few
            marker.save(CLIP, tmp_path / "b.mp4", 16, overwrite=True)
            head = ledger.verify(book)
    assert caught.value.exit_code == 6
    assert ledger.verify(book) == head and verify(tmp_path / "b.mp4").state == "marked"


def make_key(folder: Path, private: Any, **changes: bytes) -> Path:
    """A folder with this private key, a certificate for it and a root; `changes` replace files."""
    root_key = ec.generate_private_key(ec.SECP256R1())
    issuer, subject = keys._name("studio", "root"), keys._name("studio", "signer")
    root = keys._certificate(issuer, issuer, root_key.public_key(), root_key, is_root=True)
    leaf = keys._certificate(subject, issuer, private.public_key(), root_key, is_root=False)
    chain = [certificate.public_bytes(pem.Encoding.PEM) for certificate in (leaf, root)]
    secret = private.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption())
    files = {keys.KEY: secret, keys.CHAIN: b"".join(chain), keys.ROOT: chain[1]}
    folder.mkdir()
    for name, content in {**files, **{f"{k}.pem": v for k, v in changes.items()}}.items():
        (folder / name).write_bytes(content)
        (folder / name).chmod(0o600)
    return folder


CURVE = ec.generate_private_key(ec.SECP256R1())
LOCKED = CURVE.private_bytes(
    pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.BestAvailableEncryption(b"x")
)


def lose(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


BAD_KEYS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda folder: shutil.rmtree(folder), "no folder of keys at"),
    "no key": (lose("key.pem"), "cannot read .*key.pem: .*No such file"),
    "no chain": (lose("chain.pem"), "cannot read .*chain.pem: .*No such file"),
    "world-readable": (lambda folder: (folder / "key.pem").chmod(0o644), "mode 0644.*chmod 600"),
    "group-readable": (lambda folder: (folder / "key.pem").chmod(0o640), "mode 0640"),
    "garbage": (lambda folder: (folder / "key.pem").write_text("x"), "not a private key in PEM"),
    "locked": (lambda folder: (folder / "key.pem").write_bytes(LOCKED), "is encrypted"),
    "another key": (
        lambda folder: (folder / "key.pem").write_bytes(
            ec.generate_private_key(ec.SECP256R1()).private_bytes(
                pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption()
            )
        ),
        "does not belong to the first certificate",
    ),
    "no certificates": (lambda folder: (folder / "chain.pem").write_text("x"), "no certificates"),
    "a key of another kind": (
        lambda folder: (folder / "key.pem").write_bytes(
            dsa.generate_private_key(1024).private_bytes(
                pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption()
            )
        ),
        "DSAPrivateKey; take P-256, RSA or Ed25519",
    ),
    "a curve of another kind": (
        lambda folder: (folder / "key.pem").write_bytes(
            ec.generate_private_key(ec.SECP256K1()).private_bytes(
                pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption()
            )
        ),
        "does not belong",
    ),
}


@pytest.mark.parametrize("what", BAD_KEYS)
def test_a_key_that_cannot_sign(what: str, tmp_path: Path) -> None:
    spoil, reason = BAD_KEYS[what]
    folder = make_key(tmp_path / "keys", CURVE)
    spoil(folder)
    with pytest.raises(MarkingError, match=reason) as caught:
        save_video(CLIP, tmp_path / "a.mp4", 16, marking=Marking(key=folder))
    assert caught.value.exit_code == 6 and not list(tmp_path.glob("*.mp4"))


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("LIFETIME", -timedelta(hours=1), "has expired .get a new one"),
        ("MAX_CLOCK_SKEW", -timedelta(hours=1), "is not valid yet .is the clock"),
    ],
)
def test_time_is_not_right(
    setting: str, value: timedelta, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, setting, value)
    keys.init(tmp_path / "keys")
    with pytest.raises(MarkingError, match=reason):
        Marker(Marking(key=tmp_path / "keys"))


PRIVATE: dict[str, Callable[[], Any]] = {
    "es256": lambda: CURVE,
    "es384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "es512": lambda: ec.generate_private_key(ec.SECP521R1()),
    "ps256": lambda: rsa.generate_private_key(65537, 2048),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
}


@pytest.mark.parametrize("algorithm", PRIVATE)
def test_a_chain_of_the_customer(algorithm: str, tmp_path: Path) -> None:
    folder = make_key(tmp_path / "keys", PRIVATE[algorithm]())
    assert keys.load(folder).algorithm == algorithm
    save_video(CLIP, tmp_path / "a.mp4", 16, marking=Marking(key=folder))
    found = verify(tmp_path / "a.mp4", trust=folder / "root.pem").layers.c2pa
    assert (found.state, found.signer) == ("trusted", "studio")


def test_a_signer_of_ones_own(tmp_path: Path) -> None:
    """As an HSM would be: wanrt sees certificates and signatures, no key."""
    held = keys.load(make_key(tmp_path / "keys", CURVE))
    calls: list[int] = []

    def sign(data: bytes) -> bytes:
        calls.append(len(data))
        return held.sign(data)

    key = keys.SigningKey("es256", held.chain, sign)
    save_video(CLIP, tmp_path / "a.mp4", 16, marking=Marking(key=key))
    assert calls and verify(tmp_path / "a.mp4").layers.c2pa.signer == "studio"

    def unplugged(data: bytes) -> bytes:
        raise ConnectionError("the HSM does not answer")

    wrong = lambda data: bytes(64)  # noqa: E731
    for fault, reason in ((unplugged, "HSM does not answer"), (wrong, "reads back as invalid")):
        marking = Marking(key=keys.SigningKey("es256", held.chain, fault))
        with pytest.raises(MarkingError, match=reason):
            save_video(CLIP, tmp_path / "b.mp4", 16, marking=marking)
    assert not (tmp_path / "b.mp4").exists()


def test_c2pa_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.raises(MarkingError, match="C2PA library cannot be loaded.*pip install"):
        save_video(CLIP, tmp_path / "a.mp4", 16)
    assert not list(tmp_path.iterdir())


def test_best_effort_goes_on_and_says_so(
    tmp_path: Path, book: Path, caplog: pytest.LogCaptureFixture
) -> None:
    marking = Marking("best-effort", tmp_path / "absent", ledger=book)
    saved = save_video(CLIP, tmp_path / "a.mp4", 16, marking=marking)
    assert saved.manifest is None and saved.xmp and "no folder of keys" in saved.missing[0]
    assert "marking, key: there is no folder of keys" in caplog.text
    found = verify(tmp_path / "a.mp4")
    assert (found.state, found.layers.c2pa.state) == ("marked", "missing")
    (entry,) = ledger.entries(book)
    assert entry.record["marking"] == "best-effort" and entry.record["missing"] == [*saved.missing]
    assert entry.record["event"] == "saved"


def test_each_result_has_its_own_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = Marker(Marking("best-effort"))
    with monkeypatch.context() as patch:
        patch.setattr(provenance, "sign", bad)
        assert marker.save(CLIP, tmp_path / "a.mp4", 16).missing == ("C2PA: it broke",)
    assert marker.save(CLIP, tmp_path / "b.mp4", 16).missing == ()


def test_off_is_a_choice_that_is_recorded(
    tmp_path: Path, book: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = save_video(CLIP, tmp_path / "a.mp4", 16, marking=Marking("off", ledger=book))
    assert "marking is off" in caplog.text
    assert (saved.watermark, saved.xmp, saved.manifest) == (None, False, None)
    assert verify(tmp_path / "a.mp4").state == "unmarked"
    (entry,) = ledger.entries(book)
    assert (entry.record["event"], entry.record["sha256"]) == ("saved unmarked", saved.sha256)
    with pytest.raises(UsageError, match="marking 'none' does not exist"):
        Marking("none")  # type: ignore[arg-type]


@pytest.fixture
def tsa(tmp_path: Path) -> Iterator[str]:
    """A time stamping authority (RFC 3161): OpenSSL's, behind HTTP, under the tests' own root."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl")
    folder = tmp_path / "tsa"
    folder.mkdir()
    write_tsa(folder)

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = self.rfile.read(int(self.headers["content-length"]))
            (folder / "query").write_bytes(query)
            command = "openssl ts -reply -config tsa.cnf -queryfile query -out reply"
            subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
            self.send_response(200)
            self.send_header("content-type", "application/timestamp-reply")
            self.end_headers()
            self.wfile.write((folder / "reply").read_bytes())

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def write_tsa(folder: Path) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import ExtendedKeyUsageOID

    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    issuer, subject = keys._name("tsa", "root"), keys._name("tsa", "stamps")
    root = keys._certificate(issuer, issuer, root_key.public_key(), root_key, is_root=True)
    plain = keys._certificate(subject, issuer, key.public_key(), root_key, is_root=False)
    builder = x509.CertificateBuilder(
        issuer, subject, key.public_key(), 5, plain.not_valid_before_utc, plain.not_valid_after_utc
    )
    for extension in plain.extensions:
        if not isinstance(extension.value, x509.ExtendedKeyUsage):
            builder = builder.add_extension(extension.value, extension.critical)
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.TIME_STAMPING])
    leaf = builder.add_extension(usage, critical=True).sign(root_key, hashes.SHA256())
    (folder / "leaf.pem").write_bytes(leaf.public_bytes(pem.Encoding.PEM))
    (folder / "root.pem").write_bytes(root.public_bytes(pem.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption())
    )
    (folder / "tsa.cnf").write_text(
        "[tsa]\ndefault_tsa=t\n[t]\nserial=serial\nsigner_cert=leaf.pem\nsigner_key=key.pem\n"
        "certs=root.pem\nsigner_digest=sha256\ndefault_policy=1.2.3.4\ndigests=sha256\n"
        "ess_cert_id_alg=sha256\n"
    )


def test_a_time_stamp_outlives_the_certificate(
    tsa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an authority whose root is trusted; without a stamp the signature ends with its time."""
    monkeypatch.setattr(keys, "LIFETIME", timedelta(seconds=3))
    keys.init(tmp_path / "keys")
    for name, marking in (
        ("a", Marking(tsa=tsa, key=tmp_path / "keys")),
        ("b", Marking(key=tmp_path / "keys")),
    ):
        save_video(CLIP, tmp_path / f"{name}.mp4", 16, marking=marking)
    roots = [tmp_path / "keys" / "root.pem", tmp_path / "tsa" / "root.pem"]
    (tmp_path / "roots.pem").write_text("".join(root.read_text() for root in roots))
    fresh = [verify(tmp_path / "a.mp4", trust=roots[0]).layers.c2pa]
    fresh += [verify(tmp_path / "a.mp4", trust=tmp_path / "roots.pem").layers.c2pa]
    assert all(one.state == "trusted" and one.time is not None for one in fresh)
    assert [one.time_trusted for one in fresh] == [False, True]
    time.sleep(4)
    assert verify(tmp_path / "a.mp4", trust=tmp_path / "roots.pem").state == "marked"
    for name, trust in (("a.mp4", roots[0]), ("b.mp4", tmp_path / "roots.pem")):
        found = verify(tmp_path / name, trust=trust)
        assert (found.state, found.exit_code, found.layers.c2pa.state) == ("invalid", 3, "invalid")
        assert any("signingCredential.expired" in reason for reason in found.reasons)
    with pytest.raises(UsageError, match="no http.s. address"):
        Marking(tsa="ftp://example.org")


def test_no_time_stamp_to_be_had(tmp_path: Path, book: Path) -> None:
    down = "http://127.0.0.1:9/"
    with pytest.raises(MarkingError, match="time stamp: .*no time stamp from http://127.0.0.1:9/"):
        save_video(CLIP, tmp_path / "a.mp4", 16, marking=Marking(tsa=down, ledger=book))
    assert not list(tmp_path.glob("*.mp4")) and list(ledger.entries(book)) == []
    marking = Marking("best-effort", tsa=down, ledger=book)
    saved = save_video(CLIP, tmp_path / "a.mp4", 16, marking=marking)
    assert verify(tmp_path / "a.mp4").layers.c2pa.state == "trusted"
    assert saved.missing[0].startswith("time stamp: ")


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home in which wanrt has never been; gives where its key will lie."""
    monkeypatch.delenv("WANRT_KEYS")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(sys, "platform", "linux")
    return tmp_path / "config" / "wanrt" / "keys"


def test_the_first_mark_makes_a_key_and_says_so_once(
    fresh: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.mp4", "b.mp4"):
        save_video(CLIP, tmp_path / name, 16)
        assert verify(tmp_path / name).layers.c2pa.state == "trusted"
    assert caplog.text.count("made a signing key of its own in") == 1
    assert {file.name: file.stat().st_mode & 0o777 for file in fresh.iterdir()} == dict.fromkeys(
        ("key.pem", "chain.pem", "root.pem"), 0o600
    )
    assert fresh.stat().st_mode & 0o777 == 0o700
    assert left_in(fresh.parent) == ["keys"]
    with pytest.raises(OutputError, match="holds something already"):
        keys.init(fresh)


def test_no_key_is_made_where_one_was_named(tmp_path: Path) -> None:
    with pytest.raises(MarkingError, match="`wanrt keys init --key .*absent` makes one"):
        Marker(Marking(key=tmp_path / "absent"))
    assert not list(tmp_path.iterdir())


def test_a_key_that_cannot_be_made(fresh: Path, tmp_path: Path) -> None:
    (tmp_path / "config").write_text("a file where a folder should be")
    with pytest.raises(MarkingError, match="no signing key: cannot write keys to") as caught:
        save_video(CLIP, tmp_path / "a.mp4", 16)
    assert caught.value.exit_code == 6 and not (tmp_path / "a.mp4").exists()


KILLED = """
import os, signal, sys
import numpy as np
from wanrt.media import {module}
from wanrt.media.saving import save_video
from wanrt.media.video import VideoWriter

def die(*args, **options):
    if "{when}" == "after":
        real(*args, **options)
    os.kill(os.getpid(), signal.SIGKILL)

owner = {owner}
real = owner.{name}
owner.{name} = die
clip = np.random.default_rng(0).integers(80, 176, (3, 96, 96, 3), dtype=np.uint8)
save_video(clip, sys.argv[1], 16, overwrite=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize(
    ("module", "owner", "name", "when", "appears"),
    [
        ("xmp", "xmp", "embed", "before", False),
        ("provenance", "provenance", "sign", "before", False),
        ("provenance", "provenance", "sign", "after", False),
        ("ledger", "ledger", "append", "before", True),
    ],
)
def test_killed_between_two_steps(
    module: str, owner: str, name: str, when: str, appears: bool, tmp_path: Path
) -> None:
    script = KILLED.format(module=module, owner=owner, name=name, when=when)
    path = tmp_path / "a.mp4"
    path.write_text("precious")
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    if appears:
        assert verify(path).state == "marked"
    else:
        assert path.read_text() == "precious"
        assert all(file == path or file.name.startswith(".wanrt-") for file in tmp_path.iterdir())


def test_an_input_that_is_gone(tmp_path: Path) -> None:
    origin = Origin("m", "i2v", (Input("image", tmp_path / "gone.png"),))
    with pytest.raises(MarkingError, match="C2PA.*No such file"):
        save_video(CLIP, tmp_path / "a.mp4", 16, origin=origin)
    assert not list(tmp_path.iterdir())


def test_small_and_flat_frames_say_that_they_carry_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, frames in enumerate((CLIP[:, :48, :48], np.zeros_like(CLIP))):
        saved = save_video(frames, tmp_path / f"{number}.mp4", 16)
        assert saved.watermark is None and mark.NOT_CARRIED in caplog.text
        found = verify(saved.path)
        assert found.state == "marked" and not found.layers.watermark.detected
        assert found.layers.c2pa.generation["watermark"] == mark.NOT_CARRIED
        assert found.layers.c2pa.watermark is None
        caplog.clear()


def test_results_are_written_through_saving_alone() -> None:
    """Nothing else in the runtime may call what encodes without marking."""
    root = Path(saving.__file__).parents[1]
    callers = {
        file.relative_to(root).as_posix()
        for file in root.rglob("*.py")
        if {"write_video(", "save_png(", "VideoWriter("} & set(words(file))
    }
    assert callers == {"media/image.py", "media/saving.py", "media/video.py"}


def words(file: Path) -> list[str]:
    import re

    return re.findall(r"\w+\(", file.read_text("utf-8"))
