"""JSON out of files that nobody vouches for: UTF-8, no key twice, bounded depth."""

import json
from pathlib import Path
from typing import Any

from wanrt.errors import FormatError

AGAIN = "download or copy the file again"


def parse_json(path: Path, raw: bytes, what: str) -> Any:
    """Strict JSON: UTF-8, no key twice in one object, bounded depth."""
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except ValueError as error:
        raise FormatError(path, f"the {what} is not valid: {str(error)[:120]}", AGAIN) from None
    except RecursionError:
        raise FormatError(path, f"the {what} is nested too deeply", AGAIN) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"{twice[:80]!r} appears twice")
    return result
