"""What every op is tried with: inputs, the dtypes they come in, and how near results must be.

`small` cases have odd sizes, edges and awkward layouts and run everywhere, in Triton's interpreter
too. `wan` cases have the shapes of the released models: the compile gate draws them on the meta
device, a GPU draws and runs them. Other families: `cases_*.py`; `all_cases` has them all.
"""

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wanrt.kernels.reference import LARGEST, Quantized, quantize
from wanrt.kernels.reference_vae import QuantizedConv

EPS = 1e-6
FAMILIES = (
    "cases",
    "cases_attention",
    "cases_conv",
    "cases_conv_int8",
    "cases_linear",
    "cases_watermark",
)

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
Drawn = tuple[Any, ...]  # Tensor, Quantized, QuantizedConv or None


class Rows(NamedTuple):
    """fp32 rows that an op is handed as `Quantized`, with one scale for each `group` of columns.

    small: fp8 numbers a 2^8th as large as they could be, and said to be (`fp8_sums.py`).
    """

    values: Tensor
    group: int | None = None
    small: bool = False


Tensors = tuple[Tensor | Rows | QuantizedConv | None, ...]


class Limit(NamedTuple):
    """|actual - expected| <= relative * |expected| + absolute * max|expected|, and why."""

    relative: float
    absolute: float
    reason: str


class Case(NamedTuple):
    """One call of an op: its tensors, drawn in fp32, and its other arguments.

    The first `activations` tensors are cast to each of `dtypes` in turn (`Rows` quantised, whole
    numbers left as they are).
    """

    op: str
    label: str
    tensors: Callable[[], Tensors]
    kwargs: dict[str, Any] = {}
    activations: int = 1
    dtypes: tuple[torch.dtype, ...] = (FP32, BF16, FP16)
    size: str = "small"
    limit: Limit | None = None  # where it is not that of the op
    flop: Callable[..., int] | None = None  # of the tensors; what counts, not what a kernel does

    @property
    def id(self) -> str:
        return f"{self.op}-{self.label}"

    @property
    def result(self) -> torch.dtype | None:
        """The dtype asked for, where an op is asked for one."""
        return self.kwargs.get("dtype")

    def draw(self, dtype: torch.dtype, device: str = "cpu") -> Drawn:
        """The same values in every process; of `small` cases on every device, too.

        `wan` cases are drawn where they are wanted: one may have a billion numbers.
        """
        if device != "meta":
            torch.manual_seed(sum(self.id.encode()))
        with torch.device(device if device == "meta" or self.size == "wan" else "cpu"):
            return self._cast(self.tensors(), dtype, device)

    def _cast(self, tensors: Tensors, dtype: torch.dtype, device: str) -> Drawn:
        dtypes = (dtype if i < self.activations else None for i in range(len(tensors)))
        return tuple(_as_input(x, d, device) for x, d in zip(tensors, dtypes, strict=True))


def to(x: Any, device: str) -> Any:
    """A drawn input on another device, in its own layout."""
    if isinstance(x, tuple):
        return type(x)(
            *(_copy(part, None, device) if isinstance(part, Tensor) else part for part in x)
        )
    return None if x is None else _copy(x, None, device)


def _as_input(x: Any, dtype: torch.dtype | None, device: str) -> Any:
    if isinstance(x, Rows):
        assert dtype is not None
        rows = quantize(x.values, dtype, x.group)
        return to(_small(rows) if x.small else rows, device)
    if x is None or isinstance(x, tuple):
        return to(x, device)
    return _copy(x, dtype if x.is_floating_point() else None, device)


def _small(x: Quantized) -> Quantized:
    values, dtype = x.values.float() / 256, x.values.dtype
    return Quantized(values.to(dtype), x.scale * 256, LARGEST[dtype] / 256)


def _copy(x: Tensor, dtype: torch.dtype | None, device: str) -> Tensor:
    """x in another dtype or place, in its own layout: `to` closes the gaps of a view."""
    stored = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    stored = stored.to(device, dtype or x.dtype)
    return stored.as_strided(x.shape, x.stride(), x.storage_offset())


