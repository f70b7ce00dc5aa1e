"""What a Pipeline promises: seeds, tensors in and out, what runs how often, what memory holds."""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from wanrt import components, pipeline, sampler
from wanrt.config import GenerateConfig
from wanrt.errors import FormatError, NumericsError, UsageError
from wanrt.media.image import to_uint8
from wanrt.media.video import probe_video
from wanrt.models.dit import WanDiT
from wanrt.models.layers import CrossAttention
from wanrt.models.umt5 import Umt5Encoder
from wanrt.pipeline import Pipeline, Step
from wanrt.tasks import i2v, vace
from wanrt.tasks.sizes import Size
from wanrt.weights.load import load_component

PROMPT, NEGATIVE = "a red circle moving right", "a blue square"
T2V, I2V, FLF2V, VACE = (
    *("wan2.1-t2v-1.3b", "wan2.1-i2v-14b-480p", "wan2.1-flf2v-14b-720p", "wan2.1-vace-1.3b"),
)
T2V_A14B, I2V_A14B, TI2V = "wan2.2-t2v-a14b", "wan2.2-i2v-a14b", "wan2.2-ti2v-5b"
SIZE = {"width": 48, "height": 32, "num_frames": 5}
SHORT = SIZE | {"num_steps": 2, "negative": NEGATIVE, "seed": 7}
SCHEDULE = {"num_steps": 4, "flow_shift": 5.0}  # t is 999, 937, 833, 624: two steps per expert


@dataclass
class Calls:
    """Which transformer ran at which t, and for how many blocks text was prepared."""

    steps: list[tuple[Tensor, Any]] = field(default_factory=list)
    prepared: int = 0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    seen = Calls()
    forward, prepare = WanDiT.forward, CrossAttention.prepare

    def counted_forward(self: WanDiT, latents: Tensor, t: Any, *args: Any, **extra: Any) -> Tensor:
        seen.steps.append((self.head.modulation, t))
        return forward(self, latents, t, *args, **extra)

    def counted_prepare(self: CrossAttention, *args: Any) -> Any:
        seen.prepared += 1
        return prepare(self, *args)

    monkeypatch.setattr(WanDiT, "forward", counted_forward)
    monkeypatch.setattr(CrossAttention, "prepare", counted_prepare)
    return seen


@dataclass
class Loads:
    """Every part that was loaded, in order, and which of them were alive when it was asked for."""

    kinds: list[str] = field(default_factory=list)
    before: list[list[str]] = field(default_factory=list)
    modules: list[weakref.ref[nn.Module]] = field(default_factory=list)

    def alive(self) -> list[str]:
        return [k for k, m in zip(self.kinds, self.modules, strict=True) if m() is not None]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Loads:
    seen = Loads()

    def recorded(path: Path, kind: str, **options: Any) -> nn.Module:
        seen.before.append(seen.alive())
        module = load_component(path, kind, **options)
        seen.kinds.append(kind)
        seen.modules.append(weakref.ref(module))
        return module

    monkeypatch.setattr(components, "load_component", recorded)
    return seen


@pytest.mark.parametrize(("model", "boundary"), [(T2V_A14B, 875), (I2V_A14B, 900)])
def test_experts_change_once_at_the_boundary(
    model: str, boundary: int, zoo: Any, files: Any, calls: Calls
) -> None:
    image = {"image": files["a.png"]} if model == I2V_A14B else {}
    settings = SHORT | {"num_steps": 8, "flow_shift": 5.0} | image
    zoo.open(model).generate(PROMPT, output="latents", **settings)
    weights = [
        load_component(zoo.path(model) / f"{noise}_noise_model", "dit").head.modulation
        for noise in ("high", "low")
    ]
    assert not torch.equal(*weights)
    timesteps = sampler.schedule("unipc", 8, 5.0).timesteps.tolist()
    wanted = [(0 if t >= boundary else 1, t) for t in timesteps for _ in range(2)]
    ran = [(0 if torch.equal(m, weights[0]) else 1, t) for m, t in calls.steps]
    assert ran == wanted and {expert for expert, _ in wanted} == {0, 1}
    assert calls.prepared == 2 * 2 * 2  # blocks, branches, experts


