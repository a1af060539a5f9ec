"""Runs a model under pruning methods and budgets over examples, and keeps what it measured.

Rows go to ``rows.jsonl`` a batch at a time, each batch in one write that has reached the disk before the next begins. A run
that was interrupted, by whatever means, goes on at the first missing batch: batches always hold the same samples, so
the answers are those of an uninterrupted run. ``run.json`` says what the rows are measurements of.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LogitsProcessor, LogitsProcessorList

import vlprune
from vlprune.engine.family import IMAGE, family_of
from vlprune.errors import VLPruneError
from vlprune.evals import synthvqa
from vlprune.evals.metrics import METRIC_OF_KIND
from vlprune.evals.settings import UNPRUNED, Setting, distinct
from vlprune.evals.synthvqa import Example

ROWS = "rows.jsonl"
MANIFEST = "run.json"
FORMAT = 2
"""Changes with what a row holds, so that rows of older versions are not taken for complete ones."""
SHORT_ANSWER = "Answer the question using a single word or phrase."
"""What LLaVA's own evaluations append to a question."""

Row = dict[str, Any]
"""One line of ``rows.jsonl``, see :func:`_row`."""


class RunMismatchError(VLPruneError):
    """The folder holds rows of another run, and the two cannot stand in one table."""


@dataclass(frozen=True)
class Progress:
    """Where a run is: ``done`` of ``total`` samples, of which ``resumed`` came from an earlier run."""

    setting: Setting
    done: int
    total: int
    resumed: int


def run(
    model: Any,
    processor: Any,
    examples: Sequence[Example],
    settings: Sequence[Setting],
    out: Path,
    *,
    batch_size: int = 16,
    max_new_tokens: int = 8,
    instruction: str = "",
    name: str = "",
    data: str = f"SynthVQA {synthvqa.VERSION}",
    command: str = "",
    restart: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> list[Row]:
    """Answers all ``examples`` under all ``settings`` by greedy decoding; returns the rows, in order of the settings.

    Rows and manifest are kept in ``out``; what an earlier run of the same kind left there is not measured again.
    ``instruction`` is appended to each question on a line of its own. ``name`` and ``data`` name the model and the examples
    in the manifest, ``command`` is how to repeat the run.

    Raises :class:`RunMismatchError` where ``out`` holds rows of another model, data, machine or version, and what
    ``vlprune.apply`` raises where a setting is not possible, both before anything is measured.
    """
    settings = distinct(settings)
    check(model, processor, examples, settings)
    out.mkdir(parents=True, exist_ok=True)
    generation = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "instruction": instruction}
    wanted = manifest(model, examples, name, data, generation)
    journal = Journal.open(out, wanted, settings, command, restart)
    batches = make_batches(processor, examples, batch_size)
    rows = journal.complete_rows(batches)
    runner = _Runner(model, processor, max_new_tokens, instruction)
    # Settings take turns on each batch: whatever else the machine does meanwhile slows all of them alike.
    cells = [(setting, index) for index in range(len(batches)) for setting in settings]
    resumed = done = sum(len(rows.get((setting.label, index), ())) for setting, index in cells)
    for setting, index in cells:
        key, batch = (setting.label, index), batches[index]
        if key in rows:
            continue
        rows[key] = runner.answer(setting, index, batch)
        journal.append(rows[key])
        done += len(batch)
        if progress:
            progress(Progress(setting, done, len(examples) * len(settings), resumed))
    return [row for setting in settings for index in range(len(batches)) for row in rows[setting.label, index]]


def check(model: Any, processor: Any, examples: Sequence[Example], settings: Sequence[Setting]) -> None:
    """Raises where a setting is not possible: applies it, and plans each size of image that there is."""
    refused = refusals(model, processor, examples, settings)
    for setting, error in refused.items():
        raise type(error)(f"{setting.label}: {error}") from error


