"""What a machine offers wanrt, and what stands in the way: what a report of a fault should hold.

It is for machines on which something is wrong, so whatever goes wrong here is a problem to tell of.
"""

import importlib.util
import os
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from wanrt import env
from wanrt.bench.measure import machine
from wanrt.engine.kinds import LIBRARIES
from wanrt.errors import UsageError
from wanrt.installed import release
from wanrt.kernels import registry
from wanrt.kernels.cases import dtypes_of
from wanrt.kernels.target import UnsupportedOp
from wanrt.media.video import CODECS, check_codec
from wanrt.memory import host
from wanrt.memory.card import driver_release

_PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "av", "c2pa-python")
_TRITON = ("triton", "triton-windows", "pytorch-triton")
_COMPILERS = ("gcc", "clang")  # Triton builds with one of them, or CC, what starts a kernel
_DRIVER = Path("/proc/driver/nvidia/version")  # is there where NVIDIA's driver is, on Linux
_HIDES_CARDS = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Card:
    """The first CUDA card. Bytes; `driver` is None where NVML does not say."""

    name: str
    capability: str
    total: int
    free: int
    driver: str | None


@dataclass(frozen=True)
class Report:
    """All that `wanrt doctor` says.

    wanrt: its release, "" for a bare checkout. memory: bytes that the process may have, None where
    the system does not say. cuda: what PyTorch is built for. packages: releases, None where one is
    not installed. encoders: FFmpeg's, by codec. device, backends: what `auto` takes, and how many
    ops each backend does there. problems: sentences with their remedies.
    """

    wanrt: str
    commit: str
    system: str
    python: str
    processor: str
    threads: int
    memory: int | None
    card: Card | None
    cuda: str | None
    packages: dict[str, str | None]
    encoders: dict[str, str | None]
    folders: dict[str, str]
    variables: dict[str, str]
    device: str
    backends: dict[str, int]
    problems: tuple[str, ...]


def examine() -> Report:
    """This machine. Changes nothing; on CUDA it begins a context, as any use would."""
    problems: list[str] = []
    card = _card(problems)
    device = "cpu" if card is None else "cuda"
    backends, folders = _backends(device, problems), _folders(problems)
    packages = {name: release(name) for name in _PACKAGES}
    packages["triton"] = release(*_TRITON)
    packages |= {name: library.release() for name, library in LIBRARIES.items()}
    encoders = {codec: _encoder(codec) for codec in CODECS}
    about = machine("cpu")
    return Report(
        wanrt=release("wanrt") or "",
        commit=str(about["commit"]),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        processor=str(about["machine"]),
        threads=torch.get_num_threads(),
        memory=host.total_bytes() if hasattr(os, "sysconf") else None,
        card=card,
        cuda=torch.version.cuda,
        packages=packages,
        encoders=encoders,
        folders={name: str(path) if path else "off" for name, path in folders.items()},
        variables=env.given(),
        device=device,
        backends=backends,
        problems=(*problems, *_about_the_card(card), *_about_files(encoders, folders)),
    )


def _card(problems: list[str]) -> Card | None:
    if not torch.cuda.is_available():
        return None
    try:
        found = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info(0)
    except RuntimeError as error:  # busy, full, or in a state that only its driver knows
        problems.append(f"PyTorch sees a CUDA card and cannot use it: {_line(error)}")
        return None
    return Card(found.name, f"{found.major}.{found.minor}", total, free, driver_release())


def _backends(device: str, problems: list[str]) -> dict[str, int]:
    """How many ops each backend does, as WANRT_OPS asks."""
    count = Counter[str]()
    try:
        wanted = env.ops_backend()
        for op in registry.OPS:
            taken = dtypes_of(op)
            dtype = torch.bfloat16 if torch.bfloat16 in taken else taken[0]
            count[registry.resolve(op, registry.here(dtype, device), wanted).backend] += 1
    except UsageError as error:
        problems.append(str(error))
    except UnsupportedOp as error:
        problems.append(f"{env.OPS} is {wanted!r}: {error}")
    except (ImportError, OSError, RuntimeError) as error:  # a Triton that is there and broken
        problems.append(
            f"the kernels cannot be loaded: {_line(error)}; {env.OPS}=torch does without"
        )
    return dict(count)


