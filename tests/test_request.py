"""What a request becomes: the reference's defaults for every model, and what it refuses."""

from typing import Any

import pytest

from wanrt.config import MODELS, GenerateConfig
from wanrt.errors import UsageError
from wanrt.request import Request, resolve

PICTURE = {"image": "a.png"}
PICTURES = {"image": "a.png", "last_image": "b.png"}
T2V, I2V, FLF2V = "wan2.1-t2v-1.3b", "wan2.1-i2v-14b-480p", "wan2.1-flf2v-14b-720p"
VACE, T2V_A14B, I2V_A14B = "wan2.1-vace-1.3b", "wan2.2-t2v-a14b", "wan2.2-i2v-a14b"
TI2V = "wan2.2-ti2v-5b"


def ask(model: str, **settings: Any) -> Request:
    return resolve(GenerateConfig("a cat", **settings), MODELS[model])


@pytest.mark.parametrize(
    ("model", "inputs", "steps", "shift", "guidance", "frames", "fps", "size"),
    [  # Wan2.1 @9737cba generate.py and wan/configs, Wan2.2 @42bf4cf wan/configs
        (T2V, {}, 50, 5.0, (5.0, None), 81, 16, (832, 480)),
        ("wan2.1-t2v-14b", {}, 50, 5.0, (5.0, None), 81, 16, (1280, 720)),
        (I2V, PICTURE, 40, 3.0, (5.0, None), 81, 16, (832, 480)),
        ("wan2.1-i2v-14b-720p", PICTURE, 40, 5.0, (5.0, None), 81, 16, (1280, 720)),
        (FLF2V, PICTURES, 50, 16.0, (5.0, None), 81, 16, (1280, 720)),
        (VACE, {}, 50, 16.0, (5.0, None), 81, 16, (832, 480)),
        ("wan2.1-vace-14b", {}, 50, 16.0, (5.0, None), 81, 16, (1280, 720)),
        (T2V_A14B, {}, 40, 12.0, (4.0, 3.0), 81, 16, (1280, 720)),
        (I2V_A14B, PICTURE, 40, 5.0, (3.5, 3.5), 81, 16, (1280, 720)),
        (TI2V, {}, 50, 5.0, (5.0, None), 121, 24, (1280, 704)),
        (TI2V, PICTURE, 50, 5.0, (5.0, None), 121, 24, (1280, 704)),
    ],
)
def test_defaults_are_the_references(
    model: str,
    inputs: dict[str, str],
    steps: int,
    shift: float,
    guidance: tuple[float, float | None],
    frames: int,
    fps: int,
    size: tuple[int, int],
) -> None:
    request = ask(model, **inputs)
    assert (request.num_steps, request.flow_shift, request.num_frames) == (steps, shift, frames)
    assert (request.guidance, request.guidance_low) == guidance
    assert (request.fps, (request.width, request.height)) == (fps, size)
    assert request.solver == "unipc" and request.guided


@pytest.mark.parametrize(
    ("model", "size", "shift"),
    [
        (I2V, (1280, 720), 5.0),
        ("wan2.1-i2v-14b-720p", (832, 480), 3.0),
        ("wan2.1-i2v-14b-720p", (480, 832), 3.0),
        (I2V_A14B, (832, 480), 5.0),
    ],
)
def test_the_area_decides_the_shift_of_wan21_image_to_video(
    model: str, size: tuple[int, int], shift: float
) -> None:
    sized = PICTURE | {"width": size[0], "height": size[1]}
    assert ask(model, **sized).flow_shift == shift
    assert ask(model, **sized, flow_shift=7.0).flow_shift == 7.0


@pytest.mark.parametrize(
    ("model", "inputs", "task"),
    [
        (T2V, {}, "t2v"),
        (T2V, {"num_frames": 1}, "t2i"),
        (T2V, {"task": "t2i"}, "t2i"),
        (T2V, {"task": "t2v", "num_frames": 1}, "t2i"),
        (TI2V, {}, "t2v"),
        (TI2V, PICTURE, "i2v"),
        (TI2V, PICTURE | {"num_frames": 1}, "i2v"),
        (I2V, PICTURE, "i2v"),
        (FLF2V, PICTURES, "flf2v"),
        (VACE, {}, "vace"),
        (VACE, {"task": "t2v"}, "vace"),
        (VACE, {"refs": ("a.png",), "num_frames": 1}, "vace"),
    ],
)
def test_task(model: str, inputs: dict[str, Any], task: str) -> None:
    request = ask(model, **inputs)
    assert request.task == task
    if task == "t2i":
        assert request.num_frames == 1


