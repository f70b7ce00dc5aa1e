"""The clips of `wanrt bench watermark`: nano's scenes, photographs of other packages, patterns.

None of the photographs, scenes and patterns here was looked at while the watermark was made.
"""

import math
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from wanrt.media.image import load_image, to_uint8
from wanrt.nano.scenes import render, sample

LARGE, SMALL = (480, 832), (256, 256)
NUM_FRAMES = 17
# Package, and files within it. They are looked for, not required.
PHOTOS = (
    ("skimage", ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png"), "data"),
    ("sklearn", ("china.jpg", "flower.jpg"), "datasets/images"),
)
NANO_SEEDS = range(1001, 1007)


class Subject(NamedTuple):
    """A clip to be marked; `make` gives its frames, uint8 `[n, H, W, 3]`."""

    name: str
    group: str
    make: Callable[[], np.ndarray]


def subjects() -> Iterator[Subject]:
    """Those that every machine has, then the photographs that are found."""
    for seed in NANO_SEEDS:
        yield Subject(f"nano scene {seed}", "nano", partial(scene, seed))
    for group, size in (("832x480", LARGE), ("256x256", SMALL)):
        for name, make in (("clouds", clouds), ("white noise", noise), ("gradient", gradient)):
            yield Subject(f"{name} {group}", group, partial(make, *size))
        for path in photos():
            yield Subject(f"{path.stem} {group}", group, partial(moving, path, *size))
        for path in photos()[2:4]:
            yield Subject(f"{path.stem} still {group}", group, partial(still, path, *size))
        for path in photos()[:1]:
            yield Subject(f"{path.stem} dark {group}", group, partial(dark, path, *size))
    yield Subject("black 832x480", "cannot carry", partial(flat, 0, *LARGE))
    yield Subject("one grey 832x480", "cannot carry", partial(flat, 128, *LARGE))


@cache
def photos() -> list[Path]:
    """What installed packages bring along."""
    found = []
    for package, names, folder in PHOTOS:
        spec = find_spec(package)
        for root in [] if spec is None else list(spec.submodule_search_locations or []):
            found += [path for name in names if (path := Path(root, folder, name)).is_file()]
    if not found:
        print("no photographs: neither skimage nor sklearn is installed", file=sys.stderr)
    return found


def scene(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return render(sample(rng).scene, rng=rng)


def moving(path: Path, height: int, width: int, num_frames: int = NUM_FRAMES) -> np.ndarray:
    """A camera that pans over a photograph and draws nearer by 15 %."""
    picture = load_image(path)[None]
    rows, columns = picture.shape[-2:]
    cover = min(columns / width, rows / height)  # of the photograph, at no zoom
    frames = []
    for step in np.linspace(0, 1, num_frames):
        zoom = 0.85 / (1 + 0.15 * step)
        x, y = (size * cover / full * zoom for size, full in ((width, columns), (height, rows)))
        shift = (1 - x) * (0.6 * step - 0.3), (1 - y) * (0.2 - 0.4 * step)
        view = torch.tensor([[[x, 0, shift[0]], [0, y, shift[1]]]])
        grid = F.affine_grid(view.float(), [1, 3, height, width], align_corners=False)
        frames.append(F.grid_sample(picture, grid, "bicubic", "reflection", align_corners=False))
    return to_uint8(torch.stack(frames, 2).clamp(-1, 1), nearest=True).numpy()


def still(path: Path, height: int, width: int) -> np.ndarray:
    return np.repeat(moving(path, height, width, 1), NUM_FRAMES, 0)


def dark(path: Path, height: int, width: int) -> np.ndarray:
    """An eighth of the brightness."""
    return moving(path, height, width) // 8


def clouds(height: int, width: int) -> np.ndarray:
    """Coloured noise of spectrum 1/f that drifts by two pixels a frame."""
    rng = np.random.default_rng(77)
    far = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    far[0, 0] = math.inf
    planes = [
        np.fft.irfft2(np.fft.rfft2(rng.standard_normal((height, width))) / far, s=(height, width))
        for _ in range(3)
    ]
    picture = np.stack([128 + 40 * plane / plane.std() for plane in planes], 2)
    picture = picture.clip(0, 255).astype(np.uint8)
    return np.stack([np.roll(picture, 2 * i, 1) for i in range(NUM_FRAMES)])


def noise(height: int, width: int) -> np.ndarray:
    """Other noise in each frame, smoothed by 2 x 2."""
    rng = np.random.default_rng(78)
    fine = rng.integers(0, 256, (NUM_FRAMES, height + 1, width + 1, 3)).astype(np.uint16)
    rows = fine[:, 1:] + fine[:, :-1]
    return ((rows[:, :, 1:] + rows[:, :, :-1]) // 4).astype(np.uint8)


def gradient(height: int, width: int) -> np.ndarray:
    """Sky-like, from one colour to another, that turns slowly."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    ends = np.array([[40, 90, 200], [230, 200, 150]])
    frames = []
    for angle in np.linspace(0.2, 0.6, NUM_FRAMES):
        along = (x * np.sin(angle) + y * np.cos(angle))[..., None]
        frames.append((ends[0] + (ends[1] - ends[0]) * along).clip(0, 255).astype(np.uint8))
    return np.stack(frames)


def flat(level: int, height: int, width: int) -> np.ndarray:
    return np.full((NUM_FRAMES, height, width, 3), level, np.uint8)
