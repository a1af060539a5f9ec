"""The command ``vlprune``.

What a command needs is imported when it is called, so that ``vlprune --help`` and shell completion wait for none of them.
"""

from __future__ import annotations

import importlib.util
import sys

NEEDED = ("typer", "rich", "matplotlib", "PIL")
COMMANDS = {
    "methods": ("vlprune.listing:methods", "Lists the methods."),
    "models": ("vlprune.listing:models", "Lists the families of models that can be pruned."),
    "demo": ("vlprune.demos.commands:demo", "Shows in a browser what methods keep of an image, and what that saves."),
    "explain": ("vlprune.demos.commands:explain", "Answers with and without a method, and pictures what it keeps."),
    "eval": ("vlprune.evals.commands:evaluate", "Measures accuracy, time and memory of methods at budgets."),
    "eval-vit": ("vlprune.evals.tinyvit.command:evaluate", "Measures methods for vision transformers with TinyViT."),
    "report": ("vlprune.evals.commands:report", "Makes tables and pictures from the rows of runs."),
    "recipe": ("vlprune.evals.recipes.commands:recipe", "Tells what to run for a main table of the field."),
    "calibrate": ("vlprune.calibrate.command:calibrate", "Finds a method's settings for a model on your own data."),
    "bench": ("vlprune.bench.commands:app", "Measures speed: of operations, of models under methods and budgets."),
}
"""Name -> the function or the typer application that it stands for, and a line for ``vlprune --help``."""


def main() -> None:
    """Runs the command line, or says which extra it needs."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f'vlprune: the command line needs {", ".join(missing)}: pip install "vlprune[evals]"')
    from vlprune.shell import application

    application(COMMANDS)(prog_name="vlprune")


if __name__ == "__main__":
    main()
