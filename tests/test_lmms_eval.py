"""The plug-in for lmms-eval, against the installed lmms-eval."""

from __future__ import annotations

import inspect
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BatchFeature

import vlprune
from tests import zoo
from vlprune import presets
from vlprune.evals import synthvqa, tinyvlm

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed; `make env` installs it without its dependencies")

from lmms_eval.api.instance import Instance, unwrap_generation_output
from lmms_eval.models import get_model, list_available_models

from vlprune.integrations.lmms_eval import MODELS

EXAMPLES = list(synthvqa.examples("test", 3))
NEW_TOKENS = 8
BASES = {
    "vlprune_llava": "llava_hf",
    "vlprune_llava_onevision": "llava_hf",
    "vlprune_qwen2_5_vl": "qwen2_5_vl",
    "vlprune_qwen3_vl": "qwen3_vl",
}


def load(arguments: str, simple: bool = False) -> Any:
    """TinyVLM as ``python -m lmms_eval --model vlprune_llava --model_args ARGUMENTS --device cpu`` loads it."""
    given = {"batch_size": 1, "max_batch_size": None, "device": "cpu"}
    model = get_model("vlprune_llava", force_simple=simple).create_from_arg_string(
        f"pretrained={tinyvlm.CHECKPOINT},dtype=float32,{arguments}", given
    )
    model.task_dict = {"task": {"test": EXAMPLES}}
    return model


def messages(example: synthvqa.Example) -> list[dict[str, Any]]:
    content = [{"type": "image", "url": example.image}, {"type": "text", "text": example.question}]
    return [{"role": "user", "content": content}]


def visuals(example: synthvqa.Example) -> list[Any]:
    return [example.image]


def requests(simple: bool = False) -> list[Instance]:
    """What a task of lmms-eval makes of the examples."""
    made = []
    for number, example in enumerate(EXAMPLES):
        options = {"max_new_tokens": NEW_TOKENS}
        middle = (options, visuals) if simple else (messages, options)
        arguments = (example.question, *middle, number, "task", "test")
        metadata = {"task": "task", "doc_id": number, "repeats": 1}
        made.append(Instance(request_type="generate_until", arguments=arguments, idx=0, metadata=metadata))
    return made


def answers(model: Any, simple: bool = False) -> list[str]:
    return [unwrap_generation_output(output)[0] for output in model.generate_until(requests(simple))]


def expected(method: str | None, **options: Any) -> list[str]:
    """The answers of TinyVLM pruned by ``vlprune.apply``, without lmms-eval."""
    model, processor = tinyvlm.load()
    if method:
        vlprune.apply(model, method, **options)
    said = []
    for example in EXAMPLES:
        prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": example.question}]}]
        text = processor.apply_chat_template(prompt, add_generation_prompt=True)
        inputs = processor(images=[example.image], text=text, return_tensors="pt")
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        said.append(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return said


# ------------------------------------------------------------------ contract


def test_lmms_eval_finds_the_models_by_their_entry_point():
    assert "vlprune.integrations.lmms_eval:manifests" in {entry.value for entry in entry_points(group="lmms_eval.models")}
    assert set(MODELS) <= set(list_available_models())


@pytest.mark.parametrize("simple", [False, True], ids=["chat", "simple"])
@pytest.mark.parametrize("model_id", MODELS)
def test_lmms_eval_takes_the_class_and_all_but_our_part_is_its_own(model_id: str, simple: bool):
    """``get_model`` refuses classes that are not what the registry promises."""
    ours = get_model(model_id, force_simple=simple)
    theirs = get_model(BASES[model_id], force_simple=simple)
    assert issubclass(ours, theirs)
    assert {name for cls in ours.__mro__[: ours.__mro__.index(theirs)] for name in vars(cls) if not name.startswith("_")} == {
        "generate_until",
        "pretrained_by_default",
    }


@pytest.mark.parametrize("model_id", MODELS)
def test_no_argument_of_a_model_has_the_name_of_a_methods_option(model_id: str):
    """Or it could not be told whose it is."""
    theirs = set(inspect.signature(get_model(BASES[model_id])).parameters) - {"kwargs"}
    ours = {"method"} | {name for method in vlprune.methods().values() for name in inspect.signature(method).parameters}
    assert not theirs & ours


# ------------------------------------------------------------------ answers


@pytest.mark.parametrize("simple", [False, True], ids=["chat", "simple"])
@pytest.mark.parametrize(
    ("arguments", "method", "options"),
    [
        ("method=none", None, {}),
        ("method=hired,budget=0.1", "hired", {"budget": 0.1}),
        ("method=uniform,budget=64", "uniform", {"budget": 64}),
        ("method=fastv,budget=0.5,layer=1", "fastv", {"budget": 0.5, "layer": 1}),
    ],
)
def test_answers_are_those_of_the_pruned_model(arguments: str, method: str | None, options: dict[str, Any], simple: bool):
    assert answers(load(arguments, simple), simple) == expected(method, **options)


def test_a_low_budget_changes_answers():
    """So that the comparison above can tell pruned from unpruned."""
    assert expected("hired", budget=0.1) != expected(None)


def test_an_error_of_vlprune_is_raised_though_lmms_eval_notes_it_and_goes_on():
    model = load("method=fastv,budget=0.01")
    with pytest.raises(vlprune.BudgetError, match="raise the budget"):
        model.generate_until(requests())
    assert "generate" not in vars(model.model)


# ------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("arguments", "method"),
    [
        ("budget=0.1", vlprune.SCOPE(budget=0.1)),
        ("method=snapkv,budget=16,window=3", vlprune.SnapKV(budget=16, window=3)),
        ("method=random,budget=0.5,seed=-3", vlprune.Random(budget=0.5, seed=-3)),
        ("method=flowcut,target=none,schedule=even", vlprune.FlowCut(target=None, schedule="even")),
        ("method=mustdrop,budget=0.5,layers=[1,3]", vlprune.MustDrop(budget=0.5, layers=[1, 3])),
        (
            'method={"method":"chain","methods":[{"method":"hired","budget":64},{"method":"snapkv","budget":0.5}]}',
            vlprune.chain(vlprune.HiRED(budget=64), vlprune.SnapKV(budget=0.5)),
        ),
    ],
)
def test_arguments_become_the_method(arguments: str, method: vlprune.Method):
    loaded = load(arguments)
    assert loaded.method == method
    answers(loaded)
    assert vlprune.from_dict(vlprune.report(loaded.model).method) == method


