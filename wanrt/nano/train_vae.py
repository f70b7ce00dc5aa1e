"""Train nano's VAE: frames, then longer and longer clips; fold its latent statistics in.

python -m wanrt.nano.train_vae --work DIR --minutes 110     (resumes from DIR/vae.pt)
python -m wanrt.nano.train_vae --work DIR --export wanrt/nano/weights/vae.safetensors
"""

import argparse
import copy
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from wanrt.config import NANO
from wanrt.models.vae import LATENT_STATISTICS, WanVAE, channels_last
from wanrt.models.vae_layers import CausalConv3d, Resample, Walk
from wanrt.nano.language import BACKGROUNDS, COLORS, Scene
from wanrt.nano.scenes import render, sample

SIZE, SPAN, CROP = 96, 33, 48
FREE_COLORS, MIN_CONTRAST = 0.7, 50.0  # share of clips in any colours; RGB distance
# Of those clips, more show what is hardest to keep: corners on few pixels.
FREE_SHAPES = {"circle": 0.1, "square": 0.25, "triangle": 0.15, "star": 0.4, "ring": 0.1}
FREE_SMALL, FREE_FAST = 0.7, 0.6  # share of small ones, and of those that bounce or circle
LOG_VAR_START, OUTLINE_WEIGHT = -6.0, 5.0
KL_WEIGHT, EMA_DECAY, LEARNING_RATE = 1e-4, 0.999, 2e-3


class Shape(NamedTuple):
    """Frames, side of the crop in pixels, and clips of one training step."""

    num_frames: int
    crop: int
    batch: int


@dataclass(frozen=True)
class Stage:
    """What steps look like during a share of the training time; of several shapes one at random."""

    until: float
    shapes: tuple[Shape, ...]


# Long clips too: the history of the deepest layers reaches back over a whole clip.
STAGES = (
    Stage(0.17, (Shape(1, CROP, 16),)),
    Stage(0.26, (Shape(5, CROP, 6),)),
    Stage(0.40, (Shape(17, CROP, 2),)),
    Stage(1.00, (Shape(1, CROP, 16), Shape(9, CROP, 4), Shape(SPAN, CROP, 1))),
)


@dataclass
class Progress:
    """Where a run is; kept in the checkpoint."""

    step: int = 0
    seconds: float = 0.0


def render_batch(count: int, rng: np.random.Generator, held_out: bool = False) -> Tensor:
    """Whole clips as pixels `[count, 3, 33, 96, 96]` in [-1, 1]."""
    clips = [render(sample(rng, held_out).scene, SPAN, SIZE, rng) for _ in range(count)]
    return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def clip_batch(shape: Shape, rng: np.random.Generator) -> Tensor:
    """Training pixels `[B, 3, F, crop, crop]` in [-1, 1], each crop near the moving object."""
    clips = []
    for _ in range(shape.batch):
        start = int(rng.integers(0, SPAN - shape.num_frames + 1))
        scene, free = sample(rng).scene, rng.random() < FREE_COLORS
        scene = _free(scene, rng) if free else scene
        clip = render(scene, shape.num_frames, SIZE, rng, span=SPAN, start=start)
        clip = recolor(clip, rng) if free else clip
        top, left = _crop_corner(clip, shape.crop, rng)
        clips.append(clip[:, top : top + shape.crop, left : left + shape.crop])
    pixels = torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3)
    return pixels.float() / 127.5 - 1


def _free(scene: Scene, rng: np.random.Generator) -> Scene:
    shape = rng.choice(list(FREE_SHAPES), p=list(FREE_SHAPES.values()))
    size = "small" if rng.random() < FREE_SMALL else "large"
    fast = rng.random() < FREE_FAST
    motion = str(rng.choice(["bouncing", "moving in a circle"])) if fast else scene.motion
    return Scene("white", str(shape), motion, size, "black")


