"""Every environment variable of wanrt.

WANRT_OPS     which backend does the ops: auto (default), triton, torch or reference
WANRT_CACHE   folder for what can be made again (text features); "off" for none
WANRT_KEYS    folder of the key that signs results; without it wanrt makes one of its own
WANRT_LEDGER  file that lists the marked results; "off" for none
"""

import os
import sys
from pathlib import Path

from wanrt.errors import UsageError

PREFIX = "WANRT_"
OPS, CACHE, KEYS, LEDGER = (f"{PREFIX}{name}" for name in ("OPS", "CACHE", "KEYS", "LEDGER"))
_BACKENDS = ("auto", "triton", "torch", "reference")


def given() -> dict[str, str]:
    """Those of them that are set."""
    return {name: os.environ[name] for name in (OPS, CACHE, KEYS, LEDGER) if name in os.environ}


def ops_backend() -> str:
    """The value of WANRT_OPS. Raises UsageError for one that does not exist."""
    value = os.environ.get(OPS, "auto")
    if value not in _BACKENDS:
        raise UsageError(f"{OPS} is {value!r}; choose of {', '.join(_BACKENDS)}")
    return value


def cache_folder() -> Path | None:
    """The value of WANRT_CACHE, or the system's place for such things; None where it is off."""
    value = os.environ.get(CACHE)
    if value:
        return None if value == "off" else Path(value).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/wanrt"
    return _folder("XDG_CACHE_HOME", ".cache", "cache")


def keys_folder() -> Path | None:
    """The value of WANRT_KEYS; None where it is not set."""
    value = os.environ.get(KEYS)
    return Path(value).expanduser() if value else None


def own_keys_folder() -> Path:
    """Where wanrt keeps the key that it made itself."""
    return _folder("XDG_CONFIG_HOME", ".config", "config") / "keys"


def bundle_key_file() -> Path:
    """The key that signs bundles, which wanrt made for the user."""
    return _folder("XDG_CONFIG_HOME", ".config", "config") / "bundle-key.pem"


def trusted_keys_file() -> Path:
    """The keys of engine bundles that the user trusted."""
    return _folder("XDG_CONFIG_HOME", ".config", "config") / "bundle-keys"


def ledger_file() -> Path | None:
    """The value of WANRT_LEDGER, or the system's place for data; None where it is off."""
    value = os.environ.get(LEDGER)
    if value:
        return None if value == "off" else Path(value).expanduser()
    return _folder("XDG_DATA_HOME", ".local/share", "data") / "ledger.jsonl"


def _folder(variable: str, unix: str, windows: str) -> Path:
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA", Path.home() / "AppData/Local")
        return Path(local) / "wanrt" / windows
    if sys.platform == "darwin":
        return Path.home() / "Library/Application Support/wanrt"
    return Path(os.environ.get(variable) or Path.home() / unix) / "wanrt"
