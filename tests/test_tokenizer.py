"""Cleaning, the umT5 tokenizer from each file format, hostile inputs, and nano's vocabulary."""

import io
import json
import random
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from wanrt.config import NANO, VIDEO_NEGATIVE
from wanrt.errors import FormatError, UsageError
from wanrt.models.prompt import MAX_PROMPT_BYTES
from wanrt.models.tokenizer import Tokenizer, clean
from wanrt.nano import language, vocabulary

UMT5_JSON = Path(__file__).resolve().parents[2] / "shared" / "data" / "umt5_tokenizer.json"
NANO_WEIGHTS = vocabulary.PATH.parent

PROMPTS = (
    "A cat walks on the grass, realistic",
    VIDEO_NEGATIVE,
    "family 👨‍👩‍👧‍👦 and flag 🏳️‍🌈",
    "مرحبا بالعالم",
    "naïve Ärger, ﬁnal — “quoted”",
    "x </s> y <extra_id_0> <unk>",
    "a" * 3000,
    "word " * 900,
    "",
    "\n\n \t",
)


@pytest.fixture(scope="module")
def umt5() -> Tokenizer:
    if not UMT5_JSON.is_file():
        pytest.skip("umT5's tokenizer.json is not beside this checkout")
    return Tokenizer.load(UMT5_JSON)


@pytest.fixture(scope="module")
def nano() -> Tokenizer:
    return Tokenizer.load(NANO_WEIGHTS)


CLEANED = {
    "  a\t b\n\nc ": "a b c",
    "\u3000x\u00a0y\u2003": "x y",
    "\n\n": "",
    "": "",
    "cafÃ©": "café",  # mojibake
    "ＡＢＣ，１２": "ABC,12",  # full-width forms
    "“curly” ‘quotes’": "\"curly\" 'quotes'",
    "ﬁnal": "final",
    "e\u0301": "é",
    "&lt;b&gt; &amp;amp;": "<b> &",
    "<i> &amp;lt;": "<i> <",  # twice, also where ftfy leaves HTML alone
    "&nbsp;a&#10;b&nbsp;": "a b",
    "\x1b[31mred": "red",  # terminal escapes
}


@pytest.mark.parametrize(("text", "expected"), CLEANED.items())
def test_clean(text: str, expected: str) -> None:
    assert clean(text) == expected


def test_umt5_known_ids(umt5: Tokenizer) -> None:
    ids, mask, truncated = umt5(["A cat walks on the grass, realistic", ""])
    assert ids[0].tolist() == [320, 6283, 14869, 281, 369, 312, 70279, 275, 124690, 1]
    assert ids[1].tolist() == [1] + [0] * 9
    assert mask.tolist() == [[1] * 10, [1] + [0] * 9]
    assert ids.dtype is mask.dtype is torch.int64
    assert truncated == ()
    assert umt5(["a" * 3000]).ids.shape == (1, 431)


def test_umt5_matches_transformers(umt5: Tokenizer) -> None:
    """The reference uses transformers on cleaned text; so do we here, with its own truncation."""
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(UMT5_JSON), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    for max_length in (512, 16):
        expected = theirs(
            [clean(text) for text in PROMPTS], padding=True, truncation=True,
            max_length=max_length, return_tensors="pt", add_special_tokens=True,
        )  # fmt: skip
        ids, mask, _ = umt5(PROMPTS, max_length)
        assert torch.equal(ids, expected["input_ids"])
        assert torch.equal(mask, expected["attention_mask"])


@pytest.mark.parametrize("text", [PROMPTS[0], VIDEO_NEGATIVE, PROMPTS[2], "مرحبا بالعالم", ""])
def test_umt5_round_trip(umt5: Tokenizer, text: str) -> None:
    ids, _, _ = umt5([text])
    assert umt5.decode(ids[0].tolist()) == clean(text)


def test_umt5_vocabulary_fits_the_embedding(umt5: Tokenizer) -> None:
    assert umt5.vocab_size == 256300


def test_truncation_keeps_the_end_token_and_is_reported(nano: Tokenizer) -> None:
    full = nano(["red " * 20]).ids[0].tolist()
    ids, mask, truncated = nano(["blue", "red " * 20, "red " * 7, "red " * 8], max_length=8)
    assert len(full) == 21
    assert ids[1:].tolist() == [full[:7] + [1]] * 3
    assert mask.sum(dim=1).tolist() == [2, 8, 8, 8]
    assert truncated == ((1, 21), (3, 9))


def test_empty_batch(nano: Tokenizer) -> None:
    ids, mask, truncated = nano([])
    assert ids.shape == mask.shape == (0, 0) and truncated == ()


