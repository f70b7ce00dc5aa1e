"""Wan video models, fast and predictable on the card you own; public names load on first use."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wanrt import sampler
    from wanrt.config import GenerateConfig, Lora
    from wanrt.media.marking import Marking
    from wanrt.media.saving import save_video
    from wanrt.media.verification import verify
    from wanrt.pipeline import Pipeline
    from wanrt.weights.load import load_component

__all__ = [
    "GenerateConfig",
    "Lora",
    "Marking",
    "Pipeline",
    "load_component",
    "sampler",
    "save_video",
    "verify",
]

_HOME = {
    "GenerateConfig": "wanrt.config",
    "Lora": "wanrt.config",
    "Marking": "wanrt.media.marking",
    "Pipeline": "wanrt.pipeline",
    "load_component": "wanrt.weights.load",
    "save_video": "wanrt.media.saving",
    "verify": "wanrt.media.verification",
}

# In a checkout `kernels/`, `bench/` and `export/` lie beside this folder, installed inside it.
_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "pyproject.toml").is_file():
    __path__.append(str(_ROOT))


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name == "sampler":
        return import_module("wanrt.sampler")
    raise AttributeError(f"module 'wanrt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
