"""The tokenizer that TinyVLM's siblings share, but for its special tokens."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from vlprune.evals import synthvqa

WORDS = (
    "what does the sign say is name value of bar which highest there a an how many are colour left above image describe "
    "yes no field cross circle square triangle crosses circles squares triangles "
    + " ".join((*synthvqa.COLOURS, *synthvqa.KEYS))
).split()
LONGEST = 2048
"""Positions that the models are made for."""


def tokenizer(special: Sequence[str], unknown: str, opening: Any = None, **names: Any) -> PreTrainedTokenizerFast:
    """Whole words of SynthVQA, single characters for everything else; the ``special`` tokens have the ids 0, 1, ...

    ``opening`` is the post-processor that adds what every text begins with, and ``names`` what transformers is to know.
    """
    characters = [*string.digits, *string.ascii_letters, *string.punctuation, " ", "\n"]
    words = sorted({w for word in WORDS for w in (word, word.capitalize(), f" {word}")} - set(characters))
    pieces = [(token, 0.0) for token in special] + [(c, -4.0) for c in characters] + [(w, -2.0) for w in words]
    raw = Tokenizer(models.Unigram(pieces, unk_id=special.index(unknown), byte_fallback=False))
    raw.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    raw.decoder = decoders.Fuse()
    if opening is not None:
        raw.post_processor = opening
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token=unknown,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        model_max_length=LONGEST,
        **names,
    )
