"""``vlprune bench serve`` as far as it goes without vLLM; tests/serving has the rest."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

from vlprune.bench import journal, load, publish, serving, serving_report, sizes, suite, vllm_server
from vlprune.errors import VLPruneError


def rows(concurrencies=(1, 32)):
    """Two servers, of which the pruned one answers three times as many requests a second; and one that did not start."""
    plan = serving.ServingPlan("model", "llava-next-7b tiny", suite.variants_of("uniform,fastv", "0.2"), concurrencies)
    for variant in serving.in_turn(plan.variants, again=False):
        same = {**plan.same, **serving.setting_columns(variant), "vllm": "0.32.0", "device": "a GPU", "date": "2026-11-21"}
        same |= {"command": "vlprune bench serve", "vlprune": "0.1.0", "commit": "0123abc"}
        if variant.setting.method == "fastv":
            yield {**same, "error": "ServerError: fastv acts in prefill"}
            continue
        pruned = variant.setting.method != "none"
        for concurrency in concurrencies:
            times = {f"{kind}_ms_p{share}": share / (1 + 2 * pruned) for kind in ("first", "next") for share in serving.SHARES}
            speed = {"requests_per_s": 1.5 + 3 * pruned, "tokens_per_s": 48.0 + 96 * pruned}
            counted = {"requests": 8, "failed": 0, "seconds": 5.0, "prompt_tokens": 3000 - 2342 * pruned}
            yield {**same, "concurrency": concurrency, **counted, **times, **speed}


def test_pages_compare_servers_at_the_same_concurrency(tmp_path):
    path = tmp_path / "rows" / "serving.csv"
    for row in rows():
        journal.append(path, serving.COLUMNS, row)
    written = publish.publish(path.parent, tmp_path / "docs")
    assert [path.name for path in written] == ["serving.md", serving_report.PICTURE]
    page = written[0].read_text()
    assert "a GPU; vlprune 0.1.0, vllm 0.32.0, commit 0123abc; 2026-11-21; `vlprune bench serve`" in page
    for concurrency in (1, 32):
        assert f"| {concurrency} | none | – | 3000 | 50.0 (20.0–80.0) | 50.0 (20.0–80.0) | 1.50 | 48 | 1.00x |" in page
        assert f"| {concurrency} | uniform | 0.2 | 658 | 16.7 (6.67–26.7) | 16.7 (6.67–26.7) | 4.50 | 144 | 3.00x |" in page
    assert "- fastv 0.2: ServerError: fastv acts in prefill" in page
    assert "](../images/speed/serving.png)" in page
    assert written[1].read_bytes().startswith(b"\x89PNG")


def test_the_unpruned_server_comes_first_and_last():
    variants = serving.in_turn(suite.variants_of("uniform,hired", "0.2"), again=True)
    assert [variant.label for variant in variants] == ["none", "uniform 0.2", "hired 0.2", "none again"]
    assert [bool(serving.switched_on(variant)) for variant in variants] == [False, True, True, False]


def test_a_model_of_a_size_is_a_folder_that_can_be_served(tmp_path):
    size = sizes.size_of("llava-next-tiny")
    load.save(size, tmp_path)
    model, processor = (kind.from_pretrained(tmp_path) for kind in (LlavaNextForConditionalGeneration, LlavaNextProcessor))
    image = Image.new("RGB", (size.image[1], size.image[0]))
    inputs = processor(images=image, text="<image>\nWhat does the sign say?", return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_index).sum() == 336
    with torch.no_grad():
        assert model.eval()(**inputs).logits.isfinite().all()
    with pytest.raises(VLPruneError, match="only LLaVA-NeXT"):
        load.save(sizes.size_of("qwen2.5-vl-7b-tiny"), tmp_path)


def test_the_reason_of_a_server_that_stops_is_what_vlprune_said():
    log = "WARNING errors like `OSError: too many files`.\n(EngineCore pid=7) ERROR 11-21 [core.py:9] KeyError: 'x'\n"
    assert vllm_server.reason(log) == "KeyError: 'x'"
    handed_on = (
        "pydantic.ValidationError: 1 validation error for VllmConfig\n  Value error, key: wrong [type=value_error, input]\n"
    )
    assert vllm_server.reason(log + handed_on) == "key: wrong"
    own = "vlprune.errors.UnsupportedMethodError: unknown\n(APIServer) vlprune.errors.UnsupportedMethodError: key: unknown\n"
    assert vllm_server.reason(log + own) == "key: unknown"
    assert vllm_server.reason("killed") == "killed"