def recolor(clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """White on black to any two colours of RGB, so that no pair looks alike to the VAE."""
    black, white = BACKGROUNDS["black"][0], COLORS["white"][0]
    coverage = (clip.astype(np.float32) - black) / (white - black)  # [F, S, S, 3]
    while True:
        ground, paint = rng.integers(0, 256, (2, 3)).astype(np.float32)
        if np.linalg.norm(paint - ground) >= MIN_CONTRAST:
            return (ground + coverage * (paint - ground) + 0.5).astype(np.uint8)


def _crop_corner(clip: np.ndarray, crop: int, rng: np.random.Generator) -> tuple[int, int]:
    """A window that shows some of the object of the middle frame, all places being possible."""
    frame = clip[len(clip) // 2]
    rows, columns = np.nonzero((frame != frame[0, 0]).any(-1))
    corner = []
    for places in (rows, columns):
        centre = int(places.mean()) + int(rng.integers(-crop // 2, crop // 2 + 1))
        corner.append(int(np.clip(centre - crop // 2, 0, SIZE - crop)))
    return corner[0], corner[1]


def reconstruct(vae: WanVAE, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels -> (reconstruction, mean, log-variance), with the posterior sampled."""
    moments = vae.conv1(vae.encoder(channels_last(video), Walk(vae.encoder_state())), None)
    mean, log_var = moments.float().chunk(2, dim=1)
    log_var = log_var.clamp(-20, 10)
    z = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
    pixels = vae.decoder(channels_last(vae.conv2(z, None)), Walk(vae.decoder_state()))
    return pixels.float(), mean, log_var


def loss_of(vae: WanVAE, video: Tensor) -> tuple[Tensor, float]:
    """L1 and squared error, outlines counting more, + KL; also the PSNR in dB (peak 2)."""
    pixels, mean, log_var = reconstruct(vae, video)
    kl = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).mean()
    error = (pixels - video).abs()
    weighted = (error + error**2) * outline_weight(video)
    psnr = 10 * math.log10(4 / max((error**2).mean().item(), 1e-9))
    return weighted.mean() + KL_WEIGHT * kl, psnr


def outline_weight(video: Tensor) -> Tensor:
    """`[B, 1, F, H, W]`: more around an outline, where shapes differ from each other."""
    window = (1, 5, 5)
    high = F.max_pool3d(video, window, stride=1, padding=(0, 2, 2))
    low = -F.max_pool3d(-video, window, stride=1, padding=(0, 2, 2))
    return 1 + OUTLINE_WEIGHT * ((high - low).amax(1, keepdim=True) > 0.1)


@torch.no_grad()
def initialise(vae: WanVAE) -> None:
    """Start as a per-frame autoencoder that drops and repeats frames.

    What looks into the past starts at zero and learns when clips come; halving takes every second
    frame, doubling shows each one twice. Little posterior noise, else the mean drowns in it.
    """
    for module in vae.modules():
        if isinstance(module, CausalConv3d):
            module.weight[:, :, :-1] = 0
        if isinstance(module, Resample) and hasattr(module, "time_conv"):
            weight = module.time_conv.weight  # [C or 2C, C, 3, 1, 1]
            copies = weight.shape[0] // weight.shape[1]
            weight[:, :, -1, 0, 0] = torch.eye(weight.shape[1]).repeat(copies, 1)
            nn.init.zeros_(module.time_conv.bias)
    vae.conv1.bias[NANO.vae.z_dim :] = LOG_VAR_START


class Matrix(NamedTuple):
    """A convolution's weight and the same memory as a matrix `[O, C*kt*kh*kw]`."""

    weight: nn.Parameter
    view: Tensor


def _is_matrix(p: Tensor) -> bool:
    """A convolution's weight, not a norm's `[C, 1, 1, 1]`."""
    return p.ndim > 3 and p[0].numel() > 8


def make_optimizers(vae: WanVAE) -> tuple[list[torch.optim.Optimizer], list[Matrix]]:
    """Muon for the inner convolutions, as matrices; AdamW for the rest."""
    outer = {id(vae.encoder.conv1.weight), id(vae.decoder.head[2].weight)}
    inner = [p for p in vae.parameters() if _is_matrix(p) and id(p) not in outer]
    matrices = [Matrix(p, p.detach().flatten(1)) for p in inner]
    chosen = set(map(id, inner))
    rest = [p for p in vae.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(
        [matrix.view for matrix in matrices],
        lr=LEARNING_RATE,
        weight_decay=0.01,
        adjust_lr_fn="match_rms_adamw",
    )
    return [muon, torch.optim.AdamW(rest, lr=LEARNING_RATE, weight_decay=1e-4)], matrices


def train(work: Path, minutes: float, seed: int, compiled: bool = False) -> None:
    """Train until `minutes` of training time are spent in all, over any number of sittings."""
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    vae = WanVAE(NANO.vae)
    initialise(vae)
    ema = copy.deepcopy(vae).requires_grad_(False)
    optimizers, matrices = make_optimizers(vae)
    if compiled:
        vae.encoder.compile(dynamic=False)
        vae.decoder.compile(dynamic=False)
    progress, checkpoint = Progress(), work / "vae.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        vae.load_state_dict(state["vae"])
        ema.load_state_dict(state["ema"])
        for optimizer, moments in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(moments)
        progress = Progress(**state["progress"])
    rng = np.random.default_rng([seed, progress.step])
    saved = time.monotonic()
    while (share := progress.seconds / (60 * minutes)) < 1:
        begin = time.monotonic()
        shapes = next(s for s in STAGES if share < s.until).shapes
        shape = shapes[rng.integers(len(shapes))]
        warm_up = min(1.0, (progress.step + 1) / 200)
        rate = LEARNING_RATE * warm_up * (0.02 + 0.98 * math.cos(math.pi / 2 * share) ** 2)
        with torch.autocast("cpu", torch.bfloat16):
            loss, psnr = loss_of(vae, clip_batch(shape, rng))
        vae.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for matrix in matrices:
            grad = matrix.weight.grad  # None where single frames bypass a temporal convolution
            matrix.view.grad = None if grad is None else grad.flatten(1)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        decay = min(EMA_DECAY, (progress.step + 1) / (progress.step + 10))
        for a, b in zip(ema.parameters(), vae.parameters(), strict=True):
            a.lerp_(b.detach(), 1 - decay)
        progress.step += 1
        progress.seconds += time.monotonic() - begin
        if progress.step % 50 == 0:
            line = asdict(progress) | {"shape": shape, "loss": loss.item(), "psnr": psnr}
            with (work / "vae.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
        if time.monotonic() - saved > 120 or progress.seconds >= 60 * minutes:
            saved = time.monotonic()
            payload = {
                "vae": vae.state_dict(),
                "ema": ema.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "progress": asdict(progress),
            }
            torch.save(payload, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)


@torch.no_grad()
def fold_statistics(vae: WanVAE, rng: np.random.Generator, num_clips: int = 64) -> None:
    """Make Wan 2.1's latent constants hold: scale and shift inside `conv1` and `conv2`, in place.

    Both are 1x1x1, so an affine map of every latent channel folds into them exactly.
    """
    means = []
    for _ in range(num_clips):
        video = channels_last(render_batch(1, rng))
        moments = vae.conv1(vae.encoder(video, Walk(vae.encoder_state())), None)
        means.append(moments.chunk(2, dim=1)[0][0].flatten(1))  # [z, THW]
    values = torch.cat(means, dim=1)
    std, mean = torch.std_mean(values, dim=1)
    wan_mean, wan_std = (torch.tensor(v) for v in LATENT_STATISTICS[NANO.vae.z_dim])
    gain = wan_std / std  # ours -> Wan's: gain * (z - mean) + wan_mean
    z = NANO.vae.z_dim
    vae.conv1.weight[:z] *= gain.view(-1, 1, 1, 1, 1)
    vae.conv1.bias[:z] = gain * (vae.conv1.bias[:z] - mean) + wan_mean
    back = vae.conv2.weight / gain.view(1, -1, 1, 1, 1)  # Wan's -> ours, then conv2
    shift = vae.conv2.weight.flatten(1) @ (mean - wan_mean / gain)
    vae.conv2.weight.copy_(back)
    vae.conv2.bias += shift


@torch.no_grad()
def held_out_psnr(vae: WanVAE, rng: np.random.Generator, num_clips: int = 16) -> list[float]:
    """PSNR in dB of encode and decode over clips of held-out scenes."""
    result = []
    for _ in range(num_clips):
        video = render_batch(1, rng, held_out=True)
        error = F.mse_loss(vae.decode(vae.encode(video)), video).item()
        result.append(10 * math.log10(4 / error))
    return result


def export(work: Path, out: Path) -> None:
    """Write the averaged weights, statistics folded in, as fp16 and print the held-out PSNR."""
    vae = WanVAE(NANO.vae)
    vae.load_state_dict(torch.load(work / "vae.pt", weights_only=True)["ema"])
    fold_statistics(vae, np.random.default_rng(7))
    vae.half().float()  # what is stored is what counts
    psnr = held_out_psnr(vae, np.random.default_rng(8))
    print(f"held-out PSNR: mean {np.mean(psnr):.2f} dB, worst {min(psnr):.2f} dB of {len(psnr)}")
    tensors = {k: v.half().contiguous() for k, v in vae.state_dict().items()}
    save_file(tensors, out, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=110)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="slow to start, then faster steps")
    parser.add_argument("--export", type=Path)
    args = parser.parse_args()
    if args.export:
        export(args.work, args.export)
    else:
        train(args.work, args.minutes, args.seed, args.compile)


if __name__ == "__main__":
    main()
