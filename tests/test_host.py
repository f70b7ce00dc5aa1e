"""What a container may use is what counts as the machine's memory."""

from pathlib import Path

import pytest

from wanrt.memory.host import total_bytes

MIB = 1 << 20


def groups(root: Path, lines: str, limits: dict[str, str]) -> Path:
    """A file system with the groups of a process and their limits, as Linux shows them."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(lines)
    for name, limit in limits.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{limit}\n")
    return root


MINE = "0::/user.slice/app.scope\n"
V1 = "12:cpu,cpuacct:/docker/ab\n4:memory:/docker/ab\n1:name=systemd:/docker/ab\n0::/\n"
LEAST = {
    "a container": ("0::/\n", {"memory.max": str(64 * MIB)}, 64),
    "its own group": (MINE, {"user.slice/app.scope/memory.max": str(8 * MIB)}, 8),
    "a group around it": (
        MINE,
        {"user.slice/memory.max": str(6 * MIB), "user.slice/app.scope/memory.max": "max"},
        6,
    ),
    "the least of several": (
        MINE,
        {"user.slice/memory.max": str(6 * MIB), "user.slice/app.scope/memory.max": str(2 * MIB)},
        2,
    ),
    "outside its namespace": ("0::/../other\n", {"memory.max": str(5 * MIB)}, 5),
    "version 1": (V1, {"memory/docker/ab/memory.limit_in_bytes": str(9 * MIB)}, 9),
    "version 1 in a container": (V1, {"memory/memory.limit_in_bytes": str(7 * MIB)}, 7),
}


@pytest.mark.parametrize("case", LEAST)
def test_the_least_limit_holds(case: str, tmp_path: Path) -> None:
    lines, limits, expected = LEAST[case]
    assert total_bytes(groups(tmp_path, lines, limits)) == expected * MIB


NONE = {
    "no limit": (MINE, {"user.slice/memory.max": "max"}),
    "no limit in version 1": (V1, {"memory/memory.limit_in_bytes": "9223372036854771712"}),
    "another's group": (MINE, {"other.slice/memory.max": str(MIB)}),
    "another controller": ("3:cpu:/a\n", {"memory/a/memory.limit_in_bytes": str(MIB)}),
    "no groups": ("", {}),
}


@pytest.mark.parametrize("case", NONE)
def test_without_a_limit_it_is_the_machines(case: str, tmp_path: Path) -> None:
    installed = total_bytes(tmp_path / "nothing")
    assert installed > 64 * MIB
    assert total_bytes(groups(tmp_path, *NONE[case])) == installed
