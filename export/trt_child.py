"""The program of a process of its own that builds one engine; `trt.py` starts it and says why.

It reads a line of JSON and an ONNX graph, and writes a line of JSON and the engine. It imports
nothing but the standard library and TensorRT, so that it starts in a tenth of a second and its
memory looks the same every time.
"""

import ctypes
import importlib
import json
import os
import sys
import time
from types import ModuleType
from typing import Any

_NO_RANDOM_ADDRESSES = 0x0040000  # Linux, <sys/personality.h>
_FP8 = 89  # the lowest compute capability with fp8 products


def main() -> None:
    if "again" not in sys.argv:
        fixed = _fix_addresses()
        if fixed:
            os.execv(sys.executable, [*sys.orig_argv, "again", "fixed"])
    answer = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints is not to get into the answer
    head = json.loads(sys.stdin.buffer.readline())
    found, engine = build(head, sys.stdin.buffer.read())
    found["fixed"] = "fixed" in sys.argv
    with open(answer, "wb") as file:
        file.write(json.dumps(found).encode() + b"\n" + engine)


def build(head: dict[str, Any], graph: bytes) -> tuple[dict[str, Any], bytes]:
    """What became of it, and the engine: empty where there is an `error`."""
    trt = importlib.import_module(head["module"])
    start, lines = time.perf_counter(), []
    builder = trt.Builder(_logger(trt, lines))
    flag = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
    network = builder.create_network(1 << int(flag))
    parser = trt.OnnxParser(network, builder.logger)
    found: dict[str, Any] = {"release": trt.__version__}
    engine = None
    if not parser.parse(graph) or not network.num_outputs:
        reasons = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        found["error"] = reasons[0] if reasons else "it is no ONNX graph"
    elif _takes_fp8(trt, network) and min(head["capabilities"], default=_FP8) < _FP8:
        found["error"], found["needs"] = "fp8", _FP8
    elif missing := _open_inputs(network) - set(head["ranges"]):
        found["error"] = f"no sizes were given for {', '.join(sorted(missing))}"
    else:
        engine = builder.build_serialized_network(network, _config(trt, builder, network, head))
        if engine is None:
            found["error"] = "; ".join(text for level, text in lines if level == "ERROR")
    found |= {"seconds": time.perf_counter() - start, "lines": lines}
    return found, b"" if engine is None else bytes(engine)


def _config(trt: ModuleType, builder: Any, network: Any, head: dict[str, Any]) -> Any:
    """One profile with the ranges that were given; fp32 products in fp32, not in TF32.

    All on one stream: branches side by side would need memory for each of them at once.
    """
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.max_aux_streams = 0
    if head["capabilities"]:
        config.num_compute_capabilities = len(head["capabilities"])
        for i, number in enumerate(head["capabilities"]):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{number}"), i)
    profile = builder.create_optimization_profile()
    for name in sorted(_open_inputs(network)):
        profile.set_shape(name, *map(tuple, head["ranges"][name]))
    config.add_optimization_profile(profile)
    return config


def _open_inputs(network: Any) -> set[str]:
    inputs = (network.get_input(i) for i in range(network.num_inputs))
    return {tensor.name for tensor in inputs if -1 in tuple(tensor.shape)}


def _takes_fp8(trt: ModuleType, network: Any) -> bool:
    layers = (network.get_layer(i) for i in range(network.num_layers))
    results = (layer.get_output(i) for layer in layers for i in range(layer.num_outputs))
    inputs = (network.get_input(i) for i in range(network.num_inputs))
    return any(tensor.dtype == trt.DataType.FP8 for tensor in (*inputs, *results))


def _logger(trt: ModuleType, lines: list[tuple[str, str]]) -> Any:
    """Notes what is worth reading later; of the builder's 10,000 lines most are not."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            told = text.startswith(("Registering attention:", "Found and reassigned"))
            if severity.name != "VERBOSE" or told:
                lines.append((severity.name.removeprefix("INTERNAL_"), text))

    return Logger()


def _fix_addresses() -> bool:
    """Have this process laid out anew without random addresses; False where that is not allowed."""
    personality = getattr(ctypes.CDLL(None), "personality", None) if os.name == "posix" else None
    return personality is not None and personality(_NO_RANDOM_ADDRESSES) != -1


if __name__ == "__main__":
    main()
