"""nano's language, its rendered clips, and the scorer that reads clips back."""

import hashlib
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wanrt.errors import UsageError
from wanrt.nano import language, scenes
from wanrt.nano.language import ATTRIBUTES, BACKGROUNDS, COLORS, MOTIONS, SHAPES, SIZES, Scene
from wanrt.nano.scorer import Reading, agreement, score
from wanrt.nano.sheet import CAPTION_HEIGHT, GAP, contact_sheet

ALL = tuple(language.combinations())
WORDS = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "motion": MOTIONS,
    "size": SIZES,
    "background": tuple(BACKGROUNDS),
}
STAR = Scene("orange", "star", "bouncing", "large", "navy")

PROMPTS = {
    "": Scene(),
    "a circle": Scene(shape="circle"),
    "red square": Scene("red", "square"),
    "a red circle moving right": Scene("red", "circle", "moving right"),
    "an orange ring": Scene("orange", "ring"),
    "a orange ring": Scene("orange", "ring"),
    "a large blue star bouncing on a navy background": Scene(
        "blue", "star", "bouncing", "large", "navy"
    ),
    "A Small circle  moving in a circle.": Scene(None, "circle", "moving in a circle", "small"),
    "a shape on a sand background": Scene(background="sand"),
    "green on gray background": Scene("green", background="gray"),
    "moving up": Scene(motion="moving up"),
}
NOT_PROMPTS = (
    "a pink circle",
    "a circle red",
    "a redcircle",
    "a circle moving",
    "a navy circle",
    "a circle on a red background",
    "a cat in the rain",
    "a red circle and a blue square",
)


def clip(scene: Scene, seed: int, **settings: int) -> np.ndarray:
    return scenes.render(scene, rng=np.random.default_rng(seed), **settings)


