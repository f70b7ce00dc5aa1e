"""Every way in which a phase of a request could run, with the memory and the time of each."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from wanrt.config import VaeSpec, VaeWork, WanSpec
from wanrt.memory.dit_bytes import (
    DitWeights,
    Format,
    Tokens,
    activation_bytes,
    attention_extra,
    condition_bytes,
    count_tokens,
    dit_weights,
    latent_bytes,
    text_cache_bytes,
    widened_bytes,
)
from wanrt.memory.engine_bytes import NATIVE, EngineBytes, step_activations
from wanrt.memory.packed_bytes import PackedWeights
from wanrt.memory.placement import (
    Ask,
    Guidance,
    Machine,
    Phase,
    Placement,
    copy_seconds,
    place,
)
from wanrt.memory.text_bytes import (
    EncoderWeights,
    clip_activations,
    clip_weights,
    umt5_activations,
    umt5_weights,
)
from wanrt.memory.vae_bytes import decode_bytes, encode_bytes
from wanrt.memory.vae_costs import decode_operations, vae_weight_bytes
from wanrt.memory.vae_engine_bytes import Coded, Side, VaeEngines, coder_bytes
from wanrt.memory.vae_formats import VaeFormat
from wanrt.vae_shapes import decoder_bands

_LEAST_BAND = 6  # latent rows; lower bands would do little else than their halos
_SINGLE_FRAMES = 1.02  # time of four frames one by one, relative to together; assumed


@dataclass(frozen=True)
class Option:
    """One way to run a phase, and what the run must be told to do so."""

    phase: Phase
    placement: Placement | None = None
    guidance: Guidance = "none"
    work: VaeWork | None = None


def text_options(
    spec: WanSpec,
    ask: Ask,
    form: Format,
    machine: Machine,
    engines: EngineBytes = NATIVE,
    packed: PackedWeights | None = None,
) -> Iterator[Option]:
    """Both prompts through every block that is there.

    packed: of a checkpoint whose matrices stay packed while it streams, and are unpacked else.
    """
    weights, rows = umt5_weights(spec.umt5, form.other), ask.text_rows
    features = 2 * rows * spec.umt5.dim * 4  # of both prompts
    held = features + umt5_activations(spec.umt5, rows, form.other)
    whole, streaming = _encoder_options("text", weights, held, machine, engines.text)
    if packed is not None:
        held = features + umt5_activations(spec.umt5, rows, form.other, packed)
        streaming = _streaming_packed("text", packed, held, machine, engines.text)
        whole = replace(whole, phase=replace(whole.phase, seconds=streaming.phase.seconds))
    yield whole
    yield streaming


def clip_options(
    spec: WanSpec, form: Format, machine: Machine, engines: EngineBytes = NATIVE
) -> Iterator[Option]:
    """One picture at a time through the CLIP tower."""
    assert spec.clip is not None, f"{spec.id=}"
    element = machine.image_bytes(form)
    weights = clip_weights(spec.clip, element)
    held = clip_activations(spec.clip, element)
    yield from _encoder_options("image", weights, held, machine, engines.image)


def _encoder_options(
    name: str, weights: EncoderWeights, held: int, machine: Machine, workspace: int
) -> Iterator[Option]:
    """Whole on the device, or block by block out of the file: each is needed once per request.

    Either way every byte is read once, so that the whole one is no faster.
    """
    sizes = [weights.block] * weights.num_blocks
    for placement in (place(sizes, len(sizes), None), place(sizes, 0, room=0)):
        yield Option(
            Phase(
                name,
                weights=placement.num_resident * weights.block + weights.rest,
                ring=placement.slots * weights.block,
                activations=held,
                workspace=workspace,
                host=placement.host,
                streamed=placement.mapped,
                seconds=weights.total / machine.read,
            ),
            placement,
        )


def _streaming_packed(
    name: str, packed: PackedWeights, held: int, machine: Machine, workspace: int
) -> Option:
    """Block by block out of the file, as the file packs them."""
    placement = place(list(packed.visits), 0, room=0)
    phase = Phase(
        name,
        weights=packed.rest,
        ring=placement.slots * max(packed.visits),
        activations=held,
        workspace=workspace,
        host=placement.host,
        streamed=placement.mapped,
        seconds=(sum(packed.visits) + packed.rest) / machine.read,
    )
    return Option(phase, placement)


def dit_options(
    spec: WanSpec,
    ask: Ask,
    form: Format,
    machine: Machine,
    room: int | None,
    packed: PackedWeights | None = None,
    engines: EngineBytes = NATIVE,
) -> Iterator[Option]:
    """One denoising step: how many blocks stay, and whether both texts pass a block in turn.

    room: bytes of host memory. packed: of a checkpoint whose matrices stay packed while it streams.
    Estimated times are the native ones, with engines too.
    """
    tokens, branches = _tokens(spec, ask), 2 if ask.guided else 1
    caches = branches * text_cache_bytes(spec.dit, tokens, form.other)
    caches += latent_bytes(spec.dit, tokens)
    compute = branches * step_operations(spec, tokens) / machine.flops
    extra = attention_extra(spec.dit, tokens, form, machine.fused) if form.quantised else 0
    orders: tuple[Guidance, ...] = ("sequential", "interleaved") if ask.guided else ("none",)
    for order in orders:
        passes, together = {"none": (1, 1), "sequential": (2, 1), "interleaved": (1, 2)}[order]
        run = (tokens, form.other, together)
        if engines.blocks == "native":
            held = partial(activation_bytes, spec.dit, *run, machine.fused, extra)
            widened = widened_bytes(spec.dit, form)
            whole, streaming = held(None, widened), held(packed, widened)
        else:
            assert packed is None, "engines take matrices that are not packed"
            whole = streaming = step_activations(spec.dit, *run, engines.blocks == "whole", extra)
        for placement, stay, ring in _block_options(spec, form, room, packed):
            if order == "interleaved" and not placement.slots:
                continue  # nothing streams: one text after the other holds less
            copies = passes * copy_seconds(placement, machine)
            phase = Phase(
                "step",
                weights=stay + ask.lora,
                ring=ring,
                activations=streaming if placement.slots else whole,
                caches=caches,
                workspace=engines.step,
                host=placement.host,
                streamed=passes * (placement.pinned + placement.mapped),
                seconds=max(compute, copies),
            )
            yield Option(phase, placement, order)


def _tokens(spec: WanSpec, ask: Ask) -> Tokens:
    size = (ask.width, ask.height, ask.num_frames)
    return count_tokens(spec, *size, ask.text_rows, ask.image, ask.refs)


def visit_sizes(spec: WanSpec, weights: DitWeights) -> list[int]:
    """Bytes of the blocks in the order in which a pass comes to them: hints behind their block."""
    sizes = []
    for i in range(weights.num_blocks):
        sizes.append(weights.block)
        if i in spec.dit.vace_layers:
            sizes.append(weights.block + weights.vace_extra)
    return sizes


def _block_options(
    spec: WanSpec, form: Format, room: int | None, packed: PackedWeights | None
) -> Iterator[tuple[Placement, int, int]]:
    """Placement, bytes of weights that stay, bytes of the ring.

    Where all blocks stay, their cross-attention keys and values do too. Else those are wanted once
    per request and pass through the ring, out of their file.
    """
    weights = dit_weights(spec.dit, form)
    sizes, texts, rest = visit_sizes(spec, weights), weights.cross_kv, weights.rest
    yield place(sizes, len(sizes), room), sum(sizes) + len(sizes) * texts + rest, 0
    if packed is not None:
        sizes, texts, rest = list(packed.visits), packed.texts, packed.rest
    for num in range(len(sizes) - 1, -1, -1):
        placement = place(sizes, num, room, texts)
        stay = sum(sizes[i] for i in placement.resident())
        yield placement, stay + rest, placement.slots * max(*sizes, texts)


def step_operations(spec: WanSpec, tokens: Tokens) -> float:
    """Additions and multiplications of one forward pass, the control branch included."""
    d = spec.dit
    blocks = d.num_layers + len(d.vace_layers)
    matrices = 6 * d.dim * d.dim + 2 * d.dim * d.ffn_dim  # the keys of the text come from a cache
    attention = 2 * d.dim * (tokens.length + tokens.text + tokens.image)
    return 2.0 * blocks * tokens.length * (matrices + attention)


def encode_options(
    spec: WanSpec, ask: Ask, machine: Machine, vae: VaeFormat, engines: EngineBytes = NATIVE
) -> Iterator[Option]:
    """Pictures or a video to latents."""
    yield from _vae_options("encode", spec, ask, machine, vae, engines.encode)


def decode_options(
    spec: WanSpec, ask: Ask, machine: Machine, vae: VaeFormat, engines: EngineBytes = NATIVE
) -> Iterator[Option]:
    """Latents to frames."""
    yield from _vae_options("decode", spec, ask, machine, vae, engines.decode)


def _vae_options(
    side: Side,
    spec: WanSpec,
    ask: Ask,
    machine: Machine,
    vae: VaeFormat,
    engines: VaeEngines | None,
) -> Iterator[Option]:
    """What asks for less at once than engines do is done by the VAE's modules, and so is a size
    that no engine takes."""
    engines = (engines and engines.of(ask.height, ask.width)) or None
    for work in _works(spec, ask, machine):
        if engines is None or work.frames is not None:
            yield _vae_option(side, spec, ask, machine, vae, work)
    for host in (False, True) if machine.device != "cpu" else (False,):
        if engines is not None:
            work = VaeWork(chunk=1, host=host)
            yield _vae_option(side, spec, ask, machine, vae, work, engines)


def _works(spec: WanSpec, ask: Ask, machine: Machine) -> Iterator[VaeWork]:
    """Whole frames; caches in host memory; bands, with all caches or with those of one."""
    rows = ask.height // spec.vae.spatial_stride
    yield VaeWork(chunk=1)
    yield VaeWork(chunk=1, frames=1)
    apart = machine.device != "cpu"  # host memory is not the device's
    if apart:
        yield VaeWork(chunk=1, frames=1, host=True)
    for parts in (2, 3, 4, 6, 8):
        if rows // parts >= _LEAST_BAND:
            band = -(-rows // parts)
            yield VaeWork(chunk=1, band=band, frames=1)
            yield VaeWork(chunk=1, band=band, frames=1, order="bands")
            if apart:
                yield VaeWork(chunk=1, band=band, frames=1, host=True)


def _vae_option(
    name: Side,
    spec: WanSpec,
    ask: Ask,
    machine: Machine,
    vae: VaeFormat,
    work: VaeWork,
    engines: VaeEngines | None = None,
) -> Option:
    """What is coded waits on the device beside the VAE; the time is that of decoding."""
    stride = spec.vae.spatial_stride
    rows, columns = ask.height // stride, ask.width // stride
    chunks = (ask.num_frames - 1) // spec.vae.temporal_stride + 1
    coded = _coded(name, spec.vae, ask, machine, vae, work, engines)
    given = {
        "encode": 3 * ask.num_frames * ask.width * ask.height,
        "decode": spec.vae.z_dim * chunks * rows * columns,
    }[name]
    given_rows = (
        band.given.stop - band.given.start for band in decoder_bands(spec.vae, rows, work.band)
    )
    repeated = sum(given_rows) / rows  # every row once, and the halos
    seconds = decode_operations(spec.vae, ask.num_frames, ask.height, ask.width) / machine.flops
    if work.host:
        seconds += 2 * chunks * coded.moved / machine.copy / repeated
    phase = Phase(
        name,
        weights=vae_weight_bytes(spec.vae, vae),
        activations=coded.need.activations
        + 4 * given
        + condition_bytes(spec.dit, _tokens(spec, ask)),
        caches=coded.need.caches,
        workspace=coded.workspace,
        host=coded.need.host,
        seconds=seconds * repeated * (_SINGLE_FRAMES if work.frames else 1.0),
    )
    return Option(phase, work=work)


def _coded(
    name: Side,
    spec: VaeSpec,
    ask: Ask,
    machine: Machine,
    vae: VaeFormat,
    work: VaeWork,
    engines: VaeEngines | None,
) -> Coded:
    """By engines, or by the VAE's modules."""
    size = (ask.height, ask.width)
    if engines is not None:
        return coder_bytes(spec, name, *size, ask.num_frames, vae.element, work.host, engines)
    plain = "cpu" if machine.device == "cpu" else "torch"
    backend = machine.backend if vae.element == 2 else plain
    if name == "encode":
        need = encode_bytes(spec, *size, vae.element, work, backend)
    else:
        need = decode_bytes(spec, *size, vae.element, work, backend, vae.int8)
    return Coded(need, workspace=0, moved=need.host)
