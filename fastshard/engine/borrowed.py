# SPDX-License-Identifier: Apache-2.0
"""Functions of other libraries that are not public: where a version has none of the name, nothing fails before it is
called."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def _borrowed(module: str, name: str, otherwise: Callable[..., Any] | None = None) -> Callable[..., Any]:
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return function
    except (ImportError, AttributeError):
        pass

    def missing(*args: Any, **kwargs: Any) -> Any:
        raise ImportError(
            f"fastshard needs {module}.{name}, which the installed version does not have", name=module
        )

    return otherwise or missing


def _wraps_others(tensor: object) -> bool:
    return hasattr(type(tensor), "__tensor_flatten__")


def _dtypes() -> frozenset[Any] | None:
    sizes = getattr(importlib.import_module("safetensors.torch"), "_SIZE", None)
    return None if sizes is None else frozenset(sizes)


dtypes = _dtypes()
"""Those that this safetensors reads and writes, of torch; ``None``: it does not say."""
find_shared_tensors: Callable[[Any], list[set[str]]] = _borrowed("safetensors.torch", "_find_shared_tensors")
"""Sets of names of tensors with memory in common, by the rule of safetensors."""
remove_duplicate_names: Callable[[Any], dict[str, list[str]]] = _borrowed(
    "safetensors.torch", "_remove_duplicate_names"
)
"""Which of such names ``save_model`` keeps and leaves out."""
is_traceable_wrapper_subclass: Callable[[object], bool] = _borrowed(
    "torch.utils._python_dispatch", "is_traceable_wrapper_subclass", _wraps_others
)
"""Whether a tensor wraps others, in which its data lies."""
