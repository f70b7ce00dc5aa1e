"""Reads the sources: import order, one home per third-party package, file sizes, quiet imports."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("wanrt", "kernels", "export", "bench")


class Line(NamedTuple):
    """Modules of one rank (each name covers what lies below it) and the ranks they may import."""

    names: tuple[str, ...]
    may_import: frozenset[int]


def _ranks(*ranks: int) -> frozenset[int]:
    return frozenset(ranks)


# CONTRIBUTING.md, "Who may import whom". The longest name that covers a module gives its rank.
LINES = {
    1: Line(("wanrt.kernels",), _ranks(1)),
    2: Line(
        (
            "wanrt.clock",
            "wanrt.env",
            "wanrt.errors",
            "wanrt.config",
            "wanrt.installed",
            "wanrt.keys",
            "wanrt.vae_shapes",
            "wanrt.vae_sections",
        ),
        _ranks(2),
    ),
    3: Line(("wanrt.quant",), _ranks(1, 2, 3)),
    4: Line(("wanrt.models",), _ranks(1, 2, 3, 4)),
    5: Line(
        ("wanrt.weights", "wanrt.sampler", "wanrt.guidance", "wanrt.stepcache", "wanrt.memory"),
        _ranks(1, 2, 3, 5),
    ),
    6: Line(
        (
            "wanrt.weights.load",
            "wanrt.weights.configs",
            "wanrt.weights.contents",
            "wanrt.weights.gguf_vocabulary",
            "wanrt.weights.layouts",
            "wanrt.weights.packed",
            "wanrt.weights.quantize",
            "wanrt.weights.random",
            "wanrt.weights.static_convs",
            "wanrt.weights.vocabulary",
            "wanrt.engine",
        ),
        _ranks(1, 2, 3, 4, 5, 6),
    ),
    7: Line(("wanrt.media",), _ranks(1, 2, 7)),
    8: Line(
        (
            "wanrt.pipeline",
            "wanrt.adapter",
            "wanrt.budgeted",
            "wanrt.components",
            "wanrt.conditions",
            "wanrt.denoiser",
            "wanrt.dtypes",
            "wanrt.identity",
            "wanrt.loras",
            "wanrt.planning",
            "wanrt.presets",
            "wanrt.request",
            "wanrt.tasks",
            "wanrt.watch",
            "wanrt.nano",
        ),
        _ranks(*range(1, 9)),
    ),
    9: Line(("wanrt.export",), _ranks(1, 2, 3, 4, 5, 6, 9)),
    10: Line(
        (
            "wanrt.integrations",
            "wanrt.cli",
            "wanrt.cli_bundle",
            "wanrt.cli_export",
            "wanrt.cli_machine",
            "wanrt.cli_plan",
            "wanrt.cli_provenance",
            "wanrt.cli_quantize",
            "wanrt.cli_tools",
            "wanrt.command",
            "wanrt.doctor",
            "wanrt.progress",
            "wanrt.bench",
            "wanrt.__main__",
            "wanrt",
        ),
        _ranks(*range(1, 11)),
    ),
}
# Models reach the ops through their layers.
OPS_GATES = (
    "wanrt.models.layers",
    "wanrt.models.quantized",
    "wanrt.models.eight_bit",
    "wanrt.models.vae_layers",
)

EVERYWHERE = {"torch", "numpy", "triton", "safetensors"}
# Further files that may import a package, with the reason.
SHARED_PACKAGES: dict[str, dict[str, str]] = {
    "av": {
        "bench/watermark_attacks.py": "re-encodes in memory, as other programs would",
        "wanrt/media/sound.py": "copies packets; its home, video.py, codes pictures",
    },
    "PIL": {
        "wanrt/media/frames.py": "knows an image of PIL when it sees one",
        "wanrt/nano/sheet.py": "draws captions; nothing else in the runtime draws",
    },
    "cryptography": {
        "wanrt/engine/trust.py": "Ed25519 for bundles; its home, keys.py, has certificates",
    },
    "onnx_ir": {
        "export/qdq.py": "rewrites graphs; their home, onnx.py, traces and embeds",
        "export/rtx.py": "likewise",
    },
    "pytest": {
        "bench/emulated.py": "a plugin; their home, consumer.py, is another",
        "bench/share.py": "likewise",
    },
    "rich": {
        "wanrt/cli.py": "prints the plan; its home, the progress bars, does not",
        "wanrt/cli_machine.py": "likewise",
        "wanrt/cli_plan.py": "likewise",
        "wanrt/cli_tools.py": "likewise",
    },
    "typer": {
        "wanrt/cli_bundle.py": "the verbs about bundles",
        "wanrt/cli_export.py": "one verb, too long for the file of the others",
        "wanrt/cli_machine.py": "the verbs about the machine",
        "wanrt/cli_plan.py": "one verb, too long for the file of the others",
        "wanrt/cli_provenance.py": "the verbs about marks",
        "wanrt/cli_quantize.py": "likewise",
        "wanrt/command.py": "what all verbs share",
        "wanrt/cli_tools.py": "the verbs beside `generate`, too long for one file",
    },
}

MAX_LINES = {"kernels": 500}
DEFAULT_MAX_LINES = 400


class Source(NamedTuple):
    """One Python file: its path from the root, its name as a module, its text."""

    path: str
    module: str
    text: str


class Import(NamedTuple):
    line: int
    module: str


def _sources(folders: tuple[str, ...] = FOLDERS) -> list[Source]:
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    return [_source(str(file.relative_to(ROOT)), file.read_text("utf-8")) for file in files]


def _source(path: str, text: str) -> Source:
    parts = list(Path(path).with_suffix("").parts)
    if parts[0] != "wanrt":
        parts.insert(0, "wanrt")
    if parts[-1] == "__init__":
        parts.pop()
    return Source(path, ".".join(parts), text)


MODULES = {source.module for source in _sources()}


def _imports(source: Source) -> Iterator[Import]:
    """Absolute names of what a file imports, anywhere in it."""
    package = source.module.split(".")
    if not source.path.endswith("__init__.py"):
        package.pop()
    for node in ast.walk(ast.parse(source.text, source.path)):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                same = _rank(full) in (None, _rank(base))
                yield Import(node.lineno, base if same else full)


def _rank(module: str) -> int | None:
    """Rank of a module of ours, None for others. The bare package `wanrt` covers itself alone."""
    best, rank = "", None
    for number, line in LINES.items():
        for name in line.names:
            covers = module == name or (name != "wanrt" and module.startswith(f"{name}."))
            if covers and len(name) > len(best):
                best, rank = name, number
    return rank


def _order_problems(source: Source) -> Iterator[str]:
    rank = _rank(source.module)
    if rank is None:
        yield f"{source.path}:1: {source.module} has no rank in LINES"
        return
    for line, module in _imports(source):
        where = f"{source.path}:{line}: {source.module}"
        if module.split(".")[0] != "wanrt":
            continue
        target = _rank(module)
        if target is None:
            yield f"{where} imports {module}, which has no rank in LINES"
        elif target not in LINES[rank].may_import:
            yield f"{where} (rank {rank}) must not import {module} (rank {target})"
        elif target == 1 and rank == 4 and source.module not in OPS_GATES:
            yield f"{where} must reach {module} through {' or '.join(OPS_GATES)}"


def _third_party(source: Source) -> Iterator[Import]:
    for line, module in _imports(source):
        package = module.split(".")[0]
        if package not in EVERYWHERE | sys.stdlib_module_names | {"wanrt"}:
            yield Import(line, package)


def _home_problems(sources: list[Source]) -> Iterator[str]:
    users: dict[str, dict[str, int]] = {}
    for source in sources:
        for line, package in _third_party(source):
            users.setdefault(package, {}).setdefault(source.path, line)
    for package, files in users.items():
        extra = [path for path in files if path not in SHARED_PACKAGES.get(package, {})]
        if len(extra) > 1:
            places = ", ".join(f"{path}:{files[path]}" for path in extra)
            yield f"{package} is imported in {len(extra)} files, one is its home: {places}"


def _size_problems(source: Source) -> Iterator[str]:
    limit = MAX_LINES.get(Path(source.path).parts[0], DEFAULT_MAX_LINES)
    count = source.text.count("\n")
    if count > limit:
        yield f"{source.path}:{limit + 1}: {count} lines, at most {limit}"


def _variable_problems(source: Source) -> Iterator[str]:
    for node in ast.walk(ast.parse(source.text, source.path)):
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and text.startswith("WANRT_") and source.module != "wanrt.env":
            yield f"{source.path}:{node.lineno}: {text} belongs in wanrt/env.py"


def _report(problems: Iterator[str]) -> None:
    found = list(dict.fromkeys(problems))
    assert not found, "\n" + "\n".join(found)


def test_imports_go_up() -> None:
    _report(problem for source in _sources() for problem in _order_problems(source))


def test_each_third_party_package_has_one_home() -> None:
    _report(_home_problems(_sources()))


def test_files_are_one_thing() -> None:
    _report(problem for source in _sources() for problem in _size_problems(source))


def test_environment_variables_have_one_home() -> None:
    _report(problem for source in _sources() for problem in _variable_problems(source))


@pytest.mark.parametrize("folder", ["kernels", "export", "bench"])
def test_outer_folders_are_no_packages(folder: str) -> None:
    """With `__init__.py`, `kernels/` in the working folder would shadow another project's."""
    assert not (ROOT / folder / "__init__.py").exists()


