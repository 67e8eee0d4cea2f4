# SPDX-License-Identifier: Apache-2.0
"""The tensor-parallel plan that transformers has for a model, in terms of the tensors of its checkpoint.

A plan names modules and parameters as they are in memory. The model is built from its ``config.json`` on the
meta device: without weights, memory or code of the checkpoint. Each name of the checkpoint is followed
through transformers' own conversions to the parameter it becomes part of. For example, Mixtral's
``block_sparse_moe.experts.0.w1.weight`` is a slice of ``mlp.experts.gate_up_proj`` and is split like it.

Uneven parts are refused, and so are attention heads that ranks cannot share evenly. Transformers leaves the
last rank a shorter slice and cuts through heads. vLLM copies key and value heads to several ranks, which is
no slice of the source; a plan file may replicate them. Embeddings are split by vocabulary, as in
transformers.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import torch

from ..formats.hf_index import exists
from .tp_plan import Split, split_of, style_of

_KV_PROJECTIONS: Final = ("k_proj", "v_proj", "qkv_proj", "query_key_value")
_Q_PROJECTIONS: Final = ("q_proj",)


_AUTOMATIC: Final = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM",
    "AutoModelForPreTraining",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
)
"""What the model may be, in this order, if its configuration names no architecture that transformers has."""


class _Place(NamedTuple):
    """The parameter that a tensor of the checkpoint becomes part of."""

    parameters: tuple[str, ...]
    """The parameters. If there are several, the tensor is cut into them."""
    operations: tuple[Any, ...]
    """The operations of the conversion; none if the tensor is the parameter."""


class ModelPlan:
    """The plan of the model whose ``config.json`` lies in a folder, with a checkpoint of tensors of these names.

    Raises ``ImportError`` without transformers (5 or later), ``OSError`` without the configuration, and ``ValueError``
    for a model that transformers does not know, or that has no plan.
    """

    def __init__(self, folder: str, names: Iterable[str] = ()) -> None:
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, WeightRenaming
        except ImportError as error:
            raise ImportError(
                "the plan of a model comes from transformers 5 or later: install it, or give a plan file"
            ) from error
        wanted = list(names)
        problem: ValueError | None = None
        for model in _on_meta(folder):
            self._model = model
            self._name = type(model).__name__
            self._parameters: dict[str, torch.Tensor] = model.state_dict()
            conversions = get_model_conversion_mapping(model)
            self._renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
            self._converters = [c for c in conversions if isinstance(c, WeightConverter)]
            self._plan: dict[str, str] = model.tp_plan or {}
            try:
                if not self._plan:
                    raise ValueError(
                        f"{folder!r}: {self._name} has no tensor-parallel plan: give a plan file"
                    )
                for name in wanted:
                    self._place(name)
            except ValueError as error:
                problem = problem or error
            else:
                break
        else:
            raise problem or ValueError(f"{folder!r}: transformers has no model for its config.json")

    def splits(self, tensors: Iterable[tuple[str, Sequence[int]]], ranks: int) -> dict[str, Split | None]:
        """Returns how the tensors of the checkpoint, given by names and shapes, are split.

        Raises ``ValueError`` for a tensor that is no part of the model, one that becomes a parameter in a way
        that slices cannot follow, unknown styles, attention heads that cannot be shared evenly, and tied
        parameters that would have to be split in different ways.
        """
        self._check_ties()
        return {name: self._split(name, shape, ranks) for name, shape in tensors}

    def _split(self, name: str, shape: Sequence[int], ranks: int) -> Split | None:
        place = self._place(name)
        if place is None:
            return None
        split = self._split_of_parameter(place.parameters[0])
        wholes = [tuple(self._parameters[parameter].shape) for parameter in place.parameters]
        if not place.operations and tuple(shape) != wholes[0]:
            raise ValueError(f"{name} has shape {list(shape)}, {self._name} has {list(wholes[0])}")
        for other in place.parameters[1:]:
            if self._split_of_parameter(other) != split:
                raise ValueError(
                    f"{name}: becomes {place.parameters[0]} and {other}, which are not split alike: give a plan file"
                )
        if split is None:
            return None
        for parameter in place.parameters:
            self._check_heads(parameter, ranks)
        followed = _followed(split, wholes, place, tuple(shape))
        if followed is None:
            kinds = [type(operation).__name__ for operation in place.operations]
            raise ValueError(
                f"{name}: becomes part of {place.parameters[0]} by {', '.join(kinds)}, which cannot be followed slice"
                " by slice: give a plan file"
            )
        return followed

    def _place(self, name: str) -> _Place | None:
        """Returns the place of a tensor; ``None`` if the model ignores it when it is loaded."""
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
            raise ValueError(
                f"{name} is not a parameter of {self._name}: {hint}give a plan file that names it"
            )
        if pattern is None:
            return _Place((parameter,), ())
        converter = next(c for c in self._converters if pattern in c.source_patterns)
        return _Place(self._targets(name, parameter, converter), tuple(converter.operations))

    def _targets(self, name: str, parameter: str, converter: Any) -> tuple[str, ...]:
        """Returns all parameters that a conversion makes of the tensors that become this one."""
        targets: list[str] = converter.target_patterns
        if len(targets) == 1:
            return (parameter,)
        before, found, behind = parameter.partition(targets[0])
        others = [f"{before}{target}{behind}" for target in targets[1:]]
        if not found or not self._parameters.keys() >= set(others):
            raise ValueError(
                f"{name} becomes several parameters, not all of which {self._name} has: give a plan file"
            )
        return (parameter, *others)

    def _split_of_parameter(self, parameter: str) -> Split | None:
        return split_of(parameter, tuple(self._parameters[parameter].shape), style_of(parameter, self._plan))

    def _check_heads(self, parameter: str, ranks: int) -> None:
        module = parameter.split(".")[-2:][0]
        config = _of_layer(self._model.config.get_text_config(), parameter)
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
                    f"{one} and {other} are the same tensor, but {self._name}'s plan splits them differently:"
                    " give a plan file"
                )


def _followed(
    split: Split, wholes: Sequence[tuple[int, ...]], place: _Place, shape: tuple[int, ...]
) -> Split | None:
    """Returns how a tensor of this shape is split that becomes parameters of shapes ``wholes`` with that
    split.

    It goes backwards through transformers' operations, from the parameters to the tensor in the file. Returns
    ``None`` if an operation is not one that slices can be followed through.
    """
    dim, groups, sizes = split.dim, split.groups, list(wholes[0])
    joined: int | None = None
    """The dimension in which this tensor is one of several, of whatever sizes."""
    pieces: list[int] = []
    """What the tensor is cut into in the dimension that is split."""
    for operation in reversed(place.operations):
        kind = type(operation).__name__
        if getattr(operation, "num_shards_attribute", None):
            return None
        at = getattr(operation, "dim", 0) % len(sizes)
        if kind == "Concatenate" and joined is None and not (pieces and dim == at):
            # Packed tensors that are put together from their groups: each of them is a group.
            groups = 1 if dim == at else groups
            joined = at
        elif kind == "MergeModulelist" and at == 0 and dim > 0:
            dim -= 1  # a slice of the parameter's first dimension
            joined = None if joined is None else joined - 1
            del sizes[0]
            if joined is not None and joined < 0:
                return None
        elif kind in ("Chunk", "Split") and len(wholes) > 1:
            cut = [sizes[at]] * len(wholes)
            if len(set(wholes)) > 1:
                cut = [whole[at] for whole in wholes]
                alike = {(*whole[:at], *whole[at + 1 :]) for whole in wholes}
                # The sizes are those of the parameters as the model has them, so nothing may follow.
                if kind == "Chunk" or len(alike) > 1 or operation is not place.operations[-1]:
                    return None
            pieces = cut if dim == at else pieces
            sizes[at] = sum(cut)
        elif kind == "Transpose":
            first, second = operation.dim0 % len(sizes), operation.dim1 % len(sizes)
            if operation.check_dims and shape == tuple(sizes):
                continue
            swapped = {first: second, second: first}
            dim = swapped.get(dim, dim)
            joined = swapped.get(joined, joined) if joined is not None else None
            sizes[first], sizes[second] = sizes[second], sizes[first]
        else:
            return None
    if len(shape) != len(sizes):
        return None
    if any(size != known for at, (size, known) in enumerate(zip(shape, sizes)) if at != joined):
        return None
    if len(set(pieces)) > 1:
        return Split(
            dim, groups * len(pieces), tuple(piece // groups for piece in pieces for _ in range(groups))
        )
    return Split(dim, groups * max(1, len(pieces)))


def _on_meta(folder: str) -> Iterator[Any]:
    """Yields the model that the configuration names, or those that it may be, on the meta device."""
    import transformers

    if not exists(os.path.join(folder, "config.json")):
        raise ValueError(f"{folder!r} has no config.json to find a plan by: give a plan file")
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except OSError:
        raise
    except Exception as error:  # of many kinds, by what is wrong with it
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{folder!r}: transformers cannot read its config.json: {reason}") from None
    classes: list[Any] = []
    for name in _AUTOMATIC:
        mapping = getattr(getattr(transformers, name, None), "_model_mapping", {})
        mapped = mapping.get(type(config), ())
        classes += mapped if isinstance(mapped, (list, tuple)) else (mapped,)
    for name in config.architectures or ():
        found = _class_named(name, config)
        if found is not None and (found in classes or isinstance(config, found.config_class or ())):
            classes = [found]
            break
    problem: ValueError | None = None
    any_made = False
    for model in dict.fromkeys(classes):
        try:
            with torch.device("meta"):
                made = model(config)
        except Exception as error:  # likewise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            text = f"{folder!r}: transformers cannot make a {model.__name__}: {reason}"
            problem = problem or ValueError(text)
            continue
        any_made = True
        yield made
    if problem is not None and not any_made:
        raise problem


def _class_named(name: object, config: Any) -> Any:
    """Returns a model's class by its name; ``None`` if transformers has no such model.

    Models that are parts of others are not exported by transformers: they are in the module beside their
    configuration's.
    """
    import transformers

    if not isinstance(name, str):
        return None
    found = getattr(transformers, name, None)
    module = type(config).__module__
    if found is None and module.startswith("transformers.models."):
        try:
            found = getattr(
                importlib.import_module(module.replace(".configuration_", ".modeling_")), name, None
            )
        except ImportError:
            return None
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def _of_layer(config: Any, parameter: str) -> Any:
    """Returns the configuration of the layer that a parameter belongs to, which matters if the layers differ.

    Returns ``None`` if the configuration says nothing of that layer, as for layers of another part of the
    model.
    """
    if not getattr(config, "is_heterogeneous", False):
        return config
    layer = re.search(r"\.layers\.(\d+)\.", f".{parameter}")
    layers = config.per_layer_config
    return layers[int(layer[1])] if layer is not None and int(layer[1]) < len(layers) else None
