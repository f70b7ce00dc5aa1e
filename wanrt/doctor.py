"""What a machine offers wanrt, and what stands in the way: what a report of a fault should hold."""

import os
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
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
_TRITON = ("triton", "triton-windows")
_COMPILERS = ("cc", "gcc", "clang")  # one of them builds what starts a kernel of Triton
_DRIVER = Path("/proc/driver/nvidia/version")  # is there where NVIDIA's driver is, on Linux


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

    wanrt: its release, "" for a bare checkout. memory: bytes that the process may have. cuda: what
    PyTorch is built for. packages: releases, None where one is not installed. encoders: FFmpeg's,
    by codec. device, backends: what `auto` takes, and how many ops each backend does there.
    problems: sentences with their remedies.
    """

    wanrt: str
    commit: str
    system: str
    python: str
    processor: str
    threads: int
    memory: int
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
    about, card = machine("cpu"), _card()
    device = "cpu" if card is None else "cuda"
    packages = {name: release(name) for name in _PACKAGES}
    packages["triton"] = release(*_TRITON)
    packages |= {name: library.release() for name, library in LIBRARIES.items()}
    encoders = {codec: _encoder(codec) for codec in CODECS}
    backends, wrong = _backends(device)
    return Report(
        wanrt=release("wanrt") or "",
        commit=str(about["commit"]),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        processor=str(about["machine"]),
        threads=torch.get_num_threads(),
        memory=host.total_bytes(),
        card=card,
        cuda=torch.version.cuda,
        packages=packages,
        encoders=encoders,
        folders=_folders(),
        variables=env.given(),
        device=device,
        backends=backends,
        problems=(*wrong, *_about_the_card(card, packages["triton"]), *_about_files(encoders)),
    )


def _card() -> Card | None:
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    return Card(found.name, f"{found.major}.{found.minor}", total, free, driver_release())


def _encoder(codec: str) -> str | None:
    try:
        return check_codec(codec)[0]
    except UsageError:
        return None


def _backends(device: str) -> tuple[dict[str, int], list[str]]:
    """How many ops each backend does, as WANRT_OPS asks, and why some cannot be done so."""
    try:
        wanted = env.ops_backend()
    except UsageError as error:
        return {}, [str(error)]
    count, wrong = Counter[str](), list[str]()
    for op in registry.OPS:
        taken = dtypes_of(op)
        target = registry.here(torch.bfloat16 if torch.bfloat16 in taken else taken[0], device)
        try:
            count[registry.resolve(op, target, wanted).backend] += 1
        except UnsupportedOp as error:
            wrong.append(f"{env.OPS} is {wanted!r}: {error}")
    return dict(count), wrong[:1]


def _folders() -> dict[str, str]:
    found = {
        "cache": env.cache_folder(),
        "keys": env.keys_folder() or env.own_keys_folder(),
        "ledger": env.ledger_file(),
    }
    return {name: "off" if path is None else str(path) for name, path in found.items()}


def _about_the_card(card: Card | None, triton: str | None) -> Iterator[str]:
    """What keeps a card from being used, or used well."""
    told = torch.__version__
    if card is None:
        if torch.version.cuda is not None:
            yield (
                f"PyTorch {told} is built for CUDA {torch.version.cuda} and finds no card: there "
                "is no driver, one too old for it, or a container without --gpus all"
            )
        elif _DRIVER.exists() or shutil.which("nvidia-smi"):
            yield (
                f"there is an NVIDIA driver, and PyTorch {told} is built without CUDA; "
                "install one with it (pytorch.org/get-started)"
            )
        return
    if float(card.capability) < registry.MIN_ARCH / 10:
        yield (
            f"compute capability {card.capability}: the kernels need {registry.MIN_ARCH / 10}, "
            "so PyTorch does everything, slower"
        )
    elif triton is None:
        yield "without Triton PyTorch does everything, slower: pip install 'wanrt[gpu]'"
    elif sys.platform != "win32" and not _compiler():
        yield (
            f"Triton {triton} finds no C compiler, and needs one to start a kernel: "
            "install gcc, or name one in CC"
        )


def _compiler() -> str | None:
    return os.environ.get("CC") or next(filter(None, map(shutil.which, _COMPILERS)), None)


def _about_files(encoders: dict[str, str | None]) -> Iterator[str]:
    """What keeps results from being written, or from being kept."""
    for codec, encoder in encoders.items():
        if encoder is None:
            lacking = " and ".join(CODECS[codec].encoders)
            yield f"PyAV cannot encode {codec}: it lacks {lacking}; its own wheels have them"
    for variable, path in ((env.CACHE, env.cache_folder()), (env.LEDGER, env.ledger_file())):
        if path is not None and not _writable(path):
            yield f"{path} cannot be written; name another place in {variable}, or off"


def _writable(path: Path) -> bool:
    """Whether a file or folder of this name is, or could be made."""
    there = next(one for one in (path, *path.parents) if one.exists())
    return (there == path or there.is_dir()) and os.access(there, os.W_OK)
