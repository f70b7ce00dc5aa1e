"""Output sizes, frame selection and legal settings, against the reference's own results."""

import math

import pytest

from wanrt.config import VAE_2_2
from wanrt.errors import UsageError
from wanrt.tasks import limits, sizes
from wanrt.tasks.sizes import Size

AREA_480P, AREA_720P = 480 * 832, 720 * 1280

# The tables hold what Wan2.1 @9737cba and Wan2.2 @42bf4cf compute for these inputs.


@pytest.mark.parametrize(
    ("image", "at_480p", "at_720p"),
    [
        ((832, 480), (464, 832), (720, 1248)),  # 480 becomes 464: 230399.99999999997
        ((480, 832), (832, 480), (1248, 720)),
        ((1280, 720), (464, 832), (720, 1280)),
        ((1920, 1080), (464, 832), (720, 1280)),
        ((720, 1280), (832, 464), (1280, 720)),
        ((1000, 1000), (624, 624), (960, 960)),
        ((1024, 768), (544, 720), (816, 1104)),
    ],
)
def test_i2v_size(
    image: tuple[int, int], at_480p: tuple[int, int], at_720p: tuple[int, int]
) -> None:
    assert sizes.i2v_size(*image, AREA_480P) == at_480p
    assert sizes.i2v_size(*image, AREA_720P) == at_720p


@pytest.mark.parametrize(
    ("image", "output"),
    [
        ((1280, 720), (704, 1248)),
        ((720, 1280), (1248, 704)),
        ((1024, 1024), (928, 960)),
        ((640, 480), (800, 1088)),
        ((3000, 1000), (544, 1632)),
        ((500, 333), (768, 1152)),
    ],
)
def test_ti2v_size(image: tuple[int, int], output: tuple[int, int]) -> None:
    assert sizes.ti2v_size(*image) == output


@pytest.mark.parametrize(
    ("source", "area", "output"),
    [  # (frames, width, height) -> (frames, height, width)
        ((81, 832, 480), AREA_480P, (81, 480, 832)),
        ((81, 1920, 1080), AREA_480P, (81, 480, 832)),
        ((200, 1280, 720), AREA_480P, (81, 480, 832)),
        ((300, 720, 1280), AREA_720P, (81, 1280, 720)),
        ((24, 640, 480), AREA_480P, (21, 480, 640)),
        ((1, 640, 480), AREA_480P, (1, 480, 640)),
        ((500, 320, 240), AREA_480P, (433, 240, 320)),  # small, so it may be long
        ((33, 500, 300), AREA_720P, (33, 288, 496)),
    ],
)
def test_vace_grid(source: tuple[int, int, int], area: int, output: tuple[int, int, int]) -> None:
    grid = sizes.vace_grid(*source, area)
    assert (grid.num_frames, *grid.size) == output


@pytest.mark.parametrize(
    "call",
    [
        lambda: sizes.i2v_size(1, 30000, AREA_480P),
        lambda: sizes.ti2v_size(30000, 1),
        lambda: sizes.vace_grid(81, 15, 400, AREA_480P),
    ],
)
def test_a_picture_too_narrow_for_any_size_is_refused(call) -> None:
    with pytest.raises(UsageError, match="too small or too narrow"):
        call()


def test_frames_are_taken_over_the_whole_source() -> None:
    picked = sizes.vace_frame_indices(range(201), 81)  # frame i from i to i + 1
    assert picked[:6] == [0, 2, 4, 7, 9, 12] and picked[-3:] == [194, 197, 199]
    assert sizes.vace_frame_indices(range(82), 81) == list(range(81))
    assert sizes.vace_frame_indices([10, 20], 1) == [0]
    # Frame 1 lasts from 1 to 9 of 10: four of the five times 0, 2.375, 4.75, 7.125, 9.5 fall in it.
    assert sizes.vace_frame_indices([0, 1, 9, 10], 5) == [0, 1, 1, 1, 2]
    # A time on a boundary belongs to the frame that ends there: 0, 2, 4 of frames at 0, 2, 3 to 5.
    assert sizes.vace_frame_indices([0, 2, 3, 5], 3) == [0, 0, 2]


