"""From a path to a module with its weights, one tensor at a time.

    load_component(path, "vae")      path: a file, a component's folder, or a whole model's folder

The module is built on the meta device from the shape that the header tells, checked name by name
and shape by shape, and only then filled.
"""

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from wanrt.errors import FormatError
from wanrt.kernels.reference_vae import QuantizedConv
from wanrt.memory.offload import WeightStream, assign
from wanrt.memory.placement import Placement
from wanrt.models.eight_bit import make_eight_bit, policy_formats
from wanrt.models.layers import choose
from wanrt.models.vae_int8 import normalised_convs, put_convs
from wanrt.models.vae_layers import with_fp16_sums
from wanrt.quant.policy import EightBit
from wanrt.weights.checkpoint import Checkpoint
from wanrt.weights.contents import Weights
from wanrt.weights.detect import Detected
from wanrt.weights.names import Kind
from wanrt.weights.parts import find_component
from wanrt.weights.specs import Spec
from wanrt.weights.static_convs import SIDE, made_convs, stored_convs

_CLASSES: dict[Kind, tuple[str, str]] = {
    "dit": ("wanrt.models.dit", "WanDiT"),
    "vae": ("wanrt.models.vae", "WanVAE"),
    "umt5": ("wanrt.models.umt5", "Umt5Encoder"),
    "clip": ("wanrt.models.clip", "ClipVision"),
}
Progress = Callable[[int, int], None]  # bytes read so far, bytes in all


def load_component(
    path: str | Path | Detected,
    kind: Kind,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    check: bool = True,
    progress: Progress | None = None,
    placement: Placement | None = None,
    changes: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    eight_bit: EightBit | None = None,
    keep_packed: bool = False,
    fp16_sums: bool = False,
) -> nn.Module:
    """The module, in eval mode and without gradients, its tensors in `dtype` on `device`.

    path: where it lies, or what was found there before.
    Parameters that match the class's FP32_NAMES stay fp32. `check` refuses NaN and infinity.
    `eight_bit`: a transformer's products and attention become int8 or fp8, convolutions of a VAE's
    decoder int8, as `quant/policy.py` has it; weights that are stored in that very format are taken
    as they are. `fp16_sums`: a VAE in fp16 adds products up in fp16 (see `models/vae_layers.py`).
    With a `placement`, blocks that do not stay on the device stream (the VAE has none), and large
    token tables stay in their file; its `weight_stream` is then their WeightStream. `changes` by
    name: a weight is read in fp32, changed on the device and rounded once; with a placement that
    streams there are none. With `keep_packed` matrices that a GGUF file packs, and that do not
    change, stay packed and are unpacked for each product (`models/packed.py`): the same results to
    the bit. Raises FormatError.
    Peak: the model and 8 MiB; on a device, one tensor on the CPU. To make a VAE int8 takes a plain
    fp32 one on the CPU first.
    """
    device = torch.device(device)
    found = path if isinstance(path, Detected) else find_component(Path(path), kind)
    module = skeleton(kind, found.spec, device, dtype)
    weights = Weights(module, found, dtype, check)
    if fp16_sums:
        assert kind == "vae" and dtype == torch.float16, f"{kind=} {dtype=}"
        module.ops = with_fp16_sums(module.ops)
    if eight_bit is not None:
        assert not changes, f"{kind=} {eight_bit=}"
        make = {"dit": _make_dit_eight_bit, "vae": _make_vae_int8}[kind]
        make(module, weights, eight_bit, device, dtype)
    if keep_packed:
        weights.keep_packed(module, frozenset(changes or ()), tables=placement is None)
    stream = None
    if placement is not None and placement.slots:
        stream = WeightStream(
            module, module.visits(), placement, device, weights.dtype_of, weights.read
        )
        assert not changes, f"{placement=}"
    done = 0
    for name in weights.names():
        if placement is not None and weights.is_large_table(name):
            _replace_table(module, name, weights, device)
        elif stream is None or stream.waits_in_memory(name) or not stream.streams(name):
            if stream is not None and stream.streams(name):
                weights.read_into(stream.place_of(name), name, device)
            elif changes and name in changes:
                tensor = weights.read_changed(name, changes[name], device)
                assign(module, name, place(tensor, kind, device))
            else:
                assign(module, name, place(weights.read(name, device), kind, device))
        done += weights.num_bytes(name)
        if progress:
            progress(done, weights.total)
    if stream is not None:
        stream.attach()
        module.weight_stream = stream
    return module.eval().requires_grad_(False)


