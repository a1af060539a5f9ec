"""What pruning must not cost: waiting for the device, memory, and anything at all where nothing is to be dropped."""

from __future__ import annotations

import re
import sys
from collections import Counter
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vlprune
from tests import zoo
from tests.test_signals_vision import flash_vision
from vlprune.method import Method

PACKAGE = str(Path(vlprune.__file__).parent)

# ------------------------------------------------------------------ waiting for the device

ASKING = {
    *("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__contains__", "cpu", "numpy", "nonzero"),
    *("masked_select", "unique", "unique_consecutive", "equal", "allclose", "bincount", "argwhere"),
}
"""Functions of tensors whose result, or its shape, the host has to know."""

READING = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim", "bincount"}
"""The same among the operations that they are made of."""


def place() -> str | None:
    """File and line of the package that called, None where another's code did."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(PACKAGE):
            return f"{file[len(PACKAGE) + 1 :]}:{frame.f_lineno}"
        if file != __file__ and f"{Path(torch.__file__).parent}/" not in file and "<" not in file:
            return None
        frame = frame.f_back
    return None


class Device:
    """Tensors that would be on the device: inputs, weights, what is moved or made there, and all that is computed from them.

    On the CPU everything is in one place, so somebody has to remember. What a method computes from layouts is on the host.
    """

    def __init__(self, *tensors: Tensor):
        self.tensors: Any = WeakIdKeyDictionary(dict.fromkeys(tensors, True))

    def holds(self, tree: Any) -> bool:
        return any(torch.is_tensor(leaf) and leaf in self.tensors for leaf in tree_iter(tree))

    def add(self, tree: Any) -> None:
        for leaf in tree_iter(tree):
            if torch.is_tensor(leaf):
                self.tensors[leaf] = True


def flagged(name: str, args: Any) -> bool:
    """Whether it is an index by flags: how many rows come out is for the host to ask."""
    flags = (torch.bool, torch.uint8)
    return name.startswith(("index", "__getitem__", "__setitem__")) and any(
        torch.is_tensor(index) and index.dtype in flags for index in tree_iter(args[1:2])
    )


class Asked(TorchFunctionMode):
    """Notes where the package asks a tensor of the device for values."""

    def __init__(self, device: Device):
        super().__init__()
        self.device = device
        self.places: Counter[str] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        repeats = name == "repeat_interleave" and any(map(torch.is_tensor, [*args[1:], *kwargs.values()]))
        asks = name in ASKING or flagged(name, args) or repeats
        if asks and self.device.holds((args, kwargs)) and (where := place()):
            self.places[f"{name} at {where}"] += 1
        out = function(*args, **kwargs)
        moved = name == "to" and any(isinstance(a, torch.device) for a in (*args[1:], *kwargs.values()))
        copied = moved and not kwargs.get("non_blocking") and not self.device.holds(args[0])
        if copied and (where := place()) and not where.startswith("engine/devices.py"):
            # A copy from the host waits until the device has done all that it was given before.
            self.places[f"copy at {where}"] += 1
        if moved and not self.device.holds(out):
            out = out.clone()
        if moved or (kwargs.get("device") is not None and torch.is_tensor(out)):
            self.device.add(out)
        return out


class Read(TorchDispatchMode):
    """The same one level below, where nothing can hide."""

    def __init__(self, device: Device):
        super().__init__()
        self.device = device
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        there = self.device.holds((args, kwargs))
        name = function.overloadpacket.__name__
        asks = name in READING or flagged(name, args) or str(function) == "aten.repeat_interleave.Tensor"
        if asks and there and (where := place()):
            self.places[f"{name} at {where}"] += 1
        out = function(*args, **(kwargs or {}))
        if there:
            self.device.add(out)
        return out


QUIET: dict[str, Method] = {
    "hired": vlprune.HiRED(budget=0.4),
    "random": vlprune.Random(budget=0.4),
    "uniform": vlprune.Uniform(budget=0.4),
    "pool": vlprune.Pool(budget=0.4),
    "resize": vlprune.Resize(budget=0.4),
    "fastv": vlprune.FastV(layer=1, budget=0.6),
    "snapkv": vlprune.SnapKV(budget=0.4),
    "flowcut": vlprune.FlowCut(budget=0.6, schedule="even"),
    "mustdrop": vlprune.MustDrop(budget=0.6),
    "chain": vlprune.chain(vlprune.HiRED(budget=0.7), vlprune.FastV(layer=1, keep=0.6), vlprune.SnapKV(budget=0.5)),
}


@cache
def model_of(family: str, attention: str = "sdpa") -> Any:
    return zoo.build(family, attention)


def waits(model: Any, inputs: dict[str, Tensor], method: Method) -> Counter[str]:
    """Where the package waits for the device in a prefill and a step after it, once it knows images of this size."""
    token = {"input_ids": torch.full((len(inputs["input_ids"]), 1), 5)}
    if len(inputs["input_ids"]) > 1:
        # Of one sequence nothing is padding. Qwen2.5-VL takes no mask of more than a lone token without its positions.
        token["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    with vlprune.applied(model, method), torch.no_grad(), ExitStack() as stack:
        model(**inputs)
        # Sizes and numbers of images are the host's: the models read them themselves.
        fed = [value for name, value in (*inputs.items(), *token.items()) if not re.search("size|grid|num_images", name)]
        device = Device(*fed, *model.parameters(), *model.buffers())
        asked, read = stack.enter_context(Asked(device)), stack.enter_context(Read(device))
        model(**token, past_key_values=model(**inputs).past_key_values)
        return asked.places + read.places


WINDOWS = ("qwen2_5_vl", "flowcut")
"""Who drops inside of an encoder with windows leaves some of them empty, and not every kernel can do with these."""
BLANK = ("idefics3", "smolvlm")
"""Families whose model is not told how many tiles a sample has, but finds out which are blank; so must we."""
WHOLE = ("llava", "llava_next", "qwen2_5_vl")
CASES = [(f, m) for f in WHOLE for m in QUIET if (f, m) != WINDOWS]
"""All methods in encoders of each kind, and in all other families those that ask in different places."""
CASES += dict.fromkeys(
    (f, m) for f, m, _ in zoo.combinations() if f not in WHOLE and m in ("hired", "snapkv", "flowcut", "mustdrop")
)


@pytest.mark.parametrize(("family", "method"), CASES)
def test_a_prompt_without_padding_is_pruned_without_waiting(family, method):
    """One sequence: no tensor is asked for a value, and no shape depends on one."""
    inputs = zoo.prompt(family)
    del inputs["attention_mask"]
    found = waits(model_of(family), inputs, QUIET[method])
    expected = {"tolist at integrations/idefics.py": 1} if family in BLANK else {}
    assert {where.split(":")[0]: count for where, count in found.items()} == expected


def test_empty_windows_are_asked_for_where_the_kernel_takes_one_at_a_time():
    """Once a drop, where transformers would ask in every block. Flash attention takes empty windows, so nobody asks."""
    family, method = WINDOWS
    inputs = zoo.prompt(family)
    del inputs["attention_mask"]
    found = waits(model_of(family), inputs, QUIET[method])
    assert {where.split(" ")[-1].split(":")[0] for where in found} == {"engine/vision_rows.py"}
    assert sum(count for where, count in found.items() if where.startswith("cpu")) == 1
    model = zoo.build(family)
    with flash_vision(model):
        assert waits(model, inputs, QUIET[method]) == {}


MASKED = [(f, m) for f in ("llava", "qwen2_5_vl") for m in ("hired", "mustdrop", "chain")]
MASKED += [(f, "snapkv") for f in zoo.FAMILIES if f not in BLANK]


@pytest.mark.parametrize(("family", "method"), MASKED)
def test_a_mask_that_hides_nothing_is_not_asked(family, method):
    """As generate() gives it: transformers itself reads the mask for the kernel's sake. Gemma 3's is read for nobody."""
    inputs = zoo.prompt(family)
    assert inputs["attention_mask"].all()
    found = waits(model_of(family), inputs, QUIET[method])
    expected = {"tolist at engine/sequence.py": 1} if family == "gemma3" else {}
    assert {where.split(":")[0]: count for where, count in found.items()} == expected


@pytest.mark.parametrize("method", QUIET)
def test_a_batch_is_asked_for_its_placeholders_and_its_padding(method):
    """Once a prefill, at its beginning."""
    found = waits(model_of("llava"), zoo.prompt("llava", **zoo.SCENARIOS["batch"]), QUIET[method])
    assert {where.split(":")[0]: count for where, count in found.items()} == {
        "tolist at engine/placing.py": 1,
        "tolist at engine/sequence.py": 1,
    }


class Waiting(vlprune.Method):
    """Asks in every way."""

    def select(self, image: vlprune.ImageTokens) -> vlprune.Selection:
        loud = image.features.norm(dim=-1)
        table = image.host(torch.arange(loud.shape[0]))
        asks = [
            lambda: loud.max().item(),
            lambda: float(loud.sum()),
            lambda: bool(loud[0] > 0),
            lambda: loud.tolist(),
            lambda: table.tolist(),
            lambda: loud[loud > 0],
            lambda: (loud > 0).nonzero(),
            lambda: loud.unique(),
            lambda: loud.repeat_interleave((loud > 0).long()),
            lambda: loud.cpu(),
            lambda: torch.arange(3).to(loud.device),
        ]
        for ask in asks:
            ask()
        return vlprune.Selection(table[: image.count])


def test_waiting_is_noticed(monkeypatch):
    """Each way to ask, also for what has only been moved to the device."""
    monkeypatch.setattr("tests.test_costs.PACKAGE", "")

    def ways(method: Method) -> Counter[str]:
        return Counter(where.split(" at ")[0] for where in waits(model_of("llava"), zoo.prompt("llava"), method).elements())

    found = ways(Waiting(budget=0.5)) - ways(vlprune.Random(budget=0.5))
    assert found["tolist"] == 2
    asked = {"item", "__float__", "__bool__", "__getitem__", "nonzero", "unique", "repeat_interleave", "cpu", "copy"}
    assert asked <= found.keys()


# ------------------------------------------------------------------ memory


class Living(TorchDispatchMode):
    """Bytes of tensors that were made and are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[StorageWeakRef, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = [leaf.untyped_storage()._cdata for leaf in tree_iter((args, kwargs)) if torch.is_tensor(leaf)]
        out = function(*args, **(kwargs or {}))
        self.sizes = {ref: size for ref, size in self.sizes.items() if not ref.expired()}
        for leaf in tree_iter(out):
            if torch.is_tensor(leaf) and leaf.untyped_storage()._cdata not in known:
                self.sizes[StorageWeakRef(leaf.untyped_storage())] = leaf.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(self.sizes.values()))
        return out