@pytest.mark.parametrize(
    ("frames", "size", "kwargs", "shape", "tokens"),
    [
        (81, Size(480, 832), {}, (16, 21, 60, 104), 32_760),
        (81, Size(720, 1280), {}, (16, 21, 90, 160), 75_600),
        (1, Size(480, 832), {}, (16, 1, 60, 104), 1_560),
        (1, Size(1024, 1024), {}, (16, 1, 128, 128), 4_096),
        (121, Size(704, 1280), {"vae": VAE_2_2}, (48, 31, 44, 80), 27_280),
        (81, Size(480, 832), {"num_refs": 1}, (16, 22, 60, 104), 34_320),
    ],
)
def test_latent_shape_and_tokens(
    frames: int, size: Size, kwargs: dict, shape: tuple[int, ...], tokens: int
) -> None:
    latents = sizes.latent_shape(frames, size, **kwargs)
    assert latents == shape and sizes.token_count(latents) == tokens


@pytest.mark.parametrize(
    ("frames", "named", "nearest"),
    [
        (80, "77 and 81", 81),
        (79, "77 and 81", 81),
        (78, "77 and 81", 77),
        (2, "1 and 5", 1),
        (4, "1 and 5", 5),
    ],
)
def test_frames_not_4n_plus_1(frames: int, named: str, nearest: int) -> None:
    with pytest.raises(UsageError, match=f"frames is {frames}; .*{named}") as caught:
        limits.check_frames(frames)
    assert caught.value.exit_code == 2
    assert limits.check_frames(limits.round_frames(frames)) == nearest


@pytest.mark.parametrize("frames", [1, 5, 81, 121, limits.MAX_FRAMES])
def test_legal_frames_stay(frames: int) -> None:
    assert limits.check_frames(frames) == limits.round_frames(frames) == frames


@pytest.mark.parametrize("frames", [0, -1, -3, 10**6, 1 << 70, 81.0, True, "81", math.nan])
def test_absurd_frames_are_not_rounded_either(frames: object) -> None:
    for function in (limits.check_frames, limits.round_frames):
        with pytest.raises(UsageError, match="frames is "):
            function(frames)


@pytest.mark.parametrize(
    ("width", "height", "multiple", "named"),
    [
        (830, 480, 16, "nearest is 832x480"),
        (7, 480, 16, "width is 7; it must be 16 to 4096"),
        (1280, 720, 32, "nearest is 1280x736"),
        (1280, 719, 32, "nearest is 1280x704"),
        (0, 480, 16, "width is 0"),
        (832, -16, 16, "height is -16"),
        (100_000, 480, 16, "width is 100000; it must be 16 to 4096"),
        (1600, 16, 16, "more than 8 times"),
        (832.0, 480, 16, "width is 832.0; it must be a whole number"),
    ],
)
def test_sizes_that_are_refused(width: int, height: int, multiple: int, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        limits.check_size(width, height, multiple)


@pytest.mark.parametrize(
    ("width", "height", "multiple"),
    [(832, 480, 16), (1280, 704, 32), (96, 96, 16), (16, 16, 16), (4096, 512, 16), (1024, 1000, 1)],
)
def test_legal_sizes(width: int, height: int, multiple: int) -> None:
    size = limits.check_size(width, height, multiple)
    assert size == (height, width) and str(size) == f"{width}x{height}"


@pytest.mark.parametrize(
    ("check", "legal", "absurd"),
    [
        (limits.check_steps, [1, 50, 1000], [0, -1, 10**4, 4.5, None]),
        (limits.check_guidance, [0, 1.0, 5, 100], [-1, 1000, math.nan, math.inf, "5"]),
        (limits.check_flow_shift, [0.01, 5, 16.0], [0, -3, math.nan, math.inf, 10**4]),
        (limits.check_context_scale, [-10, 0, 1.0], [11, math.nan, None]),
        (limits.check_fps, [1, 16, 23.976, 240], [0, -1, math.nan, math.inf, 1000, True]),
        (limits.check_seed, [-1, 0, 2**63 - 1], [-2, 2**63, 2**64, 1.5]),
    ],
)
def test_ranges(check, legal: list, absurd: list) -> None:
    assert [check(value) for value in legal] == legal
    for value in absurd:
        with pytest.raises(UsageError, match=" is "):
            check(value)
