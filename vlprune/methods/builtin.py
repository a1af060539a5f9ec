"""All methods of this package. Importing this module registers them."""

from vlprune.methods.algm import ALGM
from vlprune.methods.apet import ApET
from vlprune.methods.ats import ATS
from vlprune.methods.baselines import Pool, Random, Resize, Uniform
from vlprune.methods.cdpruner import CDPruner
from vlprune.methods.chain import chain
from vlprune.methods.dart import DART
from vlprune.methods.diffrate import DiffRate
from vlprune.methods.divprune import DivPrune
from vlprune.methods.dynamicvit import DynamicViT
from vlprune.methods.dyvte import DyVTE
from vlprune.methods.evit import EViT
from vlprune.methods.evs import EVS
from vlprune.methods.exit import VisualExit
from vlprune.methods.fastervlm import FasterVLM
from vlprune.methods.fastv import FastV
from vlprune.methods.feather import FEATHER
from vlprune.methods.flowcut import FlowCut
from vlprune.methods.globalcom2 import GlobalCom2
from vlprune.methods.hired import HiRED
from vlprune.methods.holov import HoloV
from vlprune.methods.kv.a2sf import A2SF
from vlprune.methods.kv.criticalkv import CriticalKV
from vlprune.methods.kv.ems import EMS
from vlprune.methods.kv.h2o import H2O
from vlprune.methods.kv.keyformer import Keyformer
from vlprune.methods.kv.lookm import LookM
from vlprune.methods.kv.pyramidkv import PyramidKV
from vlprune.methods.kv.razor import RazorAttention
from vlprune.methods.kv.snapkv import SnapKV
from vlprune.methods.kv.spatten import SpAtten
from vlprune.methods.kv.tova import TOVA
from vlprune.methods.kv.vatp import VATP
from vlprune.methods.kv.vlcache import VLCache
from vlprune.methods.mctf import MCTF
from vlprune.methods.mustdrop import MustDrop
from vlprune.methods.patch_baselines import RandomPatches, UniformPatches
from vlprune.methods.pitome import PiToMe
from vlprune.methods.prumerge import PruMerge, PruMergePlus
from vlprune.methods.pyramiddrop import PyramidDrop
from vlprune.methods.scope import SCOPE
from vlprune.methods.sinks import without_sinks
from vlprune.methods.sparsevlm import SparseVLM
from vlprune.methods.tnt import TNT
from vlprune.methods.todre import ToDRE
from vlprune.methods.tofu import ToFu
from vlprune.methods.tome import ToMe
from vlprune.methods.transprune import TransPrune
from vlprune.methods.v_cast import VCAST
from vlprune.methods.vflowopt import VFlowOpt
from vlprune.methods.vid_tldr import VidTLDR
from vlprune.methods.vidcom2 import VidCom2
from vlprune.methods.visionzip import VisionZip
from vlprune.methods.vispruner import VisPruner
from vlprune.methods.vscan import VScan
from vlprune.methods.vtc_cls import VTCCLS
from vlprune.methods.vtm import VTM
from vlprune.methods.yopo import YOPO
from vlprune.methods.zero_tprune import ZeroTPrune
from vlprune.methods.zipvl import ZipVL

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
    "CDPruner",
    "CriticalKV",
    "DiffRate",
    "DivPrune",
    "DyVTE",
    "DynamicViT",
    "EViT",
    "FastV",
    "FasterVLM",
    "FlowCut",
    "GlobalCom2",
    "HiRED",
    "HoloV",
    "Keyformer",
    "LookM",
    "MustDrop",
    "PiToMe",
    "Pool",
    "PruMerge",
    "PruMergePlus",
    "PyramidDrop",
    "PyramidKV",
    "Random",
    "RandomPatches",
    "RazorAttention",
    "Resize",
    "SnapKV",
    "SpAtten",
    "SparseVLM",
    "ToDRE",
    "ToFu",
    "ToMe",
    "TransPrune",
    "Uniform",
    "UniformPatches",
    "VFlowOpt",
    "VLCache",
    "VScan",
    "VidCom2",
    "VidTLDR",
    "VisPruner",
    "VisionZip",
    "VisualExit",
    "ZeroTPrune",
    "ZipVL",
    "chain",
    "without_sinks",
]
