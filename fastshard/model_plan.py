# SPDX-License-Identifier: Apache-2.0
"""The tensor-parallel plan that transformers has for a model, in terms of the tensors of its checkpoint.

A plan speaks of modules and parameters as they are in memory. The model is built from its ``config.json`` on the
meta device (no weights, no memory, none of the checkpoint's own code), and each name of the checkpoint is followed
through transformers' own conversions to the parameter it becomes part of: Mixtral's
``block_sparse_moe.experts.0.w1.weight`` is a slice of ``mlp.experts.gate_up_proj``, split like it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

import torch

from .tp_plan import Split, split_of, style_of

_KV_PROJECTIONS: Final = ("k_proj", "v_proj", "qkv_proj", "query_key_value")
_Q_PROJECTIONS: Final = ("q_proj",)


class _Place(NamedTuple):
    """What a tensor of the checkpoint becomes part of."""

    parameter: str
    operations: tuple[Any, ...]
    """Of the conversion; none: the tensor is the parameter."""


class ModelPlan:
    """The plan of the model whose ``config.json`` lies in a folder.

    Raises ``ImportError`` without transformers (5 or later), ``OSError`` without the configuration, and ``ValueError``
    for a model that transformers does not know, or that has no plan.
    """

    def __init__(self, folder: str) -> None:
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, WeightRenaming
        except ImportError as error:
            raise ImportError(
                "a model's own plan comes from transformers 5 or later: install it, or give a plan file"
            ) from error
        self._model = _on_meta(folder)
        self._name = type(self._model).__name__
        self._plan: dict[str, str] = self._model.tp_plan or {}
        if not self._plan:
            raise ValueError(f"{folder!r}: {self._name} has no tensor-parallel plan: give a plan file")
        self._parameters: dict[str, torch.Tensor] = self._model.state_dict()
        conversions = get_model_conversion_mapping(self._model)
        self._renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self._converters = [c for c in conversions if isinstance(c, WeightConverter)]

    def splits(self, tensors: Iterable[tuple[str, Sequence[int]]], ranks: int) -> dict[str, Split | None]:
        """How the tensors of the checkpoint, names and shapes, are split.

        Raises ``ValueError`` for a tensor that is no part of the model, one that becomes its parameter in a way that
        slices cannot follow, styles that nobody knows, attention heads that cannot be shared out evenly, and tied
        parameters that would have to be split in different ways.
        """
        self._check_ties()
        return {name: self._split(name, shape, ranks) for name, shape in tensors}

    def _split(self, name: str, shape: Sequence[int], ranks: int) -> Split | None:
        place = self._place(name)
        if place is None:
            return None
        split = self._split_of_parameter(place.parameter)
        whole = tuple(self._parameters[place.parameter].shape)
        inner = tuple(shape)
        if not place.operations and inner != whole:
            raise ValueError(f"{name} has shape {list(shape)}, {self._name} has {list(whole)}")
        if split is None:
            return None
        self._check_heads(place.parameter, ranks)
        if not place.operations:
            return split
        ndim = len(whole)
        kinds = [type(operation).__name__ for operation in place.operations]
        dims = [getattr(operation, "dim", 0) % ndim for operation in place.operations]
        plain = not any(getattr(operation, "num_shards_attribute", None) for operation in place.operations)
        # Packed tensors that are put together from their groups: each of them is a group.
        groups = 1 if "Concatenate" in kinds and split.dim == dims[-1] else split.groups
        if plain and kinds == ["Concatenate"] and len(inner) == ndim:
            return Split(split.dim, groups)
        merged = kinds in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]) and dims[0] == 0
        if plain and merged and len(inner) == ndim - 1 and split.dim > 0:
            return Split(split.dim - 1, groups)  # a slice of the parameter's first dimension
        raise ValueError(
            f"{name}: becomes part of {place.parameter} by {', '.join(kinds)}, which cannot be followed slice by"
            " slice: give a plan file"
        )

    def _place(self, name: str) -> _Place | None:
        """``None``: the model leaves such a tensor where it is."""
        from transformers.core_model_loading import rename_source_key

        prefix = self._model.base_model_prefix
        parameter, pattern = rename_source_key(
            name, self._renamings, self._converters, prefix, self._parameters
        )
        if parameter not in self._parameters and name in self._parameters:
            parameter, pattern = name, None
        if parameter not in self._parameters:
            ignored = getattr(self._model, "_keys_to_ignore_on_load_unexpected", None) or ()
            if any(re.search(expression, name) for expression in ignored):
                return None
            quantized = getattr(self._model.config, "quantization_config", None) is not None
            hint = "quantized: " if quantized else ""
            raise ValueError(f"{name} is no parameter of {self._name}: {hint}give a plan file that names it")
        if pattern is None:
            return _Place(parameter, ())
        converter = next(c for c in self._converters if pattern in c.source_patterns)
        return _Place(parameter, tuple(converter.operations))

    def _split_of_parameter(self, parameter: str) -> Split | None:
        return split_of(parameter, tuple(self._parameters[parameter].shape), style_of(parameter, self._plan))

    def _check_heads(self, parameter: str, ranks: int) -> None:
        module = parameter.split(".")[-2:][0]
        config = self._model.config.get_text_config()
        for projections, attribute, what in (
            (_KV_PROJECTIONS, "num_key_value_heads", "key and value heads"),
            (_Q_PROJECTIONS, "num_attention_heads", "attention heads"),
        ):
            heads = getattr(config, attribute, None)
            if module in projections and isinstance(heads, int) and heads % ranks:
                raise ValueError(
                    f"{parameter}: {heads} {what} are not divisible by {ranks} ranks; a plan file may replicate them"
                )

    def _check_ties(self) -> None:
        tied: dict[str, str] = getattr(self._model, "all_tied_weights_keys", None) or {}
        for one, other in tied.items():
            present = one in self._parameters and other in self._parameters
            if present and self._split_of_parameter(one) != self._split_of_parameter(other):
                raise ValueError(
                    f"{one} and {other} are the same tensor, but {self._name}'s plan splits them differently"
                )


def _on_meta(folder: str) -> Any:
    import transformers

    if not os.path.isfile(os.path.join(folder, "config.json")):
        raise ValueError(f"{folder!r} has no config.json to find a plan by: give a plan file")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    with torch.device("meta"):
        for name in config.architectures or ():
            # By name, but nothing else that transformers may hold.
            found: Any = getattr(transformers, name, None) if isinstance(name, str) else None
            is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
            if is_model and isinstance(config, found.config_class or ()):
                return found(config)
        any_model: Any = transformers.AutoModel
        return any_model.from_config(config, trust_remote_code=False)
