"""From a request to what a plan is made for: `wanrt plan` and `wanrt generate` ask the same here.

Nothing here imports torch, so that a plan is there at once.
"""

from dataclasses import dataclass

from wanrt import env
from wanrt.config import Precision, WanSpec
from wanrt.memory import host
from wanrt.memory.budget import HOST_SHARE, parse_bytes
from wanrt.memory.dit_bytes import FORMATS, dit_weights, plain_precision
from wanrt.memory.engine_bytes import NATIVE, EngineBytes
from wanrt.memory.packed_bytes import PackedWeights
from wanrt.memory.placement import TYPICAL, Ask, Machine
from wanrt.memory.question import Question
from wanrt.memory.vae_formats import VaeFormat
from wanrt.request import Request

CPU = Machine(copy=8e9, read=2e9, flops=2e11, device="cpu", fused=False)


@dataclass(frozen=True)
class Budgets:
    """What the user allows, bytes; None is what the machine has."""

    vram: int | None = None
    ram: int | None = None

    @classmethod
    def parse(cls, vram: str | int | None, ram: str | int | None) -> "Budgets":
        """From `8G` and `32G`. Raises UsageError."""
        return cls(parse_bytes(vram, "--vram"), parse_bytes(ram, "--ram"))

    @property
    def host(self) -> int:
        """Bytes of host memory."""
        return self.ram or int(HOST_SHARE * host.total_bytes())


UNLIMITED = Budgets()


def question_of(
    spec: WanSpec,
    request: Request,
    precision: str,
    budgets: Budgets,
    machine: Machine,
    *,
    refs: int = 0,
    encodes_text: bool = True,
    decodes: bool = True,
    lora: int = 0,
    packed: PackedWeights | None = None,
    engines: EngineBytes = NATIVE,
    packed_text: PackedWeights | None = None,
    vae: VaeFormat | None = None,
) -> Question:
    """What is asked of a machine by a request whose size is settled.

    refs: reference images; encodes_text: a prompt's features are not known yet; decodes: frames are
    wanted, not latents; lora: bytes of low-rank branches; packed: of a GGUF transformer, and
    packed_text of a text encoder; engines: what those of a bundle work in; vae:
    how the VAE keeps its numbers, None for as it usually does.
    """
    ask = Ask(
        request.width,
        request.height,
        request.num_frames,
        guided=request.guided,
        image=request.task in ("i2v", "flf2v", "vace"),
        text_rows=spec.dit.text_len,
        refs=refs,
        encodes_text=encodes_text,
        decodes=decodes,
        lora=lora,
    )
    known = (packed, engines, packed_text, vae)
    return Question(spec, ask, precision, budgets.host, machine, *known)


def format_of(precision: Precision, spec: WanSpec) -> str:
    """Its name in `memory.dit_bytes.FORMATS`, for a released model whose file is not looked at."""
    plain = plain_precision(dit_weights(spec.dit, FORMATS["fp32"]).total // 4)
    if precision == "auto":
        return plain
    return f"{precision}/fp32" if precision in ("int8", "fp8") and plain == "fp32" else precision


def expected_machine(device: str) -> Machine:
    """A machine that was not looked at: `cpu`, or a card with Triton unless WANRT_OPS says no."""
    if device == "cpu":
        return CPU
    return TYPICAL if env.ops_backend() in ("auto", "triton") else Machine(fused=False)
