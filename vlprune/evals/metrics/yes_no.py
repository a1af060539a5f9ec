"""Scores of yes-or-no questions: POPE and MME."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pope_answer(text: str) -> str:
    """POPE's reading of a free answer: "no" where the first sentence has the word No, no or not, otherwise "yes".

    Words are what single spaces separate, so "No\\n" and "NO" read as "yes", as in the official script.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def pope_correct(prediction: str, answers: Sequence[str]) -> float:
    return float(pope_answer(prediction) == answers[0])


def confusion(prediction: str | None, answers: Sequence[str]) -> tuple[float, ...]:
    """True positives, false positives, false negatives, true negatives of one sample; no prediction is a wrong one."""
    positive = answers[0] == "yes"
    right = prediction is not None and pope_answer(prediction) == answers[0]
    cells = (positive and right, not positive and not right, positive and not right, not positive and right)
    return tuple(float(cell) for cell in cells)


def f1(totals: np.ndarray) -> np.ndarray:
    """F1 of confusion counts ``(..., 4)``; 0 where nothing is positive."""
    tp, wrong = totals[..., 0], totals[..., 1] + totals[..., 2]
    return np.divide(2 * tp, 2 * tp + wrong, out=np.zeros_like(tp), where=2 * tp + wrong > 0)


def pope_strictly_correct(prediction: str, answers: Sequence[str]) -> float:
    """POPE as lmms-eval reads it: the answer must be "yes" or "no", but for case and surrounding space."""
    return float(prediction.lower().strip() == answers[0])


def strict_confusion(prediction: str | None, answers: Sequence[str]) -> tuple[float, ...]:
    """As :func:`confusion`, read as lmms-eval reads it: what is neither "yes" nor "no" counts nowhere.

    So such an answer to a question that should have been affirmed is no false negative, and costs no recall.
    """
    said, positive = (prediction or "").lower().strip(), answers[0] == "yes"
    cells = (
        said == "yes" and positive,
        said == "yes" and not positive,
        said == "no" and positive,
        said == "no" and not positive,
    )
    return tuple(float(cell) for cell in cells)


# ------------------------------------------------------------------ MME

MME_PREFIX = 4
"""Characters in which a longer answer must say yes or no."""


def mme_answer(text: str) -> str:
    """MME's reading of a free answer: "yes", "no" or "other", as Otter's evaluation and lmms-eval have it."""
    text = text.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, "other")
    return next((word for word in ("yes", "no") if word in text[:MME_PREFIX]), "other")


def mme_correct(prediction: str, answers: Sequence[str]) -> float:
    return float(mme_answer(prediction) == answers[0].lower().strip().replace(".", ""))


def mme_pairs(scores: np.ndarray) -> np.ndarray:
    """Points ``(images, 1)`` of pairs of question scores ``(images, 2)``: 100 x their mean, and 100 more if both are right.

    Their mean over the images of a category is its accuracy plus "accuracy+", at most 200.
    """
    return (100 * scores.mean(1) + 100 * (scores.sum(1) == 2))[:, None]
