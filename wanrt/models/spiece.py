"""Reads a SentencePiece Unigram model (`spiece.model`) without protobuf, every length checked.

Source: google/sentencepiece `src/sentencepiece_model.proto` (field numbers, piece types, defaults)
and `src/normalizer.cc` (layout of the character map, a darts-clone trie and its strings).
"""

import math
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Piece(NamedTuple):
    """One vocabulary entry: its text, log probability and type."""

    text: str
    score: float
    kind: int


class SpieceModel(NamedTuple):
    """What a Unigram tokenizer is made of."""

    pieces: list[tuple[str, float]]  # (text, log probability), the index is the id
    unk_id: int
    special: list[str]  # control pieces and the unknown piece
    charsmap: bytes  # compiled normalisation rules; empty for none
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


# A field is a tag (number << 3 | wire type) and a value; the wire type says how long that is.
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5
_PIECE, _TRAINER, _NORMALIZER = 1 << 3 | _BYTES, 2 << 3 | _BYTES, 3 << 3 | _BYTES
_TEXT, _SCORE, _TYPE = 1 << 3 | _BYTES, 2 << 3 | _FOUR_BYTES, 3 << 3 | _VARINT
_MODEL_TYPE = 3 << 3 | _VARINT
_CHARSMAP = 2 << 3 | _BYTES
_ADD_DUMMY_PREFIX, _REMOVE_EXTRA_WHITESPACES = 3 << 3 | _VARINT, 4 << 3 | _VARINT

_UNIGRAM = 1  # of the model types
_NORMAL, _UNKNOWN, _CONTROL = 1, 2, 3  # of the piece types


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The value that starts at byte `at`, and the byte after it."""
    value = shift = 0
    for byte in data[at : at + 10]:
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError(f"a number before byte {at} has no end")


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(tag, value) of each field of a message; four and eight bytes come as they are."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield tag, value
            continue
        if wire == _BYTES:
            size, at = _varint(data, at)
        elif wire in (_FOUR_BYTES, _EIGHT_BYTES):
            size = 4 if wire == _FOUR_BYTES else 8
        else:
            raise ValueError(f"field of unknown kind {wire} before byte {at}")
        if size > len(data) - at:
            raise ValueError(f"a field of {size} bytes at byte {at} is longer than the data")
        yield tag, data[at : at + size]
        at += size


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    text = fields.get(_TEXT, b"").decode()
    (score,) = struct.unpack("<f", fields.get(_SCORE, bytes(4)))
    return Piece(text, score, fields.get(_TYPE, _NORMAL))


def _check_charsmap(charsmap: bytes) -> None:
    """Refuse a map whose trie points outside itself or outside its strings.

    Layout: byte size of the trie, the trie (uint32 units), the replacement strings. A unit holds an
    offset that is xored with its own index and then with a byte: inside one block of 256 units.
    """
    size = int.from_bytes(charsmap[:4], "little")
    strings = np.frombuffer(charsmap[4 + size :], np.uint8)
    if not size or size % 1024 or not len(strings) or strings[-1] != 0:
        raise ValueError(f"character map of {len(charsmap)} bytes with a trie of {size}")
    strings.tobytes().decode()
    units = np.frombuffer(charsmap, "<u4", size // 4, 4).astype(np.int64)
    target = np.arange(len(units)) ^ (units >> 10 << (units >> 6 & 8))
    inner = units < 1 << 31  # the others hold values
    inner[0] = True  # the root, where every look-up starts
    if (target[inner] >= len(units)).any():
        raise ValueError("character map whose trie points outside itself")
    value = units[target[inner & (units >> 8 & 1 == 1)]] & 0x7FFFFFFF
    if (value >= len(strings)).any() or (strings[value] & 0xC0 == 0x80).any():
        raise ValueError("character map whose trie points outside its strings")


def parse(data: bytes) -> SpieceModel:
    """Read a serialised SentencePiece model; ValueError says what is wrong with it.

    Which id is unknown is told by the type of its piece. Byte and unused pieces stay in the
    vocabulary, so that ids are positions in the file.
    """
    pieces: list[Piece] = []
    trainer, normalizer = {}, {}
    for tag, value in _fields(data):
        if tag == _PIECE:
            pieces.append(_piece(value))
        elif tag == _TRAINER:
            trainer = dict(_fields(value))
        elif tag == _NORMALIZER:
            normalizer = dict(_fields(value))
    model_type = trainer.get(_MODEL_TYPE, _UNIGRAM)
    if model_type != _UNIGRAM:
        raise ValueError(f"model type is {model_type}, not {_UNIGRAM} (Unigram)")
    return unigram(
        pieces,
        normalizer.get(_CHARSMAP, b""),
        bool(normalizer.get(_ADD_DUMMY_PREFIX, True)),
        bool(normalizer.get(_REMOVE_EXTRA_WHITESPACES, True)),
    )


def unigram(
    pieces: Sequence[Piece], charsmap: bytes, add_dummy_prefix: bool, remove_extra_whitespaces: bool
) -> SpieceModel:
    """Of a vocabulary, wherever it was stored; ValueError says what is wrong with it."""
    unknown = [i for i, piece in enumerate(pieces) if piece.kind == _UNKNOWN]
    if len(unknown) != 1:
        raise ValueError(f"{len(pieces)} pieces of which {len(unknown)} are unknown, not one")
    if len({piece.text for piece in pieces}) != len(pieces):
        raise ValueError("the same piece twice")
    wrong = next((p for p in pieces if not p.text or not math.isfinite(p.score)), None)
    if wrong is not None:
        raise ValueError(f"piece {wrong.text!r} has score {wrong.score}")
    if charsmap:
        _check_charsmap(charsmap)
    return SpieceModel(
        pieces=[(piece.text, piece.score) for piece in pieces],
        unk_id=unknown[0],
        special=[piece.text for piece in pieces if piece.kind in (_UNKNOWN, _CONTROL)],
        charsmap=charsmap,
        add_dummy_prefix=add_dummy_prefix,
        remove_extra_whitespaces=remove_extra_whitespaces,
    )
