"""The libraries that run graphs for wanrt: what brings each, and what of it has been tested."""

from dataclasses import dataclass

from wanrt.installed import release


@dataclass(frozen=True)
class Library:
    """distributions: the packages that bring it, any one of them. tested: in a few words."""

    distributions: tuple[str, ...]
    remedy: str
    tested: str

    def release(self) -> str | None:
        """Of the one that is installed; None where none is. Imports nothing."""
        return release(*self.distributions)


# By the names of `--engine`, and of a kind of engines in a bundle's manifest.
LIBRARIES = {
    "onnxruntime": Library(
        ("onnxruntime-gpu", "onnxruntime"),
        "pip install 'wanrt[onnx]'",
        "on the CPU; on CUDA not tested on hardware",
    ),
    "tensorrt-rtx": Library(
        ("tensorrt-rtx-cu13", "tensorrt-rtx"),
        "pip install 'wanrt[rtx]'",
        "engines are built; running them is not tested on hardware",
    ),
    "tensorrt": Library(
        ("tensorrt-cu13", "tensorrt"),
        "pip install tensorrt-cu13, from NVIDIA's index",
        "not tested on hardware, and no command offers it",
    ),
}