def test_without_arguments_the_method_is_the_default_of_apply():
    assert load("").method == presets.preset(presets.CLS).make() == vlprune.SCOPE(budget=0.4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ("method=hierd", vlprune.UnsupportedMethodError, "did you mean 'hired'"),
        ("method=hired,bugdet=0.1", vlprune.OptionError, "did you mean 'budget'"),
        ("method=hired,budget=0", vlprune.BudgetError, "budget"),
        ("method=none,budget=0.1", vlprune.OptionError, "takes no budget"),
        ('method={"budget":0.1}', vlprune.OptionError, "to_dict"),
    ],
)
def test_wrong_arguments_are_told_before_the_model_is_loaded(arguments: str, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        get_model("vlprune_llava").create_from_arg_string(f"pretrained=there-is-no-such-model,{arguments}")


# ------------------------------------------------------------------ the other three


class Processor:
    """Stands in for processor and tokenizer of a tiny model: the real ones of these families want torchvision."""

    eos_token_id, pad_token_id, padding_side = None, zoo.PAD, "right"

    def __init__(self, prompt: dict[str, torch.Tensor]):
        self.prompt, self.tokenizer = prompt, self

    def apply_chat_template(self, messages: Any, **_: Any) -> Any:
        return ["prompt"] if isinstance(messages[0], list) else "prompt"

    def __call__(self, *, images: list[Any], **_: Any) -> BatchFeature:
        assert images == [EXAMPLES[0].image]
        return BatchFeature(self.prompt)

    def batch_decode(self, rows: list[torch.Tensor], **_: Any) -> list[str]:
        return [" ".join(map(str, row.tolist())) for row in rows]


@pytest.mark.parametrize(
    ("model_id", "family", "dtype"),
    [
        ("vlprune_llava_onevision", "llava_onevision", torch.float32),
        ("vlprune_qwen2_5_vl", "qwen2_5_vl", torch.bfloat16),
        ("vlprune_qwen3_vl", "qwen3_vl", torch.bfloat16),
    ],
)
def test_a_model_of_random_weights_answers_as_it_does_pruned(
    model_id: str, family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    zoo.build(family).save_pretrained(tmp_path)
    prompt = zoo.prompt(family, dtype=dtype)
    processor = Processor(prompt)
    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", lambda *_, **__: processor)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: processor)
    base = get_model(BASES[model_id])
    monkeypatch.setitem(
        base.generate_until.__globals__, "process_vision_info", lambda *_, **__: ([EXAMPLES[0].image], None, {})
    )
    arguments = f"pretrained={tmp_path},device_map=cpu,method=uniform,budget=2"
    loaded = get_model(model_id).create_from_arg_string(arguments, {"batch_size": 1, "device": "cpu"})
    loaded.task_dict = {"task": {"test": EXAMPLES}}
    said = loaded.generate_until(requests()[:1])

    alone = vlprune.apply(zoo.FAMILIES[family].model.from_pretrained(tmp_path, dtype=dtype).eval(), "uniform", budget=2)
    with torch.no_grad():
        output = alone.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert [answer.text for answer in said] == processor.batch_decode(output[:, prompt["input_ids"].shape[1] :])
    assert vlprune.report(loaded.model).entering == 2
    assert loaded.model.dtype == dtype
