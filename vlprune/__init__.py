"""vlprune: fewer visual tokens inside unmodified Hugging Face vision-language models.

>>> vlprune.apply(model, "hired", budget=0.2)
>>> model.generate(**inputs)
>>> print(vlprune.report(model))
>>> vlprune.remove(model)
"""

from vlprune.api import applied, apply, remove, report, supported_models
from vlprune.errors import (
    BudgetError,
    IncompatibleCacheError,
    NotAppliedError,
    OptionError,
    UnsupportedMethodError,
    UnsupportedModelError,
    VLPruneError,
)
from vlprune.image import ImageLayout, ImageTokens, top
from vlprune.method import Merge, Method, ScoreMethod, Selection, from_dict, register
from vlprune.method import methods as _methods
from vlprune.methods import HiRED, Pool, Random, Resize, Uniform
from vlprune.report import Report
from vlprune.signals import ClsAttention, Hidden, Keys

methods = _methods  # after the package vlprune.methods is imported, whose name the function takes here
__version__ = "0.1.0"
__all__ = [
    "BudgetError",
    "ClsAttention",
    "HiRED",
    "Hidden",
    "ImageLayout",
    "ImageTokens",
    "IncompatibleCacheError",
    "Keys",
    "Merge",
    "Method",
    "NotAppliedError",
    "OptionError",
    "Pool",
    "Random",
    "Report",
    "Resize",
    "ScoreMethod",
    "Selection",
    "Uniform",
    "UnsupportedMethodError",
    "UnsupportedModelError",
    "VLPruneError",
    "applied",
    "apply",
    "from_dict",
    "methods",
    "register",
    "remove",
    "report",
    "supported_models",
    "top",
]
