"""Marked files: what they say, that a change is noticed, what a copy without marks still tells."""

import io
import json
import os
import re
import shutil
import subprocess
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import c2pa
import numpy as np
import pytest
from PIL import Image

import wanrt
from wanrt import keys
from wanrt.errors import FormatError, UsageError
from wanrt.media import ledger, provenance, watermark, xmp
from wanrt.media.manifest import SoftBinding
from wanrt.media.mark_file import mark_file
from wanrt.media.marking import COMPOSITE, GENERATED, Input, Marking, Origin
from wanrt.media.saving import save_video
from wanrt.media.verification import verify
from wanrt.media.video import probe_video, write_video

C2PA_BOX = bytes.fromhex("d8fec3d61b0e483c92975828877ec481")


def frames(count: int = 9) -> np.ndarray:
    """uint8 `[n, 256, 256, 3]`: clouds that drift, in which a watermark finds room."""
    coarse = np.random.default_rng(0).integers(90, 166, (count + 8, 8, 3), np.uint8)
    wide = np.asarray(Image.fromarray(coarse).resize((256, (count + 8) * 32), 3))
    return np.stack([wide[8 * i : 8 * i + 256] for i in range(count)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One marked file of each kind, and an unmarked one."""
    made = tmp_path_factory.mktemp("marked")
    for name in ("a.mp4", "b.webm", "c.mkv"):
        codec = "av1" if name == "b.webm" else "h264"
        save_video(frames(), made / name, 16, codec=codec, origin=Origin("wanrt test", "t2v"))
    save_video(frames(1), made / "d.png")
    write_video(made / "plain.mp4", [frames()], 16)
    return made


@pytest.mark.parametrize("name", ["a.mp4", "b.webm", "c.mkv", "d.png"])
def test_every_kind_of_file_is_marked(name: str, folder: Path) -> None:
    found = verify(folder / name)
    layers = found.layers
    assert (found.state, found.exit_code) == ("marked", 0)
    assert layers.c2pa.state == "trusted" and layers.c2pa.reasons == ()
    assert layers.c2pa.source_type == GENERATED
    assert layers.c2pa.sidecar == (name in ("b.webm", "c.mkv"))
    assert layers.xmp.state == ("missing" if layers.c2pa.sidecar else "valid")
    assert layers.watermark.detected
    assert layers.c2pa.watermark == SoftBinding(watermark.NAME, layers.watermark.id)
    assert layers.watermark.false_positive_probability < 1e-4


def test_an_unmarked_file_is_said_to_be(folder: Path) -> None:
    found = verify(folder / "plain.mp4")
    assert (found.state, found.exit_code) == ("unmarked", 1)
    states = (found.layers.c2pa.state, found.layers.xmp.state, found.layers.watermark.detected)
    assert states == ("missing", "missing", False)


def test_the_manifest_says_what_and_nothing_more(folder: Path) -> None:
    """c2pa's own reader, without our root: valid, from somebody unknown."""
    reader = c2pa.Reader(str(folder / "a.mp4"))
    assert reader.get_validation_state() == "Valid"
    (failure,) = reader.get_validation_results()["activeManifest"]["failure"]
    assert failure["code"] == "signingCredential.untrusted"
    manifest = reader.get_active_manifest()
    by_label = {row["label"]: row["data"] for row in manifest["assertions"]}
    created, bound = by_label["c2pa.actions.v2"]["actions"]
    assert created["action"] == "c2pa.created" and created["digitalSourceType"] == GENERATED
    assert bound["action"] == "c2pa.watermarked.bound"
    assert by_label["c2pa.soft-binding"]["alg"] == "org.wanrt.ss.1"
    generation = by_label["org.wanrt.generation"]
    assert generation["model"] == "wanrt test" and generation["task"] == "t2v"
    assert set(generation) == {"model", "task", "wanrt", "marking"}
    assert "title" not in manifest and "thumbnail" not in manifest


def test_trusted_with_our_root(folder: Path) -> None:
    root = Path(os.environ["WANRT_KEYS"], "root.pem")
    settings = {"trust": {"trust_anchors": root.read_text()}, "verify": {"verify_trust": True}}
    reader = c2pa.Reader(str(folder / "a.mp4"), context=c2pa.Context.from_dict(settings))
    assert reader.get_validation_state() == "Trusted"
    assert verify(folder / "a.mp4", trust=root).layers.c2pa.state == "trusted"


def test_a_stranger_finds_it_valid(folder: Path, tmp_path: Path) -> None:
    keys.init(tmp_path / "others")
    found = verify(folder / "a.mp4", trust=tmp_path / "others" / "root.pem")
    assert (found.state, found.layers.c2pa.state) == ("marked", "valid")
    assert any("untrusted" in reason for reason in found.layers.c2pa.reasons)
    with pytest.raises(UsageError, match="holds no certificates"):
        verify(folder / "a.mp4", trust=tmp_path / "others" / "key.pem")


def flip(where: bytes, offset: int, bit: int = 0) -> Callable[[bytearray], bytearray]:
    def change(data: bytearray) -> bytearray:
        data[data.index(where) + offset] ^= 1 << bit
        return data

    return change


TAMPERED = {
    "media data": ("a.mp4", flip(b"mdat", 700), "bmffHash.mismatch"),
    "index": ("a.mp4", flip(b"stsz", 30), "bmffHash.mismatch"),
    "XMP": ("a.mp4", flip(b'trainedAlgorithmicMedia"\n', 3), "bmffHash.mismatch"),
    "a claim in the manifest": ("a.mp4", flip(b"wanrt test", 2), "mismatch"),
    "the signature": ("a.mp4", flip(b"c2pa.signature", 400), ""),
    "a box at the end": ("a.mp4", lambda data: data + b"\0\0\0\x10abcd12345678", "bmffHash"),
    "cut off": ("a.mp4", lambda data: data[: len(data) * 2 // 3], "bmffHash"),
    "cut off early": ("a.mp4", lambda data: data[:3000], "beyond asset bounds"),
    "pixels of a PNG": ("d.png", flip(b"IDAT", 5000), "dataHash.mismatch"),
    "chunk after the end": ("d.png", lambda data: data + b"more", "dataHash.mismatch"),
    "WebM": ("b.webm", lambda data: data[:-1] + bytes([data[-1] ^ 1]), "dataHash.mismatch"),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_change_is_noticed(what: str, folder: Path, tmp_path: Path) -> None:
    name, change, reason = TAMPERED[what]
    path = tmp_path / name
    path.write_bytes(change(bytearray((folder / name).read_bytes())))
    if name == "b.webm":
        shutil.copy(folder / "b.c2pa", tmp_path)
    found = verify(path)
    assert (found.state, found.exit_code, found.layers.c2pa.state) == ("tampered", 3, "invalid")
    assert any(reason in row for row in found.layers.c2pa.reasons), found


def test_bits_of_the_manifest(folder: Path, tmp_path: Path) -> None:
    """One bit in 60 places of the manifest: noticed, or it says the same as before.

    The latter are lengths and flags of boxes that readers pass over, and the zeros at its end. A
    damaged label makes the manifest vanish.
    """
    data = (folder / "a.mp4").read_bytes()
    root = Path(os.environ["WANRT_KEYS"], "root.pem").read_text()
    whole = provenance.read(folder / "a.mp4", root)
    start, end = data.index(C2PA_BOX), data.index(b"cpadY")  # of the signature's padding
    path, states = tmp_path / "a.mp4", []
    for place in range(start + 40, end, (end - start) // 60):
        changed = bytearray(data)
        changed[place] ^= 1
        path.write_bytes(changed)
        found = provenance.read(path, root)
        assert found.state in ("invalid", "missing") or found == whole, (place - start, found)
        states.append(found.state)
    assert states.count("invalid") > 50


def remux(source: Path, target: Path) -> Path:
    """Packets as they are, in a new file."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        copy = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(old.streams.video[0]):
            if packet.dts is not None:
                packet.stream = copy
                new.mux(packet)
    return target


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_a_remux_keeps_the_watermark_alone(suffix: str, folder: Path, tmp_path: Path) -> None:
    found = verify(remux(folder / "a.mp4", tmp_path / f"copy{suffix}"))
    assert (found.state, found.exit_code) == ("marked", 0)
    assert (found.layers.c2pa.state, found.layers.xmp.state) == ("missing", "missing")
    assert found.layers.watermark.id == verify(folder / "a.mp4").layers.watermark.id
    assert "no C2PA manifest" in found.reasons[0] and "watermark" in found.reasons[1]


def test_a_manifest_of_another_clip_contradicts(folder: Path, tmp_path: Path) -> None:
    """Frames with one watermark, signed (by somebody who may) as if they had another."""
    key = keys.load(Path(os.environ["WANRT_KEYS"]))
    source = remux(folder / "a.mp4", tmp_path / "copy.mp4")
    statement = provenance.Statement(Origin(), "0", SoftBinding(watermark.NAME, "00000000"))
    provenance.sign(source, tmp_path / "lie.mp4", statement, key)
    found = verify(tmp_path / "lie.mp4")
    assert (found.state, found.exit_code) == ("contradiction", 3)
    assert "bound to watermark 00000000" in found.reasons[0]


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_the_mark_of_an_input_does_not_contradict_the_manifest(
    share: float, tmp_path: Path
) -> None:
    """A result whose frames still carry its input's mark: its own is read and bound."""
    given = older(share, 0x01234567)
    saved = save_video(given, tmp_path / "a.mp4", 16, origin=Origin("m", "vace"))
    assert saved.watermark is not None
    found = verify(saved.path)
    assert (found.state, found.layers.watermark.id) == ("marked", saved.watermark)


def test_a_stronger_mark_of_an_input_does_not_contradict_the_manifest(tmp_path: Path) -> None:
    """Signed as bound to the newer mark, where the older one is what is read first."""
    newer = watermark.Watermark(0xC0FFEE42, 256, 256).apply(older(1.6, 0x01234567))
    key = keys.load(Path(os.environ["WANRT_KEYS"]))
    source = write_video(tmp_path / "source.mp4", [newer], 16)
    assert verify(source).layers.watermark.id == "01234567"
    statement = provenance.Statement(Origin(), "0", SoftBinding(watermark.NAME, "c0ffee42"))
    provenance.sign(source, tmp_path / "signed.mp4", statement, key)
    found = verify(tmp_path / "signed.mp4")
    mark = found.layers.watermark
    assert (found.state, mark.id, mark.other) == ("marked", "c0ffee42", "01234567")
    assert any("beside 01234567" in reason for reason in found.reasons)
    again = mark_file(tmp_path / "signed.mp4", tmp_path / "again.mp4")
    assert verify(again.path).state == "marked" and again.watermark == "c0ffee42"


def test_a_result_that_an_input_outshouts_is_not_said_to_carry_a_mark_of_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved = save_video(older(2.0, 0x01234567), tmp_path / "a.mp4", 16)
    assert saved.watermark is None and "carry another already" in caplog.text
    found = verify(saved.path)
    assert (found.state, found.layers.watermark.id) == ("marked", "01234567")
    assert found.layers.c2pa.watermark is None


def older(share: float, identifier: int) -> np.ndarray:
    """Frames in which `share` of the strength of a mark is left."""
    plain = frames()
    change = watermark.Watermark(identifier, 256, 256).apply(plain).astype(float) - plain
    return (plain + share * change).round().clip(0, 255).astype(np.uint8)


def test_xmp_that_says_camera_contradicts(folder: Path, tmp_path: Path) -> None:
    copy = remux(folder / "a.mp4", tmp_path / "copy.mp4")
    camera = "http://cv.iptc.org/newscodes/digitalsourcetype/digitalCapture"
    xmp.embed(copy, camera, "a camera")
    found = verify(copy)
    assert (found.state, found.layers.xmp.state) == ("contradiction", "other source")
    shutil.copy(folder / "plain.mp4", tmp_path / "plain.mp4")
    xmp.embed(tmp_path / "plain.mp4", camera, "a camera")
    assert verify(tmp_path / "plain.mp4").state == "unmarked"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.mp4", b""),
        ("text.mp4", b"not a video"),
        ("text.png", b"not a picture"),
        ("head.mp4", b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom\0\0\xff\xffmoov"),
        ("broken.png", b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR"),
        ("noise.webm", bytes(range(256)) * 40),
        ("noise", bytes(range(256))),
    ],
)
def test_an_unreadable_file_is_said_to_be(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    found = verify(tmp_path / name)
    assert (found.state, found.exit_code) == ("unreadable", 3) and found.reasons[0]


def test_what_is_no_file(tmp_path: Path) -> None:
    for path, reason in ((tmp_path, "is a folder"), (tmp_path / "x.mp4", "no such file")):
        with pytest.raises(FormatError, match=reason):
            verify(path)


def test_verify_fetches_nothing(folder: Path, tmp_path: Path) -> None:
    """XMP may name a manifest elsewhere; a reader that follows it tells who looks at what."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/m.c2pa"
        packet = xmp._PACKET.replace(
            "xmp:CreatorTool={tool}",
            f'xmlns:dcterms="http://purl.org/dc/terms/" dcterms:provenance="{address}"',
        ).format(source=f'"{GENERATED}"')
        path = tmp_path / "a.png"
        data = xmp._png_with(png(), packet.encode())
        path.write_bytes(data)
        assert verify(path).layers.xmp.state == "valid"
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.accept()


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frames(1)[0]).save(buffer, "PNG")
    return buffer.getvalue()


def mp4_boxes(data: bytes) -> dict[bytes, bytes]:
    """Kind -> body of the last box of that kind, by our own reading of ISO 14496-12, 4.2."""
    boxes, position = {}, 0
    while position < len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        kind, start = data[position + 4 : position + 8], position + 8
        if size == 1:
            size, start = int.from_bytes(data[start : start + 8], "big"), start + 8
        assert size >= start - position and position + size <= len(data), (kind, size)
        boxes[kind] = data[start : position + size]
        position += size
    return boxes


def test_the_bytes_of_the_xmp(folder: Path) -> None:
    stated = f'Iptc4xmpExt:DigitalSourceType="{GENERATED}"'.encode()
    body = mp4_boxes((folder / "a.mp4").read_bytes())[b"uuid"]
    assert body[:16].hex() == "be7acfcb97a942e89c71999491e3afac" and stated in body
    data = (folder / "d.png").read_bytes()
    place = data.index(b"iTXtXML:com.adobe.xmp\0\0\0\0\0<?xpacket")
    length = int.from_bytes(data[place - 4 : place], "big")
    chunk = data[place : place + 4 + length]
    assert stated in chunk
    assert zlib.crc32(chunk) == int.from_bytes(data[place + 4 + length : place + 8 + length], "big")


@pytest.mark.skipif(not shutil.which("exiftool"), reason="needs exiftool")
@pytest.mark.parametrize("name", ["a.mp4", "d.png"])
def test_exiftool_reads_the_xmp(name: str, folder: Path) -> None:
    command = ["exiftool", "-j", "-G1", "-XMP:all", "-warning", "-error", str(folder / name)]
    (row,) = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert row["XMP-iptcExt:DigitalSourceType"] == GENERATED
    assert row["XMP-xmp:CreatorTool"].startswith("wanrt ")
    assert not [key for key in row if "Warning" in key or "Error" in key]


@pytest.mark.parametrize(
    ("packet", "found"),
    [
        ('<x xmlns:i="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" i:DigitalSourceType="u"/>', "u"),
        (
            '<x xmlns:i="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">'
            "<i:DigitalSourceType> u </i:DigitalSourceType></x>",
            "u",
        ),
        (
            '<x xmlns:i="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
            'xmlns:r="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
            '<i:DigitalSourceType r:resource="u"/></x>',
            "u",
        ),
        ("<x/>", None),
        ("<!DOCTYPE x [<!ENTITY a 'b'>]><x>&a;</x>", "entities"),
        ("<x", "not XML"),
        ("\udcff", "not XML"),
    ],
)
def test_xmp_of_others(packet: str, found: str | None, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(xmp._png_with(png(), packet.encode("utf-8", "surrogateescape")))
    if found in ("entities", "not XML"):
        with pytest.raises(FormatError, match=found):
            xmp.read(path)
        assert verify(path).layers.xmp.state == "invalid"
    else:
        assert xmp.read(path) == found


def test_inputs_become_ingredients_with_their_manifests(folder: Path, tmp_path: Path) -> None:
    """A signed picture went in: it is bound, its manifest is kept, and nothing names its file."""
    Image.fromarray(frames(1)[0]).save(tmp_path / "jane doe.jpg")
    given = (
        Input("image", folder / "d.png"),
        Input("last image", tmp_path / "jane doe.jpg"),
        Input("reference 1"),
    )
    origin = Origin("wanrt test", "flf2v", given, prompt="a secret")
    save_video(frames(), tmp_path / "a.mp4", 16, origin=origin)
    found = verify(tmp_path / "a.mp4")
    assert found.state == "marked" and found.layers.c2pa.state == "trusted"
    assert found.layers.c2pa.source_type == found.layers.xmp.source_type == COMPOSITE
    assert found.layers.c2pa.ingredients == 2
    assert found.layers.c2pa.generation["inputs"] == ["image", "last image", "reference 1"]
    store = json.loads(c2pa.Reader(str(tmp_path / "a.mp4")).json())
    first, second = store["manifests"][store["active_manifest"]]["ingredients"]
    assert (first["title"], first["relationship"]) == ("image", "inputTo")
    kept = verify(folder / "d.png").layers.c2pa.label
    assert first["active_manifest"] == kept and kept in store["manifests"]
    assert "active_manifest" not in second and "thumbnail" not in {*first, *second}
    data = (tmp_path / "a.mp4").read_bytes()
    assert b"jane" not in data and b"secret" not in data


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("wrong.jpg", "d.png"),
        ("sound.webm", "b.webm"),
        ("cut.mp4", "a.mp4"),
        ("text.png", None),
        ("none", None),
    ],
)
def test_inputs_of_every_kind_can_be_bound(
    name: str, of: str | None, folder: Path, tmp_path: Path
) -> None:
    """A wrong ending, a format without manifests, a broken file: never a result that fails."""
    data = (folder / of).read_bytes() if of else b"some text"
    (tmp_path / name).write_bytes(data[:3000] if name == "cut.mp4" else data)
    origin = Origin("wanrt test", "i2v", (Input("image", tmp_path / name),))
    save_video(frames(2), tmp_path / "a.mkv", 16, origin=origin)
    assert verify(tmp_path / "a.mkv").layers.c2pa.ingredients == 1


def test_the_prompt_is_recorded_when_asked_for(tmp_path: Path) -> None:
    origin = replace(Origin("wanrt test", "t2v"), prompt="a cat")
    save_video(frames(1), tmp_path / "a.png", origin=origin, marking=Marking(record_prompt=True))
    assert verify(tmp_path / "a.png").layers.c2pa.generation["prompt"] == "a cat"


def test_frames_of_any_kind(tmp_path: Path) -> None:
    import torch

    clip = frames(5)
    pixels = torch.from_numpy(clip).permute(3, 0, 1, 2).float() / 127.5 - 1
    kinds = (clip, [clip[:2], clip[2:]], [Image.fromarray(f) for f in clip], pixels, [pixels[None]])
    for number, kind in enumerate(kinds):
        saved = wanrt.save_video(kind, tmp_path / f"{number}.mp4", 8)
        info = probe_video(saved.path)
        assert (info.num_frames, info.fps) == (5, 8), number
        assert verify(saved.path).layers.watermark.id == saved.watermark
    for wrong in (clip[..., 0], clip.astype(np.float32), [clip[:0]]):
        with pytest.raises(UsageError, match="frames are uint8"):
            wanrt.save_video(wrong, tmp_path / "wrong.mp4", 8)
    assert not (tmp_path / "wrong.mp4").exists()


def test_mark_keeps_picture_sound_and_manifest(folder: Path, tmp_path: Path) -> None:
    source = with_sound(tmp_path / "in.mp4")
    before = source.read_bytes()
    saved = mark_file(source, tmp_path / "out.mp4", model="another generator")
    found = verify(saved.path)
    assert found.state == "marked" and found.layers.c2pa.source_type == GENERATED
    assert found.layers.c2pa.generation["model"] == "another generator"
    assert source.read_bytes() == before
    with av.open(str(saved.path)) as marked, av.open(str(source)) as original:
        assert marked.streams.video[0].frames == 9 and marked.streams.video[0].average_rate == 16
        packets = [
            [bytes(p) for p in container.demux(container.streams.audio[0]) if p.size]
            for container in (marked, original)
        ]
    assert packets[0] == packets[1] and len(packets[0]) > 10
    again = mark_file(saved.path, tmp_path / "again.mp4")
    store = json.loads(c2pa.Reader(str(again.path)).json())
    (parent,) = store["manifests"][store["active_manifest"]]["ingredients"]
    assert parent["relationship"] == "parentOf" and parent["active_manifest"] == saved.manifest
    assert again.watermark == saved.watermark
    found = verify(again.path)
    assert (found.state, found.layers.watermark.id) == ("marked", saved.watermark)
    picture = mark_file(folder / "d.png", tmp_path / "out.png")
    assert verify(picture.path).layers.c2pa.source_type == GENERATED


def with_sound(path: Path) -> Path:
    silent = write_video(path.with_name("silent.mp4"), [frames()], 16)
    with av.open(str(silent)) as old, av.open(str(path), "w") as new:
        copy = new.add_stream_from_template(old.streams.video[0])
        sound = new.add_stream("aac", rate=44100, layout="mono")
        for packet in old.demux(old.streams.video[0]):
            if packet.dts is not None:
                packet.stream = copy
                new.mux(packet)
        wave = np.sin(np.arange(24576) / 16, dtype=np.float32)[None]
        for part in np.split(wave, 24, axis=1):
            tone = av.AudioFrame.from_ndarray(np.ascontiguousarray(part), "fltp", "mono")
            tone.sample_rate = 44100
            new.mux(sound.encode(tone))
        new.mux(sound.encode(None))
    return path


def test_mark_refuses(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "plain.mp4", tmp_path / "in.mp4")
    before = (tmp_path / "in.mp4").read_bytes()
    with pytest.raises(UsageError, match="is the input itself"):
        mark_file(tmp_path / "in.mp4", tmp_path / "in.mp4", overwrite=True)
    with pytest.raises(UsageError, match="cannot hold h264"):
        mark_file(tmp_path / "in.mp4", tmp_path / "out.webm", codec="h264")
    with pytest.raises(FormatError, match="no such file"):
        mark_file(tmp_path / "absent.mp4", tmp_path / "out.mp4")
    with pytest.raises(UsageError, match="sound of .* does not fit into a .webm"):
        mark_file(with_sound(tmp_path / "loud.mp4"), tmp_path / "out.webm")
    assert (tmp_path / "in.mp4").read_bytes() == before
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob(".wanrt*"))


def test_the_ledger_knows_files_and_copies(folder: Path, tmp_path: Path) -> None:
    book = tmp_path / "ledger.jsonl"
    saved = save_video(frames(), tmp_path / "a.mp4", 16, marking=Marking(ledger=book))
    (entry,) = ledger.entries(book)
    assert entry.record["sha256"] == saved.sha256 and entry.record["manifest"] == saved.manifest
    assert entry.record["watermark"] == saved.watermark and entry.record["path"] == "a.mp4"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", entry.record["time"])
    match = verify(saved.path, ledger_file=book).layers.ledger
    assert (match.state, match.by, match.line) == ("match", "sha256", 1)
    copy = remux(saved.path, tmp_path / "copy.mp4")
    match = verify(copy, ledger_file=book).layers.ledger
    assert (match.state, match.by, match.line) == ("match", "watermark", 1)
    assert verify(folder / "d.png", ledger_file=book).layers.ledger.state == "no match"
