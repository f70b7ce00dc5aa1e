"""Where a bundle comes from: the commit, the tools and the licence that its manifest states."""

import subprocess
from importlib import metadata
from pathlib import Path

from wanrt.engine.manifest import Provenance, Tool
from wanrt.errors import OutputError

TOOLS = ("onnx", "onnx-ir", "onnxscript", "tensorrt-rtx-cu13", "torch", "wanrt")
_ROOT = Path(__file__).resolve().parent.parent


def provenance() -> Provenance:
    """Of what is exported by this installation; an installed wheel knows no commit."""
    commit = _git("rev-parse", "HEAD")
    dirty = bool(commit) and bool(_git("status", "--porcelain", "--untracked-files=no"))
    tools = [Tool(name, version) for name in TOOLS if (version := _version(name))]
    return Provenance(commit, dirty, tuple(tools))


def licence_text() -> bytes:
    """The Apache License 2.0, as it comes with wanrt. Raises OutputError where it is missing."""
    path = _ROOT / "LICENSE"
    if path.is_file():
        return path.read_bytes()
    text = metadata.distribution("wanrt").read_text("licenses/LICENSE")
    if text is None:
        raise OutputError("wanrt's LICENSE is not installed (install the package again)")
    return text.encode()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _git(*words: str) -> str:
    """What git says of the checkout; empty where this is none."""
    if not (_ROOT / ".git").exists():
        return ""
    done = subprocess.run(
        ["git", "-C", str(_ROOT), *words], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()
