"""Golden cases for what official metrics do and what popular shortcuts get wrong."""

from __future__ import annotations

import numpy as np
import pytest

from vlprune.evals import metrics
from vlprune.evals.metrics import MEAN, METRIC_OF_KIND, POPE_F1, POPE_F1_STRICT, RELAXED_ACCURACY, estimate, normalise_vqa

# ------------------------------------------------------------------ VQA accuracy


@pytest.mark.parametrize(("agreeing", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
@pytest.mark.parametrize("convention", ["textvqa", "vqav2", "official"])
def test_vqa_accuracy_leaves_each_person_out_once(agreeing: int, score: float, convention):
    answers = ["cat"] * agreeing + [f"dog{i}" for i in range(10 - agreeing)]
    assert metrics.vqa_accuracy("cat", answers, convention) == pytest.approx(score)


def test_comma_without_space_separates_words_only_officially():
    assert normalise_vqa("red,green") == "redgreen"
    assert normalise_vqa("red,green", "official") == "red green"


def test_contractions_table():
    assert len(metrics.CONTRACTIONS) == 114
    assert metrics.CONTRACTIONS["yall'd've"] == metrics.CONTRACTIONS["y'alld've"] == "y'all'd've"
    assert metrics.CONTRACTIONS["'ows'at"] == "'ow's'at"


def test_equal_answers_are_compared_raw_officially():
    assert metrics.vqa_accuracy("Yes", ["yes"] * 10, "official") == 0.0
    assert metrics.vqa_accuracy("Yes", ["yes"] * 9 + ["no"], "official") == pytest.approx(1.0)
    assert metrics.vqa_accuracy("Yes", ["yes"] * 10) == 1.0


# ------------------------------------------------------------------ ANLS


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("hello", ["hello"], 1.0),
        ("HELLO ", ["hello"], 1.0),
        ("hallo", ["hello"], 0.8),
        ("ab", ["abcd"], 0.5),
        ("a", ["abc"], 0.0),
        ("", [""], 1.0),
        ("", ["abc"], 0.0),
        ("b", ["abcd", "b"], 1.0),
        ("ab   d", ["ab c"], 1 - 1 / 6),
        ("ss", ["ß"], 0.0),
        ("abcdef", ["abcxyz"], 0.5),
        ("abcde", ["abxyz"], 0.0),
    ],
)
def test_anls(prediction: str, answers: list[str], score: float):
    assert metrics.anls(prediction, answers) == pytest.approx(score)


def test_anls_by_lengths_of_folded_texts():
    """One of four characters differs; the raw prediction has six."""
    assert metrics.anls("ab   d", ["ab c"]) == pytest.approx(5 / 6)
    assert metrics.anls("ab   d", ["ab c"], folded_lengths=True) == pytest.approx(3 / 4)


@pytest.mark.parametrize(
    ("first", "second", "distance"), [("kitten", "sitting", 3), ("", "abc", 3), ("flaw", "lawn", 2), ("same", "same", 0)]
)
def test_edit_distance(first: str, second: str, distance: int):
    assert metrics.edit_distance(first, second) == metrics.edit_distance(second, first) == distance


# ------------------------------------------------------------------ relaxed accuracy, exact match


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("105", "100", True),
        ("106", "100", False),
        ("95", "100", True),
        ("-100", "100", False),
        ("10%", "0.1", True),
        ("10%", "10", False),
        ("1,234", "1234", False),
        ("1,234", "1,234", True),
        ("0.0", "0", False),
        ("0", "0", True),
        ("0.001", "0", False),
        ("Red", "red", True),
        ("red ", "red", False),
        ("red", "5", False),
        ("5%", "5", False),
        ("0.05", "5%", True),
        ("5%", "5 %", True),
        ("1,234", "1,235", False),
        ("-0", "0", False),
        ("0%", "0", False),
        ("1e2", "100", True),
        ("$100", "100", False),
        ("2020.0", "2020", True),
        ("94.9", "100", False),
    ],
)
def test_relaxed_accuracy(prediction: str, answer: str, right: bool):
    assert metrics.relaxed_accuracy(prediction, [answer]) == right


