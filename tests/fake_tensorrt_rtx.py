"""A FAKE of TensorRT for RTX's Python interface, for tests on machines without a card.

It has the names that `wanrt/engine/trt.py` uses, takes engines that `engine_of` made, checks every
call as strictly as the library's documentation states it, and does the arithmetic with ONNX Runtime
on the CPU. Work is done when `FakePlace.synchronise` is called, as a stream would do it later: an
address that belongs to no living tensor then is found. It says nothing about speed or about what
the real library computes.
"""

import ctypes
import enum
import json
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from wanrt.engine.manifest import Input
from wanrt.engine.ort import OrtRunner

__version__ = "1.7.1.116"
MAGIC = b"a fake engine\n"
STREAM = 77  # the handle of the one stream
PER_ELEMENT = 8  # bytes of workspace for each element of the inputs


class DataType(enum.Enum):
    FLOAT, HALF, BF16, INT8, INT32, INT64, BOOL, FP8 = range(8)


class TensorIOMode(enum.Enum):
    NONE, INPUT, OUTPUT = range(3)


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class Severity(enum.Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    def log(self, severity: Severity, text: str) -> None:
        raise NotImplementedError


_DTYPES = {
    torch.float32: DataType.FLOAT,
    torch.float16: DataType.HALF,
    torch.int8: DataType.INT8,
    torch.int32: DataType.INT32,
    torch.int64: DataType.INT64,
    torch.bool: DataType.BOOL,
    torch.float8_e4m3fn: DataType.FP8,
}


Sizes = list[int | str]


def engine_of(
    graph: bytes, inputs: Sequence[Input], outputs: dict[str, Sizes] | None = None
) -> bytes:
    """The bytes of a fake engine; dimensions of outputs are numbers, or `input:axis`.

    Without them, shapes are found by running the graph on zeros.
    """
    head = {"inputs": [asdict(one) for one in inputs], "outputs": outputs}
    return MAGIC + json.dumps(head).encode() + b"\n" + graph


class FakePlace:
    """A CPU that works like a card with one stream; see `trt_place.Place`."""

    device = torch.device("cpu")
    compute_capability = 89
    at_once = False  # work is done when it comes, for what reads results between two engines

    def __init__(self) -> None:
        self._held: list[Tensor] = []
        self._living: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._queue: list[Callable[[], None]] = []
        current.append(self)

    def stream(self) -> int:
        return STREAM

    def hold(self, tensor: Tensor) -> None:
        self._held.append(tensor)
        self._living[tensor.data_ptr()] = (weakref.ref(tensor), tensor.nbytes)

    def here(self) -> Any:
        return nullcontext()

    def identity(self) -> str:
        return "fake-0"

    def enqueue(self, work: Callable[[], None]) -> None:
        self._queue.append(work)
        if self.at_once:
            self.synchronise()

    def synchronise(self) -> None:
        """Do the work that waits, then let go of what was held for it."""
        while self._queue:
            self._queue.pop(0)()
        self._held.clear()

    def check(self, name: str, address: int, size: int) -> None:
        """Fails unless so many bytes of a living tensor begin there."""
        reference, there = self._living.get(address, (None, 0))
        assert reference is not None, f"{name}: nobody held the tensor at {address:#x}"
        assert reference() is not None, f"{name}: the tensor at {address:#x} was freed"
        assert size <= there, f"{name}: {size} bytes at {address:#x}, where there are {there}"


current: list[FakePlace] = []  # the last one is where engines run


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, engine: bytes) -> "ICudaEngine | None":
        if not engine.startswith(MAGIC):
            self._logger.log(Severity.ERROR, "magicTag == kEXPECTED_MAGIC_TAG failed")
            return None
        head, _, graph = engine.removeprefix(MAGIC).partition(b"\n")
        return ICudaEngine(json.loads(head), graph, self._logger)


class ICudaEngine:
    def __init__(self, head: dict[str, Any], graph: bytes, logger: ILogger) -> None:
        self._logger = logger
        self._runner = OrtRunner("fake", graph, torch.device("cpu"), threads=1)
        self._limits = {one["name"]: one for one in head["inputs"]}
        told: dict[str, Sizes] | None = head["outputs"]
        self._results = dict.fromkeys(self._runner.outputs) if told is None else told
        assert set(self._limits) == set(self._runner.inputs)
        assert set(self._results) == set(self._runner.outputs)
        self._tried: dict[Any, dict[str, tuple[int, ...]]] = {}
        self._names = [*self._limits, *self._results]
        self.num_io_tensors = len(self._names)

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self._limits else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return _DTYPES[(dict(self._runner.inputs) | self._runner.outputs)[name]]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        assert profile_index == 0
        return [tuple(self._limits[name][end]) for end in ("min", "opt", "max")]

    def create_runtime_config(self) -> "IRuntimeConfig":
        return IRuntimeConfig()

    def create_execution_context(self, runtime_config: "IRuntimeConfig") -> "IExecutionContext":
        return IExecutionContext(self, runtime_config)


