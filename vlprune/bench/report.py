"""From rows to tables: for the terminal while it is measured, and for documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from vlprune.bench import kernel_rows, kernels, model
from vlprune.bench.journal import Row
from vlprune.bench.tables import (
    NOTHING,
    Column,
    between,
    budget_of,
    markdown,
    method_of,
    number,
    percent,
    provenance,
    short,
    show,
    show_errors,
    spread,
)
from vlprune.evals.settings import UNPRUNED

if TYPE_CHECKING:
    from rich.console import Console

TYPICAL = "llava-next"

# ------------------------------------------------------------------ cells


def break_even(row: Row) -> str:
    """From how many visual tokens of an image on the method pays, or from how many new tokens if it saves no prefill."""
    visual, floor = row.get("visual_tokens"), row.get("floor_ms")
    if row["method"] == UNPRUNED or not visual or floor is None:
        return NOTHING
    share = row.get("share_of_saving")
    if share is not None:
        # What is spent beyond the floor is taken as fixed, what the floor saves as proportional to the tokens of the image.
        return f"{max(0.0, visual * (1 - share)):.0f} visual"
    spent = row["floor_ms"] * (1 / row["share_of_floor"] - 1) if row.get("share_of_floor") else 0.0
    saved = (row.get("decode_speedup") or 1.0) * row["decode_ms_p50"] - row["decode_ms_p50"]
    return f"{max(0.0, spent / saved):.0f} new" if saved > 0 and row["cached"] < visual else NOTHING


# ------------------------------------------------------------------ tables of models


def _settings_columns() -> list[Column]:
    return [("method", method_of), ("budget", budget_of)]


def _token_columns() -> list[Column]:
    return [("enter", number("entering", 0)), ("layers", number("layer_mean", 0)), ("cache", number("cached", 0))]


def _speed_columns() -> list[Column]:
    return [
        ("prefill ms", spread("prefill_ms")),
        ("speed-up", lambda row: between("speedup", unit="x")(row) + (", slower" if slower(row) else "")),
        ("floor's", number("floor_speedup", 2, unit="x")),
        ("of floor", percent("share_of_floor")),
        ("of saving", percent("share_of_saving", 0)),
        ("selection", percent("selection_share", 2)),
        ("break-even", break_even),
    ]


def _part_columns() -> list[Column]:
    names = ("preprocess", *(part for part in model.PARTS))
    return [(name, lambda row, name=name: short(row.get(f"{name}_ms"))) for name in names]


def _decode_columns() -> list[Column]:
    return [
        ("decode ms", spread("decode_ms")),
        ("decode x", number("decode_speedup", 2, unit="x")),
        ("same cache", between("decode_overhead", 1, 100, " %")),
        ("KV MiB", number("cache_mib", 1)),
        ("peak MiB", number("peak_mib", 0)),
    ]


LEGEND = (
    "enter, layers, cache: visual tokens of a prompt that enter the LLM, as a mean over its layers, and left in the cache. "
    "Times are of the whole batch, medians over rounds (20th to 80th percentile). speed-up: unpruned by pruned prefill of the "
    "same round, ± half of the median's 95 % interval. floor's: the speed-up that the arithmetic which is left would allow, "
    "from measured parts of the unpatched model; of floor: the share of it that is reached; of saving: of the time that the "
    "floor saves. selection: the method's own time and its signals, as a share of the unpruned prefill. break-even: visual "
    "tokens of an image, or new tokens, from which on the method pays. same cache: how much longer a new token takes than in "
    "the unpatched model whose cache has the same length. peak: on a CPU of tensors that are alive together, without weights; "
    "on a GPU of the allocator, with weights."
)


def print_models(rows: Sequence[Row], console: Console) -> None:
    """One group of tables for each model, attention kernel and batch size."""
    for title, group in grouped(rows).items():
        console.print(f"\n[bold]{title}[/bold]")
        measured = [row for row in group if not row.get("error")]
        for columns in (_speed_columns(), _token_columns() + _decode_columns(), _part_columns()):
            show(measured, _settings_columns() + columns, console, _style)
        show_errors(group, console, lambda row: f"{method_of(row)} {budget_of(row)}")
    console.print(f"[dim]{LEGEND}[/dim]")


def grouped(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of models by what they were measured on and with; of rows that were measured again, the last."""
    found: dict[str, dict[Any, Row]] = {}
    for row in rows:
        prompts = f", prompts of {row['prompt_tokens']} tokens" if row.get("prompt_tokens") else ""
        title = (
            f"{row['model']}, {row.get('dtype')}, {row.get('attention')}, batch {row.get('batch')}{prompts}, {row['device']}"
        )
        found.setdefault(title, {})[model.keys(row)] = row
    return {title: list(group.values()) for title, group in found.items()}