@pytest.mark.parametrize(
    ("prediction", "answer", "usual", "official"),
    [
        ("Red.", "red", True, True),
        ("red!", "red", True, False),
        ("t-shirt", "tshirt", True, False),
        ("the red", "red", False, False),
        ("two", "2", False, False),
        (".red", "red", True, False),
    ],
)
def test_exact_match(prediction: str, answer: str, usual: bool, official: bool):
    assert metrics.exact_match(prediction, [answer]) == usual
    assert metrics.exact_match(prediction, [answer], official=True) == official


# ------------------------------------------------------------------ POPE


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("yes", "yes"),
        ("no", "no"),
        ("No, there is not", "no"),
        ("There is not a dog", "no"),
        ("NO", "yes"),
        ("Not here", "yes"),
        ("no\n", "yes"),
        ("Yes. No dog", "yes"),
        ("nothing", "yes"),
        ("", "yes"),
        ("maybe", "yes"),
    ],
)
def test_pope_parsing(text: str, answer: str):
    assert metrics.pope_answer(text) == answer


def test_f1_of_pope():
    """Two true positives, a false one, a false negative: precision and recall are 2/3."""
    assert pooled_f1(["yes", "yes", "no", "no", "yes"], ["yes", "no", "yes", "no", "yes"]) == pytest.approx(2 / 3)


def test_f1_without_positives():
    assert pooled_f1(["no"], ["no"]) == 0.0


def pooled_f1(predictions: list[str], labels: list[str]) -> float:
    counts = POPE_F1.contributions(predictions, [(label,) for label in labels])
    return float(POPE_F1.aggregate(counts.sum(0), len(counts)))


def test_f1_is_not_a_mean_of_samples():
    predictions, answers = ["yes", "no", "yes"], [("yes",), ("no",), ("no",)]
    counts = POPE_F1.contributions(predictions, answers)
    assert float(POPE_F1.aggregate(counts.sum(0), len(counts))) == pytest.approx(2 / 3)
    assert np.mean([POPE_F1.sample(p, a) for p, a in zip(predictions, answers, strict=True)]) == pytest.approx(2 / 3)
    assert float(POPE_F1.aggregate(counts[:2].sum(0), 2)) == 1.0
    assert float(POPE_F1.aggregate(counts[1:].sum(0), 2)) == 0.0


def test_a_sample_without_prediction_is_wrong():
    for metric in METRIC_OF_KIND.values():
        assert metric.sample(None, ("yes",) * 10) == 0.0
    assert POPE_F1.contributions([None, None], [("yes",), ("no",)]).tolist() == [[0, 0, 1, 0], [0, 1, 0, 0]]


# ------------------------------------------------------------------ POPE as lmms-eval reads it, MME


def test_strict_f1_leaves_other_answers_out():
    """By lmms-eval's formula: one true positive, one false positive; "Yes." is neither, so nothing was missed."""
    predictions, labels = ["yes", "Yes.", " YES ", "maybe"], [("yes",), ("yes",), ("no",), ("no",)]
    counts = POPE_F1_STRICT.contributions(predictions, labels)
    assert counts.tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert float(POPE_F1_STRICT.aggregate(counts.sum(0), 4)) == pytest.approx(2 / 3)
    assert [POPE_F1_STRICT.sample(p, a) for p, a in zip(predictions, labels, strict=True)] == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Yes", "yes"),
        ("no.", "no"),
        (" Y ", "yes"),
        ("n.", "no"),
        ("x", "other"),
        ("", "other"),
        ("Yes, it is", "yes"),
        ("Nothing", "no"),
        ("not", "no"),
        ("I know", "other"),
        ("a no", "no"),
        ("oh yes", "other"),
        ("yesno", "yes"),
        ("There is", "other"),
    ],
)
def test_mme_parsing(text: str, answer: str):
    """Computed by lmms-eval's parse_pred_ans."""
    assert metrics.mme_answer(text) == answer


