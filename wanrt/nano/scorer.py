"""Reads a clip back: colour, shape, size, motion and background from the pixels alone.

The scorer knows the language and the outlines of the shapes, and nothing of any model, prompt or
track. It tells the object from the background, averages the object over its own track, compares
that average with the five shapes at every radius, and classifies the track of its centre.
What cannot be read with some certainty is None, which agrees with no prompt.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from wanrt.nano.language import BACKGROUNDS, COLORS, SHAPES, Rgb, Scene
from wanrt.nano.scenes import DISTANCES, RADIUS

MIN_CONTRAST = 50.0  # RGB distance of object and background below which there is no object
MAX_COLOR_ERROR, MAX_BACKGROUND_ERROR = 80.0, 60.0  # RGB distance to the nearest of the table
BORDER = 0.06  # width of the frame's border that shows the background, as a share of the side
WINDOW = 0.27  # half the side of the window around an object, as a share of the frame's side
EDGE_BLUR = 0.8  # pixels; softness of the templates' edges, between a rendered and a decoded one
RADII = np.geomspace(0.05, 0.27, 48)
MIN_OVERLAP = 0.6  # of the averaged object and the best template
MAX_STRAYS = 0.2  # share of the foreground that may lie away from the object
MIN_PRESENT = 0.85  # share of the frames in which the object must be seen


class Reading(NamedTuple):
    """What a clip shows, in the words of the language; None is an attribute not readable."""

    color: str | None = None
    shape: str | None = None
    size: str | None = None
    motion: str | None = None
    background: str | None = None


class Agreement(NamedTuple):
    """Per attribute: does the clip show what the prompt gives; None where it gives nothing."""

    color: bool | None
    shape: bool | None
    size: bool | None
    motion: bool | None
    background: bool | None

    @property
    def all(self) -> bool:
        return False not in self


class Track(NamedTuple):
    """Centres of the object in the frames where it is seen, as fractions of the frame."""

    times: np.ndarray  # [N], 0 at the first frame and 1 at the last
    centres: np.ndarray  # [N, 2] (x, y), y down


def score(frames: np.ndarray) -> Reading:
    """Read a square clip, uint8 [F, S, S, 3]. Cost: about 12 ms for 33 frames of 96x96."""
    assert frames.ndim == 4 and frames.shape[1] == frames.shape[2], f"{frames.shape=}"
    pixels = frames.astype(np.float32)
    grounds = _border_colors(pixels)  # [F, 3]
    ground = np.median(grounds, 0)
    background = _nearest(ground, BACKGROUNDS, MAX_BACKGROUND_ERROR)
    offsets = pixels - grounds[:, None, None]  # [F, S, S, 3]
    distance = np.linalg.norm(offsets, axis=-1)  # [F, S, S]
    contrast = np.percentile(distance, 99)
    if contrast < MIN_CONTRAST:
        return Reading(background=background)
    paint = np.median(offsets[distance > 0.8 * contrast], 0)
    color = _nearest(ground + paint, COLORS, MAX_COLOR_ERROR)

    alpha = np.clip(offsets @ (paint / (paint @ paint)), 0, 1)  # [F, S, S]
    alpha[alpha < 0.3] = 0
    near = _windows(alpha)  # [F, S, S]
    mass = (alpha * near).sum((1, 2))
    seen = mass > 0.4 * np.median(mass)
    if seen.mean() < MIN_PRESENT or _strays(distance > 0.6 * contrast, near) > MAX_STRAYS:
        return Reading(color=color, background=background)
    centres = _centres(alpha * near)  # [F, 2] in pixels
    shape, size = _shape_and_size(_average_object(alpha[seen], centres[seen]), frames.shape[1])
    times = np.linspace(0, 1, len(frames))[seen]
    motion = _motion(Track(times, (centres[seen] + 0.5) / frames.shape[1]))
    return Reading(color, shape, size, motion, background)


def agreement(scene: Scene, reading: Reading) -> Agreement:
    """Compare a clip's reading with the attributes that a prompt gives."""
    asked = (getattr(scene, name) for name in Agreement._fields)
    return Agreement(*(None if a is None else a == r for a, r in zip(asked, reading, strict=True)))


def _nearest(rgb: np.ndarray, table: dict[str, Rgb], limit: float) -> str | None:
    errors = {name: float(np.linalg.norm(rgb - np.array(value))) for name, value in table.items()}
    best = min(errors, key=errors.__getitem__)
    return best if errors[best] <= limit else None


def _border_colors(pixels: np.ndarray) -> np.ndarray:
    """The median colour of each frame's border, [F, 3]; the object covers little of it."""
    w = max(1, round(BORDER * pixels.shape[1]))
    sides = (pixels[:, :w], pixels[:, -w:], pixels[:, w:-w, :w], pixels[:, w:-w, -w:])
    return np.median(np.concatenate([s.reshape(len(pixels), -1, 3) for s in sides], 1), 1)


def _windows(alpha: np.ndarray) -> np.ndarray:
    """Where each frame may show the object: around the medians of its columns and rows."""
    places = np.arange(alpha.shape[1])
    near = np.ones(alpha.shape, bool)
    for axis in (1, 2):
        share = np.cumsum(alpha.sum(axis), 1)  # [F, S]
        median = (share < 0.5 * share[:, -1:]).sum(1)
        inside = np.abs(places - median[:, None]) <= WINDOW * len(places)  # [F, S]
        near &= np.expand_dims(inside, axis)
    return near


