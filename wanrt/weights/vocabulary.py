"""The tokenizer of a model, wherever it lies."""

from wanrt.errors import FormatError
from wanrt.models.tokenizer import Tokenizer
from wanrt.weights.gguf_vocabulary import read_vocabulary
from wanrt.weights.load import read_spiece
from wanrt.weights.parts import Parts


def read_tokenizer(parts: Parts) -> Tokenizer:
    """From its own file, or from the text encoder's, where ComfyUI and llama.cpp embed it.

    Raises FormatError. A SentencePiece model takes most of a second.
    """
    if parts.tokenizer is not None and parts.vocabulary is not None:
        return Tokenizer.named(parts.tokenizer, parts.vocabulary)
    if parts.tokenizer is not None:
        return Tokenizer.load(parts.tokenizer)
    parts.require("umt5")
    assert parts.umt5 is not None
    vocabulary = read_vocabulary(parts.umt5)
    if vocabulary is not None:
        return Tokenizer.from_model(vocabulary, str(parts.umt5))
    spiece = read_spiece(parts.umt5)
    if spiece is None:
        raise FormatError(
            parts.umt5,
            "comes without a tokenizer",
            "put the model's tokenizer.json or spiece.model beside it",
        )
    return Tokenizer.from_spiece(spiece)
