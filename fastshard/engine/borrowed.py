# SPDX-License-Identifier: Apache-2.0
"""Functions of torch and safetensors that are not public.

If the installed version does not have one of them, fastshard can be imported all the same; only a call of
that function fails. Every private name of another library is used by one module only, and never when that
module is imported; ``tests/test_architecture.py`` lists all of them.
"""

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


def _waits_for_shape(tensor: object) -> bool:
    return any(kind.__name__ == "UninitializedTensorMixin" for kind in type(tensor).__mro__)


def _users() -> Callable[[int], int] | None:
    torch = importlib.import_module("torch")
    if not hasattr(torch.UntypedStorage, "_cdata"):
        return None
    return getattr(torch._C, "_storage_Use_Count", None)


def storage_number(storage: Any) -> int:
    """Returns the number that tells a storage from others, for :data:`storage_users`."""
    number: int = storage._cdata
    return number


def storage_reference(storage: Any) -> Any:
    """Returns a weak reference to a storage. Those of one storage are equal, and its number is given to no other while
    there is one."""
    return importlib.import_module("torch.multiprocessing.reductions").StorageWeakRef(storage)


def dlpack_exchange_api() -> object | None:
    """Returns the capsule of torch's table of DLPack functions (torch 2.10); ``None`` if this torch has none.

    csrc/bindings/exchange.cc checks its name and version.
    """
    return getattr(importlib.import_module("torch").Tensor, "__dlpack_c_exchange_api__", None)


def _dtypes() -> frozenset[Any] | None:
    sizes = getattr(importlib.import_module("safetensors.torch"), "_SIZE", None)
    return None if sizes is None else frozenset(sizes)


dtypes = _dtypes()
"""The torch dtypes that the installed safetensors reads and writes; ``None`` if it does not list them."""
find_shared_tensors: Callable[[Any], list[set[str]]] = _borrowed("safetensors.torch", "_find_shared_tensors")
"""Returns sets of names of tensors that share memory, by safetensors' rule."""
remove_duplicate_names: Callable[[Any], dict[str, list[str]]] = _borrowed(
    "safetensors.torch", "_remove_duplicate_names"
)
"""Returns which of such names ``save_model`` keeps, and which it leaves out."""
is_traceable_wrapper_subclass: Callable[[object], bool] = _borrowed(
    "torch.utils._python_dispatch", "is_traceable_wrapper_subclass", _wraps_others
)
"""Returns whether a tensor is a wrapper whose data lies in other tensors."""
is_lazy: Callable[[object], bool] = _borrowed("torch.nn.parameter", "is_lazy", _waits_for_shape)
"""Returns whether a tensor is a parameter or a buffer that has no shape yet."""
storage_users = _users()
"""Returns how many objects hold a storage, which is given by its number; ``None`` if this torch does not
tell."""
