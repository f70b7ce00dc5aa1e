"""Where a result goes: checked before any work, written beside its name, renamed when complete."""

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Self

from wanrt.errors import OutputError, UsageError

VIDEO_SUFFIXES, IMAGE_SUFFIX = (".mp4", ".webm", ".mkv"), ".png"
MIN_FREE_BYTES = 1 << 20

Seal = Callable[[Path], None]  # does the last to a finished file, before it gets its name


def check_output(
    path: str | PathLike[str], overwrite: bool = False, num_frames: int | None = None
) -> Path:
    """Return `path` if a result can be written there; call it before any work.

    `num_frames`, where known, must be 1 for a `.png`. Raises UsageError for a name that cannot
    be a result, OutputError for a place that cannot take one. Folders are never created.
    """
    target = Path(path)
    _check_name(target, num_frames)
    folder = target.parent
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist and is never created"
        raise OutputError(f"cannot write {target}: the folder {folder} {problem} (mkdir it first)")
    try:
        kind = target.stat().st_mode
    except FileNotFoundError:
        kind = None
    except OSError as error:  # a name too long, a loop of links
        raise write_error(target, error) from error
    if kind is not None:
        if stat.S_ISDIR(kind):
            raise OutputError(f"cannot write {target}: it is a folder (add a file name)")
        if not stat.S_ISREG(kind):
            raise OutputError(f"cannot write {target}: it is not a regular file")
        if not overwrite:
            raise OutputError(f"{target} exists already (-y overwrites it, -o names another file)")
    _check_writable(target)
    return target


def _check_name(target: Path, num_frames: int | None) -> None:
    shown = repr(str(target))
    if not str(target).isprintable():
        raise UsageError(f"the output name {shown} contains a control character (choose another)")
    suffix = target.suffix.lower()
    if suffix not in (*VIDEO_SUFFIXES, IMAGE_SUFFIX):
        ending = f"the ending {suffix}" if suffix else "no ending"
        raise UsageError(
            f"the output name {shown} has {ending}; results are {', '.join(VIDEO_SUFFIXES)} "
            f"(videos) or {IMAGE_SUFFIX} (single images)"
        )
    if suffix == IMAGE_SUFFIX and num_frames is not None and num_frames != 1:
        raise UsageError(
            f"{shown} holds one image, but {num_frames} frames were asked for "
            "(name an .mp4 file, or ask for 1 frame)"
        )


def _check_writable(target: Path) -> None:
    """Try it: permission bits do not tell (root, read-only mounts, network shares)."""
    probe = _part_path(target)
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
        free = shutil.disk_usage(target.parent).free
    except OSError as error:
        raise write_error(target, error) from error
    if free < MIN_FREE_BYTES:
        raise OutputError(
            f"cannot write {target}: {free >> 10} KiB are free in {target.parent}, "
            f"at least {MIN_FREE_BYTES >> 10} KiB are needed (free some, or -o elsewhere)"
        )


def write_error(target: Path, error: OSError) -> OutputError:
    """The system's refusal in the words of the user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"cannot write {target}: no space left in {target.parent} "
            "(free some, or -o elsewhere); the unfinished file was removed"
        )
    return OutputError(f"cannot write {target}: {error.strerror or error}")


def _part_path(target: Path) -> Path:
    return target.with_name(f".wanrt-{secrets.token_hex(6)}{target.suffix}")


class PendingFile:
    """A file that appears under its name only when complete, and otherwise leaves nothing behind.

    As a context manager it yields the temporary path (same folder, so that the rename is atomic),
    commits on success and discards on any exception, Ctrl-C included.
    """

    def __init__(self, target: Path) -> None:
        self.target, self.part = target, _part_path(target)

    def commit(self) -> None:
        """Flush to the disk and rename. Raises OutputError, leaving nothing behind."""
        try:
            with self.part.open("rb+") as file:
                os.fsync(file.fileno())  # some file systems report a full disk only here
            os.replace(self.part, self.target)
        except OSError as error:
            raise write_error(self.target, error) from error
        finally:
            self.discard()

    def discard(self) -> None:
        self.part.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.commit()
        else:
            self.discard()
