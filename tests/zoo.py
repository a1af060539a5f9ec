"""Tiny random models of every supported family, and prompts for them. A new family joins by adding itself to FAMILIES."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

import vlprune
from tests import media
from tests.media import END, IMAGE, PAD, START, VIDEO, Item, Media

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
TEXT: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 7,
}
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]


def llava(**vision: Any) -> LlavaConfig:
    return LlavaConfig(vision_config=CLIPVisionConfig(**VISION, **vision), **_shared())


def llava_siglip() -> LlavaConfig:
    shared = {**_shared(), "vision_feature_select_strategy": "full"}
    return LlavaConfig(vision_config=SiglipVisionConfig(**VISION), **shared)


def llava_next() -> LlavaNextConfig:
    return LlavaNextConfig(vision_config=CLIPVisionConfig(**VISION), image_grid_pinpoints=PINPOINTS, **_shared())


def _shared() -> dict[str, Any]:
    return {
        "text_config": LlamaConfig(**TEXT),
        "image_token_index": IMAGE,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "pad_token_id": PAD,
    }


def llava_next_video() -> LlavaNextVideoConfig:
    return LlavaNextVideoConfig(
        vision_config=CLIPVisionConfig(**VISION), image_grid_pinpoints=PINPOINTS, video_token_index=VIDEO, **_shared()
    )


def llava_onevision() -> LlavaOnevisionConfig:
    """Pictures of more than two tiles' size are resized."""
    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VISION),
        text_config=Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
        image_grid_pinpoints=PINPOINTS,
        pad_token_id=PAD,
    )


QWEN_VISION: dict[str, Any] = {
    "depth": 4,
    "num_heads": 4,
    "in_channels": 3,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
}


def _qwen_text(**rope: Any) -> dict[str, Any]:
    parameters = {"rope_type": "default", "mrope_section": [2, 3, 3], **rope}
    if VERSION >= (5, 0):
        return {**TEXT, "rope_parameters": {**parameters, "rope_theta": 10000.0}}
    return {**TEXT, "rope_scaling": parameters, "rope_theta": 10000.0}


def _qwen_tokens() -> dict[str, int]:
    tokens = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
    return {**tokens, "pad_token_id": PAD}


def qwen2_vl() -> Qwen2VLConfig:
    vision = {**QWEN_VISION, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    return Qwen2VLConfig(vision_config=vision, text_config=_qwen_text(), **_qwen_tokens())


def qwen2_5_vl() -> Qwen2_5_VLConfig:
    vision = {**QWEN_VISION, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "tokens_per_second": 2}
    vision |= {"window_size": 16, "fullatt_block_indexes": [1, 3]}
    return Qwen2_5_VLConfig(vision_config=vision, text_config=_qwen_text(), **_qwen_tokens())


def qwen3_vl() -> Qwen3VLConfig:
    vision = {**QWEN_VISION, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2]}
    text = {**_qwen_text(mrope_interleaved=True), "head_dim": 16}
    return Qwen3VLConfig(vision_config=vision, text_config=text, **_qwen_tokens())


def internvl() -> InternVLConfig:
    vision = {**VISION, "image_size": [28, 28], "patch_size": [7, 7], "use_qk_norm": False}
    return InternVLConfig(vision_config=vision, text_config=Qwen2Config(**TEXT), image_token_id=IMAGE)


def idefics3() -> Idefics3Config:
    return Idefics3Config(
        vision_config=dict(VISION), text_config=LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2, pad_token_id=PAD
    )


def smolvlm() -> SmolVLMConfig:
    return SmolVLMConfig(
        vision_config=dict(VISION), text_config=LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2, pad_token_id=PAD
    )


def gemma3(window: int = 10) -> Gemma3Config:
    """A window that is shorter than the prompts, in every other layer."""
    types = ["sliding_attention", "full_attention"] * 2
    text = {**TEXT, "head_dim": 16, "sliding_window": window, "layer_types": types, "query_pre_attn_scalar": 16}
    return Gemma3Config(
        vision_config=SiglipVisionConfig(**VISION).to_dict(), text_config=text, image_token_index=IMAGE, mm_tokens_per_image=4
    )


def mistral3() -> Mistral3Config:
    vision = {**VISION, "model_type": "pixtral", "image_size": 48, "patch_size": 4, "head_dim": 8}
    return Mistral3Config(
        vision_config=vision,
        text_config=MistralConfig(**TEXT, sliding_window=None),
        image_token_index=IMAGE,
        spatial_merge_size=2,
        vision_feature_layer=-1,
        pad_token_id=PAD,
    )


