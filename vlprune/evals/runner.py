"""Runs a model under pruning methods and budgets over benchmarks, and keeps what it measured.

Batches are composed before they are dealt to processes, and settings take turns on each of them. A run that was
interrupted, by whatever means, goes on at the first missing batch, with as many processes as there are then. So the rows of
a run are the same however it came about, but for their times; :mod:`vlprune.evals.journal` tells what is on disk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlprune.engine.family import IMAGE, family_of
from vlprune.errors import VLPruneError
from vlprune.evals import journal, provenance
from vlprune.evals.answering import Answering, patched
from vlprune.evals.answering import make_inputs as make_inputs  # also at hand for those who time a model
from vlprune.evals.batches import Task, of_each_size
from vlprune.evals.journal import Cell, Journal, Row
from vlprune.evals.processes import ALONE, Processes
from vlprune.evals.provenance import git_commit as git_commit
from vlprune.evals.provenance import hardware as hardware
from vlprune.evals.settings import UNPRUNED, Setting, distinct


@dataclass(frozen=True)
class Progress:
    """Where a run is: ``done`` of ``total`` samples, of which ``resumed`` came from an earlier run.

    Where several processes share the run, they are taken to be equally fast.
    """

    setting: Setting
    task: Task
    done: int
    total: int
    resumed: int


def run(
    model: Any,
    processor: Any,
    tasks: Sequence[Task],
    settings: Sequence[Setting],
    out: Path,
    *,
    batch_size: int,
    name: str = "",
    command: str = "",
    refused: Mapping[Setting, Exception] | None = None,
    restart: bool = False,
    retry_errors: bool = False,
    processes: Processes = ALONE,
    progress: Callable[[Progress], None] | None = None,
) -> None:
    """Answers all examples of ``tasks`` under all ``settings`` by greedy decoding; :func:`journal.read_rows` has the rows.

    Rows and manifest are kept in ``out``; what an earlier run of the same kind left there is not measured again, but for
    batches with failed samples if ``retry_errors``. ``batch_size`` is the one that tasks were composed with. ``name`` names
    the model in the manifest, ``command`` is how to repeat the run, ``refused`` are settings that were wished for and are not
    possible: they are noted.

    Raises :class:`RunMismatchError` where ``out`` holds rows of another model, data, machine or version, and what
    ``vlprune.apply`` raises where a setting is not possible, both before anything is measured.
    """
    settings = distinct(settings)
    check(model, processor, tasks, settings)
    _check_same_questions(tasks, processes)
    with ExitStack() as stack:

        def begin() -> tuple[int, set[Cell]]:
            wanted = manifest(model, tasks, settings, name, batch_size)
            stack.enter_context(journal.locked(out))
            return _begin(out, wanted, tasks, _session(model, command, processes, refused or {}), restart, retry_errors)

        session, complete = processes.from_first(begin)
        work = _Work(tasks, settings, complete, processes)
        answering = Answering(model, processor, session)
        kept = Journal(out, processes.index)
        for task, index, setting in work.mine():
            kept.append(answering.answer(setting, task, index))
            work.done += len(task.batches[index])
            if progress:
                progress(work.progress(task, setting))
        # Nobody reads the rows, and nobody lets go of the folder, before all are written.
        processes.wait()


def _begin(
    out: Path, wanted: Row, tasks: Sequence[Task], session: Row, restart: bool, retry_errors: bool
) -> tuple[int, set[Cell]]:
    """Writes what is known before the first answer; returns the number of this session, and what is already measured."""
    begun = journal.begin(out, wanted, session, restart)
    for task in tasks:
        journal.write_samples(out, task.key, map(_sample, task.examples))
    ids = {task.key: [[example.id for example in batch] for batch in task.batches] for task in tasks}
    return len(begun["sessions"]) - 1, journal.tidy(out, ids, retry_errors)


def _sample(example: Any) -> Row:
    kept = ("id", "category", "question", "answers", "details")
    return {name: getattr(example, name) for name in kept}


@dataclass
class _Work:
    """What is to be done, and how much of it this process has done."""

    tasks: Sequence[Task]
    settings: Sequence[Setting]
    complete: set[Cell]
    processes: Processes
    done: int = 0

    def mine(self) -> list[tuple[Task, int, Setting]]:
        """The share of this process, every so manyth batch: neighbours are alike, so the shares are, too.

        Settings take turns on each batch: whatever else the machine does meanwhile slows all of them alike.
        """
        missing = [
            (task, index, settings)
            for task in self.tasks
            for index in range(len(task.batches))
            if (settings := [one for one in self.settings if (task.key, one.label, index) not in self.complete])
        ]
        share = missing[self.processes.index :: self.processes.count]
        self.to_do = _samples(missing)
        self.my_share = _samples(share)
        self.total = len(self.settings) * sum(len(task.examples) for task in self.tasks)
        return [(task, index, setting) for task, index, settings in share for setting in settings]

    def progress(self, task: Task, setting: Setting) -> Progress:
        resumed = self.total - self.to_do
        return Progress(setting, task, resumed + round(self.done / self.my_share * self.to_do), self.total, resumed)


def _samples(work: Sequence[tuple[Task, int, list[Setting]]]) -> int:
    return sum(len(task.batches[index]) * len(settings) for task, index, settings in work)


# ------------------------------------------------------------------ before anything is measured


def check(model: Any, processor: Any, tasks: Sequence[Task], settings: Sequence[Setting]) -> None:
    """Raises where a setting is not possible: applies it, and plans images of the sizes that there are."""
    refused = refusals(model, processor, tasks, settings)
    for setting, error in refused.items():
        raise type(error)(f"{setting.label}: {error}") from error


def refusals(model: Any, processor: Any, tasks: Sequence[Task], settings: Sequence[Setting]) -> dict[Setting, VLPruneError]:
    """The settings that are not possible, and why."""
    found: dict[Setting, VLPruneError] = {}
    layouts = _layouts(model, processor, tasks)
    for setting in settings:
        if setting.method == UNPRUNED:
            continue
        try:
            with patched(model, setting):
                shape = family_of(model).parts(model).shape
                for layout in layouts:
                    setting.make().plan(layout, shape)
        except VLPruneError as error:
            found[setting] = error
    return found


def _layouts(model: Any, processor: Any, tasks: Sequence[Task]) -> list[Any]:
    """Where the tokens of an image lie, for some sizes of image; the model runs on none of them."""
    layouts, failures, family = [], [], family_of(model)
    for example in [example for task in tasks for example in of_each_size(task.examples)]:
        try:
            inputs = make_inputs(model, processor, [example])
        except Exception as error:
            # One image may be odd, and is recorded when its turn comes.
            failures.append(error)
        else:
            layouts += family.seams[IMAGE](model, dict(inputs))
    if failures and not layouts:
        raise VLPruneError(f"the model's processor can read none of the samples; the first: {failures[0]}") from failures[0]
    return layouts


def _check_same_questions(tasks: Sequence[Task], processes: Processes) -> None:
    questions = [(example.id, example.question) for task in tasks for example in task.examples]
    if not processes.same(provenance.joint_hash(map(repr, questions))):
        raise VLPruneError("processes have loaded different data: load it from a local path that all of them see")


# ------------------------------------------------------------------ what a run is a measurement of


def manifest(model: Any, tasks: Sequence[Task], settings: Sequence[Setting], name: str, batch_size: int) -> Row:
    """Everything that must be equal for rows to be comparable, and the settings with every knob."""
    return {
        "format": journal.FORMAT,
        "model": provenance.model_identity(model, name),
        "generation": {
            "batch_size": batch_size,
            "do_sample": False,
            "num_beams": 1,
            "config": model.generation_config.to_diff_dict() if model.can_generate() else {},
        },
        "versions": provenance.versions(),
        "hardware": {"device": hardware(model.device)["device"]},
        "benchmarks": {task.key: _data(task) for task in tasks},
        "settings": [_knobs(setting) for setting in settings],
    }


def _data(task: Task) -> Row:
    return {
        "name": task.benchmark.name,
        "title": task.benchmark.title,
        "version": task.benchmark.version,
        "options": {name: getattr(task.benchmark, name) for name in task.benchmark.options()},
        "samples": len(task.examples),
        "sha256": provenance.joint_hash(map(_fingerprint, task.examples)),
        "max_new_tokens": task.max_new_tokens,
    }


def _fingerprint(example: Any) -> str:
    try:
        return example.fingerprint
    except Exception as error:
        # A picture that cannot be read now may be there later; then these are other data.
        return f"{example.id}: {type(error).__name__}"


def _knobs(setting: Setting) -> Row:
    knobs = {} if setting.method == UNPRUNED else setting.make().to_dict()
    return {**dataclasses.asdict(setting), "knobs": knobs}


def _session(model: Any, command: str, processes: Processes, refused: Mapping[Setting, Exception]) -> Row:
    """Who measures now, and what cannot be measured."""
    return {
        "date": provenance.today(),
        "commit": git_commit(),
        "command": command,
        "hardware": hardware(model.device),
        "processes": processes.count,
        "not_possible": {setting.label: str(error) for setting, error in refused.items()},
    }
