"""The operations of the hot path: a readable reference in PyTorch beside a Triton kernel for each.

Every one is an operator of ``torch.library``, so that ``torch.compile`` and CUDA graphs go through it.
"""

from vlprune.kernels.attention_columns import attention_columns
from vlprune.kernels.attention_rows import attention_rows
from vlprune.kernels.bipartite_match import bipartite_match
from vlprune.kernels.compact_cache import compact_cache, compact_cache_
from vlprune.kernels.dispatch import unavailable, using
from vlprune.kernels.dpp_map import dpp_map
from vlprune.kernels.farthest_points import farthest_points
from vlprune.kernels.gather_rows import gather_rows
from vlprune.kernels.merge_rows import merge_rows

__all__ = [
    "attention_columns",
    "attention_rows",
    "bipartite_match",
    "compact_cache",
    "compact_cache_",
    "dpp_map",
    "farthest_points",
    "gather_rows",
    "merge_rows",
    "unavailable",
    "using",
]
