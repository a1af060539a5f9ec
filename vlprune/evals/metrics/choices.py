"""Which option a free answer to a multiple-choice question names: ScienceQA and MMBench."""

from __future__ import annotations

import re
from collections.abc import Mapping

LETTERS = "ABCDE"
_AROUND = [("", ""), ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."), (":", "")]
_AROUND += [(":", mark) for mark in (",", ".", ")", ").")]
"""What may stand around an option's letter, in the order in which VLMEvalKit and lmms-eval look for it."""
QUANTIFIER_WORDS = 3
"""In an answer of more words than this, a lone "A" is taken for the article."""
_SENTENCE = re.compile(r"The answer is ([A-Z]).")


def bare_letter(prediction: str) -> str | None:
    """ScienceQA as lmms-eval reads it: the answer is a letter, or begins with one and a period."""
    prediction = prediction.strip()
    if len(prediction) == 1:
        return prediction.upper()
    return prediction[0] if len(prediction) > 1 and prediction[0].isupper() and prediction[1] == "." else None


def scienceqa_letter(prediction: str, options: int) -> str | None:
    """ScienceQA as LLaVA's script reads it; None where nothing is found, or a letter beyond the number of ``options``.

    A letter alone; or a letter, a period and a space before anything; or "The answer is B." exactly once.
    """
    found = None
    if prediction in tuple(LETTERS):
        found = prediction
    elif len(prediction) >= 3 and prediction[0] in LETTERS and prediction[1:3] == ". ":
        found = prediction[0]
    else:
        letters = _SENTENCE.findall(prediction)
        found = letters[0] if len(letters) == 1 else None
    return found if found in tuple(LETTERS[:options]) else None


def infer_option(prediction: str) -> str | None:
    """MMBench: the letter, where exactly one option's stands among the words, bare or with the same punctuation around."""
    words = prediction.split()
    for before, after in _AROUND:
        found = [letter for letter in LETTERS if f"{before}{letter}{after}" in words]
        if len(found) != 1:
            continue
        # Only a bare letter can be an article; "A." in a long answer is an option.
        if not before and not after and "A" in words and len(words) > QUANTIFIER_WORDS:
            continue
        return found[0]
    return None


def infer_text(prediction: str, options: Mapping[str, str]) -> str | None:
    """MMBench: the letter of the only option whose text is part of the answer, whatever the case."""
    found = [letter for letter, text in options.items() if text.lower() in prediction.lower()]
    return found[0] if len(found) == 1 else None
