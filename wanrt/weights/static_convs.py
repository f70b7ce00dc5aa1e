"""The int8 convolutions of a VAE: read from a file that has them, or made of a plain one."""

import torch

from wanrt.errors import FormatError
from wanrt.kernels.reference_vae import QuantizedConv, border_sums
from wanrt.models.vae import WanVAE
from wanrt.models.vae_calibration import calibration_latents
from wanrt.models.vae_int8 import calibrate, default_convs, quantize_convs
from wanrt.weights.checkpoint import Checkpoint
from wanrt.weights.quantised import INPUT_ZERO, input_step, scale_of, static_convs

SIDE = "decoder."  # of the VAE: the encoder's convolutions stay plain


def stored_convs(checkpoint: Checkpoint) -> dict[str, QuantizedConv]:
    """As `wanrt quantize` wrote them, by their names in the decoder; of other files none.

    Raises FormatError.
    """
    names = static_convs(checkpoint)
    return {name.removeprefix(SIDE): _read(checkpoint, name) for name in names}


def made_convs(vae: WanVAE) -> dict[str, QuantizedConv]:
    """Of a plain fp32 VAE on the CPU, as `quant/policy.py` has it; nothing else is needed.

    The same bits wherever PyTorch computes the same. Time: three small clips through the VAE, 4 s
    (Wan 2.1) and 10 s (2.2) on one core. Peak: the VAE, and two fp32 copies of one weight.
    """
    return quantize_convs(vae, calibrate(vae, calibration_latents(vae), default_convs(vae)))


def _read(checkpoint: Checkpoint, name: str) -> QuantizedConv:
    weight, zero = f"{name}.weight", f"{name}.{INPUT_ZERO}"
    tensors = checkpoint.tensors
    if not name.startswith(SIDE) or weight not in tensors:
        raise FormatError(checkpoint.path, f"{name} is no convolution of a VAE's decoder")
    outputs, channels = tensors[weight].shape[:2]
    for stored, dtype, shape in (
        (weight, torch.int8, (outputs, channels, 3, 3, 3)),
        (scale_of(weight), torch.float32, (outputs,)),
        (zero, torch.int8, (channels,)),
    ):
        found = tensors.get(stored)
        if found is None or (found.dtype, found.shape) != (dtype, shape):
            raise FormatError(checkpoint.path, f"{stored} is not {dtype} {list(shape)}")
    scale = checkpoint.read(scale_of(weight))
    if not bool(scale.isfinite().all()):
        raise FormatError(checkpoint.path, f"{scale_of(weight)} holds NaN or infinity")
    values, zeros = checkpoint.read(weight), checkpoint.read(zero)
    values = values.contiguous(memory_format=torch.channels_last_3d)
    step = input_step(checkpoint, weight)
    return QuantizedConv(values, scale, step, zeros, border_sums(values, zeros))
