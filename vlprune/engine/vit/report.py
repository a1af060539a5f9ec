"""What a forward of a vision transformer merged, and what that saved."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from vlprune.engine.vit.patch import VitPatch


@dataclass(frozen=True)
class VitReport:
    """The last forward of a vision transformer.

    ``total``: rows of an image, ``prefix`` protected ones besides. ``counts``: rows behind each block's merge, protected ones
    not counted; ``layer_mean`` their mean. ``assignment``: for each image and each of its rows, protected ones first, the row
    behind the last block that stands for it. ``flops``: multiplications and additions of the linear layers and of attention in
    the blocks, for the whole batch; what the method itself computes is not among them.
    """

    method: dict[str, Any]
    total: int
    prefix: int
    counts: list[int]
    layer_mean: float
    assignment: list[list[int]]
    flops: int
    flops_unpruned: int

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        knobs = ", ".join(f"{k}={v}" for k, v in self.method.items() if k != "method")
        return "\n".join(
            [
                f"{self.method['method']} ({knobs})",
                f"rows behind each block: {' '.join(map(str, self.counts))}",
                f"mean {self.layer_mean:g} of {self.total} ({self.layer_mean / max(1, self.total):.1%})",
                f"GFLOPs: {self.flops / 1e9:.3g} of {self.flops_unpruned / 1e9:.3g} "
                f"({self.flops / max(1, self.flops_unpruned):.1%})",
            ]
        )

    @classmethod
    def of(cls, patch: VitPatch) -> VitReport:
        run = patch.run
        counts = [rows - run.prefix for rows in run.rows]
        last = run.maps[run.blocks]
        unpruned = [run.rows[0]] * (run.blocks + 1)
        return cls(
            method=patch.method.to_dict(),
            total=counts[0],
            prefix=run.prefix,
            counts=counts[1:],
            layer_mean=sum(counts[1:]) / run.blocks,
            assignment=[list(range(run.rows[0]))] * run.batch if last is None else last.tolist(),
            flops=run.batch * _flops(patch, run.rows),
            flops_unpruned=run.batch * _flops(patch, unpruned),
        )


def _flops(patch: VitPatch, rows: list[int]) -> int:
    """Of the blocks, where block ``i`` is given ``rows[i]`` rows and its MLP ``rows[i + 1]``."""
    total = 0
    for state, block in zip(patch.states, patch.blocks, strict=True):
        before, after = rows[state.index], rows[state.index + 1]
        attention = _linear(block, (state.layout.attention, *state.layout.after))
        total += (
            2 * before * attention + 2 * after * _linear(block, state.layout.mlp) + 4 * before * before * patch.shape.width
        )
    return total


def _linear(block: nn.Module, paths: tuple[str, ...]) -> int:
    """Multiplications of the linear layers at and below ``paths``, for one row."""
    layers = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    return sum(
        layer.in_features * layer.out_features
        for name, layer in layers.items()
        if any(f"{name}.".startswith(f"{path}.") for path in paths)
    )
