"""LoRAs at work: merged and beside the weights, resident and streamed, request by request."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_files import DIALECTS, Truth, matrices, shapes_of, truth
from safetensors.torch import load_file, save_file
from test_offload import num_visits, placement_of, run
from torch import Tensor, nn

import wanrt
from wanrt import cli
from wanrt.adapter import Adapter
from wanrt.config import Lora
from wanrt.denoiser import schedule_of
from wanrt.errors import FormatError, UsageError
from wanrt.loras import Shelf
from wanrt.weights.load import load_component

T2V, I2V, VACE, A14B = (
    *("wan2.1-t2v-1.3b", "wan2.1-i2v-14b-480p", "wan2.1-vace-1.3b", "wan2.2-t2v-a14b"),
)
CPU = torch.device("cpu")
SMALL = {"width": 32, "height": 32, "num_frames": 5, "num_steps": 2, "seed": 3}
DIFFERENCES = (
    *("blocks.0.norm3.weight", "blocks.1.self_attn.norm_q.weight", "blocks.0.self_attn.q.bias"),
    *("blocks.0.ffn.0.weight", "blocks.1.modulation", "head.modulation", "head.head.bias"),
    *("blocks.1.cross_attn.k.bias", "patch_embedding.weight"),
)


def written(
    path: Path, name: str, zoo: Any, seed: int = 0, dialect: str = "comfy down up", **more: Any
) -> Truth:
    """A LoRA of everything that a LoRA can change."""
    shapes = shapes_of(zoo.specs[name].dit)
    modules = [*matrices(shapes, blocks_only=False), "patch_embedding"]
    given = truth(shapes, modules, DIFFERENCES, seed, **more)
    save_file({k: v.contiguous() for k, v in DIALECTS[dialect](given).items()}, path)
    return given


@pytest.fixture
def files(tmp_path: Path, zoo: Any) -> Callable[..., list[str]]:
    """Two LoRAs for a model, of rank 3 and of rank 5."""

    def make(name: str) -> list[str]:
        paths = [tmp_path / f"{i}.safetensors" for i in (0, 1)]
        written(paths[0], name, zoo)
        written(paths[1], name, zoo, 1, "kohya", rank=5, alpha=None)
        return [str(path) for path in paths]

    return make


def merged(name: str, loras: list[Lora], zoo: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    shelf = Shelf(zoo.specs[name])
    return load_component(
        zoo.path(name), "dit", dtype, changes=shelf.merges(shelf.uses(loras, "high"))
    )


def adapted(module: nn.Module, name: str, zoo: Any) -> Callable[[list[Lora]], None]:
    shelf, adapter = Shelf(zoo.specs[name]), Adapter(module, CPU)
    return lambda loras: adapter.put_on(shelf.uses(loras, "high"))


def error(ours: list[Tensor], expected: list[Tensor]) -> float:
    """Relative L2 over all results."""
    a, b = (torch.cat([x.flatten() for x in results]).double() for results in (ours, expected))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", [T2V, I2V, VACE])
def test_merged_weights_are_base_and_change(name: str, zoo: Any, tmp_path: Path) -> None:
    given = written(tmp_path / "a.safetensors", name, zoo)
    base = load_component(zoo.path(name), "dit").state_dict()
    found = merged(name, [Lora(str(tmp_path / "a.safetensors"), 0.7)], zoo).state_dict()
    for weight, values in base.items():
        module = weight.removesuffix(".weight")
        changed = weight in given.differences or (module != weight and module in given.pairs)
        change = given.change(weight).reshape(values.shape) * 0.7 if changed else 0.0
        torch.testing.assert_close(found[weight], values + change)


@pytest.mark.parametrize("name", [T2V, I2V, VACE])
def test_beside_the_weights_is_merged(name: str, zoo: Any, files: Callable[..., Any]) -> None:
    spec, (first, second) = zoo.specs[name], files(name)
    loras = [Lora(first, 0.7), Lora(second, -0.4)]
    dit = load_component(zoo.path(name), "dit")
    plain = run(dit, spec, together=False)
    adapted(dit, name, zoo)(loras)
    ours = run(dit, spec, together=False)
    assert error(ours, run(merged(name, loras, zoo), spec, together=False)) < 1e-5
    assert error(ours, plain) > 0.1


def test_in_bf16_both_ways_are_equally_right(zoo: Any, files: Callable[..., Any]) -> None:
    """Merging rounds the weights again, the branch rounds its hidden values; fp32 is the truth."""
    spec, paths = zoo.specs[T2V], files(T2V)
    for path in paths:
        save_file({name: t.bfloat16() for name, t in load_file(path).items()}, path)
    loras = [Lora(path, 0.5) for path in paths]
    exact = run(merged(T2V, loras, zoo), spec, together=False)
    once = run(merged(T2V, loras, zoo, torch.bfloat16), spec, together=False)
    dit = load_component(zoo.path(T2V), "dit", torch.bfloat16)
    adapted(dit, T2V, zoo)(loras)
    beside = run(dit, spec, together=False)
    floor = error(once, exact)  # of bf16 itself
    print(floor, error(beside, exact), error(beside, once))
    assert floor < 5e-3 and error(beside, exact) < 1.25 * floor and error(beside, once) < 2 * floor


@pytest.mark.parametrize("pinned", [None, 0])
@pytest.mark.parametrize("name", [T2V, I2V, VACE])
def test_streamed_is_resident(
    name: str, pinned: int | None, zoo: Any, files: Callable[..., Any]
) -> None:
    """To the bit, with one LoRA, with two, at other strengths, and without again."""
    spec, (first, second) = zoo.specs[name], files(name)
    where = placement_of(num_visits(spec), 1, 2, pinned)
    resident = load_component(zoo.path(name), "dit")
    streamed = load_component(zoo.path(name), "dit", placement=where)
    plain = run(resident, spec, together=False)
    put = [adapted(module, name, zoo) for module in (resident, streamed)]
    for loras in ([Lora(first)], [Lora(first, 0.3), Lora(second)], [Lora(first, 2.0)], []):
        results = []
        for module, put_on in zip((resident, streamed), put, strict=True):
            put_on(loras)
            results.append(run(module, spec, together=False))
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs)
        assert bool(loras) != all(map(torch.equal, results[0], plain))


def test_other_strengths_read_nothing(
    zoo: Any, files: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, (first, second) = zoo.specs[T2V], files(T2V)
    dit = load_component(zoo.path(T2V), "dit")
    put_on = adapted(dit, T2V, zoo)
    put_on([Lora(first), Lora(second)])
    monkeypatch.setattr("wanrt.weights.lora.LoraFile.read", None)
    put_on([Lora(first, 0.25), Lora(second, 1.5)])
    ours = run(dit, spec, together=False)
    monkeypatch.undo()
    fresh = load_component(zoo.path(T2V), "dit")
    adapted(fresh, T2V, zoo)([Lora(first, 0.25), Lora(second, 1.5)])
    for a, b in zip(ours, run(fresh, spec, together=False), strict=True):
        assert torch.equal(a, b)


def test_a_broken_file_leaves_the_model_as_it_was(
    zoo: Any, files: Callable[..., Any], tmp_path: Path
) -> None:
    stem = "blocks.1.ffn.2.lora_"
    broken = {stem + "A.weight": torch.ones(1, 256), stem + "B.weight": torch.ones(128, 1) / 0}
    save_file(broken, tmp_path / "broken.safetensors")
    dit = load_component(zoo.path(T2V), "dit")
    plain = run(dit, zoo.specs[T2V], together=False)
    put_on = adapted(dit, T2V, zoo)
    for _ in range(2):
        with pytest.raises(FormatError, match="NaN or infinity"):
            put_on([Lora(files(T2V)[0]), Lora(str(tmp_path / "broken.safetensors"))])
        assert all(map(torch.equal, run(dit, zoo.specs[T2V], together=False), plain))


def latents(pipe: Any, **settings: Any) -> Tensor:
    return pipe.generate("a red circle", output="latents", **SMALL, **settings)


def test_requests_one_after_another(zoo: Any, files: Callable[..., Any]) -> None:
    """What came before has no influence; a LoRA given at load gives what one of a request gives."""
    first, second = files(T2V)
    pipe = zoo.open(T2V)
    plain = latents(pipe)
    mine = latents(pipe, loras=[f"{first}:0.5", second])
    assert torch.equal(latents(pipe, loras=[f"{first}:0.5", second]), mine)
    assert not torch.equal(latents(pipe, loras=[Lora(first, 0.4), Path(second)]), mine)
    assert torch.equal(latents(pipe), plain)
    loaded = zoo.open(T2V, loras=[f"{first}:0.5"])
    torch.testing.assert_close(latents(loaded, loras=[second]), mine, rtol=1e-3, atol=1e-4)


def test_a_budget_counts_them(zoo: Any, files: Callable[..., Any]) -> None:
    """Blocks stream under it, so that the LoRAs given at load are branches too."""
    first, second = files(T2V)
    expected = latents(zoo.open(T2V), loras=[first, f"{second}:0.5"])
    pipe = zoo.open(T2V, vram="8G", loras=[first])
    run = pipe.start("a red circle", **SMALL, loras=[f"{second}:0.5"])
    assert run.plan.ask.lora > 0
    torch.testing.assert_close(pipe.denoise(run), expected, rtol=1e-3, atol=1e-4)


def test_pairs(zoo: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A pair by the names of its files, the same in one file of Diffusers, and by word."""
    names = {e: str(tmp_path / f"wan2.2_style_{e}_noise.safetensors") for e in ("high", "low")}
    given = [written(Path(names[e]), A14B, zoo, i) for i, e in enumerate(("high", "low"))]
    both = DIALECTS["diffusers"](Truth(given[0].pairs))
    second = DIALECTS["diffusers"](Truth(given[1].pairs))
    both |= {key.replace("transformer.", "transformer_2."): v for key, v in second.items()}
    save_file({k: v.contiguous() for k, v in both.items()}, tmp_path / "both.safetensors")
    shelf = Shelf(zoo.specs[A14B])

    def experts(*loras: Lora) -> list[list[str]]:
        return [[str(u.file.path) for u in shelf.uses(loras, e)] for e in ("high", "low")]

    high, low = names.values()
    shelf.check([Lora(high), Lora(low)])
    assert not caplog.records
    shelf.check([Lora(low)])
    assert "only the low-noise expert has a LoRA; give the high-noise file too" in caplog.text
    assert experts(Lora(low), Lora(high)) == [[high], [low]]
    assert experts(Lora(high, 1, "both")) == [[high], [high]]
    assert experts(Lora(low, 1, "high")) == [[low], []]
    pair = [Lora(str(tmp_path / "both.safetensors"))]
    weight, shape = "blocks.0.ffn.0.weight", shelf.shapes["blocks.0.ffn.0.weight"]
    for i, expert in enumerate(("high", "low")):
        (use,) = shelf.uses(pair, expert)
        change = use.read(weight, shape).low_rank
        expected = Truth(given[i].pairs).change(weight)
        torch.testing.assert_close(change.up @ change.down, expected)


