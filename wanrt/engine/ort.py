"""Graphs run by ONNX Runtime: on the CPU, and on CUDA where onnxruntime-gpu is installed.

What runs on the CPU here is the oracle of every engine that is built from the same graphs. On CUDA
nothing of this file was tested on hardware.
"""

from collections.abc import Mapping

import onnxruntime
import torch
from torch import Tensor

from wanrt.engine.bundle import Bundle
from wanrt.errors import FormatError, UsageError

_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(float8e4m3fn)": torch.float8_e4m3fn,
    "tensor(int8)": torch.int8,
    "tensor(int32)": torch.int32,
    "tensor(int64)": torch.int64,
    "tensor(bool)": torch.bool,
}
# Numbers of ONNX's element types (onnx.proto, TensorProto.DataType).
_ELEMENTS = {
    torch.float32: 1,
    torch.int8: 3,
    torch.int32: 6,
    torch.int64: 7,
    torch.bool: 9,
    torch.float16: 10,
    torch.bfloat16: 16,
    torch.float8_e4m3fn: 17,
}
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
CPU_DTYPES = "fp32, fp16, int8 and fp8"  # of graphs; ONNX Runtime has no bf16 products on a CPU


class OrtRunner:
    """One graph in a session of its own; see `graphs.Runner`."""

    def __init__(self, name: str, graph: bytes, device: torch.device, threads: int = 0) -> None:
        """threads: on a CPU; 0: as many as PyTorch uses. Raises FormatError."""
        self.name, self._device = name, device
        try:
            self._session = onnxruntime.InferenceSession(
                graph, _options(threads), providers=[_provider(device)]
            )
        except _errors() as error:
            reason = f"{name}: ONNX Runtime {onnxruntime.__version__} does not take the graph: "
            raise FormatError("the engine", reason + str(error)[:400]) from error
        self.inputs = {one.name: _DTYPES[one.type] for one in self._session.get_inputs()}
        self.outputs = {one.name: _DTYPES[one.type] for one in self._session.get_outputs()}

    def __call__(
        self, inputs: Mapping[str, Tensor], out: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """See `graphs.Runner`."""
        binding, out = self._session.io_binding(), out or {}
        held = {name: self._checked(name, inputs) for name in self.inputs}
        for name, tensor in held.items():
            binding.bind_input(name, *self._place(tensor))
        for name in self.outputs:
            if name in out:
                assert out[name].is_contiguous(), f"{name=} {out[name].stride()=}"
                binding.bind_output(name, *self._place(out[name]))
            else:
                binding.bind_output(name, self._device.type, self._device.index or 0)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        try:
            self._session.run_with_iobinding(binding)
        except _errors() as error:
            raise UsageError(f"{self.name}: {str(error)[:400]}") from error
        found = dict(zip(self.outputs, binding.get_outputs(), strict=True))
        return {
            name: out[name] if name in out else _tensor(value, self.outputs[name])
            for name, value in found.items()
        }

    def _checked(self, name: str, inputs: Mapping[str, Tensor]) -> Tensor:
        if name not in inputs:
            raise UsageError(f"{self.name} wants the input {name}, which was not given")
        tensor, dtype = inputs[name], self.inputs[name]
        if tensor.dtype != dtype or tensor.device.type != self._device.type:
            given = f"{tensor.dtype} on {tensor.device.type}"
            raise UsageError(f"{self.name}: {name} is {given}, not {dtype} on {self._device.type}")
        return tensor.detach().contiguous()

    def _place(self, tensor: Tensor) -> tuple[str, int, int, list[int], int]:
        index = self._device.index or 0
        shape = list(tensor.shape)
        return self._device.type, index, _ELEMENTS[tensor.dtype], shape, tensor.data_ptr()


class OrtGraphs:
    """The graphs of a bundle; each is read, checked and loaded when first asked for."""

    def __init__(self, bundle: Bundle, device: torch.device, threads: int = 0) -> None:
        """Raises UsageError where this machine's ONNX Runtime does not serve the device."""
        _check_provider(device)
        self._bundle, self._device, self._threads = bundle, device, threads
        self._graphs = {graph.name: graph for graph in bundle.manifest.graphs}
        self._loaded: dict[str, OrtRunner] = {}
        for graph in bundle.manifest.graphs if device.type == "cpu" else ():
            if graph.precision == "bf16":
                reason = f"{graph.name} is bf16; ONNX Runtime multiplies {CPU_DTYPES} on a CPU"
                raise FormatError(bundle.path, reason, "export it with --precision fp32")

    def has(self, name: str) -> bool:
        return name in self._graphs

    def get(self, name: str) -> OrtRunner:
        """See `graphs.Graphs`."""
        if name not in self._graphs:
            raise FormatError(self._bundle.path, f"has no graph {name}", "export the model again")
        if name not in self._loaded:
            graph = self._bundle.read(self._graphs[name].member, _MAX_GRAPH)
            self._loaded[name] = OrtRunner(name, graph, self._device, self._threads)
        return self._loaded[name]


_MAX_GRAPH = (1 << 31) - 1  # bytes of a protobuf


def _options(threads: int) -> onnxruntime.SessionOptions:
    """Eight-bit graphs run as they are written: ONNX Runtime's own rewriting of them refuses fp8
    and makes products of int8 that saturate on processors without VNNI."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.log_severity_level = 3  # errors; they are raised
    options.intra_op_num_threads = threads or torch.get_num_threads()
    return options


def _provider(device: torch.device) -> object:
    name = _PROVIDERS[device.type]
    return (name, {"device_id": device.index or 0}) if device.type == "cuda" else name


def _check_provider(device: torch.device) -> None:
    there = onnxruntime.get_available_providers()
    if _PROVIDERS[device.type] not in there:
        raise UsageError(
            f"ONNX Runtime {onnxruntime.__version__} here has {', '.join(there)}; "
            f"for device {device.type!r} install onnxruntime-gpu in its place"
        )


def _errors() -> tuple[type[Exception], ...]:
    """What sessions raise: no class is the parent of all."""
    state = onnxruntime.capi.onnxruntime_pybind11_state
    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NotImplemented")
    return (RuntimeError, *(getattr(state, name) for name in names))


class _OnDevice:
    """Memory of ONNX Runtime on a card, as PyTorch takes it in without a copy."""

    def __init__(self, value: onnxruntime.OrtValue, dtype: torch.dtype) -> None:
        self._value = value  # its memory lives as long as this
        kind = {1: "|u1", 2: "<u2", 4: "<i4", 8: "<i8"}[dtype.itemsize]
        self.__cuda_array_interface__ = {
            "shape": tuple(value.shape()),
            "typestr": kind,
            "data": (value.data_ptr(), False),
            "version": 3,
        }


def _tensor(value: onnxruntime.OrtValue, dtype: torch.dtype) -> Tensor:
    if value.device_name() == "cpu":
        return torch.from_numpy(value.numpy())
    return torch.as_tensor(_OnDevice(value, dtype), device="cuda").view(dtype)