@dataclass(frozen=True)
class Entry:
    """``cls``: the encoder has [CLS]. ``media``: what its images and videos are. ``video``: it has videos.

    ``resize``: the encoder can be shown smaller tiles. ``caches``: those in which prompts can be pruned.
    """

    config: Callable[[], Any]
    model: Any
    cls: bool = True
    media: Media = Media()
    video: bool = False
    resize: bool = True
    caches: tuple[str, ...] = ("dynamic", "static")


def _tiles(family: str, **options: int) -> media.Tiles:
    return media.Tiles(lambda: _unpruned(family), **options)


def _qwen(**options: bool) -> media.Packed:
    return media.Packed(types=VERSION >= (5, 3), **options)


FAMILIES: dict[str, Entry] = {
    "llava": Entry(llava, LlavaForConditionalGeneration),
    "llava_siglip": Entry(llava_siglip, LlavaForConditionalGeneration, cls=False),
    "llava_next": Entry(llava_next, LlavaNextForConditionalGeneration, media=_tiles("llava_next")),
    "llava_next_video": Entry(
        llava_next_video,
        LlavaNextVideoForConditionalGeneration,
        media=_tiles("llava_next_video", frame_tokens=4),
        video=True,
        resize=False,
    ),
    "llava_onevision": Entry(
        llava_onevision,
        LlavaOnevisionForConditionalGeneration,
        cls=False,
        media=_tiles("llava_onevision", frame_tokens=4, newline=1),
        video=True,
        resize=False,
    ),
    "qwen2_vl": Entry(qwen2_vl, Qwen2VLForConditionalGeneration, cls=False, media=_qwen(timestamps=False), video=True),
    "qwen2_5_vl": Entry(
        qwen2_5_vl,
        Qwen2_5_VLForConditionalGeneration,
        cls=False,
        media=_qwen(timestamps=False, seconds=True),
        video=True,
    ),
    "qwen3_vl": Entry(qwen3_vl, Qwen3VLForConditionalGeneration, cls=False, media=_qwen(timestamps=True), video=True),
    "internvl": Entry(internvl, InternVLForConditionalGeneration, media=media.Merged(), resize=False),
    "idefics3": Entry(idefics3, Idefics3ForConditionalGeneration, cls=False, media=media.Lists(), resize=False),
    "smolvlm": Entry(smolvlm, SmolVLMForConditionalGeneration, cls=False, media=media.Lists(), resize=False),
    "gemma3": Entry(
        gemma3,
        Gemma3ForConditionalGeneration,
        cls=False,
        media=media.Merged(types=True),
        resize=False,
        caches=("dynamic",),
    ),
    "mistral3": Entry(mistral3, Mistral3ForConditionalGeneration, cls=False, media=media.Rows()),
}

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "vflowopt": [{"cell": 2.5, "threshold": 1.2}, {"cell": 2.5, "keep": (0.75, 0.5)}],
    "dyvte": [{"router": str(Path(__file__).with_name("router.safetensors"))}],
    "zipvl": [{"mass": 0.3, "options": {"layer": 2}}],
    "todre": [{}, {"exit_threshold": 0.3}],
    "sparsevlm": [{"recycle": 0.0}],
    "h2o": [{"recent": 0.5}],
    "look-m": [{"merging": "none"}],
    "razorattention": [{"compensation": False}],
    "ems": [{"window": 3, "likeness": None}],
    "criticalkv": [{"window": 3, "kernel": 3}],
    "pyramidkv": [{"window": 3, "kernel": 3}],
    "holov": [{"chunks": 3}],
    "visionzip": [{"contextual": 0.4}],
    "vispruner": [{"important": 0.3}],
    "vtc-cls": [{}, {"layer": 1}],
    "hired": [{}, {"allocation": "sums", "alpha": 0.3}],
    "divprune": [{}, {"official_quirks": True}],
    "fastv": [{"layer": 1}],
    "vscan": [{"window": 2, "local": 1}],
    "prumerge": [{"neighbours": 3}, {"outliers": True}],
    "flowcut": [{}, {"schedule": "even"}],
    "mustdrop": [{}, {"global_threshold": 0.28, "individual_threshold": 0.5, "merge_threshold": 0.0}],
    "snapkv": [{"window": 3, "kernel": 3}],
}
"""Options under which a method goes through the matrices; a method that is not named goes with its defaults."""


