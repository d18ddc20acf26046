"""A prompt or a reference that was seen is not computed again, and never mistaken for another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from flux2_studio.engine.text.encoder import EncodedPrompts
from flux2_studio.images.tensors import pixels_from_image
from flux2_studio.models.prompt_cache import LRUCache, PromptCache, ReferenceLatentCache
from flux2_studio.request import Request
from flux2_studio.studio import Studio
from tests.tiny import Toys


class CountingText:
    """Encodes a prompt as its length, and says for which prompts it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def encode(self, prompts: Sequence[str]) -> EncodedPrompts:
        self.asked.append(list(prompts))
        return EncodedPrompts(torch.tensor([[[float(len(p))]] for p in prompts]), tuple(len(p) // 10 for p in prompts))


class CountingAutoencoder:
    """Encodes a picture as its mean colour, and counts how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def encode(self, image: Image.Image) -> Tensor:
        self.calls += 1
        return pixels_from_image(image).mean((2, 3), keepdim=True)


def test_only_new_prompts_are_encoded_and_each_keeps_its_own() -> None:
    counting = CountingText()
    text = PromptCache()
    first = text.get_or_encode("klein", ["a fox", "a much longer prompt"], counting.encode)
    assert first.context.flatten().tolist() == [5.0, 20.0] and first.truncated_tokens == (0, 2)
    again = text.get_or_encode("klein", ["a much longer prompt", "an owl!", "a fox", "an owl!"], counting.encode)
    assert again.context.flatten().tolist() == [20.0, 7.0, 5.0, 7.0] and again.truncated_tokens == (2, 0, 0, 0)
    assert counting.asked == [["a fox", "a much longer prompt"], ["an owl!"]]
    text.get_or_encode("dev", ["a fox"], counting.encode)
    assert counting.asked[2:] == [["a fox"]], "another encoder reads the prompt itself"


def test_a_batch_larger_than_the_memory_is_still_answered() -> None:
    counting = CountingText()
    text = PromptCache(max_bytes=4)
    for _ in range(2):
        assert text.get_or_encode("klein", ["a", "bb", "ccc"], counting.encode).context.flatten().tolist() == [
            1.0,
            2.0,
            3.0,
        ]
    assert counting.asked == [["a", "bb", "ccc"], ["a", "bb"]], "the last one fits"


def test_references_are_told_apart_by_their_pixels() -> None:
    counting = CountingAutoencoder()
    references = ReferenceLatentCache()

    def encode(image: Image.Image, autoencoder: str = "klein's") -> Tensor:
        return references.get_or_encode(autoencoder, image, counting.encode)

    red, also_red = (Image.new("RGB", (32, 16), "red") for _ in range(2))
    assert encode(red).equal(encode(also_red))
    assert counting.calls == 1
    encode(Image.new("RGB", (16, 32), "red"))
    assert not encode(Image.new("RGB", (32, 16), "blue")).equal(encode(red))
    assert counting.calls == 3
    encode(red, "nano's")
    assert counting.calls == 4, "another autoencoder reads the picture itself"


def test_the_least_recently_used_leave_first() -> None:
    recent: LRUCache[str, str] = LRUCache(10)
    recent.put("a", "A", 4)
    recent.put("b", "B", 4)
    assert recent.get("a") == "A"
    recent.put("c", "C", 4)
    assert (recent.get("a"), recent.get("b"), recent.get("c")) == ("A", None, "C")
    recent.put("a", "A2", 6)
    assert (recent.get("a"), recent.get("c")) == ("A2", "C"), "replaced, not counted twice"
    recent.put("d", "D", 11)
    assert recent.get("d") is None and recent.get("a") == "A2", "what does not fit drives nothing else out"


@pytest.mark.parametrize("other", ["klein-9b-kv", "dev"])
def test_another_checkpoint_reads_the_prompt_itself(toys: Toys, tmp_path: Path, other: str) -> None:
    """Memories belong to a part: the same prompt through another text encoder has another width."""
    studio = Studio(toys.settings(tmp_path, ("klein-4b", other)))
    for name in ("klein-4b", other, "klein-4b"):
        steps = 2 if name == "dev" else None
        request = Request(prompt="a fox", checkpoint=name, width=64, height=64, steps=steps, seed=1)
        *_, last = studio.generate(request)
        assert type(last).__name__ == "Result"