def test_text_is_prepared_once_however_many_steps(zoo: Any, calls: Calls) -> None:
    pipe = zoo.open(T2V)
    for num_steps in (1, 5):
        calls.prepared = 0
        pipe.generate(PROMPT, output="latents", **SHORT | {"num_steps": num_steps})
        assert calls.prepared == 2 * 2  # blocks, branches


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The ids of every text that was encoded."""
    seen: list[Tensor] = []
    begin = Umt5Encoder._begin

    def counted(self: Umt5Encoder, ids: Tensor, mask: Tensor) -> Tensor:
        seen.append(ids)
        return begin(self, ids, mask)

    monkeypatch.setattr(Umt5Encoder, "_begin", counted)
    return seen


def test_guidance_one_runs_one_branch(zoo: Any, calls: Calls, encoded: list[Tensor]) -> None:
    for guidance, branches in ((1.0, 1), (3.0, 2)):
        encoded.clear(), calls.steps.clear()
        zoo.open(T2V).generate(PROMPT, output="latents", **SHORT, guidance=guidance)
        assert len(calls.steps) == 2 * branches and len(encoded) == branches


def test_an_expert_at_guidance_one_runs_one_branch(zoo: Any, calls: Calls) -> None:
    settings = SHORT | SCHEDULE | {"guidance": 3.0, "guidance_low": 1.0}
    zoo.open(T2V_A14B).generate(PROMPT, output="latents", **settings)
    assert [t for _, t in calls.steps] == [999, 999, 937, 937, 833, 624]


def test_ti2v_holds_the_first_frame_and_tells_it_t_0(zoo: Any, files: Any, calls: Calls) -> None:
    pipe, seen = zoo.open(TI2V), []
    settings = SHORT | {"width": 64, "image": files["a.png"], "guidance": 1.0}
    latents = pipe.generate(PROMPT, output="latents", on_step=seen.append, **settings)
    vae = load_component(zoo.path(TI2V), "vae")
    first = i2v.ti2v_condition(files.picture, Size(32, 64), vae.encode)
    assert len(seen) == 2
    for x in (latents, *(step.latents for step in seen)):
        torch.testing.assert_close(x[:, :, :1], first, atol=1e-5, rtol=1e-5)
        assert torch.equal(x[:, :, :1], latents[:, :, :1])
    for (_, t), step in zip(calls.steps, seen, strict=True):
        assert t.tolist() == [[0.0] * 2 + [step.t] * 2]  # 1x2 tokens in each latent frame


def test_seeds(zoo: Any) -> None:
    pipe = zoo.open(T2V)
    one = pipe.generate(PROMPT, **SHORT)
    again = zoo.open(T2V).generate(PROMPT, **SHORT)
    other = pipe.generate(PROMPT, **SHORT | {"seed": 8})
    assert np.array_equal(one.np, again.np) and not np.array_equal(one.np, other.np)
    drawn = pipe.generate(PROMPT, **SHORT | {"seed": -1})
    assert drawn.settings["seed"] >= 0
    assert drawn.settings["seed"] != pipe.generate(PROMPT, **SHORT | {"seed": -1}).settings["seed"]
    repeated = pipe.generate(PROMPT, **SHORT | {"seed": drawn.settings["seed"]})
    assert np.array_equal(drawn.np, repeated.np)


def test_latents_go_in_and_out(zoo: Any) -> None:
    pipe = zoo.open(T2V)
    noise = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(7))
    before = noise.clone()
    latents = pipe.generate(PROMPT, output="latents", **SHORT)
    given = pipe.generate(PROMPT, output="latents", latents=noise, **SHORT | {"seed": 1})
    assert torch.equal(latents, given) and torch.equal(noise, before)
    with torch.inference_mode():
        frames = load_component(zoo.path(T2V), "vae").decode(latents, chunk=1)
    assert np.array_equal(pipe.generate(PROMPT, **SHORT).np, to_uint8(frames).numpy())
    with pytest.raises(
        UsageError, match=r"\[1, 16, 1, 4, 6\]; this request takes \[1, 16, 2, 4, 6\]"
    ):
        pipe.generate(PROMPT, latents=noise[:, :, :1], **SHORT)
    with pytest.raises(UsageError, match="'image'"):
        pipe.generate(PROMPT, output="image", **SHORT)


@torch.inference_mode()
def test_an_image_is_rounded_and_a_video_truncated(zoo: Any) -> None:
    """As the reference's two writers do."""
    pipe = zoo.open(T2V)
    vae = load_component(zoo.path(T2V), "vae")
    for num_frames in (1, 5):
        settings = SHORT | {"num_frames": num_frames}
        pixels = vae.decode(pipe.generate(PROMPT, output="latents", **settings), chunk=1)
        expected = to_uint8(pixels, nearest=num_frames == 1).numpy()
        assert not np.array_equal(expected, to_uint8(pixels, nearest=num_frames != 1).numpy())
        assert np.array_equal(pipe.generate(PROMPT, **settings).np, expected)


