"""``vlprune bench serve``: vLLM's own benchmark against servers with and without pruning, one server after the other."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlprune.bench import conditions, vllm_server
from vlprune.bench.jobs import Sink
from vlprune.bench.journal import Row
from vlprune.bench.model import setting_columns
from vlprune.bench.rounds import Variant
from vlprune.errors import VLPruneError

START = 900
"""Seconds that a server may take to load its model and to get warm."""
SHARES = (20, 50, 80)
COLUMNS = (
    "model",
    "image",
    "words",
    "new_tokens",
    "concurrency",
    "method",
    "budget",
    "repeat",
    "error",
    "requests",
    "failed",
    "seconds",
    "prompt_tokens",
    *(f"first_ms_p{share}" for share in SHARES),
    *(f"next_ms_p{share}" for share in SHARES),
    "requests_per_s",
    "tokens_per_s",
    "vllm",
    *conditions.COLUMNS,
)
"""Of a row: a server, and so many requests under way at a time.

- ``image``: height and width in pixels; ``words``: tokens of text in a prompt; ``new_tokens``: of each answer.
- ``repeat`` is 1 for the unpruned server once more, after all others: how far it is from itself tells what can be told apart.
- ``requests`` that were answered and ``failed``, in ``seconds``. ``prompt_tokens``: of a request, as the server counts them.
- ``first_ms``: from a request to its first token; ``next_ms``: its mean for each further token; quantiles over requests.
- ``requests_per_s``, ``tokens_per_s``: requests answered and tokens generated, all together.
"""


@dataclass(frozen=True)
class ServingPlan:
    """``model``: a hub id or a folder, ``name`` what it is called in rows. ``image``: pixels (height, width). ``requests``: at
    each concurrency, but never fewer than twice the concurrency. ``options``: of vLLM, for all servers alike."""

    model: str
    name: str
    variants: Sequence[Variant]
    concurrencies: Sequence[int]
    requests: int = 8
    image: tuple[int, int] = (672, 672)
    words: int = 64
    new_tokens: int = 32
    options: Sequence[str] = ()

    @property
    def same(self) -> Row:
        """What all rows have in common."""
        image = f"{self.image[0]}x{self.image[1]}"
        return {"model": self.name, "image": image, "words": self.words, "new_tokens": self.new_tokens}


def in_turn(variants: Sequence[Variant], again: bool) -> list[Variant]:
    """The unpruned server first, and once more at the end if ``again``."""
    first, repeat, *others = variants
    return [first, *others, *[repeat] * again]


def keys(row: Row) -> tuple[str, ...]:
    """What names a row among those of one machine and version."""
    names = ("model", "image", "words", "new_tokens", "concurrency", "method", "budget", "repeat", "vllm")
    return tuple(str(row.get(name)) for name in names)


def measure(plan: ServingPlan, sink: Sink, logs: Path, say: Callable[[str], None]) -> None:
    """Rows of all servers. One that does not start is a row with its error; what it wrote is in ``logs``."""
    vllm = version()
    logs.mkdir(parents=True, exist_ok=True)
    # Servers have threads of their own; those of this process measure nothing.
    sink.common["threads"] = None
    done = sink.done(keys)
    for number, variant in enumerate(plan.variants):
        same = {**plan.same, **setting_columns(variant), "vllm": vllm}
        missing = [c for c in plan.concurrencies if keys({**same, "concurrency": c}) not in done]
        if not missing:
            continue
        say(f"{variant.label}: the server starts")
        options = [*plan.options, *switched_on(variant)]
        try:
            with vllm_server.server(plan.model, options, logs / f"{number}.log", START) as address:
                _ask(plan, address, concurrency=2, requests=4)
                for concurrency in missing:
                    say(f"{variant.label}: {concurrency} at a time")
                    sink.add({**same, **_row(plan, address, concurrency)})
        except VLPruneError as error:
            sink.add({**same, "error": " ".join(str(error).split())[:500]})


def version() -> str:
    """vLLM's; raises :class:`VLPruneError` where there is none."""
    try:
        import vllm  # pyright: ignore
    except ImportError as error:
        raise VLPruneError(f"vLLM cannot be imported ({error}); docs/serving.md tells how to install it") from error
    return vllm.__version__


def switched_on(variant: Variant) -> list[str]:
    """Options of a server that prunes so; none for the unpruned one."""
    method = variant.method
    return [] if method is None else ["--additional-config", json.dumps({"vlprune": method.to_dict()})]


def _row(plan: ServingPlan, address: str, concurrency: int) -> Row:
    # Other images at each concurrency, or vLLM would have them in its caches; the same for each server.
    found = _ask(plan, address, concurrency, max(plan.requests, 2 * concurrency), seed=concurrency)
    answered = found["completed"]
    row: Row = {"concurrency": concurrency, "requests": answered, "failed": found["failed"], "seconds": found["duration"]}
    if not answered:
        return {**row, "error": next(filter(None, found.get("errors", [])), "no request was answered")}
    for name, known in (("first_ms", "ttft"), ("next_ms", "tpot")):
        row |= {f"{name}_p{share}": found[f"p{share}_{known}_ms"] for share in SHARES}
    row["prompt_tokens"] = found["total_input_tokens"] / answered
    return {**row, "requests_per_s": found["request_throughput"], "tokens_per_s": found["output_throughput"]}


def _ask(plan: ServingPlan, address: str, concurrency: int, requests: int, seed: int = 0) -> dict[str, Any]:
    height, width = plan.image
    options = {
        "backend": "openai-chat",
        "endpoint": "/v1/chat/completions",
        "model": plan.model,
        "seed": seed,
        "temperature": 0,
        "dataset-name": "random-mm",
        "random-input-len": plan.words,
        "random-output-len": plan.new_tokens,
        "random-mm-base-items-per-request": 1,
        "random-mm-num-mm-items-range-ratio": 0,
        "random-mm-limit-mm-per-prompt": '{"image": 1}',
        "random-mm-bucket-config": f"{{({height}, {width}, 1): 1.0}}",
        "max-concurrency": concurrency,
        "num-prompts": requests,
        "metric-percentiles": ",".join(map(str, SHARES)),
        # The server answers already, and a request that asks whether it does would leave its image in the caches.
        "ready-check-timeout-sec": 0,
        "disable-tqdm": None,
    }
    return vllm_server.benchmark(address, options)
