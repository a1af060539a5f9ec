"""TinyVLM and its sibling in vLLM on the CPU, beside the same models in transformers: same prompts, same images."""

from __future__ import annotations

import gc
import json
import operator
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaNextForConditionalGeneration, Qwen2VLVideoProcessor

import vlprune
from vlprune.bench import vllm_server
from vlprune.evals import tinyvlm
from vlprune.evals.benchmarks.base import Example
from vlprune.evals.benchmarks.synthvqa import SynthVQA
from vlprune.evals.tinyvlm import build, export

TOKENS = 8
"""TinyVLM's longest answers."""
START = 600
"""Seconds that a server may take to start."""
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # So that a test may ask the model in another process what it kept.
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
}
os.environ.update(ENVIRONMENT)


def checkpoint(name: str, folder: Path) -> Path:
    """The shipped checkpoint with what vLLM's processor of Qwen2.5-VL wants besides: settings for videos, and its name."""
    shipped = tinyvlm.CHECKPOINT if name == "tinyvlm" else tinyvlm.QWEN_CHECKPOINT
    shutil.copytree(shipped, folder)
    if name == "tinyvlm-qwen":
        images = json.loads((folder / "preprocessor_config.json").read_text())
        sizes = {"shortest_edge": images["min_pixels"], "longest_edge": images["max_pixels"]}
        patches = {key: images[key] for key in ("patch_size", "merge_size", "temporal_patch_size")}
        Qwen2VLVideoProcessor(size=sizes, **patches).save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps({**images, "processor_class": "Qwen2_5_VLProcessor"}))
    return folder


def for_two_ranks(folder: Path) -> LlavaNextForConditionalGeneration:
    """A random LLaVA-NeXT of which two ranks can each have half of the heads; TinyVLM has five."""
    config = build.config(len(build.tokenizer()))
    for key, value in {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32}.items():
        setattr(config.text_config, key, value)
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(config).eval()
    export.export(model, folder)
    return model


def questions(count: int) -> list[Example]:
    return SynthVQA().examples(count)


def score(asked: Sequence[Example], answers: Sequence[str]) -> float:
    """Points of accuracy, 0 to 100."""
    scorer = SynthVQA()
    return 100 * sum(scorer.score(one, answer) for one, answer in zip(asked, answers, strict=True)) / len(asked)


class Transformers:
    """Answers one question at a time, as vlprune prunes it there."""

    def __init__(self, model: Any, processor: Any):
        self.model, self.processor = model, processor

    def prompt(self, question: str) -> str:
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        return self.processor.apply_chat_template([message], add_generation_prompt=True)

    def answer(self, one: Example, method: vlprune.Method | None = None) -> tuple[str, list[int]]:
        """The answer, and which of the image's tokens were kept."""
        inputs = self.processor(images=[one.image], text=[self.prompt(one.question)], return_tensors="pt")
        inputs.pop("token_type_ids", None)
        kept: list[int] = []
        if method is not None:
            vlprune.apply(self.model, method)
        try:
            with torch.inference_mode():
                out = self.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
            if method is not None:
                kept = vlprune.report(self.model).images[0].kept
        finally:
            if method is not None:
                vlprune.remove(self.model)
        new = out[:, inputs["input_ids"].shape[1] :]
        return self.processor.batch_decode(new, skip_special_tokens=True)[0].strip(), kept


@dataclass
class Answer:
    text: str
    prompt_tokens: int


class Engine:
    """vLLM without a server. ``options`` are those of ``vllm.LLM``."""

    def __init__(self, folder: Path, prompts: Transformers, **options: Any):
        from vllm import LLM

        self.prompts = prompts
        limits = {"max_model_len": 1024, "max_num_seqs": 8, "limit_mm_per_prompt": {"image": 4}}
        self.llm = LLM(str(folder), dtype="float32", enforce_eager=True, disable_log_stats=True, **{**limits, **options})

    def answer(self, asked: Sequence[Example]) -> list[Answer]:
        requests = [{"prompt": self.prompts.prompt(o.question), "multi_modal_data": {"image": o.image}} for o in asked]
        return self.generate(requests)

    def generate(self, requests: Sequence[Any]) -> list[Answer]:
        from vllm import SamplingParams

        outputs = self.llm.generate(requests, SamplingParams(temperature=0, max_tokens=TOKENS), use_tqdm=False)
        return [Answer(out.outputs[0].text.strip(), len(out.prompt_token_ids or ())) for out in outputs]

    def kept(self) -> list[list[int]]:
        """Tokens kept of each image that was encoded last, on all ranks the same."""
        first, *others = [
            [keep.tolist() for keep in images] for images in self.llm.apply_model(operator.attrgetter("pruner.kept"))
        ]
        assert all(other == first for other in others)
        return first


@contextmanager
def engine(folder: Path, prompts: Transformers, **options: Any) -> Iterator[Engine]:
    made = Engine(folder, prompts, **options)
    try:
        yield made
    finally:
        made.llm.llm_engine.engine_core.shutdown()
        del made.llm
        gc.collect()


# ------------------------------------------------------------------ over HTTP


OPTIONS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--max-num-seqs", "16")


def server(folder: Path, log: Path, *options: str) -> AbstractContextManager[str]:
    """Address of an OpenAI-compatible server."""
    return vllm_server.server(str(folder), [*OPTIONS, "--served-model-name", "tiny", *options], log, START)
