"""Puts graphs in the place of a model's own arithmetic: each is called like what it replaces.

The model stays as it is, with its loop over blocks, its weights and their names. A graph takes the
weights of the module that it stands for as they lie at each call: a block that streams, or a LoRA
that was merged, needs no further word.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wanrt.engine.graphs import Graphs, Runner
from wanrt.engine.vae import GraphVae
from wanrt.errors import UsageError
from wanrt.models.clip import ClipVision
from wanrt.models.dit import Block, TimeEmbedding, WanDiT
from wanrt.models.layers import CrossKV
from wanrt.models.umt5 import Umt5Encoder
from wanrt.weights.names import Kind

PART_TOKENS = 8192  # that graphs take at once where each token is computed by itself
_TOKEN_AXIS = {"x": 1, "y": 1, "level": 1, "freqs": 0}  # of the inputs that have tokens


def attach(kind: Kind, module: nn.Module, graphs: Graphs) -> nn.Module:
    """The model whose arithmetic is done by graphs; raises FormatError where one is missing."""
    match kind:
        case "dit":
            _attach_dit(module, graphs)
        case "umt5":
            _attach_umt5(module, graphs)
        case "clip":
            _attach_clip(module, graphs)
        case "vae":
            return GraphVae(module, graphs)
    return module


@dataclass(frozen=True)
class Call:
    """One graph with the weights of one module."""

    runner: Runner
    module: nn.Module

    def __call__(
        self, out: Mapping[str, Tensor] | None = None, **inputs: Tensor | None
    ) -> dict[str, Tensor]:
        """Inputs are cast to what the graph takes; those that are None are left out."""
        takes = self.runner.inputs
        given = {name: w for name, w in self.module.named_parameters() if name in takes}
        given |= {name: x.to(takes[name]) for name, x in inputs.items() if x is not None}
        return self.runner(given, out)

    def by_token(self, **inputs: Tensor | None) -> dict[str, Tensor]:
        """The same for any number of tokens, so many at once as the graph takes."""
        x = inputs["x"]
        assert x is not None
        length = x.shape[1]
        if length <= PART_TOKENS:
            return self(**inputs)
        whole: dict[str, Tensor] = {}
        for start in range(0, length, PART_TOKENS):
            rows = slice(start, min(start + PART_TOKENS, length))
            part = {name: _rows(name, tensor, rows) for name, tensor in inputs.items()}
            made = self({name: y[:, rows] for name, y in whole.items()}, **part)
            if not whole:
                whole = {name: y.new_empty(1, length, *y.shape[2:]) for name, y in made.items()}
                for name, y in made.items():
                    whole[name][:, rows] = y
        return whole


def _rows(name: str, tensor: Tensor | None, rows: slice) -> Tensor | None:
    """Of an input that has tokens, some of them."""
    if tensor is None or name not in _TOKEN_AXIS:
        return tensor
    return tensor[rows] if _TOKEN_AXIS[name] == 0 else tensor[:, rows]


def _graph(graphs: Graphs, name: str, index: int | None = None) -> Runner:
    """That of a block by its own number, where weights are embedded, else that of every block."""
    own = f"{name}.{index}"
    return graphs.get(own if index is not None and graphs.has(own) else name)


def _replace(module: nn.Module, runner: Runner, *names: str) -> None:
    """Have a graph with one output do what the module did."""
    call, (output,) = Call(runner, module), runner.outputs

    def forward(*tensors: Tensor) -> Tensor:
        return call(**dict(zip(names, tensors, strict=True)))[output]

    module.forward = forward


def _replace_by_token(module: nn.Module, runner: Runner) -> None:
    """The same for a module of tokens, any number of them."""
    call, (output,) = Call(runner, module), runner.outputs
    module.forward = lambda x: call.by_token(x=x)[output]


def _attach_umt5(encoder: Umt5Encoder, graphs: Graphs) -> None:
    if graphs.has("umt5.embed"):
        _replace(encoder.token_embedding, graphs.get("umt5.embed"), "ids")
    for i, block in enumerate(encoder.blocks):
        _replace(block, _graph(graphs, "umt5.block", i), "x", "buckets", "pad")
    _replace(encoder.norm, graphs.get("umt5.norm"), "x")


def _attach_clip(clip: ClipVision, graphs: Graphs) -> None:
    embed = Call(graphs.get("clip.embed"), clip)
    clip.embed = lambda pixels: embed(pixels=pixels)["out"]
    for i, block in enumerate(clip.transformer):
        _replace(block, _graph(graphs, "clip.block", i), "x")


def _attach_dit(dit: WanDiT, graphs: Graphs) -> None:
    _replace(dit.patch_embedding, graphs.get("dit.patch"), "latents")
    _replace(dit.text_embedding, graphs.get("dit.text"), "context")
    _replace(dit.time_embedding, graphs.get("dit.time"), "sinusoid")
    _replace(dit.time_projection, graphs.get("dit.time_projection"), "e")
    if dit.spec.image_dim is not None:
        _replace(dit.img_emb, graphs.get("dit.image"), "image")
    for i, block in enumerate(dit.blocks):
        _attach_block(block, graphs, i)
    head = Call(graphs.get("dit.head"), dit.head)
    dit.head.forward = lambda x, time: head.by_token(x=x, e=time.e, level=time.level)["out"]
    if dit.spec.vace_layers:
        _replace(dit.vace_patch_embedding, graphs.get("dit.vace_patch"), "latents")
        _replace_by_token(dit.vace_blocks[0].before_proj, graphs.get("dit.before"))
        for j, side in enumerate(dit.vace_blocks):
            _attach_block(side, graphs, len(dit.blocks) + j)
            _replace_by_token(side.after_proj, _graph(graphs, "dit.after", j))


def _attach_block(block: Block, graphs: Graphs, index: int) -> None:
    """In two parts around the native attention where the bundle has them, else whole."""
    kv = Call(_graph(graphs, "dit.kv", index), block.cross_attn)
    block.cross_attn.prepare = lambda context, image: CrossKV(
        *kv(context=context, image=image).values()
    )
    if graphs.has("dit.pre"):
        _attach_parts(block, graphs, index)
        return
    whole = Call(_graph(graphs, "dit.block", index), block)

    def forward(
        x: Tensor, time: TimeEmbedding, freqs: Tensor, kv: CrossKV, key_bias: Tensor | None = None
    ) -> Tensor:
        given = _conditions(time, kv, key_bias)
        return whole(x=_single(x), freqs=freqs, **given)["out"]

    block.forward = forward


def _attach_parts(block: Block, graphs: Graphs, index: int) -> None:
    before = Call(_graph(graphs, "dit.pre", index), block)
    after = Call(_graph(graphs, "dit.post", index), block)

    def pre(x: Tensor, time: TimeEmbedding, freqs: Tensor) -> tuple[Tensor, ...]:
        heads = before.by_token(x=_single(x), e0=time.e0, freqs=freqs, level=time.level)
        return tuple(heads[name].transpose(1, 2) for name in ("q", "k", "v"))

    def post(
        x: Tensor, y: Tensor, time: TimeEmbedding, kv: CrossKV, key_bias: Tensor | None = None
    ) -> Tensor:
        given = _conditions(time, kv, key_bias)
        return after.by_token(x=x, y=y.transpose(1, 2), **given)["out"]

    block.pre, block.post = pre, post


def _conditions(
    time: TimeEmbedding, kv: CrossKV, key_bias: Tensor | None
) -> dict[str, Tensor | None]:
    """What `dit.post` and `dit.block` take beside the tokens; a row counts once without a bias."""
    if key_bias is None:
        key_bias = kv.k.new_zeros((1, kv.k.shape[2]), dtype=torch.float32)
    return {"e0": time.e0, "level": time.level, "key_bias": key_bias, **kv._asdict()}


def _single(x: Tensor) -> Tensor:
    if len(x) != 1:
        raise UsageError(f"{len(x)} samples at once; engines compute one: call once for each")
    return x