def test_mme_points_of_pairs():
    """Both right: 100 and 100 more; one: 50; none: 0."""
    assert metrics.mme_pairs(np.array([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])).tolist() == [[200], [50], [0]]


# ------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"),
        ("B.", "B"),
        ("(C)", "C"),
        ("(C).", "C"),
        ("D) dog", "D"),
        ("E:", "E"),
        ("Answer :B", "B"),
        ("The answer is B", "B"),
        ("A cat", "A"),
        ("It is a A", None),
        ("A man rides a horse", None),
        ("A. man rides a horse", "A"),
        ("A man chose B.", "B"),
        ("A or B", None),
        ("A. or B", "B"),
        ("b", None),
        ("", None),
        ("F", None),
        ("[B]", None),
    ],
)
def test_mmbench_option(text: str, letter: str | None):
    """Computed by can_infer_option of lmms-eval's MMBench_Evaluator."""
    assert metrics.infer_option(text) == letter


@pytest.mark.parametrize(
    ("text", "letter"), [("The CAT.", "A"), ("a dog", "B"), ("cat and dog", None), ("bird", None), ("cats", "A"), ("", None)]
)
def test_mmbench_text(text: str, letter: str | None):
    assert metrics.infer_text(text, {"A": "cat", "B": "Dog"}) == letter


@pytest.mark.parametrize(
    ("text", "plain", "llava"),
    [
        ("B", "B", "B"),
        ("b", "B", None),
        ("B.", "B", None),
        ("B. rock", "B", "B"),
        ("B.rock", "B", None),
        ("b. rock", None, None),
        ("E. rock", "E", None),
        ("The answer is B.", None, "B"),
        ("The answer is B. The answer is A.", None, None),
        ("The answer is F.", None, None),
        (" B ", "B", None),
        ("rock", None, None),
        ("", None, None),
    ],
)
def test_letter_of_scienceqa(text: str, plain: str | None, llava: str | None):
    """Worked out by hand from lmms-eval's and LLaVA's scripts, for a question with three options."""
    assert metrics.bare_letter(text) == plain
    assert metrics.scienceqa_letter(text, 3) == llava


# ------------------------------------------------------------------ intervals


def test_interval_holds_the_normal_one_for_a_mean():
    counts = (np.arange(400) % 4 == 0).astype(float)[:, None]
    got = estimate([(RELAXED_ACCURACY, counts)])
    margin = 1.96 * np.sqrt(0.25 * 0.75 / 400)
    assert got.value == 0.25
    assert (got.low, got.high) == pytest.approx((0.25 - margin, 0.25 + margin), abs=0.006)


def test_interval_of_f1_holds_its_value_and_is_seeded():
    rng = np.random.default_rng(1)
    labels = [("yes",) if flip else ("no",) for flip in rng.random(200) < 0.5]
    predictions = [a[0] if rng.random() < 0.8 else "yes" for a in labels]
    group = [(POPE_F1, POPE_F1.contributions(predictions, labels))]
    got = estimate(group)
    assert got.low < got.value < got.high
    assert got.value == pytest.approx(pooled_f1(predictions, [a[0] for a in labels]))
    assert estimate(group) == got
    assert estimate(group, seed=1) != got


def test_mean_over_groups_weighs_groups_equally():
    right, wrong = np.ones((10, 1)), np.zeros((90, 1))
    got = estimate([(RELAXED_ACCURACY, right), (RELAXED_ACCURACY, wrong)])
    assert (got.value, got.low, got.high) == (0.5, 0.5, 0.5)


def test_sum_over_groups():
    """Of MME: points of two categories, one of which cannot vary; the other does by 1.96 * 100 / sqrt(400)."""
    points = [np.full((30, 1), 150.0), np.tile([[0.0], [200.0]], (200, 1))]
    got = estimate([(MEAN, one) for one in points], over_groups=np.sum)
    assert got.value == 250
    assert (got.low, got.high) == pytest.approx((250 - 9.8, 250 + 9.8), abs=1)