def refusals(
    model: Any, processor: Any, examples: Sequence[Example], settings: Sequence[Setting]
) -> dict[Setting, VLPruneError]:
    """The settings that are not possible, and why."""
    found: dict[Setting, VLPruneError] = {}
    layouts: list[Any] = []
    for setting in settings:
        if setting.method == UNPRUNED:
            continue
        try:
            with _patched(model, setting):
                layouts = layouts or _layouts(model, processor, examples)
                shape = family_of(model).parts(model).shape
                for layout in layouts:
                    setting.make().plan(layout, shape)
        except VLPruneError as error:
            found[setting] = error
    return found


def _layouts(model: Any, processor: Any, examples: Sequence[Example]) -> list[Any]:
    """Where the tokens of an image lie, for each size of image; the model runs on none of them."""
    sizes = {example.image.size: example for example in examples}
    inputs = (make_inputs(model, processor, [example], "") for example in sizes.values())
    return [layout for one in inputs for layout in family_of(model).seams[IMAGE](model, dict(one))]


def make_batches(processor: Any, examples: Sequence[Example], batch_size: int) -> list[list[Example]]:
    """Always the same batches: examples of like prompt length share one, so that little is padded."""

    def length(example: Example) -> tuple[int, int, int]:
        return (*example.image.size, len(processor.tokenizer(example.question)["input_ids"]))

    ordered = sorted(examples, key=length)
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


# ------------------------------------------------------------------ measuring one batch


class StepClock(LogitsProcessor):
    """Notes when each forward of ``generate`` has ended; leaves the scores alone."""

    def __init__(self, device: torch.device):
        self.device = device
        self.ends: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.ends.append(now(self.device))
        return scores


def now(device: torch.device) -> float:
    """Seconds, once everything that was launched on ``device`` has been done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@dataclass
class _Runner:
    model: Any
    processor: Any
    max_new_tokens: int
    instruction: str
    warm: set[str] = field(default_factory=set)
    unpruned_costs: dict[tuple, dict[str, float]] = field(default_factory=dict)

    def answer(self, setting: Setting, index: int, batch: list[Example]) -> list[Row]:
        """The rows of one batch under a setting, which on its first turn answers the batch once without being recorded."""
        with _patched(self.model, setting):
            if setting.label not in self.warm:
                self.warm.add(setting.label)
                # A batch that fails is recorded below.
                with contextlib.suppress(Exception):
                    self._generate(batch)
            return self._answer(setting, index, batch)

    def _answer(self, setting: Setting, index: int, batch: list[Example]) -> list[Row]:
        """Where a batch fails as a whole, each sample is tried alone and failures are recorded."""
        try:
            return self._measure(setting, index, batch)
        except Exception as error:
            if len(batch) == 1:
                return [_row(setting, index, batch[0], error=f"{type(error).__name__}: {error}")]
            return [row for example in batch for row in self._answer(setting, index, [example])]

    def _measure(self, setting: Setting, index: int, batch: list[Example]) -> list[Row]:
        inputs, answers, times = self._generate(batch)
        measured = self._costs(setting, inputs)
        selection = None if setting.method == UNPRUNED else vlprune.report(self.model).selection_seconds
        shares = {name: value / len(batch) for name, value in measured.items()}
        both = dict(batch_size=len(batch), selection_seconds=selection, **shares, **times)
        return [
            _row(setting, index, example, prediction=prediction) | both
            for example, prediction in zip(batch, answers, strict=True)
        ]

    def _generate(self, batch: list[Example]) -> tuple[Any, list[str], dict[str, float | int | None]]:
        inputs = make_inputs(self.model, self.processor, batch, self.instruction)
        clock = StepClock(self.model.device)
        start = now(self.model.device)
        with torch.inference_mode():
            output = self.model.generate(
                **inputs,
                do_sample=False,
                num_beams=1,
                max_new_tokens=self.max_new_tokens,
                logits_processor=LogitsProcessorList([clock]),
            )
        steps = len(clock.ends) - 1
        times = {
            "prefill_seconds": clock.ends[0] - start,
            "decode_seconds_per_token": (clock.ends[-1] - clock.ends[0]) / steps if steps else None,
            "steps": steps,
        }
        answers = self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return inputs, [answer.strip() for answer in answers], times

    def _costs(self, setting: Setting, inputs: Any) -> dict[str, float]:
        """Visual tokens, FLOPs of the prefill and bytes of the cache after it, of the whole batch.

        The unpatched model cannot tell, so for ``none`` a patch that does nothing reads one batch of each shape.
        """
        if setting.method != UNPRUNED:
            return _costs_of(vlprune.report(self.model))
        shape = tuple((key, tuple(value.shape)) for key, value in sorted(inputs.items()))
        if shape not in self.unpruned_costs:
            with vlprune.applied(self.model, "uniform", budget=1.0), torch.inference_mode():
                self.model(**inputs, logits_to_keep=1)
                self.unpruned_costs[shape] = _costs_of(vlprune.report(self.model))
        return self.unpruned_costs[shape]


def _costs_of(report: vlprune.Report) -> dict[str, float]:
    return {
        "visual_tokens": report.total,
        "tokens": report.entering,
        "layer_tokens": report.layer_mean,
        "cached_tokens": report.cached,
        "flops": report.flops,
        "cache_bytes": report.kv_bytes,
    }


def make_inputs(model: Any, processor: Any, batch: Sequence[Example], instruction: str) -> Any:
    """What the processor makes of the prompts of a batch, padded on the left, on the model's device."""
    prompts = []
    for example in batch:
        question = f"{example.question}\n{instruction}" if instruction else example.question
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        prompts.append(processor.apply_chat_template([message], add_generation_prompt=True))
    images = [example.image for example in batch]
    # LLaVA takes no token types, yet with transformers 4 a tokenizer returns them unless it was saved without.
    options = {"padding": True, "padding_side": "left", "return_token_type_ids": False, "return_tensors": "pt"}
    return processor(images=images, text=prompts, **options).to(model.device, dtype=model.dtype)