@cache
def wide(hidden: int = 256, mlp: int = 512) -> Any:
    """LLaVA with the 576 visual tokens of the real one; its LLM is 4096 wide, with 11008 neurons."""
    shared = {"num_hidden_layers": 4, "num_attention_heads": 8}
    text = {"hidden_size": hidden, "intermediate_size": mlp}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=128, intermediate_size=512, image_size=336, patch_size=14, **shared),
        text_config=LlamaConfig(**text, num_key_value_heads=4, vocab_size=100, **shared),
        image_token_index=zoo.IMAGE,
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).to(torch.bfloat16).eval()


def question(images: int = 1) -> dict[str, Tensor]:
    ids = torch.tensor([[1, 5, *[zoo.IMAGE] * 576 * images, *range(10, 40)]])
    return {"input_ids": ids, "pixel_values": torch.randn(images, 3, 336, 336).to(torch.bfloat16)}


def peak(model: Any, inputs: dict[str, Tensor]) -> int:
    with torch.no_grad(), Living() as living:
        model(**inputs, logits_to_keep=1)
    return living.peak


BUDGET = 0.6
"""What FastV can reach in four layers is a half and a bit."""


OF_PAIRS = {"cdpruner", "prumerge", "prumerge+", "scope"}
"""Methods that have a number for each pair of visual tokens: little beside the activations of a real model."""
OF_HIDDEN = {"transprune", "zipvl"}
"""Methods that hold on to hidden states or keys of a layer: little beside its neurons in a real model."""
WITH_A_ROUTER = {"dyvte"}
"""Methods that need something trained for the model."""
COSTING = [name for name in vlprune.methods() if name not in WITH_A_ROUTER and zoo.prunes(name, "single")]


