"""From rows to tables: for the terminal while it is measured, and for documents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from vlprune.bench import kernel_rows, kernels, model
from vlprune.bench.journal import Row
from vlprune.evals.settings import UNPRUNED

if TYPE_CHECKING:
    from rich.console import Console

Column = tuple[str, Callable[[Row], str]]
TYPICAL = "llava-next"
NOTHING = "–"
"""Stands for what was not measured."""

# ------------------------------------------------------------------ cells


def _number(name: str, digits: int = 1, factor: float = 1.0, unit: str = "") -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        value = row.get(name)
        return NOTHING if value is None else f"{factor * value:.{digits}f}{unit}"

    return cell


def _percent(name: str, digits: int = 1) -> Callable[[Row], str]:
    return _number(name, digits, 100, " %")


def _between(name: str, digits: int = 2, factor: float = 1.0, unit: str = "") -> Callable[[Row], str]:
    """A median with half of its 95 % interval."""

    def cell(row: Row) -> str:
        value, low, high = (row.get(f"{name}{end}") for end in ("", "_low", "_high"))
        if value is None or low is None or high is None:
            return NOTHING
        return f"{factor * value:.{digits}f}{unit} ± {factor * (high - low) / 2:.{digits}f}"

    return cell


def _spread(name: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        low, middle, high = (row.get(f"{name}_p{share}") for share in (20, 50, 80))
        return NOTHING if middle is None else f"{_short(middle)} ({_short(low)}–{_short(high)})"

    return cell


def _short(value: Any) -> str:
    """Three digits, as many as a time is worth."""
    if value is None:
        return NOTHING
    digits = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 0.1 else 4
    return f"{value:.{digits}f}"


def _method(row: Row) -> str:
    return f"{row['method']} again" if row.get("repeat") else str(row["method"])


def _budget(row: Row) -> str:
    return NOTHING if row["method"] == UNPRUNED else str(row["budget"])


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
    return [("method", _method), ("budget", _budget)]


def _token_columns() -> list[Column]:
    return [("enter", _number("entering", 0)), ("layers", _number("layer_mean", 0)), ("cache", _number("cached", 0))]


def _speed_columns() -> list[Column]:
    return [
        ("prefill ms", _spread("prefill_ms")),
        ("speed-up", lambda row: _between("speedup", unit="x")(row) + (", slower" if slower(row) else "")),
        ("floor's", _number("floor_speedup", 2, unit="x")),
        ("of floor", _percent("share_of_floor")),
        ("of saving", _percent("share_of_saving", 0)),
        ("selection", _percent("selection_share", 2)),
        ("break-even", break_even),
    ]


def _part_columns() -> list[Column]:
    names = ("preprocess", *(part for part in model.PARTS))
    return [(name, lambda row, name=name: _short(row.get(f"{name}_ms"))) for name in names]


def _decode_columns() -> list[Column]:
    return [
        ("decode ms", _spread("decode_ms")),
        ("decode x", _number("decode_speedup", 2, unit="x")),
        ("same cache", _between("decode_overhead", 1, 100, " %")),
        ("KV MiB", _number("cache_mib", 1)),
        ("peak MiB", _number("peak_mib", 0)),
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
            _print(measured, _settings_columns() + columns, console, _style)
        _print_errors(group, console, lambda row: f"{_method(row)} {_budget(row)}")
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
        ("ms", _spread("ms")),
        ("reference / this", _number("ratio", 2, unit="x")),
        ("rate", rate),
        ("of ceiling", _percent("share_of_ceiling", 0)),
        ("of a copy", _percent("share_of_copy", 0)),
        ("beside", beside),
    ]


KERNEL_LEGEND = (
    "of ceiling: of the bandwidth of a large copy, or of the FLOP/s of a large matrix product, whichever limits the "
    "operation, measured in the same run; of a copy: the time of a copy that moves as many bytes, by this one's."
)


def print_kernels(rows: Sequence[Row], console: Console) -> None:
    latest = list({kernel_rows.keys(row): row for row in rows}.values())
    _print([row for row in latest if not row.get("error")], kernel_columns(), console, lambda _: None)
    _print_errors(latest, console, lambda row: f"{row['operation']} {row['shape']} {row['variant']}")
    console.print(f"[dim]{KERNEL_LEGEND}[/dim]")


# ------------------------------------------------------------------ how tables look


def _print(rows: Sequence[Row], columns: Sequence[Column], console: Console, style: Callable[[Row], str | None]) -> None:
    """A table, in full: where the terminal is too narrow it breaks lines, and no number is cut off."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1))
    for index, (heading, _) in enumerate(columns):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(escape(cell(row)) for _, cell in columns), style=style(row))
    needed, width = table.__rich_measure__(console, console.options.update(max_width=1000)).maximum, console.width
    console.width = max(width, needed)
    console.print(table)
    console.width = width


def _print_errors(rows: Sequence[Row], console: Console, name: Callable[[Row], str]) -> None:
    from rich.markup import escape

    for row in rows:
        if row.get("error"):
            console.print(f"[red]{escape(name(row))}: {escape(str(row['error']))}[/red]")


# ------------------------------------------------------------------ documents


def markdown(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    lines = [_line([heading for heading, _ in columns]), _line(["---"] + ["---:"] * (len(columns) - 1))]
    lines += [_line([cell(row) for _, cell in columns]) for row in rows if not row.get("error")]
    failed = [
        f"- {row.get('method') or row.get('operation')} {_what(row)}: {row['error']}" for row in rows if row.get("error")
    ]
    return "\n".join(lines + (["", "Not measured:", "", *failed] if failed else []))


def _what(row: Row) -> str:
    return str(row["budget"]) if "method" in row else f"{row['shape']}, {row['variant']}"


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
            group, _settings_columns() + _speed_columns() + [("same cache", _between("decode_overhead", 1, 100, " %"))]
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


def provenance(rows: Sequence[Row]) -> str:
    """Hardware, versions, commit, date and command of rows, each of them once."""

    def all_of(name: str) -> str:
        return " and ".join(dict.fromkeys(str(row[name]) for row in rows if row.get(name) is not None))

    cores = f" ({all_of('cores')} cores, {all_of('threads')} threads)" if all_of("cores") else ""
    versions = ", ".join(f"{name} {all_of(name)}" for name in ("vlprune", "torch", "transformers", "triton") if all_of(name))
    dates = sorted({str(row["date"])[:10] for row in rows})
    commands = " and ".join(f"`{command}`" for command in dict.fromkeys(str(row["command"]) for row in rows))
    days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{all_of('device')}{cores}; {versions}, commit {all_of('commit')}; {days}; {commands}."


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
