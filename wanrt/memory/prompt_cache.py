"""Text features on disk, by content: a prompt that was encoded once loads no text encoder again.

A file's name is the hash of the tokens and of the encoder's fingerprint, so that prompts cannot be
read off names. The folder is the user's own (`WANRT_CACHE`), readable by nobody else.
"""

import hashlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

MAX_FILES = 512  # a short prompt's features are half a megabyte
_VERSION = b"wanrt text features 1"
_PAGE, _PAGES = 4096, 64  # of an encoder's file that are looked at


class PromptCache:
    """Features `[n, text_dim]` of prompts, for one text encoder in one dtype."""

    def __init__(self, folder: Path, encoder: Path, dtype: torch.dtype) -> None:
        """Reads 64 pages of the encoder's file (of its largest, if it is in parts)."""
        self.folder = folder
        self._start = hashlib.sha256(_VERSION + str(dtype).encode() + fingerprint(encoder))

    def get(self, ids: Tensor) -> Tensor | None:
        """The features of these tokens, if they are known; a broken file counts as unknown."""
        try:
            data = self._path(ids).read_bytes()
            features = load(data)["features"]
        except (OSError, SafetensorError, KeyError):
            return None
        return features if len(features) == ids.numel() else None

    def put(self, ids: Tensor, features: Tensor) -> None:
        """Remember; the oldest files go when there are too many. A full disk is no error."""
        path = self._path(ids)
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary.write_bytes(save({"features": features.cpu().contiguous()}))
            temporary.replace(path)
            self._prune()
        except OSError:
            temporary.unlink(missing_ok=True)

    def _path(self, ids: Tensor) -> Path:
        name = self._start.copy()
        name.update(ids.to(torch.int64).cpu().numpy().tobytes())
        return self.folder / f"{name.hexdigest()}.safetensors"

    def _prune(self) -> None:
        files = sorted(self.folder.glob("*.safetensors"), key=lambda p: p.stat().st_mtime)
        for path in files[: max(0, len(files) - MAX_FILES)]:
            path.unlink(missing_ok=True)


def fingerprint(encoder: Path) -> bytes:
    """Of a weight file, or of the largest in a folder: its size and pages from all over it."""
    if encoder.is_dir() or encoder.name.endswith(".index.json"):
        folder = encoder if encoder.is_dir() else encoder.parent
        encoder = max((p for p in folder.iterdir() if p.is_file()), key=lambda p: p.stat().st_size)
    size = encoder.stat().st_size
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with encoder.open("rb") as file:
        for i in range(_PAGES):
            file.seek(max(0, size - _PAGE) * i // (_PAGES - 1))
            digest.update(file.read(_PAGE))
    return digest.digest()
