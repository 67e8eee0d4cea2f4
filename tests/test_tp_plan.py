# SPDX-License-Identifier: Apache-2.0
"""Tensor-parallel plans: names, styles, intervals."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastshard.tools.tp_plan import STYLES, Split, read_plan, slices, split_of, splits_of, style_of

PLAN = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.mlp.experts": "moe_tp_experts",
    "layers.*.mlp.experts.down_proj": "rowwise",
    "layers.1.mlp.up_proj": "replicate",
}


@pytest.mark.parametrize(
    ("name", "style"),
    [
        ("layers.0.self_attn.q_proj.weight", "colwise"),
        ("layers.17.self_attn.q_proj.bias", "colwise"),
        ("layers.0.self_attn.q_proj", "colwise"),
        ("layers.3.mlp.experts.down_proj", "rowwise"),
        ("layers.3.mlp.experts.gate_up_proj", "moe_tp_experts"),
        ("layers.1.mlp.up_proj.weight", "replicate"),
        ("layers.2.mlp.up_proj.weight", None),
        ("layers.0.self_attn.q_proj.lora.weight", None),
        ("model.layers.0.self_attn.q_proj.weight", None),
        ("layers.w1.self_attn.q_proj.weight", None),
        ("q_proj", None),
    ],
)
def test_a_parameter_has_its_own_style_or_its_module_s(name, style):
    assert style_of(name, PLAN) == style


@pytest.mark.parametrize(
    ("style", "name", "shape", "split"),
    [
        ("colwise", "q.weight", (8, 4), Split(0)),
        ("colwise", "q.bias", (8,), Split(0)),
        ("colwise_gather_output", "lm_head.weight", (8, 4), Split(0)),
        ("colwise", "experts.up", (3, 8, 4), Split(1)),
        ("rowwise", "o.weight", (8, 4), Split(1)),
        ("rowwise", "o.bias", (8,), None),
        ("rowwise", "experts.down", (3, 8, 4), Split(2)),
        ("packed_colwise", "gate_up.weight", (8, 4), Split(0, 2)),
        ("packed_colwise", "experts.gate_up", (3, 8, 4), Split(1, 2)),
        ("packed_rowwise", "experts.gate_up", (3, 8, 4), Split(2, 2)),
        ("embedding_rowwise", "embed.weight", (8, 4), Split(0)),
        ("embedding_colwise", "embed.weight", (8, 4), Split(1)),
        ("replicate", "norm.weight", (8,), None),
        (None, "norm.weight", (8,), None),
    ],
)
def test_styles(style, name, shape, split):
    assert split_of(name, shape, style) == split


def test_an_unknown_style_is_named():
    with pytest.raises(ValueError, match=r"layers\.0\.q\.weight.*'grouped_gemm'.*colwise"):
        split_of("layers.0.q.weight", (8, 4), "grouped_gemm")


@pytest.mark.parametrize("style", sorted(STYLES))
def test_a_number_cannot_be_split(style):
    try:
        assert split_of("scale", (), style) is None
    except ValueError as error:
        assert "scale" in str(error) and style in str(error)


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 6), st.integers(1, 3), st.integers(0, 5))
def test_intervals_tile_the_dimension(ranks, groups, part):
    size = ranks * groups * part
    found = slices("w", (2, size), Split(1, groups), ranks)
    held = list(itertools.chain.from_iterable(range(*interval) for rank in found for interval in rank))
    assert sorted(held) == list(range(size))
    assert all(len(rank) == groups for rank in found)
    for group in range(groups):
        assert [rank[group] for rank in found] == sorted(rank[group] for rank in found)


def test_packed_intervals():
    assert slices("w", (8, 3), Split(0, 2), 2) == [[(0, 2), (4, 6)], [(2, 4), (6, 8)]]


def test_intervals_of_parts_of_different_sizes():
    split = Split(0, 3, (8, 4, 0))
    assert slices("w", (12, 3), split, 2) == [[(0, 4), (8, 10), (12, 12)], [(4, 8), (10, 12), (12, 12)]]


@pytest.mark.parametrize(
    ("split", "size"),
    [(Split(1), 6), (Split(1, 2), 12), (Split(1, 2, (8, 6)), 14), (Split(1, 2, (8, 4)), 16)],
)
def test_what_cannot_be_divided_is_named(split, size):
    with pytest.raises(ValueError, match=rf"w: dimension 1 of \[2, {size}\].* is not divisible by 4 ranks"):
        slices("w", (2, size), split, 4)


def test_a_plan_file(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text('{"a.*.w": "colwise", "b": "rowwise"}')
    tensors = [("a.0.w.weight", (4, 4)), ("b.weight", (4, 4)), ("c", (1,))]
    assert splits_of(tensors, read_plan(path)) == {
        "a.0.w.weight": Split(0),
        "b.weight": Split(1),
        "c": None,
    }


def test_a_plan_for_another_checkpoint_is_refused():
    with pytest.raises(ValueError, match="not in the checkpoint: a.*.v, b"):
        splits_of([("a.0.w.weight", (4, 4))], {"a.*.w": "colwise", "b": "colwise", "a.*.v": "colwise"})


@pytest.mark.parametrize(
    "text", ["", "[]", '{"a": 1}', '{"a": {"b": "colwise"}}', '{"a":"colwise","a":"rowwise"}', "[" * 100_000]
)
def test_what_is_no_plan(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"plan\.json.* is not a plan"):
        read_plan(path)
