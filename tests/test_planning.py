# SPDX-License-Identifier: Apache-2.0
"""Tensors laid out natively: the same file, and the same errors, as in Python."""

from __future__ import annotations

import collections
import ctypes
import itertools
import json
import logging
import os
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch as reference
import torch
from helpers import DTYPES, FLOAT4, filled
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from test_byte_identity import NASTY

import fastshard
from fastshard import _native
from fastshard.base import activity
from fastshard.engine import planning
from fastshard.engine.borrowed import dlpack_exchange_api
from fastshard.engine.tensors import describe

needs_table = pytest.mark.skipif(planning.why_not_native() != "", reason=planning.why_not_native())
BF16 = torch.bfloat16
TEXTS = st.sampled_from(NASTY) | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
PATHS = st.builds(
    ".".join, st.lists(st.sampled_from(["model", "layers", "1", "10", "2", "w\0", ""]), max_size=6)
)


@pytest.fixture(autouse=True)
def counted() -> Iterator[None]:
    activity._forget()
    yield
    activity._forget()


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not asked torch for its table yet."""
    for name in ("_planners", "_known", "_refused"):
        monkeypatch.setattr(planning, name, {})


def in_python(tensors: Any, **how: Any) -> planning.Layout:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(planning.VARIABLE, "0")
        return planning.lay_out(tensors, **how)


def is_native(layout: planning.Layout) -> bool:
    return isinstance(layout.items, _native.Layout)


def assert_same(one: planning.Layout, other: planning.Layout, metadata: dict[str, str] | None = None) -> None:
    assert one.header(metadata) == other.header(metadata)
    assert list(one.names) == list(other.names)
    assert (one.nbytes, one.devices) == (other.nbytes, other.devices)
    assert len(one.entries) == len(other.entries)
    for mine, its in zip(one.entries, other.entries):
        assert mine[:-1] == its[:-1] and mine.tensor is its.tensor


def chunks(layout: planning.Layout) -> object:
    plan = fastshard.engine.plan.FilePlan(b"/nowhere", layout.header(None), layout.items)
    return plan.nbytes, _native.schedule([plan], 16 << 20, 1 << 20, 16 << 20, 1024, True)


# The same file --------------------------------------------------------------------------------------------


@st.composite
def tensors_of_any_kind(draw: st.DrawFn) -> torch.Tensor:
    """Mostly contiguous; others are strided, empty, alone in their storage or not."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 5), max_size=3).map(tuple))
    tensor = filled(shape, dtype, draw(st.integers(0, 9)))
    change = draw(st.sampled_from(["", "", "", "slice", "turn", "parameter", "expand"]))
    if change == "slice" and shape:
        tensor = tensor[draw(st.integers(0, 2)) :]
    elif change == "turn":
        tensor = tensor.permute(list(reversed(range(len(shape)))))
    elif change == "parameter":
        tensor = torch.nn.Parameter(tensor, requires_grad=False)
    elif change == "expand":
        tensor = tensor.unsqueeze(0).expand(3, *shape)
    return tensor


@needs_table
@settings(derandomize=True, deadline=None, max_examples=400)
@given(
    tensors=st.dictionaries(TEXTS | PATHS, tensors_of_any_kind(), max_size=12),
    allow_strided=st.booleans(),
    dtype=st.sampled_from([None, None, BF16, torch.float32, torch.float8_e4m3fn]),
    metadata=st.none() | st.dictionaries(TEXTS, TEXTS, max_size=2),
)
def test_layouts_are_the_same(
    tensors: dict[str, torch.Tensor],
    allow_strided: bool,
    dtype: torch.dtype | None,
    metadata: dict[str, str] | None,
) -> None:
    try:
        expected = in_python(tensors, allow_strided=allow_strided, dtype=dtype)
        expected_header = expected.header(metadata)
    except Exception as error:
        with pytest.raises(type(error)) as raised:
            planning.lay_out(tensors, allow_strided=allow_strided, dtype=dtype).header(metadata)
        assert str(raised.value) == str(error)
        return
    found = planning.lay_out(tensors, allow_strided=allow_strided, dtype=dtype)
    assert found.header(metadata) == expected_header
    assert_same(found, expected)
    assert chunks(found) == chunks(expected)
    plain = all(t.is_contiguous() or allow_strided for t in tensors.values()) and not any(
        t.dtype is FLOAT4 and (dtype or t.dim() == 0) for t in tensors.values()
    )
    castable = dtype is None or all(
        not t.dtype.is_floating_point
        or t.dtype is dtype
        or "fnuz" not in str(t.dtype)
        and "e8m0" not in str(t.dtype)
        for t in tensors.values()
    )
    if plain and castable:
        assert is_native(found)


