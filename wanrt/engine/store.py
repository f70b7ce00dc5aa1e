"""The two forms of a bundle, a folder and a stored zip, as files by name that are only ever read.

Nothing is extracted and nothing is opened by a name from inside: the caller names what it wants.
"""

import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from wanrt.engine import zip_layout
from wanrt.errors import FormatError
from wanrt.weights.stretch import Stretch

CHUNK = 1 << 20  # bytes read at once
MAX_FOLDERS = 256
_AGAIN = "copy or build the bundle again"


class Store(Protocol):
    """`sizes`: bytes of every file by its name; `chunks` reads one, exactly that long."""

    sizes: dict[str, int]

    def chunks(self, name: str) -> Iterator[bytes]: ...


def open_store(path: Path) -> "Folder | Zip":
    """Raises FormatError for what is neither form, or has links, gaps or odd names."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return Folder(path)
        if stat.S_ISREG(mode):
            return Zip(path)
    except OSError as error:
        raise FormatError(path, f"cannot be read: {error.strerror or error}") from error
    raise FormatError(path, "is neither a folder nor a file", "a bundle is one of these")


class Folder:
    """A bundle as a folder of regular files with one name each; no links of either kind."""

    def __init__(self, path: Path) -> None:
        self.path, self.sizes = path, {}
        folders = [""]
        for folder in folders:  # it grows on the way
            folders += self._look_into(folder)
            if len(folders) > MAX_FOLDERS:
                raise FormatError(path, f"holds more than {MAX_FOLDERS} folders", _AGAIN)

    def _look_into(self, folder: str) -> list[str]:
        """The folders in one of them; its files are noted."""
        folders = []
        with os.scandir(self.path / folder) as found:
            for one in found:
                name = folder + one.name
                if len(self.sizes) == zip_layout.MAX_ENTRIES:
                    raise FormatError(self.path, f"more than {len(self.sizes)} files", _AGAIN)
                state = one.stat(follow_symlinks=False)
                if stat.S_ISDIR(state.st_mode):
                    folders.append(f"{name}/")
                else:
                    self._check(name, os.lstat(one.path))  # scandir knows no links on Windows
                    self.sizes[name] = state.st_size
        return folders

    def chunks(self, name: str) -> Iterator[bytes]:
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        try:
            with open(os.open(self.path / name, flags), "rb") as file:
                self._check(name, os.fstat(file.fileno()))
                yield from _read(self.path, name, file, self.sizes[name])
                if file.read(1):
                    raise FormatError(self.path, f"{name} grew while it was read", _AGAIN)
        except OSError as error:
            reason = f"{name} cannot be read: {error.strerror or error}"
            raise FormatError(self.path, reason, _AGAIN) from error

    def stretch(self, name: str) -> Stretch:
        """Where its bytes lie."""
        return Stretch(self.path / name, 0, self.sizes[name])

    def _check(self, name: str, state: os.stat_result) -> None:
        if stat.S_ISREG(state.st_mode) and state.st_nlink == 1:
            return
        kind = "a hard link" if stat.S_ISREG(state.st_mode) else "no regular file"
        kind = "a symbolic link" if stat.S_ISLNK(state.st_mode) else kind
        raise FormatError(self.path, f"{ascii(name)} is {kind}", "put a copy of the file there")


class Zip:
    """A bundle as a stored zip. The file is opened anew for every member."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            total = os.fstat(file.fileno()).st_size
            listed = zip_layout.read_entries(path, file, total)
        self.entries = {entry.name: entry for entry in listed}
        self.sizes = {entry.name: entry.size for entry in listed}

    def chunks(self, name: str) -> Iterator[bytes]:
        entry, crc = self.entries[name], 0
        try:
            with open(self.path, "rb") as file:
                file.seek(entry.begin)
                for chunk in _read(self.path, name, file, entry.size):
                    crc = zlib.crc32(chunk, crc)
                    yield chunk
        except OSError as error:
            raise FormatError(self.path, f"cannot be read: {error.strerror or error}") from error
        if crc != entry.crc:
            raise FormatError(self.path, f"{name} does not have the CRC of its header", _AGAIN)

    def stretch(self, name: str) -> Stretch:
        """Where its bytes lie: they are stored as they are."""
        return Stretch(self.path, self.entries[name].begin, self.sizes[name])


def _read(path: Path, name: str, file: BinaryIO, size: int) -> Iterator[bytes]:
    """Exactly that many bytes from where the file stands."""
    while size:
        chunk = file.read(min(size, CHUNK))
        if not chunk:
            raise FormatError(path, f"ended while {name} was being read", _AGAIN)
        size -= len(chunk)
        yield chunk
