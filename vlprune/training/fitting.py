"""One call that trains the heads of a method for a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from vlprune.errors import UnsupportedModelError
from vlprune.training.objectives import objective
from vlprune.training.trainer import Batch, Trainer


def fit(
    model: nn.Module,
    method: str,
    batches: Iterable[Batch],
    out: str | Path,
    *,
    steps: int = 500,
    rate: float = 1e-3,
    seed: int = 0,
    save_every: int = 50,
    stages: Sequence[int] | None = None,
    progress: Callable[[int, dict[str, float]], None] = lambda step, statistics: None,
    **options: Any,
) -> Path:
    """Trains the heads of ``method`` (``"dynamicvit"``, ``"tnt"``, ``"vtm"``), ``model`` frozen, and saves them to ``out``.

    Args:
        model: a vision transformer that :func:`vlprune.apply` takes; it is the same afterwards, bit for bit.
        batches: whatever can be gone through several times: a ``DataLoader``, a list. A batch is pixels ``(B, 3, H, W)``, or a
            mapping of the model's arguments, or a pair of one of these and class labels. Without labels the heads learn to
            leave the model's own answers as they are.
        out: a safetensors file; while it is trained, ``out.part`` beside it holds the state that a further call goes on from.
        stages: in which blocks, from 0, the heads look; the method's own by default.
        **options: of the method's objective: ``budget`` or ``keep`` for dynamicvit, ``noise_scale`` for tnt, ``gain`` for vtm.
    """
    width, blocks = shape_of(model)
    goal = objective(method, width, blocks, None if stages is None else tuple(stages), seed, **options)
    trainer = Trainer(model, goal, out, steps=steps, rate=rate, seed=seed, save_every=save_every, progress=progress)
    trainer.run(batches)
    return Path(out)


def shape_of(model: nn.Module) -> tuple[int, int]:
    """Width of a row, and how many blocks there are."""
    import vlprune.integrations  # noqa: F401  (registers the built-in ones)
    from vlprune.engine.vit import architecture_of

    architecture = architecture_of(model)
    if architecture is None:
        raise UnsupportedModelError(f"{type(model).__name__} is no vision transformer that vlprune knows")
    return architecture.shape(model).width, len(architecture.blocks_of(model))
