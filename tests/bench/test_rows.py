"""From measurements to rows: times that were made up give ratios, floors and shares that can be worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vlprune.bench import jobs, journal, load, model, report, rounds, sizes, suite
from vlprune.bench.floor import Schedule
from vlprune.bench.rounds import Measured, Variant
from vlprune.bench.workload import Sample
from vlprune.evals.settings import Setting

UNPRUNED = Variant(Setting("none"))
FAST, SLOW, BROKEN = (Variant(Setting(name, 0.5)) for name in ("uniform", "hired", "fastv"))
CPU = torch.device("cpu")


def schedule(*rows: int, encoder: float = 1.0) -> Schedule:
    return Schedule(rows, rows, encoder, visual=80, entering=40, layer_mean=40, cached=40, flops=10**9)


def sample(prefill: float, decode: float = 0.01, selection: float = 0.0) -> Sample:
    parts = {"vision": 0.2, "projector": 0.1, "selection": selection, "llm": prefill - 0.4 - selection, "rest": 0.1}
    return Sample(prefill, parts, [decode] * 3, cache=2**20, peak=None)


@pytest.fixture
def measured() -> Measured:
    """Three rounds. Unpruned: 2 s, of which 0.4 s are outside of the LLM. The LLM by itself takes 0.6 s on half the tokens."""
    halves = {0: 0.0, 1: 0.3, 2: 0.6, -1: 0.6}
    return Measured(
        schedules={UNPRUNED: schedule(100, 100), FAST: schedule(60, 60), SLOW: schedule(60, 60, encoder=0.5)},
        samples={
            UNPRUNED: [sample(2.0)] * 3,
            FAST: [sample(1.0, 0.005)] * 3,
            SLOW: [sample(2.5, selection=0.2)] * 3,
        },
        peaks={UNPRUNED: 3 * 2**20},
        texts={60: [halves] * 3},
        decodes={100: [[0.01] * 3] * 3, 60: [[0.004] * 3] * 3},
        errors={BROKEN: "BudgetError: too little"},
        preprocess=[0.02, 0.03, 0.04],
    )


@pytest.fixture
def rows(measured: Measured) -> dict[str, Any]:
    found = model.rows_of(measured, [UNPRUNED, FAST, SLOW, BROKEN])
    return {str(row["method"]): row for row in found}


def test_speed_is_told_against_the_unpruned_model_of_the_same_round(rows):
    row = rows["uniform"]
    assert (row["prefill_ms_p20"], row["prefill_ms_p50"], row["prefill_ms_p80"]) == pytest.approx((1000, 1000, 1000))
    assert (row["speedup_low"], row["speedup"], row["speedup_high"]) == pytest.approx((2, 2, 2))
    assert row["decode_speedup"] == pytest.approx(2)
    assert row["decode_reference_ms"] == pytest.approx(4)
    assert row["decode_overhead"] == pytest.approx(0.25)
    assert row["preprocess_ms"] == pytest.approx(30)


def test_the_floor_is_what_is_left_of_each_part(rows):
    """0.1 s of the rest, 0.3 s of encoder and projector by the share that is left, 0.6 s of the LLM."""
    row = rows["uniform"]
    assert row["floor_ms"] == pytest.approx(1000)
    assert row["floor_speedup"] == pytest.approx(2)
    assert row["share_of_floor"] == row["share_of_saving"] == pytest.approx(1)
    assert rows["hired"]["floor_ms"] == pytest.approx(850)


def test_the_floor_of_the_unpruned_model_is_itself(rows):
    assert rows["none"]["floor_ms"] == pytest.approx(2000)
    assert rows["none"]["speedup"] == 1
    assert rows["none"]["share_of_saving"] is None


def test_selection_is_a_share_of_the_unpruned_prefill(rows):
    assert rows["hired"]["selection_share"] == pytest.approx(0.1)
    assert rows["uniform"]["selection_share"] == 0


def test_without_runs_of_a_length_there_is_no_floor_and_everything_else(measured):
    measured.texts = {60: measured.texts[60][:2]}
    measured.decodes = {}
    (row,) = model.rows_of(measured, [FAST])
    assert "floor_ms" not in row
    assert "decode_overhead" not in row
    assert row["speedup"] == pytest.approx(2)


def test_a_method_that_costs_more_than_it_saves_is_kept_and_shown(rows, tmp_path):
    path = tmp_path / "model.csv"
    same = {"model": "m", "batch": 1, "prompt_tokens": 100, "device": "CPU", "date": "2026-01-01T00:00:00Z", "command": "c"}
    for row in rows.values():
        journal.append(path, model.COLUMNS, {**same, **row})
    read = journal.read(path)
    slow = next(row for row in read if row["method"] == "hired")
    assert slow["speedup"] == pytest.approx(0.8)
    assert report.slower(slow)
    page = report.model_page(read)
    (line,) = [line for line in page.splitlines() if line.startswith("| hired") and "speed" not in line and "0.80x" in line]
    assert "slower" in line
    assert "slower" not in next(line for line in page.splitlines() if line.startswith("| uniform"))


def test_what_could_not_be_measured_is_told(rows):
    assert rows["fastv"]["error"] == "BudgetError: too little"
    same = {"model": "m", "device": "CPU", "date": "2026-01-01", "command": "c"}
    assert "- fastv 0.5: BudgetError: too little" in report.model_page([{**same, **row} for row in rows.values()])


def test_break_even_is_where_the_saving_reaches_what_is_spent(rows):
    """Half of what the floor saves is reached at 80 tokens; what is spent beside it would eat up all at 40."""
    row = {**rows["uniform"], "share_of_saving": 0.5}
    assert report.break_even(row) == "40 visual"
    assert report.break_even({**row, "share_of_saving": 1.2}) == "0 visual"
    assert report.break_even(rows["none"]) == report.NOTHING
    # No prefill is saved: 10 ms more to read the prompt, 1 ms less for each new token.
    evicting = {"share_of_saving": None, "floor_ms": 90.0, "share_of_floor": 0.9, "decode_ms_p50": 4.0, "decode_speedup": 1.25}
    assert report.break_even({**row, **evicting}) == "10 new"
    assert report.break_even({**row, **evicting, "decode_speedup": 0.9}) == report.NOTHING


def test_a_method_that_never_pays_is_not_said_to_break_even(rows):
    assert report.break_even(rows["hired"]) == f"{80 * (1 + 0.5 / 1.15):.0f} visual"


# ------------------------------------------------------------------ rounds


def test_every_turn_takes_every_place():
    turns = list(range(5))
    orders = [rounds.in_turn(turns, index) for index in range(10)]
    assert all(sorted(order) == turns for order in orders)
    for place in range(5):
        assert {order[place] for order in orders} == set(turns)


def test_the_unpruned_model_comes_first_and_again_next_to_what_keeps_all():
    found = suite.variants_of("hired:0.4,uniform:0.4:1.0")
    assert [variant.label for variant in found] == ["none", "none again", "uniform 1.0", "hired 0.4", "uniform 0.4"]


def test_a_variant_that_fails_is_told_and_the_others_are_measured():
    work = load.of_size(sizes.size_of("llava-next-tiny"), CPU, torch.float32).workload(1, 16, None, 1)
    wanted = suite.variants_of("uniform:0.4,fastv:0.1")
    found = rounds.measure(work, wanted, rounds=2, warmup=1)
    by_label = {variant.label: variant for variant in wanted}
    assert "BudgetError" in found.errors[by_label["fastv 0.1"]]
    assert [len(found.samples[by_label[label]]) for label in ("none", "none again", "uniform 0.4")] == [2, 2, 2]
    assert {length: len(runs) for length, runs in found.texts.items()} == {max(s.rows): 2 for s in found.schedules.values()}
    last = model.rows_of(found, wanted)[-2:]
    assert sorted(bool(row.get("error")) for row in last) == [False, True]


def test_a_model_that_does_not_fit_becomes_rows(tmp_path):
    def load_it() -> Any:
        raise torch.OutOfMemoryError("GPU is full")

    sink = jobs.Sink(tmp_path / "model.csv", model.COLUMNS, CPU)
    jobs.models(load_it, "big", jobs.Plan(suite.variants_of("uniform:0.4")), sink, print)
    assert [row["error"] for row in journal.read(sink.path)] == ["OutOfMemoryError: GPU is full"] * 3
