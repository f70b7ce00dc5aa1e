"""The watermark: its code and key, what marking changes, what it withstands, false alarms."""

import hashlib
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from wanrt.bench.watermark_attacks import ATTACKS, Attack, save
from wanrt.bench.watermark_clips import clouds, gradient, scene
from wanrt.cli import app
from wanrt.errors import UsageError
from wanrt.media.watermark import CARRIED, NAME, Watermark
from wanrt.media.watermark_align import Alignment, Span, read
from wanrt.media.watermark_code import best_path, decode, encode, message_bits
from wanrt.media.watermark_detect import (
    ATTEMPTS,
    MAX_FALSE_POSITIVE,
    NOTHING,
    detect,
    false_positive_probability,
    soft_bits,
)
from wanrt.media.watermark_evidence import Evidence, correlation
from wanrt.media.watermark_filter import outstanding, whitened
from wanrt.media.watermark_key import GRIDS, grid_for, key

IDENTIFIER = 0xC0FFEE42


def marked(frames: np.ndarray, identifier: int = IDENTIFIER) -> np.ndarray:
    return Watermark(identifier, *frames.shape[1:3]).apply(frames)


def test_message_and_checksum() -> None:
    """CRC-16/CCITT-FALSE of four zero bytes is 0x84C0."""
    assert np.packbits(message_bits(0)).tobytes().hex() == "0000000084c0"
    assert np.packbits(message_bits(IDENTIFIER)).tobytes()[:4].hex() == "c0ffee42"


def test_the_code_is_the_one_of_the_standard() -> None:
    """Bit by bit as TS 36.212 draws it: a register that starts with the message's last six bits."""
    bits = message_bits(IDENTIFIER).tolist()
    register, coded = bits[-1:-7:-1], []
    for bit in bits:
        window = [bit, *register]
        for taps in ("1011011", "1111001", "1110101"):  # 133, 171, 165 octal
            coded.append(sum(b for b, tap in zip(window, taps, strict=True) if tap == "1") % 2)
        register = window[:6]
    assert encode(IDENTIFIER).tolist() == [1 - 2 * bit for bit in coded]


@pytest.mark.parametrize("identifier", [0, 1, IDENTIFIER, 0xFFFFFFFF])
def test_errors_are_corrected(identifier: int) -> None:
    soft = encode(identifier).astype(float)
    soft[::9] *= -0.9  # 16 of 144 wrong
    assert decode(soft) == identifier
    assert np.array_equal(best_path(soft), message_bits(identifier))


def test_noise_has_no_checksum() -> None:
    rng = np.random.default_rng(0)
    found = [decode(rng.standard_normal(144)) for _ in range(100)]
    assert found.count(None) >= 98  # 32 paths or so, of which each holds with a chance of 2^-16


def test_paths_beside_the_best_one_are_tried() -> None:
    """Noise in which the most likely path alone spells the identifier less often."""
    rng = np.random.default_rng(4)
    soft = 0.8 * encode(IDENTIFIER) + rng.standard_normal((200, 144))
    first = sum(np.array_equal(best_path(one), message_bits(IDENTIFIER)) for one in soft)
    listed = [decode(one) for one in soft]
    assert set(listed) <= {IDENTIFIER, None}
    assert listed.count(IDENTIFIER) > 160 > 140 > first


@pytest.mark.parametrize("grid", GRIDS)
def test_chips_give_their_coded_bits(grid: int) -> None:
    assert np.array_equal(np.sign(soft_bits(key(grid).chips(IDENTIFIER))), encode(IDENTIFIER))


# First digits of SHA-256 of the signs (int8) and data positions (big-endian uint16).
KEYS = {
    96: "e38c1ac8e843eb1b",
    64: "445342f819ad8b8d",
    32: "762b035ac13a9c56",
}


@pytest.mark.parametrize("grid", GRIDS)
def test_the_key_is_public_and_fixed(grid: int) -> None:
    here = key(grid)
    places = here.signs.tobytes() + here.data.astype(">u2").tobytes()
    assert hashlib.sha256(places).hexdigest()[:16] == KEYS[grid]
    every = np.concatenate([here.sync, here.data.ravel()])
    assert np.array_equal(np.sort(every), np.arange(grid * grid))
    assert abs(int(here.signs.sum())) < 4 * grid  # four standard deviations


def test_other_identifiers_have_other_patterns() -> None:
    one, other = key(64).chips(5).ravel(), key(64).chips(6).ravel()
    assert np.array_equal(one[key(64).sync], other[key(64).sync])
    data = key(64).data.ravel()
    assert abs(float((one * other)[data].mean())) < 0.6  # a bit of 32 changes a fifth or more


