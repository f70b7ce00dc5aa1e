"""The vocabulary that llama.cpp's converters keep in the header of a umT5 GGUF file.

Source: llama.cpp `convert_hf_to_gguf.py` (T5Model.set_vocab): pieces, scores and types are those of
the SentencePiece model, with unused pieces up to the height of the token table.
"""

from pathlib import Path

import numpy as np

from wanrt.errors import FormatError
from wanrt.models import spiece
from wanrt.weights.gguf_file import GgufFile
from wanrt.weights.gguf_header import AGAIN

_UNUSED = 5  # of the piece types
_KEYS = "tokenizer.ggml."


def read_vocabulary(path: Path) -> spiece.SpieceModel | None:
    """None where the file has none. Raises FormatError for one that cannot be used."""
    if path.suffix != ".gguf":
        return None
    file = GgufFile(path)
    lists = {key: file.array(_KEYS + key) for key in ("tokens", "scores", "token_type")}
    if lists["tokens"] is None:
        return None
    model = file.settings.get(f"{_KEYS}model")
    if model != "t5":
        raise FormatError(path, f"its vocabulary is of kind {str(model)[:40]!r}, not 't5'", AGAIN)
    if any(items is None or len(items) != len(lists["tokens"]) for items in lists.values()):
        sizes = ", ".join(f"{0 if v is None else len(v)} {k}" for k, v in lists.items())
        raise FormatError(path, f"its vocabulary has {sizes}", AGAIN)
    texts, scores, kinds = lists.values()
    if not isinstance(texts, list) or isinstance(scores, list) or isinstance(kinds, list):
        raise FormatError(path, "its vocabulary is no list of texts, scores and types", AGAIN)
    rows = zip(texts, scores.tolist(), kinds.tolist(), strict=True)
    pieces = [spiece.Piece(*row) for row in rows]
    while pieces and pieces[-1].kind == _UNUSED:
        pieces.pop()
    try:
        return spiece.unigram(
            pieces,
            _bytes(file.array(f"{_KEYS}precompiled_charsmap")),
            bool(file.settings.get(f"{_KEYS}add_space_prefix", True)),
            bool(file.settings.get(f"{_KEYS}remove_extra_whitespaces", True)),
        )
    except ValueError as error:
        raise FormatError(path, f"its vocabulary: {error}", AGAIN) from None


def _bytes(items: list[str] | np.ndarray | None) -> bytes:
    if items is None:
        return b""
    if isinstance(items, list) or items.dtype.itemsize != 1:
        raise ValueError("a character map that is no list of bytes")
    return items.tobytes()
