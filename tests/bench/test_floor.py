"""What a method leaves of a prompt, and the floor that is put together from parts of the unpatched model."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import vlprune
from vlprune.bench import floor, load, sizes
from vlprune.bench.floor import Schedule, Segment
from vlprune.bench.workload import PARTS, Workload

CPU = torch.device("cpu")


@cache
def workload(like: str = "llava-next-tiny", batch: int = 2) -> Workload:
    return load.of_size(sizes.size_of(like), CPU, torch.float32).workload(batch, 16, None, 2)


def left_by(method: vlprune.Method) -> Schedule:
    with vlprune.applied(workload().model, method), torch.inference_mode():
        workload().prefill()
        return floor.schedule_of(workload())


def test_neighbouring_layers_of_one_length_are_one_segment():
    assert floor.segments([9, 9, 5, 5, 5, 2]) == [Segment(0, 2, 9), Segment(2, 5, 5), Segment(5, 6, 2)]


def test_the_floor_of_the_llm_is_made_of_the_layers_own_times():
    """A run of 9 tokens reaches layers at 1, 2, 3, 4 s and ends at 5 s; one of 4 tokens takes a tenth of that."""
    runs = {9: {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0, -1: 5.0}, 4: {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4, -1: 0.5}}
    assert floor.llm_seconds([Segment(0, 3, 9)], runs) == pytest.approx(5.0)
    assert floor.llm_seconds([Segment(0, 3, 4)], runs) == pytest.approx(0.5)
    # In front of the layers and in layer 0 all are there (2 s); layers 1 and 2, and what lies behind, see four.
    assert floor.llm_seconds([Segment(0, 1, 9), Segment(1, 3, 4)], runs) == pytest.approx(2.0 + 0.2 + 0.1)


def test_a_schedule_counts_what_each_layer_sees():
    whole, text = workload().length, workload().length - 336
    pruned = left_by(vlprune.Uniform(budget=0.25))
    kept = round(pruned.entering)
    assert pruned.visual == 336
    assert kept == 84
    assert pruned.rows == pruned.held == (text + kept,) * 4
    assert pruned.cache_length == text + kept
    assert pruned.encoder == 1.0
    evicted = left_by(vlprune.SnapKV(budget=0.25))
    assert evicted.rows == (whole,) * 4
    assert evicted.held == (text + 84,) * 4
    inside = left_by(vlprune.FastV(layer=1, budget=0.5))
    assert inside.rows[0] == whole > inside.rows[1] == inside.rows[3]
    assert inside.layer_mean == pytest.approx(sum(inside.rows) / 4 - text)


def test_a_method_in_the_encoder_leaves_less_of_it():
    assert left_by(vlprune.FlowCut(budget=0.5, schedule="even")).encoder < 1
    assert left_by(vlprune.Resize(budget=0.25)).encoder < 0.5


@pytest.mark.parametrize("like", ["llava-1.5-tiny", "llava-next-tiny", "qwen2.5-vl-7b-tiny", "qwen3-vl-8b-tiny"])
def test_the_unpatched_language_model_runs_on_prompts_of_any_length(like: str):
    work = workload(like, batch=1)
    runs = floor.TextRuns(work)
    layers = len(work.parts.text_layers)
    seen: list[int] = []
    handle = work.parts.text_layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).shape[1]), with_kwargs=True
    )
    for length in (work.length, work.length // 2):
        times = runs.run(length, [0, 1, layers])
        assert 0 < times[0] < times[1] < times[layers] <= times[-1]
    handle.remove()
    assert seen == [work.length, work.length // 2]
    assert len(floor.decode_seconds(work, 20)) == 2


def test_a_filled_cache_holds_what_a_real_one_does():
    work = workload()
    with torch.inference_mode():
        real, filled = work.prefill(), floor.filled_cache(work, work.length)
    assert [layer.keys.shape for layer in filled.layers] == [layer.keys.shape for layer in real.layers]
    assert filled.layers[0].keys.dtype == real.layers[0].keys.dtype


def test_a_shortened_prompt_is_the_beginning_of_the_whole_one():
    whole: dict[str, Any] = {
        "inputs_embeds": torch.arange(24.0).view(1, 6, 4),
        "attention_mask": {"full": torch.ones(1, 1, 6, 6), "none": None},
        "position_ids": torch.arange(6).expand(3, 1, 6),
        "visual_pos_masks": torch.tensor([[False, True, True, False, True, False]]),
        "deepstack_visual_embeds": [torch.arange(3).view(3, 1)],
        "use_cache": True,
    }
    short = floor.shortened(whole, 6, 3)
    assert short["inputs_embeds"].equal(whole["inputs_embeds"][:, :3])
    assert short["attention_mask"]["full"].shape == (1, 1, 3, 3)
    assert short["position_ids"].shape == (3, 1, 3)
    assert short["deepstack_visual_embeds"][0].flatten().tolist() == [0, 1]
    assert short["use_cache"] is True


@pytest.mark.parametrize("method", [None, vlprune.HiRED(budget=0.25), vlprune.MustDrop(budget=0.5)])
def test_a_pass_is_divided_into_parts_that_add_up(method: vlprune.Method | None):
    sample = workload().run(method)
    assert set(sample.parts) == set(PARTS)
    assert sum(sample.parts.values()) == pytest.approx(sample.prefill)
    assert min(sample.parts.values()) >= 0
    assert (sample.parts["selection"] > 0) == (method is not None)
    assert len(sample.decode) == 2
    assert min(sample.decode) > 0


def test_a_pass_leaves_the_model_as_it_was():
    work = workload()
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in work.model.modules()]
    work.run(vlprune.SnapKV(budget=0.25))
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in work.model.modules()]


def test_pruning_lowers_cache_and_peak():
    work = workload()
    method = vlprune.Uniform(budget=0.1)
    assert work.run(method).cache < work.run(None).cache
    assert (work.peak(method) or 0) < (work.peak(None) or 0)
