"""Small VAEs of both kinds, their graphs and their inputs, for tests of what codes with them."""

from functools import cache

import torch
from onnx_graphs import TracedGraphs
from torch import Tensor

from wanrt.config import VaeSpec
from wanrt.export import vae as parts
from wanrt.models.vae import WanVAE

# One stage that doubles both sides and the frame rate, and one that keeps them: quick to trace.
SHORT = {"dim_mult": (2, 2), "num_res_blocks": 1, "temporal_downsample": (True,)}
SPECS = {
    "2.1-short": VaeSpec(base_dim=4, decoder_base_dim=4, **SHORT),
    "2.2-short": VaeSpec(48, base_dim=4, decoder_base_dim=6, patch=2, **SHORT),
    "2.1": VaeSpec(base_dim=8, decoder_base_dim=8),
    "2.2": VaeSpec(48, base_dim=8, decoder_base_dim=16, patch=2),
}
WHOLE = [f"vae.{side}.{when}" for side in ("decode", "encode") for when in ("first", "step")]


@torch.no_grad()
def random_vae(spec: VaeSpec, seed: int = 0) -> WanVAE:
    """Weights large enough that every layer matters, a head small enough that few pixels clamp."""
    generator = torch.Generator().manual_seed(seed)
    vae = WanVAE(spec).eval().requires_grad_(False)
    for name, p in vae.named_parameters():
        scale = p[0].numel() ** -0.5 if p.dim() > 1 else 0.1
        p.copy_(torch.randn(p.shape, generator=generator) * scale)
        if name.endswith("gamma"):
            p.add_(1)
        elif name.startswith("decoder.head.2"):
            p.mul_(0.4)
    return vae


@cache
def traced(name: str, dtype: torch.dtype = torch.float32) -> TracedGraphs:
    """Graphs that take any weights of these shapes."""
    return TracedGraphs(parts.parts(parts.empty(SPECS[name], dtype), dtype))


def draw_latents(spec: VaeSpec, size: tuple[int, int], frames: int = 5) -> Tensor:
    """Of `frames` latent frames, each `size` rows and columns."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, spec.z_dim, frames, *size, generator=generator)


def draw_video(spec: VaeSpec, size: tuple[int, int], frames: int = 5) -> Tensor:
    """Of as many pixels and frames as `draw_latents` stands for."""
    generator = torch.Generator().manual_seed(2)
    rows, columns = (side * spec.spatial_stride for side in size)
    count = spec.temporal_stride * (frames - 1) + 1
    return torch.rand(1, 3, count, rows, columns, generator=generator) * 2 - 1


def distance(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|."""
    assert actual.shape == expected.shape, f"{actual.shape=} {expected.shape=}"
    assert actual.dtype == expected.dtype
    return ((actual - expected).norm() / expected.norm()).item()
