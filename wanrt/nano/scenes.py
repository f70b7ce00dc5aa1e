"""Procedural clips of nano's language: one antialiased shape that moves over a plain background.

Lengths are fractions of the frame side; a motion takes `span` frames whatever the frame rate.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from wanrt.nano import language
from wanrt.nano.language import ATTRIBUTES, BACKGROUNDS, COLORS, MOTIONS, SHAPES, SIZES, Scene

RADIUS = {"small": 0.125, "large": 0.18}
RADIUS_JITTER = 0.04
MARGIN = 0.012  # kept free between the object and the frame's edge
SQUARE, TRIANGLE, STAR, STAR_NOTCH, RING_HOLE = 0.88, 1.25, 1.25, 0.382, 0.5

DROP_SOME, DROP_EACH = 0.5, 0.35  # captions that omit something; chance of each attribute in them
DROP_ARTICLE, PLAIN_ARTICLE = 0.1, 0.3  # captions without an article; "an" written as "a"


class Sample(NamedTuple):
    """A concrete scene to render and a caption of it that may omit attributes."""

    scene: Scene
    caption: str


class Extent(NamedTuple):
    """How far a shape of radius 1 reaches from its centre."""

    side: float
    up: float
    down: float


EXTENTS = {
    "circle": Extent(1.0, 1.0, 1.0),
    "square": Extent(SQUARE, SQUARE, SQUARE),
    "triangle": Extent(TRIANGLE * 3**0.5 / 2, TRIANGLE, TRIANGLE / 2),
    "star": Extent(STAR * np.sin(np.pi * 0.4), STAR, STAR * np.cos(np.pi * 0.2)),
    "ring": Extent(1.0, 1.0, 1.0),
}


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 1


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - np.float32(SQUARE)


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    slope = np.abs(x) * np.float32(3**0.5 / 2) - y * np.float32(0.5)
    edges = np.maximum(y, slope) - np.float32(TRIANGLE / 2)
    return np.maximum(edges, np.hypot(x, y) - np.float32(TRIANGLE))


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Fold the plane into half a point of the star, where one straight edge is left."""
    fifth = np.float32(0.4 * np.pi)
    angle = np.arctan2(x, -y)
    angle -= fifth * np.round(angle / fifth)
    radius = np.hypot(x, y)
    fold_x, fold_y = radius * np.abs(np.sin(angle)), radius * np.cos(angle)
    notch = STAR * STAR_NOTCH
    edge_x, edge_y = notch * np.sin(np.pi / 5), notch * np.cos(np.pi / 5) - STAR
    length = np.hypot(edge_x, edge_y)
    edge = fold_x * np.float32(-edge_y / length) + (fold_y - STAR) * np.float32(edge_x / length)
    return np.maximum(edge, radius - np.float32(STAR))


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    middle, half = np.float32((1 + RING_HOLE) / 2), np.float32((1 - RING_HOLE) / 2)
    return np.abs(np.hypot(x, y) - middle) - half


# Signed distances of shapes of radius 1 (negative inside; x to the right, y down). Where edges
# meet in a point, the enclosing circle keeps the smoothed edge from running past it.
DISTANCES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
}


class _Room(NamedTuple):
    """The box in which the centre of an object may lie so that it stays fully visible."""

    left: float
    right: float
    top: float
    bottom: float

    def point(self, rng: np.random.Generator) -> tuple[float, float]:
        return rng.uniform(self.left, self.right), rng.uniform(self.top, self.bottom)


def _room(shape: str, radius: float) -> _Room:
    extent = EXTENTS[shape]
    side = extent.side * radius + MARGIN
    return _Room(side, 1 - side, extent.up * radius + MARGIN, 1 - extent.down * radius - MARGIN)