@needs_table
@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.sets(TEXTS | PATHS | st.text("ab\0\1é\U0001f600", max_size=40), max_size=60), st.randoms())
def test_names_are_ordered_as_python_orders_them(names: set[str], random: Any) -> None:
    order = sorted(names - {"__metadata__"})
    shuffled = random.sample(order, len(order))
    found = planning.lay_out({name: filled((1,)) for name in shuffled}, allow_strided=False)
    assert is_native(found)
    assert list(found.names) == order


@needs_table
@pytest.mark.parametrize("step", [1, 7, 8, 9])
def test_names_that_are_each_the_beginning_of_the_next(step: int) -> None:
    names = ["a" * (step * count) for count in range(500)]
    found = planning.lay_out({name: torch.empty(0) for name in reversed(names)}, allow_strided=False)
    assert is_native(found) and list(found.names) == names


@needs_table
def test_slices_of_one_tensor() -> None:
    line = filled((64,))
    disjoint = {str(begin): line[begin : begin + 8] for begin in (8, 40, 0, 16)}
    assert_same(planning.lay_out(disjoint, allow_strided=True), in_python(disjoint, allow_strided=True))
    met = {**disjoint, "met": line[15:17]}
    with pytest.raises(RuntimeError, match="share memory"):
        planning.lay_out(met, allow_strided=False)


@needs_table
def test_columns_that_have_no_element_in_common_are_left_to_python() -> None:
    """Their address ranges overlap, which is all that is looked at."""
    matrix = filled((8, 8))
    columns = {"left": matrix[:, :4], "right": matrix[:, 4:]}
    found = planning.lay_out(columns, allow_strided=True)
    assert not is_native(found) and list(found.names) == ["left", "right"]


def dtype_names() -> list[str]:
    return [str(dtype) for dtype in DTYPES]


@needs_table
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_names())
def test_every_dtype_is_laid_out_natively(dtype: torch.dtype, path: Path) -> None:
    tensors = {"b": filled((3, 4), dtype), "a": filled((5, 2), dtype, 1)}
    found = planning.lay_out(tensors, allow_strided=False)
    assert is_native(found)
    assert_same(found, in_python(tensors, allow_strided=False))
    fastshard.save_file(tensors, path)
    assert path.read_bytes() == reference.save(tensors)


@needs_table
@pytest.mark.parametrize("target", [torch.float16, torch.float8_e4m3fn])
def test_casts(target: torch.dtype) -> None:
    tensors = {
        "f32": filled((4, 6)),
        "turned": filled((4, 6), torch.float64).t(),
        "int": filled((3,), torch.int32),
        "same": filled((3,), target),
        "empty": filled((0, 3)),
    }
    found = planning.lay_out(tensors, allow_strided=True, dtype=target)
    assert is_native(found)
    expected = in_python(tensors, allow_strided=True, dtype=target)
    assert_same(found, expected)
    assert chunks(found) == chunks(expected)


