"""Makes nano's `tokenizer.json`: a umT5 Unigram whose pieces are the words of nano's captions.

Words are counted, not learnt: the likeliest Unigram of so small a language has one piece per word,
and counting gives the same file on every run and machine (the trainer of `tokenizers` does not).
The printable ASCII characters follow with tiny probabilities, so that any such text is encodable.
A trained text encoder knows words by their ids: when the language changes, it must be trained anew.

Run: `python -m wanrt.nano.vocabulary`.
"""

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

SPECIAL = ("<pad>", "</s>", "<s>", "<unk>")  # ids 0 to 3, as in umT5
SPACE = "▁"
CHARACTERS = (SPACE, *map(chr, range(ord("!"), ord("~") + 1)))
CHARACTER_SHARE = 1e-4  # of the probability: a known word always beats its spelling
NORMALIZERS = (  # unlike umT5's, which has the last alone, these fold compatibility forms and case
    {"type": "Nmt"},
    {"type": "NFKC"},
    {"type": "Lowercase"},
    {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
)
PATH = Path(__file__).parent / "weights" / "tokenizer.json"


def captions() -> Iterable[str]:
    """Every caption of the language, each once: all scenes, with any attributes omitted."""
    from wanrt.nano.language import ATTRIBUTES, combinations

    omissions = [
        names for n in range(len(ATTRIBUTES) + 1) for names in itertools.combinations(ATTRIBUTES, n)
    ]
    return {scene.without(*names).caption() for scene in combinations() for names in omissions}


def pieces(texts: Iterable[str]) -> list[tuple[str, float]]:
    """(piece, log probability) in the order of their ids; the most frequent word comes first."""
    counts = Counter(word for text in texts for word in text.split())
    words = sorted(counts, key=lambda word: (-counts[word], word))
    total = math.log(counts.total())
    character = round(math.log(CHARACTER_SHARE / len(CHARACTERS)), 6)
    return [
        *((piece, 0.0) for piece in SPECIAL),
        *((SPACE + word, round(math.log(counts[word]) - total, 6)) for word in words),
        *((piece, character) for piece in CHARACTERS),
    ]


def tokenizer_json(vocab: list[tuple[str, float]]) -> str:
    """The text of a `tokenizer.json` of umT5's kind."""
    metaspace = {
        "type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": True,
    }  # fmt: skip
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {
                    "id": i, "content": piece, "single_word": False, "lstrip": False,
                    "rstrip": False, "normalized": False, "special": True,
                }
                for i, piece in enumerate(SPECIAL)
            ],
            "normalizer": {"type": "Sequence", "normalizers": NORMALIZERS},
            "pre_tokenizer": metaspace,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [first, end],
                "pair": [first, end, second, end],
                "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
            },
            "decoder": metaspace,
            "model": {"type": "Unigram", "unk_id": 3, "vocab": vocab, "byte_fallback": False},
        },
        ensure_ascii=False,
    )  # fmt: skip


def main() -> None:
    """Write the file that ships with nano's weights."""
    vocab = pieces(captions())
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(tokenizer_json(vocab) + "\n", encoding="utf-8")
    print(f"{PATH}: {len(vocab)} pieces")


if __name__ == "__main__":
    main()
