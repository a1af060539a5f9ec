"""What the site says of methods and model families, from the code."""

from __future__ import annotations

import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import vlprune
from vlprune import cli, listing, shell
from vlprune.engine.family import Family
from vlprune.engine.vit.architecture import Architecture, architectures
from vlprune.method import Method

DOCS = Path(__file__).parents[1]
WHERE = {
    "encode": "inside the vision encoder",
    "select": "between encoder and LLM",
    "prefill": "before LLM layers",
    "evict": "in the KV cache",
    "reduce": "in every block of a vision transformer",
}
SERVES = {"vlm": "vision-language models", "vit": "vision transformers on their own"}


def made() -> dict[str, str]:
    """Path below the site's root -> text of each page that is made from the code alone."""
    found: dict[str, str] = {}
    for one in vlprune.supported_models():
        found[_path(one.name)] = _family(one)
    for one in architectures():
        found[_path(one.name)] = _architecture(one)
    for name, cls in listing.all_methods().items():
        if not (DOCS / "methods" / f"{name}.md").exists():
            found[f"methods/{name}.md"] = f"# {cls.__name__}\n"
    return found


def filled(text: str) -> str:
    """A written page with what is made from the code at its marks: ``<!-- made: NAME ... -->``."""
    makers = {"methods": _methods, "families": _families, "commands": _commands}
    return re.sub(r"<!-- made: (\w+)[^>]*-->", lambda found: makers[found[1]](), text)


def method_nav() -> list[Any]:
    """The pages of methods by what they are for, and behind them those that several methods share."""
    vlm, known = vlprune.methods(), {*described(), "index"}
    alone = [name for name in vlprune.methods("vit") if name not in vlm]
    shared = sorted(page.stem for page in (DOCS / "methods").glob("*.md") if page.stem not in known)
    return [
        {"For vision-language models": [f"methods/{name}.md" for name in vlm]},
        {"For vision transformers": [f"methods/{name}.md" for name in alone]},
        {"Background": [*(f"methods/{name}.md" for name in shared), "learned-heads.md"]},
    ]


def family_nav() -> list[Any]:
    return [
        {"Vision-language models": [_path(one.name) for one in vlprune.supported_models()]},
        {"Vision transformers": [_path(one.name) for one in architectures()]},
    ]


def _path(name: str) -> str:
    return f"families/{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.md"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _facts_table(rows: list[list[str]]) -> str:
    """A table without a heading, which the style sheet knows."""
    return f'<div class="facts" markdown="1">\n\n{_table(["", ""], rows)}\n\n</div>'


# ------------------------------------------------------------------ methods


@cache
def described() -> dict[str, dict[str, Any]]:
    return {name: listing.described(name, cls) for name, cls in listing.all_methods().items()}


def method(name: str, written: str) -> str:
    """The page of a method: what is written, what its class says below the title, and its reference at the end."""
    cls = listing.all_methods()[name]
    title, _, rest = written.partition("\n")
    reference = f"## Reference\n\n::: {cls.__module__}.{cls.__name__}\n"
    return f"{title}\n\n{_facts(name, cls)}\n\n{rest}\n\n{reference}"


def _facts(name: str, cls: type[Method]) -> str:
    known = described()[name]
    count = "depends on the content" if known["adaptive"] else "known before the pixels are seen"
    rows = [
        ["prunes", "; ".join(f"{WHERE[stage]} (`{stage}`)" for stage in known["stages"])],
        ["for", ", ".join(SERVES[kind] for kind in known["serves"])],
        ["families", _taking(known)],
        ["budget", f"{_number(known['budget'])} by default; how many tokens are kept is {count}"],
        ["measures", ", ".join(f"`{signal}`" for signal in known["needs"]) or "nothing beside the features"],
        ["paper", _linked(known["paper"] or "none: a baseline")],
    ]
    return f"*{known['summary']}*\n\n" + _facts_table(rows)


def _taking(known: dict[str, Any]) -> str:
    """Families that have all stages of the method, or those that lack one where they are fewer."""
    if known["serves"] == ["vit"]:
        return ", ".join(_link(one.name) for one in architectures())
    lacking = [one.name for one in vlprune.supported_models() if not set(known["stages"]) <= set(one.stages)]
    return f"all but {', '.join(map(_link, lacking))}" if lacking else "[all](../families/index.md)"


def _methods() -> str:
    rows = [
        [
            f"[{name}]({name}.md)",
            known["summary"],
            ", ".join(f"`{stage}`" for stage in known["stages"]),
            "by content" if known["adaptive"] else "known",
            _linked(known["paper"] or "baseline"),
        ]
        for name, known in described().items()
    ]
    stages = _table(["stage", "where"], [[f"`{stage}`", where] for stage, where in WHERE.items()])
    return f"{_table(['name', 'what it keeps', 'stages', 'count', 'paper'], rows)}\n\n{stages}\n"


def _number(budget: float | int) -> str:
    return f"{budget:.3g}" if isinstance(budget, float) else str(budget)


def _linked(text: str) -> str:
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


# ------------------------------------------------------------------ families


def _link(name: str) -> str:
    return f"[{name}](../{_path(name)})"


