"""The identifier as 144 signs: CRC-16, then a tail-biting convolutional code with soft decoding.

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
    """The identifier that the soft signs float `[144]` spell, None if the checksum disagrees."""
    bits = best_path(soft)
    identifier = int.from_bytes(np.packbits(bits[:ID_BITS]).tobytes(), "big")
    return identifier if np.array_equal(message_bits(identifier), bits) else None


def best_path(soft: np.ndarray) -> np.ndarray:
    """uint8 `[48]`: the message of the most likely path (Viterbi).

    The trellis is a circle; it is walked three times, and the middle round is read.
    """
    outputs, before = _trellis()
    gains = np.tile(np.einsum("kg,nlg->knl", soft.reshape(MESSAGE_BITS, 3), outputs), (3, 1, 1))
    metric = np.zeros(_STATES)
    choices = np.empty((len(gains), _STATES), np.int64)
    for step, gain in enumerate(gains):  # [64, 2]: into each state, from either predecessor
        both = metric[before] + gain
        choices[step] = both.argmax(1)
        metric = both.max(1)
    state, bits = int(metric.argmax()), np.empty(len(gains), np.uint8)
    for step in reversed(range(len(gains))):
        bits[step] = state >> (_MEMORY - 1)
        state = before[state, choices[step, state]]
    return bits[MESSAGE_BITS : 2 * MESSAGE_BITS]


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