@pytest.mark.parametrize("method", COSTING)
def test_no_method_needs_more_memory_than_none(method):
    """The peak of a prefill with 576 visual tokens. A method that waits for the last layer has noted some numbers by then."""
    narrow = method not in OF_PAIRS | OF_HIDDEN
    model, inputs = wide() if narrow else wide(512, 1408), question()
    unpruned = peak(model, inputs)
    noted = 2 * 4 * 8 * 4 * inputs["input_ids"].shape[1] if vlprune.methods()[method]().waits else 0
    with vlprune.applied(model, method, budget=BUDGET):
        peak(model, inputs)
        assert peak(model, inputs) <= unpruned + noted


# ------------------------------------------------------------------ nothing to do


class Calls(TorchDispatchMode):
    """The operations that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", [name for name in COSTING if not vlprune.methods()[name]().adaptive])
def test_a_budget_of_one_runs_no_more_operations_in_the_decoder_layers(method):
    model, inputs = model_of("llava"), zoo.prompt("llava")

    def run() -> list[list[str]]:
        """Operations of each layer, those of hooks that others have put before it included."""
        entered: list[Calls] = []
        handles = []
        for layer in model.model.language_model.layers:
            handles.append(layer.register_forward_pre_hook(lambda *_: entered.append(Calls().__enter__()), prepend=True))
            handles.append(layer.register_forward_hook(lambda *_: entered[-1].__exit__(None, None, None)))
        with torch.no_grad():
            model(**inputs)
        for handle in handles:
            handle.remove()
        return [calls.names for calls in entered]

    expected = run()
    with vlprune.applied(model, method, budget=1.0):
        assert run() == expected
    assert len(expected) == 4
    assert all(expected)