@needs_table
def test_a_header_that_is_too_long(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    tensors = {"t" * 60: filled((3,))}
    layout = planning.lay_out(tensors, allow_strided=False)
    assert is_native(layout)
    length = len(layout.header(None)) - 8
    monkeypatch.setattr(planning, "MAX_HEADER_NBYTES", length)
    assert len(layout.header(None)) == 8 + length
    monkeypatch.setattr(planning, "MAX_HEADER_NBYTES", length - 1)
    with pytest.raises(SafetensorError, match="^Error while serializing: header too large$"):
        fastshard.save_file(tensors, path)
    assert not path.exists()


# Who lays out ---------------------------------------------------------------------------------------------


def of_another_class() -> torch.Tensor:
    return filled((2,)).as_subclass(type("Other", (torch.Tensor,), {}))


def conjugate() -> torch.Tensor:
    return torch.complex(filled((3,)), filled((3,))).conj()


UNUSUAL: dict[str, tuple[Callable[[], Any], str]] = {
    "class": (lambda: {"t": of_another_class()}, "not a plain tensor"),
    "number": (lambda: {"t": 1}, "not a plain tensor"),
    "name": (lambda: {1: filled((2,))}, "not a plain str"),
    "kind of name": (lambda: {type("Text", (str,), {})("t"): filled((2,))}, "not a plain str"),
    "surrogate": (lambda: {"\ud800": filled((2,))}, "not valid Unicode"),
    "reserved name": (lambda: {"__metadata__": filled((2,))}, "reserved"),
    "mapping": (lambda: types.MappingProxyType({}), "not a plain dict"),
    "kind of dict": (lambda: collections.defaultdict(None, {"t": filled((2,))}), "not a plain dict"),
    "conjugate": (lambda: {"t": conjugate()}, "bit"),
    "negative": (lambda: {"t": conjugate().imag}, "bit"),
    "contiguous negative": (lambda: {"t": conjugate()[:1].imag}, "bit"),
    "negative integers": (lambda: {"t": torch._neg_view(torch.arange(3))}, "bit"),
    "meta": (lambda: {"t": torch.empty(3, device="meta")}, "does not describe"),
    "sparse": (lambda: {"t": torch.eye(3).to_sparse()}, "does not describe"),
    "quantized": (lambda: {"t": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)}, "describe"),
    "complex128": (lambda: {"t": torch.zeros(2, dtype=torch.complex128)}, "dtype"),
    "int1": (lambda: {"t": torch.empty(2, dtype=getattr(torch, "int1", torch.complex128))}, "dtype"),
    "freed": (lambda: {"t": freed()}, "without memory"),
    "strided": (lambda: {"t": filled((3, 4)).t()}, "not contiguous"),
    "tied": (lambda: dict.fromkeys("ab", filled((3,))), "may share memory"),
}


def freed() -> torch.Tensor:
    tensor = torch.ones(4)
    tensor.untyped_storage().resize_(0)
    return tensor


@needs_table
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", UNUSUAL)
def test_what_is_left_to_python(what: str) -> None:
    make, why = UNUSUAL[what]
    given = make()
    planner, _ = planning._planner(None)
    assert planner is not None
    reason = planner.lay_out(given, False)
    assert isinstance(reason, str) and why in reason
    try:
        expected = in_python(given, allow_strided=False).header(None)
    except Exception as error:
        with pytest.raises(type(error)) as raised:
            planning.lay_out(given, allow_strided=False).header(None)
        assert str(raised.value) == str(error)
    else:
        assert planning.lay_out(given, allow_strided=False).header(None) == expected


@needs_table
def test_every_public_function_lays_out_natively(tmp_path: Path) -> None:
    tensors = {"a": filled((4, 4)), "b": filled((3,), BF16)}
    module = torch.nn.Linear(3, 4)
    saves: list[Callable[[], object]] = [
        lambda: fastshard.save_file(tensors, tmp_path / "file"),
        lambda: fastshard.save_file(collections.OrderedDict(tensors), tmp_path / "file", dtype="fp16"),
        lambda: fastshard.save_file({"t": filled((3, 4)).t()}, tmp_path / "file", allow_strided=True),
        lambda: fastshard.save_files({tmp_path / "one": tensors, tmp_path / "two": tensors}),
        lambda: fastshard.save(tensors),
        lambda: fastshard.save_model(module, tmp_path / "model"),
        lambda: fastshard.save_torch_state_dict(tensors, tmp_path),
        lambda: fastshard.save_sharded_state(tensors, tmp_path / "ranks"),
        lambda: fastshard.prepare(tensors, tmp_path / "prepared").close(),
    ]
    for save, files in zip(saves, [1, 1, 1, 2, 1, 1, 1, 1, 1], strict=True):
        activity._forget()
        save()
        assert fastshard.status().planned == {"": files}