def _patched(model: Any, setting: Setting) -> contextlib.AbstractContextManager[Any]:
    if setting.method == UNPRUNED:
        return contextlib.nullcontext()
    return vlprune.applied(model, setting.make())


def _row(setting: Setting, index: int, example: Example, prediction: str | None = None, error: str | None = None) -> Row:
    """What every row has; a measured row adds seconds of its batch, and its share of the batch's tokens, FLOPs, bytes."""
    return {
        "method": setting.method,
        "budget": setting.budget,
        "batch": index,
        "id": example.id,
        "kind": example.kind,
        "question": example.question,
        "answers": list(example.answers),
        "prediction": prediction,
        "score": METRIC_OF_KIND[example.kind].sample(prediction, example.answers),
        "error": error,
    }


# ------------------------------------------------------------------ what is kept on disk


@dataclass
class Journal:
    """The folder of a run: rows that only ever grow by whole batches, and the manifest."""

    out: Path

    @classmethod
    def open(cls, out: Path, wanted: Row, settings: Sequence[Setting], command: str, restart: bool) -> Journal:
        """The journal in ``out``, checked against the run that is wanted; a fresh one where there is none."""
        path = out / MANIFEST
        previous = {} if restart else read_manifest(out)
        _check_same_run(out, previous, wanted)
        if not previous:
            (out / ROWS).unlink(missing_ok=True)
        merged = distinct([*(Setting(**s) for s in previous.get("settings", ())), *settings])
        started = {"date": _today(), "commit": git_commit(), "command": command}
        kept = {key: previous[key] for key in started if key in previous}
        write_json(path, wanted | started | kept | {"settings": [asdict(s) for s in merged]})
        return cls(out)

    def complete_rows(self, batches: list[list[Example]]) -> dict[tuple[str, int], list[Row]]:
        """Rows by setting (its label) and batch. Whatever is not a whole batch, a torn last line included, leaves the file."""
        path = self.out / ROWS
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        found: dict[tuple[str, int], list[Row]] = {}
        for row in _whole_lines(text):
            found.setdefault((Setting(row["method"], row["budget"]).label, row["batch"]), []).append(row)
        ids = [[example.id for example in batch] for batch in batches]
        whole = {k: v for k, v in found.items() if k[1] < len(ids) and [row["id"] for row in v] == ids[k[1]]}
        clean = "".join(_line(row) for rows in whole.values() for row in rows)
        if clean != text:
            _write_whole(path, clean)
        return whole

    def append(self, rows: list[Row]) -> None:
        with (self.out / ROWS).open("a", encoding="utf-8") as file:
            file.write("".join(_line(row) for row in rows))
            file.flush()
            os.fsync(file.fileno())


