"""The identifier as 144 signs: CRC-16, then a tail-biting convolutional code with list decoding.

The code is the one of LTE's control channels (3GPP TS 36.212, 5.1.3.1): rate 1/3, memory 6,
generators 133, 171, 165 (octal).
"""

import binascii
from functools import cache

import numpy as np

ID_BITS = 32
MESSAGE_BITS = ID_BITS + 16
CODED_BITS = 3 * MESSAGE_BITS

_GENERATORS = (0o133, 0o171, 0o165)
_MEMORY = 6
_STATES = 1 << _MEMORY
_LIST = 32  # paths kept into each state


def message_bits(identifier: int) -> np.ndarray:
    """uint8 `[48]`: the identifier, most significant bit first, then its CRC-16.

    The CRC is that of CCITT (x^16 + x^12 + x^5 + 1, start 0xFFFF) over the four bytes, big-endian.
    """
    data = identifier.to_bytes(ID_BITS // 8, "big")
    checked = data + binascii.crc_hqx(data, 0xFFFF).to_bytes(2, "big")
    return np.unpackbits(np.frombuffer(checked, np.uint8))


def encode(identifier: int) -> np.ndarray:
    """Signs int8 `[144]`: +1 for a coded 0, -1 for a coded 1; the three of a bit side by side."""
    bits = message_bits(identifier)
    window = sum(np.roll(bits, lag).astype(np.int64) << (_MEMORY - lag) for lag in range(7))
    return np.stack([_sign(window & taps) for taps in _GENERATORS], 1).reshape(CODED_BITS)


def decode(soft: np.ndarray) -> int | None:
    """The likeliest identifier that the soft signs float `[144]` spell with a right checksum.

    None if none of the best paths (list Viterbi) closes its circle and has one.
    """
    paths, closed = _paths(soft)
    checked = set()
    for bits in paths[closed]:
        identifier = int.from_bytes(np.packbits(bits[:ID_BITS]).tobytes(), "big")
        if np.array_equal(message_bits(identifier), bits):
            checked.add(identifier)
    return max(checked, key=lambda one: float(soft @ encode(one)), default=None)


def best_path(soft: np.ndarray) -> np.ndarray:
    """uint8 `[48]`: the message of the most likely path, whatever its checksum."""
    return _paths(soft)[0][0]


def _paths(soft: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Messages uint8 `[2048, 48]`, the best 32 into each state, best first; which are circles.

    The trellis is a circle: a round before and one after say how likely its states are where it is
    cut. In the round between, 32 paths into each state are kept.
    """
    outputs, before = _trellis()
    gains = np.einsum("kg,nlg->knl", soft.reshape(MESSAGE_BITS, 3), outputs)  # [48, 64, 2]
    start, end = _rounds(gains, before)
    metric = np.full((_STATES, _LIST), -np.inf)
    metric[:, 0] = start
    choices = np.empty((MESSAGE_BITS, _STATES, _LIST), np.int64)
    for step, gain in enumerate(gains):
        both = (metric[before] + gain[:, :, None]).reshape(_STATES, 2 * _LIST)
        choices[step] = np.argpartition(-both, _LIST - 1, 1)[:, :_LIST]
        metric = np.take_along_axis(both, choices[step], 1)
    last = np.argsort(-(metric + end[:, None]).ravel(), kind="stable")
    state, place = last // _LIST, last % _LIST
    bits = np.empty((len(last), MESSAGE_BITS), np.uint8)
    for step in reversed(range(MESSAGE_BITS)):
        bits[:, step] = state >> (_MEMORY - 1)
        choice = choices[step, state, place]
        state, place = before[state, choice // _LIST], choice % _LIST
    return bits, state == last // _LIST


def _rounds(gains: np.ndarray, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each state `[64]`: the best way around to it, and from it onwards."""
    start, end = np.zeros(_STATES), np.zeros(_STATES)
    for gain in gains:
        start = (start[before] + gain).max(1)
    for gain in gains[::-1]:
        onwards = np.full(_STATES, -np.inf)
        np.maximum.at(onwards, before, end[:, None] + gain)
        end = onwards
    return start, end


@cache
def _trellis() -> tuple[np.ndarray, np.ndarray]:
    """Signs `[64, 2, 3]` put out on the way into each state, and the states `[64, 2]` before it.

    A state is the last six bits, the newest one highest.
    """
    states, lost = np.arange(_STATES)[:, None], np.arange(2)[None]
    window = (states << 1) | lost
    outputs = np.stack([_sign(window & taps) for taps in _GENERATORS], 2)
    return outputs.astype(np.float64), window & (_STATES - 1)


def _sign(words: np.ndarray) -> np.ndarray:
    """int8: +1 where the number of set bits is even, else -1."""
    return (1 - 2 * (np.bitwise_count(words) & 1).astype(np.int8)).astype(np.int8)
