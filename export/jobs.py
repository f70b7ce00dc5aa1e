"""Jobs: a part of a model in a precision, and which of them each engine wants of a model."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from wanrt.config import WanSpec
from wanrt.engine.manifest import Precision
from wanrt.export import dit, encoders, onnx, qdq, rtx, vae
from wanrt.export.part import Part
from wanrt.models.dit import WanDiT
from wanrt.quant.formats import PLAIN, LinearFormat
from wanrt.quant.policy import EightBit
from wanrt.weights.names import Kind

_TEXT: dict[Precision, Precision] = {"fp16": "fp32"}  # umT5 overflows in fp16


@dataclass(frozen=True)
class Job:
    """A part of a model in a precision; `formats` are those of its weights in eight bits."""

    model: str
    precision: Precision
    part: Part
    formats: Mapping[str, LinearFormat] = field(default_factory=dict)

    @classmethod
    def of(
        cls, model: str, dit_: WanDiT, part: Part, plain: Precision, eight_bit: EightBit | None
    ) -> "Job":
        """Of a part of a transformer: in eight bits where the policy names products in it."""
        formats = dit.formats(dit_, part, eight_bit) if eight_bit else {}
        return cls(model, eight_bit if eight_bit and formats else plain, part, formats)

    def graph(self) -> onnx.Model:
        """Its graph, the products of `formats` in eight bits."""
        model = onnx.trace(self.part)
        return qdq.quantise(model, self.formats) if self.formats else model

    def trace(self) -> onnx.Model:
        """The same graph as the builder of engines takes it."""
        return rtx.spared(self.graph())


def for_onnxruntime(
    spec: WanSpec, plain: Precision, eight_bit: EightBit | None, kinds: Collection[Kind]
) -> Iterator[Job]:
    """Every graph of these parts of a model, in the order of a request; blocks and steps whole."""
    text, dtype = _TEXT.get(plain, plain), PLAIN[plain]
    if "umt5" in kinds:
        encoder = encoders.empty_umt5(spec.umt5, PLAIN[text])
        yield from (Job(spec.id, text, one) for one in encoders.umt5_parts(encoder, PLAIN[text]))
    if "clip" in kinds and spec.clip is not None:
        tower = encoders.empty_clip(spec.clip, dtype)
        yield from (Job(spec.id, plain, one) for one in encoders.clip_parts(tower, dtype))
    if "dit" in kinds:
        for job in _of_transformer(spec, plain, eight_bit):
            if job.part.name not in ("dit.pre", "dit.post"):
                yield job
    if "vae" in kinds:
        parts = vae.parts(vae.empty(spec.vae, dtype), dtype)
        yield from (Job(spec.id, plain, one) for one in parts if not vae.is_section(one))


def for_engines(
    spec: WanSpec, plain: Precision, eight_bit: EightBit | None, attention: bool = False
) -> Iterator[Job]:
    """What a bundle of engines wants: the halves of blocks, what is around them, the VAE.

    Attention between the halves is native unless `attention` asks for an engine, and the VAE goes
    by sections, so that little need be there twice. Encoders of text and pictures run once per
    request and stay native.
    """
    if attention:
        transformer = dit.empty(spec.dit, PLAIN[plain])
        yield Job(spec.id, plain, dit.attention(transformer, PLAIN[plain]))
    for job in _of_transformer(spec, plain, eight_bit):
        if job.part.name != "dit.block":
            yield job
    dtype = PLAIN[plain]
    for part in vae.parts(vae.empty(spec.vae, dtype), dtype):
        if vae.is_section(part):
            yield Job(spec.id, plain, part)


def _of_transformer(spec: WanSpec, plain: Precision, eight_bit: EightBit | None) -> Iterator[Job]:
    transformer = dit.empty(spec.dit, PLAIN[plain])
    for part in dit.parts(transformer, PLAIN[plain]):
        yield Job.of(spec.id, transformer, part, plain, eight_bit)
