# SPDX-License-Identifier: Apache-2.0
"""Tensor-parallel plans: which part of which parameter a rank holds.

A plan has the form of transformers' ``base_model_tp_plan``: names of modules or parameters, with ``*`` for
the numbers of layers and experts, each with a style. A style says which dimension is split; styles that
differ only in what happens to activations split alike. The rules are those of
``transformers/distributed/tensor_parallel.py`` (5.23): weights are ``[..., out_features, in_features]``,
colwise splits the output, rowwise the input.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from ..formats.hf_index import read_text
from ..formats.json_text import read_json


class Split(NamedTuple):
    """How a tensor is distributed over ranks. ``None`` instead of it means that every rank holds the whole
    tensor."""

    dim: int
    groups: int = 1
    """Number of parts of that dimension that are split one by one: 2 for gate and up projection in one
    tensor."""
    sizes: tuple[int, ...] = ()
    """Sizes of these parts, if they differ: queries, and fewer keys and values, in one tensor."""


def _colwise(parameter: str, ndim: int) -> Split | None:
    return Split(max(0, ndim - 2))  # a bias has the output's dimension only


def _rowwise(parameter: str, ndim: int) -> Split | None:
    return None if parameter == "bias" else Split(ndim - 1)  # a bias is added after the ranks' sum


def _packed_colwise(parameter: str, ndim: int) -> Split | None:
    return Split(0) if ndim == 1 else Split(ndim - 2, 2)


def _packed_rowwise(parameter: str, ndim: int) -> Split | None:
    return None if ndim == 1 else Split(ndim - 1, 2)


def _replicated(parameter: str, ndim: int) -> Split | None:
    return None


STYLES: Final[Mapping[str, Callable[[str, int], Split | None]]] = {
    **dict.fromkeys(("colwise", "colwise_gather_output", "colwise_rep"), _colwise),
    **dict.fromkeys(("rowwise", "rowwise_split_input", "rowwise_rep"), _rowwise),
    "packed_colwise": _packed_colwise,
    "packed_rowwise": _packed_rowwise,
    "embedding_rowwise": lambda parameter, ndim: Split(0),
    "embedding_colwise": lambda parameter, ndim: Split(1),
    **dict.fromkeys(
        (
            "replicate",
            "replicated",
            "replicated_with_grad_allreduce",
            "sequence_parallel",
            "all_reduce",
            "mla_kv_a_proj",
            "moe_tp_experts",
            "moe_identity_expert",
            "local_params",
        ),
        _replicated,
    ),
}
"""Style -> split of a parameter, by its own name (``"weight"``, ``"bias"``) and number of dimensions. The expert-parallel
styles are none of these: they give ranks whole experts."""


def style_of(name: str, plan: Mapping[str, str]) -> str | None:
    """Returns the style that a plan has for a parameter, by its name or else its module's; ``None`` if it has
    none."""
    key = _key_of(name, plan)
    return None if key is None else plan[key]


def split_of(name: str, shape: Sequence[int], style: str | None) -> Split | None:
    """Returns how a parameter of this name and shape is split.

    Raises ``ValueError`` for an unknown style, or one that needs more dimensions than there are.
    """
    if style is None:
        return None
    rule = STYLES.get(style)
    if rule is None:
        raise ValueError(
            f"{name}: tensor-parallel style {style!r} is not known; known are {', '.join(STYLES)}"
        )
    split = rule(name.rpartition(".")[2], len(shape))
    if split is not None and split.dim not in range(len(shape)):
        raise ValueError(f"{name}: a tensor of shape {list(shape)} cannot be split {style}")
    return split


def slices(name: str, shape: Sequence[int], split: Split, ranks: int) -> list[list[tuple[int, int]]]:
    """Returns for each rank the intervals of ``split.dim`` that it holds, one for each group, ascending.

    Raises ``ValueError`` if ranks would hold different amounts.
    """
    size = shape[split.dim]
    sizes = split.sizes or (size // split.groups,) * split.groups
    if sum(sizes) != size or any(group % ranks for group in sizes):
        packed = f", packed {split.groups} times," if split.groups > 1 else ""
        if split.sizes:
            packed = f", in parts of {', '.join(map(str, sizes))},"
        raise ValueError(
            f"{name}: dimension {split.dim} of {list(shape)}{packed} is not divisible by {ranks} ranks"
        )
    groups = list(zip(itertools.accumulate(sizes, initial=0), sizes))
    return [
        [(begin + rank * (n // ranks), begin + (rank + 1) * (n // ranks)) for begin, n in groups]
        for rank in range(ranks)
    ]


def read_plan(path: str | os.PathLike[str]) -> dict[str, str]:
    """Reads a plan from a JSON file: one object with a style for each name.

    Raises ``OSError``, and ``ValueError`` naming the file.
    """
    name = os.fspath(path)
    text = read_text(name)
    try:
        plan = read_json(text)
    except ValueError as error:
        raise ValueError(f"{name!r} is not a plan: {error}") from None
    if not isinstance(plan, dict) or not all(isinstance(style, str) for style in plan.values()):
        raise ValueError(f"{name!r} is not a plan: it must be one object that gives names a style")
    return plan


def splits_of(
    tensors: Iterable[tuple[str, Sequence[int]]], plan: Mapping[str, str]
) -> dict[str, Split | None]:
    """Returns how a plan splits tensors, which it calls by their names in the checkpoint.

    Tensors that it does not name are replicated. Raises ``ValueError`` as :func:`split_of`, and for entries
    that no tensor belongs to.
    """
    unused = set(plan)
    found = {}
    for name, shape in tensors:
        key = _key_of(name, plan)
        unused.discard(key or "")
        found[name] = split_of(name, shape, None if key is None else plan[key])
    if unused:
        raise ValueError(f"the plan has names that are not in the checkpoint: {', '.join(sorted(unused))}")
    return found


def _key_of(name: str, plan: Mapping[str, str]) -> str | None:
    generic = re.sub(r"\.\d+(?=\.|$)", ".*", name)
    for key in (generic, name, generic.rpartition(".")[0], name.rpartition(".")[0]):
        if key in plan:
            return key
    return None