def _make_dit_eight_bit(
    dit: nn.Module, weights: Weights, form: EightBit, device: torch.device, dtype: torch.dtype
) -> None:
    weights.formats = {
        name: weights.stored_form(name, one) for name, one in policy_formats(dit, form).items()
    }
    make_eight_bit(dit, weights.formats, form, device, dtype)


def _make_vae_int8(
    vae: nn.Module, weights: Weights, form: EightBit, device: torch.device, dtype: torch.dtype
) -> None:
    """The convolutions that are int8, whole; the loop fills in what is beside them."""
    assert form == "int8", f"{form=}"
    path, convs = weights.checkpoint.path, stored_convs(weights.checkpoint)
    for name in convs.keys() - set(normalised_convs(vae)):
        raise FormatError(path, f"{SIDE}{name} takes no int8", "was it written by wanrt?")
    convs = convs or made_convs(load_component(path, "vae", check=weights.checks))
    placed = {name: QuantizedConv(*(t.to(device) for t in c)) for name, c in convs.items()}
    put_convs(vae, placed)
    weights.leave_out([f"{SIDE}{name}.weight" for name in placed])


class FileEmbedding(nn.Module):
    """An embedding whose table stays in its file; the rows of a prompt are read when asked for."""

    def __init__(self, rows: Callable[[list[int]], Tensor], device: torch.device) -> None:
        super().__init__()
        self._rows, self._device = rows, device

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, n] -> [B, n, D] on the device of the model."""
        distinct, place = ids.unique(return_inverse=True)
        return self._rows(distinct.tolist()).to(self._device)[place]


def _replace_table(module: nn.Module, name: str, weights: Weights, device: torch.device) -> None:
    owner = name.rpartition(".")[0]
    module.set_submodule(owner, FileEmbedding(partial(weights.rows, name), device))


def skeleton(
    kind: Kind,
    spec: Spec,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """The empty module of a spec, on the meta device: names and shapes, no bytes.

    Its ops are those for the device and dtype that it will be filled for.
    """
    home, name = _CLASSES[kind]
    module = getattr(import_module(home), name)
    with torch.device("meta"):
        if not hasattr(module, "OPS"):
            return module(spec)
        return module(spec, choose(module.OPS, torch.device(device), dtype))


def latent_statistics(z_dim: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std per channel that the VAE class assumes; Diffusers keeps them in its config."""
    return import_module("wanrt.models.vae").LATENT_STATISTICS[z_dim]


def read_spiece(path: str | Path) -> bytes | None:
    """The SentencePiece model that ComfyUI keeps in its text-encoder files, as one uint8 tensor."""
    checkpoint = Checkpoint.open(path)
    for name, info in checkpoint.tensors.items():
        if name.rpartition(".")[2] == "spiece_model" and info.dtype == torch.uint8:
            return checkpoint.read(name).numpy().tobytes()
    return None


def place(tensor: Tensor, kind: Kind, device: torch.device) -> Tensor:
    """On the device. Convolutions of the VAE read weights channels last: so they lie, for good."""
    tensor = tensor.to(device)
    if kind != "vae" or tensor.ndim < 4:
        return tensor
    last = torch.channels_last_3d if tensor.ndim == 5 else torch.channels_last
    return tensor.contiguous(memory_format=last)
