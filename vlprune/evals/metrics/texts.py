"""Scores of short texts: ANLS (DocVQA), relaxed accuracy (ChartQA), exact match (GQA)."""

from __future__ import annotations

import string
from collections.abc import Sequence


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5, folded_lengths: bool = False) -> float:
    """Normalised Levenshtein similarity to the nearest answer (DocVQA); below ``threshold`` it counts as 0.

    As in the official script the distance is between stripped, lower-case texts with single spaces, but the length
    that divides it is that of the raw texts; a similarity of exactly ``threshold`` is kept. ``folded_lengths`` divides by the
    length of the folded texts instead, as LLaVA's evaluator does.
    """
    distances = []
    for answer in answers:
        texts = [" ".join(text.lower().split()) for text in (answer, prediction)]
        length = max(map(len, texts if folded_lengths else (answer.upper(), prediction.upper())))
        distances.append(edit_distance(*texts) / length if length else 0.0)
    similarity = 1 - min(distances)
    return similarity if similarity >= threshold else 0.0


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance in characters."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def relaxed_accuracy(prediction: str, answers: Sequence[str], tolerance: float = 0.05) -> float:
    """ChartQA: numbers within 5 % of the answer are right, everything else must be equal but for case.

    "12%" is 0.12. Thousands separators are not understood and an answer of 0 is compared as text, as in the official
    script.
    """
    return float(any(_relaxed_equal(prediction, answer, tolerance) for answer in answers))


def _relaxed_equal(prediction: str, answer: str, tolerance: float) -> bool:
    given, target = _number(prediction), _number(answer)
    if given is not None and target:
        return abs(given - target) / abs(target) <= tolerance
    return prediction.lower() == answer.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def exact_match(prediction: str, answers: Sequence[str], official: bool = False) -> float:
    """GQA: equal but for case and punctuation; ``official`` removes closing periods only, as GQA's and LLaVA's scripts."""
    fold = _fold_period if official else _fold_punctuation
    return float(any(fold(prediction) == fold(answer) for answer in answers))


def _fold_period(text: str) -> str:
    return text.rstrip(".").lower()


def _fold_punctuation(text: str) -> str:
    return text.lower().translate(str.maketrans("", "", string.punctuation))