def _families() -> str:
    rows = [
        [
            _link(one.name),
            _types(one),
            "yes" if one.video_layouts else "–",
            ", ".join(f"`{s}`" for s in one.stages),
            _counted(one),
        ]
        for one in vlprune.supported_models()
    ]
    alone = [[_link(one.name), _types(one)] for one in architectures()]
    return (
        f"{_table(['family', 'model types', 'videos', 'stages', 'what counts as an image'], rows)}\n\n"
        "## Vision transformers on their own\n\nClassifiers and image towers, for methods of the stage `reduce`.\n\n"
        f"{_table(['architecture', 'model types, classes'], alone)}\n"
    )


def _types(one: Family | Architecture) -> str:
    return ", ".join(f"`{name}`" for name in one.model_types)


def _counted(one: Family) -> str:
    """From the table in README: what a budget is for."""
    for line in (DOCS.parent / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and one.name in (name.strip().replace(" 1.5", "") for name in cells[0].split(",")):
            return cells[3]
    raise LookupError(f"README.md has no row for {one.name}")


def _family(one: Family) -> str:
    rows = [
        ["model types", _types(one)],
        ["stages", ", ".join(f"{WHERE[stage]} (`{stage}`)" for stage in one.stages)],
        ["images", _counted(one)],
        [
            "videos",
            "yes: one is an image whose tiles are its frames" if one.video_layouts else "as far as they come as images",
        ],
        ["vision encoders", ", ".join(f"`{name}`" for name in one.vision_types)],
        ["tested with", f"transformers {', '.join(one.tested)}" if one.tested else "–"],
    ]
    notes = "".join(f"- {note}\n" for note in _notes(one))
    methods = [name for name, known in described().items() if "vlm" in known["serves"]]
    able = [f"[{name}](../methods/{name}.md)" for name in methods if set(described()[name]["stages"]) <= set(one.stages)]
    module = one.layouts.__module__
    return (
        f"# {one.name}\n\n{_facts_table(rows)}\n\n## Good to know\n\n{notes}\n"
        f"## Methods\n\n{', '.join(able)}.\n\n## Described by\n\n`{module}`: data and functions of shapes, no forward.\n\n"
        f"::: {module}\n    options:\n      show_root_heading: false\n      show_root_toc_entry: false\n"
        "      show_if_no_docstring: true\n      filters: ['!^_', '!^[A-Z_0-9]+$']\n"
    )


def _notes(one: Family) -> list[str]:
    """What the family's data mean for a user."""
    with_cls = set(one.cls_types) & set(one.vision_types)
    notes = [
        ("Its vision encoder has [CLS], unless it is SigLIP's.", with_cls and set(one.vision_types) - with_cls),
        ("Its vision encoder has [CLS].", with_cls and not set(one.vision_types) - with_cls),
        ("Its vision encoder has no [CLS]; what stands in for its attention, each method's page says.", not with_cls),
        ("Tokens cannot leave inside the vision encoder: methods with `encode` are refused.", "encode" not in one.stages),
        ("The method `resize` is refused: the encoder wants a full grid of one size.", not one.resizable),
        ("Images of any size, all patches in one row.", one.packed),
        ("The projector takes several patches at once, so it always computes the full grid.", not one.pointwise),
        ("Layers with a sliding window forget by themselves; their caches are not evicted.", one.sliding),
    ]
    return [note for note, holds in notes if holds] or ["Nothing out of the ordinary."]


def _architecture(one: Architecture) -> str:
    methods = [name for name, known in described().items() if "vit" in known["serves"]]
    rows = [
        ["model types, classes", _types(one)],
        ["blocks at", ", ".join(f"`{path}`" for path in one.blocks)],
        ["stages", f"{WHERE['reduce']} (`reduce`)"],
        ["methods", ", ".join(f"[{name}](../methods/{name}.md)" for name in methods)],
    ]
    return (
        f"# {one.name}\n\nA vision transformer on its own.\n\n{_facts_table(rows)}\n\n"
        "When a method is applied, each block runs on a few random rows: unless its parts give, bit for bit, what it gives "
        "itself, the model is refused by name. [How this works](../architecture.md#vision-transformers-on-their-own).\n"
    )


# ------------------------------------------------------------------ command line


def _commands() -> str:
    """What each command does, its example, its arguments and options."""
    return "\n\n".join(_command(words, command) for words, command in shell.every(cli.COMMANDS).items())


def _command(words: str, command: Any) -> str:
    told, _, example = inspect.cleandoc(command.help).partition("Example: ")
    rows = [[_spelled(one), escape(one.help or ""), _default(one)] for one in command.params if one.name != "help"]
    columns = 3 if any(default for *_, default in rows) else 2
    options = f"\n\n{_table(['option', 'meaning', 'default'][:columns], [row[:columns] for row in rows])}" if rows else ""
    return f"## {words}\n\n{told.strip()}\n\n```sh\n{example.strip()}\n```{options}"


def _spelled(one: Any) -> str:
    names = [*one.opts, *one.secondary_opts]
    return ", ".join(f"`{name}`" for name in names) if one.param_type_name == "option" else f"`{one.name.upper()}`"


def _default(one: Any) -> str:
    shown = getattr(one, "show_default", None)
    value = shown if isinstance(shown, str) else one.default
    return f"`{value}`" if isinstance(value, str | int | float | Path) and not isinstance(value, bool) else ""


def escape(text: str) -> str:
    """Text of a help, where brackets are escaped for the terminal, in a cell of a table."""
    return text.replace("\\[", "[").replace("|", "\\|").replace("[", "\\[")