def test_make_demo_uses_the_prompt_of_the_readme() -> None:
    rows = (ROOT / "Makefile").read_text("utf-8").splitlines()
    (prompt,) = [row.removeprefix("PROMPT := ") for row in rows if row.startswith("PROMPT := ")]
    assert f'wanrt generate "{prompt}" -o demo.mp4' in (ROOT / "README.md").read_text("utf-8")


BROKEN = [
    ("wanrt/config.py", "import wanrt.models.dit", "wanrt.models.dit (rank 4)"),
    ("wanrt/models/dit.py", "from wanrt import pipeline", "wanrt.pipeline (rank 8)"),
    ("wanrt/models/dit.py", "\ndef f():\n    from ..weights import load", "load (rank 6)"),
    ("wanrt/models/dit.py", "from wanrt.kernels import reference", "through wanrt.models.layers"),
    ("wanrt/models/dit.py", "from wanrt import Pipeline", "wanrt (rank 10)"),
    ("wanrt/weights/names.py", "from .load import load_component", "weights.load (rank 6)"),
    ("wanrt/weights/names.py", "from wanrt.models.vae import WanVAE", "wanrt.models.vae (rank 4)"),
    ("wanrt/media/video.py", "from wanrt.sampler import schedule", "wanrt.sampler (rank 5)"),
    ("wanrt/pipeline.py", "import wanrt.export.onnx", "wanrt.export.onnx (rank 9)"),
    ("kernels/norm.py", "from wanrt.errors import WanrtError", "wanrt.errors (rank 2)"),
    ("wanrt/helpers.py", "", "wanrt.helpers has no rank"),
    ("wanrt/cli.py", "import wanrt.helpers", "wanrt.helpers, which has no rank"),
]


