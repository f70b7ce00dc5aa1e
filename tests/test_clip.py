"""The CLIP visual tower against transformers' CLIPVisionModel, and its preprocessing."""

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from wanrt.config import ClipSpec
from wanrt.models.clip import MEAN, STD, ClipVision, preprocess

SMALL = ClipSpec(dim=64, mlp_dim=96, num_heads=4, num_layers=4, image_size=56)
HEAD_80 = ClipSpec(dim=160, mlp_dim=320, num_heads=2, num_layers=3)
SPECS = {"small": SMALL, "head-80": HEAD_80}


def random_tower(spec: ClipSpec) -> ClipVision:
    generator = torch.Generator().manual_seed(0)
    tower = ClipVision(spec).eval().requires_grad_(False)
    for p in tower.parameters():
        scale = p[0].numel() ** -0.5 if p.dim() in (2, 4) else 1.0
        p.copy_(torch.randn(p.shape, generator=generator) * scale)
    return tower


def oracle(tower: ClipVision) -> CLIPVisionModel:
    """transformers' tower with the same weights; the block and norm we lack keep random ones."""
    spec = tower.spec
    model = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=spec.dim, intermediate_size=spec.mlp_dim, hidden_act="gelu",
            num_hidden_layers=spec.num_layers, num_attention_heads=spec.num_heads,
            image_size=spec.image_size, patch_size=spec.patch_size, layer_norm_eps=spec.eps,
        )
    ).eval()  # fmt: skip
    state = {
        "embeddings.class_embedding": tower.cls_embedding[0, 0],
        "embeddings.patch_embedding.weight": tower.patch_embedding.weight,
        "embeddings.position_embedding.weight": tower.pos_embedding[0],
        "pre_layrnorm.weight": tower.pre_norm.weight,
        "pre_layrnorm.bias": tower.pre_norm.bias,
    }
    parts = {
        "norm1.": "layer_norm1.",
        "norm2.": "layer_norm2.",
        "attn.proj.": "self_attn.out_proj.",
        "mlp.0.": "mlp.fc1.",
        "mlp.2.": "mlp.fc2.",
    }
    for name, tensor in tower.transformer.state_dict().items():
        layer, name = name.split(".", 1)
        head, leaf = name.rsplit(".", 1)
        if head == "attn.to_qkv":
            for proj, part in zip("qkv", tensor.chunk(3), strict=True):
                state[f"encoder.layers.{layer}.self_attn.{proj}_proj.{leaf}"] = part
        else:
            state[f"encoder.layers.{layer}.{parts[head + '.']}{leaf}"] = tensor
    missing = model.load_state_dict(state, strict=False)
    last = f"encoder.layers.{spec.num_layers - 1}."
    assert not missing.unexpected_keys
    assert all(k.startswith((last, "post_layernorm")) for k in missing.missing_keys)
    return model


def random_pixels(spec: ClipSpec, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, spec.image_size, spec.image_size, generator=generator)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_matches_transformers_penultimate_layer(spec: ClipSpec) -> None:
    tower, pixels = random_tower(spec), random_pixels(spec)
    with torch.no_grad():
        expected = oracle(tower)(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    actual = tower(pixels)
    assert actual.shape == expected.shape == (2, 1 + (spec.image_size // 14) ** 2, spec.dim)
    assert relative_error(actual, expected) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_as_near_as_transformers(dtype: torch.dtype) -> None:
    pixels = random_pixels(SMALL)
    exact = random_tower(SMALL)(pixels)
    with torch.no_grad():
        model = oracle(random_tower(SMALL)).to(dtype)
        theirs = model(pixel_values=pixels.to(dtype), output_hidden_states=True).hidden_states[-2]
    ours = random_tower(SMALL).to(dtype)(pixels.to(dtype))
    assert ours.dtype is dtype
    assert relative_error(ours, exact) <= 1.1 * relative_error(theirs, exact) <= 0.05


def cubic(t: Tensor) -> Tensor:
    """Keys' cubic kernel with a = -0.75."""
    t, a = t.abs(), -0.75
    near = (a + 2) * t**3 - (a + 3) * t**2 + 1
    far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
    return torch.where(t <= 1, near, torch.where(t < 2, far, 0.0))


def resize_matrix(n: int, size: int) -> Tensor:
    """Four taps at half-pixel centres, the border repeated, whatever the scale: no antialiasing."""
    centre = (torch.arange(size, dtype=torch.float64) + 0.5) * n / size - 0.5
    tap = centre.floor()[:, None] + torch.arange(-1, 3)  # [size, 4]
    matrix = torch.zeros(size, n, dtype=torch.float64)
    return matrix.scatter_add_(1, tap.clamp(0, n - 1).long(), cubic(centre[:, None] - tap))


@pytest.mark.parametrize(("height", "width"), [(480, 832), (31, 57), (224, 224), (300, 100)])
def test_preprocess_squashes_bicubic_without_antialias(height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(2)
    image = torch.rand(2, 3, height, width, generator=generator) * 2 - 1
    rows, columns = resize_matrix(height, 224), resize_matrix(width, 224)
    expected = rows @ ((image.double() + 1) / 2) @ columns.T
    expected = expected - torch.tensor(MEAN, dtype=torch.float64)[:, None, None]
    expected = expected / torch.tensor(STD, dtype=torch.float64)[:, None, None]
    # Source coordinates are fp32 (eps * width) and the steepest slope is 1.6 / 0.26 per pixel.
    coordinate_error = 6.2 * 2**-23 * max(height, width)
    torch.testing.assert_close(
        preprocess(image).double(), expected, rtol=0, atol=1e-5 + coordinate_error
    )


def test_preprocess_keeps_the_overshoot() -> None:
    """A checkerboard overshoots [0, 1] between its fields; the reference does not clamp."""
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    pixels = preprocess(board.expand(1, 3, 8, 8))[0, 0] * STD[0] + MEAN[0]
    assert pixels.max() > 1.05 and pixels.min() < -0.05


def test_preprocess_maps_white_and_black_to_the_statistics() -> None:
    """CLIP's published constants: white is (1 - mean) / std per channel."""
    white = preprocess(torch.ones(1, 3, 20, 30))[0, :, 100, 100]
    black = preprocess(-torch.ones(1, 3, 20, 30))[0, :, 100, 100]
    torch.testing.assert_close(white, torch.tensor([1.9303361, 2.0748837, 2.1458969]))
    torch.testing.assert_close(black, torch.tensor([-1.7922626, -1.7520971, -1.4802198]))


def test_state_dict_names_and_size_are_the_reference_ones() -> None:
    with torch.device("meta"):
        state = ClipVision(ClipSpec()).state_dict()
    expected = {"patch_embedding.weight", "cls_embedding", "pos_embedding"}
    expected |= {f"pre_norm.{leaf}" for leaf in ("weight", "bias")}
    for i in range(31):
        for part in ("norm1", "norm2", "attn.to_qkv", "attn.proj", "mlp.0", "mlp.2"):
            expected |= {f"transformer.{i}.{part}.{leaf}" for leaf in ("weight", "bias")}
    assert set(state) == expected
    assert sum(p.numel() for p in state.values()) == 611_086_080
    assert state["patch_embedding.weight"].shape == (1280, 3, 14, 14)
    assert state["pos_embedding"].shape == (1, 257, 1280)
    assert state["transformer.30.attn.to_qkv.weight"].shape == (3840, 1280)
