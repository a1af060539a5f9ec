"""The metrics that are a mean, or a ratio of counts, over samples; by name, and by kind of SynthVQA question."""

from __future__ import annotations

from collections.abc import Mapping

from vlprune.evals.metrics.estimates import Metric
from vlprune.evals.metrics.texts import anls, exact_match, relaxed_accuracy
from vlprune.evals.metrics.vqa import vqa_accuracy
from vlprune.evals.metrics.yes_no import confusion, f1, pope_correct, pope_strictly_correct, strict_confusion

VQA_ACCURACY = Metric("VQA accuracy", vqa_accuracy)
ANLS = Metric("ANLS", anls)
RELAXED_ACCURACY = Metric("relaxed accuracy", relaxed_accuracy)
EXACT_MATCH = Metric("exact match", exact_match)
POPE_F1 = Metric("POPE F1", pope_correct, confusion, f1)
POPE_F1_STRICT = Metric("POPE F1, lmms-eval", pope_strictly_correct, strict_confusion, f1)

METRIC_OF_KIND: Mapping[str, Metric] = {
    "text": VQA_ACCURACY,
    "form": ANLS,
    "chart": RELAXED_ACCURACY,
    "presence": POPE_F1,
    "relation": EXACT_MATCH,
    "counting": EXACT_MATCH,
}
"""Which metric scores which kind of SynthVQA question."""

NAMED: Mapping[str, Metric] = {
    "vqa": VQA_ACCURACY,
    "anls": ANLS,
    "relaxed": RELAXED_ACCURACY,
    "exact": EXACT_MATCH,
    "yes-no": POPE_F1,
}
"""What a user's own data can be scored by."""