def test_experts_in_a_run(zoo: Any, tmp_path: Path) -> None:
    pipe = zoo.open(A14B)
    path = tmp_path / "style.safetensors"
    written(path, A14B, zoo)
    results = [
        latents(pipe, flow_shift=1.0, loras=[f"{path}:1:{e}"]) for e in ("high", "low", "both")
    ]
    results.append(latents(pipe, flow_shift=1.0))
    assert all(not torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])
    assert torch.equal(latents(pipe, flow_shift=1.0, loras=[str(path)]), results[2])


@pytest.mark.parametrize(
    ("text", "lora"),
    [
        ("a.safetensors", Lora("a.safetensors")),
        ("a.safetensors:0.8", Lora("a.safetensors", 0.8)),
        ("a.safetensors:-1:low", Lora("a.safetensors", -1.0, "low")),
        ("a.safetensors:high", Lora("a.safetensors", 1.0, "high")),
        (r"C:\a.safetensors", Lora(r"C:\a.safetensors")),
        (r"C:\a.safetensors:.5", Lora(r"C:\a.safetensors", 0.5)),
        ("a:b.safetensors", Lora("a:b.safetensors")),
    ],
)
def test_how_a_lora_is_written(text: str, lora: Lora) -> None:
    assert Lora.parse(text) == lora


