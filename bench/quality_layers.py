"""What each eight-bit format costs in each kind of layer and each block: reasons of the policy.

Two subjects. A block of the 1.3B with random weights and heavy-tailed tokens (0.5 % of the channels
60 times as large), measured on what it adds to them. And nano's whole transformer, measured on the
latents after all steps; there also block by block.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wanrt.bench.pictures import closeness
from wanrt.config import DIT_1_3B
from wanrt.kernels import torch_quantize
from wanrt.kernels.cases import heavy_tailed
from wanrt.kernels.fp8_sums import ACTIVATION_PEAK
from wanrt.models.dit import Block, TimeEmbedding
from wanrt.models.eight_bit import convert, linears, quantize_attention
from wanrt.models.layers import RopeTables
from wanrt.pipeline import Pipeline
from wanrt.quant.formats import FORMATS, LinearFormat
from wanrt.quant.policy import ATTENTION, level_of

GROUPS = {
    "self_attn.qkv": (".self_attn.q", ".self_attn.k", ".self_attn.v"),
    "self_attn.o": (".self_attn.o",),
    "cross_attn.q": (".cross_attn.q",),
    "cross_attn.kv": (".cross_attn.k", ".cross_attn.v"),
    "cross_attn.o": (".cross_attn.o",),
    "ffn.0": (".ffn.0",),
    "ffn.2": (".ffn.2",),
    "all": (".self_attn.", ".cross_attn.q", ".cross_attn.o", ".ffn."),
}
PROMPTS = ("a red circle moving right on a navy background", "a large yellow star bouncing")
SMALL = f"all, activations up to {ACTIVATION_PEAK:g}"  # on cards that add fp8 up in fp16
_TOKENS = (2, 12, 16)  # of the block: frames, rows, columns


@dataclass(frozen=True)
class Row:
    """Cosine with fp32, and the relative error, where only these layers are in that format."""

    subject: str
    layers: str
    format: str
    cosine: float
    error: float


def table(found: Sequence[Row]) -> str:
    """Markdown: for each subject the relative errors in per cent, a column for each format."""
    lines = []
    for subject in dict.fromkeys(row.subject for row in found):
        own = [row for row in found if row.subject == subject]
        error = {(row.layers, row.format): f"{100 * row.error:.2f}" for row in own}
        forms = [name for name in FORMATS if any(row.format == name for row in own)]
        lines += [f"| {subject}, error in % | {' | '.join(forms)} |", f"|---|{'---|' * len(forms)}"]
        for layers in dict.fromkeys(row.layers for row in own if row.format in forms):
            cells = (error.get((layers, form), "") for form in forms)
            lines.append(f"| {layers} | {' | '.join(cells)} |")
        attention = (f"{name} {error['attention', name]} %" for name in ATTENTION.values())
        lines += ["", f"Attention: {', '.join(attention)}.", ""]
    return "\n".join(lines)


def rows() -> Iterator[Row]:
    """The block first, then nano."""
    yield from block_rows()
    with torch.inference_mode():
        yield from _measure("nano", *_nano(), by_block=True)


def block_rows(
    groups: Iterable[str] = tuple(GROUPS), forms: Iterable[str] = tuple(FORMATS)
) -> Iterator[Row]:
    """Of the true-shaped block, some or all groups and formats; then its attention."""
    with torch.inference_mode():
        yield from _measure("1.3B block", *_block(), groups=groups, forms=forms)


def _measure(
    subject: str,
    model: nn.Module,
    run: Callable[[nn.Module], Tensor],
    by_block: bool = False,
    groups: Iterable[str] = tuple(GROUPS),
    forms: Iterable[str] = tuple(FORMATS),
) -> Iterator[Row]:
    expected = run(model)
    groups, forms = tuple(groups), tuple(forms)

    def row(layers: str, form: str, changed: nn.Module) -> Row:
        return Row(subject, layers, form, *closeness(run(changed), expected))

    for name in forms:
        for group in groups:
            yield row(group, name, _changed(model, FORMATS[name], GROUPS[group]))
    if "all" in groups and "fp8" in forms:
        changed = _changed(model, FORMATS["fp8"], GROUPS["all"])
        with small_activations():
            small = row(SMALL, "fp8", changed)
        yield small
    for precision, attention in ATTENTION.items():
        changed = deepcopy(model)
        quantize_attention(changed, precision, torch.device("cpu"), torch.float32)
        yield row("attention", attention, changed)
    if by_block:
        for i in range(len(model.blocks)):
            for name in ("int8-rotated", "fp8"):
                parts = tuple(f"blocks.{i}{part}" for part in GROUPS["all"])
                yield row(f"blocks.{i}", name, _changed(model, FORMATS[name], parts))


@contextmanager
def small_activations() -> Iterator[None]:
    """Rows are quantised as `fp8_sums.py` wants them; weights are not: that was before."""
    plain = torch_quantize.LARGEST
    torch_quantize.LARGEST = plain | {torch.float8_e4m3fn: ACTIVATION_PEAK}
    try:
        yield
    finally:
        torch_quantize.LARGEST = plain


def _changed(model: nn.Module, form: LinearFormat, parts: tuple[str, ...]) -> nn.Module:
    """A copy whose products with one of these in their names have that format."""
    names = [n for n, _ in linears(model) if any(p in n for p in parts) and level_of(n) != "plain"]
    changed = deepcopy(model)
    convert(changed, dict.fromkeys(names, form))
    return changed


def _block() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A model of one block, and what the block adds to its tokens."""
    torch.manual_seed(0)
    model = nn.Module()
    model.blocks = nn.ModuleList([Block(DIT_1_3B)])
    for name, p in model.named_parameters():
        nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.ndim == 2 else 0.1)
        if "norm" in name and name.endswith("weight"):
            p.add_(1.0)
    freqs = RopeTables(DIT_1_3B.head_dim).get(_TOKENS, torch.device("cpu"))
    x, text = heavy_tailed(1, len(freqs), DIT_1_3B.dim), heavy_tailed(1, 40, DIT_1_3B.dim)
    time = TimeEmbedding(torch.randn(1, 1, DIT_1_3B.dim), torch.randn(1, 6, DIT_1_3B.dim), None)

    def run(changed: nn.Module) -> Tensor:
        block = changed.blocks[0]
        return block(x.clone(), time, freqs, block.cross_attn.prepare(text, None)) - x

    return model.eval().requires_grad_(False), run


def _nano() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """nano's transformer, and its latents for some prompts."""
    pipe = Pipeline.load("nano", precision="fp32", device="cpu")
    original = pipe.components.dit()

    def run(changed: nn.Module) -> Tensor:
        pipe.components.replace("dit", changed)
        made = [pipe.generate(p, seed=i, output="latents") for i, p in enumerate(PROMPTS)]
        return torch.cat(made)

    return original, run
