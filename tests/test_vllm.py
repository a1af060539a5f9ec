"""The parts of the plug-in for vLLM that run without it; with it, tests/serving does."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import vlprune
from vlprune.evals import tinyvlm
from vlprune.integrations.vllm import configure, positions, settings
from vlprune.integrations.vllm.tower import Tower


def config_of(name: str) -> Any:
    return AutoConfig.from_pretrained(tinyvlm.CHECKPOINT if name == "tinyvlm" else tinyvlm.QWEN_CHECKPOINT)


def test_nothing_of_vlprune_imports_vllm_by_itself():
    program = "import sys, vlprune, vlprune.integrations.vllm; vlprune.HiRED; print('vllm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_method_comes_from_the_options_or_the_environment(monkeypatch):
    assert settings.configured({}) is None
    assert settings.configured({"others": {"method": "hired"}}) is None
    monkeypatch.setenv(settings.VARIABLE, json.dumps({"method": "divprune", "budget": 0.5}))
    assert settings.configured({}) == vlprune.DivPrune(budget=0.5)
    given = vlprune.HiRED(budget=64, alpha=0.3)
    assert settings.configured({"vlprune": json.loads(json.dumps(given.to_dict()))}) == given


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"method": "hird"}, "did you mean 'hired'"),
        ({"method": "hired", "budget": 1.5}, "budget=1.5 is out of range"),
        ({"method": "hired", "budget": "0.2"}, "is of type str"),
        ({"method": "hired", "bugdet": 0.2}, "did you mean 'budget'"),
        ({"budget": 0.2}, "names no method"),
        ("hired", "names no method"),
    ],
)
def test_a_wrong_configuration_is_told_in_one_line(given, line, monkeypatch):
    with pytest.raises(vlprune.VLPruneError, match=line) as caught:
        settings.configured({"vlprune": given})
    assert str(caught.value).startswith("--additional-config, key 'vlprune': ")
    assert "\n" not in str(caught.value)
    monkeypatch.setenv(settings.VARIABLE, "{method: hired}")
    with pytest.raises(vlprune.VLPruneError, match="is no JSON"):
        settings.configured(None)


@pytest.mark.parametrize("model", tinyvlm.NAMES)
def test_what_cannot_be_served_is_refused_with_the_reason(model):
    tower = Tower(config_of(model))
    served, refused = [], {}
    for name, method in vlprune.methods().items():
        try:
            settings.check(method(), tower)
            served.append(name)
        except vlprune.UnsupportedMethodError as error:
            refused[name] = str(error)
    assert all(line.startswith(name) for name, line in refused.items())
    assert {"hired", "divprune", "fastervlm", "uniform", "random", "pool", "visionzip"} <= set(served)
    assert not {"fastv", "snapkv", "resize", "mustdrop", "flowcut", "cdpruner"} & set(served)
    # LLaVA's projector takes an earlier block's output, and vLLM builds no later one.
    assert ("prumerge" in served) == (model == "tinyvlm-qwen")


def server_with(**given: Any) -> Any:
    """The part of vLLM's configuration that is looked at, as it is by default, and with what is ``given``."""
    images = {"mm_encoder_tp_mode": "weights", "enable_mm_embeds": False, "video_pruning_rate": None}
    compilation = {"compile_mm_encoder": False, "cudagraph_mm_encoder": False}
    known: dict[str, Any] = {**images, **compilation, "tensor_parallel_size": 1, "speculative_config": None, **given}
    part = SimpleNamespace(**known)
    return SimpleNamespace(
        model_config=SimpleNamespace(multimodal_config=part),
        parallel_config=part,
        compilation_config=part,
        speculative_config=part.speculative_config,
    )


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"enable_mm_embeds": True}, "--enable-mm-embeds"),
        ({"video_pruning_rate": 0.5}, "--video-pruning-rate"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"mm_encoder_tp_mode": "data", "tensor_parallel_size": 2}, "--mm-encoder-tp-mode data"),
        ({"compile_mm_encoder": True}, "compile_mm_encoder"),
        ({"cudagraph_mm_encoder": True}, "cudagraph_mm_encoder"),
    ],
)
def test_options_that_do_not_go_with_pruning_are_refused(given, line):
    with pytest.raises(vlprune.VLPruneError, match=line):
        configure._check_options(server_with(**given), measures=True)


