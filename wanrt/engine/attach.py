"""Puts graphs in the place of a model's own arithmetic: each is called like what it replaces.

The model stays as it is, with its loop over blocks, its weights and their names. A graph takes the
weights of the module that it stands for as they lie at each call: a block that streams, or a LoRA
that was merged, needs no further word.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wanrt.engine.graphs import Graphs, Runner
from wanrt.engine.memory import HALVES
from wanrt.engine.vae import GraphVae
from wanrt.errors import UsageError
from wanrt.kernels.limits import PART_TOKENS
from wanrt.models.clip import ClipVision
from wanrt.models.dit import Block, TimeEmbedding, WanDiT
from wanrt.models.layers import CrossKV
from wanrt.models.umt5 import Umt5Encoder
from wanrt.weights.names import Kind

_TOKEN_AXIS = {"x": 1, "y": 1, "level": 1, "freqs": 0}  # of the inputs that have tokens


def attach(kind: Kind, module: nn.Module, graphs: Graphs) -> nn.Module:
    """The model, its arithmetic done by those graphs that there are."""
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

    def __call__(self, **inputs: Tensor | None) -> dict[str, Tensor]:
        """Inputs are cast to what the graph takes; those that are None are left out."""
        return self._run(self._weights(), inputs)

    def by_token(self, **inputs: Tensor | None) -> dict[str, Tensor]:
        """The same for any number of tokens, so many at once as the graph takes."""
        x = inputs["x"]
        assert x is not None
        length = x.shape[1]
        weights = self._weights()
        if length <= PART_TOKENS:
            return self._run(weights, inputs)
        whole: dict[str, Tensor] = {}
        for start in range(0, length, PART_TOKENS):
            rows = slice(start, min(start + PART_TOKENS, length))
            part = {name: _rows(name, tensor, rows) for name, tensor in inputs.items()}
            made = self._run(weights, part, {name: y[:, rows] for name, y in whole.items()})
            if not whole:
                whole = {name: y.new_empty(1, length, *y.shape[2:]) for name, y in made.items()}
                for name, y in made.items():
                    whole[name][:, rows] = y
        return whole

    def _weights(self) -> dict[str, Tensor]:
        """As they lie now; they stay there while their block computes, and no longer."""
        takes = self.runner.inputs
        return {name: w for name, w in self.module.named_parameters() if name in takes}

    def _run(
        self,
        weights: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor | None],
        out: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        takes = self.runner.inputs
        given = {name: x.to(takes[name]) for name, x in inputs.items() if x is not None}
        return self.runner({**weights, **given}, out)


def _rows(name: str, tensor: Tensor | None, rows: slice) -> Tensor | None:
    """Of an input that has tokens, some of them."""
    if tensor is None or name not in _TOKEN_AXIS:
        return tensor
    return tensor[rows] if _TOKEN_AXIS[name] == 0 else tensor[:, rows]


def _graph(graphs: Graphs, name: str, index: int) -> Runner:
    """That of a block by its own number, where weights are embedded, else that of every block."""
    own = f"{name}.{index}"
    return graphs.get(own if graphs.has(own) else name)


def _has(graphs: Graphs, name: str, index: int) -> bool:
    return graphs.has(name) or graphs.has(f"{name}.{index}")


def _replace(graphs: Graphs, name: str, module: nn.Module, *inputs: str, index: int = 0) -> None:
    """Have a graph do what a module does, one of several alike, where the bundle has it."""
    if not _has(graphs, name, index):
        return
    call = Call(_graph(graphs, name, index), module)

    def forward(*tensors: Tensor) -> Tensor:
        return call(**dict(zip(inputs, tensors, strict=True)))["out"]

    module.forward = forward


def _replace_by_token(graphs: Graphs, name: str, index: int, module: nn.Module) -> None:
    """The same for a module of tokens, any number of them."""
    if _has(graphs, name, index):
        call = Call(_graph(graphs, name, index), module)
        module.forward = lambda x: call.by_token(x=x)["out"]


def _attach_umt5(encoder: Umt5Encoder, graphs: Graphs) -> None:
    _replace(graphs, "umt5.embed", encoder.token_embedding, "ids")
    for i, block in enumerate(encoder.blocks):
        _replace(graphs, "umt5.block", block, "x", "buckets", "pad", index=i)
    _replace(graphs, "umt5.norm", encoder.norm, "x")


def _attach_clip(clip: ClipVision, graphs: Graphs) -> None:
    if graphs.has("clip.embed"):
        embed = Call(graphs.get("clip.embed"), clip)
        clip.embed = lambda pixels: embed(pixels=pixels)["out"]
    for i, block in enumerate(clip.transformer):
        _replace(graphs, "clip.block", block, "x", index=i)


def _attach_dit(dit: WanDiT, graphs: Graphs) -> None:
    _replace(graphs, "dit.patch", dit.patch_embedding, "latents")
    _replace(graphs, "dit.text", dit.text_embedding, "context")
    _replace(graphs, "dit.time", dit.time_embedding, "sinusoid")
    _replace(graphs, "dit.time_projection", dit.time_projection, "e")
    if dit.spec.image_dim is not None:
        _replace(graphs, "dit.image", dit.img_emb, "image")
    streams = hasattr(dit, "weight_stream")
    for i, block in enumerate(dit.blocks):
        _attach_block(block, graphs, i, streams)
    if graphs.has("dit.head"):
        head = Call(graphs.get("dit.head"), dit.head)
        dit.head.forward = lambda x, time: head.by_token(x=x, e=time.e, level=time.level)["out"]
    if dit.spec.vace_layers:
        _replace(graphs, "dit.vace_patch", dit.vace_patch_embedding, "latents")
        _replace_by_token(graphs, "dit.before", 0, dit.vace_blocks[0].before_proj)
        for j, side in enumerate(dit.vace_blocks):
            _attach_block(side, graphs, len(dit.blocks) + j, streams)
            _replace_by_token(graphs, "dit.after", j, side.after_proj)


def _attach_block(block: Block, graphs: Graphs, index: int, streams: bool) -> None:
    """In two parts around the attention where the bundle has both, else whole.

    Between the parts an engine attends, if the bundle has one, unless that is done in eight bits.
    Where blocks stream, keys and values of the conditions stay native: their weights come when the
    module that makes them is called.
    """
    if not streams and _has(graphs, "dit.kv", index):
        kv = Call(_graph(graphs, "dit.kv", index), block.cross_attn)
        block.cross_attn.prepare = lambda context, image: CrossKV(
            *kv(context=context, image=image).values()
        )
    if all(_has(graphs, half, index) for half in HALVES):
        _attach_parts(block, graphs, index)
    elif _has(graphs, "dit.block", index):
        _attach_whole(block, graphs, index)


def _attach_whole(block: Block, graphs: Graphs, index: int) -> None:
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
    if graphs.has("dit.attention") and block.attend is block.ops.attention:
        block.attend = _attention(graphs.get("dit.attention"))


def _attention(runner: Runner) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Heads `[1, H, L, hd]` -> the same. It has no weights, and one serves all blocks."""
    call = Call(runner, nn.Module())

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = call(q=q.transpose(1, 2), k=k.transpose(1, 2), v=v.transpose(1, 2))["y"]
        return y.transpose(1, 2)

    return attend


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