def test_status_says_who_lays_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert "laid out:\n  nothing yet" in str(fastshard.status())
    tied = of_another_class()
    with caplog.at_level(logging.INFO, "fastshard"):
        for _ in range(2):
            fastshard.save_file({"t": tied}, tmp_path / "file")
    [(reason, count)] = fastshard.status().planned.items()
    assert count == 2 and reason
    assert f"  2 file(s) in Python: {reason}" in str(fastshard.status())
    assert [record.message for record in caplog.records if "laid out" in record.message] == [
        f"a file is laid out in Python, which takes longer: {reason}"
    ]


def test_it_can_be_switched_off(planned_in_python: None, path: Path) -> None:
    fastshard.save_file({"t": filled((3,))}, path)
    assert fastshard.status().planned == {f"{planning.VARIABLE} says no": 1}


# Torch's table --------------------------------------------------------------------------------------------


class Version(ctypes.Structure):
    _fields_ = (("major", ctypes.c_uint32), ("minor", ctypes.c_uint32))


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


DESCRIBES = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(Tensor))


class Table(ctypes.Structure):
    _fields_ = (
        ("version", Version),
        ("previous", ctypes.c_void_p),
        ("others", ctypes.c_void_p * 3),
        ("describe", ctypes.c_void_p),
        ("current_work_stream", ctypes.c_void_p),
    )


def capsule(table: Table, name: bytes = b"dlpack_exchange_api") -> Any:
    make = ctypes.pythonapi.PyCapsule_New
    make.restype, make.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return make(ctypes.addressof(table), _kept(name), None)


def _kept(name: bytes, _names: dict[bytes, ctypes.Array[ctypes.c_char]] = {}) -> Any:  # noqa: B006
    return ctypes.cast(_names.setdefault(name, ctypes.create_string_buffer(name)), ctypes.c_char_p)


def torchs_table() -> Table:
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    api = dlpack_exchange_api()
    return Table.from_address(pointer(api, b"dlpack_exchange_api"))


def offer(monkeypatch: pytest.MonkeyPatch, api: object) -> None:
    monkeypatch.setattr(planning, "dlpack_exchange_api", lambda: api)


class Changed:
    """Torch's table with a function that changes what it says."""

    def __init__(self, change: Callable[[Any, Tensor], int]) -> None:
        known = DESCRIBES(torchs_table().describe)
        self.calls = 0

        def describe(tensor: Any, out: Any) -> int:
            self.calls += 1
            return known(tensor, out) or change(tensor, out[0])

        self.function = DESCRIBES(describe)
        self.table = Table(Version(1, 3), None, (None,) * 3, ctypes.cast(self.function, ctypes.c_void_p))


@needs_table
@pytest.mark.parametrize("version", [(1, 0), (1, 99), (2, 0), (0, 8)])
def test_versions_of_the_table(
    unasked: None, monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], path: Path
) -> None:
    table = Table(Version(*version), None, (None,) * 3, torchs_table().describe)
    offer(monkeypatch, capsule(table))
    why = (
        "" if version[0] == 1 else f"torch's table of DLPack functions has version {version[0]}.{version[1]}"
    )
    assert planning.why_not_native() == why
    fastshard.save_file({"t": filled((3,))}, path)
    assert fastshard.status().planned == {why: 1}


