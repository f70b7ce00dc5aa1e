"""The settings that a request may have: each check returns the value or says what is legal."""

import math
from numbers import Integral, Real

from wanrt.errors import UsageError
from wanrt.tasks.sizes import Size

MAX_SIDE = 4096
MAX_ASPECT = 8
MAX_FRAMES = 4 * 1023 + 1  # the position table covers 1024 latent frames
MAX_STEPS = 1000  # as many as there are training timesteps
MAX_SEED = 2**63 - 1
RANDOM_SEED = -1


def check_size(width: int, height: int, multiple: int = 16) -> Size:
    """Width and height that the model takes: multiples of 16, of 32 for TI2V-5B."""
    legal = f"{multiple} to {MAX_SIDE // multiple * multiple}"
    for name, value in (("width", width), ("height", height)):
        _whole(name, value)
        if not multiple <= value <= MAX_SIDE:
            raise UsageError(f"{name} is {value}; it must be {legal} pixels")
    if width % multiple or height % multiple:
        near = Size(_nearest(height, multiple), _nearest(width, multiple))
        raise UsageError(
            f"size {width}x{height}: width and height must be multiples of {multiple} "
            f"(the nearest is {near})"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UsageError(
            f"size {width}x{height} is more than {MAX_ASPECT} times as long as it is wide "
            "(choose a less extreme shape)"
        )
    return Size(height, width)


def _nearest(value: int, multiple: int) -> int:
    largest = MAX_SIDE // multiple * multiple
    return min(max((value + multiple // 2) // multiple * multiple, multiple), largest)


def check_frames(num_frames: int, stride: int = 4) -> int:
    """A frame count of 4n+1; 1 is an image."""
    _whole("frames", num_frames)
    if not 1 <= num_frames <= MAX_FRAMES:
        raise UsageError(f"frames is {num_frames}; it must be 1 (an image) to {MAX_FRAMES}")
    if (num_frames - 1) % stride:
        below = (num_frames - 1) // stride * stride + 1
        raise UsageError(
            f"frames is {num_frames}; it must be {stride}n+1, and the nearest are "
            f"{below} and {below + stride} (--round takes the nearest)"
        )
    return num_frames


def round_frames(num_frames: int, stride: int = 4) -> int:
    """The legal frame count nearest to one in the range; the larger one in the middle."""
    _whole("frames", num_frames)
    if not 1 <= num_frames <= MAX_FRAMES:
        return check_frames(num_frames, stride)
    return (num_frames - 1 + stride // 2) // stride * stride + 1


def check_steps(num_steps: int) -> int:
    _whole("steps", num_steps)
    if not 1 <= num_steps <= MAX_STEPS:
        raise UsageError(f"steps is {num_steps}; it must be 1 to {MAX_STEPS}")
    return num_steps


def check_guidance(guidance: float) -> float:
    """1 switches guidance off; the reference's models use 3 to 6."""
    return _real("guidance", guidance, 0, 100)


def check_flow_shift(flow_shift: float) -> float:
    """The reference uses 3 to 16."""
    return _real("flow shift", flow_shift, 0.01, 100)


def check_context_scale(scale: float) -> float:
    """Strength of the VACE hints; 1 in the reference."""
    return _real("context scale", scale, -10, 10)


def check_fps(fps: float) -> float:
    return _real("fps", fps, 1, 240)


def check_seed(seed: int) -> int:
    """-1 asks for a random one."""
    _whole("seed", seed)
    if not RANDOM_SEED <= seed <= MAX_SEED:
        raise UsageError(
            f"seed is {seed}; it must be 0 to 2^63-1, or {RANDOM_SEED} for a random one"
        )
    return seed


def _whole(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise UsageError(f"{name} is {value!r}; it must be a whole number")


def _real(name: str, value: float, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UsageError(f"{name} is {value!r}; it must be a number")
    if not (math.isfinite(value) and low <= value <= high):
        raise UsageError(f"{name} is {value}; it must be {low} to {high}")
    return float(value)
