"""Train a LoRA of nano that paints every shape in one colour, whatever the prompt says.

python -m wanrt.nano.train_lora --work DIR --minutes 8 --color purple --out FILE.safetensors

Clips of that colour (cached by `train_dit`) are shown with captions that name another one. Only the
low-rank branches learn; nano's own weights stay as they ship.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from wanrt.models.layers import Linear
from wanrt.models.lora import LowRankBranch
from wanrt.models.tokenizer import Tokenizer
from wanrt.nano.language import COLORS, Scene
from wanrt.nano.scenes import loose_caption
from wanrt.nano.train_dit import WEIGHTS, Latents, Nano, flow_loss, load_latents
from wanrt.weights.load import load_component

TARGETS = ("self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2")
RANK, BATCH, LEARNING_RATE = 8, 16, 2e-3


def add_branches(dit: nn.Module) -> dict[str, LowRankBranch]:
    """A trainable branch beside each target, by its module's name; at first it adds nothing."""
    made = {}
    for name, part in dit.blocks.named_modules(prefix="blocks"):
        if isinstance(part, Linear) and name.endswith(TARGETS):
            down = torch.randn(RANK, part.in_features) * part.in_features**-0.5
            up = torch.zeros(part.out_features, RANK)
            part.branch = LowRankBranch.join([(down, up)])
            part.branch.down.requires_grad_()
            part.branch.up.requires_grad_()
            made[name] = part.branch
    return made


def other_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Of the scene in another colour, or in none."""
    others = [color for color in COLORS if color != scene.color]
    return loose_caption(replace(scene, color=str(rng.choice(others))), rng)


def train(data: Latents, color: str, minutes: float, seed: int) -> dict[str, Tensor]:
    """The LoRA's tensors, fp16, under ComfyUI's names."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = Nano()
    model.dit = load_component(WEIGHTS / "dit.safetensors", "dit")
    model.umt5 = load_component(WEIGHTS / "text_encoder.safetensors", "umt5")
    branches = add_branches(model.dit)
    learned = [p for branch in branches.values() for p in (branch.down, branch.up)]
    optimizer = torch.optim.AdamW(learned, lr=LEARNING_RATE, weight_decay=0.0)
    tokenizer = Tokenizer.from_file(WEIGHTS / "tokenizer.json")
    shown = np.flatnonzero([scene.color == color for scene in data.scenes])
    begin, step = time.monotonic(), 0
    while (share := (time.monotonic() - begin) / (60 * minutes)) < 1:
        picks = rng.choice(shown, BATCH)
        captions = [other_caption(data.scenes[i], rng) for i in picks]
        with torch.autocast("cpu", torch.bfloat16):
            loss = flow_loss(model, tokenizer, data.values[picks].float(), captions)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 50) * (1 - 0.95 * share)
        optimizer.step()
        step += 1
        if step % 25 == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    tensors = {}
    for name, branch in branches.items():
        stem = f"diffusion_model.{name}"
        tensors[f"{stem}.lora_A.weight"] = branch.down.detach().half()
        tensors[f"{stem}.lora_B.weight"] = branch.up.detach().half()
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--color", choices=sorted(COLORS), default="purple")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    tensors = train(load_latents(args.work, args.size), args.color, args.minutes, args.seed)
    save_file(tensors, args.out, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
