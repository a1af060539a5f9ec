"""What ``vlprune.apply(model)`` does: the methods that measurements recommend, by kind of model.

docs/choosing.md shows this table beside the measured numbers; docs/publish.py makes it, and says where a new measurement would
have another method stand here. A test asks that each is as good as any method that was measured at its budget.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlprune.errors import OptionError
from vlprune.method import Method, make

CLS, PLAIN, VIT = "vlm with [CLS]", "vlm without [CLS]", "vision transformer"
"""Vision-language models whose image encoder has [CLS] (CLIP: LLaVA, LLaVA-NeXT; InternVL), those whose encoder has none
(SigLIP, Qwen's), and vision transformers on their own."""

MEASURED_ON = {CLS: "TinyVLM", PLAIN: "TinyVLM-Qwen", VIT: "TinyViT"}
"""Kind of model -> the model whose results in docs/results are the evidence."""
DEFAULT = "balanced"


@dataclass(frozen=True)
class Preset:
    """``why``: the rule by which ``method`` was chosen at ``budget`` from the published results."""

    method: str
    budget: float
    why: str

    def make(self, **options: object) -> Method:
        """The method; ``options`` as for :func:`vlprune.apply`."""
        return make(self.method, **{"budget": self.budget, **options})


LEAST = "loses least of all; the prefill stays whole, the cache is cut"
WHOLE = "no accuracy lost that could be measured, and no training needed"
AHEAD = "the most accurate of all at this budget, and no training needed"
BEST = "the most accurate of the methods that shorten the prefill"

PRESETS: dict[str, dict[str, Preset]] = {
    CLS: {
        "quality": Preset("snapkv", 0.4, LEAST),
        "balanced": Preset("scope", 0.4, BEST),
        "fast": Preset("scope", 0.2, BEST),
    },
    PLAIN: {
        "quality": Preset("snapkv", 0.4, LEAST),
        "balanced": Preset("divprune", 0.4, BEST),
        "fast": Preset("divprune", 0.2, BEST),
    },
    VIT: {
        "quality": Preset("tome", 0.5, WHOLE),
        "balanced": Preset("tome", 0.5, WHOLE),
        "fast": Preset("tome", 0.25, AHEAD),
    },
}


def preset(kind: str, name: str | None = None) -> Preset:
    """The preset of a kind of model; raises :class:`OptionError` where it has none of that name."""
    known = PRESETS[kind]
    name = DEFAULT if name is None else name
    if name not in known:
        raise OptionError(f"preset={name!r}: a {kind} has {', '.join(map(repr, known))}")
    return known[name]
