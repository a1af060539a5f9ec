"""Fits the small heads of methods for vision transformers, the model itself frozen.

vlprune.training.fit(vit, "dynamicvit", batches, "heads.safetensors", budget=0.5)
vlprune.apply(vit, "dynamicvit", budget=0.5, heads="heads.safetensors")
"""

from vlprune.training.fitting import fit
from vlprune.training.objectives import Objective, objective
from vlprune.training.trainer import Batch, Trainer

__all__ = ["Batch", "Objective", "Trainer", "fit", "objective"]