@pytest.mark.parametrize(
    ("model", "inputs", "start"),
    [
        (T2V, {}, "色调艳丽，过曝"),
        (T2V_A14B, {}, "色调艳丽，过曝"),
        (I2V, PICTURE, "镜头晃动，色调艳丽，过曝"),
        (I2V_A14B, PICTURE, "色调艳丽，过曝"),
        (FLF2V, PICTURES, "镜头切换，镜头晃动，色调艳丽，过曝"),
        (VACE, {}, "色调艳丽，过曝"),
        (TI2V, PICTURE, "色调艳丽，过曝"),
    ],
)
def test_negative_prompt(model: str, inputs: dict[str, str], start: str) -> None:
    """The reference's where nothing is said; "" is nothing, which the reference cannot express."""
    default = ask(model, **inputs)
    assert default.negative.startswith(start) and default.negative.endswith("背景人很多，倒着走")
    assert default.prompts == ("a cat", default.negative)
    assert ask(model, **inputs, negative="").negative == ""
    assert ask(model, **inputs, negative="a dog").negative == "a dog"


def test_nano_has_no_negative_prompt() -> None:
    assert ask("nano").negative == ""


@pytest.mark.parametrize(
    ("settings", "guidance", "prompts"),
    [
        ({}, (4.0, 3.0), 2),
        ({"guidance": 6.0}, (6.0, 6.0), 2),
        ({"guidance_low": 2.0}, (4.0, 2.0), 2),
        ({"guidance": 1.0}, (1.0, 1.0), 1),
        ({"guidance": 1.0, "guidance_low": 2.0}, (1.0, 2.0), 2),
        ({"distilled": True}, (1.0, 1.0), 1),
        ({"distilled": True, "guidance": 3.0}, (3.0, 3.0), 2),
        ({"distilled": True, "guidance_low": 3.0}, (1.0, 3.0), 2),
    ],
)
def test_guidance_of_two_experts(
    settings: dict[str, Any], guidance: tuple[float, float], prompts: int
) -> None:
    request = ask(T2V_A14B, **settings)
    assert (request.guidance, request.guidance_low) == guidance
    assert len(request.prompts) == prompts


@pytest.mark.parametrize("model", [T2V, T2V_A14B])
def test_distilled(model: str) -> None:
    request = ask(model, distilled=True)
    assert (request.num_steps, request.guidance, request.flow_shift) == (4, 1.0, 5.0)
    assert request.solver == "euler" and not request.guided
    own = ask(model, distilled=True, num_steps=8, flow_shift=3.0)
    assert (own.num_steps, own.flow_shift) == (8, 3.0)
    assert ask(I2V, **PICTURE, distilled=True).flow_shift == 5.0


@pytest.mark.parametrize(
    ("model", "settings", "reason"),
    [
        (T2V, {"image": "a.png"}, "takes no --image"),
        (T2V, {"refs": ("a.png",)}, "takes no --ref"),
        (T2V, {"outpaint": "left"}, "takes no --outpaint"),
        (T2V, {"extend": "after"}, "takes no --extend"),
        (T2V, {"mask": "a.png"}, "takes no --mask"),
        (T2V, {"guidance_low": 2.0}, "--guidance-low is for two-expert models"),
        (T2V, {"task": "i2v"}, "task 'i2v' is not what"),
        (T2V, {"task": "t2i", "num_frames": 5}, "makes one image, not 5 frames"),
        (T2V, {"width": 0}, "width is 0"),
        (T2V, {"negative": "a\0"}, "NUL"),
        (T2V, {"solver": "heun"}, "solver 'heun' does not exist"),
        (T2V, {"noise": "gpu"}, "noise 'gpu' does not exist"),
        (T2V, {"task": "t2a"}, "task 't2a' does not exist; choose auto, t2v"),
        (VACE, {"extend": "sideways"}, "extend 'sideways' does not exist; choose after, before"),
        (T2V, {"context_scale": float("nan")}, "context scale is nan"),
        (T2V, {"seed": 1.5}, "seed is 1.5; it must be a whole number"),
        (I2V, {}, "needs --image"),
        (I2V, PICTURES, "takes no --last-image"),
        (I2V, {"last_image": "a.png"}, "needs --image"),
        (FLF2V, PICTURE, "needs --last-image"),
        (FLF2V, PICTURES | {"num_frames": 1}, "must be 5 or more"),
        (TI2V, {"width": 48, "height": 64}, "multiples of 32"),
        (TI2V, PICTURES, "takes no --last-image"),
    ],
)
def test_contradictions(model: str, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        ask(model, **settings)
