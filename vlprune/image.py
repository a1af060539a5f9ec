"""One image as a method sees it at each of the four stages: its tokens, its tiles, and the map between the two."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from vlprune.signals import Signal

F = TypeVar("F", bound=Callable[..., object])


def remembered(function: F) -> F:
    """Remembers what ``function`` gave. Its tensors are made outside of inference mode, so that training can use them, too."""
    return lru_cache(maxsize=512)(torch.inference_mode(False)(function))  # pyright: ignore[reportReturnType]


@dataclass(frozen=True, eq=False)
class ImageLayout:
    """Where the tokens of an image lie, known from its size alone.

    ``total``: visual tokens in the prompt, row ends (newlines) included.
    ``placeholder (tiles, patches)``: index of a patch in the prompt's run of placeholders, -1 where the model's own
    unpadding removed it. Patches of a tile are in raster order; tile 0 is the thumbnail where ``thumbnail`` is true.
    ``grid``: patch rows and columns of a tile. ``crops``: tile rows and columns of the tiles that are not the thumbnail.
    ``regions``: rectangles ``(rows, columns)`` of prompt indices that cover all patches: the thumbnail, and the crops
    stitched together and unpadded. All tensors are int64 on the CPU. ``video``: the tiles are frames, in the order of time.
    """

    total: int
    placeholder: Tensor
    grid: tuple[int, int]
    thumbnail: bool
    crops: tuple[int, int]
    regions: tuple[Tensor, ...]
    video: bool = False

    @property
    def tiles(self) -> int:
        return self.placeholder.shape[0]

    @cached_property
    def available(self) -> list[int]:
        """Patches of each tile that are in the prompt."""
        return (self.placeholder >= 0).sum(1).tolist()

    @cached_property
    def separators(self) -> Tensor:
        """Prompt indices that belong to no patch (row ends), ascending."""
        free = torch.ones(self.total, dtype=torch.bool)
        free[self.placeholder[self.placeholder >= 0]] = False
        return free.nonzero()[:, 0]


@dataclass(frozen=True)
class ModelShape:
    """What a method may know of the model: blocks of vision encoder and LLM, and whether the encoder has [CLS].

    ``feature_layer``: the vision block whose output goes to the projector, counted from 0.
    """

    vision_layers: int
    text_layers: int
    feature_layer: int
    has_cls: bool


class _Measured:
    """Gives signals by ``tokens[signal]``."""

    signals: dict[Signal, Tensor]

    def __getitem__(self, signal: Signal) -> Tensor:
        return self.signals[signal]


@dataclass(frozen=True, eq=False)
class VisionTokens(_Measured):
    """One image after a block of the vision encoder: what ``encode`` sees.

    ``hidden (tiles, n, D)``: rows that are still there, [CLS] left out; where the model merges groups of patches into one
    visual token, a row is such a group, its patches one behind the other. ``patches (tiles, n)`` int64: which patch of its
    tile a row is. ``carry``: tensors ``(tiles, n, ...)`` that the method wants to see again after the next block; rows that
    leave, leave there, too. ``notes``: tensors about the image that later stages of the method are to see.
    """

    layer: int
    hidden: Tensor
    patches: Tensor
    layout: ImageLayout
    shape: ModelShape
    signals: dict[Signal, Tensor] = field(default_factory=dict)
    carry: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ImageTokens(_Measured):
    """One image between encoder and LLM: what ``select`` sees.

    ``features (N, D)``: projected features of the image's run of placeholders, in the model's dtype.
    ``count``: how many of them the budget keeps. ``signals``: what the method asked for, see :mod:`vlprune.signals`.
    ``alive``: ascending indices of the rows that ``encode`` has left, None for all; the other rows of ``features`` are zero,
    and so are their signals. ``notes`` as in :class:`VisionTokens`.
    """

    features: Tensor
    layout: ImageLayout
    count: int
    signals: dict[Signal, Tensor] = field(default_factory=dict)
    alive: Tensor | None = None
    notes: dict[str, Tensor] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.features.device

    def host(self, indices: Tensor) -> Tensor:
        """A tensor of the layout on the features' device."""
        return indices.to(self.device, non_blocking=True)


@dataclass(frozen=True, eq=False)
class LayerTokens(_Measured):
    """One image before LLM layer ``layer``: what ``prefill`` sees.

    ``hidden (n, D)``: all rows of the sequence that are still there, text and images, in order. ``visual (N,)`` int64,
    ascending: which of them are this image's. ``positions (N,)``: their indices in the image's run of placeholders.
    ``last``: the row of the prompt's last token. ``text (R,)`` int64, ascending: rows of the prompt's text, in the order of
    ``QueryAttention(queries="text")``. ``count``: how many visual tokens are to be left.

    ``tokens[signal]`` holds this image's tokens; ``tokens.rows(signal)`` holds, for signals that have a value for each row
    (keys, values, hidden states, deltas), all rows of ``hidden``.
    """

    layer: int
    hidden: Tensor
    visual: Tensor
    positions: Tensor
    last: int
    count: int
    layout: ImageLayout
    shape: ModelShape
    signals: dict[Signal, Tensor] = field(default_factory=dict)
    row_signals: dict[Signal, Tensor] = field(default_factory=dict)
    notes: dict[str, Tensor] = field(default_factory=dict)
    find_text: Callable[[], Tensor] = field(default=lambda: torch.zeros(0, dtype=torch.long), repr=False)

    @cached_property
    def text(self) -> Tensor:
        return self.find_text()

    def rows(self, signal: Signal) -> Tensor:
        return self.row_signals[signal]


@dataclass(frozen=True, eq=False)
class CacheTokens(_Measured):
    """One image in the KV cache of LLM layer ``layer``: what ``evict`` sees.

    ``keys``, ``values (kv_heads, N, head_dim)``: the entries of its visual tokens. ``positions (N,)``: their indices in the
    image's run of placeholders, or ``(kv_heads, N)`` where heads hold different ones. ``count``: how many are to be left.
    ``new_tokens``: tokens generated since the prompt was read, 0 right after it. Signals are those of the forward just run.
    ``carry``: tensors ``(kv_heads or 1, N)`` that the method wants to see again when it is asked again; entries that leave,
    leave there, too. ``output (heads, hidden, head_dim)``: weights of the layer's output projection, a slice a query head;
    None where they are quantised or somewhere else.
    """

    layer: int
    keys: Tensor
    values: Tensor
    positions: Tensor
    count: int
    new_tokens: int
    layout: ImageLayout
    shape: ModelShape
    signals: dict[Signal, Tensor] = field(default_factory=dict)
    notes: dict[str, Tensor] = field(default_factory=dict)
    carry: dict[str, Tensor] = field(default_factory=dict)
    output: Tensor | None = None


def top(scores: Tensor, count: int) -> Tensor:
    """Indices ``(..., count)`` of the highest ``scores (..., N)``, best first: higher score, then lower index.

    The order is the same on every device. NaN counts as the lowest score.
    """
    ranked = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return ranked.sort(dim=-1, descending=True, stable=True).indices[..., :count]


@remembered
def centres(grid: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """Raster indices of the patches of ``grid`` that lie at the centres of ``cells`` (rows, columns) equal parts."""
    row, column = ((torch.arange(n) * 2 + 1) * size // (2 * n) for size, n in zip(grid, cells, strict=True))
    return (row[:, None] * grid[1] + column).flatten()
