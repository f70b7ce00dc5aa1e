"""VAEs on the meta device whose convolutions are int8 as the policy has it, without any values."""

import torch

from wanrt.models.vae import WanVAE
from wanrt.models.vae_int8 import default_convs, put_convs
from wanrt.models.vae_layers import QuantizedConv


def make_empty_int8(vae: WanVAE) -> None:
    """As a loaded int8 VAE has them: dtypes, shapes, channels last."""
    convs = {}
    for name in default_convs(vae):
        outputs, channels = vae.decoder.get_submodule(name).weight.shape[:2]
        convs[name] = QuantizedConv(
            torch.empty(outputs, channels, 3, 3, 3, dtype=torch.int8, device="meta").contiguous(
                memory_format=torch.channels_last_3d
            ),
            torch.empty(outputs, device="meta"),
            torch.empty(channels, device="meta"),
            torch.empty(channels, dtype=torch.int8, device="meta"),
            torch.empty(3, 4, 4, outputs, dtype=torch.int32, device="meta"),
        )
    put_convs(vae, convs)