PRESETS = [
    ("lightx2v-4step", {}, (4, 1.0, 5.0, "euler")),
    ("lightx2v-4step", {"num_steps": 6, "guidance": 2.0}, (6, 2.0, 5.0, "euler")),
    ("fusionx", {"solver": "dpm++"}, (8, 1.0, 5.0, "dpm++")),
]


@pytest.mark.parametrize(("preset", "settings", "expected"), PRESETS)
def test_presets(preset: str, settings: dict, expected: tuple, zoo: Any) -> None:
    request = zoo.open(T2V).check(wanrt.GenerateConfig("x", preset=preset, **settings))
    found = (request.num_steps, request.guidance, request.flow_shift, request.solver)
    assert found == expected


def test_a_preset_is_the_schedule_of_its_lora(zoo: Any) -> None:
    pipe = zoo.open(A14B)
    request = pipe.check(wanrt.GenerateConfig("x", preset="lightx2v-4step"))
    assert not request.guided
    timesteps, _ = schedule_of(request)
    torch.testing.assert_close(
        timesteps.double(), torch.tensor([1e3, 937.5, 833.3333, 625]).double()
    )


def test_settings_that_cannot_be(zoo: Any, tmp_path: Path) -> None:
    pipe, path = zoo.open(T2V), tmp_path / "a.safetensors"
    written(path, T2V, zoo)
    wrong = [
        ([f"{path}:nan"], "weight of .* is nan; it must be -100 to 100"),
        ([f"{path}:1000"], "weight of .* is 1000.0"),
        ([f"{path}:1:low"], "two-expert models; .* has one expert"),
        ([str(path)] * 400, "400 LoRAs; at most 64"),
        (str(path), "give a list"),
    ]
    for loras, reason in wrong:
        with pytest.raises(UsageError, match=reason):
            pipe.check(wanrt.GenerateConfig("x", loras=loras))
    with pytest.raises(UsageError, match="preset 'x' does not exist; choose lightx2v-4step"):
        pipe.check(wanrt.GenerateConfig("x", preset="x"))


