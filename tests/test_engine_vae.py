"""VAEs whose graphs run in ONNX Runtime, against their own modules."""

from collections.abc import Mapping
from functools import cache

import pytest
import torch
from onnx_graphs import TracedGraphs, Without
from torch import Tensor

from wanrt.config import VaeSpec, VaeWork
from wanrt.engine.ort import OrtRunner
from wanrt.engine.vae import GraphVae
from wanrt.errors import FormatError, UsageError
from wanrt.export import vae as parts
from wanrt.models.vae import WanVAE

# All kinds of stage with the fewest layers: one that doubles frames in space, one in time too.
SHORT = {"dim_mult": (1, 2, 2), "num_res_blocks": 1, "temporal_downsample": (False, True)}
SPECS = {
    "2.1": VaeSpec(base_dim=4, decoder_base_dim=4, **SHORT),
    "2.2": VaeSpec(48, base_dim=4, decoder_base_dim=6, patch=2, **SHORT),
}
SIZES = [(3, 5), (4, 2)]  # latent rows and columns; neither is traced
WHOLE = [f"vae.{side}.{when}" for side in ("decode", "encode") for when in ("first", "step")]


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
    return TracedGraphs(parts.parts(parts.empty(SPECS[name], dtype), dtype))


def latents_of(spec: VaeSpec, size: tuple[int, int], frames: int = 4) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(1, spec.z_dim, frames, *size)


def video_of(spec: VaeSpec, size: tuple[int, int], frames: int = 4) -> Tensor:
    torch.manual_seed(2)
    pixels = (side * spec.spatial_stride for side in size)
    return torch.rand(1, 3, spec.temporal_stride * (frames - 1) + 1, *pixels) * 2 - 1


def distance(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape, f"{actual.shape=} {expected.shape=}"
    assert actual.dtype == expected.dtype
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "sections"])
@pytest.mark.parametrize("name", SPECS)
def test_a_vae_of_graphs_is_the_vae(name: str, cut: bool) -> None:
    """Clips of four latent frames at sizes other than those that were traced."""
    spec, graphs = SPECS[name], traced(name)
    vae = random_vae(spec)
    engine = GraphVae(vae, Without(graphs, *WHOLE) if cut else graphs)
    for size in SIZES:
        latents, video = latents_of(spec, size), video_of(spec, size)
        expected = vae.decode(latents)
        assert (expected.abs() < 1).float().mean() > 0.5, "too much is clamped to compare"
        assert distance(engine.decode(latents), expected) < 1e-5
        assert distance(engine.encode(video), vae.encode(video)) < 1e-5
    other = random_vae(spec, seed=5)  # weights are inputs: the same graphs serve another checkpoint
    vae.load_state_dict(other.state_dict())
    assert distance(engine.decode(latents), other.decode(latents)) < 1e-5
