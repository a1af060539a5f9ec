"""vLLM with vlprune beside it. Needs an environment of its own: make test-vllm."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; make test-vllm prepares an environment with it")

import requests
import torch
from PIL import Image
from typer.testing import CliRunner

import vlprune
from tests.serving.engines import (
    OPTIONS,
    START,
    Transformers,
    checkpoint,
    engine,
    for_two_ranks,
    questions,
    score,
    server,
)
from vlprune.bench import commands, journal, vllm_server
from vlprune.evals import tinyvlm
from vlprune.integrations.vllm.models import OnePosition, Processor

BUDGET = 0.4
ASKED = 60
LOOKED_AT = 6
METHODS: dict[str, dict[str, Any]] = {
    "tinyvlm": {"method": "hired", "budget": BUDGET},
    "tinyvlm-qwen": {"method": "divprune", "budget": BUDGET},
}


@pytest.fixture(scope="module", params=tinyvlm.NAMES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Transformers]:
    name = request.param
    return name, checkpoint(name, tmp_path_factory.mktemp("checkpoints") / name), Transformers(*tinyvlm.load(name))


@pytest.fixture(scope="module")
def whole(model: Any) -> Iterator[Any]:
    """What vLLM answers with the plug-in installed and not switched on, and what it answers without it."""
    _, folder, prompts = model
    with engine(folder, prompts) as plain:
        yield plain.answer(questions(ASKED))


def test_without_the_option_nothing_changes(model, whole):
    _, _, prompts = model
    expected = [prompts.answer(one)[0] for one in questions(ASKED)]
    assert [answer.text for answer in whole] == expected


def test_pruned_as_in_transformers(model, whole):
    """The same tokens are kept, prompts are as much shorter, and answers are as good."""
    name, folder, prompts = model
    asked, method = questions(ASKED), vlprune.from_dict(METHODS[name])
    expected = [prompts.answer(one, method) for one in asked]
    with engine(folder, prompts, additional_config={"vlprune": METHODS[name]}) as pruned:
        for one, (_, kept) in zip(asked[:LOOKED_AT], expected, strict=False):
            pruned.answer([one])
            assert pruned.kept() == [kept]
        answers = pruned.answer(asked)
        # Once more: now features and prompts come from caches.
        assert pruned.answer(asked) == answers
        _several_images(pruned, asked, method)
    total = 336 if name == "tinyvlm" else 256
    for before, after in zip(whole, answers, strict=True):
        assert before.prompt_tokens - after.prompt_tokens == total - int(BUDGET * total)
    assert abs(score(asked, [a.text for a in answers]) - score(asked, [text for text, _ in expected])) <= 2


def _several_images(pruned: Any, asked: Any, method: vlprune.Method) -> None:
    """Two images a prompt, of different sizes; what each keeps is what it keeps alone in transformers."""
    images = [asked[0].image.rotate(90), asked[1].image.resize((112, 80))]
    expected = [pruned.prompts.answer(dataclasses.replace(asked[0], picture=image), method)[1] for image in images]
    prompt = pruned.prompts.prompt(asked[0].question)
    mark = "<image>\n" if "<image>" in prompt else "<|vision_start|><|image_pad|><|vision_end|>"
    pruned.generate([{"prompt": prompt.replace(mark, mark * 2), "multi_modal_data": {"image": images}}])
    assert pruned.kept() == expected


def test_a_prompt_in_chunks(model):
    """Chunked prefill cuts through images."""
    name, folder, prompts = model
    asked, method = questions(8), vlprune.from_dict(METHODS[name])
    expected = [prompts.answer(one, method)[0] for one in asked]
    options: dict[str, Any] = {"max_num_batched_tokens": 48, "max_num_seqs": 4, "enable_chunked_prefill": True}
    with engine(folder, prompts, additional_config={"vlprune": METHODS[name]}, **options) as pruned:
        assert [answer.text for answer in pruned.answer(asked)] == expected


def test_ranks_choose_the_same(tmp_path, monkeypatch):
    """Each of two ranks computes half of the heads, and both keep what one that has all of them keeps."""
    prompts = Transformers(for_two_ranks(tmp_path / "tiny"), tinyvlm.load()[1])
    for name, value in {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}.items():
        monkeypatch.setenv(name, value)
    settings = METHODS["tinyvlm"]
    options: dict[str, Any] = {"tensor_parallel_size": 2, "additional_config": {"vlprune": settings}}
    with engine(tmp_path / "tiny", prompts, **options) as pruned:
        for one in questions(3):
            pruned.answer([one])
            assert pruned.kept() == [prompts.answer(one, vlprune.from_dict(settings))[1]]


# ------------------------------------------------------------------ over HTTP


def ask(address: str, question: str, picture: bytes) -> Any:
    url = "data:image/png;base64," + base64.b64encode(picture).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0}
    # TinyVLM's template leaves the opening token to the tokenizer, which chats do not ask for it by default.
    body["add_special_tokens"] = True
    return requests.post(f"{address}/v1/chat/completions", json=body, timeout=120)


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def test_a_server_under_load_and_with_a_bad_image(tmp_path):
    prompts, settings = Transformers(*tinyvlm.load()), METHODS["tinyvlm"]
    folder, asked = checkpoint("tinyvlm", tmp_path / "tiny"), questions(16)
    expected = [prompts.answer(one, vlprune.from_dict(settings))[0] for one in asked]
    with server(folder, tmp_path / "log", "--additional-config", json.dumps({"vlprune": settings})) as address:
        with ThreadPoolExecutor(16) as threads:
            replies = list(threads.map(lambda one: ask(address, one.question, png(one.image)), asked))
        assert [reply.status_code for reply in replies] == [200] * 16
        assert [reply.json()["choices"][0]["message"]["content"].strip() for reply in replies] == expected
        for bad in (b"no image", png(asked[0].image)[:200]):
            assert 400 <= ask(address, "What?", bad).status_code < 500
        assert ask(address, asked[0].question, png(asked[0].image)).status_code == 200


def test_a_wrong_configuration_stops_the_server(tmp_path):
    folder = checkpoint("tinyvlm", tmp_path / "tiny")
    wrong: dict[str, dict[str, Any]] = {
        "unknown method 'hird'; did you mean 'hired'?": {"method": "hird"},
        "budget=1.5 is out of range": {"method": "hired", "budget": 1.5},
        "fastv acts in prefill": {"method": "fastv"},
    }

    def started(settings: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        command = vllm_server.command(str(folder), *OPTIONS, "--additional-config", json.dumps({"vlprune": settings}))
        return subprocess.run(command, capture_output=True, text=True, timeout=START)

    with ThreadPoolExecutor(len(wrong)) as threads:
        for line, done in zip(wrong, threads.map(started, wrong.values()), strict=True):
            assert done.returncode != 0
            assert line in vllm_server.reason(done.stdout + done.stderr)


def test_the_benchmark_serves_without_pruning_and_with(tmp_path):
    out, small = tmp_path / "rows.csv", "--dtype float32 --enforce-eager --max-model-len 1024"
    told = "serve --like llava-next-tiny --methods uniform --concurrency 1,2 --requests 3 --new-tokens 4 --no-again"
    result = CliRunner().invoke(commands.app, [*told.split(), "--options", small, "--out", str(out)])
    assert result.exit_code == 0, result.output
    rows = journal.read(out)
    assert [(row["method"], row["concurrency"], row["error"]) for row in rows] == [
        (method, concurrency, None) for method in ("none", "uniform") for concurrency in (1, 2)
    ]
    assert [(row["requests"], row["failed"]) for row in rows] == [(3, 0), (4, 0)] * 2
    for whole, pruned in zip(rows[:2], rows[2:], strict=True):
        assert whole["prompt_tokens"] - pruned["prompt_tokens"] == 336 - int(0.2 * 336)
        assert pruned["first_ms_p50"] > 0
        assert pruned["requests_per_s"] > 0


def test_positions_past_the_table_are_cut_where_they_lie():
    """A CUDA graph reads positions from where they were when it was recorded."""

    class Base:
        def forward(self, input_ids: Any, positions: torch.Tensor) -> torch.Tensor:
            return positions

    class Model(OnePosition, Base):
        def __init__(self, last: int):
            self.last_position = last

    given = torch.tensor([[3, 9, 40], [1, 1, 1], [2, 2, 2]])
    found = Model(last=9).forward(None, given)
    assert found.tolist() == [3, 9, 9]
    assert found.data_ptr() == given.data_ptr()


def test_caches_tell_settings_apart():
    """What caches of features and prompts go by depends on the image and on the settings."""

    class Base:
        def _get_mm_hashes(self, inputs: Any) -> dict[str, list[str]]:
            return {"image": list(inputs)}

    class Known(Processor, Base):
        def __init__(self, **settings: Any):
            config = SimpleNamespace(vlprune=vlprune.HiRED(**settings).to_dict())
            self.info = SimpleNamespace(ctx=SimpleNamespace(model_config=SimpleNamespace(hf_config=config)))

    settings: list[dict[str, Any]] = [{"budget": 0.2}, {"budget": 0.4}, {"budget": 0.2, "alpha": 0.3}]
    found = [hashed for one in settings for hashed in Known(**one)._get_mm_hashes("ab")["image"]]
    assert len(set(found)) == len(found)
    assert Known(budget=0.2)._get_mm_hashes("ab")["image"] == found[:2]
