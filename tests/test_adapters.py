"""Projectors that were trained to give few tokens, against their definitions in loops, and in a model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests import zoo
from vlprune.adapters import MatryoshkaQueries, QueCC, question_vector
from vlprune.errors import OptionError

WIDTH, HIDDEN, TEXT = 32, 64, 64
Tensors = dict[str, Tensor]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64) / 2


def matryoshka() -> Tensors:
    """As the checkpoint of a whole model names them."""
    shapes: dict[str, tuple[int, ...]] = {"query": (16, WIDTH), "pos_embed": (16, WIDTH), "proj": (WIDTH, HIDDEN)}
    shapes |= {"attn.in_proj_weight": (3 * WIDTH, WIDTH), "attn.in_proj_bias": (3 * WIDTH,)}
    shapes |= {"attn.out_proj.weight": (WIDTH, WIDTH), "attn.out_proj.bias": (WIDTH,)}
    shapes |= {f"ln_{x}.{part}": (WIDTH,) for x in "qkv" for part in ("weight", "bias")}
    tensors = {f"model.mm_projector.{name}": noise(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    return {**tensors, "model.layers.0.mlp.up_proj.weight": noise(2, 2)}


def quecc(side: int = 2, levels: int = 2) -> Tensors:
    """As ``mm_projector.bin`` names them."""
    shapes: dict[str, tuple[int, ...]] = {"0.q_downsample.weight": (WIDTH, 1, side, side), "0.q_downsample.bias": (WIDTH,)}
    shapes |= {"0.clip_attn.in_proj_weight": (3 * WIDTH, WIDTH), "0.clip_attn.in_proj_bias": (3 * WIDTH,)}
    shapes |= {"0.clip_attn.out_proj.weight": (WIDTH, WIDTH), "0.clip_attn.out_proj.bias": (WIDTH,)}
    for name, inputs in (("q_proj", WIDTH), ("k_proj", levels * WIDTH), ("v_proj", levels * WIDTH)):
        shapes |= {f"0.{name}.0.weight": (WIDTH, inputs), f"0.{name}.2.weight": (WIDTH, WIDTH)}
        shapes |= {f"0.{name}.{i}.bias": (WIDTH,) for i in (0, 2, 3)} | {f"0.{name}.3.weight": (WIDTH,)}
    shapes |= {"0.text_projection.0.weight": (WIDTH, TEXT)}
    shapes |= {f"0.text_projection.{name}": (WIDTH,) for name in ("0.bias", "1.weight", "1.bias")}
    shapes |= {"1.weight": (HIDDEN, WIDTH), "1.bias": (HIDDEN,), "3.weight": (HIDDEN, HIDDEN), "3.bias": (HIDDEN,)}
    return {f"model.mm_projector.{name}": noise(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def norm(row: Tensor, t: Tensors, name: str) -> Tensor:
    centred = row - row.mean()
    return centred / math.sqrt(float(centred.square().mean()) + 1e-6) * t[f"{name}.weight"] + t[f"{name}.bias"]


def attend(query: Tensor, keys: list[Tensor], values: list[Tensor], t: Tensors, name: str, heads: int) -> Tensor:
    """One query's attention, head by head."""
    (wq, wk, wv), (bq, bk, bv) = t[f"{name}.in_proj_weight"].split(WIDTH), t[f"{name}.in_proj_bias"].split(WIDTH)
    q, ks, vs, out = wq @ query + bq, [wk @ k + bk for k in keys], [wv @ v + bv for v in values], []
    for head in range(heads):
        part = slice(head * WIDTH // heads, (head + 1) * WIDTH // heads)
        weights = [math.exp(float(q[part] @ k[part]) / math.sqrt(WIDTH // heads)) for k in ks]
        out.append(sum(w * v[part] for w, v in zip(weights, vs, strict=True)) / sum(weights))
    return t[f"{name}.out_proj.weight"] @ torch.cat(out) + t[f"{name}.out_proj.bias"]


def own(tensors: Tensors) -> Tensors:
    return {name.removeprefix("model.mm_projector."): tensor for name, tensor in tensors.items()}


def test_matryoshka_queries_are_what_their_definition_says():
    """One query after the other; fewer tokens are a prefix of more."""
    t, patches = own(matryoshka()), noise(2, 36, WIDTH)
    table = t["pos_embed"].float().view(1, 4, 4, WIDTH).permute(0, 3, 1, 2)
    table = F.interpolate(table, size=(6, 6), mode="bicubic").flatten(2)[0].T.double()
    keys = [norm(row, t, "ln_k") for row in table]
    projector = MatryoshkaQueries.from_checkpoint(matryoshka(), heads=4)
    with torch.no_grad():
        whole = projector(patches)
        for sample, rows in enumerate(patches):
            values = [norm(row, t, "ln_v") for row in rows]
            for i in (0, 5, 15):
                query = norm(t["query"][i] + t["pos_embed"][i], t, "ln_q")
                torch.testing.assert_close(whole[sample, i], attend(query, keys, values, t, "attn", 4) @ t["proj"])
        for count in (1, 7):
            projector.count = count
            torch.testing.assert_close(projector(patches), whole[:, :count])
    assert whole.shape == (2, 16, HIDDEN)


def mlp(row: Tensor, t: Tensors, name: str) -> Tensor:
    inner = F.gelu(t[f"{name}.0.weight"] @ row + t[f"{name}.0.bias"])
    return norm(t[f"{name}.2.weight"] @ inner + t[f"{name}.2.bias"], t, f"{name}.3")


@pytest.mark.parametrize("side", [1, 2, 4])
def test_quecc_is_what_its_definition_says(side):
    """Window by window: a convolution of its queries, which attends to its own patches."""
    t, levels, question = own(quecc(side)), noise(2, 16, 2 * WIDTH), noise(2, TEXT)
    projector = QueCC.from_checkpoint(quecc(side), heads=4)
    projector.question = question
    with torch.no_grad():
        found = projector(levels)
    assert found.shape == (2, 16 // side**2, HIDDEN)
    for sample, rows in enumerate(levels):
        text = norm(
            t["0.text_projection.0.weight"] @ question[sample] + t["0.text_projection.0.bias"], t, "0.text_projection.1"
        )
        queries = [mlp(row[WIDTH:] + text, t, "0.q_proj") for row in rows]
        for window in range(16 // side**2):
            top, left = window // (4 // side) * side, window % (4 // side) * side
            inside = [(top + y) * 4 + left + x for y in range(side) for x in range(side)]
            kernel = t["0.q_downsample.weight"].view(WIDTH, -1)
            query = sum(kernel[:, i] * queries[p] for i, p in enumerate(inside)) + t["0.q_downsample.bias"]
            keys, values = ([mlp(rows[p], t, f"0.{name}") for p in inside] for name in ("k_proj", "v_proj"))
            pooled = attend(query, keys, values, t, "0.clip_attn", 4)
            inner = F.gelu(t["1.weight"] @ pooled + t["1.bias"])
            torch.testing.assert_close(found[sample, window], t["3.weight"] @ inner + t["3.bias"])


def prompt_of(count: int) -> dict[str, Tensor]:
    """A prompt whose image has ``count`` placeholders."""
    inputs = zoo.prompt("llava", dtype=torch.float64)
    ids = inputs["input_ids"][0]
    places = (ids == zoo.IMAGE).nonzero()[:, 0]
    short = torch.cat([ids[: int(places[0]) + count], ids[int(places[-1]) + 1 :]])[None]
    return {"input_ids": short, "attention_mask": torch.ones_like(short), "pixel_values": inputs["pixel_values"]}


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def test_they_stand_in_for_a_models_projector():
    """As many visual tokens as asked for; and QueCC's tokens follow the question."""
    model = zoo.build("llava", dtype=torch.float64)
    model.model.multi_modal_projector = projector = MatryoshkaQueries.from_checkpoint(matryoshka(), count=3, heads=4)
    assert logits(model, prompt_of(3)).isfinite().all()
    projector.count = 9
    assert logits(model, prompt_of(9)).isfinite().all()
    model = zoo.build("llava", dtype=torch.float64)
    model.config.vision_feature_layer = [1, -2]
    model.model.multi_modal_projector = pooling = QueCC.from_checkpoint(quecc(), heads=4)
    answers = []
    for words in ([5, 6, 7], [8, 9]):
        padded = torch.tensor([words + [zoo.PAD] * (3 - len(words))])
        mask = (torch.arange(3) < len(words)).long()[None]
        pooling.question = question_vector(model, padded, mask)
        torch.testing.assert_close(pooling.question, question_vector(model, torch.tensor([words])))
        answers.append(logits(model, prompt_of(4))[:, -1])
    assert not torch.allclose(*answers)


def test_what_cannot_be_loaded_or_asked():
    with pytest.raises(OptionError, match=r"no mm_projector.query, .*another projector"):
        MatryoshkaQueries.from_checkpoint(quecc())
    with pytest.raises(OptionError, match=r"no mm_projector.0.clip_attn"):
        QueCC.from_checkpoint(matryoshka())
    with pytest.raises(OptionError, match="allowed are 1 to 16"):
        MatryoshkaQueries.from_checkpoint(matryoshka(), count=17, heads=4)
    with pytest.raises(OptionError, match="square"):
        MatryoshkaQueries.from_checkpoint(matryoshka(), heads=4)(noise(1, 6, WIDTH))
    with pytest.raises(OptionError, match="by the question"):
        QueCC.from_checkpoint(quecc(), heads=4)(noise(1, 16, 2 * WIDTH))
