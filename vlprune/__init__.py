"""vlprune: fewer visual tokens inside unmodified Hugging Face vision-language models.

>>> vlprune.apply(model, "hired", budget=0.2)
>>> model.generate(**inputs)
>>> print(vlprune.report(model))
>>> vlprune.remove(model)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import vlprune.methods  # noqa: F401  (now, since the name is to be a function's)
from vlprune.api import applied, apply, assignment, remove, report, supported_models
from vlprune.assignments import merge, unmerge
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
from vlprune.report import Report
from vlprune.signals import (
    AttentionColumns,
    AttentionSupport,
    ClsAttention,
    ClsValues,
    GlobalAttention,
    Hidden,
    Keys,
    MeanAttention,
    ModuleDelta,
    QueryAttention,
    ReceivedAttention,
    SinkShare,
    Transition,
    Values,
)

if TYPE_CHECKING:
    from vlprune.methods.builtin import *  # noqa: F403

methods = _methods
__version__ = "0.1.0"
__all__ = [
    "A2SF",
    "ALGM",
    "ATS",
    "DART",
    "EMS",
    "EVS",
    "FEATHER",
    "H2O",
    "MCTF",
    "SCOPE",
    "TNT",
    "TOVA",
    "VATP",
    "VCAST",
    "VTCCLS",
    "VTM",
    "YOPO",
    "ApET",
    "AttentionColumns",
    "AttentionSupport",
    "BudgetError",
    "CDPruner",
    "CacheTokens",
    "ClsAttention",
    "ClsValues",
    "CriticalKV",
    "DiffRate",
    "DivPrune",
    "DyVTE",
    "DynamicViT",
    "EViT",
    "FastV",
    "FasterVLM",
    "FlowCut",
    "GlobalAttention",
    "GlobalCom2",
    "HiRED",
    "Hidden",
    "HoloV",
    "ImageLayout",
    "ImageTokens",
    "IncompatibleCacheError",
    "Keyformer",
    "Keys",
    "LayerTokens",
    "LookM",
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
    "PruMerge",
    "PruMergePlus",
    "PyramidDrop",
    "PyramidKV",
    "QueryAttention",
    "Random",
    "RandomPatches",
    "RazorAttention",
    "ReceivedAttention",
    "Report",
    "Resize",
    "ScoreMethod",
    "Selection",
    "SinkShare",
    "SnapKV",
    "SpAtten",
    "SparseVLM",
    "ToDRE",
    "ToFu",
    "ToMe",
    "TransPrune",
    "Transition",
    "Uniform",
    "UniformPatches",
    "UnsupportedMethodError",
    "UnsupportedModelError",
    "VFlowOpt",
    "VLCache",
    "VLPruneError",
    "VScan",
    "Values",
    "VidCom2",
    "VidTLDR",
    "VisPruner",
    "VisionTokens",
    "VisionZip",
    "VisualExit",
    "ZeroTPrune",
    "ZipVL",
    "applied",
    "apply",
    "assignment",
    "chain",
    "from_dict",
    "merge",
    "methods",
    "register",
    "remove",
    "report",
    "supported_models",
    "top",
    "unmerge",
    "without_sinks",
]


def __getattr__(name: str) -> Any:
    """Classes of methods, which are imported when the first of them is asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Not from vlprune.methods, where a submodule may have the name of what it defines: chain.
    return getattr(import_module("vlprune.methods.builtin"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
