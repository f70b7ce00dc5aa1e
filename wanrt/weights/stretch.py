"""Where the bytes of a file lie within another one, such as a member of a stored zip."""

from pathlib import Path
from typing import NamedTuple


class Stretch(NamedTuple):
    """`size` bytes of `file`, from byte `begin`."""

    file: Path
    begin: int
    size: int

    @classmethod
    def whole(cls, file: Path) -> "Stretch":
        """A file by itself. Raises OSError."""
        return cls(file, 0, file.stat().st_size)