@pytest.mark.parametrize(("path", "text", "named"), BROKEN)
def test_a_broken_order_is_named_with_file_and_line(path: str, text: str, named: str) -> None:
    (problem,) = _order_problems(_source(path, text))
    line = next((n for n, row in enumerate(text.split("\n"), 1) if "import" in row), 1)
    assert problem.startswith(f"{path}:{line}: ") and named in problem


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("wanrt/models/dit.py", "from wanrt.config import DitSpec\nfrom .layers import attention"),
        ("wanrt/models/layers.py", "from wanrt.kernels import reference"),
        ("wanrt/weights/load.py", "from wanrt.models.dit import WanDiT\nfrom . import names"),
        ("wanrt/nano/scorer.py", "import torch\nfrom wanrt import sampler"),
        ("bench/vae.py", "import diffusers\nfrom wanrt import Pipeline"),
    ],
)
def test_a_legal_import_passes(path: str, text: str) -> None:
    assert list(_order_problems(_source(path, text))) == []


def test_a_second_home_and_a_long_file_are_named() -> None:
    twice = [_source(f"wanrt/{name}.py", "import torch, os\n\nimport av") for name in ("a", "b")]
    (problem,) = _home_problems(twice)
    assert "av is imported in 2 files" in problem
    assert "wanrt/a.py:3" in problem and "wanrt/b.py:3" in problem
    assert list(_home_problems(twice[:1])) == []
    (problem,) = _size_problems(_source("wanrt/a.py", "\n" * 401))
    assert problem.startswith("wanrt/a.py:401: 401 lines")
    (problem,) = _variable_problems(_source("wanrt/a.py", "x = os.environ['WANRT_LOG']"))
    assert problem.startswith("wanrt/a.py:1: WANRT_LOG")


