"""``attention_columns``: reference and kernel against the sum of a map taken row by row in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.ahead import compiles
from tests.kernels.attention_naive import attention_map, close
from tests.kernels.common import BACKENDS, DEVICE, DTYPES, needs_triton
from vlprune.kernels import attention_columns, using


def summed(query: Tensor, key: Tensor, weights: Tensor, **options) -> Tensor:
    return torch.einsum("bhqk,bq->bhk", attention_map(query, key, **options), weights.double())


def inputs(batch=2, groups=2, group=2, queries=5, keys=9, width=8, dtype=torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    query = torch.randn(batch, groups * group, queries, width, device=DEVICE).to(dtype) * 2
    key = torch.randn(batch, groups, keys, width, device=DEVICE).to(dtype)
    return query, key, torch.randn(batch, queries, device=DEVICE) / queries


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
@settings(max_examples=15)
def test_equals_a_sum_of_rows(backend, data):
    def draw(*options):
        return data.draw(st.sampled_from(options))

    batch, groups, group, dtype = draw(1, 2), draw(1, 2), draw(1, 3), draw(*DTYPES)
    queries, keys = draw(1, 3, 70, 131), draw(1, 5, 65, 140)
    query, key, weights = inputs(batch, groups, group, queries, keys, draw(1, 24, 40, 72), dtype)
    weights = weights * draw(torch.ones_like(weights), torch.rand_like(weights) < 0.5, torch.zeros_like(weights))
    options = {"causal_shift": draw(None, 0, keys - queries, -2, 1), "softcap": draw(None, 3.0), "scaling": draw(None, 0.3)}
    options["valid"] = draw(None, torch.rand(batch, keys, device=DEVICE) < 0.7)
    with using(backend):
        found = attention_columns(query, key, weights, **options)
    assert found.is_contiguous()
    close(found, summed(query, key, weights, **options), dtype)


@pytest.mark.parametrize("shift", [None, 0, 70, -70])
@pytest.mark.parametrize("backend", BACKENDS)
def test_several_blocks(backend, shift):
    """More queries and keys than any block holds; weights that begin late and end early, differently in each sample."""
    query, key, weights = inputs(2, 1, 1, queries=290, keys=300, width=16)
    weights[0, :37] = weights[1, 261:] = 0
    weights[1, 100:240:3] = 0
    with using(backend):
        close(attention_columns(query, key, weights, causal_shift=shift), summed(query, key, weights, causal_shift=shift))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_given_log_sum(backend):
    query, key, weights = inputs(keys=7)
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key.repeat_interleave(2, 1)) * 0.4
    seen = torch.arange(7, device=DEVICE) <= torch.arange(5, device=DEVICE)[:, None] - 2
    lse = scores.masked_fill(~seen, -torch.inf).logsumexp(-1)
    wanted = summed(query, key, weights, scaling=0.4, causal_shift=-2)
    # Queries 0 and 1 see nothing. Kernels of attention write minus or plus infinity then.
    for given_lse in (lse, lse.masked_fill(lse == -torch.inf, torch.inf), lse.transpose(1, 2).contiguous().transpose(1, 2)):
        with using(backend):
            close(attention_columns(query, key, weights, scaling=0.4, causal_shift=-2, lse=given_lse), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    wide = torch.randn(2, 6, 4, 3, 8, device=DEVICE)
    query, key = wide[:, :, :, 0].transpose(1, 2), wide[:, :5, :2, 1].transpose(1, 2)
    weights = torch.rand(1, 12, device=DEVICE)[:, ::2].expand(2, -1)
    valid = (torch.rand(2, 10, device=DEVICE) < 0.7)[:, ::2]
    options = {"causal_shift": 0, "valid": valid}
    with using(backend):
        close(attention_columns(query, key, weights, **options), summed(query, key, weights, **options))
        thin = query[..., ::2], key[..., ::2], weights
        close(attention_columns(*thin), summed(*thin))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity(backend, bad):
    """What is hidden or weighs nothing does not matter; what counts spoils the keys that its query sees."""
    query, key, weights = inputs(1, 1, 2, queries=9, keys=80)
    weights[0, [0, 8]] = 0
    query[0, :, 0] = bad
    key[0, :, 3] = bad
    key[0, :, 72:] = bad
    key[0, :, 72, 1:] = 0
    query[0, :, 7, 0] = query[0, :, 7, 0].abs()
    valid = torch.arange(80, device=DEVICE)[None] != 3
    clean = query.nan_to_num(0, 0), key.nan_to_num(0, 0), weights
    wanted = summed(*clean, causal_shift=64, valid=valid)
    with using(backend):
        close(attention_columns(query, key, weights, causal_shift=64, valid=valid), wanted)
        # Now query 7 sees key 72, and with it all that are valid before.
        found = attention_columns(query, key, weights, causal_shift=65, valid=valid)
    wanted = torch.zeros_like(wanted)
    wanted[..., :73] = torch.nan
    wanted[..., 3] = 0
    close(found, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_see(backend):
    query, key, weights = inputs()
    nobody = torch.zeros(2, 9, dtype=torch.bool, device=DEVICE)
    with using(backend):
        assert torch.equal(attention_columns(query, key, weights, valid=nobody), torch.zeros(2, 4, 9, device=DEVICE))
        assert not attention_columns(query, key, weights, causal_shift=-5).any()
        assert not attention_columns(query, key, weights * 0).any()
        assert not attention_columns(query[:, :, :0], key, weights[:, :0]).any()
        assert attention_columns(query, key[:, :, :0], weights).shape == (2, 4, 0)


def test_is_a_well_behaved_operator():
    query, key, weights = inputs()
    valid, lse = torch.rand(2, 9, device=DEVICE) < 0.7, torch.randn(2, 4, 5, device=DEVICE)
    operator = torch.ops.vlprune.attention_columns.default
    torch.library.opcheck(operator, (query, key, weights, 0.5, 4, valid, 30.0, lse))
    torch.library.opcheck(operator, (query, key, weights, 0.5, None, None, None, None))


def test_compiles_into_one_graph():
    @torch.compile(backend="eager", fullgraph=True)
    def twice(query, key, weights):
        return attention_columns(query, key, weights, causal_shift=4) * 2

    given_inputs = inputs()
    close(twice(*given_inputs), 2 * summed(*given_inputs, causal_shift=4))


TYPES = dict.fromkeys(("group", "heads", "count", "length", "shift"), "i32")
TYPES |= {f"{name}_{k}": "i32" for name, n in (("query", 3), ("key", 3), ("valid", 2), ("weights", 2)) for k in range(n)}
TYPES |= {"weights": "*fp32", "valid": "*u8", "lse": "*fp32", "out": "*fp32", "factor": "fp32", "cap": "fp32"}


@needs_triton
@pytest.mark.parametrize(
    ("kind", "softcap", "large", "small", "constants"),
    [
        ("bf16", False, 128, 64, {"WIDTH": 128, "SIZE": 128, "TAIL": 0, "ALIGN": 16}),
        ("fp32", True, 64, 32, {"WIDTH": 72, "SIZE": 64, "TAIL": 16, "ALIGN": 8}),
    ],
)
def test_compiles_for_gpus(tmp_path, kind, softcap, large, small, constants):
    types = TYPES | {"query": f"*{kind}", "key": f"*{kind}"}
    constants = constants | {"CAUSAL": True, "VALID": True, "SOFTCAP": softcap}
    sums = {name: value for name, value in types.items() if name != "lse"}
    compiles(tmp_path, "attention_columns", "_log_sums", sums, **constants, QUERIES=large, KEYS=small)
    compiles(tmp_path, "attention_columns", "_attention_columns", types, **constants, QUERIES=small, KEYS=large, SCAN=1024)
