"""Fits the small heads of methods, the model itself frozen: `fit` those for vision transformers, `fit_exits` DyVTE's routers.

vlprune.training.fit(vit, "dynamicvit", batches, "heads.safetensors", budget=0.5)
vlprune.apply(vit, "dynamicvit", budget=0.5, heads="heads.safetensors")
"""

from vlprune.training.exits import fit_exits
from vlprune.training.fitting import fit
from vlprune.training.objectives import Objective, objective
from vlprune.training.trainer import Batch, Trainer

__all__ = ["Batch", "Objective", "Trainer", "fit", "fit_exits", "objective"]
