"""The command ``vlprune``."""

from __future__ import annotations

import importlib.util
import sys

NEEDED = ("typer", "rich", "matplotlib", "PIL")
INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended, as shells have it."""


def main() -> None:
    """Runs the command line, or says which extra it needs."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f'vlprune: the command line needs {", ".join(missing)}: pip install "vlprune[evals]"')
    try:
        from vlprune.bench.commands import app as bench
        from vlprune.evals.commands import app
        from vlprune.evals.recipes.commands import recipe
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    app.add_typer(bench, name="bench")
    app.command("recipe")(recipe)
    app(prog_name="vlprune")


if __name__ == "__main__":
    main()