def _line(direction: str, room: _Room, u: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    x, y = room.point(rng)
    sideways = direction in ("left", "right")
    low, high = (room.left, room.right) if sideways else (room.top, room.bottom)
    travel = rng.uniform(0.45, min(0.62, high - low))
    start = rng.uniform(low, high - travel)
    along = start + travel * (u if direction in ("right", "down") else 1 - u)
    return np.stack([along, 0 * u + y] if sideways else [0 * u + x, along], 1)


def _bounce(room: _Room, u: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    x, _ = room.point(rng)
    drift = rng.uniform(-0.06, 0.06)
    x = np.clip(x, room.left + abs(drift), room.right - abs(drift))
    height = rng.uniform(0.32, min(0.44, room.bottom - room.top))
    floor = rng.uniform(room.top + height, room.bottom)
    phase = (rng.uniform(1.5, 2.1) * u + rng.uniform(0, 1)) % 1
    return np.stack([x + drift * (u - 0.5), floor - height * 4 * phase * (1 - phase)], 1)


def _orbit(room: _Room, u: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    reach = min(room.right - room.left, room.bottom - room.top) / 2
    radius = rng.uniform(0.15, min(0.23, reach))
    slack = min(0.08, reach - radius)
    x = (room.left + room.right) / 2 + rng.uniform(-slack, slack)
    y = (room.top + room.bottom) / 2 + rng.uniform(-slack, slack)
    start = rng.uniform(-0.3, -0.2)  # of a turn: about at the top, then clockwise
    angle = 2 * np.pi * (start + rng.uniform(0.85, 1) * u)
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], 1)


def _track(scene: Scene, radius: float, u: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Centres [F, 2] (x, y) at the times u, where the whole motion takes u from 0 to 1."""
    room = _room(scene.shape, radius)
    if scene.motion == "bouncing":
        return _bounce(room, u, rng)
    if scene.motion == "moving in a circle":
        return _orbit(room, u, rng)
    return _line(scene.motion.removeprefix("moving "), room, u, rng)


def render(
    scene: Scene,
    num_frames: int = 33,
    size: int = 96,
    rng: np.random.Generator | None = None,
    span: int | None = None,
    start: int = 0,
) -> np.ndarray:
    """Draw a concrete scene: uint8 [F, size, size, 3], sRGB.

    The rng chooses radius, place and pace, alike for every num_frames, size and start; without
    one they are those of seed 0. The motion takes `span` frames (num_frames if not given) and
    the clip shows num_frames of them from frame `start`, so that a crop in time costs only its
    own frames.
    """
    assert scene.concrete, f"{scene=}"
    rng = np.random.default_rng(0) if rng is None else rng
    span = num_frames if span is None else span
    radius = RADIUS[scene.size] * rng.uniform(1 - RADIUS_JITTER, 1 + RADIUS_JITTER)
    u = (start + np.arange(num_frames)) / max(span - 1, 1)
    centres = _track(scene, radius, u, rng) * size - 0.5  # [F, 2] in pixel indices
    return _draw(scene, radius * size, centres, size)


def _draw(scene: Scene, radius: float, centres: np.ndarray, size: int) -> np.ndarray:
    """Shade only a patch around the object in each frame; radius and centres are in pixels."""
    half = int(np.ceil(radius * max(max(e) for e in EXTENTS.values()))) + 2
    corners = np.round(centres).astype(int) - half  # [F, 2]
    steps = np.arange(2 * half + 1)
    x, y = (((corners[:, i, None] + steps) - centres[:, i, None]) / radius for i in (0, 1))
    x, y = np.broadcast_arrays(x[:, None, :].astype(np.float32), y[:, :, None].astype(np.float32))
    coverage = np.clip(0.5 - DISTANCES[scene.shape](x, y) * np.float32(radius), 0, 1)  # [F, P, P]

    ground = np.array(BACKGROUNDS[scene.background], np.float32)
    paint = np.array(COLORS[scene.color], np.float32) - ground
    patch = (coverage[..., None] * paint + (ground + 0.5)).astype(np.uint8)  # [F, P, P, 3]
    side = size + 2 * half
    canvas = np.empty((len(centres), side, side, 3), np.uint8)
    canvas[:] = ground.astype(np.uint8)
    for frame, pixels, (left, top) in zip(canvas, patch, corners + half, strict=True):
        frame[top : top + len(steps), left : left + len(steps)] = pixels
    return np.ascontiguousarray(canvas[:, half:-half, half:-half])


def sample(rng: np.random.Generator, held_out: bool = False) -> Sample:
    """Draw a training scene (or a held-out one) and a caption of some of its attributes.

    Held out is decided on the concrete scene, so an omission never leaks a held-out combination.
    """
    while True:
        values = (rng.choice(w) for w in (list(COLORS), SHAPES, MOTIONS, SIZES, list(BACKGROUNDS)))
        scene = Scene(*map(str, values))
        if language.held_out(scene) == held_out:
            return Sample(scene, loose_caption(scene, rng))


def loose_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Some attributes and sometimes the article left out, as people write."""
    if rng.random() < DROP_SOME:
        scene = scene.without(*(a for a in ATTRIBUTES if rng.random() < DROP_EACH))
    caption = scene.caption()
    if rng.random() < DROP_ARTICLE:
        return caption.split(" ", 1)[1]
    if rng.random() < PLAIN_ARTICLE:
        return caption.replace("an ", "a ", 1) if caption.startswith("an ") else caption
    return caption