def degrade(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blur (sigma 1 pixel), noise (sigma 8 of 255) and a colour shift of up to 10."""
    kernel = np.exp(-(np.arange(-3, 4, dtype=np.float32) ** 2) / 2)
    kernel /= kernel.sum()
    soft = np.pad(frames.astype(np.float32), ((0, 0), (3, 3), (3, 3), (0, 0)), "edge")
    side = frames.shape[1]
    soft = sum(k * soft[:, i : i + side] for i, k in enumerate(kernel))
    soft = sum(k * soft[:, :, i : i + side] for i, k in enumerate(kernel))
    soft += 8 * rng.standard_normal(soft.shape, np.float32)
    soft += rng.uniform(-10, 10, 3).astype(np.float32)
    return np.clip(soft + 0.5, 0, 255).astype(np.uint8)


def downscale(frames: np.ndarray, by: int) -> np.ndarray:
    f, h, w, c = frames.shape
    return frames.reshape(f, h // by, by, w // by, by, c).mean((2, 4))


def test_colors_that_share_a_clip_are_far_apart() -> None:
    pairs = [*itertools.combinations(COLORS.values(), 2)]
    pairs += itertools.product(COLORS.values(), BACKGROUNDS.values())
    assert min(np.linalg.norm(np.subtract(a, b)) for a, b in pairs) >= 100


@pytest.mark.parametrize("prompt", PROMPTS)
def test_parse(prompt: str) -> None:
    assert language.parse(prompt) == PROMPTS[prompt]


@pytest.mark.parametrize("prompt", NOT_PROMPTS)
def test_parse_refuses_other_text(prompt: str) -> None:
    with pytest.raises(UsageError, match="not in nano's language"):
        language.parse(prompt)


@pytest.mark.parametrize("kept", range(2 ** len(ATTRIBUTES)))
def test_parse_reads_every_caption_back(kept: int) -> None:
    dropped = [name for i, name in enumerate(ATTRIBUTES) if not kept >> i & 1]
    for scene in {scene.without(*dropped) for scene in ALL[::7]}:
        assert language.parse(scene.caption()) == scene


def test_held_out_split_is_the_published_one() -> None:
    """Changing it would let trained weights be tested on what they have seen."""
    assert len(ALL) == len(set(ALL)) == 1920
    prompts = [scene.caption() for scene in ALL if language.held_out(scene)]
    assert (
        len(prompts) == 528 and prompts[0] == "a small red circle moving left on a black background"
    )
    assert hashlib.sha256("\n".join(prompts).encode()).hexdigest().startswith("bafec672509caffb")


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_every_value_is_both_trained_and_held_out(name: str) -> None:
    for value in WORDS[name]:
        share = np.mean([language.held_out(s) for s in ALL if getattr(s, name) == value])
        assert 0.2 <= share <= 0.35, value


def test_held_out_prompts() -> None:
    prompts = language.held_out_prompts(256)
    assert prompts == language.held_out_prompts(256) != language.held_out_prompts(256, seed=1)
    for n in (1, 32, 105):  # a record knows prompts by their place
        assert language.held_out_prompts(n) == prompts[:n]
    assert len(set(prompts)) == 256 and all(map(language.held_out, prompts))
    with pytest.raises(UsageError, match="528"):
        language.held_out_prompts(529)


@pytest.mark.parametrize("held_out", [False, True])
def test_samples_keep_to_their_side_of_the_split(held_out: bool) -> None:
    rng = np.random.default_rng(3)
    given: Counter[str] = Counter()
    for _ in range(2000):
        scene, caption = scenes.sample(rng, held_out)
        assert language.held_out(scene) == held_out
        asked = language.parse(caption)
        for name in ATTRIBUTES:
            assert getattr(asked, name) in (None, getattr(scene, name))
            given[name] += getattr(asked, name) is not None
        given["all"] += asked == scene
    assert all(1400 < given[name] < 1900 for name in ATTRIBUTES), given
    assert given["all"] > 900


@pytest.mark.parametrize("shape", SHAPES)
def test_object_stays_inside_and_its_colors_are_exact(shape: str) -> None:
    for seed, scene in enumerate(s for s in ALL[::5] if s.shape == shape):
        frames = clip(scene, seed, num_frames=9)
        paint, ground = COLORS[scene.color], BACKGROUNDS[scene.background]
        border = (frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1])
        assert all((edge == ground).all() for edge in border), scene
        assert (frames == paint).all(-1).any((1, 2)).all(), scene


# Areas of shapes of radius 1; the star is ten triangles between centre, tip and notch.
AREAS = {
    "circle": np.pi,
    "square": 4 * scenes.SQUARE**2,
    "triangle": 3 * 3**0.5 / 4 * scenes.TRIANGLE**2,
    "star": 5 * scenes.STAR**2 * scenes.STAR_NOTCH * np.sin(np.pi / 5),
    "ring": np.pi * (1 - scenes.RING_HOLE**2),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", SHAPES)
def test_drawn_area_is_the_shapes(shape: str, size: str) -> None:
    frames = clip(Scene("white", shape, "bouncing", size, "black"), 4).astype(np.float32)
    coverage = (frames[..., 0] - 8) / (246 - 8)
    radius = np.sqrt(coverage.sum((1, 2)) / AREAS[shape]) / 96
    assert radius.std() < 0.01 * radius.mean()
    assert radius.mean() == pytest.approx(scenes.RADIUS[size], rel=scenes.RADIUS_JITTER + 0.01)


@pytest.mark.parametrize("motion", MOTIONS)
def test_a_crop_in_time_is_a_part_of_the_clip(motion: str) -> None:
    scene = Scene("cyan", "triangle", motion, "small", "gray")
    crop = clip(scene, 7, num_frames=5, start=14, span=33)
    assert np.array_equal(crop, clip(scene, 7)[14:19])


@pytest.mark.parametrize("motion", MOTIONS)
def test_resolution_does_not_change_the_scene(motion: str) -> None:
    scene = Scene("white", "circle", motion, "large", "black")
    error = clip(scene, 8, size=48) - downscale(clip(scene, 8, size=96), 2)
    assert np.abs(error).max() < 32 and np.abs(error).mean() < 0.3


@pytest.mark.parametrize("degraded, count, least", [(False, 200, 0.99), (True, 100, 0.98)])
def test_scorer_reads_clips_back(degraded: bool, count: int, least: float) -> None:
    rng = np.random.default_rng(11)
    right = 0
    for i in rng.permutation(len(ALL))[:count]:
        frames = scenes.render(ALL[i], rng=rng)
        right += agreement(ALL[i], score(degrade(frames, rng) if degraded else frames)).all
    assert right >= least * count


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_clip_with_one_wrong_attribute_disagrees_in_that_one(name: str) -> None:
    for seed, asked in enumerate(ALL[5::240]):
        for value in set(WORDS[name]) - {getattr(asked, name)}:
            shown = Scene(**{n: getattr(asked, n) for n in ATTRIBUTES} | {name: value})
            found = agreement(asked, score(clip(shown, seed)))
            assert not found.all
            assert [n for n in ATTRIBUTES if not getattr(found, n)] == [name], (asked, shown)


def test_attributes_not_given_are_not_judged() -> None:
    reading = Reading("red", "circle", "small", "bouncing", None)
    found = agreement(Scene("red", "square"), reading)
    assert found == (True, False, None, None, None) and not found.all
    assert agreement(Scene(), Reading()).all
    assert not agreement(Scene(background="navy"), reading).all


def _empty() -> np.ndarray:
    return np.full((33, 96, 96, 3), 8, np.uint8)


def _noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (33, 96, 96, 3), np.uint8)


def _still() -> np.ndarray:
    return np.repeat(clip(STAR, 1)[:1], 33, 0)


def _two_objects() -> np.ndarray:
    first = clip(Scene("orange", "star", "moving right", "small", "navy"), 1)
    second = np.roll(first, 48, axis=1)
    return np.where((first == BACKGROUNDS["navy"]).all(-1, keepdims=True), second, first)


def _vanishing() -> np.ndarray:
    frames = clip(STAR, 1)
    frames[20:] = BACKGROUNDS["navy"]
    return frames


def _diagonal() -> np.ndarray:
    frames = np.repeat(clip(STAR, 1, size=48, num_frames=1), 33, 0)
    canvas = np.empty((33, 96, 96, 3), np.uint8)
    canvas[:] = BACKGROUNDS["navy"]
    for f in range(33):
        canvas[f, f : f + 48, f : f + 48] = frames[f]
    return canvas


def _hanging() -> np.ndarray:
    """Bounces against a ceiling, which is no bouncing."""
    return clip(Scene("orange", "square", "bouncing", "small", "navy"), 1)[:, ::-1]


ODD_CLIPS = {
    "empty": (_empty, Reading(background="black")),
    "noise": (_noise, Reading(background="gray")),
    "still": (_still, Reading("orange", "star", "large", None, "navy")),
    "two objects": (_two_objects, Reading("orange", None, None, None, "navy")),
    "vanishing": (_vanishing, Reading("orange", None, None, None, "navy")),
    "diagonal": (_diagonal, Reading("orange", "star", "small", None, "navy")),
    "hanging": (_hanging, Reading("orange", "square", "small", None, "navy")),
}


@pytest.mark.parametrize("name", ODD_CLIPS)
def test_what_is_not_in_the_language_is_not_read(name: str) -> None:
    make, expected = ODD_CLIPS[name]
    assert score(make()) == expected


def test_contact_sheet_shows_first_and_last_frames_in_place(tmp_path: Path) -> None:
    clips = [clip(ALL[i], i, num_frames=9, size=48) for i in (3, 500, 1000)]
    contact_sheet(clips, tmp_path / "sheet.png", ["one", "two", "three"], 2, frames_per_clip=3)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    cell_width, cell_height = 3 * (48 + GAP) + GAP, CAPTION_HEIGHT + 48 + 2 * GAP
    assert sheet.shape == (2 * cell_height, 2 * cell_width, 3)
    for i, frames in enumerate(clips):
        left, top = i % 2 * cell_width + GAP, i // 2 * cell_height + GAP
        assert (sheet[top : top + CAPTION_HEIGHT, left : left + 48] < 128).any()
        for k, f in enumerate((0, 4, 8)):
            x, y = left + k * (48 + GAP), top + CAPTION_HEIGHT
            assert np.array_equal(sheet[y : y + 48, x : x + 48], frames[f])