def _style(row: Row) -> str | None:
    if row["method"] == UNPRUNED:
        return "bold"
    return "yellow" if slower(row) else None


def slower(row: Row) -> bool:
    """Whether the method costs more time than it saves, beyond doubt. No row is hidden for that, and none is overlooked."""
    return (row.get("speedup_high") or 1.0) < 1.0


# ------------------------------------------------------------------ tables of kernels


def kernel_columns() -> list[Column]:
    def rate(row: Row) -> str:
        """What limits the operation, in its unit."""
        case = kernels.CASES.get(str(row["operation"]))
        name, unit = ("tflop_per_s", "TFLOP/s") if case and case.limit == "flops" else ("gb_per_s", "GB/s")
        value = row.get(name)
        return NOTHING if value is None else f"{value:.3g} {unit}"

    def beside(row: Row) -> str:
        times = row.get("times_beside")
        return NOTHING if times is None else f"{times:.2f} of {row['beside']}"

    return [
        ("operation", lambda row: str(row["operation"])),
        ("shape", lambda row: str(row["shape"])),
        ("variant", lambda row: str(row["variant"])),
        ("ms", spread("ms")),
        ("reference / this", number("ratio", 2, unit="x")),
        ("rate", rate),
        ("of ceiling", percent("share_of_ceiling", 0)),
        ("of a copy", percent("share_of_copy", 0)),
        ("beside", beside),
    ]


KERNEL_LEGEND = (
    "of ceiling: of the bandwidth of a large copy, or of the FLOP/s of a large matrix product, whichever limits the "
    "operation, measured in the same run; of a copy: the time of a copy that moves as many bytes, by this one's."
)


def print_kernels(rows: Sequence[Row], console: Console) -> None:
    latest = list({kernel_rows.keys(row): row for row in rows}.values())
    show([row for row in latest if not row.get("error")], kernel_columns(), console, lambda _: None)
    show_errors(latest, console, lambda row: f"{row['operation']} {row['shape']} {row['variant']}")
    console.print(f"[dim]{KERNEL_LEGEND}[/dim]")


# ------------------------------------------------------------------ how tables look


# ------------------------------------------------------------------ documents


def model_page(rows: Sequence[Row]) -> str:
    """Everything that was measured of models, with the hardware named."""
    parts = ["# Measured: speed of models\n\nWhat the columns mean, and how it is measured: [speed](../speed.md)."]
    for title, group in grouped(rows).items():
        columns = _settings_columns()
        first, second = columns + _token_columns() + _speed_columns(), columns + _part_columns() + _decode_columns()
        parts.append(f"## {title}\n\n{provenance(group)}\n\n{markdown(group, first)}\n\n{_only_table(group, second)}")
    return "\n\n".join([*parts, LEGEND]) + "\n"


def _only_table(group: Sequence[Row], columns: Sequence[Column]) -> str:
    return "Parts in ms; selection is taken out of where it happens.\n\n" + markdown(
        [row for row in group if not row.get("error")], columns
    )


def overview(rows: Sequence[Row]) -> str:
    """The speed of every group, for a page that tells more."""
    parts = []
    for title, group in grouped(rows).items():
        table = markdown(
            group, _settings_columns() + _speed_columns() + [("same cache", between("decode_overhead", 1, 100, " %"))]
        )
        parts.append(f"**{title}**\n\n{provenance(group)}\n\n{table}\n")
    return "\n".join([*parts, "Parts, memory and pictures: [models](results/speed.md).\n"])


def kernel_page(rows: Sequence[Row]) -> str:
    parts = ["# Measured: speed of kernels\n\nHow it is measured: [speed](../speed.md)."]
    parts += [f"## {title}\n\n{provenance(group)}\n\n{markdown(group, kernel_columns())}" for title, group in _by_device(rows)]
    return "\n\n".join([*parts, KERNEL_LEGEND]) + "\n"


def kernel_overview(rows: Sequence[Row]) -> str:
    """The shape of LLaVA-NeXT, or the first that there is."""
    parts = []
    for title, group in _by_device(rows):
        shapes = [row["shape"] for row in group]
        shape = TYPICAL if TYPICAL in shapes else shapes[0]
        table = markdown([row for row in group if row["shape"] == shape], kernel_columns())
        parts.append(f"**Operations, {title}**\n\n{provenance(group)}\n\n{table}\n")
    return "\n".join([*parts, "All shapes: [kernels](results/speed-kernels.md).\n"])


def _by_device(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows of kernels by machine and dtype; of those that were measured again, the last."""
    found: dict[str, dict[Any, Row]] = {}
    for row in rows:
        found.setdefault(f"{row['device']}, {row['dtype']}", {})[kernel_rows.keys(row)] = row
    return [(title, list(group.values())) for title, group in found.items()]
