"""Scores of answers, as the field's benchmarks compute them, with bootstrap intervals.

Every metric maps a prediction and its reference answers to a score in [0, 1]. A :class:`Metric` also says how scores of
many samples become one number: most are means, the F1 of POPE is not.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# ------------------------------------------------------------------ VQA accuracy

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


def normalise_vqa(text: str, official: bool = False) -> str:
    """``text`` as VQA accuracy compares it; ``official`` leaves out the word splitting that TextVQA evaluations add."""
    if not official:
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


def vqa_accuracy(prediction: str, answers: Sequence[str], official: bool = False) -> float:
    """VQA accuracy against the answers of ten people: mean over them of ``min(1, others that agree / 3)``.

    The default normalises as TextVQA evaluations do (M4C, LLaVA, lmms-eval). ``official`` follows VQAv2's own script:
    no word splitting, and where all ten raw answers are equal no normalisation at all, so "Yes" is not "yes".
    """
    if official:
        prediction, answers = _one_line(prediction), [_one_line(answer) for answer in answers]
    if not official or len(set(answers)) > 1:
        prediction, answers = normalise_vqa(prediction, official), [normalise_vqa(a, official) for a in answers]
    equal = [answer == prediction for answer in answers]
    return sum(min(1.0, (sum(equal) - own) / 3) for own in equal) / len(equal)


# ------------------------------------------------------------------ other per-sample scores


def anls(prediction: str, answers: Sequence[str], threshold: float = 0.5) -> float:
    """Normalised Levenshtein similarity to the nearest answer (DocVQA); below ``threshold`` it counts as 0.

    As in the official script the distance is between stripped, lower-case texts with single spaces, but the length
    that divides it is that of the raw texts; a similarity of exactly ``threshold`` is kept.
    """
    distances = []
    for answer in answers:
        length = max(len(answer.upper()), len(prediction.upper()))
        distance = edit_distance(" ".join(answer.lower().split()), " ".join(prediction.lower().split()))
        distances.append(distance / length if length else 0.0)
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


# ------------------------------------------------------------------ POPE


def pope_answer(text: str) -> str:
    """POPE's reading of a free answer: "no" where the first sentence has the word No, no or not, otherwise "yes".

    Words are what single spaces separate, so "No\\n" and "NO" read as "yes", as in the official script.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def pope_correct(prediction: str, answers: Sequence[str]) -> float:
    return float(pope_answer(prediction) == answers[0])


def pope(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and the share of "yes" among the predictions; "yes" is the positive class.

    All samples are pooled. Papers that average the F1 of three categories call this once for each.
    """
    counts = np.sum([_confusion(p, (label,)) for p, label in zip(predictions, labels, strict=True)], axis=0)
    tp, fp, fn, tn = (float(c) for c in counts)
    return {
        "accuracy": (tp + tn) / (tp + fp + fn + tn),
        "precision": tp / (tp + fp) if tp + fp else 0.0,
        "recall": tp / (tp + fn) if tp + fn else 0.0,
        "f1": float(_f1(counts)),
        "yes_ratio": (tp + fp) / (tp + fp + fn + tn),
    }


def _confusion(prediction: str | None, answers: Sequence[str]) -> tuple[float, ...]:
    """True positives, false positives, false negatives, true negatives of one sample; no prediction is a wrong one."""
    positive = answers[0] == "yes"
    right = prediction is not None and pope_answer(prediction) == answers[0]
    cells = (positive and right, not positive and not right, positive and not right, not positive and right)
    return tuple(float(cell) for cell in cells)


def _f1(totals: np.ndarray) -> np.ndarray:
    """F1 of confusion counts ``(..., 4)``; 0 where nothing is positive."""
    tp, wrong = totals[..., 0], totals[..., 1] + totals[..., 2]
    return np.divide(2 * tp, 2 * tp + wrong, out=np.zeros_like(tp), where=2 * tp + wrong > 0)


# ------------------------------------------------------------------ from samples to one number


@dataclass(frozen=True)
class Metric:
    """A score of one sample, what each sample adds to a total, and how totals become the score of many.

    ``counts`` returns what a sample adds: its score by default. ``combine`` turns totals ``(..., counts)`` of ``n``
    samples into scores ``(...)``. A sample without a prediction (``None``: it failed) is wrong.
    """

    name: str
    score: Callable[[str, Sequence[str]], float]
    counts: Callable[[str | None, Sequence[str]], tuple[float, ...]] | None = None
    combine: Callable[[np.ndarray], np.ndarray] | None = None

    def sample(self, prediction: str | None, answers: Sequence[str]) -> float:
        return 0.0 if prediction is None else self.score(prediction, answers)

    def contributions(self, predictions: Sequence[str | None], answers: Sequence[Sequence[str]]) -> np.ndarray:
        """What each sample adds to the totals: ``(samples, counts)``."""
        one = self.counts or (lambda prediction, references: (self.sample(prediction, references),))
        return np.array([one(p, a) for p, a in zip(predictions, answers, strict=True)], dtype=np.float64)

    def aggregate(self, totals: np.ndarray, samples: int) -> np.ndarray:
        """Scores ``(...)`` of totals ``(..., counts)`` over ``samples`` samples."""
        return self.combine(totals) if self.combine else totals[..., 0] / samples


VQA_ACCURACY = Metric("VQA accuracy", vqa_accuracy)
ANLS = Metric("ANLS", anls)
RELAXED_ACCURACY = Metric("relaxed accuracy", relaxed_accuracy)
EXACT_MATCH = Metric("exact match", exact_match)
POPE_F1 = Metric("POPE F1", pope_correct, _confusion, _f1)

METRIC_OF_KIND: Mapping[str, Metric] = {
    "text": VQA_ACCURACY,
    "form": ANLS,
    "chart": RELAXED_ACCURACY,
    "presence": POPE_F1,
    "relation": EXACT_MATCH,
    "counting": EXACT_MATCH,
}
"""Which metric scores which kind of SynthVQA question."""


@dataclass(frozen=True)
class Estimate:
    """A score with its interval; all three in [0, 1]."""

    value: float
    low: float
    high: float


def estimate(
    groups: Sequence[tuple[Metric, np.ndarray]], confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Estimate:
    """Mean over ``groups`` of their scores, with a percentile bootstrap interval.

    A group is a metric and its contributions ``(samples, counts)``. Samples are drawn within each group, so the groups
    keep their sizes; a single group gives the interval of one metric.
    """
    rng = np.random.default_rng(seed)
    values, drawn = [], []
    for metric, contributions in groups:
        samples = len(contributions)
        values.append(float(metric.aggregate(contributions.sum(0), samples)))
        picks = rng.integers(samples, size=(resamples, samples))
        drawn.append(metric.aggregate(contributions[picks].sum(1), samples))
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(np.mean(drawn, axis=0), (tail, 100 - tail))
    return Estimate(float(np.mean(values)), float(low), float(high))
