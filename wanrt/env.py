"""Every environment variable of wanrt.

WANRT_OPS     which backend does the ops: auto (default), triton, torch or reference
WANRT_CACHE   folder for what can be made again (text features); "off" for none
"""

import os
import sys
from pathlib import Path

from wanrt.errors import UsageError

_BACKENDS = ("auto", "triton", "torch", "reference")


def ops_backend() -> str:
    """The value of WANRT_OPS. Raises UsageError for one that does not exist."""
    value = os.environ.get("WANRT_OPS", "auto")
    if value not in _BACKENDS:
        raise UsageError(f"WANRT_OPS is {value!r}; choose of {', '.join(_BACKENDS)}")
    return value


def cache_folder() -> Path | None:
    """The value of WANRT_CACHE, or the system's place for such things; None where it is off."""
    value = os.environ.get("WANRT_CACHE")
    if value:
        return None if value == "off" else Path(value).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData/Local")) / "wanrt/cache"
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/wanrt"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wanrt"