def _strays(differs: np.ndarray, near: np.ndarray) -> float:
    """The share of the pixels unlike the background that lie outside the object's window."""
    return float((differs & ~near).sum() / max(differs.sum(), 1))


def _centres(alpha: np.ndarray) -> np.ndarray:
    """Centres of mass [F, 2] (x, y) in pixels."""
    places = np.arange(alpha.shape[1])
    mass = np.maximum(alpha.sum((1, 2)), 1e-6)
    return np.stack([alpha.sum(axis) @ places / mass for axis in (1, 2)], 1)


def _average_object(alpha: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The object seen from its own centre, averaged over the frames: [P, P], bilinear."""
    half = round(WINDOW * alpha.shape[1])
    padded = np.pad(alpha, ((0, 0), (half + 1, half + 1), (half + 1, half + 1)))
    corners = np.floor(centres).astype(int)
    span = 2 * half + 2
    total = np.zeros((span - 1, span - 1), np.float32)
    for frame, (left, top), (dx, dy) in zip(padded, corners, centres - corners, strict=True):
        patch = frame[top + 1 : top + 1 + span, left + 1 : left + 1 + span]
        patch = (1 - dy) * patch[:-1] + dy * patch[1:]
        total += (1 - dx) * patch[:, :-1] + dx * patch[:, 1:]
    return total / len(alpha)


@lru_cache(maxsize=4)
def _templates(side: int) -> np.ndarray:
    """Every shape at every radius in a frame of this side, [len(SHAPES), len(RADII), P, P]."""
    half = round(WINDOW * side)
    steps = np.arange(-half, half + 1, dtype=np.float32)
    pixels = (RADII * side).astype(np.float32)[:, None, None]
    x, y = np.broadcast_arrays(steps[None, None, :] / pixels, steps[None, :, None] / pixels)
    slope = 1 / (1 + 2 * EDGE_BLUR)
    return np.stack([np.clip(0.5 - DISTANCES[s](x, y) * pixels * slope, 0, 1) for s in SHAPES])


def _shape_and_size(average: np.ndarray, side: int) -> tuple[str | None, str | None]:
    """The template with the greatest overlap; its radius decides the size (on a log scale)."""
    templates = _templates(side)
    overlap = np.minimum(templates, average).sum((2, 3)) / np.maximum(templates, average).sum(
        (2, 3)
    )
    best, radius = np.unravel_index(np.argmax(overlap), overlap.shape)
    if overlap[best, radius] < MIN_OVERLAP:
        return None, None
    size = min(RADIUS, key=lambda name: abs(np.log(RADII[radius] / RADIUS[name])))
    return SHAPES[best], size


def _motion(track: Track) -> str | None:
    """Classify a track: a line, else up and down on a floor, else once around."""
    if len(track.times) < 3 or np.ptp(track.centres, 0).max() < 0.2:
        return None
    return _line(track) or _bounce(track) or _circle(track)


def _line(track: Track) -> str | None:
    """Steady motion along one axis, mostly."""
    slope, start = np.polyfit(track.times, track.centres, 1)  # [2], [2]
    residual = track.centres - (start + track.times[:, None] * slope)
    travel = np.abs(slope).max()
    if travel < 0.2 or np.sqrt((residual**2).sum(1).mean()) > 0.12 * travel:
        return None
    along = int(np.argmax(np.abs(slope)))
    if abs(slope[1 - along]) > 0.5 * travel:
        return None
    return "moving " + (("left", "right"), ("up", "down"))[along][int(slope[along] > 0)]


def _bounce(track: Track) -> str | None:
    """Up and down at least one and a half times, longest near the top, with little drift."""
    x, y = track.centres.T
    height = np.ptp(y)
    if np.ptp(x) > 0.45 * height or _turns(y, 0.4 * height) < 2:
        return None
    return "bouncing" if (y.max() - y.mean()) > 0.48 * height else None


def _turns(values: np.ndarray, least: float) -> int:
    """How often a sequence changes its direction, ignoring changes smaller than `least`."""
    turns, direction, extreme = 0, 0, values[0]
    for value in values[1:]:
        if (value - extreme) * direction > 0 or (direction == 0 and abs(value - extreme) < least):
            extreme = value if direction else extreme
        elif abs(value - extreme) >= least:
            turns += direction != 0
            direction, extreme = int(np.sign(value - extreme)), value
    return turns


def _circle(track: Track) -> str | None:
    """Most of one turn around a centre at a steady distance (algebraic circle fit)."""
    x, y = track.centres.T
    if min(np.ptp(x), np.ptp(y)) < 0.6 * max(np.ptp(x), np.ptp(y)):
        return None
    system = np.stack([2 * x, 2 * y, np.ones_like(x)], 1)
    middle = np.linalg.lstsq(system, x**2 + y**2, rcond=None)[0][:2]
    arms = track.centres - middle
    radii = np.linalg.norm(arms, axis=1)
    turned = np.ptp(np.unwrap(np.arctan2(arms[:, 1], arms[:, 0])))
    steady = radii.std() < 0.2 * radii.mean()
    return "moving in a circle" if steady and turned > 1.5 * np.pi else None
