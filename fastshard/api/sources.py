# SPDX-License-Identifier: Apache-2.0
"""The sources of a prepared save, from which each save reads its tensors anew: a dict, a module, or a
function."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from ..engine.pipeline import StateDict
from ..engine.sharing import duplicates
from .holders import Holders, held_elsewhere, warn_stale

Given = StateDict | torch.nn.Module | Callable[[], StateDict]


class Source(Protocol):
    """What a prepared save needs of its source."""

    is_module: bool
    """Whether the file is that of ``save_model``, which packs strided tensors."""
    tied: dict[str, str]
    """The names that are left out, each with the name that is kept for it."""

    def read(self) -> StateDict:
        """Returns the tensors as they are now."""

    def check(self) -> None:
        """Warns of tensors that cannot have changed since the last save."""


def source_of(given: Given) -> Source:
    """Returns the source for what a user has given. Raises ``ValueError`` if tensors cannot be read from it."""
    if isinstance(given, torch.nn.Module):
        return ModuleSource(given)
    if isinstance(given, dict):
        return DictSource(given)
    if callable(given):
        return FunctionSource(given)
    swapped = "; the tensors come first, then the file" if isinstance(given, str) else ""
    raise ValueError(
        "Expected a dict of [str, torch.Tensor], a module, or a function that returns such a dict, but received"
        f" {type(given)}{swapped}"
    )


class FunctionSource:
    """Reads from a function that returns a dict."""

    is_module = False

    def __init__(self, function: Callable[[], StateDict]) -> None:
        self._function = function
        self.tied: dict[str, str] = {}

    def read(self) -> StateDict:
        tensors = self._function()
        if not isinstance(tensors, dict):
            raise ValueError(
                f"Expected a function that returns a dict of [str, torch.Tensor], but it returned {type(tensors)}"
            )
        return tensors

    def check(self) -> None:
        """Does nothing: the function decides which tensors it returns."""


class ModuleSource:
    """Reads a module's ``state_dict()``; of tied tensors one is kept, as in ``save_model``."""

    is_module = True

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        # The parameters themselves where that is torch's own method: detaching each takes as long as all the rest.
        self._keep_vars = type(module).state_dict is torch.nn.Module.state_dict
        state = self._state()
        if not all(isinstance(value, torch.Tensor) for value in state.values()):
            state = {}  # refused when it is laid out
        self.tied = {name: kept for kept, names in duplicates(state).items() for name in names}
        self._ties = {name: _Tie.between(state[name], state[kept]) for name, kept in self.tied.items()}

    def read(self) -> StateDict:
        state = self._state()
        for name, kept in self.tied.items():
            for needed in (name, kept):
                if needed not in state:
                    raise ValueError(f"`{needed}` is missing: the save was prepared with it")
            if _Tie.between(state[name], state[kept]) != self._ties[name]:
                raise ValueError(
                    f"`{name}` shared the memory of `{kept}` when the save was prepared, and does not any more"
                )
        for name in self.tied:
            del state[name]
        return state

    def check(self) -> None:
        """Does nothing: the tensors are the module's own."""

    def _state(self) -> StateDict:
        return dict(self._module.state_dict(keep_vars=True) if self._keep_vars else self._module.state_dict())


class _Tie(NamedTuple):
    """How a tied tensor lies in the memory of the tensor that is kept."""

    distance: int
    shape: torch.Size
    strides: tuple[int, ...]
    same_dtype: bool

    @classmethod
    def between(cls, tensor: torch.Tensor, kept: torch.Tensor) -> _Tie:
        distance = tensor.data_ptr() - kept.data_ptr()
        return cls(distance, tensor.shape, tensor.stride(), tensor.dtype == kept.dtype)


class DictSource:
    """Reads from a dict, whose owner may replace the tensors in it."""

    is_module = False

    def __init__(self, tensors: StateDict) -> None:
        self._tensors = tensors
        self._holders = Holders(tensors)
        self.tied: dict[str, str] = {}

    def read(self) -> StateDict:
        return self._tensors

    def check(self) -> None:
        """Warns of tensors that nobody but the dict has, if the dict is a module's or nobody else has the
        dict."""
        (reachable,) = held_elsewhere([self._tensors], own=1)
        names = self._holders.abandoned(self._tensors, reachable)
        if names:
            warn_stale(names)