def test_other_options_stay_allowed():
    configure._check_options(server_with(), measures=True)
    configure._check_options(server_with(compile_mm_encoder=True, mm_encoder_tp_mode="data"), measures=False)


def test_other_models_and_encoders_are_refused():
    config = config_of("tinyvlm")
    config.vision_config.model_type = "pixtral"
    with pytest.raises(vlprune.UnsupportedModelError, match="pixtral"):
        Tower(config)
    config = config_of("tinyvlm")
    config.vision_feature_layer = [-2, -1]
    with pytest.raises(vlprune.UnsupportedModelError, match="several vision blocks"):
        Tower(config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_offsets_travel_exactly_in_the_dtype_of_features(dtype):
    found = torch.stack([torch.arange(0, 60000, 7), torch.arange(0, 60000, 7).flip(0), torch.arange(0, 60000, 7) % 991], 1)
    columns = positions.to_columns(found, torch.empty(0, dtype=dtype))
    assert columns.dtype == dtype
    assert torch.equal(positions.from_columns(columns), found)


class Prompt:
    """Text and two images of which some tokens are kept, and its positions written out in full."""

    def __init__(self, mrope: bool):
        layout = Tower(config_of("tinyvlm-qwen" if mrope else "tinyvlm")).layouts(
            {"image_grid_thw": torch.tensor([[1, 8, 12]])} if mrope else {"image_sizes": [[128, 128]]}
        )[0]
        self.kept = [torch.tensor([0, 3, 5, 11, layout.total - 1]), torch.tensor([1, 2, 9])]
        offsets = positions.offsets(layout, mrope)
        self.found = torch.cat([offsets[keep] for keep in self.kept])
        extent = positions.extent(layout, mrope)
        self.spans, self.expected, parts, where = [], [], [], 0
        visual: list[bool] = []
        # LLaVA's images may stand side by side; between Qwen's there is always some text.
        for text, keep in zip((4, 2 if mrope else 0), self.kept, strict=True):
            parts += [torch.arange(where, where + text).expand(3, -1), offsets[keep].T + where + text]
            where += text + extent
            visual += [False] * text
            self.spans.append(positions.Span(len(visual), len(keep), extent))
            visual += [True] * len(keep)
        parts.append(torch.arange(where, where + 3).expand(3, -1))
        self.whole, self.visual = torch.cat(parts, 1), torch.tensor(visual + [False] * 3)
        self.delta = where + 3 - len(self.visual)


@pytest.mark.parametrize("mrope", [False, True])
def test_kept_tokens_keep_their_positions(mrope):
    """Whatever the chunks in which a prompt is read, and when a chunk is read again; text stands where it stands at once."""
    prompt = Prompt(mrope)
    rows = 3 if mrope else 1
    length = len(prompt.visual)
    start, delta = positions.of_prompt(length, prompt.spans)
    assert delta == prompt.delta
    assert torch.equal(start[:, ~prompt.visual][:rows], prompt.whole[:, ~prompt.visual][:rows])
    for chunk in (1, 3, 4, length):
        now = start
        for computed in range(0, length, chunk):
            before, here = (int(prompt.visual[a:b].sum()) for a, b in ((0, computed), (computed, computed + chunk)))
            for _ in range(2):
                found = prompt.found[before : before + here]
                now, delta = positions.with_images(now, prompt.visual, computed, found, mrope)
                assert delta == prompt.delta
        assert torch.equal(now[:rows], prompt.whole[:rows])
