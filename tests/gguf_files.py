"""GGUF files for tests, written by the package `gguf`: blocks of models, and what they hold."""

from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

HALVES = {  # bytes at which a block of each format has its fp16 numbers
    **{"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,)},
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)},
}


def random_blocks(name: str, num_blocks: int, seed: int, size: float = 1e-4) -> np.ndarray:
    """uint8 [num_blocks, bytes]: random integers, fp16 numbers of about `size`."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (num_blocks, gguf.GGML_QUANT_SIZES[Type[name]][1]), np.uint8)
    for at in HALVES[name]:
        halves = rng.normal(0, size, (num_blocks, 1)).astype(np.float16)
        blocks[:, at : at + 2] = halves.view(np.uint8)
    return blocks


def plain(blocks: np.ndarray, name: str) -> np.ndarray:
    """What the package makes of them: fp32, one row for each of theirs."""
    return gguf.quants.dequantize(blocks, Type[name])


def write_gguf(
    path: Path,
    tensors: Mapping[str, Tensor],
    type_of: Callable[[str, Tensor], str],
    arch: str = "wan",
    **settings: object,
) -> dict[str, Tensor]:
    """Write tensors as the types that `type_of` names; -> the fp32 values that the file then holds.

    K formats, which the package does not quantise to, get random blocks.
    """
    writer = gguf.GGUFWriter(path, arch)
    for key, value in settings.items():
        add_setting(writer, key.replace("__", "."), value)
    held = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        kind, values = type_of(name, tensor), tensor.float().numpy()
        if kind.endswith("_K"):
            numel = gguf.GGML_QUANT_SIZES[Type[kind]][0]
            rows = random_blocks(kind, values.size // numel, i).reshape(values.shape[0], -1)
        else:
            rows = gguf.quants.quantize(values, Type[kind])
        writer.add_tensor(name, rows, raw_dtype=Type[kind])
        held[name] = torch.from_numpy(plain(rows, kind).copy()).view(tensor.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def add_setting(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)