REFUSED = {
    "surrogate": ("a \ud83d b", r"lone surrogate U\+D83D at character 2"),
    "nul": ("ab\0c", "NUL character at character 2"),
    "too-long": ("é" * (MAX_PROMPT_BYTES // 2) + "x", "65,537 bytes, the limit is 65,536"),
    "megabyte": ("x" * 10**6, "1,000,000 bytes"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_prompts(nano: Tokenizer, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        nano(["a red circle", text])


def test_longest_prompt_is_accepted(nano: Tokenizer) -> None:
    assert nano(["x" * MAX_PROMPT_BYTES]).truncated == ((0, MAX_PROMPT_BYTES + 2),)


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=200))
def test_any_text_is_encoded_or_refused(nano: Tokenizer, text: str) -> None:
    if "\0" in text:
        with pytest.raises(UsageError):
            nano([text])
    else:
        ids, mask, _ = nano([text])
        assert ids[0, -1] == 1 and bool(mask.all())
        assert int(ids.max()) < nano.vocab_size


WORDS = (
    "the cat walks on grass realistic a red circle moving left Ärger naïve 你好 世界 静态 细节 été "
    "ﬁnal １２ ok color, bright; slow. x-y"
).split()
NORMALISATIONS = ("nmt_nfkc", "identity", "nmt_nfkc_cf")
OPTIONS = {
    "default": {},
    "no-prefix": {"add_dummy_prefix": False},
    "keep-spaces": {"remove_extra_whitespaces": False},
    "user-symbols": {"user_defined_symbols": ["[web]", "[eod]"]},
}


def train_spiece(rule: str = "nmt_nfkc", **options: object) -> bytes:
    """A small SentencePiece model with umT5's special ids."""
    sentencepiece = pytest.importorskip("sentencepiece")
    choose = random.Random(0)
    lines = [" ".join(choose.choices(WORDS, k=8)) for _ in range(1500)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="unigram", vocab_size=400,
        hard_vocab_limit=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3, num_threads=1,
        normalization_rule_name=rule, minloglevel=2, **options,
    )  # fmt: skip
    return model.getvalue()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("rule", NORMALISATIONS)
def test_spiece_matches_sentencepiece(rule: str, options: dict[str, object]) -> None:
    data = train_spiece(rule, **options)
    sentencepiece = pytest.importorskip("sentencepiece")
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    ours = Tokenizer.from_spiece(data)
    choose = random.Random(1)
    texts = [" ".join(choose.choices(WORDS, k=6)) for _ in range(150)]
    texts += ["", "x", "zzz qqq ωψ 🦊🦊 a", "㌔ ① Å", "[web] a", "foo[eod]bar", "catwalkson"]
    texts += ["e\u0301te\u0301", "你好世界静态", "THE CAT", "!?", "the  cat"]
    if options.get("remove_extra_whitespaces", True):
        texts.append("\u200bthe\u200b \u200bcat\u200b")  # nmt rules turn these into spaces
    assert ours.vocab_size == theirs.vocab_size()
    for text in texts:
        assert ours([text]).ids[0].tolist() == [*theirs.encode(clean(text)), 1], text


def test_spiece_unknown_characters_follow_the_reference_not_the_byte_pieces() -> None:
    """The reference's tokenizer.json has byte fallback off, though the model file has it on."""
    tokenizer = Tokenizer.from_spiece(train_spiece(byte_fallback=True))
    assert tokenizer.vocab_size > 256
    ids = tokenizer(["cat 🦊 cat"]).ids[0].tolist()
    assert ids.count(3) == 1 and ids[0] == ids[-2]


def test_spiece_and_json_of_the_same_vocabulary_agree(tmp_path: Path) -> None:
    """What a ComfyUI file embeds and what the original directory holds give the same ids."""
    data = train_spiece("identity")
    ours = Tokenizer.from_spiece(data)
    sentencepiece = pytest.importorskip("sentencepiece")
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    vocab = [(theirs.id_to_piece(i), theirs.get_score(i)) for i in range(theirs.vocab_size())]
    (tmp_path / "tokenizer.json").write_text(vocabulary.tokenizer_json(vocab))
    (tmp_path / "spiece.model").write_bytes(b"tokenizer.json is preferred")
    from_json = Tokenizer.load(tmp_path)
    texts = ["the cat walks on grass", "x </s> y", "a <unk> b", "zzz 🦊", "你好 世界"]
    assert torch.equal(from_json(texts).ids, ours(texts).ids)


def test_loads_every_kind_of_path(tmp_path: Path) -> None:
    data = train_spiece()
    expected = Tokenizer.from_spiece(data)(["the cat"]).ids
    (tmp_path / "spiece.model").write_bytes(data)
    assert torch.equal(Tokenizer.load(tmp_path)(["the cat"]).ids, expected)
    assert torch.equal(Tokenizer.load(tmp_path / "spiece.model")(["the cat"]).ids, expected)
    nano_json = NANO_WEIGHTS / "tokenizer.json"
    by_bytes = Tokenizer.from_bytes(nano_json.read_bytes())
    assert torch.equal(by_bytes(["the cat"]).ids, Tokenizer.load(nano_json)(["the cat"]).ids)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="has neither tokenizer.json nor spiece.model"):
        Tokenizer.load(tmp_path)
    with pytest.raises(FormatError, match=r"absent\.json: cannot be read: No such file"):
        Tokenizer.load(tmp_path / "absent.json")


def test_damaged_spiece_is_refused_or_usable() -> None:
    """Random damage anywhere (the character map too) never ends in another exception."""
    data, choose = train_spiece("nmt_nfkc"), random.Random(2)
    refused = 0
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(choose.choice([1, 2, 20])):
            damaged[choose.randrange(choose.choice([3000, len(data)]))] = choose.randrange(256)
        if choose.random() < 0.2:
            del damaged[choose.randrange(len(data)) :]
        try:
            tokenizer = Tokenizer.from_spiece(bytes(damaged))
        except FormatError:
            refused += 1
        else:
            tokenizer(["é １２ ﬁnal 你好 ㌔ ① " + chr(choose.randrange(0x1000, 0xD000))])
    assert 100 < refused < 400


def varint(value: int) -> bytes:
    return bytes([value & 127 | 128]) + varint(value >> 7) if value > 127 else bytes([value])


def piece(text: bytes, score: bytes = bytes(4), kind: int = 1) -> bytes:
    """One vocabulary entry of the SentencePiece file format."""
    body = b"\x0a" + varint(len(text)) + text + b"\x15" + score + b"\x18" + bytes([kind])
    return b"\x0a" + varint(len(body)) + body


def charsmap(root: int, unit: int = 0, strings: bytes = b"\0") -> bytes:
    """A character map whose trie is one block: its root, a second unit, and zeros."""
    trie = struct.pack("<256I", root, unit, *[0] * 254)
    rules = struct.pack("<I", len(trie)) + trie + strings
    body = b"\x12" + varint(len(rules)) + rules
    return b"\x1a" + varint(len(body)) + body


PIECES = piece(b"<pad>", kind=3) + piece(b"</s>", kind=3) + piece(b"<s>", kind=3)
UNKNOWN = piece(b"<unk>", kind=2)
BAD_SPIECE = {
    "empty": (b"", "0 pieces of which 0 are unknown"),
    "no-unknown": (PIECES, "3 pieces of which 0 are unknown"),
    "two-unknown": (PIECES + UNKNOWN + piece(b"u", kind=2), "of which 2 are unknown"),
    "truncated": ((PIECES + UNKNOWN)[:-3], "longer than the data"),
    "huge-length": (b"\x0a\xff\xff\xff\xff\x7f", "longer than the data"),
    "endless-number": (b"\x0a" + b"\xff" * 20, "has no end"),
    "unknown-wire": (b"\x0b\x00", "unknown kind 3"),
    "not-utf8": (PIECES + UNKNOWN + piece(b"\xff\xfe"), "utf-8"),
    "nan-score": (PIECES + UNKNOWN + piece(b"a", b"\x00\x00\xc0\x7f"), "score nan"),
    "empty-piece": (PIECES + UNKNOWN + piece(b""), "piece ''"),
    "same-twice": (PIECES + UNKNOWN + piece(b"a") + piece(b"a"), "the same piece twice"),
    "bpe": (PIECES + UNKNOWN + b"\x12\x02\x18\x02", "model type is 2"),
    "map-size": (PIECES + UNKNOWN + b"\x1a\x06\x12\x04\xff\xff\xff\xff", "map of 4 bytes"),
    "map-root": (PIECES + UNKNOWN + charsmap(0xFFFFFFFF), "outside itself"),
    "map-unit": (PIECES + UNKNOWN + charsmap(0, 256 << 10), "outside itself"),
    "map-value": (PIECES + UNKNOWN + charsmap(1 << 8 | 1 << 10, 5), "outside its strings"),
    "map-middle": (
        PIECES + UNKNOWN + charsmap(1 << 8 | 1 << 10, 1, "é\0".encode()),
        "outside its strings",
    ),
    "map-utf8": (PIECES + UNKNOWN + charsmap(0, strings=b"\xff\0"), "utf-8"),
    "other-ids": (UNKNOWN + PIECES, "`</s>` has id 2, not 1"),
}


@pytest.mark.parametrize(("data", "message"), BAD_SPIECE.values(), ids=BAD_SPIECE)
def test_bad_spiece(data: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Tokenizer.from_spiece(data)


@pytest.mark.skipif(not UMT5_JSON.is_file(), reason="umT5's tokenizer.json is not here")
def test_umt5_pieces_as_spiece_give_the_same_ids() -> None:
    """30,000 true pieces in both forms: the JSON, and the file ComfyUI's text encoders embed."""
    umt5 = json.loads(UMT5_JSON.read_text(encoding="utf-8"))
    umt5["added_tokens"] = umt5["added_tokens"][:4]
    vocab = umt5["model"]["vocab"] = umt5["model"]["vocab"][:30000]
    types = {"<pad>": 3, "</s>": 3, "<s>": 3, "<unk>": 2}
    ours = Tokenizer.from_spiece(
        b"".join(piece(t.encode(), struct.pack("<f", s), types.get(t, 1)) for t, s in vocab)
    )
    theirs = Tokenizer.from_bytes(json.dumps(umt5).encode())
    assert torch.equal(ours(PROMPTS).ids, theirs(PROMPTS).ids)


@pytest.mark.parametrize("rules", [b"", charsmap(0)], ids=["no-map", "empty-map"])
def test_smallest_spiece_is_good(rules: bytes) -> None:
    """What the cases above damage does make a tokenizer when left alone."""
    a = piece("▁a".encode(), b"\x00\x00\x80\xbf")
    tokenizer = Tokenizer.from_spiece(PIECES + UNKNOWN + a + rules)
    assert tokenizer(["a b a"]).ids.tolist() == [[4, 3, 4, 1]]


NANO_JSON = json.loads((NANO_WEIGHTS / "tokenizer.json").read_text(encoding="utf-8"))
BAD_JSON = {
    "empty": b"",
    "garbage": b"\xff\xfe\x00",
    "list": b"[]",
    "no-model": b"{}",
    "other-vocabulary": b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}',
    "no-unknown-id": json.dumps(
        NANO_JSON | {"model": NANO_JSON["model"] | {"unk_id": None}}
    ).encode(),
    "unknown-outside": json.dumps(
        NANO_JSON | {"model": NANO_JSON["model"] | {"unk_id": 999}}
    ).encode(),
}


@pytest.mark.parametrize("data", BAD_JSON.values(), ids=BAD_JSON)
def test_bad_json(data: bytes) -> None:
    with pytest.raises(FormatError, match=r"^some\.json: "):
        Tokenizer.from_bytes(data, source="some.json")


def test_nano_vocabulary_is_the_one_its_language_makes() -> None:
    """The shipped file is reproduced byte for byte; retrain nano when this has to change."""
    made = vocabulary.tokenizer_json(vocabulary.pieces(vocabulary.captions()))
    assert (NANO_WEIGHTS / "tokenizer.json").read_text(encoding="utf-8") == made + "\n"


def test_nano_has_one_piece_per_word(nano: Tokenizer) -> None:
    assert nano.vocab_size <= NANO.umt5.vocab_size
    words = {word for caption in vocabulary.captions() for word in caption.split()}
    assert words >= {*language.COLORS, *language.SHAPES, *language.DIRECTIONS, *language.SIZES}
    assert words >= {*language.BACKGROUNDS, "bouncing", "background"}
    for word in words:
        assert nano([word]).ids.shape == (1, 2), word
    caption = "a small red circle moving left on a navy background"
    assert nano([caption]).ids.shape == (1, len(caption.split()) + 1)
    assert torch.equal(nano([caption]).ids, nano([caption.upper()]).ids)


@settings(max_examples=150, deadline=None)
@given(text=st.text([chr(i) for i in range(32, 127) if chr(i) not in "<&"], max_size=60))
def test_nano_encodes_any_ascii(nano: Tokenizer, text: str) -> None:
    """Without `<` and `&`, which may spell a control piece or an HTML entity."""
    ids = nano([text]).ids[0].tolist()
    assert 3 not in ids
    assert nano.decode(ids) == clean(text).lower()


def test_nano_matches_transformers(nano: Tokenizer) -> None:
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(NANO_WEIGHTS / "tokenizer.json"), pad_token="<pad>", eos_token="</s>"
    )
    captions = [scene.caption() for scene in language.held_out_prompts(20)] + ["", "odd Words!"]
    expected = theirs(captions, padding=True, return_tensors="pt")
    ids, mask, _ = nano(captions)
    assert torch.equal(ids, expected["input_ids"])
    assert torch.equal(mask, expected["attention_mask"])