def _folders(problems: list[str]) -> dict[str, Path | None]:
    """Where things are kept; None where they are not."""
    places: dict[str, Callable[[], Path | None]] = {
        "cache": env.cache_folder,
        "keys": lambda: env.keys_folder() or env.own_keys_folder(),
        "ledger": env.ledger_file,
    }
    found: dict[str, Path | None] = {}
    for name, place in places.items():
        try:
            found[name] = place()
        except RuntimeError as error:  # pathlib: no home, or not that of the user named
            variable = f"{env.PREFIX}{name.upper()}"
            problems.append(f"no place for the {name}: {_line(error)} Set HOME, or {variable}")
    return found


def _encoder(codec: str) -> str | None:
    try:
        return check_codec(codec)[0]
    except UsageError:
        return None


def _about_the_card(card: Card | None) -> Iterator[str]:
    """What keeps a card from being used, or used well."""
    if card is None:
        yield from _why_no_card()
        return
    digits, codes = card.capability.replace(".", ""), torch.cuda.get_arch_list()
    if torch.version.cuda and not any(_serves(code, int(digits)) for code in codes):
        built = ", ".join(codes) or "nothing"
        yield f"PyTorch {torch.__version__} has no code for {card.capability}; it is for {built}"
    elif int(digits) < registry.MIN_ARCH:
        yield (
            f"compute capability {card.capability}: the kernels need {registry.MIN_ARCH / 10}, "
            "so PyTorch does everything, slower"
        )
    elif importlib.util.find_spec("triton") is None:
        yield "without Triton PyTorch does everything, slower: pip install 'wanrt[gpu]'"
    elif sys.platform != "win32" and not _compiler():
        yield (
            "Triton finds no C compiler, and needs one to start a kernel: install gcc, or name one "
            "in CC"
        )


def _why_no_card() -> Iterator[str]:
    told = torch.__version__
    if torch.version.cuda is not None and _HIDES_CARDS in os.environ:
        yield f"PyTorch finds no card; {_HIDES_CARDS} is {os.environ[_HIDES_CARDS]!r}"
    elif torch.version.cuda is not None:
        yield (
            f"PyTorch {told} is built for CUDA {torch.version.cuda} and finds no card: there is no "
            "driver, one too old for it, or a container without --gpus all"
        )
    elif _DRIVER.exists() or shutil.which("nvidia-smi"):
        yield (
            f"there is an NVIDIA driver, and PyTorch {told} is built without CUDA; "
            "install one with it (pytorch.org/get-started)"
        )


def _serves(code: str, arch: int) -> bool:
    """Whether what PyTorch was compiled for runs on a card: sm_86 on 8.6 to 8.9, PTX on later."""
    kind, _, number = code.partition("_")
    built = int("".join(filter(str.isdigit, number)) or 0)
    return built <= arch and (kind == "compute" or built // 10 == arch // 10)


def _compiler() -> str | None:
    return os.environ.get("CC") or next(filter(None, map(shutil.which, _COMPILERS)), None)


def _about_files(encoders: dict[str, str | None], folders: dict[str, Path | None]) -> Iterator[str]:
    """What keeps results from being written, or from being kept."""
    for codec, encoder in encoders.items():
        if encoder is None:
            lacking = " and ".join(CODECS[codec].encoders)
            yield f"PyAV cannot encode {codec}: it lacks {lacking}; its own wheels have them"
    for name, variable, is_folder in (("cache", env.CACHE, True), ("ledger", env.LEDGER, False)):
        path = folders.get(name)
        if path is not None and not _writable(path, is_folder):
            yield f"{path} cannot be written; name another place in {variable}, or off"


def _writable(path: Path, is_folder: bool) -> bool:
    """Whether a file or folder of this name can be written, or made."""
    try:
        there = next((one for one in (path, *path.parents) if one.exists()), None)
        if there is None or (there != path or is_folder) != there.is_dir():
            return False
    except OSError:  # a parent may not be searched
        return False
    return os.access(there, os.W_OK | os.X_OK if there.is_dir() else os.W_OK)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
