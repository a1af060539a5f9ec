"""VQA accuracy: answers of ten people, and the normalisation that decides which of them agree."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

_CONTRACTED = """
    'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're what's what've when's where'd
    where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
    y'all'd've y'all'll you'd you'd've you'll you're you've
"""


def _contractions() -> dict[str, str]:
    """The official table: a word that lacks one of its apostrophes gets it back, and one word loses its own.

    The table also has entries for "Im", "Ive" and "I'd've"; words are lower-cased before they are looked up, so they
    never apply.
    """
    table = {"somebody'd": "somebodyd"}
    for word in _CONTRACTED.split():
        for place in (i for i, char in enumerate(word) if char == "'"):
            table[word[:place] + word[place + 1 :]] = word
    return table


CONTRACTIONS = _contractions()
ARTICLES = frozenset(("a", "an", "the"))
_DIGITS = "zero one two three four five six seven eight nine ten"
NUMBERS = {"none": "0"} | {word: str(value) for value, word in enumerate(_DIGITS.split())}
VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
PERIOD_LIMIT = 32
"""At most so many periods go: the official code passes ``re.UNICODE`` (32) where ``re.sub`` takes a count."""

_COMMA_IN_NUMBER = re.compile(r"\d,+\d")
_PERIOD = re.compile(r"(?!<=\d)\.(?!\d)")  # the look-behind is misspelt in the official code, so "3." loses its period too


Convention = Literal["textvqa", "vqav2", "official"]
"""Whose VQA accuracy: see :func:`vqa_accuracy`."""


def normalise_vqa(text: str, convention: Convention = "textvqa") -> str:
    """``text`` as VQA accuracy compares it; only ``textvqa`` splits words first."""
    if convention == "textvqa":
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return _fold_words(_drop_punctuation(_one_line(text)))


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _drop_punctuation(text: str) -> str:
    kept = text
    for mark in VQA_PUNCTUATION:
        at_word_end = f"{mark} " in text or f" {mark}" in text
        kept = kept.replace(mark, "" if at_word_end or _COMMA_IN_NUMBER.search(text) else " ")
    return _PERIOD.sub("", kept, count=PERIOD_LIMIT)


def _fold_words(text: str) -> str:
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str], convention: Convention = "textvqa") -> float:
    """VQA accuracy against the answers of ten people: mean over them of ``min(1, others that agree / 3)``.

    - ``textvqa``: normalises always, after splitting words, as TextVQA evaluations do (M4C, LLaVA, lmms-eval).
    - ``vqav2``: normalises always, without splitting words, as lmms-eval does for VQAv2.
    - ``official``: VQAv2's own script: where all ten raw answers are equal no normalisation at all, so "Yes" is not "yes".
    """
    prediction, answers = _one_line(prediction), [_one_line(answer) for answer in answers]
    if convention != "official" or len(set(answers)) > 1:
        prediction, answers = normalise_vqa(prediction, convention), [normalise_vqa(a, convention) for a in answers]
    equal = [answer == prediction for answer in answers]
    return sum(min(1.0, (sum(equal) - own) / 3) for own in equal) / len(equal)
