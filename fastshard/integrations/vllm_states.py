# SPDX-License-Identifier: Apache-2.0
"""What a loader of vLLM's sharded state expects of a model, and whether the model still is what it expects.

A state is noted when the model is new, compared with that note when its weights are loaded, and compared once
more when vLLM has processed them. Comparing every byte would take a second copy, so only some elements are
compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch

from ..engine.unchanged import some_elements

_SAMPLES: Final = 64
"""Number of elements of a tensor that are compared. They are evenly spread, as whatever repacks a tensor
moves most of them."""
_SHOWN: Final = 5


class Form(NamedTuple):
    """The properties of a tensor, apart from its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    meta: bool

    def __str__(self) -> str:
        place = " without memory" if self.meta else ""
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}{place}"


class Sampled(NamedTuple):
    """A tensor's form, and some of its elements."""

    form: Form
    elements: torch.Tensor | None
    """``None`` if the tensor has no memory."""


def sampled(state: Mapping[str, torch.Tensor]) -> dict[str, Sampled]:
    """Returns what is kept of a state, so that a later one can be compared with it."""
    return {
        name: Sampled(form, None if form.meta else some_elements(state[name], _SAMPLES))
        for name, form in forms(state).items()
    }


def filter_of(loader: Any) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Returns the rule by which vLLM's ``ShardedStateLoader`` leaves tensors out, which is a private method.

    Raises ``AttributeError`` if the installed version has none.
    """
    rule: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = loader._filter_subtensors
    return rule


def filtered(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns the tensors that vLLM's loader fills, by its own rule."""
    from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader

    return filter_of(ShardedStateLoader)(model.state_dict())


def forms(state: Mapping[str, torch.Tensor]) -> dict[str, Form]:
    """Returns the forms of a state's tensors."""
    return {name: Form(tuple(t.shape), t.dtype, t.is_meta) for name, t in state.items()}


def why_unloadable(expected: Mapping[str, Form], found: Mapping[str, Form]) -> str | None:
    """Returns why a loader could not fill a new model with this state; ``None`` if it could."""
    differences = _differences(expected, found)
    return (
        f"vLLM has changed the weights while it loaded them, so they are not what a loader of sharded state "
        f"expects: {_listed(differences)}"
        if differences
        else None
    )


def why_changed(before: Mapping[str, Sampled], after: Mapping[str, Sampled]) -> str | None:
    """Returns what post-processing has done to a state; ``None`` if the kept elements show nothing."""
    differences = _differences(
        {name: sampled.form for name, sampled in before.items()},
        {name: sampled.form for name, sampled in after.items()},
    )
    for name, (form, elements) in before.items():
        if name in after and after[name].form == form and elements is not None:
            other = after[name].elements
            if other is None or not torch.equal(elements, other.to(elements.device)):
                differences.append(f"{name} has other values")
    return (
        f"vLLM has repacked the weights after loading them (process_weights_after_loading), and a loader of "
        f"sharded state expects them as they were before: {_listed(differences)}. "
        "`fastshard vllm-save` saves them at that moment"
        if differences
        else None
    )


def _differences(expected: Mapping[str, Form], found: Mapping[str, Form]) -> list[str]:
    differences = []
    for name, form in expected.items():
        if name not in found:
            differences.append(f"{name} is missing")
        elif found[name] != form:
            differences.append(f"{name} is {found[name]} instead of {form}")
        elif form.meta:
            differences.append(f"{name} is {form}")
    return differences + [f"{name} is not expected" for name in found if name not in expected]


def _listed(differences: Sequence[str]) -> str:
    more = len(differences) - _SHOWN
    return "; ".join(differences[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def why_changed_since(expected: Mapping[str, Form], found: Mapping[str, Form]) -> str | None:
    """Returns what has changed in a model since it was loaded; ``None`` if names and forms are the same."""
    differences = _differences(expected, found)
    return f"the model has changed since it was loaded: {_listed(differences)}" if differences else None
