"""Train nano's transformer and text encoder: cache latents of rendered clips, then flow matching.

python -m wanrt.nano.train_dit encode --work DIR --size 64 --clips 3000
python -m wanrt.nano.train_dit train  --work DIR --size 64 --minutes 30     (resumes)
python -m wanrt.nano.train_dit export --work DIR --out wanrt/nano/weights
"""

import argparse
import copy
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wanrt.config import NANO
from wanrt.models.dit import WanDiT
from wanrt.models.tokenizer import Tokenizer
from wanrt.models.umt5 import Umt5Encoder
from wanrt.nano.language import Scene, combinations
from wanrt.nano.scenes import loose_caption, render, sample
from wanrt.weights.load import load_component

WEIGHTS = Path(__file__).parent / "weights"
SPAN, SHARD, TEXT_ROWS = 33, 100, 32
CAPTION_DROPOUT, EMA_DECAY, LEARNING_RATE = 0.1, 0.999, 1e-3
HARD_MOTIONS, HARD_SHAPES = ("bouncing", "moving in a circle"), ("star", "ring")  # to learn
TRAIN_SHIFT = NANO.defaults.flow_shift


class Nano(nn.Module):
    """The two parts that are trained together, so that the text encoder learns what matters."""

    def __init__(self) -> None:
        super().__init__()
        self.dit = WanDiT(NANO.dit)
        self.umt5 = Umt5Encoder(NANO.umt5)

    def initialise(self) -> None:
        """Normal weights, zero biases; the head and the gates start at zero (identity blocks)."""
        for name, p in self.named_parameters():
            if name.endswith("norm.weight") or ".norm" in name and name.endswith("weight"):
                nn.init.ones_(p)
            elif p.dim() < 2 or name.startswith("dit.head.head"):
                nn.init.zeros_(p)
            elif name.endswith("modulation"):
                nn.init.zeros_(p)
            elif "embedding" in name and "umt5" in name:
                nn.init.normal_(p, std=1.0 if "token" in name else 0.1)
            else:
                fan_in = p[0].numel()
                nn.init.normal_(p, std=fan_in**-0.5)
        nn.init.normal_(self.dit.time_projection[1].weight, std=0.02)


