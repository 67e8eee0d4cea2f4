# SPDX-License-Identifier: Apache-2.0
"""Tensors whose elements are nowhere, or not where they seem to be: the class of error that safetensors raises, and which
tensor it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch as reference
import torch
from helpers import snapshot
from torch._subclasses.fake_tensor import FakeTensorMode

import fastshard

pytestmark = pytest.mark.usefixtures("planner")

NAME = "the.name"


class Wrapper(torch.Tensor):
    """Has a shape, and knows nothing else."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{function}")


class Subclass(torch.Tensor):
    """An ordinary tensor of another type."""


def freed(*shape: int) -> torch.Tensor:
    tensor = torch.ones(shape)
    tensor.untyped_storage().resize_(0)
    return tensor


def fake(*shape: int) -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(shape)


def batched() -> torch.Tensor:
    """What is left over when a function that was mapped has returned."""
    found = []
    torch.vmap(lambda row: (found.append(row), row)[1])(torch.ones(3, 4))
    return found[0]


def lowest(*args: Any, **kwargs: Any) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor(*args, **kwargs)


ODD: dict[str, Callable[[], Any]] = {
    "freed": lambda: freed(100),
    "freed parameter": lambda: torch.nn.Parameter(freed(2, 3)),
    "freed and empty": lambda: freed(0),
    "freed and transposed": lambda: (lambda t: (t.untyped_storage().resize_(0), t)[1])(torch.ones(3, 4).t()),
    "fake": lambda: fake(5),
    "fake and empty": lambda: fake(0),
    "meta": lambda: torch.ones(3, device="meta"),
    "meta and empty": lambda: torch.ones(0, device="meta"),
    "wrapper": lambda: Wrapper(torch.ones(3)),
    "functional": lambda: torch._to_functional_tensor(torch.ones(3)),
    "zeros that are nowhere": lambda: torch._efficientzerotensor(3),
    "batched": batched,
    "masked": lambda: torch.masked.masked_tensor(torch.ones(3), torch.ones(3, dtype=torch.bool)),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
    "quantized by channel": lambda: torch.quantize_per_channel(
        torch.ones(4, 4), torch.ones(4), torch.zeros(4), 0, torch.quint8
    ),
    "nested": lambda: lowest([torch.ones(2), torch.ones(3)]),
    "jagged": lambda: lowest([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "COO": lambda: torch.ones(2, 2).to_sparse(),
    "CSR": lambda: torch.ones(2, 2).to_sparse_csr(),
    "CSC": lambda: torch.ones(2, 2).to_sparse_csc(),
    "BSR": lambda: torch.ones(2, 2).to_sparse_bsr((1, 1)),
    "BSC": lambda: torch.ones(2, 2).to_sparse_bsc((1, 1)),
    "mkldnn": lambda: torch.ones(2, 2).to_mkldnn(),
    "uninitialized parameter": torch.nn.parameter.UninitializedParameter,
    "uninitialized buffer": torch.nn.parameter.UninitializedBuffer,
    "subclass": lambda: torch.ones(3).as_subclass(Subclass),  # type: ignore[type-var]
    "empty": lambda: torch.empty(0, 3),
    "empty slice": lambda: torch.ones(3)[3:],
    "expanded": lambda: torch.ones(1).expand(5),
    "complex128": lambda: torch.ones(2, dtype=torch.complex128),
    "bits": lambda: torch.empty(2, dtype=torch.bits8),
}


def outcome(save: Callable[[Any, str], object], tensor: Any, path: Path) -> type[BaseException] | bytes:
    try:
        save({"before": torch.ones(2), NAME: tensor}, str(path))
    except Exception as error:
        told = "\n".join([str(error), *getattr(error, "__notes__", ())])
        # The hub's own code looks at the wrapper before ours does.
        hub = "invalid python storage" in str(error) and path.name == "here.hub"
        if save is not reference.save_file and not hub and hasattr(error, "add_note"):
            assert NAME in told, told
        return type(error)
    return path.read_bytes()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ODD)
def test_odd_tensors_are_taken_or_refused_as_there(tmp_path: Path, kind: str) -> None:
    try:
        tensor = ODD[kind]()
    except (RuntimeError, AttributeError, NotImplementedError, ImportError) as error:
        pytest.skip(f"this torch has none: {error}")
    there = outcome(reference.save_file, tensor, tmp_path / "there")
    assert outcome(fastshard.save_file, tensor, tmp_path / "here") == there
    assert set(snapshot(tmp_path)) == ({"there", "here"} if isinstance(there, bytes) else set())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind", ["freed", "freed parameter", "freed and transposed", "fake", "meta", "wrapper"]
)
@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_memory_that_is_not_there_is_never_read(tmp_path: Path, kind: str, dtype: str | None) -> None:
    """Not either where strided tensors are taken, or cast."""
    for name, save in (
        ("file", lambda tensors, path: fastshard.save_file(tensors, path, allow_strided=True, dtype=dtype)),
        (
            "files",
            lambda tensors, path: fastshard.save_files({path: tensors}, allow_strided=True, dtype=dtype),
        ),
        ("memory", lambda tensors, path: fastshard.save(tensors, allow_strided=True, dtype=dtype)),
        ("prepared", lambda tensors, path: fastshard.prepare(tensors, path, allow_strided=True, dtype=dtype)),
        ("here.hub", lambda tensors, path: fastshard.save_torch_state_dict(tensors, tmp_path, dtype=dtype)),
    ):
        found = outcome(save, ODD[kind](), tmp_path / name)
        assert isinstance(found, type) and not issubclass(found, (KeyError, TypeError)), found
        if kind.startswith(("freed", "fake")):
            assert issubclass(found, fastshard.SaveError.__mro__[1])  # SafetensorError
    assert snapshot(tmp_path) == {}
