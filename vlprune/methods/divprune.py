"""DivPrune: the tokens that are least alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlprune.image import ImageTokens
from vlprune.kernels import farthest_points
from vlprune.method import Method, Selection, register


@register("divprune")
@dataclass(kw_only=True)
class DivPrune(Method):
    """Max-min diversity: tokens are chosen one by one, each as unlike as possible to the most similar one chosen before.

    The distance of two tokens is 1 - cosine of their projected features, row ends included. The first is the loneliest one:
    its nearest neighbour is farthest. Looks neither at attention nor at the text.

    ``official_quirks``: unit rows, cosines and distances are rounded to the features' dtype, as in the code that the published
    numbers came from (float16); many distances are equal then, and the lowest index wins.

    Deviations from the official code: the budget's fraction is rounded down; kept tokens keep their positions; each image of a
    prompt and each sample of a batch has its own choice (there: the first image of the first sample); a token is never chosen
    twice, not even among duplicates.
    """

    paper: ClassVar[str] = "Alvar et al., DivPrune, CVPR 2025, arXiv:2503.02175"

    budget: int | float = 0.098
    official_quirks: bool = False

    def select(self, image: ImageTokens) -> Selection:
        rows = image.features if image.alive is None else image.features[image.alive]
        keep = farthest_points(rows.detach()[None], image.count, rounded=self.official_quirks)[0].sort().values
        return Selection(keep if image.alive is None else image.alive[keep])
