"""How much host memory the process may use: the machine's, or less inside a container."""

import os
from collections.abc import Iterator
from pathlib import Path

_UNTOLD = 8 << 30  # bytes, taken where the system does not say (Windows)
# By the kind of control group: where its folders are, and the file that holds the limit.
_V1 = ("sys/fs/cgroup/memory", "memory.limit_in_bytes")
_V2 = ("sys/fs/cgroup", "memory.max")


def total_bytes(root: Path = Path("/")) -> int:
    """The machine's memory, or the least limit of the control groups above this process.

    root: the folder in which `proc` and `sys` are. Source: Linux `admin-guide/cgroup-v2.rst` and
    `cgroup-v1/memory.rst`.
    """
    if not hasattr(os, "sysconf"):
        return _UNTOLD
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min((installed, *_group_limits(root)))


def _group_limits(root: Path) -> Iterator[int]:
    """Of the group of this process and of every group around it; the least of them holds."""
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        number, controllers, path = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        folder, name = _V2 if number == "0" else _V1
        parts = path.strip("/").split("/")
        if ".." in parts:  # a group outside the container: what it sees begins at its own
            parts = []
        for depth in range(len(parts) + 1):
            limit = _read(root.joinpath(folder, *parts[:depth], name)) or ""
            if limit.strip().isdecimal():  # else "max": none
                yield int(limit)


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None
