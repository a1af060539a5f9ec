"""From what stands on the command line to a model with its processor, and to benchmarks with their questions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlprune.errors import VLPruneError
from vlprune.evals import benchmarks, tinyvlm
from vlprune.evals import settings as written
from vlprune.evals.batches import Task
from vlprune.evals.benchmarks.base import Benchmark

TINYVLM = "tinyvlm"
SYNTHVQA = "synthvqa"
SHORT_ANSWER = "Answer the question using a single word or phrase."
"""What LLaVA's own evaluations append to a question; models other than TinyVLM are told so on SynthVQA."""
TINYVLM_TOKENS = 8
"""TinyVLM's longest answers."""


@dataclass(frozen=True)
class Loaded:
    model: Any
    processor: Any
    name: str


def model(
    name: str, device: torch.device, dtype: str = "auto", attention: str | None = None, revision: str | None = None
) -> Loaded:
    """A TinyVLM, or a model of the hub or a folder; ``dtype`` "auto" is that of the weights, and float32 on a CPU."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if name in tinyvlm.NAMES:
        tiny, processor = tinyvlm.load(name)
        return Loaded(tiny.to(device), processor, tinyvlm.NAMES[name])
    from transformers import AutoModelForImageTextToText, AutoProcessor

    options: dict[str, Any] = {"dtype": _dtype(dtype, device), "attn_implementation": attention, "revision": revision}
    try:
        found: Any = AutoModelForImageTextToText.from_pretrained(name, **options)
        return Loaded(found.to(device).eval(), AutoProcessor.from_pretrained(name, revision=revision), name)
    except (OSError, ValueError, ImportError) as error:
        raise VLPruneError(f"cannot load {name!r}: {error}") from error


def _dtype(name: str, device: torch.device) -> Any:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise VLPruneError(f"--dtype {name}: allowed are auto, float32, bfloat16, float16")
    return found


# ------------------------------------------------------------------ benchmarks


def find_all(text: str, model: str) -> dict[str, Benchmark]:
    """Benchmarks by the key that names them in rows and files: ``"textvqa,pope[split=random]"``, or paths of own data."""
    found: dict[str, Benchmark] = {}
    for part in written.parts(text, ","):
        name, options = written.bracketed(part)
        values = {option: written.literal(value) for option, value in options.items()}
        if name == SYNTHVQA and model not in tinyvlm.NAMES:
            values = {"instruction": SHORT_ANSWER} | values
        key = key_of(part)
        if key in found:
            raise VLPruneError(f"--benchmarks {text}: two of them would both be called {key}")
        found[key] = benchmarks.find(name, **values)
    if not found:
        raise VLPruneError("nothing to do: --benchmarks names none")
    return found


def key_of(text: str) -> str:
    """A benchmark as it was written, a path by its last part, in characters that a file's name may have."""
    name, bracket, options = text.partition("[")
    name = Path(name).stem if "/" in name or "\\" in name else name
    return re.sub(r"[^A-Za-z0-9._=-]+", "-", f"{name}{bracket}{options}").strip("-.") or "data"


def tasks(
    chosen: dict[str, Benchmark], model: str, batch_size: int, limit: int | None, max_new_tokens: int | None
) -> list[Task]:
    """Loads the questions of all benchmarks and composes their batches."""
    tokens = max_new_tokens or (TINYVLM_TOKENS if model in tinyvlm.NAMES else None)
    made = [Task.of(key, benchmark, batch_size, limit, tokens) for key, benchmark in chosen.items()]
    for task in made:
        if not task.examples:
            raise VLPruneError(f"{task.key} has no examples ({task.benchmark.version})")
    return made


def folder(model: str) -> Path:
    """Where results of a model go, those of other models apart from TinyVLM's."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name)
    return Path("results/eval") if model == TINYVLM else Path(f"results/eval-{name}")
