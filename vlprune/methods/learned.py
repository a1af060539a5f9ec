"""What methods with learned heads share: heads in a safetensors file, and dropping by their scores in a few blocks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vlprune.blocks import BlockMethod, BlockTokens
from vlprune.config import weights
from vlprune.errors import OptionError
from vlprune.methods.assigning import lowest, numbered, staying
from vlprune.schedule import quarters, staged


class BlockHeads(nn.Module):
    """Heads that look at rows of some blocks: one for each of ``stages``, blocks from 0, of a model of rows of ``width``."""

    method: ClassVar[str] = ""
    """The name of the method that uses them."""

    def __init__(self, width: int, stages: Sequence[int]):
        super().__init__()
        self.width, self.stages = width, tuple(sorted(set(stages)))

    @classmethod
    def default_stages(cls, blocks: int) -> tuple[int, ...]:
        """The stages of a model of so many blocks: a quarter, half and three quarters of the depth."""
        return tuple(quarters(blocks))

    def scores(self, tokens: BlockTokens, keep: Tensor | None = None) -> Tensor:
        """Scores ``(B, N - prefix)`` of the rows that are not protected, higher is better.

        ``keep`` of the same shape: 1 for rows that are still there; None: all.
        """
        raise NotImplementedError(f"{type(self).__name__} has no scores()")

    @property
    def settings(self) -> dict[str, Any]:
        """What the class is called with to make such heads again."""
        return {"width": self.width, "stages": list(self.stages)}

    def save(self, path: str | Path) -> None:
        """Weights as safetensors; name and settings are in the file's metadata."""
        told = {"method": self.method, "settings": json.dumps(self.settings)}
        save_file({name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}, path, told)

    @classmethod
    def load(cls, path: str | Path) -> BlockHeads:
        """Raises :class:`OptionError` for a file that holds no such heads."""
        try:
            with safe_open(path, "pt") as file:
                told = file.metadata() or {}
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        except (OSError, SafetensorError) as error:
            raise OptionError(f"heads={str(path)!r} cannot be read: {error}") from error
        if told.get("method") != cls.method:
            raise OptionError(f"heads={str(path)!r} are heads of {told.get('method') or 'no method'}, not of {cls.method}")
        heads = cls(**json.loads(told["settings"]))
        heads.load_state_dict(weights)
        return heads.eval().requires_grad_(False)


@dataclass(kw_only=True)
class LearnedMethod(BlockMethod):
    """A method that drops rows in a few blocks by the scores of heads that were trained for the model at hand.

    :func:`vlprune.training.fit` trains them with the model frozen. In which blocks they look stands in their file.
    """

    kind: ClassVar[type[BlockHeads]] = BlockHeads
    budget: int | float = 0.5
    heads: str = ""
    """File that :func:`vlprune.training.fit` wrote, or the name of heads that come along (``tinyvit-tnt``); no default, for
    heads fit one model."""
    proportional: bool = False
    keep: float | None = None
    """Share of the rows left that each of the heads keeps, in place of the budget."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.heads = str(self.heads)
        if not self.heads:
            raise OptionError(
                f"{self.name} needs heads that were trained for the model: vlprune.training.fit(model, {self.name!r}, "
                "batches, 'heads.safetensors') trains them, heads='heads.safetensors' names them"
            )
        if self.keep is not None and not 0 < self.keep <= 1:
            raise OptionError(f"keep={self.keep!r}: allowed is a number above 0, up to 1, and None")
        self._heads = self.kind.load(weights(self.heads))

    def counts(self, tokens: int, blocks: int) -> list[int]:
        if self._heads.stages and self._heads.stages[-1] >= blocks:
            raise OptionError(
                f"heads={self.heads!r} look at block {self._heads.stages[-1]}, and this model has {blocks} blocks"
            )
        return staged(self.budget, tokens, blocks, self._heads.stages, self.keep)

    def scores(self, tokens: BlockTokens) -> Tensor:
        """``(B, N - prefix)`` float32."""
        width = tokens.hidden.shape[-1]
        if width != self._heads.width:
            raise OptionError(f"heads={self.heads!r} are for rows of width {self._heads.width}, and this model's have {width}")
        if next(self._heads.parameters()).device != tokens.hidden.device:
            self._heads.to(tokens.hidden.device)
        with torch.autocast(tokens.hidden.device.type, enabled=False):
            return self._heads.scores(tokens)

    @property
    def drops(self) -> bool:
        return True

    def reduce(self, tokens: BlockTokens) -> Tensor:
        leaves = lowest(with_protected(self.scores(tokens), tokens.prefix), tokens.prefix, tokens.leaving)
        return numbered(staying(tokens.hidden).masked_fill(leaves, -1))


def with_protected(scores: Tensor, prefix: int) -> Tensor:
    """``scores (B, n)`` of rows that are not protected, with infinity for those that are: ``(B, prefix + n)``."""
    return torch.cat([scores.new_full((scores.shape[0], prefix), torch.inf), scores], 1)
