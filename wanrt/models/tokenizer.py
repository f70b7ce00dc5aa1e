"""Prompts to umT5 token ids: the reference's cleaning, and a Unigram model from either file format.

Ids: pad 0, `</s>` 1 (appended), `<s>` 2 (unused), `<unk>` 3. A character outside the vocabulary is
`<unk>`: the reference's tokenizer.json ignores the byte pieces that the SentencePiece file has.

Source: Wan2.1 @9737cba `wan/modules/tokenizers.py`.
"""

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import ftfy
import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from wanrt.errors import FormatError
from wanrt.models import spiece
from wanrt.models.prompt import check_prompt

PAD, EOS = 0, 1
NOT_A_CHARACTER = "\U0010ffff"  # in no vocabulary


def clean(text: str) -> str:
    """Repair mojibake and full-width forms (ftfy), unescape HTML twice, collapse white space."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


class Truncation(NamedTuple):
    """A text that was cut: its index in the batch and how many tokens it had, `</s>` included."""

    index: int
    num_tokens: int


class Tokens(NamedTuple):
    """ids and mask [B, n] int64, padded to the longest text; mask is 1 at tokens."""

    ids: Tensor
    mask: Tensor
    truncated: tuple[Truncation, ...]


class Tokenizer:
    """umT5's tokenizer, wherever its vocabulary comes from."""

    def __init__(self, model: tokenizers.Tokenizer, source: str) -> None:
        eos = model.token_to_id("</s>")
        if eos != EOS:
            raise FormatError(source, f"not a umT5 vocabulary: `</s>` has id {eos}, not {EOS}")
        model.no_padding()
        model.no_truncation()
        try:
            model.encode(NOT_A_CHARACTER)
        except Exception as error:  # what the library raises when `unk_id` is missing
            raise FormatError(source, f"cannot encode unknown characters: {error}") from None
        self._model = model

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "tokenizer.json") -> "Tokenizer":
        """From the text of a `tokenizer.json`."""
        try:
            model = tokenizers.Tokenizer.from_buffer(data)
        except ValueError as error:
            raise FormatError(source, f"not a tokenizer.json: {error}") from None
        return cls(model, source)

    @classmethod
    def from_spiece(cls, data: bytes, source: str = "spiece_model") -> "Tokenizer":
        """From a SentencePiece Unigram model, which ComfyUI embeds in its text-encoder files."""
        try:
            model = spiece.parse(data)
        except ValueError as error:
            raise FormatError(source, f"not a SentencePiece Unigram model: {error}") from None
        return cls.from_model(model, source)

    @classmethod
    def from_model(cls, model: spiece.SpieceModel, source: str) -> "Tokenizer":
        """From a Unigram model that was read already."""
        return cls(_build(model), source)

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """From a `tokenizer.json`, or a SentencePiece file named `*.model`."""
        path = Path(path)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise FormatError(path, f"cannot be read: {error.strerror}") from None
        return cls.named(path, data)

    @classmethod
    def named(cls, path: Path, data: bytes) -> "Tokenizer":
        """Of what a file with such a name holds."""
        build = cls.from_spiece if path.suffix == ".model" else cls.from_bytes
        return build(data, str(path))

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """From a file, or a directory that has `tokenizer.json` (preferred) or `spiece.model`."""
        path = Path(path)
        if not path.is_dir():
            return cls.from_file(path)
        names = ("tokenizer.json", "spiece.model")
        found = next((path / name for name in names if (path / name).is_file()), None)
        if found is None:
            raise FormatError(path, f"has neither {names[0]} nor {names[1]}")
        return cls.from_file(found)

    @property
    def vocab_size(self) -> int:
        """Rows that the token embedding must have at least."""
        return self._model.get_vocab_size()

    def __call__(self, texts: Sequence[str], max_length: int = 512) -> Tokens:
        """Clean and encode; each text keeps at most `max_length` ids, of which the last is EOS.

        Raises UsageError for a text that `check_prompt` refuses.
        """
        assert not isinstance(texts, str) and max_length >= 1, f"{texts=} {max_length=}"
        for text in texts:
            check_prompt(text)
        rows = [self._model.encode(clean(text), add_special_tokens=False).ids for text in texts]
        truncated = tuple(
            Truncation(i, len(row) + 1) for i, row in enumerate(rows) if len(row) >= max_length
        )
        rows = [[*row[: max_length - 1], EOS] for row in rows]
        n = max(map(len, rows), default=0)
        ids = [row + [PAD] * (n - len(row)) for row in rows]
        mask = [[1] * len(row) + [0] * (n - len(row)) for row in rows]
        shape = (len(rows), n)
        return Tokens(
            torch.tensor(ids, dtype=torch.int64).view(shape),
            torch.tensor(mask, dtype=torch.int64).view(shape),
            truncated,
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of one row of ids, without pads and `</s>`."""
        return self._model.decode(list(ids), skip_special_tokens=True)


def _build(model: spiece.SpieceModel) -> tokenizers.Tokenizer:
    """The reference's steps around a SentencePiece vocabulary.

    As in its tokenizer.json: control pieces spelt out in a prompt become their ids, and text is not
    stripped (`clean` did), unless a character map could have made new white space at its ends.
    """
    built = tokenizers.Tokenizer(
        models.Unigram(model.pieces, unk_id=model.unk_id, byte_fallback=False)
    )
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if model.remove_extra_whitespaces and model.charsmap:
        steps.append(normalizers.Strip())
    built.normalizer = normalizers.Sequence(steps)
    prefix = "always" if model.add_dummy_prefix else "never"
    built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix)
    built.decoder = decoders.Metaspace(prepend_scheme=prefix)
    built.add_special_tokens(
        [AddedToken(piece, special=True, normalized=False) for piece in model.special]
    )
    return built