@needs_table
def test_an_older_table_behind_a_newer_one(unasked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(Version(2, 0), ctypes.addressof(torchs_table()), (None,) * 3, None)
    offer(monkeypatch, capsule(table))
    assert planning.why_not_native() == ""


_TABLE = Table(Version(1, 3))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: None, "has no table of DLPack functions"),
        (lambda: 4096, "no capsule of that name"),
        (lambda: capsule(Table(Version(1, 3)), b"another"), "no capsule of that name"),
        (lambda: capsule(_TABLE), "none that describes a tensor"),
    ],
)
def test_without_a_table(
    unasked: None, monkeypatch: pytest.MonkeyPatch, path: Path, make: Callable[[], object], why: str
) -> None:
    offer(monkeypatch, make())
    tensors = {"b": filled((3,)), "a": filled((2, 2), BF16)}
    fastshard.save_file(tensors, path)
    assert path.read_bytes() == reference.save(tensors)
    [(reason, count)] = fastshard.status().planned.items()
    assert count == 1 and why in reason and planning.why_not_native() == reason


@needs_table
@pytest.mark.parametrize("field", ["data", "device_type", "ndim", "byte_offset"])
def test_a_table_that_is_wrong_is_not_used(
    unasked: None, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    def change(_: object, tensor: Tensor) -> int:
        value = getattr(tensor, field)
        setattr(tensor, field, {"ndim": value - 1}.get(field, value + 16))
        return 0

    changed = Changed(change)
    offer(monkeypatch, capsule(changed.table))
    assert "describes" in planning.why_not_native() and changed.calls == 1


@needs_table
def test_a_table_that_refuses_everything_leaves_everything(
    unasked: None, monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    changed = Changed(lambda *_: -1)
    offer(monkeypatch, capsule(changed.table))
    fastshard.save_file({"t": filled((3,))}, path)
    assert fastshard.status().planned == {"a tensor that torch does not describe": 1}


@needs_table
def test_gpus(unasked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table says that some tensors are on GPUs; only the layout is made."""
    tensors = {name: filled((4,), seed=seed) for seed, name in enumerate("abcd")}
    places = {id(tensors["b"]): (2, 1), id(tensors["c"]): (2, 0)}

    def change(tensor: Any, out: Tensor) -> int:
        out.device_type, out.device_id = places.get(id(tensor), (out.device_type, out.device_id))
        return 0

    changed = Changed(change)
    offer(monkeypatch, capsule(changed.table))
    found = planning.lay_out(tensors, allow_strided=False)
    assert is_native(found)
    assert found.devices == {-1, 0, 1}
    assert [entry.view.device for entry in found.entries] == [-1, 1, 0, -1]
    places[id(tensors["d"])] = (10, 0)  # ROCm
    planner, _ = planning._planner(None)
    assert planner is not None and "device" in planner.lay_out(tensors, False)


@needs_table
def test_torch_is_asked_once_for_each_tensor(unasked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And, in Python, for nothing: no attribute of a tensor is looked up by the interpreter."""
    changed = Changed(lambda *_: 0)
    offer(monkeypatch, capsule(changed.table))
    tensors = {str(number): torch.empty(3) for number in range(100)}
    assert planning.why_not_native() == ""
    before = changed.calls
    called = []
    monkeypatch.setattr(planning, "describe", lambda *_, **__: called.append(1))
    assert is_native(planning.lay_out(tensors, allow_strided=False))
    assert changed.calls - before == 100 and called == []


# Others' code meanwhile -----------------------------------------------------------------------------------


class Meddler(torch.overrides.TorchFunctionMode):
    """Runs where torch is asked for the first tensor's bits."""

    def __init__(self, meddle: Callable[[], object]) -> None:
        super().__init__()
        self.meddle = meddle
        self.left = 1

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.is_neg and self.left:
            self.left = 0
            self.meddle()
        return function(*args, **(kwargs or {}))


@needs_table
def test_a_dict_that_is_changed_meanwhile() -> None:
    """What it held when the call began is laid out; nothing of it goes meanwhile."""
    tensors = {str(number): torch.full((1000,), float(number)) for number in range(10)}
    with Meddler(tensors.clear):
        found = planning.lay_out(tensors, allow_strided=False)
    assert is_native(found) and list(found.names) == list("0123456789")
    assert [entry.tensor[0].item() for entry in found.entries] == list(range(10))


@needs_table
def test_an_error_of_somebody_elses_code_is_raised_by_python() -> None:
    def fail() -> None:
        raise OverflowError("mine")

    meddler = Meddler(fail)
    with meddler:
        found = planning.lay_out({"t": filled((3,))}, allow_strided=False)
    assert not is_native(found)


@needs_table
def test_an_interruption_is_raised() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with Meddler(interrupt), pytest.raises(KeyboardInterrupt):
        planning.lay_out({"t": filled((3,))}, allow_strided=False)


@needs_table
def test_a_mode_that_is_active_at_the_first_save_is_no_reason_for_the_second(unasked: None) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    tensors = {"t": filled((3,))}
    with FakeTensorMode():
        assert planning.why_not_native() == "a mode of torch's is active"
    assert is_native(planning.lay_out(tensors, allow_strided=False))


@needs_table
def test_threads() -> None:
    tensors = {str(number): torch.empty(3) for number in range(2000)}
    expected = planning.lay_out(tensors, allow_strided=False).header(None)
    found: list[bytes] = []

    def work() -> None:
        for _ in range(20):
            found.append(planning.lay_out(tensors, allow_strided=False).header(None))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 80


@needs_table
def test_a_layout_keeps_its_tensors_and_its_items_do_not() -> None:
    import weakref

    tensor = filled((3,))
    gone = weakref.ref(tensor)
    layout = planning.lay_out({"t": tensor}, allow_strided=False)
    del tensor
    assert gone() is not None
    items = layout.items
    del layout
    assert gone() is None
    assert len(items) == 1


# Places ---------------------------------------------------------------------------------------------------


@needs_table
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.clone(),
        lambda t: t.view(torch.int32),
        lambda t: t.view(2, 8),
        lambda t: t.t(),
        lambda t: t[:3],
        lambda t: t[1:],
    ],
)
def test_places_change_with_what_a_view_says(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensor = filled((4, 4))
    before = planning.places({"t": tensor})
    assert before is not None and before == planning.places({"t": tensor.detach()})
    assert planning.places({"t": change(tensor)}) != before


@needs_table
def test_places_of_what_python_has_to_look_at() -> None:
    assert planning.places({"t": conjugate().imag}) is None
    assert planning.places({"t": of_another_class()}) is None


@needs_table
def test_importing_asks_nothing(tmp_path: Path) -> None:
    """Neither the native module nor torch's table is touched before the first save."""
    script = """
import sys, torch, fastshard
from fastshard.engine import planning
from fastshard.engine.borrowed import dlpack_exchange_api
assert "fastshard._native" not in sys.modules and not planning._known
fastshard.save_file({"t": torch.ones(3)}, sys.argv[1])
assert planning._known and fastshard.status().planned == {"": 1}
"""
    subprocess.run([sys.executable, "-c", script, os.fspath(tmp_path / "f")], check=True, cwd=tmp_path)


def test_entries_are_a_sequence() -> None:
    tensors = {name: filled((2,), seed=seed) for seed, name in enumerate("bca")}
    entries = planning.lay_out(tensors, allow_strided=False).entries
    expected = describe(tensors, allow_strided=False)
    assert list(entries) == expected and entries[-1] == expected[-1] and entries[1:] == expected[1:]
    assert [entry.name for entry in itertools.islice(reversed(entries), 2)] == ["c", "b"]
    for index in (3, -4):
        with pytest.raises(IndexError):
            entries[index]


def test_the_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fastshard.bench import planning as bench

    arguments = ["--tensors", "60", "--rounds", "2", "--dir", os.fspath(tmp_path), "--json"]
    assert bench.main([*arguments, os.fspath(tmp_path / "figures")]) in (0, 1)
    shown = capsys.readouterr().out
    assert "plan 60 tensors" in shown and "safetensors' time over ours" in shown
    figures = json.loads((tmp_path / "figures").read_text())
    assert figures["native"] is (planning.why_not_native() == "")
    assert [len(row["seconds"]) for row in figures["plans"] + figures["saves"]] == [2] * 6
    assert os.listdir(tmp_path) == ["figures"] and planning.VARIABLE not in os.environ
