"""``accelerate launch -m vlprune.evals eval ...`` shares an evaluation among processes; else it is ``vlprune eval``."""

from vlprune.evals.commands import app

if __name__ == "__main__":
    app(prog_name="python -m vlprune.evals")
