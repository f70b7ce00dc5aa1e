"""How a VAE keeps its numbers, by the precision that is asked of it."""

from dataclasses import dataclass
from typing import Literal

from wanrt.config import VaePrecision
from wanrt.errors import UsageError

Plain = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class VaeFormat:
    """`plain` is what everything has that is not int8; `int8`: convolutions of the decoder are."""

    name: str
    plain: Plain
    int8: bool = False
    fp16_sums: bool = False  # 3x3x3 taps are added up in fp16

    @property
    def element(self) -> int:
        """Bytes of a plain number."""
        return 4 if self.plain == "fp32" else 2


VAE_FORMATS = {
    form.name: form
    for form in (
        VaeFormat("fp32", "fp32"),
        VaeFormat("bf16", "bf16"),
        VaeFormat("fp16", "fp16"),
        VaeFormat("fp16-accumulate", "fp16", fp16_sums=True),
        VaeFormat("int8", "fp16", int8=True),
        VaeFormat("int8/fp32", "fp32", int8=True),
    )
}


def settle_vae(asked: VaePrecision, usual: Plain, device: str, stored_int8: bool) -> VaeFormat:
    """What a precision means for a VAE; `usual` is that of a plain one that nothing is asked of.

    `auto` keeps that, and int8 where the file has it. Beside int8 stands fp16 on a GPU, whose error
    is smaller than bf16's (docs/quality.md), and fp32 on a CPU. Raises UsageError.
    """
    if asked == "auto":
        asked = "int8" if stored_int8 else usual
    if asked == "int8" and device == "cpu":
        return VAE_FORMATS["int8/fp32"]
    if asked not in VAE_FORMATS or "/" in asked:
        choices = "auto, fp32, bf16, fp16, fp16-accumulate or int8"
        raise UsageError(f"VAE precision {asked!r} does not exist; choose {choices}")
    return VAE_FORMATS[asked]