def read_rows(out: Path) -> list[Row]:
    """All rows in the folder of a run."""
    return list(_whole_lines((out / ROWS).read_text(encoding="utf-8", errors="replace")))


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _whole_lines(text: str) -> Iterator[Row]:
    for line in text.split("\n")[:-1]:
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def write_json(path: Path, content: Any) -> None:
    """``content`` as indented JSON; the file is either the old or the new one, never half of it."""
    _write_whole(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _write_whole(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


# ------------------------------------------------------------------ what a run is a measurement of


def manifest(model: Any, examples: Sequence[Example], name: str, data: str, generation: dict[str, Any]) -> Row:
    """Everything that must be equal for rows to be comparable."""
    dtype = str(model.dtype).removeprefix("torch.")
    return {
        "format": FORMAT,
        "model": {"name": name or type(model).__name__, "sha256": weights_hash(model), "dtype": dtype},
        "data": {"name": data, "samples": len(examples), "sha256": examples_hash(examples)},
        "generation": generation,
        "versions": {"vlprune": vlprune.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "hardware": hardware(model.device),
    }


def weights_hash(model: Any) -> str:
    """SHA-256 over names, shapes and bytes of all weights and buffers in the state dict."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def examples_hash(examples: Sequence[Example]) -> str:
    """SHA-256 over pixels, questions and answers."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.id, example.kind, example.question, example.answers, example.image.size)).encode())
        digest.update(example.image.tobytes())
    return digest.hexdigest()


def hardware(device: torch.device) -> dict[str, Any]:
    """Name of the processor that does the work, and for a CPU its cores and threads."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device)}
    return {"device": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_commit() -> str | None:
    """The commit of the source tree that vlprune is imported from, with a "+" if the tree has changes; None elsewhere."""
    root = Path(vlprune.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        describe = ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        return subprocess.run(describe, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")


def read_manifest(out: Path) -> Row:
    """The manifest in the folder of a run; empty where there is no run."""
    path = out / MANIFEST
    if not path.exists():
        if (out / ROWS).exists():
            raise RunMismatchError(f"{out} holds rows of which nothing is known, since {MANIFEST} is missing: {_way_out()}")
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RunMismatchError(f"{path} cannot be read ({error}): {_way_out()}") from error


def _check_same_run(out: Path, previous: Row, wanted: Row) -> None:
    if not previous:
        return
    differences = list(_differences(json.loads(json.dumps(wanted)), previous))
    if differences:
        raise RunMismatchError(f"{out} holds rows of another run ({'; '.join(differences)}): {_way_out()}")


def _differences(wanted: Any, previous: Any, where: str = "") -> Iterator[str]:
    if isinstance(wanted, dict) and isinstance(previous, dict):
        for key, value in wanted.items():
            yield from _differences(value, previous.get(key), f"{where} {key}".strip())
    elif wanted != previous:
        yield f"{where} there {_short(previous)}, now {_short(wanted)}"


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text


def _way_out() -> str:
    return "give another folder with --out, or --restart to measure afresh"
