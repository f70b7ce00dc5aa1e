"""Every environment variable of wanrt.

WANRT_OPS   which backend does the ops: auto (default), triton, torch or reference
"""

import os

from wanrt.errors import UsageError

_BACKENDS = ("auto", "triton", "torch", "reference")


def ops_backend() -> str:
    """The value of WANRT_OPS. Raises UsageError for one that does not exist."""
    value = os.environ.get("WANRT_OPS", "auto")
    if value not in _BACKENDS:
        raise UsageError(f"WANRT_OPS is {value!r}; choose of {', '.join(_BACKENDS)}")
    return value