@pytest.mark.parametrize("size", [(96, 96), (97, 131), (200, 170), (404, 412)])
def test_chunks_frames_and_devices_do_not_matter(size: tuple[int, int]) -> None:
    frames = clouds(*size)[:5]
    before = frames.copy()
    whole = marked(frames)
    assert np.array_equal(frames, before) and whole.dtype == np.uint8
    assert 0 < np.abs(whole.astype(int) - frames).mean() < 4
    watermark = Watermark(IDENTIFIER, *size)
    parts = [watermark.apply(frames[i:j]) for i, j in ((0, 1), (1, 4), (4, 5))]
    assert np.array_equal(np.concatenate(parts), whole)
    tensor = marked(torch.from_numpy(frames))
    assert isinstance(tensor, torch.Tensor) and np.array_equal(tensor.numpy(), whole)
    assert np.array_equal(marked(frames[::-1, :, :]), whole[::-1])
    assert detect(whole).identifier == IDENTIFIER


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_backend_that_is_forced_marks_alike(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames on a CPU take PyTorch's op where Triton's is asked for."""
    frames = clouds(97, 131)[:2]
    expected = marked(frames)
    monkeypatch.setenv("WANRT_OPS", backend)
    assert np.array_equal(marked(frames), expected)


def test_what_is_added_is_grey_and_within_range() -> None:
    """The same change in R, G and B except where one of them would leave 0 to 255."""
    frames = clouds(200, 300)[:1]
    frames[0, :50] = 254
    change = marked(frames).astype(int) - frames
    inside = np.all((frames > 20) & (frames < 235), 3)
    assert np.array_equal(change[inside].min(1), change[inside].max(1))
    assert change[0, :40].max() <= 1  # nothing wraps around


def psnr(frames: np.ndarray, others: np.ndarray) -> float:
    return 10 * math.log10(255**2 / np.square(frames.astype(float) - others).mean())


@pytest.mark.parametrize(
    ("frames", "least"),
    [(scene(1), 42), (gradient(480, 832)[:1], 42), (gradient(256, 256)[:1], 38)],
    ids=["nano", "832x480", "256x256"],
)
def test_it_is_faint(frames: np.ndarray, least: float) -> None:
    assert least < psnr(marked(frames), frames) < 50


PROMISED = [one for one in ATTACKS if one.promised]


@pytest.mark.parametrize("attack", PROMISED, ids=[one.name for one in PROMISED])
def test_a_clip_of_256_pixels_withstands(attack: Attack) -> None:
    _reads(marked(gradient(256, 256)), attack)


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="Linux only")
def test_encoding_leaves_the_priority_as_it_was() -> None:
    """As root, SVT-AV1 makes its caller a real-time thread."""
    before = os.sched_getscheduler(0)
    save(gradient(64, 64)[:1], "libsvtav1", 35)
    assert os.sched_getscheduler(0) == before


NANO = [one for one in ATTACKS if one.promised_nano]


@pytest.mark.parametrize("attack", NANO, ids=[one.name for one in NANO])
def test_a_clip_of_nano_withstands(attack: Attack) -> None:
    _reads(marked(scene(2)), attack)


def _reads(frames: np.ndarray, attack: Attack) -> None:
    found = detect(attack.run(frames))
    assert found.detected and found.identifier == IDENTIFIER
    assert found.false_positive_probability <= MAX_FALSE_POSITIVE


@pytest.mark.parametrize("size", [(64, 64), (72, 130), (300, 200), (480, 640)])
def test_a_single_picture_is_enough(size: tuple[int, int]) -> None:
    assert detect(marked(gradient(*size)[:1])).identifier == IDENTIFIER


def test_a_frame_among_others_is_read_whatever_its_size() -> None:
    """Frames of a clip that changes its size half way."""
    frames = marked(gradient(256, 256)[:4])
    assert detect([*frames[:2], *(frame[::2, ::2] for frame in frames)]).identifier == IDENTIFIER


@pytest.mark.parametrize("level", [0, 1, 128, 255])
def test_flat_frames_are_left_alone_and_said_not_to_carry(level: int) -> None:
    frames = np.full((3, 128, 192, 3), level, np.uint8)
    watermark = Watermark(IDENTIFIER, 128, 192)
    assert np.array_equal(watermark.apply(frames), frames)
    assert not watermark.carried and not detect(frames).detected
    watermark.apply(gradient(128, 192)[:1])
    assert watermark.carried


def test_colours_of_equal_brightness_are_not_flat() -> None:
    """Nano's green ring on grey differs in R and B alone."""
    frames = scene(1)
    assert np.ptp(frames @ np.array([1, 2, 1]) // 4) <= 3
    assert detect(marked(frames)).identifier == IDENTIFIER


def test_what_is_nearly_black_is_said_not_to_carry() -> None:
    dark = (clouds(256, 256) // 100).astype(np.uint8)  # levels 0 to 2
    dark[:, 0, 0] = 40
    watermark = Watermark(IDENTIFIER, 256, 256)
    assert detect(watermark.apply(dark)).score < CARRIED and not watermark.carried


def test_read_only_frames_are_taken_without_a_word(recwarn: pytest.WarningsRecorder) -> None:
    frames = gradient(128, 128)[:1]
    frames.flags.writeable = False
    assert not np.array_equal(marked(frames), frames) and not recwarn.list


def test_small_frames_are_left_alone() -> None:
    frames = clouds(48, 200)[:2]
    watermark = Watermark(IDENTIFIER, 48, 200)
    assert np.array_equal(watermark.apply(frames), frames) and not watermark.carried


@pytest.mark.parametrize("identifier", [-1, 1 << 32, True, 1.5, "7"])
def test_an_identifier_has_32_bits(identifier: object) -> None:
    with pytest.raises(UsageError, match="identifier"):
        Watermark(identifier, 256, 256)


def test_no_frames_no_watermark() -> None:
    assert detect([]) == detect([], IDENTIFIER) == NOTHING


def test_a_crop_is_read_where_it_lies() -> None:
    """A map stretched as a crop to 90 % of the rows from row 5 gives the original's chips."""
    chips = key(64).chips(IDENTIFIER)
    rows = np.linspace(0.05, 0.95, 1281)[:-1] * 64
    seen = chips[rows.astype(int)].reshape(128, 10, 64).mean(1).repeat(2, 1)
    got = read(seen, Alignment(False, Span(0.9, 0.05 * 128 / 0.9), Span()))
    inside = slice(4, 60)
    assert correlation(got[inside], chips[inside]) > 0.95 * math.sqrt(56 * 64)
    assert np.all(got[:3] == 0) and np.all(got[-3:] == 0)


def test_the_bound_on_false_alarms_is_the_stated_one() -> None:
    """At 12 a normal variable's tail is 1.776e-33; 1 / (4 P(N > sqrt(2))) is 3.178."""
    assert ATTEMPTS == 24
    assert false_positive_probability(0) == false_positive_probability(6.7) == 1
    assert false_positive_probability(12) == pytest.approx(2**32 * 24 * 3.178 * 1.776e-33, rel=1e-3)
    assert false_positive_probability(8.65) < MAX_FALSE_POSITIVE < false_positive_probability(8.6)


@pytest.mark.parametrize("mirrored", [False, True])
def test_random_signs_keep_to_the_bound(mirrored: bool) -> None:
    """On what real unmarked frames give, of which the derivation assumes nothing.

    The frames count by the sync chips, and those are not correlated with.
    """
    evidence = Evidence()
    for frame in scene(3)[:9:4]:
        evidence.add(frame)
    rng = np.random.default_rng(1)
    chips, data = evidence.chips(32, mirrored), key(32).sync_chips() == 0
    draws = rng.choice([-1, 1], (8000, 32, 32)) * data
    scores = np.array([correlation(chips, signs) for signs in draws])
    assert abs(scores.mean()) < 0.05 and 0.95 < scores.std() < 1.05
    for limit in (1.0, 2.0, 3.0):
        assert (scores > limit).mean() <= 3.18 * math.erfc(limit / math.sqrt(2)) / 2


def test_what_is_read_does_not_depend_on_the_signs_that_carry_the_identifier(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frames = marked(scene(3)[:3])
    before = _evidence(frames).chips(32)
    flipped = key(32).signs.copy()
    flipped[key(32).data] *= -1
    other = replace(key(32), signs=flipped)
    monkeypatch.setattr("wanrt.media.watermark_evidence.key", lambda grid: other)
    assert np.array_equal(_evidence(frames).chips(32), before)


def _evidence(frames: np.ndarray, grid: int = 32) -> Evidence:
    evidence = Evidence((grid,))
    for frame in frames:
        evidence.add(frame)
    return evidence


def test_frames_count_by_how_well_they_are_read() -> None:
    """One marked frame among unmarked ones of the same texture is read as if it were alone."""
    frames = clouds(256, 256)[:13]
    unmarked = frames[1:]
    signs = key(64).data_chips(IDENTIFIER)
    alone = correlation(_evidence(marked(frames[:1]), 64).chips(64), signs)
    among = correlation(
        _evidence(np.concatenate([unmarked, marked(frames[:1])]), 64).chips(64), signs
    )
    assert among > 0.8 * alone > 8


def test_the_filter_weighs_by_the_spectrum() -> None:
    """A wave in noise, of a power that drowns the chips, is taken out; a flat map stays flat."""
    rng = np.random.default_rng(3)
    chips = rng.choice([-1.0, 1.0], (64, 64))
    wave = 30 * np.sin(np.arange(128) * 2 * np.pi * 20 / 128)
    samples = chips.repeat(2, 0).repeat(2, 1) + wave
    before, after = (correlation(_chips(one), chips) for one in (samples, whitened(samples)))
    assert before < 10 < 30 < after
    flat = np.zeros((64, 64))
    assert not outstanding(flat + 7).any() and not whitened(flat).any()


def _chips(samples: np.ndarray) -> np.ndarray:
    return samples.reshape(64, 2, 64, 2).sum((1, 3))


OLD = 0x01234567


@pytest.mark.parametrize("share", [0.5, 1.0, 2.0])
def test_a_mark_that_lies_over_another_is_found_if_it_is_asked_for(share: float) -> None:
    """`share` of the older one's strength is left when the newer is added."""
    plain = gradient(256, 256)[:4]
    change = marked(plain, OLD).astype(float) - plain
    before = (plain + share * change).round().clip(0, 255).astype(np.uint8)
    watermark = Watermark(IDENTIFIER, 256, 256)
    after = watermark.apply(before)
    found = detect(after)
    assert found.identifier == (OLD if share > 1 else IDENTIFIER)
    assert watermark.carried == (share <= 1)
    asked = detect(after, IDENTIFIER)
    assert asked.detected and asked.identifier == IDENTIFIER
    assert asked.other == (OLD if share > 1 else None)
    older = detect(after, OLD)
    assert older.identifier == OLD and older.other == (None if share > 1 else IDENTIFIER)
    assert detect(after, 0x1234ABCD) == found


def test_a_mark_that_is_not_there_is_not_found_because_it_is_asked_for() -> None:
    """Not even one of which 113 of 144 coded bits are those of the mark that is."""
    near = IDENTIFIER ^ 0x80000000
    alike = (encode(near) == encode(IDENTIFIER)).sum()
    assert alike > 100
    frames = marked(gradient(256, 256)[:2])
    assert detect(frames, near) == detect(frames, OLD) == detect(frames)
    assert not detect(gradient(256, 256)[:2], OLD).detected


def test_unmarked_crops_raise_no_alarm() -> None:
    rng = np.random.default_rng(2)
    sources = [clouds(300, 400), gradient(256, 256), scene(4), scene(5), clouds(480, 640)]
    straights = []
    for index in range(300):
        frames = sources[index % len(sources)]
        height, width = (int(rng.integers(64, side + 1)) for side in frames.shape[1:3])
        frames = frames[rng.integers(0, 9) :][:1, :height, :width]
        evidence = Evidence()
        evidence.add(frames[0])
        grid = grid_for(height, width)
        chips = evidence.chips(grid, bool(index & 1))
        straights.append(correlation(chips, key(grid).data_chips(IDENTIFIER)))
        if index % 12 == 0:
            found = detect(frames)
            assert not found.detected and found.identifier is None and found.score < 8
    assert np.abs(straights).max() < 6


def test_the_bench_fills_its_page(tmp_path: Path) -> None:
    page = tmp_path / "watermark.md"
    page.write_text("before\n<!-- wanrt bench watermark -->\nold\n<!-- end -->\nafter\n")
    options = ["--only", "nano scene 1001", "--crops", "2", "-o", str(page)]
    done = CliRunner().invoke(app, ["bench", "watermark", *options])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    read_back = {row["attack"]: row["detected"] for row in rows if row["kind"] == "attack"}
    assert set(read_back) == {one.name for one in ATTACKS} and all(
        read_back[one.name] for one in NANO
    )
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("<!-- end -->\nafter\n")
    assert "| x264 CRF 28 | **1/1, 1.000** |" in text and "False alarms: 0 of 2" in text


def test_the_name_is_that_of_the_soft_binding() -> None:
    assert NAME == "org.wanrt.ss.1"