def least(method: str) -> float:
    """The lowest budget that a method reaches here: for one that drops inside the LLM it depends on the depth of the model."""
    return 0.5 if "prefill" in vlprune.methods()[method]().stages else 0.0


def budget(method: str, wanted: float) -> float:
    return max(wanted, least(method))


def method_cases() -> list[tuple[str, dict[str, Any]]]:
    return [(name, options) for name in vlprune.methods() for options in VARIANTS.get(name, [{}])]


def combinations(adaptive: bool = True) -> list[tuple[str, str, dict[str, Any]]]:
    """Family, method and options of all that go together; without ``adaptive``, those whose counts are known only."""
    return [
        (family, name, options)
        for family in FAMILIES
        for name, options in method_cases()
        if _fit(family, vlprune.methods()[name](**options)) and (adaptive or not vlprune.methods()[name](**options).adaptive)
    ]


WHOLE = ("hired", "uniform", "pool", "resize", "flowcut", "mustdrop", "fastv", "snapkv")
"""Methods that go through every case. Between them they take every way through the engine: each stage and each combination of
stages, signals of both kinds, fixed and adaptive counts, merging, other image sizes, a choice a head. A method that takes a
new way (a new stage, a new kind of signal) belongs here."""
if VERSION < (5, 0):
    # What differs in older versions (positions in the cache, outputs of layers, names) does so for the first of them, which
    # selects, and for the second, which has all stages, as it does for all.
    WHOLE = ("hired", "mustdrop")


def thinned(cases: Sequence[tuple[Any, ...]], families: int = len(FAMILIES)) -> list[tuple[Any, ...]]:
    """``cases``, tuples of family, method, options and the cell of a matrix, without those that repeat what others show.

    A method gives the engine lists of rows and perhaps weights; what the engine then does with attention, cache, padding and
    positions does not depend on which method it was, and is tested on every case with the methods of ``WHOLE``. Of another
    method's own code the model is all that matters: its layout, its signals. So it meets every cell (attention x cache x
    prompt, say) that its cases have and so many ``families``, all unless told otherwise, each at least once, but not
    every family in every cell. Which ones are met, and where, turns with the method's name, so a zoo of them meets most pairs.
    The same holds for the second and further variants of any method: they choose otherwise on the first one's way.
    """
    groups: dict[tuple[str, str], list[tuple[Any, ...]]] = {}
    for case in cases:
        groups.setdefault((case[1], repr(case[2])), []).append(case)
    return [case for name, group in groups.items() for case in (group if whole(*group[0][1:3]) else _cover(group, families))]


def whole(method: str, options: dict[str, Any]) -> bool:
    """Whether the method keeps all its cases under these options."""
    return method in WHOLE and options == VARIANTS.get(method, [{}])[0]


def _cover(group: list[tuple[Any, ...]], families: int) -> list[tuple[Any, ...]]:
    """Cases of one method, few, in which ``families`` of its families and each of its cells occur."""
    turn = zlib.crc32(repr(group[0][1:3]).encode()) % len(group)
    turned = group[turn:] + group[:turn]
    wanted = {*list(dict.fromkeys(case[0] for case in turned))[:families], *(case[3:] for case in group)}
    chosen = []
    while wanted:
        chosen.append(max(turned, key=lambda case: len(_parts(case) & wanted)))
        wanted -= _parts(chosen[-1])
    return chosen


def _parts(case: tuple[Any, ...]) -> set[Any]:
    return {case[0], case[3:]}


def _fit(family: str, method: vlprune.Method) -> bool:
    entry = FAMILIES[family]
    wants = method.wants(vlprune.ModelShape(vision_layers=4, text_layers=4, feature_layer=2, has_cls=entry.cls))
    if not entry.cls and any(isinstance(signal, vlprune.ClsAttention) for signal in wants):
        return False
    return set(method.stages) <= _stages(family) and (entry.resize or not method.resizes)


@lru_cache
def _stages(family: str) -> set[str]:
    model_type = FAMILIES[family].config().model_type
    return set(next(supported.stages for supported in vlprune.supported_models() if model_type in supported.model_types))