QUIET_IMPORT = """
import importlib, os, random, sys, traceback
import torch

CALLS = {"socket.connect", "socket.bind", "pickle.find_class", "os.system", "os.exec", "os.fork",
         "os.posix_spawn", "subprocess.Popen", "os.mkdir", "os.remove", "os.rename"}
on = False

def hook(event, args):
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if on and (event in CALLS or writes):
        frames = [f"{f.filename}:{f.lineno}" for f in traceback.extract_stack()]
        print(event, args, *[f for f in frames if "importlib" not in f][-3:-1])

def state():
    return (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
            torch.cuda.is_initialized(), torch.get_rng_state().tolist(), dict(os.environ),
            on and random.getstate())  # rich draws when it is first imported

def import_all():
    for name in sys.argv[1:]:
        sys.modules.pop(name, None)
    for name in sys.argv[1:]:
        before = state()
        importlib.import_module(name)
        for then, now in zip(before, state()):
            if then != now:
                print(name, "changed", str(then)[:200], "to", str(now)[:200])

import_all()  # once for the third-party packages, which may do as they like
on = True
sys.addaudithook(hook)
import_all()
"""


def _python(script: str, *args: str) -> str:
    command = [sys.executable, "-B", "-c", script, *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_does_no_work() -> None:
    """No socket, pickle, child process, written file, CUDA start, random draw, changed setting."""
    assert _python(QUIET_IMPORT, *sorted(MODULES)) == ""


NOISY = {
    "folder": ("import os; os.makedirs('made', exist_ok=True)", "os.mkdir"),
    "file": ("open('made.txt', 'w').close()", "open"),
    "shell": ("import os; os.system('true')", "os.system"),
    "pickled": ("import pickle; pickle.loads(pickle.dumps(print))", "pickle.find_class"),
    "tensor_draw": ("import torch; torch.randn(1)", "changed"),
    "python_draw": ("import random; random.random()", "changed"),
    "setting": ("import torch; torch.set_default_dtype(torch.float64)", "changed"),
}


def test_work_at_import_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (work, _) in NOISY.items():
        (tmp_path / f"noisy_{name}.py").write_text(work)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    rows = _python(QUIET_IMPORT, *(f"noisy_{name}" for name in NOISY)).splitlines()
    for name, (_, named) in NOISY.items():
        assert any(f"noisy_{name}" in row and named in row for row in rows), (name, rows)


def test_the_package_itself_loads_nothing_else() -> None:
    """So that `wanrt --help` and a typo answer at once."""
    script = "import sys, wanrt; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = set(_python(script).split()) - sys.stdlib_module_names - {"wanrt"}
    third_party = {"torch", "numpy", "safetensors", "av", "PIL", "typer", "rich"}
    assert not loaded & (third_party | {"c2pa", "cryptography"})


def test_marking_loads_its_libraries_when_it_marks() -> None:
    """23 MB of C2PA and 70 ms of cryptography, which `stream` and the bare modules do without."""
    script = "import sys, wanrt.pipeline; print(*{name.split('.')[0] for name in sys.modules})"
    assert not set(_python(script).split()) & {"c2pa", "cryptography"}
