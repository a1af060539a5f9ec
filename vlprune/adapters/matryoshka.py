"""Matryoshka queries: a projector that gives as many visual tokens as are asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprune.adapters.checkpoints import projector_tensors
from vlprune.errors import OptionError

WANTED = ("query", "pos_embed", "proj", "attn.in_proj_weight", "ln_q.weight", "ln_k.weight", "ln_v.weight")


class MatryoshkaQueries(nn.Module):
    """The projector of the Matryoshka Query Transformer (Hu et al., NeurIPS 2024, arXiv:2405.19315).

    The first ``count`` of its queries attend once to the encoder's patches, and a matrix brings the result to the LLM's
    width. Training with prefixes of random length puts what matters most first, so ``count`` may be changed at any time, from
    1 to the number of queries (256 in the published models). It stands in for LLaVA's projector: ``(B, patches, width)`` of
    the encoder's patches in, ``(B, count, hidden)`` out. Patches lie in a square.

    Keys hold positions alone, values the patches: position tables of the queries, resized to the patches' grid.
    """

    def __init__(self, queries: int, width: int, hidden: int, count: int | None = None, heads: int = 16):
        super().__init__()
        self.query = nn.Parameter(torch.empty(queries, width).normal_(std=0.02))
        self.pos_embed = nn.Parameter(torch.zeros(queries, width), requires_grad=False)
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_q, self.ln_k, self.ln_v = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.proj = nn.Parameter(torch.empty(width, hidden).normal_(std=hidden**-0.5))
        self.count = queries if count is None else count

    @classmethod
    def from_checkpoint(cls, tensors: Mapping[str, Tensor], count: int | None = None, heads: int = 16) -> MatryoshkaQueries:
        """From the tensors of a checkpoint of MQT-LLaVA, whole or ``mm_projector.bin`` alone. ``count``: None for all."""
        own = projector_tensors(tensors, WANTED)
        (queries, width), hidden = own["query"].shape, own["proj"].shape[1]
        projector = cls(queries, width, hidden, count, heads).to(own["proj"].dtype)
        projector.load_state_dict(own)
        return projector.eval()

    @property
    def count(self) -> int:
        """Visual tokens of an image."""
        return self._count

    @count.setter
    def count(self, count: int) -> None:
        if not 1 <= count <= len(self.query):
            raise OptionError(f"count={count!r}: allowed are 1 to {len(self.query)} visual tokens of an image")
        self._count = count

    def forward(self, patches: Tensor) -> Tensor:
        batch = patches.shape[0]
        queries = self.ln_q(self.query[: self.count] + self.pos_embed[: self.count].to(self.query.dtype))
        keys = self.ln_k(self._positions(patches.shape[1]))
        queries, keys = (rows[:, None].expand(-1, batch, -1) for rows in (queries, keys))
        found, _ = self.attn(queries, keys, self.ln_v(patches).transpose(0, 1), need_weights=False)
        return found.transpose(0, 1) @ self.proj

    def _positions(self, patches: int) -> Tensor:
        """The queries' table ``(queries, width)`` resized to the grid of the patches: ``(patches, width)``."""
        side, target = math.isqrt(len(self.pos_embed)), math.isqrt(patches)
        if target**2 != patches:
            raise OptionError(f"{patches} patches: allowed are those of a square image")
        table = self.pos_embed.float().view(1, side, side, -1).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=(target, target), mode="bicubic", align_corners=False)
        return table.flatten(2)[0].T.to(self.query.dtype)