def build(family: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A model whose outputs really depend on every token: default initialisation would be too tame."""
    entry = FAMILIES[family]
    config = entry.config()
    torch.manual_seed(seed)
    model = entry.model._from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn_like(parameter) * (1.5 / parameter[0].numel() ** 0.5))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model.to(dtype).eval()


def prompt(
    family: str,
    images: tuple[int, ...] = (1,),
    words: tuple[int, ...] = (7,),
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    side: str = "left",
    videos: tuple[int, ...] | None = None,
) -> dict[str, Tensor]:
    """Inputs of ``len(images)`` samples: sample i has ``images[i]`` images, ``videos[i]`` videos, ``words[i]`` trailing words.

    The first video comes before the images, the others behind them.
    """
    generator = torch.Generator().manual_seed(seed)
    of = FAMILIES[family].media
    shown: list[Item] = []
    filmed: list[Item] = []
    rows = []
    for sample, (count, films, length) in enumerate(zip(images, videos or (0,) * len(images), words, strict=True)):
        row = [1, *_words(3, generator)]
        kinds = "v" * min(films, 1) + "i" * count + "v" * (films - 1)
        for kind in kinds:
            items = shown if kind == "i" else filmed
            size = of.sizes[(len(items) + seed) % len(of.sizes)]
            items.append(Item(len(items), sample, count if kind == "i" else films, size))
            row += of.image(items[-1]) if kind == "i" else of.video(items[-1], lambda n: _words(n, generator))
            row += _words(2, generator)
        rows.append(row + _words(length, generator))
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), PAD)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    inputs = {"input_ids": ids, "attention_mask": mask, **of.token_types(ids)}

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    if shown:
        inputs |= of.image_inputs(shown, len(images), noise)
    if filmed:
        inputs |= of.video_inputs(filmed, noise)
    return inputs


def choices(family: str, images: tuple[int, ...], videos: tuple[int, ...] = ()) -> int:
    """How many images and videos the engine counts in such a prompt."""
    return sum(map(bool, images) if FAMILIES[family].media.many else images) + sum(videos)


@lru_cache
def _unpruned(family: str) -> Any:
    return build(family)


def visual_tokens(family: str, size: tuple[int, int]) -> int:
    """Placeholders that the model itself wants for an image of ``size``."""
    return FAMILIES[family].media.image(Item(0, 0, 1, size)).count(IMAGE)


def image_features(model: Any, inputs: dict[str, Tensor]) -> Any:
    """What the model's own ``get_image_features`` gives for the images of ``inputs``."""
    return media.features(model, inputs)


def all_features(model: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """What each of the model's seams gives for the images and videos of ``inputs``."""
    return {seam: media.features(model, inputs, seam) for seam, pixels in media.SEAMS.items() if pixels in inputs}


def _words(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(3, 80, (count,), generator=generator).tolist()


SCENARIOS: dict[str, dict[str, Any]] = {
    "single": {"images": (1,), "words": (7,)},
    "batch": {"images": (1, 2, 0), "words": (7, 4, 9)},
}
"""``batch``: left padding, a different number of visual tokens in each sample, one sample without an image."""

VIDEOS: dict[str, dict[str, Any]] = {
    "video": {"images": (0,), "videos": (1,), "words": (7,)},
    "videos and images": {"images": (1, 2, 0, 0), "videos": (2, 1, 1, 0), "words": (7, 4, 9, 6)},
}


def prunes(method: str, scenario: str) -> bool:
    """Whether anything is to be dropped: EVS leaves images whole."""
    return method != "evs" or scenario in VIDEOS


PER_TOKEN = {"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"}
"""Inputs ``(B, L)``; the others are beside the prompt."""


def scenarios(family: str) -> dict[str, dict[str, Any]]:
    """Those of ``SCENARIOS``, and of ``VIDEOS`` for families that have them."""
    return SCENARIOS | VIDEOS if FAMILIES[family].video else SCENARIOS


def generate(model: Any, inputs: dict[str, Tensor], new_tokens: int = 5, **options: Any) -> Any:
    """Greedy generation with the logits of each step in the model's own dtype: ``out.raw (B, steps, vocabulary)``."""
    raw: list[Tensor] = []
    handle = model.lm_head.register_forward_hook(lambda module, args, out: raw.append(out[:, -1].detach().clone()))
    options = {"do_sample": False, "suppress_tokens": [IMAGE, VIDEO], **options}
    torch.manual_seed(1)
    try:
        out = model.generate(
            **{name: value.clone() for name, value in inputs.items()},
            max_new_tokens=new_tokens,
            return_dict_in_generate=True,
            **options,
        )
    finally:
        handle.remove()
    out.raw = torch.stack(raw, 1) if len({len(step) for step in raw}) == 1 else None
    return out
