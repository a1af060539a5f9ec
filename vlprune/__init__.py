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
from vlprune.image import CacheTokens, ImageLayout, ImageTokens, LayerTokens, ModelShape, VisionTokens, top
from vlprune.method import Merge, Method, Mixture, Plan, ScoreMethod, Selection, from_dict, register
from vlprune.method import methods as _methods
from vlprune.methods import (
    VTCCLS,
    DivPrune,
    FasterVLM,
    FastV,
    FlowCut,
    GlobalCom2,
    HiRED,
    HoloV,
    MustDrop,
    PiToMe,
    Pool,
    PruMerge,
    PruMergePlus,
    PyramidDrop,
    Random,
    Resize,
    SnapKV,
    ToDRE,
    ToMe,
    Uniform,
    VisionZip,
    VisPruner,
    chain,
)
from vlprune.report import Report
from vlprune.signals import (
    ClsAttention,
    ClsValues,
    Hidden,
    Keys,
    MeanAttention,
    ModuleDelta,
    QueryAttention,
    ReceivedAttention,
    Values,
)

methods = _methods  # after the package vlprune.methods is imported, whose name the function takes here
__version__ = "0.1.0"
__all__ = [
    "PruMerge",
    "PruMergePlus",
    "VTCCLS",
    "BudgetError",
    "CacheTokens",
    "ClsAttention",
    "ClsValues",
    "DivPrune",
    "FastV",
    "FasterVLM",
    "FlowCut",
    "GlobalCom2",
    "HiRED",
    "Hidden",
    "HoloV",
    "ImageLayout",
    "ImageTokens",
    "IncompatibleCacheError",
    "Keys",
    "LayerTokens",
    "MeanAttention",
    "Merge",
    "Method",
    "Mixture",
    "ModelShape",
    "ModuleDelta",
    "MustDrop",
    "NotAppliedError",
    "OptionError",
    "PiToMe",
    "Plan",
    "Pool",
    "PyramidDrop",
    "QueryAttention",
    "Random",
    "ReceivedAttention",
    "Report",
    "Resize",
    "ScoreMethod",
    "Selection",
    "SnapKV",
    "ToDRE",
    "ToMe",
    "Uniform",
    "UnsupportedMethodError",
    "UnsupportedModelError",
    "VLPruneError",
    "Values",
    "VisPruner",
    "VisionTokens",
    "VisionZip",
    "applied",
    "apply",
    "chain",
    "from_dict",
    "methods",
    "register",
    "remove",
    "report",
    "supported_models",
    "top",
]
