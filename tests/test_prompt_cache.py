"""A prompt that was encoded once loads no text encoder again, and nothing else is believed."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from wanrt import components, env
from wanrt.memory import prompt_cache
from wanrt.memory.prompt_cache import PromptCache, fingerprint
from wanrt.models.umt5 import Umt5Encoder

SETTINGS = {"width": 64, "height": 64, "num_frames": 5, "num_steps": 1, "seed": 3}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WANRT_CACHE", str(tmp_path))
    monkeypatch.setattr(components, "_WORTH_CACHING", 0)
    return tmp_path / "prompts"


def test_a_known_prompt_loads_no_text_encoder(
    folder: Path, zoo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = zoo.open("nano").generate("a red circle", **SETTINGS, output="latents")
    assert len(list(folder.iterdir())) == 2  # the prompt and the negative one
    assert folder.stat().st_mode & 0o077 == 0
    monkeypatch.setattr(Umt5Encoder, "__init__", None)  # not even built
    again = zoo.open("nano").generate("a red circle", **SETTINGS, output="latents")
    assert torch.equal(first, again)
    with pytest.raises(TypeError):
        zoo.open("nano").generate("a blue circle", **SETTINGS, output="latents")


def test_what_is_broken_or_of_another_encoder_is_not_believed(tmp_path: Path) -> None:
    encoder, other = tmp_path / "a.bin", tmp_path / "b.bin"
    encoder.write_bytes(os.urandom(300_000))
    changed = bytearray(encoder.read_bytes())
    changed[-1] ^= 1
    other.write_bytes(changed)
    ids, features = torch.tensor([[4, 9, 1]]), torch.randn(3, 8)
    cache = PromptCache(tmp_path / "cache", encoder, torch.bfloat16)
    assert cache.get(ids) is None
    cache.put(ids, features)
    assert torch.equal(cache.get(ids), features)
    assert cache.get(ids[:, :2]) is None
    assert PromptCache(tmp_path / "cache", other, torch.bfloat16).get(ids) is None
    assert PromptCache(tmp_path / "cache", encoder, torch.float32).get(ids) is None
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    assert cache.get(ids) is None


def test_the_oldest_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_cache, "MAX_FILES", 2)
    encoder = tmp_path / "a.bin"
    encoder.write_bytes(b"weights")
    cache = PromptCache(tmp_path / "cache", encoder, torch.float32)
    for i in range(3):
        cache.put(torch.tensor([[i]]), torch.full((1, 2), float(i)))
        path = cache._path(torch.tensor([[i]]))
        os.utime(path, (i, i))
    assert cache.get(torch.tensor([[0]])) is None
    assert cache.get(torch.tensor([[2]])) is not None


def test_a_sharded_encoder_has_the_fingerprint_of_its_largest_shard(tmp_path: Path) -> None:
    (tmp_path / "model.index.json").write_text("{}")
    (tmp_path / "large").write_bytes(b"x" * 10_000)
    assert fingerprint(tmp_path) == fingerprint(tmp_path / "large")
    assert fingerprint(tmp_path / "model.index.json") == fingerprint(tmp_path / "large")


def test_the_cache_can_be_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANRT_CACHE", "off")
    assert env.cache_folder() is None
    monkeypatch.delenv("WANRT_CACHE")
    assert env.cache_folder().name in ("wanrt", "cache")
