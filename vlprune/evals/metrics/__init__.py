"""Scores of answers, as the field's benchmarks compute them, with bootstrap intervals.

Every metric maps a prediction and its reference answers to a score in [0, 1]. A :class:`Metric` also says how scores of
many samples become one number: most are means, the F1 of POPE is not. Where two conventions are in use, both are here, and
the docstring says whose each is.
"""

from vlprune.evals.metrics.catalogue import (
    ANLS,
    EXACT_MATCH,
    METRIC_OF_KIND,
    NAMED,
    POPE_F1,
    POPE_F1_STRICT,
    RELAXED_ACCURACY,
    VQA_ACCURACY,
)
from vlprune.evals.metrics.choices import bare_letter, infer_option, infer_text, scienceqa_letter
from vlprune.evals.metrics.estimates import MEAN, Estimate, Metric, estimate
from vlprune.evals.metrics.texts import anls, edit_distance, exact_match, relaxed_accuracy
from vlprune.evals.metrics.vqa import CONTRACTIONS, normalise_vqa, vqa_accuracy
from vlprune.evals.metrics.yes_no import mme_answer, mme_correct, mme_pairs, pope_answer, pope_correct

__all__ = [
    "ANLS",
    "CONTRACTIONS",
    "EXACT_MATCH",
    "MEAN",
    "METRIC_OF_KIND",
    "NAMED",
    "POPE_F1",
    "POPE_F1_STRICT",
    "RELAXED_ACCURACY",
    "VQA_ACCURACY",
    "Estimate",
    "Metric",
    "anls",
    "bare_letter",
    "edit_distance",
    "estimate",
    "exact_match",
    "infer_option",
    "infer_text",
    "mme_answer",
    "mme_correct",
    "mme_pairs",
    "normalise_vqa",
    "pope_answer",
    "pope_correct",
    "relaxed_accuracy",
    "scienceqa_letter",
    "vqa_accuracy",
]
