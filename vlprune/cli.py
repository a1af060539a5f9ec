"""The command ``vlprune``."""

from __future__ import annotations

import importlib.util
import sys

NEEDED = ("typer", "rich", "matplotlib", "PIL")


def main() -> None:
    """Runs the command line, or says which extra it needs."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f'vlprune: the command line needs {", ".join(missing)}: pip install "vlprune[evals]"')
    from vlprune.evals.commands import app

    app(prog_name="vlprune")


if __name__ == "__main__":
    main()
