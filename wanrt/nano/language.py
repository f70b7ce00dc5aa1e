"""The language of nano: the words a prompt may use, their RGB values, and what is held out."""

import hashlib
import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from wanrt.errors import UsageError

Rgb = tuple[int, int, int]

# The RGB table. Any two values that can share a clip are at least 100 apart (Euclidean, of 441).
COLORS: dict[str, Rgb] = {
    "red": (222, 24, 36),
    "green": (30, 170, 60),
    "blue": (40, 90, 250),
    "yellow": (252, 230, 36),
    "purple": (160, 40, 205),
    "orange": (255, 126, 8),
    "cyan": (40, 215, 230),
    "white": (246, 246, 246),
}
BACKGROUNDS: dict[str, Rgb] = {
    "black": (8, 8, 8),
    "gray": (106, 106, 106),
    "navy": (12, 18, 82),
    "sand": (194, 170, 125),
}
SIZES = ("small", "large")
SHAPES = ("circle", "square", "triangle", "star", "ring")
DIRECTIONS = ("left", "right", "up", "down")
MOTIONS = (*(f"moving {d}" for d in DIRECTIONS), "bouncing", "moving in a circle")

GRAMMAR = (
    f"a [{'|'.join(SIZES)}] {{{','.join(COLORS)}}} {{{','.join(SHAPES)}}} "
    f"{{{','.join(MOTIONS)}}} [on a {{{','.join(BACKGROUNDS)}}} background]"
)
HELD_OUT_SHARE = 0.25


def _words(name: str, words: tuple[str, ...]) -> str:
    return rf"(?:(?P<{name}>{'|'.join(words)})\b\s*)?"


_PROMPT = re.compile(
    r"(?:an?\b\s*)?"
    + _words("size", SIZES)
    + _words("color", tuple(COLORS))
    + rf"(?:(?:(?P<shape>{'|'.join(SHAPES)})|shape)\b\s*)?"
    + _words("motion", MOTIONS)
    + rf"(?:on (?:an? )?(?P<background>{'|'.join(BACKGROUNDS)}) background)?"
)


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for, or what a clip shows; None is an attribute that was not given."""

    color: str | None = None
    shape: str | None = None
    motion: str | None = None
    size: str | None = None
    background: str | None = None

    @property
    def concrete(self) -> bool:
        """Whether every attribute has a value, so that the scene can be rendered."""
        return all(getattr(self, f.name) is not None for f in fields(self))

    def caption(self) -> str:
        """The canonical prompt; an omitted shape is called "shape", so that a noun remains."""
        words = [w for w in (self.size, self.color, self.shape or "shape", self.motion) if w]
        article = "an" if words[0][0] in "aeiou" else "a"
        end = f" on a {self.background} background" if self.background else ""
        return f"{article} {' '.join(words)}{end}"

    def without(self, *names: str) -> "Scene":
        """The same scene with the named attributes not given."""
        return replace(self, **dict.fromkeys(names))


ATTRIBUTES = tuple(f.name for f in fields(Scene))


def parse(prompt: str) -> Scene:
    """Read the attributes that a prompt of the language gives; case and final stop do not matter.

    Raises UsageError for a prompt with anything else in it. The model itself takes any text.
    """
    text = " ".join(prompt.lower().rstrip(". ").split())
    match = _PROMPT.fullmatch(text)
    if match is None:
        raise UsageError(f"{prompt!r} is not in nano's language; write: {GRAMMAR}")
    return Scene(**match.groupdict())


def combinations() -> Iterator[Scene]:
    """Every concrete scene of the language, in a fixed order."""
    for values in itertools.product(COLORS, SHAPES, MOTIONS, SIZES, BACKGROUNDS):
        yield Scene(*values)


def held_out(scene: Scene) -> bool:
    """Whether a concrete scene is kept out of training: by the sha256 of its caption."""
    assert scene.concrete, f"{scene=}"
    digest = hashlib.sha256(scene.caption().encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def held_out_prompts(n: int, seed: int = 0) -> list[Scene]:
    """n distinct held-out scenes; those of a smaller n and the same seed are the first of them."""
    scenes = [scene for scene in combinations() if held_out(scene)]
    if n > len(scenes):
        raise UsageError(f"{n} held-out prompts asked, the language has {len(scenes)}")
    return random.Random(seed).sample(scenes, len(scenes))[:n]
