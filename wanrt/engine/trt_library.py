"""TensorRT for RTX, or classic TensorRT: the library, its dtypes and its log.

Both have the same interface, so that a module is handed on in place of a name. Neither was run on
hardware by wanrt.
"""

import logging
from types import ModuleType
from typing import Any

import torch

from wanrt.engine.kinds import LIBRARIES
from wanrt.engine.manifest import EngineKind
from wanrt.errors import UsageError

log = logging.getLogger("wanrt")

_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "FP8": torch.float8_e4m3fn,
    "INT8": torch.int8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}
_NO_DRIVER = "cudaError 35"


def library(kind: EngineKind) -> ModuleType:
    """The module of a kind of engines. Raises UsageError where it is not installed."""
    try:
        if kind == "tensorrt-rtx":
            import tensorrt_rtx as module
        else:
            import tensorrt as module
    except ImportError as error:
        raise UsageError(f"{error}: engines of {kind} want it: {LIBRARIES[kind].remedy}") from error
    return module


def dtype_of(dtype: Any) -> torch.dtype:
    """Of a `DataType` of the library; every dtype that graphs of wanrt have is among them."""
    return _DTYPES[dtype.name]


def recorder(trt: ModuleType) -> Any:
    """A logger of the library that keeps its errors, for `reason`, and passes on its warnings."""

    class Recorder(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            if severity.name in ("ERROR", "INTERNAL_ERROR"):
                self.errors.append(text)
            level = logging.INFO if severity.name == "WARNING" else logging.DEBUG
            log.log(level, "%s: %s", trt.__name__, text)

    return Recorder()


def reason(recorded: Any) -> str:
    """What the library said went wrong since the last time, as one line."""
    said = "; ".join(recorded.errors).replace("\n", " ")
    recorded.errors.clear()
    if _NO_DRIVER in said:
        return "there is no NVIDIA driver, or one that is older than the library wants"
    return said[:600] or "the library gives no reason"
