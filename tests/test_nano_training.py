"""nano's training scripts: what they start from, and that a step learns something."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from wanrt.config import NANO
from wanrt.models.tokenizer import Tokenizer
from wanrt.models.vae import WanVAE
from wanrt.nano import train_dit, train_vae
from wanrt.nano.language import Scene
from wanrt.nano.scenes import loose_caption, render
from wanrt.weights.hub import NANO_WEIGHTS

CAPTIONS = ["a red circle moving right", "", "a small cyan ring on a sand background"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(NANO_WEIGHTS / "tokenizer.json")


@pytest.fixture(scope="module")
def nano() -> train_dit.Nano:
    torch.manual_seed(0)
    model = train_dit.Nano()
    model.initialise()
    nn.init.normal_(model.dit.head.head.weight, std=0.05)  # else every velocity is zero
    return model


@pytest.mark.parametrize("shape", [train_vae.Shape(1, 16, 2), train_vae.Shape(5, 16, 1)])
def test_a_few_steps_lower_the_vaes_loss(shape: train_vae.Shape) -> None:
    torch.manual_seed(0)
    vae = WanVAE(NANO.vae)
    train_vae.initialise(vae)
    clips = train_vae.clip_batch(shape, np.random.default_rng(0))
    optimizer = torch.optim.Adam(vae.parameters(), lr=2e-3)
    losses = []
    for _ in range(8):
        torch.manual_seed(1)
        loss, _ = train_vae.loss_of(vae, clips)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses


@torch.no_grad()
def test_the_vae_starts_per_frame() -> None:
    """Before training the past has no say: the last frame of a clip alone decides its latent."""
    torch.manual_seed(0)
    vae = WanVAE(NANO.vae)
    train_vae.initialise(vae)
    clips = train_vae.clip_batch(train_vae.Shape(5, 16, 1), np.random.default_rng(0))
    other = torch.cat([clips[:, :, :4].flip(2), clips[:, :, 4:]], dim=2)
    latents, changed = vae.encode(clips), vae.encode(other)
    torch.testing.assert_close(latents[:, :, 1], changed[:, :, 1])
    assert not torch.allclose(latents[:, :, 0], changed[:, :, 0])


def test_recolouring_keeps_the_outline() -> None:
    scene = Scene("white", "square", "moving left", "large", "black")
    clip = render(scene, 5, 48, np.random.default_rng(0))
    new = train_vae.recolor(clip, np.random.default_rng(1))
    ground, paint = new[0, 0, 0].astype(float), new[clip[..., 0] == 246][0].astype(float)
    assert np.linalg.norm(paint - ground) >= train_vae.MIN_CONTRAST - 2
    same_ground = (new == new[0, 0, 0]).all(-1)
    np.testing.assert_array_equal(same_ground[clip[..., 0] == 8], True)
    assert not same_ground[clip[..., 0] == 246].any()


def test_one_row_stands_for_all_padding(nano: train_dit.Nano, tokenizer: Tokenizer) -> None:
    """The collapsed context gives the velocity of the 512 rows that a request has."""
    latents = torch.randn(len(CAPTIONS), 16, 2, 4, 4)
    with torch.no_grad():
        context, bias = train_dit.collapsed_context(nano, tokenizer, CAPTIONS)
        short = nano.dit(latents, 500, nano.dit.prepare(context, key_bias=bias))
        full = torch.zeros(len(CAPTIONS), NANO.dit.text_len, NANO.dit.text_dim)
        for row, caption in zip(full, CAPTIONS, strict=True):
            tokens = tokenizer([caption])
            features = nano.umt5(tokens.ids, tokens.mask)[0]
            row[: len(features)] = features
        long = nano.dit(latents, 500, full)
    assert (short - long).abs().max() < 1e-5 * long.abs().max()


def test_flow_matching_trains_transformer_and_text(
    nano: train_dit.Nano, tokenizer: Tokenizer
) -> None:
    loss = train_dit.flow_loss(nano, tokenizer, torch.randn(3, 16, 2, 4, 4), CAPTIONS)
    loss.backward()
    without = [n for n, p in nano.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == [], without
    assert 0.5 < loss.item() < 5


def test_optimizers_share_out_every_parameter(nano: train_dit.Nano) -> None:
    groups = [g for o in train_dit.make_optimizers(nano, 1e-3) for g in o.param_groups]
    given = [id(p) for group in groups for p in group["params"]]
    assert sorted(given) == sorted(id(p) for p in nano.parameters())


def test_captions_of_training_stay_in_the_language() -> None:
    scene = Scene("red", "star", "bouncing", "small", "navy")
    rng = np.random.default_rng(0)
    captions = {loose_caption(scene, rng) for _ in range(200)}
    assert "a small red star bouncing on a navy background" in captions
    assert len(captions) > 10


def test_latents_are_cached_by_shard(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = WanVAE(NANO.vae)
    train_dit.encode(tmp_path, 16, 3, seed=0, vae=vae.requires_grad_(False), shard=2)
    data = train_dit.load_latents(tmp_path, 16)
    assert data.values.shape == (4, 16, 9, 2, 2)
    assert len(data.scenes) == 4
    assert data.values.float().std() > 0
