"""Files written as a folder or as the stored zip: all of them under a new name, or nothing."""

import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from wanrt.engine.store import CHUNK, Store
from wanrt.engine.zip_layout import Entry, directory, local_header
from wanrt.errors import FormatError, OutputError


class Given:
    """What is to be written, as a store: bytes, or paths of files to copy."""

    def __init__(self, contents: Mapping[str, bytes | Path]) -> None:
        """Raises FormatError, as `chunks` does, for a path that cannot be read."""
        self._contents, self.sizes = contents, {}
        for name, content in contents.items():
            if isinstance(content, bytes):
                self.sizes[name] = len(content)
                continue
            try:
                self.sizes[name] = content.stat().st_size
            except OSError as error:
                raise _unreadable(content, name, error) from error

    def chunks(self, name: str) -> Iterator[bytes]:
        content = self._contents[name]
        if isinstance(content, bytes):
            yield content
            return
        try:
            with open(content, "rb") as file:
                while chunk := file.read(CHUNK):
                    yield chunk
        except OSError as error:
            raise _unreadable(content, name, error) from error


def _unreadable(path: Path, name: str, error: OSError) -> FormatError:
    reason = f"cannot be read: {error.strerror or error}"
    return FormatError(path, reason, f"it was to be {name} of a bundle")


def write_store(
    path: Path,
    source: Store,
    names: Sequence[str],
    as_zip: bool,
    check: Callable[[Path], object],
    overwrite: bool = False,
) -> None:
    """Write the named files in this order; `check` reads the result before it gets its name.

    `overwrite`: a zip takes the place of another file; a folder never does. Raises OutputError,
    and what `check` raises.
    """
    if not path.parent.is_dir():
        raise OutputError(f"cannot write {path}: there is no folder {path.parent} (mkdir it first)")
    if os.path.lexists(path) and not (overwrite and as_zip and path.is_file()):
        raise OutputError(f"{path} is there already (choose another name)")
    part = path.with_name(f".wanrt-{secrets.token_hex(6)}{path.suffix}")
    try:
        if as_zip:
            with open(part, "xb") as file:
                _write_zip(file, source, names)
                _flush(file)
        else:
            part.mkdir()
            _write_folder(part, source, names)
        check(part)
        os.replace(part, path)
    except FormatError as error:
        raise FormatError(path, error.reason, error.fix) from error
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def replace_file(path: Path, content: bytes) -> None:
    """A small file, new or in the place of another, in one step. Raises OutputError."""
    part = path.with_name(f".wanrt-{secrets.token_hex(6)}")
    try:
        with open(part, "xb") as file:
            file.write(content)
            _flush(file)
        os.replace(part, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def _write_folder(folder: Path, source: Store, names: Sequence[str]) -> None:
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "xb") as file:
            for chunk in source.chunks(name):
                file.write(chunk)
            _flush(file)


def _write_zip(file: BinaryIO, source: Store, names: Sequence[str]) -> None:
    """Reads each file twice: its CRC stands before it."""
    entries: list[Entry] = []
    for name in names:
        crc = 0
        for chunk in source.chunks(name):
            crc = zlib.crc32(chunk, crc)
        file.write(local_header(name, source.sizes[name], crc))
        entries.append(Entry(name, source.sizes[name], crc, file.tell()))
        for chunk in source.chunks(name):
            file.write(chunk)
    file.write(directory(entries, file.tell()))


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