# One unit in the last place of the result: the same fp32 value, rounded once, may fall to either
# neighbour when sums were taken in another order.
_ONE_ULP = "sums in another order, then one rounding"
ROUNDING = {
    FP32: Limit(2e-6, 2e-6, _ONE_ULP),
    BF16: Limit(2**-7, 1e-6, _ONE_ULP),
    FP16: Limit(2**-10, 1e-6, _ONE_ULP),
}
LIMITS: dict[str, dict[torch.dtype, Limit]] = dict.fromkeys(
    (
        "layer_norm",
        "layer_norm_modulate",
        "gated_residual",
        "rms_norm",
        "gelu",
        "rms_norm_channels",
    ),
    ROUNDING,
)
_TURNED = "the normalised value is rounded before a rotation in which it may cancel"
LIMITS["rms_norm_rope"] = {
    FP32: Limit(2e-6, 2e-6, _ONE_ULP),
    BF16: Limit(2**-7, 2**-8, _TURNED),
    FP16: Limit(2**-10, 2**-11, _TURNED),
}
_STEP = "one quantisation step where the normalised value lies between two"
LIMITS["layer_norm_modulate_quantize"] = {
    FP32: Limit(2**-3, 1 / 127, _STEP),
    BF16: Limit(2**-3, 1 / 127, _STEP),
    FP16: Limit(2**-3, 1 / 127, _STEP),
}
# fp16 rounds each term by a 2^-12th, 128 of them change the largest by no more than its 2^-8th.
TURNED = Limit(2**-3, (1 + 2**-8) / 127, "one quantisation step, rotated in fp16 with its row")


def normal(*shape: int) -> Tensor:
    return torch.randn(shape)


def strided(*shape: int) -> Tensor:
    """Normal values in a layout that is dense in no dimension but the last."""
    return torch.randn(*shape[:-2], shape[-2] * 2, shape[-1] + 3)[..., ::2, : shape[-1]]


def freqs(tokens: int, pairs: int) -> Tensor:
    """Rotations by any angle, `[tokens, pairs, 2]`."""
    angles = torch.rand(tokens, pairs) * 6.3
    return torch.stack((angles.cos(), angles.sin()), -1)


def heavy_tailed(*shape: int) -> Tensor:
    """Activations as transformers have them: Student-t (nu = 4), 0.5 % of the channels x60."""
    normal, chi = torch.randn(shape), torch.randn(4, *shape).square().sum(0)
    x = normal * (chi / 4).rsqrt()
    outliers = torch.rand(shape[-1]) < 0.005
    return torch.where(outliers, 60 * x, x)


_ROWS = {"eps": EPS}
_ROPE = {"num_heads": 3, "eps": EPS}


def _norms(b: int, length: int, width: int, per_token: bool = False) -> Callable[[], Tensors]:
    rows = length if per_token else 1
    return lambda: (normal(b, length, width), normal(b, rows, width), normal(b, rows, width))


