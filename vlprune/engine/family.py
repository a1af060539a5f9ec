"""A model family, described by data, and the registry of families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import Tensor, nn

from vlprune.errors import UnsupportedModelError, VLPruneError
from vlprune.image import ImageLayout, ModelShape
from vlprune.method import STAGES

IMAGE, VIDEO = 1, 2
"""Kinds of placeholders in a prompt; 0 is text."""

SEAMS = {IMAGE: "get_image_features", VIDEO: "get_video_features"}
"""The methods of the base model between vision encoder and LLM."""

MODALITIES = {"image": IMAGE, "video": VIDEO}
"""What transformers calls the kinds."""

TOKENS = {IMAGE: ("image_token_id", "image_token_index"), VIDEO: ("video_token_id", "video_token_index")}
"""Where a config has the ids of placeholders."""

ATTENDING = {"full_attention", "sliding_attention"}
"""Types of layers whose tokens stay apart."""

Layouts = Callable[[Any, dict[str, Any]], list[ImageLayout]]


def single_patches(model: Any, grid: tuple[int, int]) -> Tensor:
    """Patches of each visual token where every patch is one: ``(patches, 1)``."""
    return torch.arange(grid[0] * grid[1])[:, None]


def blocks(grid: tuple[int, int], side: int, columns: int | None = None) -> Tensor:
    """Patches ``(tokens, side^2)`` of each visual token where it is a square block of them, both in raster order.

    ``columns``: of patches in a tile, where the blocks leave some over.
    """
    corner = torch.arange(grid[0])[:, None] * side * (columns or grid[1] * side) + torch.arange(grid[1]) * side
    inside = torch.arange(side)[:, None] * (columns or grid[1] * side) + torch.arange(side)
    return corner.flatten()[:, None] + inside.flatten()


@dataclass(frozen=True)
class Family:
    """Where the parts of a model family are. Paths are attribute paths from the model; alternatives stand in a tuple.

    ``layouts(model, arguments)`` gives one :class:`ImageLayout` an image from the arguments of ``get_image_features``,
    without a look at the pixels; ``video_layouts`` does so for ``get_video_features``, None where a family has no video.
    ``groups(model, grid)`` gives the rows of a tile in the vision encoder, [CLS] not counted, that become each visual token
    ``(tokens, rows of one)``, for a tile of ``grid`` tokens. ``packed``: the encoder's rows of all images stand one behind
    the other, ``(rows, hidden)`` or ``(1, rows, hidden)``; then ``order(model, arguments)`` tells which token of that order
    stands where inside of its blocks, ``(tokens of all images,)``, None for the same order.

    ``tail(model)`` gives the visual tokens ``(tokens, hidden)`` at the end of each video that some versions of transformers
    add behind ``get_video_features``. ``pixels`` names the arguments whose dimension 0 counts images. ``resizable``: the
    encoder can be shown smaller tiles; ``smaller(model, arguments, grids)`` gives the seam's arguments with the tiles of each
    image at such a grid of tokens, None where the engine is to resize what enters the encoder and to have it interpolate its
    position embeddings. ``sliding``: layers of the LLM may have a sliding window. ``pointwise``: the projector takes each
    visual token by itself, so that it can run on those that the encoder has left; otherwise it gets the full grid.
    ``tested``: versions of transformers that the family is tested with.
    """

    name: str
    model_types: tuple[str, ...]
    layouts: Layouts
    video_layouts: Layouts | None = None
    groups: Callable[[Any, tuple[int, int]], Tensor] = single_patches
    packed: bool = False
    order: Callable[[Any, dict[str, Any]], Tensor] | None = None
    tail: Callable[[Any], Tensor] | None = None
    smaller: Callable[[Any, dict[str, Any], list[tuple[int, int]]], dict[str, Any]] | None = None
    stages: tuple[str, ...] = STAGES
    base: str = "model"
    text: str = "model.language_model"
    text_layers: str = "model.language_model.layers"
    text_attention: str = "self_attn"
    text_mlp: str = "mlp"
    text_values: str = "v_proj"
    text_output: str = "o_proj"
    vision: str = "model.vision_tower"
    vision_layers: tuple[str, ...] = ("encoder.layers", "vision_model.encoder.layers")
    vision_attention: str = "self_attn"
    vision_mlp: str = "mlp"
    vision_types: tuple[str, ...] = ("clip_vision_model", "siglip_vision_model")
    cls_types: tuple[str, ...] = ("clip_vision_model",)
    projector: str = "model.multi_modal_projector"
    pixels: tuple[str, ...] = ("pixel_values", "image_sizes")
    resizable: bool = True
    sliding: bool = False
    pointwise: bool = True
    tested: tuple[str, ...] = ()

    @property
    def seams(self) -> dict[int, Layouts]:
        """What gives the layouts of each kind of visual input that the family has."""
        seams = {IMAGE: self.layouts}
        return seams if self.video_layouts is None else {**seams, VIDEO: self.video_layouts}

    def parts(self, model: nn.Module) -> Parts:
        """The parts of ``model``; raises :class:`UnsupportedModelError` where this one deviates from its family."""
        vision = _follow(model, self.vision)
        vision_type = vision.config.model_type
        if vision_type not in self.vision_types:
            raise UnsupportedModelError(
                f"{type(model).__name__} with a vision encoder of type {vision_type!r} is not supported; "
                f"allowed are {', '.join(self.vision_types)}"
            )
        text = _follow(model, self.text)
        self._check_layers(model, text.config)
        layers = next((found for path in self.vision_layers if (found := _find(vision, path)) is not None), None)
        if layers is None:
            raise UnsupportedModelError(f"{type(model).__name__}: no vision blocks at {' or '.join(self.vision_layers)}")
        return Parts(
            family=self,
            model=model,
            base=_follow(model, self.base),
            text=text,
            text_layers=list(_follow(model, self.text_layers)),
            vision=vision,
            vision_layers=list(layers),
            projector=_follow(model, self.projector),
            has_cls=vision_type in self.cls_types,
        )

    def _check_layers(self, model: nn.Module, config: Any) -> None:
        """Raises :class:`UnsupportedModelError` where layers of the LLM do more than attend to all tokens."""
        types, name = _layer_types(config), type(model).__name__
        if "sliding_attention" in types and not self.sliding:
            raise UnsupportedModelError(
                f"{name}: its language model has sliding-window layers, which are not supported; "
                "load it with sliding_window=None in text_config if its window is longer than your prompts"
            )
        if types - ATTENDING:
            raise UnsupportedModelError(f"{name}: {_mixing(types)}")

    def placeholders(self, model: nn.Module, input_ids: Tensor | None, embeddings: Tensor | None) -> Tensor:
        """What each token of ``input_ids (B, L)``, or else of ``embeddings (B, L, D)``, stands for.

        ``(B, L)`` int8: 0 text, ``IMAGE``, ``VIDEO``.
        """
        given = input_ids if input_ids is not None else embeddings
        assert given is not None
        kinds = torch.zeros(given.shape[:2], dtype=torch.int8, device=given.device)
        for kind in self.seams:
            token = next(t for name in TOKENS[kind] if (t := getattr(model.config, name, None)) is not None)
            if input_ids is not None:
                here = input_ids == token
            else:
                embedding: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
                here = (embeddings == embedding(torch.full((), token, device=given.device))).all(-1)
            kinds = kinds.masked_fill(here, kind)
        return kinds


@dataclass(frozen=True, eq=False)
class Parts:
    """The modules of one model that the engine hooks into. ``has_cls``: row 0 of the vision encoder is [CLS]."""

    family: Family
    model: Any
    base: Any
    text: Any
    text_layers: list[Any]
    vision: Any
    vision_layers: list[Any]
    projector: Any
    has_cls: bool

    @property
    def prefix(self) -> int:
        """Rows of a tile in the vision encoder that are no patches."""
        return int(self.has_cls)

    @property
    def shape(self) -> ModelShape:
        layers = len(self.vision_layers)
        feature = getattr(self.model.config, "vision_feature_layer", None)
        feature = layers - 1 if not isinstance(feature, int) else feature - 1 if feature >= 0 else layers + feature
        return ModelShape(layers, len(self.text_layers), feature, self.has_cls)

    def vision_attention(self, layer: int) -> nn.Module:
        return self.vision_layers[layer].get_submodule(self.family.vision_attention)

    def text_attention(self, layer: int) -> nn.Module:
        return self.text_layers[layer].get_submodule(self.family.text_attention)

    def text_output(self, layer: int) -> Tensor | None:
        """Weights of the projection behind attention, ``(heads, hidden, head_dim)``; None where they are no plain matrix."""
        attention = self.text_attention(layer)
        weight = getattr(attention.get_submodule(self.family.text_output), "weight", None)
        width = getattr(attention, "head_dim", None)
        if not torch.is_tensor(weight) or not weight.is_floating_point() or weight.ndim != 2 or weight.is_meta or not width:
            return None
        return weight.detach().unflatten(1, (-1, width)).movedim(1, 0)


def _layer_types(config: Any) -> set[str]:
    """Types of the LLM's layers. A config that names none has layers of one type."""
    window = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    return set(getattr(config, "layer_types", None) or [window])


