"""The verbs about marks as they are used: what they print, and their exit codes."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from wanrt import cli, keys
from wanrt.media import provenance
from wanrt.media.marking import Origin
from wanrt.media.saving import save_video
from wanrt.media.video import probe_video, write_video
from wanrt.pipeline import Pipeline

T2V, I2V = "wan2.1-t2v-1.3b", "wan2.1-i2v-14b-480p"
CLIP = np.random.default_rng(0).integers(80, 176, (5, 96, 96, 3), dtype=np.uint8)


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def wanrt(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Outcome]:
    """Runs `wanrt ARGS` inside this process, in a folder with a few files."""
    monkeypatch.chdir(tmp_path)
    save_video(CLIP, "a.mp4", 16)
    write_video("plain.mp4", [CLIP], 16)
    Path("text.mp4").write_text("no video")
    changed = bytearray(Path("a.mp4").read_bytes())
    changed[changed.index(b"mdat") + 500] ^= 1
    Path("changed.mp4").write_bytes(changed)

    def call(*args: object) -> Outcome:
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(arg) for arg in args])
        return Outcome(exit_.value.code or 0, *capsys.readouterr())

    return call


@pytest.mark.parametrize(
    ("name", "code", "state", "text"),
    [
        ("a.mp4", 0, "marked", "signed by a private wanrt key, trusted here, and unchanged since"),
        ("plain.mp4", 1, "unmarked", "there is no C2PA manifest"),
        ("changed.mp4", 3, "tampered", "the C2PA manifest does not hold; assertion.bmffHash"),
        ("text.mp4", 3, "unreadable", "cannot be read as a video"),
    ],
)
def test_verify(name: str, code: int, state: str, text: str, wanrt: Callable[..., Outcome]) -> None:
    done = wanrt("verify", name)
    assert (done.code, done.err) == (code, "")
    assert done.out.startswith(f"{name}: {state}: ") and text in done.out
    done = wanrt("verify", name, "--json")
    found = json.loads(done.out)
    assert (done.code, found["state"], found["path"]) == (code, state, name)
    assert set(found["layers"]) == {"c2pa", "xmp", "watermark", "ledger"}
    mark = found["layers"]["watermark"]
    assert {"detected", "id", "score", "false_positive_probability"} <= set(mark)
    assert mark["detected"] == (name in ("a.mp4", "changed.mp4"))
    expected = {"marked": "trusted", "tampered": "invalid"}.get(state, "missing")
    assert found["layers"]["c2pa"]["state"] == expected


def test_verify_what_is_not_there(wanrt: Callable[..., Outcome]) -> None:
    assert wanrt("verify", "absent.mp4") == (3, "", "wanrt: absent.mp4: no such file\n")


def test_a_manifest_cannot_steer_the_terminal(wanrt: Callable[..., Outcome]) -> None:
    key = keys.load(Path(os.environ["WANRT_KEYS"]))
    statement = provenance.Statement(Origin(), "\x1b[31m\u202e\n1")
    provenance.sign(Path("plain.mp4"), Path("odd.mp4"), statement, key)
    done = wanrt("verify", "odd.mp4")
    assert done.code == 0 and r"wanrt \x1b[31m\u202e\n1" in done.out
    assert done.out.count("\n") == 4 and done.out.replace("\n", "").isprintable()


def test_mark_and_the_ledger(wanrt: Callable[..., Outcome]) -> None:
    done = wanrt("mark", "plain.mp4", "-o", "out.mp4", "--model", "x", "--ledger", "book.jsonl")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("out.mp4: marked: watermark ") and "XMP, signed" in done.out
    done = wanrt("mark", "plain.mp4", "-o", "out.mkv", "--ledger", "book.jsonl", "--json")
    saved = json.loads(done.out)
    assert (saved["path"], saved["sidecar"]) == ("out.mkv", "out.c2pa")
    assert probe_video("out.mkv").num_frames == 5
    done = wanrt("verify", "out.mkv", "--ledger", "book.jsonl")
    assert done.code == 0 and "match, sha256, line 2" in done.out
    done = wanrt("ledger", "verify", "book.jsonl")
    assert done.code == 0 and done.out.startswith("book.jsonl: 2 lines, every link holds; head ")
    chain = json.loads(wanrt("ledger", "verify", "book.jsonl", "--json").out)
    assert wanrt("ledger", "verify", "book.jsonl", "--head", chain["head"]).code == 0
    book = Path("book.jsonl")
    book.write_text(book.read_text().replace('"frames": 5', '"frames": 6', 1))
    done = wanrt("ledger", "verify", "book.jsonl")
    assert done.code == 3 and "line 1: was changed" in done.err
    done = wanrt("verify", "a.mp4", "--ledger", "book.jsonl")
    assert done.code == 3 and "line 1: was changed" in done.err


def test_mark_leaves_its_input_alone(wanrt: Callable[..., Outcome]) -> None:
    before = Path("plain.mp4").read_bytes()
    done = wanrt("mark", "plain.mp4", "-o", "plain.mp4", "-y")
    assert done.code == 2 and "is the input itself" in done.err
    assert wanrt("mark", "plain.mp4", "-o", "a.mp4").code == 5
    assert wanrt("mark", "text.mp4", "-o", "b.mp4").code == 3
    assert wanrt("mark", "plain.mp4", "-o", "b.mp4", "--key", "absent").code == 6
    assert Path("plain.mp4").read_bytes() == before and not Path("b.mp4").exists()


def test_keys_init_says_what_it_is_worth(wanrt: Callable[..., Outcome]) -> None:
    done = wanrt("keys", "init", "--key", "mine", "--name", "Studio Ä")
    assert done.code == 0 and "key.pem (mode 0600)" in done.out
    assert "does not tell strangers who you are" in done.out
    assert Path("mine/key.pem").stat().st_mode & 0o777 == 0o600
    assert wanrt("keys", "init", "--key", "mine").code == 5
    done = wanrt("mark", "plain.mp4", "-o", "b.mp4", "--key", "mine")
    assert done.code == 0
    done = wanrt("verify", "b.mp4", "--trust", "mine/root.pem")
    assert done.code == 0 and "signed by Studio Ä, trusted here" in done.out
    done = wanrt("verify", "b.mp4")
    assert done.code == 0 and "signed by Studio Ä, not known here" in done.out


SETTINGS = ("--size", "64x64", "--frames", "5", "--steps", "1", "--seed", "3", "--negative", "")


def test_generate_marks(zoo: Any, wanrt: Callable[..., Outcome]) -> None:
    call = ("generate", "a cat", "--model", zoo.path(T2V), *SETTINGS)
    done = wanrt(*call, "-o", "b.mp4", "--json", "--ledger", "book.jsonl", "--record-prompt")
    result = json.loads(done.out)
    found = json.loads(wanrt("verify", "b.mp4", "--json", "--ledger", "book.jsonl").out)
    assert found["state"] == "marked" and found["layers"]["ledger"]["by"] == "sha256"
    manifest = found["layers"]["c2pa"]
    assert manifest["label"] == result["provenance"]["manifest"]
    generation = manifest["generation"]
    assert generation["model"] == zoo.open(T2V).spec.title and generation["prompt"] == "a cat"
    done = wanrt(*call, "-o", "c.mp4", "--marking", "off")
    assert done.code == 0 and "; not marked" in done.out
    assert wanrt("verify", "c.mp4").code == 1


def test_what_nano_makes_passes(wanrt: Callable[..., Outcome]) -> None:
    """As `make demo`, with fewer frames and steps; and the same after a WebM of it."""
    prompt = "a red circle moving right on a navy background"
    done = wanrt("generate", prompt, "-o", "demo.mp4", "--frames", 9, "--steps", 8, "--seed", 1)
    assert done.code == 0, done.err
    found = json.loads(wanrt("verify", "demo.mp4", "--json").out)
    mark = found["layers"]["watermark"]
    assert found["state"] == "marked" and mark["detected"]
    assert found["layers"]["c2pa"]["watermark"] == {"algorithm": "org.wanrt.ss.1", "id": mark["id"]}
    assert wanrt("mark", "demo.mp4", "-o", "demo.webm").code == 0
    found = json.loads(wanrt("verify", "demo.webm", "--json").out)
    assert found["state"] == "marked" and found["layers"]["watermark"]["id"] == mark["id"]


def test_a_missing_key_is_found_before_any_work(
    zoo: Any, wanrt: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pipeline, "load", None)
    done = wanrt("generate", "a cat", "-o", "b.mp4", "--key", "absent")
    assert (done.code, done.out) == (6, "") and "no folder of keys at absent" in done.err
    done = wanrt("generate", "a cat", "-o", "b.webm")
    assert done.code == 2 and "b.webm cannot hold h264" in done.err


def test_a_picture_that_became_a_video(zoo: Any, wanrt: Callable[..., Outcome], files: Any) -> None:
    """The source type is the composite one, and the picture is an ingredient."""
    shutil.copy(files["a.png"], "jane.png")
    call = ("generate", "x", "--model", zoo.path(I2V), "--image", "jane.png", *SETTINGS)
    done = wanrt(*call, "-o", "b.mp4")
    assert done.code == 0, done.err
    manifest = json.loads(wanrt("verify", "b.mp4", "--json").out)["layers"]["c2pa"]
    assert manifest["source_type"].endswith("/compositeWithTrainedAlgorithmicMedia")
    assert manifest["ingredients"] == 1 and manifest["generation"]["inputs"] == ["image"]
    assert b"jane" not in Path("b.mp4").read_bytes()


def test_a_video_of_the_pipeline_knows_its_origin(zoo: Any, tmp_path: Path) -> None:
    pipe = zoo.open(T2V)
    video = pipe.generate(
        "a cat", width=64, height=64, num_frames=5, num_steps=1, seed=1, negative=""
    )
    assert (video.provenance.model, video.provenance.task) == (pipe.spec.title, "t2v")
    assert video.save(tmp_path / "a.mp4") == tmp_path / "a.mp4"
    assert b"a cat" not in (tmp_path / "a.mp4").read_bytes()