class IRuntimeConfig:
    def __init__(self) -> None:
        self._strategy = ExecutionContextAllocationStrategy.STATIC
        self._cache: IRuntimeCache | None = None

    def set_execution_context_allocation_strategy(
        self, strategy: ExecutionContextAllocationStrategy
    ) -> None:
        self._strategy = strategy

    def create_runtime_cache(self) -> "IRuntimeCache":
        return IRuntimeCache()

    def set_runtime_cache(self, cache: "IRuntimeCache") -> bool:
        self._cache = cache
        return True


class IRuntimeCache:
    """Its content is the list of shapes that were compiled for."""

    _HEAD = f"kernels of {__version__}\n".encode()

    def __init__(self) -> None:
        self.compiled: list[str] = []

    def deserialize(self, blob: bytes) -> bool:
        if not bytes(blob).startswith(self._HEAD):
            return False
        self.compiled = bytes(blob).removeprefix(self._HEAD).decode().splitlines()
        return True

    def serialize(self) -> memoryview:
        return memoryview(self._HEAD + "\n".join(self.compiled).encode())


class IExecutionContext:
    """Refusals that the library answers with False are answered so, with a line in the log."""

    def __init__(self, engine: ICudaEngine, config: IRuntimeConfig) -> None:
        assert config._strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        self._engine, self._config = engine, config
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._memory: tuple[int, int] | None = None
        self._need: int | None = None  # of workspace; None where shapes are newer

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        limits = self._engine._limits.get(name)
        if limits is None or len(shape) != len(limits["min"]):
            return self._refuse(f"{name} is no input of {len(shape)} dimensions")
        ranges = zip(limits["min"], shape, limits["max"], strict=True)
        if not all(low <= size <= high for low, size, high in ranges):
            return self._refuse(f"{name} {shape} is out of the profile")
        self._shapes[name], self._need = tuple(shape), None
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self._engine._limits if name not in self._shapes]

    def update_device_memory_size_for_shapes(self) -> int:
        assert not self.infer_shapes(), "shapes are missing"
        elements = sum(torch.Size(shape).numel() for shape in self._shapes.values())
        self._need = PER_ELEMENT * elements
        return self._need

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if self._engine._results[name] is None:
            return self._tried()[name]

        def size(dimension: int | str) -> int:
            if isinstance(dimension, int):
                return dimension
            source, _, axis = dimension.partition(":")
            return self._shapes[source][int(axis)]

        return tuple(size(dimension) for dimension in self._engine._results[name])

    def _tried(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all results, found by trying; once for each set of shapes."""
        key = tuple(sorted(self._shapes.items()))
        if key not in self._engine._tried:
            runner = self._engine._runner
            zeros = {n: torch.zeros(s, dtype=runner.inputs[n]) for n, s in self._shapes.items()}
            found = {name: tuple(tensor.shape) for name, tensor in runner(zeros).items()}
            self._engine._tried[key] = found
        return self._engine._tried[key]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine._names or not memory:
            return self._refuse(f"{name} at {memory:#x}")
        self._addresses[name] = memory
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        self._memory = (memory, size)

    def execute_async_v3(self, stream_handle: int) -> bool:
        place, engine = current[-1], self._engine
        if stream_handle != STREAM:
            return self._refuse(f"there is no stream {stream_handle}")
        missing = [*self.infer_shapes(), *(set(engine._names) - set(self._addresses))]
        if missing or self._need is None or self._memory is None:
            return self._refuse(f"not set: {missing or 'memory'}")
        if self._memory[1] < self._need:
            return self._refuse(f"works in {self._need} bytes and was given {self._memory[1]}")
        shapes, addresses, memory = dict(self._shapes), dict(self._addresses), self._memory
        results = {name: self.get_tensor_shape(name) for name in engine._results}

        def work() -> None:
            place.check("workspace", *memory)
            runner = engine._runner
            given = {
                n: self._at(place, n, addresses[n], shapes[n], runner.inputs[n]) for n in shapes
            }
            made = runner(given)
            for name, shape in results.items():
                assert tuple(made[name].shape) == shape, f"{name=} {made[name].shape=} {shape=}"
                dtype = runner.outputs[name]
                self._at(place, name, addresses[name], shape, dtype).copy_(made[name])

        place.enqueue(work)
        if self._config._cache is not None and str(shapes) not in self._config._cache.compiled:
            self._config._cache.compiled.append(str(shapes))
        return True

    @staticmethod
    def _at(
        place: FakePlace, name: str, address: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        place.check(name, address, size)
        memory = (ctypes.c_char * size).from_address(address)
        return torch.frombuffer(memory, dtype=dtype).reshape(shape)

    def _refuse(self, text: str) -> bool:
        self._engine._logger.log(Severity.ERROR, text)
        return False
