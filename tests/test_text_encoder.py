"""The umT5 encoder against transformers' UMT5EncoderModel, and what the pipeline relies on."""

import pytest
import torch
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from wanrt.config import Umt5Spec
from wanrt.models.umt5 import Umt5Encoder, relative_buckets

SMALL = Umt5Spec(vocab_size=97, dim=64, attn_dim=64, ffn_dim=160, num_heads=4, num_layers=3)
INNER_WIDER = Umt5Spec(vocab_size=97, dim=48, attn_dim=96, ffn_dim=80, num_heads=6, num_layers=2)
OTHER_BUCKETS = Umt5Spec(
    vocab_size=50, dim=32, attn_dim=16, ffn_dim=40, num_heads=2, num_layers=2,
    num_buckets=16, max_distance=40,
)  # fmt: skip
SPECS = {"small": SMALL, "inner-wider": INNER_WIDER, "other-buckets": OTHER_BUCKETS}

# Token counts of each text in a batch; 300 reaches every bucket in both directions.
LENGTHS = {"one-token": [1], "short": [7, 12], "long": [300, 129, 1]}


def random_encoder(spec: Umt5Spec, seed: int = 0) -> Umt5Encoder:
    """Weights large enough that position bias, mask and gate all matter to the result."""
    generator = torch.Generator().manual_seed(seed)
    encoder = Umt5Encoder(spec).eval().requires_grad_(False)
    for name, p in encoder.named_parameters():
        scale = 1.0 if p.dim() == 1 or "embedding" in name else p.shape[1] ** -0.5
        p.copy_(torch.randn(p.shape, generator=generator) * scale)
    return encoder


def oracle(encoder: Umt5Encoder) -> UMT5EncoderModel:
    """transformers' encoder with the same weights."""
    spec = encoder.spec
    model = UMT5EncoderModel(
        UMT5Config(
            vocab_size=spec.vocab_size, d_model=spec.dim, d_kv=spec.attn_dim // spec.num_heads,
            d_ff=spec.ffn_dim, num_layers=spec.num_layers, num_heads=spec.num_heads,
            relative_attention_num_buckets=spec.num_buckets, dropout_rate=0.0,
            relative_attention_max_distance=spec.max_distance, layer_norm_epsilon=spec.eps,
            feed_forward_proj="gated-gelu",
        )
    ).eval()  # fmt: skip
    attention, feed_forward = "layer.0.SelfAttention.", "layer.1.DenseReluDense."
    parts = {
        "attn.": attention,
        "pos_embedding.embedding": attention + "relative_attention_bias",
        "norm1": "layer.0.layer_norm",
        "norm2": "layer.1.layer_norm",
        "ffn.gate.0": feed_forward + "wi_0",
        "ffn.fc1": feed_forward + "wi_1",
        "ffn.fc2": feed_forward + "wo",
    }
    state = {
        "shared.weight": encoder.token_embedding.weight,
        "encoder.embed_tokens.weight": encoder.token_embedding.weight,
        "encoder.final_layer_norm.weight": encoder.norm.weight,
    }
    for name, tensor in encoder.blocks.state_dict().items():
        block, name = name.split(".", 1)
        for ours, theirs in parts.items():
            name = name.replace(ours, theirs) if name.startswith(ours) else name
        state[f"encoder.block.{block}.{name}"] = tensor
    model.load_state_dict(state)
    return model


