"""ApET: tokens that a few others do not explain, and these few; the rest is merged into the former."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlprune.errors import OptionError
from vlprune.image import ImageTokens, ModelShape, top
from vlprune.kernels import bipartite_match
from vlprune.knobs import Draw
from vlprune.method import Merge, Method, Selection, register


@register("apet")
@dataclass(kw_only=True)
class ApET(Method):
    """Approximation-Error guided token compression: what a few basis tokens cannot approximate is kept.

    ``basis`` tokens S are as far from each other as can be: the first is drawn, each further one has the largest Euclidean
    distance to its nearest predecessor. All others are approximated by their ridge regression on S, ``x S' (S S' + 1e-5
    I)^-1 S``, and ``T - basis`` of them are kept, those with the largest error. What leaves joins the kept one with the
    highest cosine, which becomes the mean of all of them; basis tokens stay as they are. Of ``T <= basis`` all are basis.
    All projected tokens of the image take part, row ends included. Looks neither at attention nor at the text.

    ``basis``: how many tokens approximate the others. ``seed``: of the first one.

    Deviations from the official code: the first basis token is the same in each run; kept tokens keep their order and
    positions. Errors are compared in units of 1e-5 of the longest token, of equal ones the lowest index goes first. The second
    stage, the same inside the LLM, is not here.
    """

    paper: ClassVar[str] = "ApET, CVPR 2026, arXiv:2602.19870"

    budget: int | float = 1 / 9
    basis: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.basis) is not int or self.basis < 1:
            raise OptionError(f"basis={self.basis!r}: allowed is an int >= 1")

    @classmethod
    def knobs(cls, draw: Draw, shape: ModelShape) -> dict[str, Any]:
        return {"basis": draw.whole("basis", 1, 64)}

    def select(self, image: ImageTokens) -> Selection:
        rows, count = image.features.float().nan_to_num(), image.count
        basis = _far_apart(rows, min(self.basis, count), self._first(rows.shape[0]))
        kept = basis
        if count > basis.shape[0]:
            errors = _errors(rows, basis).index_fill(0, basis, -torch.inf)
            kept = torch.cat([basis, top(errors, count - basis.shape[0])])
        keep = kept.sort().values
        return Selection(keep, self._merge(rows, keep, kept[basis.shape[0] :]))

    def _first(self, total: int) -> int:
        return int(torch.randint(total, (1,), generator=torch.Generator().manual_seed(self.seed)))

    @staticmethod
    def _merge(rows: Tensor, keep: Tensor, centres: Tensor) -> Merge | None:
        """What leaves joins the most similar of ``centres``, which are among ``keep``."""
        if centres.shape[0] == 0:
            return None
        left = torch.ones(rows.shape[0], dtype=torch.uint8, device=rows.device).index_fill(0, keep, 0)
        leaving = left.sort(descending=True, stable=True).indices[: rows.shape[0] - keep.shape[0]]
        centres = centres.sort().values
        _, choice = bipartite_match(rows[leaving][None], rows[centres][None])
        joins = torch.full_like(left, -1, dtype=torch.long)
        joins[centres] = torch.searchsorted(keep, centres)
        joins[leaving] = torch.searchsorted(keep, centres[choice[0]])
        return Merge(joins)


def _far_apart(rows: Tensor, count: int, first: int) -> Tensor:
    """``(count,)`` rows of ``rows (N, D)``, from ``first`` on each as far as possible from its nearest predecessor."""
    chosen = torch.full((count,), first, device=rows.device)
    nearest = torch.full((rows.shape[0],), torch.inf, device=rows.device)
    for number in range(1, count):
        last = chosen[number - 1 : number]
        distance = (rows - rows.index_select(0, last)).square().sum(1)
        nearest = torch.minimum(nearest, distance).index_fill(0, last, -torch.inf)
        chosen[number] = nearest.argmax()
    return chosen


def _errors(rows: Tensor, basis: Tensor) -> Tensor:
    """Length ``(N,)`` of what the basis leaves of each of ``rows (N, D)``, in units of 1e-5 of the longest row."""
    spanning = rows[basis]
    exact = spanning.double()
    ridge = 1e-5 * torch.eye(basis.shape[0], dtype=exact.dtype, device=rows.device)
    # The checked solve() would wait for the device to tell whether the matrix is regular, which the ridge sees to.
    inverse, _ = torch.linalg.inv_ex(exact @ exact.T + ridge)
    parts = ((rows @ spanning.T).double() @ inverse).to(rows.dtype)
    left = (rows - parts @ spanning).norm(dim=1)
    return (left / rows.norm(dim=1).amax().clamp(min=1e-30)).mul(1e5).round()
