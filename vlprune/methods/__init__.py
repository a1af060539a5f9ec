"""The methods, one file each. Importing this package registers them."""

from vlprune.methods.baselines import Pool, Random, Resize, Uniform
from vlprune.methods.hired import HiRED

__all__ = ["HiRED", "Pool", "Random", "Resize", "Uniform"]