def batch(spec: Umt5Spec, lengths: list[int], seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, spec.vocab_size, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_matches_transformers(spec: Umt5Spec, lengths: list[int]) -> None:
    encoder = random_encoder(spec)
    ids, mask = batch(spec, lengths)
    with torch.no_grad():
        expected = oracle(encoder)(input_ids=ids, attention_mask=mask).last_hidden_state
        actual = encoder(ids, mask)
    for row, n in enumerate(lengths):
        assert relative_error(actual[row, :n], expected[row, :n]) <= 1e-5


def test_bfloat16_stays_near_float32_and_near_transformers() -> None:
    """bf16 keeps 8 bits: its error is 2^-8 per rounding, and ours must not exceed transformers'."""
    encoder = random_encoder(SMALL)
    exact = random_encoder(SMALL)(*batch(SMALL, [40]))
    encoder = encoder.bfloat16()
    model = oracle(random_encoder(SMALL)).bfloat16()
    ids, mask = batch(SMALL, [40])
    with torch.no_grad():
        ours = encoder(ids, mask)
        theirs = model(input_ids=ids, attention_mask=mask).last_hidden_state
    assert ours.dtype is torch.bfloat16
    assert relative_error(ours, exact) <= 1.1 * relative_error(theirs, exact) <= 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_pads_do_not_change_real_rows(dtype: torch.dtype) -> None:
    encoder = random_encoder(SMALL).to(dtype)
    ids, mask = batch(SMALL, [150, 9])
    ids = torch.where(mask == 1, ids, 13)  # pads hold a real token: only the mask may hide them
    padded = encoder(ids, mask)[1, :9]
    alone = encoder(ids[1:, :9], mask[1:, :9])[0]
    # Same values in another summation order: a few units of the dtype's last place.
    assert relative_error(padded, alone) <= {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]


def test_every_layer_uses_its_own_position_table() -> None:
    ids, mask = batch(SMALL, [20])
    encoder = random_encoder(SMALL)
    before = encoder(ids, mask)
    for block in encoder.blocks:
        table = block.pos_embedding.embedding.weight
        saved = table.clone()
        table[17] += 3.0  # the bucket of the next token
        assert relative_error(encoder(ids, mask), before) > 1e-3
        table.copy_(saved)
    assert torch.equal(encoder(ids, mask), before)


def test_one_layer_by_the_formula() -> None:
    """No 1/sqrt(d), no embedding scale, RMS without mean: written out in fp64."""
    spec = Umt5Spec(vocab_size=30, dim=16, attn_dim=16, ffn_dim=16, num_heads=1, num_layers=1)
    encoder = random_encoder(spec)
    block = encoder.blocks[0]
    block.ffn.fc2.weight.zero_()
    ids, mask = batch(spec, [6])
    x = encoder.token_embedding(ids)[0].double()
    y = x / (x.pow(2).mean(-1, keepdim=True) + spec.eps).sqrt() * block.norm1.weight
    q, k, v = (y @ p.weight.double().T for p in (block.attn.q, block.attn.k, block.attn.v))
    rel = torch.arange(6)[None, :] - torch.arange(6)[:, None]
    row = rel.abs() + 16 * (rel > 0)  # distances below 8 have a bucket each
    logits = q @ k.T + block.pos_embedding.embedding.weight[row][..., 0]
    x = x + logits.softmax(-1) @ v @ block.attn.o.weight.double().T
    expected = x / (x.pow(2).mean(-1, keepdim=True) + spec.eps).sqrt() * encoder.norm.weight
    assert relative_error(encoder(ids, mask)[0], expected) <= 1e-6


# Spec section 4.1.
BUCKETS = {
    -200: 15, -64: 14, -32: 12, -16: 10, -8: 8, -7: 7, 0: 0, 1: 17, 7: 23, 8: 24, 16: 26, 64: 30,
    127: 31,
}  # fmt: skip


@pytest.mark.parametrize(("distance", "bucket"), BUCKETS.items())
def test_relative_buckets(distance: int, bucket: int) -> None:
    assert relative_buckets(torch.tensor([distance]), 32, 128).tolist() == [bucket]


PARTS = (
    "norm1", "attn.q", "attn.k", "attn.v", "attn.o", "pos_embedding.embedding",
    "norm2", "ffn.gate.0", "ffn.fc1", "ffn.fc2",
)  # fmt: skip


def test_state_dict_names_are_the_reference_ones() -> None:
    with torch.device("meta"):
        names = set(Umt5Encoder(Umt5Spec()).state_dict())
    expected = {"token_embedding.weight", "norm.weight"}
    for i in range(24):
        for part in PARTS:
            expected.add(f"blocks.{i}.{part}.weight")
    assert names == expected


def test_released_size_has_the_released_parameter_count() -> None:
    with torch.device("meta"):
        encoder = Umt5Encoder(Umt5Spec())
    assert sum(p.numel() for p in encoder.parameters()) == 5_680_910_336
