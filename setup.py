"""The package list: wanrt/, and the folders beside it, which install as wanrt.kernels and so on."""

from setuptools import find_namespace_packages, setup

# These have no __init__.py: in a checkout it would shadow another project's package `kernels`.
BESIDE = ("kernels", "export", "bench")
trees = [pattern for name in ("wanrt", *BESIDE) for pattern in (name, f"{name}.*")]
found = find_namespace_packages(include=trees, exclude=["*__pycache__*"])
setup(
    packages=[name if name.split(".")[0] == "wanrt" else f"wanrt.{name}" for name in found],
    package_dir={f"wanrt.{name}": name for name in BESIDE if name in found},
)
