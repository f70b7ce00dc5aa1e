"""Cases of the watermark's op: sizes that blocks do not divide, clipping, and real frames."""

import torch
from torch import Tensor

from wanrt.kernels.cases import Case, Limit, Tensors

LIMITS = {"mark_frame": {torch.uint8: Limit(0, 0, "whole numbers")}}


def _case(label: str, height: int, width: int, size: str = "small", strided: bool = False) -> Case:
    rows, columns = -(-height // 8), -(-width // 8)

    def tensors() -> Tensors:
        frame = torch.randint(0, 256, (height, width * (1 + strided), 3), dtype=torch.uint8)
        pixels = torch.randint(-128, 129, (rows, 8, columns, 8, 1), dtype=torch.int16)
        pattern: Tensor = pixels.expand(-1, -1, -1, -1, 3).reshape(rows, 8, columns, 24)
        strength = torch.randint(0, 200, (rows, columns), dtype=torch.int16)
        return frame[:, : width * (1 + strided) : 1 + strided], pattern, strength

    return Case("mark_frame", label, tensors, dtypes=(torch.uint8,), size=size)


CASES = [
    _case("whole-blocks", 64, 96),
    _case("odd", 67, 93),
    _case("one-block", 3, 5),
    _case("strided", 65, 70, strided=True),
    _case("480p", 480, 832, "wan"),
    _case("720p", 720, 1280, "wan"),
]