def _mixing(types: set[str]) -> str:
    return (
        f"its language model has layers of type {', '.join(sorted(types - ATTENDING))}; allowed are layers of full attention, "
        "since others mix the tokens into a state or into chunks that single tokens cannot leave"
    )


def _find(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
        if module is None:
            return None
    return module


def _follow(module: Any, path: str) -> Any:
    found = _find(module, path)
    if found is None:
        raise UnsupportedModelError(f"{type(module).__name__} has no {path}; is it a model with a language head?")
    return found


# ------------------------------------------------------------------ registry

_families: dict[str, Family] = {}
_found_entry_points = False


def register(family: Family) -> Family:
    """Makes a model family known. Its model types must not be taken by another family."""
    for model_type in family.model_types:
        known = _families.get(model_type)
        if known is not None and known.name != family.name:
            raise VLPruneError(f"model type {model_type!r} is taken by the family {known.name!r}")
    _families.update(dict.fromkeys(family.model_types, family))
    return family


def families() -> list[Family]:
    """All registered families, those of installed packages (entry point group ``vlprune.integrations``) included."""
    global _found_entry_points
    if not _found_entry_points:
        _found_entry_points = True
        for entry in entry_points(group="vlprune.integrations"):
            loaded = entry.load()
            if isinstance(loaded, Family):
                register(loaded)
    return list({family.name: family for family in _families.values()}.values())


def family_of(model: Any) -> Family:
    """The family of ``model``, by its config's model type."""
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise UnsupportedModelError(f"{type(model).__name__} is not a transformers model; supported are {_listed()}")
    model_type = getattr(model.config, "model_type", None)
    for family in families():
        if model_type in family.model_types:
            return family
    config: Any = model.config
    types = _layer_types(config.get_text_config()) if hasattr(config, "get_text_config") else ATTENDING
    if types - ATTENDING:
        raise UnsupportedModelError(
            f"{type(model).__name__} (model type {model_type!r}) cannot be supported: {_mixing(types)}"
        )
    raise UnsupportedModelError(
        f"{type(model).__name__} (model type {model_type!r}) is not supported; supported are {_listed()}. "
        "A family of your own: vlprune.integrations.register(Family(...))"
    )


def _listed() -> str:
    from vlprune.engine.vit.architecture import architectures  # whose package imports this module

    alone = architectures()
    known, more = (", ".join(f"{each.name} ({', '.join(each.model_types)})" for each in some) for some in (families(), alone))
    return f"{known}; vision transformers on their own: {more}" if more else known
