"""Which release of a package is installed; asks the package's metadata and imports nothing."""

from importlib.metadata import PackageNotFoundError, version


def release(*distributions: str) -> str | None:
    """Of the first of these that is installed, by their names on a package index; else None."""
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            pass
    return None
