"""Engines of TensorRT for RTX, and by the same interface of classic TensorRT, as `graphs.Runner`s.

Not tested on hardware: no engine was run by wanrt yet. What is tested is the use of the interface,
against a module that stands in for the library (`tests/fake_tensorrt_rtx.py`), and that a machine
without a driver gets a sentence.

One engine has one execution context, so a runner is for one thread. Its memory is the caller's:
inputs and outputs are tensors, and what it works in comes from `trt_place.Workspace`.
"""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from wanrt import env
from wanrt.engine.bundle import Bundle, Host
from wanrt.engine.manifest import EngineKind
from wanrt.engine.trt_library import dtype_of, library, reason, recorder
from wanrt.engine.trt_place import CompiledKernels, CudaPlace, Place, Workspace
from wanrt.errors import FormatError, UsageError

_PROFILE = 0  # engines of wanrt have one


class TrtRunner:
    """One engine on one device; see `graphs.Runner`."""

    def __init__(
        self,
        name: str,
        engine: bytes,
        trt: ModuleType,
        place: Place,
        workspace: Workspace,
        cache: Path | None = None,
    ) -> None:
        """cache: where compiled kernels are kept; None: nowhere. Raises FormatError."""
        self.name, self._trt, self._place, self._workspace = name, trt, place, workspace
        self._log = recorder(trt)
        with place.here():
            self._runtime = trt.Runtime(self._log)  # lives as long as its engine
            self._engine = self._runtime.deserialize_cuda_engine(engine)
            if self._engine is None:
                told = f"{trt.__name__} {trt.__version__} does not take the engine"
                raise FormatError(name, f"{told}: {reason(self._log)}")
            self._kernels = CompiledKernels(cache, engine, place)
            self._context = self._new_context()
        inputs, outputs = trt.TensorIOMode.INPUT, trt.TensorIOMode.OUTPUT
        self.inputs, self.outputs = self._dtypes(inputs), self._dtypes(outputs)
        self._limits = {
            one: [tuple(shape) for shape in self._engine.get_tensor_profile_shape(one, _PROFILE)]
            for one in self.inputs
        }
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._size = 0

    def __call__(
        self, inputs: Mapping[str, Tensor], out: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """See `graphs.Runner`; returns before the card is done, as PyTorch's own ops do."""
        held = {name: self._checked(name, inputs) for name in self.inputs}
        with self._place.here():
            new = self._set_shapes({name: tuple(tensor.shape) for name, tensor in held.items()})
            made = {name: self._result(name, out or {}) for name in self.outputs}
            for name, tensor in (held | made).items():
                self._do(self._context.set_tensor_address(name, tensor.data_ptr()), name)
                self._place.hold(tensor)
            memory = self._workspace.of(self._size)
            self._context.set_device_memory(memory.data_ptr(), memory.nbytes)
            self._do(self._context.execute_async_v3(self._place.stream()), "its execution")
            if new:
                self._kernels.save()
        return made

    def close(self) -> None:
        """Keep what was compiled meanwhile in the background."""
        self._kernels.save()

    def _new_context(self) -> Any:
        """A context whose memory is ours to give. Classic TensorRT compiles nothing at run time."""
        config = self._engine.create_runtime_config()
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        config.set_execution_context_allocation_strategy(strategy)
        if hasattr(config, "create_runtime_cache"):
            self._kernels.attach(config)
        context = self._engine.create_execution_context(config)
        if context is None:
            raise FormatError(self.name, f"no execution context: {reason(self._log)}")
        return context

    def _dtypes(self, mode: Any) -> dict[str, torch.dtype]:
        engine = self._engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        return {
            name: dtype_of(engine.get_tensor_dtype(name))
            for name in names
            if engine.get_tensor_mode(name) == mode
        }

    def _checked(self, name: str, inputs: Mapping[str, Tensor]) -> Tensor:
        if name not in inputs:
            raise UsageError(f"{self.name} wants the input {name}, which was not given")
        tensor, dtype, device = inputs[name], self.inputs[name], self._place.device
        if tensor.dtype != dtype or tensor.device.type != device.type:
            given = f"{tensor.dtype} on {tensor.device.type}"
            raise UsageError(f"{self.name}: {name} is {given}, not {dtype} on {device.type}")
        least, _, most = self._limits[name]
        shape = tuple(tensor.shape)
        fits = len(shape) == len(least) and all(
            low <= size <= high for low, size, high in zip(least, shape, most, strict=True)
        )
        if not fits:
            raise UsageError(
                f"{self.name}: {name} is {shape}; the engine takes {least} to {most} "
                "(another one can be built from the ONNX in the bundle)"
            )
        return tensor.detach().contiguous()

    def _set_shapes(self, shapes: dict[str, tuple[int, ...]]) -> bool:
        """Tell the context; True where they are others than the last time."""
        if shapes == self._shapes:
            return False
        self._shapes = {}  # should one of these fail, the next call begins anew
        for name, shape in shapes.items():
            self._do(self._context.set_input_shape(name, shape), f"{name} {shape}")
        missing = self._context.infer_shapes()
        assert not missing, f"{missing=}"
        self._size = self._context.update_device_memory_size_for_shapes()
        self._shapes = shapes
        return True

    def _result(self, name: str, out: Mapping[str, Tensor]) -> Tensor:
        """The tensor that an output is written to."""
        shape, dtype = tuple(self._context.get_tensor_shape(name)), self.outputs[name]
        if name not in out:
            return torch.empty(shape, dtype=dtype, device=self._place.device)
        given = out[name]
        assert given.is_contiguous(), f"{name=} {given.stride()=}"
        found = (tuple(given.shape), given.dtype, given.device.type)
        if found != (shape, dtype, self._place.device.type):
            wanted = f"{shape} of {dtype} on {self._place.device.type}"
            raise UsageError(f"{self.name}: {name} is to be written to {found}, not {wanted}")
        return given

    def _do(self, done: bool, what: str) -> None:
        if not done:
            self._shapes = {}
            raise UsageError(f"{self.name}: the engine refuses {what}: {reason(self._log)}")


class TrtGraphs:
    """The engines of a bundle for one card; each is read, checked and loaded when first asked for.

    See `graphs.PlannedGraphs`.
    A graph that has no engine for the card is not there: what it would do stays with the others.
    """

    def __init__(
        self, bundle: Bundle, device: torch.device, kind: EngineKind, limit: int | None = None
    ) -> None:
        """limit: bytes that engines may work in. Raises UsageError, and FormatError where the
        bundle has no engine at all for this card and this release of the library."""
        self._trt, self._place = library(kind), CudaPlace(device)
        self._bundle = bundle
        self.host = Host(kind, self._trt.__version__, self._place.compute_capability)
        self._workspace = Workspace(self._place, limit)
        self._loaded: dict[str, TrtRunner] = {}
        names = {engine.graph for engine in bundle.manifest.engines}
        if not any(self.has(name) for name in names):
            told = f"{kind} {self.host.release} on compute capability"
            reason = f"has no engine for {told} {self.host.compute_capability / 10}"
            raise FormatError(bundle.path, reason, "`wanrt bundle list` says what it has")

    def has(self, name: str) -> bool:
        """Whether there is an engine of this graph for this card."""
        return any(
            engine.graph == name
            and (engine.kind, engine.release) == self.host[:2]
            and self.host.compute_capability in engine.compute_capabilities
            for engine in self._bundle.manifest.engines
        )

    def get(self, name: str) -> TrtRunner:
        """See `graphs.Graphs`."""
        if name not in self._loaded:
            engine = self._bundle.read(self._bundle.engine_for(name, self.host).member)
            self._loaded[name] = TrtRunner(
                name, engine, self._trt, self._place, self._workspace, env.cache_folder()
            )
        return self._loaded[name]

    def limit(self, num_bytes: int) -> None:
        """See `graphs.PlannedGraphs`."""
        self._workspace.limit = num_bytes

    def release(self) -> None:
        """See `graphs.PlannedGraphs`."""
        self._workspace.release()

    def close(self) -> None:
        """Keep what was compiled; engines stay loaded."""
        for runner in self._loaded.values():
            runner.close()
