"""Sizes of known models: at full scale they are what was published, at smaller ones they have as many visual tokens."""

from __future__ import annotations

import pytest
import torch

from vlprune.bench import sizes
from vlprune.errors import VLPruneError

PARAMETERS = {
    "llava-1.5-7b": 7.06e9,
    "llava-1.5-13b": 13.35e9,
    "llava-next-7b": 7.06e9,
    "llava-next-13b": 13.35e9,
    "llava-next-mistral-7b": 7.57e9,
    "qwen2.5-vl-3b": 3.75e9,
    "qwen2.5-vl-7b": 8.29e9,
    "qwen3-vl-8b": 8.77e9,
}
"""As the models' pages on the hub tell."""


def test_every_known_size_is_checked():
    assert set(PARAMETERS) == set(sizes.KNOWN)


@pytest.mark.parametrize("like", PARAMETERS)
def test_full_sizes_have_the_published_number_of_parameters(like: str):
    model = sizes.size_of(like).build(torch.device("meta"), torch.bfloat16, "sdpa")
    count = sum({id(p): p.numel() for p in model.parameters()}.values())
    assert count == pytest.approx(PARAMETERS[like], rel=0.005)


def test_small_is_narrower_and_shallower_and_sees_the_same_image():
    whole, small = sizes.size_of("llava-next-7b"), sizes.size_of("llava-next-small")
    assert small.image == whole.image == (672, 672)
    assert small.config().text_config.num_hidden_layers == 8
    assert small.config().text_config.hidden_size == 512
    assert small.config().vision_config.patch_size == whole.config().vision_config.patch_size


def test_scales_can_be_written_as_divisors():
    config = sizes.size_of("llava-1.5-7b", "16x8").config()
    assert config.text_config.num_hidden_layers == 4
    assert config.text_config.num_attention_heads == 2


@pytest.mark.parametrize(
    ("like", "scale"), [("gpt", None), ("llava-1.5-7b", "huge"), ("llava-1.5-7b", "0x4"), ("small", None)]
)
def test_unknown_sizes_are_told(like: str, scale: str | None):
    with pytest.raises(VLPruneError, match="known sizes are|allowed are"):
        sizes.size_of(like, scale)