def test_command_line(
    zoo: Any, files: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = files(T2V)
    save_file({"unet.lora_A.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    sizes = ("--size", "32x32", "--frames", "1", "--steps", "1", "--seed", "1", "-y", "--json")
    call = ["generate", "x", "--model", str(zoo.path(T2V)), *sizes, "-o", str(tmp_path / "o.png")]
    pictures, errors = [], []
    for loras in ([], [f"{first}:0.5", second], [str(tmp_path / "other.safetensors")], ["no.sft"]):
        flags = [part for lora in loras for part in ("--lora", lora)]
        try:
            cli.main([*call, *flags])
        except SystemExit as exit_:
            errors.append(exit_.code)
        pictures.append((tmp_path / "o.png").read_bytes())
        out, err = capsys.readouterr()
    assert errors == [0, 0, 3, 3]
    assert pictures[0] != pictures[1] == pictures[2]
    assert "no such file" in err


def inspect(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["inspect", *map(str, args)])
    return exit_.value.code, *capsys.readouterr()


def test_inspect_says_what_it_is(
    zoo: Any, files: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = files(I2V)
    code, out, _ = inspect(capsys, first)
    assert code == 0
    assert "LoRA of rank 3 (for width 128, image to video, ComfyUI names, " in out
    assert "keys are Wan's" in out and " fp32 " in out
    assert "kohya names" in inspect(capsys, second)[1]
    code, out, _ = inspect(capsys, first, "--model", zoo.path(T2V))
    assert code == 0 and "no place for diffusion_model.blocks.0.cross_attn.k_img.lora_down" in out
    *_, row = inspect(capsys, first, "--model", zoo.path(T2V), "--json")[1].splitlines()
    (held,) = json.loads(row)["matches"]
    assert "blocks.0.ffn.0.weight" in held["weights"] and held["expert"] == "high"
    assert not any("self_attn" in key for key in held["unmatched"])
    code, out, _ = inspect(capsys, first, "--model", zoo.path(A14B))
    assert code == 0 and "low noise" in out


def test_inspect_says_what_is_wrong(
    zoo: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "dora.safetensors"
    stem = "diffusion_model.blocks.0.self_attn.q"
    tensors = {"lora_A.weight": torch.ones(2, 128), "lora_B.weight": torch.ones(128, 2)}
    tensors["dora_scale"] = torch.ones(128, 1)
    save_file({f"{stem}.{name}": t for name, t in tensors.items()}, path)
    code, out, _ = inspect(capsys, path)
    assert code == 0 and "for width 128" in out and "has DoRA" in out
    code, _, err = inspect(capsys, path, "--model", zoo.path(T2V))
    assert code == 3 and "use a plain LoRA" in err and err.count("\n") == 1
    code, _, err = inspect(capsys, path, "--model", "wan2.1-t2v-14b")
    assert code == 3


def test_a_name_that_promises_few_steps(
    zoo: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "wan_lightx2v_4step.safetensors"
    written(path, T2V, zoo)
    pipe = zoo.open(T2V)
    pipe.check(wanrt.GenerateConfig("x", loras=[path]))
    assert "--preset lightx2v-4step" in caplog.text
    caplog.clear()
    pipe.check(wanrt.GenerateConfig("x", loras=[path], preset="lightx2v-4step"))
    assert not caplog.text


def test_what_does_nothing_is_said_once(
    zoo: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "i2v.safetensors"
    written(path, I2V, zoo)
    pipe = zoo.open(T2V)
    for _ in range(2):
        pipe.check(wanrt.GenerateConfig("x", loras=[path]))
    (record,) = caplog.records
    assert "have no place in" in record.getMessage() and "k_img" in record.getMessage()


def test_refused_before_weights_are_read(
    zoo: Any,
    tmp_path: Path,
    files: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("wanrt.components.load_component", load)
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + b"\xff" * 64)
    (tmp_path / "b.safetensors").write_bytes(b"\xff" * 64)
    save_file({"lora_unet_down_blocks_0.lora_up.weight": torch.ones(2)}, tmp_path / "c.safetensors")
    wide = {f"blocks.0.ffn.0.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    save_file(wide, tmp_path / "d.safetensors")
    (good,) = files(T2V)[:1]
    many = [good] * 400
    cases = {
        "a.gguf": (3, "is GGUF version 4294967295"),
        "b.safetensors": (3, "header"),
        "c.safetensors": (3, "matches .* in 0 of its 1 keys"),
        "d.safetensors": (3, r"does not fit .* is \[2, 2\].*another model"),
        "none.safetensors": (3, "no such file"),
        f"{good}:nan": (2, "weight of .* is nan"),
        f"{good}:1:low": (2, "has one expert"),
    }
    runs = [(["--lora", str(tmp_path / name)], *outcome) for name, outcome in cases.items()]
    runs.append(([part for lora in many for part in ("--lora", lora)], 2, "400 LoRAs; at most 64"))
    for flags, code, reason in runs:
        with pytest.raises(SystemExit) as exit_:
            cli.main(["generate", "x", "--model", str(zoo.path(T2V)), "-o", "o.mp4", *flags])
        line = capsys.readouterr().err
        assert exit_.value.code == code and re.search(reason, line), line
        assert line.startswith("wanrt: ") and line.count("\n") == 1


def test_both_experts_in_one_file_on_a_model_of_one(
    zoo: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = written(tmp_path / "a.safetensors", T2V, zoo)
    tensors = DIALECTS["diffusers"](Truth(given.pairs))
    both = tensors | {k.replace("former.", "former_2."): v.clone() for k, v in tensors.items()}
    save_file(both, tmp_path / "both.safetensors")
    pipe = zoo.open(T2V)
    pipe.check(wanrt.GenerateConfig("x", loras=[tmp_path / "both.safetensors"]))
    assert f"{len(tensors)} of its {len(both)} keys have no place" in caplog.text
    assert "transformer_2." in caplog.text