def test_only_so_many_prompts_are_kept(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest ones, and all that one call asks for however many they are."""
    monkeypatch.setattr(pipeline, "MAX_KEPT_PROMPTS", 2)

    texts, begin = [], Umt5Encoder._begin

    def recorded(self: Umt5Encoder, ids: Tensor, mask: Tensor) -> Tensor:
        texts.append(ids)
        return begin(self, ids, mask)

    def encoded(*prompts: str) -> int:
        before = len(texts)
        pipe.encode_prompts(list(prompts))
        return len(texts) - before

    monkeypatch.setattr(Umt5Encoder, "_begin", recorded)
    pipe = zoo.open(T2V)
    assert encoded("a", "b", "c") == 3 and encoded("c", "a", "b") == 0
    assert encoded("d", "c") == 1  # drops a and b
    assert encoded("c", "d") == 0 and encoded("a") == 1


def test_embeds_replace_prompts(zoo: Any, loads: Loads) -> None:
    expected = zoo.open(T2V).generate(PROMPT, output="latents", **SHORT)
    rows, negative = (zoo.text_rows(T2V, prompt) for prompt in (PROMPT, NEGATIVE))
    loads.kinds.clear(), loads.modules.clear()
    given = zoo.open(T2V).generate(
        "unused", output="latents", prompt_embeds=rows, negative_embeds=negative[None], **SHORT
    )
    assert torch.equal(given, expected) and loads.kinds == ["dit"]
    one = zoo.open(T2V).generate("unused", output="latents", prompt_embeds=rows, **SHORT)
    assert torch.equal(one, expected)


def test_wrong_embeds_are_refused_before_anything_is_loaded(zoo: Any, loads: Loads) -> None:
    for rows in (torch.zeros(4, 47), torch.zeros(513, 48), torch.zeros(0, 48)):
        for name in ("prompt_embeds", "negative_embeds"):
            with pytest.raises(UsageError, match="at most 512 rows of width 48"):
                zoo.open(T2V).generate(PROMPT, **{name: rows}, **SHORT)
    assert not loads.kinds


def test_on_step(zoo: Any) -> None:
    seen: list[Step] = []
    settings = SHORT | SCHEDULE
    latents = zoo.open(T2V).generate(PROMPT, output="latents", on_step=seen.append, **settings)
    timesteps, sigmas = sampler.schedule("unipc", 4, 5.0)
    assert [(s.index, s.num_steps, s.t, s.sigma) for s in seen] == [
        (i, 4, timesteps[i].item(), sigmas[i].item()) for i in range(4)
    ]
    assert torch.equal(seen[-1].latents, latents)
    assert not torch.equal(seen[0].latents, seen[1].latents)


def test_stream_yields_what_generate_returns(zoo: Any) -> None:
    pipe, seen = zoo.open(T2V), []
    settings = SHORT | {"num_frames": 9}
    chunks = list(pipe.stream(PROMPT, on_step=seen.append, **settings))
    assert [len(chunk) for chunk in chunks] == [1, 4, 4] and len(seen) == 2
    assert np.array_equal(np.concatenate(chunks), pipe.generate(PROMPT, **settings).np)
    noise = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(7))
    rows, negative = (zoo.text_rows(T2V, prompt) for prompt in (PROMPT, NEGATIVE))
    options = {"latents": noise, "prompt_embeds": rows, "negative_embeds": negative}
    given = pipe.stream("unused", **options, **settings | {"seed": 1})
    assert np.array_equal(np.concatenate(list(given)), np.concatenate(chunks))


def test_the_video(zoo: Any, tmp_path: Path) -> None:
    video = zoo.open(T2V).generate(PROMPT, **SHORT, fps=10)
    assert video.fps == 10 and video.np.dtype == np.uint8 and video.np.shape == (5, 32, 48, 3)
    asked = SHORT | {"prompt": PROMPT, "task": "t2v", "flow_shift": 5.0, "solver": "unipc"}
    assert asked.items() <= video.settings.items()
    assert {"text", "denoise", "decode"} <= video.timings.keys()
    assert min(video.timings.values()) >= 0
    assert torch.equal(
        (video.pt * 255).round().byte(), torch.from_numpy(video.np.transpose(0, 3, 1, 2))
    )
    assert np.array_equal(np.stack([np.asarray(p) for p in video.pil]), video.frames)
    info = probe_video(video.save(tmp_path / "a.mp4"))
    assert (info.width, info.height, info.fps, info.num_frames) == (48, 32, 10, 5)


def test_negative_prompt_reaches_the_model(zoo: Any) -> None:
    pipe = zoo.open(T2V)
    settings = {name: value for name, value in SHORT.items() if name != "negative"}
    default = pipe.check(GenerateConfig(PROMPT)).negative
    given = pipe.generate(PROMPT, output="latents", **settings, negative=default)
    assert torch.equal(pipe.generate(PROMPT, output="latents", **settings), given)
    empty = pipe.generate(PROMPT, output="latents", **settings, negative="")
    rows = zoo.text_rows(T2V, "")
    assert torch.equal(
        empty, pipe.generate(PROMPT, output="latents", **settings, negative_embeds=rows)
    )
    assert len(rows) == 1 and not torch.equal(empty, given)


def test_parts_are_released_in_between(zoo: Any, files: Any, loads: Loads) -> None:
    pipe = zoo.open(I2V)
    pipe.components.keep = False
    seen = []
    settings = SHORT | {"num_frames": 9, "image": files["a.png"]}
    for _ in pipe.stream(PROMPT, on_step=lambda step: seen.append(loads.alive()), **settings):
        seen.append(loads.alive())
    assert loads.kinds == ["umt5", "clip", "vae", "dit", "vae"]
    assert loads.before == [[], [], ["clip"], [], []]
    assert seen == [["dit"]] * 2 + [["vae"]] * 3
    assert loads.alive() == []


def test_only_one_expert_is_in_memory(zoo: Any, loads: Loads) -> None:
    pipe = zoo.open(T2V_A14B)
    pipe.components.keep = False
    pipe.generate(PROMPT, output="latents", **SHORT | SCHEDULE)
    assert loads.kinds == ["umt5", "dit", "dit"]
    assert loads.before == [[], [], []] and loads.alive() == []

    def stop(step: Step) -> None:
        if step.index == 3:
            raise KeyboardInterrupt

    for on_step in (stop, None):  # whatever an interrupted request has left behind
        try:
            pipe.generate(PROMPT, output="latents", on_step=on_step, **SHORT | SCHEDULE)
        except KeyboardInterrupt:
            assert loads.alive() == ["dit"]
    assert loads.kinds[3:] == ["dit"] * 4 and loads.before[3:] == [[]] * 4


def test_several_requests_load_and_encode_once(
    zoo: Any, loads: Loads, encoded: list[Tensor]
) -> None:
    pipe = zoo.open(T2V_A14B)
    assert pipe.components.keep and not loads.kinds
    for prompt in (PROMPT, "a small star", PROMPT):
        pipe.generate(prompt, **SHORT | SCHEDULE)
    assert loads.kinds == ["umt5", "dit", "dit", "vae"]
    assert len(encoded) == 3  # two prompts and the negative one


def test_progress_is_reported(zoo: Any) -> None:
    seen: list[tuple[str, int, int]] = []
    pipe = zoo.open(T2V, report=lambda *state: seen.append(state))
    pipe.generate(PROMPT, **SHORT | {"num_frames": 9})
    assert list(dict.fromkeys(phase for phase, _, _ in seen)) == [
        *("load umt5", "load dit", "load vae", "decode"),
    ]
    last = {phase: (done, total) for phase, done, total in seen}
    assert all(done == total > 0 for done, total in last.values())
    assert [done for phase, done, _ in seen if phase == "decode"] == [1, 2, 3]


def test_infinite_latents_stop_at_once(zoo: Any, calls: Calls) -> None:
    noise = torch.full((1, 16, 2, 4, 6), float("inf"))
    with pytest.raises(NumericsError, match="step 1 of 2: the latents given hold NaN") as caught:
        zoo.open(T2V).generate(PROMPT, latents=noise, **SHORT)
    assert caught.value.exit_code == 7 and len(calls.steps) == 2


@pytest.mark.parametrize(
    ("model", "settings", "reason"),
    [
        (T2V, {"noise": "cuda"}, "needs a CUDA GPU"),
        (FLF2V, {"image": "a.png"}, "needs --last-image"),
        (VACE, {"mask": "mask.png"}, "--mask edits a video"),
        (VACE, {"extend": "after"}, "--extend edits a video"),
        (VACE, {"video": "clip.mp4", "image": "a.png"}, "leave them out with --video"),
        (VACE, {"video": "clip.mp4", "outpaint": "left:x"}, "write directions and a ratio"),
        (VACE, {"video": "clip.mp4", "outpaint": "north"}, "outpaint directions are"),
        (VACE, {"video": "clip.mp4", "outpaint": "left", "mask": "mask.png"}, "two kinds of edit"),
        (
            VACE,
            {"video": "clip.mp4", "extend": "after", "num_frames": 1},
            "1 frames are given and 1 asked for",
        ),
        (VACE, {"video": vace.Source(torch.zeros(3, 4, 32, 48))}, "frames is 4"),
        (VACE, {"video": vace.Source(torch.zeros(3, 5, 32, 40))}, "multiples of 16"),
        (VACE, {"video": torch.zeros(3, 5, 32, 48)}, "video is a path"),
    ],
)
def test_contradictions_are_found_before_anything_is_loaded(
    model: str, settings: dict[str, Any], reason: str, zoo: Any, files: Any, loads: Loads
) -> None:
    def path(value: Any) -> Any:
        if isinstance(value, tuple) and not isinstance(value, vace.Source):
            return tuple(map(path, value))
        return files[value] if isinstance(value, str) and "." in value else value

    settings = SHORT | {name: path(value) for name, value in settings.items()}
    with pytest.raises(UsageError, match=reason):
        zoo.open(model).generate(PROMPT, **settings)
    assert not loads.kinds


@pytest.fixture
def lacking(zoo: Any, tmp_path: Path) -> Iterator[Callable[[str], Pipeline]]:
    """Opens the image model without one of its parts."""

    def without(pattern: str) -> Pipeline:
        for file in zoo.path(I2V).iterdir():
            if not file.match(pattern):
                (tmp_path / file.name).symlink_to(file)
        return Pipeline.load(str(tmp_path))

    yield without


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("*t5*", "comes without a umT5 text encoder"),
        ("*VAE*", "comes without a VAE"),
        ("*clip*", "comes without a CLIP image encoder"),
        ("tokenizer.json", "comes without a tokenizer"),
    ],
)
def test_a_missing_part_is_found_before_anything_is_loaded(
    pattern: str, reason: str, lacking: Callable[[str], Pipeline], files: Any, loads: Loads
) -> None:
    with pytest.raises(FormatError, match=reason):
        lacking(pattern).generate(PROMPT, **SHORT, image=files["a.png"])
    assert not loads.kinds


def test_parts_that_are_not_needed_may_be_missing(zoo: Any, loads: Loads) -> None:
    folder = zoo.path(T2V)
    file = str(folder / "diffusion_pytorch_model.safetensors")
    rows, negative = (zoo.text_rows(T2V, prompt) for prompt in (PROMPT, NEGATIVE))
    options = {"prompt_embeds": rows, "negative_embeds": negative, "output": "latents"}
    expected = zoo.open(T2V).generate(PROMPT, output="latents", **SHORT)
    assert torch.equal(Pipeline.load(file).generate("unused", **options, **SHORT), expected)
    loads.kinds.clear()
    with pytest.raises(FormatError, match="without a VAE .give it with --vae"):
        Pipeline.load(file).generate("unused", **options | {"output": "video"}, **SHORT)
    assert not loads.kinds


@pytest.mark.parametrize(
    ("option", "path", "reason"),
    [
        ("vae", f"{TI2V}/Wan2.2_VAE.pth", "48 latent channels; .* takes 16"),
        ("vae", f"{T2V}/diffusion_pytorch_model.safetensors", "a VAE was asked for"),
        ("text_encoder", "nano/models_t5_umt5-xxl-enc-bf16.pth", "128 text features; .* takes 48"),
        ("low_noise", f"{I2V}/diffusion_pytorch_model.safetensors", "the other expert is"),
    ],
)
def test_parts_of_different_models(option: str, path: str, reason: str, zoo: Any) -> None:
    zoo.path(path.partition("/")[0])
    with pytest.raises(FormatError, match=reason):
        zoo.open(T2V, **{option: zoo.root / path})