def _wan(width: int, length: int) -> list[Case]:
    """Every norm of a block at the width of a released model."""
    heads = {"num_heads": width // 128, "eps": EPS}
    label = f"{width}x{length}"
    stream = dict(dtypes=(FP32,), size="wan")
    modulated = _norms(1, length, width)
    return [
        Case("layer_norm_modulate", label, modulated, _ROWS | {"dtype": BF16}, **stream),
        *(
            Case("layer_norm_modulate_quantize", f"{label}-{name}", modulated,
                 _ROWS | {"dtype": dtype, "hadamard": "hadamard" in name}, **stream)
            for name, dtype in (
                ("int8", torch.int8),
                ("int8-hadamard", torch.int8),
                ("fp8-hadamard", torch.float8_e4m3fn),
            )
        ),
        Case(
            "layer_norm",
            label,
            lambda: (normal(1, length, width), normal(width), normal(width)),
            _ROWS | {"dtype": BF16},
            **stream,
        ),
        Case(
            "rms_norm_rope",
            label,
            lambda: (normal(1, length, width), normal(width), freqs(length, 64)),
            heads,
            dtypes=(BF16,),
            size="wan",
        ),
        Case(
            "rms_norm",
            label,
            lambda: (normal(1, length, width), normal(width)),
            _ROWS,
            dtypes=(BF16,),
            size="wan",
        ),
        Case(
            "gated_residual",
            label,
            lambda: (normal(1, length, width), normal(1, length, width), normal(1, 1, width)),
            dtypes=(FP32,),
            size="wan",
        ),
    ]  # fmt: skip


CASES = [
    Case("layer_norm", "odd", lambda: (normal(2, 7, 384), normal(384), normal(384)), _ROWS),
    Case("layer_norm", "strided", lambda: (strided(2, 7, 130), normal(130), normal(130)), _ROWS),
    Case("layer_norm", "two-axes", lambda: (normal(9, 130), normal(130), normal(130)), _ROWS),
    Case("layer_norm_modulate", "one-sample", _norms(1, 63, 256), _ROWS),
    Case("layer_norm_modulate", "two-samples", _norms(2, 63, 256), _ROWS),
    Case("layer_norm_modulate", "one-token", _norms(2, 1, 256), _ROWS),
    Case(
        "layer_norm_modulate",
        "per-token",
        lambda: (strided(2, 9, 130), normal(2, 9, 130), strided(2, 9, 130)),
        _ROWS,
    ),
    *(
        Case(
            "layer_norm_modulate_quantize",
            f"{label}-{name}",
            _norms(2, length, 130, label == "per-token"),
            _ROWS | {"dtype": dtype},
        )
        for label, length in (("per-sample", 63), ("per-token", 9))
        for name, dtype in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn))
    ),
    *(
        Case("layer_norm_modulate_quantize", f"hadamard-{width}-{name}",
             _norms(2, length, width, length == 9), _ROWS | {"dtype": dtype, "hadamard": True},
             limit=TURNED)
        for width, length, name, dtype in (
            (384, 63, "int8", torch.int8),
            (1536, 9, "fp8", torch.float8_e4m3fn),
        )
    ),
    Case("layer_norm_modulate_quantize", "zeros", lambda: (torch.zeros(1, 3, 130),) * 3,
         _ROWS | {"dtype": torch.int8}),
    Case(
        "gated_residual",
        "per-sample",
        lambda: (normal(2, 63, 130), normal(2, 63, 130), normal(2, 1, 130)),
        activations=2,
    ),
    Case(
        "gated_residual",
        "per-token",
        lambda: (normal(2, 9, 130), strided(2, 9, 130), normal(2, 9, 130)),
        activations=2,
    ),
    Case("rms_norm", "odd", lambda: (normal(2, 63, 384), normal(384)), _ROWS),
    Case("rms_norm", "strided", lambda: (strided(2, 63, 130), normal(130)), _ROWS),
    Case(
        "rms_norm_rope",
        "odd",
        lambda: (normal(2, 63, 384), normal(384), freqs(63, 64)),
        _ROPE,
    ),
    Case(
        "rms_norm_rope",
        "one-token",
        lambda: (normal(1, 1, 384), normal(384), freqs(1, 64)),
        _ROPE,
    ),
    Case("rms_norm_rope", "strided", lambda: (strided(2, 5, 36), normal(36), freqs(5, 6)), _ROPE),
    Case("gelu", "tanh", lambda: (normal(2, 9, 333) * 3,), {"approximate": "tanh"}),
    Case("gelu", "erf", lambda: (strided(2, 9, 333) * 3,), {"approximate": "none"}),
    *_wan(1536, 32760),
    *_wan(5120, 32760),
]  # fmt: skip


@cache
def all_cases() -> dict[str, Case]:
    """Every family's cases by their id, which no two may share: one of them would never run."""
    modules = [importlib.import_module(f"wanrt.kernels.{name}") for name in FAMILIES]
    cases = [case for module in modules for case in module.CASES]
    found = {case.id: case for case in cases}
    assert len(found) == len(cases), sorted(c.id for c in cases if found[c.id] is not c)
    return found


def dtypes_of(op: str) -> tuple[torch.dtype, ...]:
    """What activations an op takes: integers and fp8 for products of eight-bit values."""
    return tuple(dict.fromkeys(d for c in all_cases().values() if c.op == op for d in c.dtypes))


@cache
def limits() -> dict[str, dict[torch.dtype, Limit]]:
    """How near each op must come, by dtype of the activations."""
    modules = [importlib.import_module(f"wanrt.kernels.{name}") for name in FAMILIES]
    return {op: rows for module in modules for op, rows in module.LIMITS.items()}