@dataclass
class Progress:
    """Where a run is; kept in the checkpoint."""

    step: int = 0
    samples: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Latents:
    """Cached clips: normalised latents `[N, 16, T, h, w]` fp16 and what each one shows."""

    values: Tensor
    scenes: list[Scene]

    def pick(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Indices of clips; what is hard to learn comes two or three times as often."""
        weights = np.array([
            1.0 + (scene.motion in HARD_MOTIONS) + (scene.shape in HARD_SHAPES)
            for scene in self.scenes
        ])  # fmt: skip
        return rng.choice(len(weights), count, p=weights / weights.sum())


def encode(
    work: Path, size: int, num_clips: int, seed: int, vae: nn.Module, shard: int = SHARD
) -> None:
    """Render and encode `num_clips` training clips, rounded up to whole shards; resumes."""
    index = {scene: i for i, scene in enumerate(combinations())}
    folder = work / f"latents-{size}"
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(math.ceil(num_clips / shard)):
        path = folder / f"{seed:04d}-{number:04d}.safetensors"
        if path.exists():
            continue
        rng = np.random.default_rng([seed, number, size])
        scenes, latents = [], []
        for _ in range(shard):
            scene = sample(rng).scene
            clip = torch.from_numpy(render(scene, SPAN, size, rng)).permute(3, 0, 1, 2)
            latents.append(vae.encode(clip[None].float() / 127.5 - 1).half())
            scenes.append(index[scene])
        tensors = {"latents": torch.cat(latents), "scenes": torch.tensor(scenes, dtype=torch.int32)}
        save_file(tensors, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)


def load_latents(work: Path, size: int) -> Latents:
    """All shards that exist now."""
    shards = [load_file(p) for p in sorted((work / f"latents-{size}").glob("*.safetensors"))]
    table = list(combinations())
    scenes = [table[i] for shard in shards for i in shard["scenes"].tolist()]
    return Latents(torch.cat([shard["latents"] for shard in shards]), scenes)


def collapsed_context(
    model: Nano, tokenizer: Tokenizer, captions: list[str]
) -> tuple[Tensor, Tensor]:
    """Text rows and key bias in which one zero row stands for all the 512 - n padding rows.

    Returns context `[B, n, D]` and bias `[B, n]`: 0 for text, log(512 - length) for the first
    padding row, -inf for the rest. Exact, since identical keys share one value. n is nearly always
    TEXT_ROWS, so that compiled blocks see one shape.
    """
    ids, mask, *_ = tokenizer(captions)
    text = model.umt5(ids, mask) * mask.unsqueeze(-1)
    context = F.pad(text, (0, 0, 0, max(1, TEXT_ROWS - text.shape[1])))
    length = mask.sum(1, keepdim=True)  # [B, 1]
    place = torch.arange(context.shape[1]).expand(len(captions), -1)
    bias = torch.where(place < length, 0.0, -torch.inf)
    pads = torch.log((NANO.dit.text_len - length).float())
    return context, torch.where(place == length, pads, bias)


def flow_loss(model: Nano, tokenizer: Tokenizer, x0: Tensor, captions: list[str]) -> Tensor:
    """Mean squared error of the velocity, at noise levels drawn by the shifted schedule."""
    u = torch.rand(len(x0))
    sigma = TRAIN_SHIFT * u / (1 + (TRAIN_SHIFT - 1) * u)
    noise = torch.randn_like(x0)
    s = sigma.view(-1, 1, 1, 1, 1)
    context, bias = collapsed_context(model, tokenizer, captions)
    cache = model.dit.prepare(context, key_bias=bias)
    velocity = model.dit((1 - s) * x0 + s * noise, sigma * 1000, cache)
    return F.mse_loss(velocity, noise - x0)


def make_optimizers(model: Nano, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else."""
    named = list(model.named_parameters())
    inner = [p for n, p in named if ".blocks." in n and p.ndim == 2 and "pos_embedding" not in n]
    chosen = set(map(id, inner))
    rest = [p for _, p in named if id(p) not in chosen]
    return [
        torch.optim.Muon(inner, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def train(
    work: Path,
    size: int,
    minutes: float,
    batch: int,
    peak_rate: float,
    seed: int,
    compiled: bool = False,
) -> None:
    """Train for `minutes` more, starting from the checkpoint if there is one."""
    torch.manual_seed(seed)
    model = Nano()
    model.initialise()
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizers = make_optimizers(model, peak_rate)
    if compiled:
        for block in model.dit.blocks:
            block.compile(dynamic=False)
    progress, checkpoint = Progress(), work / "dit.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        for optimizer, saved_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved_state)
        progress = Progress(**state["progress"])
    tokenizer = Tokenizer.from_file(WEIGHTS / "tokenizer.json")
    rng = np.random.default_rng([seed, progress.step])
    torch.manual_seed(seed * 1_000_003 + progress.step)
    begin = saved = read = time.monotonic()
    data, first_step, losses = load_latents(work, size), progress.step, []
    while (spent := time.monotonic() - begin) < 60 * minutes:
        share = spent / (60 * minutes)
        warm_up = min(1.0, (progress.step - first_step + 1) / 200)
        rate = peak_rate * warm_up * (0.05 + 0.95 * math.cos(math.pi / 2 * share) ** 2)
        picks = data.pick(batch, rng)
        captions = [loose_caption(data.scenes[i], rng) for i in picks]
        captions = ["" if rng.random() < CAPTION_DROPOUT else c for c in captions]
        with torch.autocast("cpu", torch.bfloat16):
            loss = flow_loss(model, tokenizer, data.values[picks].float(), captions)
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        decay = min(EMA_DECAY, (progress.step + 1) / (progress.step + 10))
        with torch.no_grad():
            for a, b in zip(ema.parameters(), model.parameters(), strict=True):
                a.lerp_(b, 1 - decay)
        progress.step, progress.samples = progress.step + 1, progress.samples + batch
        losses.append(loss.item())
        now = time.monotonic()
        if len(losses) == 50:
            done = Progress(progress.step, progress.samples, progress.seconds + spent)
            line = asdict(done) | {"size": size, "clips": len(data.scenes), "loss": np.mean(losses)}
            with (work / "dit.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            losses = []
        if now - read > 180:
            data, read = load_latents(work, size), now
        if now - saved > 180:
            _save(checkpoint, model, ema, optimizers, progress, spent)
            saved = now
    _save(checkpoint, model, ema, optimizers, progress, time.monotonic() - begin)


def _save(
    path: Path,
    model: Nano,
    ema: Nano,
    optimizers: list[torch.optim.Optimizer],
    progress: Progress,
    spent: float,
) -> None:
    done = Progress(progress.step, progress.samples, progress.seconds + spent)
    payload = {
        "model": model.state_dict(),
        "ema": ema.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "progress": asdict(done),
    }
    torch.save(payload, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def export(work: Path, out: Path) -> None:
    """Write the averaged weights as fp16: `dit.safetensors` and `text_encoder.safetensors`."""
    model = Nano()
    model.load_state_dict(torch.load(work / "dit.pt", weights_only=True)["ema"])
    for part, name in ((model.dit, "dit"), (model.umt5, "text_encoder")):
        tensors = {k: v.half().contiguous() for k, v in part.state_dict().items()}
        save_file(tensors, out / f"{name}.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["encode", "train", "export"])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--clips", type=int, default=3000)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="slow to start, then faster steps")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    if args.command == "encode":
        vae = load_component(WEIGHTS / "vae.safetensors", "vae", dtype=torch.bfloat16)
        encode(args.work, args.size, args.clips, args.seed, vae)
    elif args.command == "train":
        train(args.work, args.size, args.minutes, args.batch, args.rate, args.seed, args.compile)
    else:
        export(args.work, args.out)


if __name__ == "__main__":
    main()
