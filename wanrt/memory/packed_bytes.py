"""Bytes of a part whose matrices stay as a GGUF file packs them, while its blocks stream."""

from dataclasses import dataclass

_SCRATCH = 16 << 20  # bytes that unpacking takes beside its result, `quant/gguf_blocks.py`


@dataclass(frozen=True)
class PackedWeights:
    """As they lie in the buffers of the ring; matrices differ in their formats, so each is counted.

    matrices: whether blocks have packed ones. table: the largest of the others that is unpacked as
    a whole.
    """

    visits: tuple[int, ...]  # of the blocks, in the order of a pass
    texts: int  # the most that makes keys and values of a text, for one block; transformers have it
    rest: int
    matrices: bool
    table: int

    @property
    def scratch(self) -> int:
        """While a matrix is unpacked."""
        return _SCRATCH if self.matrices or self.table else 0
