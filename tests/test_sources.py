# SPDX-License-Identifier: Apache-2.0
"""What a prepared save reads its tensors from: modules, functions and dicts that change between two saves."""

from __future__ import annotations

import copy
import gc
import logging
import sys
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import safetensors.torch as reference
import torch
from conftest import assert_same
from helpers import names, same
from safetensors import SafetensorError

import fastshard
from fastshard import PreparedSave, SaveError, prepare
from fastshard.api.prepared import _Bound

Tensors = dict[str, torch.Tensor]


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(5, 3)
        self.inner = torch.nn.Linear(3, 3)
        self.head = torch.nn.Linear(3, 5, bias=False)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("scratch", torch.zeros(7), persistent=False)


def tied() -> Model:
    model = Model()
    model.head.weight = model.embed.weight
    return model


def holds(path: Path, model: torch.nn.Module) -> bool:
    """Whether the file is the one that safetensors writes for the module now."""
    expected = path.with_name("expected")
    try:
        reference.save_model(model, str(expected))
    except RuntimeError:  # a view of something larger
        reference.save_file({name: t.contiguous() for name, t in model.state_dict().items()}, expected)
    assert_same(path.read_bytes(), expected.read_bytes())
    expected.unlink()
    return True


# Modules -------------------------------------------------------------------------------------------------


def grow(model: Model) -> Tensors:
    return {name: tensor + 1 for name, tensor in model.state_dict().items()}


CHANGES: dict[str, Callable[[Model], object]] = {
    "filled": lambda m: m.inner.weight.data.fill_(2),
    ".data": lambda m: setattr(m.inner.weight, "data", torch.ones(3, 3)),
    ".data, strided": lambda m: setattr(m.inner.weight, "data", torch.rand(3, 3).t()),
    ".data, the same memory": lambda m: setattr(m.inner.weight, "data", m.inner.weight.data.t()),
    "another parameter": lambda m: setattr(m.inner, "weight", torch.nn.Parameter(torch.rand(3, 3))),
    "another module": lambda m: setattr(m, "inner", torch.nn.Linear(3, 3)),
    "another buffer": lambda m: setattr(m, "mean", torch.rand(3)),
    "swapped buffers": lambda m: m._buffers.update(mean=torch.rand(3)),
    "assigned": lambda m: m.load_state_dict(grow(m), assign=True),
    "loaded": lambda m: m.load_state_dict(grow(m)),
    "there and back": lambda m: (m.double(), m.float()),
    "flattened": lambda m: torch.nn.utils.vector_to_parameters(
        torch.arange(sum(p.numel() for p in m.parameters())).float(), m.parameters()
    ),
}


@pytest.mark.parametrize("make", [Model, tied])
@pytest.mark.parametrize("what", CHANGES)
def test_a_module_is_followed(tmp_path: Path, make: Callable[[], Model], what: str) -> None:
    if make is tied and what == "flattened":
        make = Model  # no saver takes tied parameters that are views of something larger
    model, path = make(), tmp_path / "m.safetensors"
    with prepare(model, path) as prepared:
        prepared.save()
        CHANGES[what](model)
        if make is tied and what == "assigned":
            model.head.weight = model.embed.weight
        for _ in range(3):
            prepared.save()
            assert holds(path, model)


def test_the_file_is_that_of_save_model(tmp_path: Path) -> None:
    for number, model in enumerate((Model(), tied(), torch.nn.Linear(3, 3))):
        if number == 2:
            model.weight.data = model.weight.data.t()  # type: ignore[union-attr, operator]
        path = tmp_path / f"{number}.safetensors"
        with prepare(model, path) as prepared:
            prepared.save()
            assert holds(path, model)
    loaded = Model()
    reference.load_model(loaded, str(tmp_path / "1.safetensors"), strict=False)


def test_metadata_of_the_caller_stays_his(tmp_path: Path) -> None:
    metadata = {"a": "b", "head.weight": "mine"}
    with prepare(tied(), tmp_path / "m", metadata) as prepared:
        prepared.save()
    with fastshard.safe_open(tmp_path / "m", "pt") as file:
        assert file.metadata() == metadata
    assert metadata == {"a": "b", "head.weight": "mine"}


def untie(model: Model) -> None:
    model.head.weight = torch.nn.Parameter(torch.rand(5, 3))


MISFITS: dict[str, tuple[Callable[[Model], object], str]] = {
    "dtype": (lambda m: m.to(torch.bfloat16), "`[a-z.]+` has dtype torch.bfloat16, but .* torch.float32"),
    "shape": (lambda m: setattr(m, "inner", torch.nn.Linear(3, 4)), "`inner.weight` has shape"),
    "shape, the same memory": (
        lambda m: setattr(m.head.weight, "data", m.head.weight.data.view(3, 5)),
        "`head.weight` has shape",
    ),
    "missing": (lambda m: delattr(m, "inner"), "`inner.(weight|bias)` is missing"),
    "new": (lambda m: m.register_buffer("new", torch.zeros(3)), "`new` is unexpected"),
    "tied": (lambda m: setattr(m.head, "weight", m.embed.weight), "share memory"),
    "gone": (lambda m: m.inner.weight.untyped_storage().resize_(0), "inner.weight"),
}


@pytest.mark.parametrize("what", MISFITS)
def test_what_does_not_fit_any_more_is_named(tmp_path: Path, what: str) -> None:
    change, text = MISFITS[what]
    model, path = Model(), tmp_path / "m.safetensors"
    good = copy.deepcopy(model)
    with prepare(model, path) as prepared:
        prepared.save()
        change(model)
        for _ in range(2):
            with pytest.raises((ValueError, RuntimeError, SafetensorError), match=text):
                prepared.save()
        assert holds(path, good)
        prepared.save(good)
        assert holds(path, good)
    assert names(tmp_path) == [path.name]


@pytest.mark.parametrize("what", ["untied", "renamed"])
def test_ties_must_stay(tmp_path: Path, what: str) -> None:
    model = tied()
    with prepare(model, tmp_path / "m.safetensors") as prepared:
        prepared.save()
        if what == "untied":
            untie(model)
        else:
            del model.head
        text = "shared the memory" if what == "untied" else "`head.weight` is missing"
        with pytest.raises(ValueError, match=text):
            prepared.save()
        with pytest.raises(ValueError, match="head.weight"):
            prepared.bind(Model())


def test_a_module_with_its_own_state_dict(tmp_path: Path) -> None:
    class Odd(torch.nn.Module):
        def state_dict(self) -> Tensors:  # type: ignore[override]
            return {"a": self.a}  # type: ignore[dict-item]

    model = Odd()
    model.a = torch.zeros(3)
    with prepare(model, tmp_path / "m") as prepared:
        model.a = torch.ones(3)
        prepared.save()
    assert same(tmp_path / "m", {"a": torch.ones(3)})


def test_a_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    class Counting(torch.nn.Linear):
        def get_extra_state(self) -> int:
            return 5

    with pytest.raises(ValueError, match="`_extra_state` is invalid"):
        prepare(Counting(3, 3), tmp_path / "m")


def test_a_view_of_a_larger_storage_is_tied_to_none(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 3, bias=False)
    model.weight.data = torch.arange(30.0).view(10, 3)[2:5]
    with prepare(model, tmp_path / "prepared") as prepared:
        model.weight.data += 1
        prepared.save()
    fastshard.save_model(model, tmp_path / "saved")
    for name in ("prepared", "saved"):
        assert same(tmp_path / name, {"weight": torch.arange(7.0, 16).view(3, 3)})
    model.other = torch.nn.Parameter(model.weight.data[1:])
    with pytest.raises(RuntimeError, match="None is covering the entire storage"):
        fastshard.save_model(model, tmp_path / "saved")


def test_the_old_memory_is_let_go(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 3, bias=False)
    storage = model.weight.untyped_storage()
    with prepare(model, tmp_path / "m") as prepared:
        prepared.save()
        count = torch._C._storage_Use_Count(storage._cdata)
        model.weight.data = torch.ones(3, 3)
        assert torch._C._storage_Use_Count(storage._cdata) == count - 1


# Functions and dicts -------------------------------------------------------------------------------------


def test_a_function_is_called_by_each_save(folder: Path) -> None:
    value = 0.0

    def current() -> Tensors:
        nonlocal value
        value += 1
        return {"a": torch.full((1000,), value), "b": torch.full((3, 3), value)}

    with prepare(current, folder / "m") as prepared:
        for expected in (2, 3, 4):
            prepared.save()
            assert same(
                folder / "m",
                {"a": torch.full((1000,), float(expected)), "b": torch.full((3, 3), float(expected))},
            )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def test_a_function_that_returns_or_raises_something_else(tmp_path: Path) -> None:
    answers: list[Any] = [{"a": torch.zeros(3)}, None, {"a": 5}, {"b": torch.zeros(3)}, {"a": torch.ones(3)}]

    with prepare(lambda: answers.pop(0), tmp_path / "m") as prepared:
        for text in ("returns a dict", "`a` is invalid", "`a` is missing"):
            with pytest.raises(ValueError, match=text):
                prepared.save()
        prepared.save()
        with pytest.raises(IndexError):
            prepared.save()
    assert same(tmp_path / "m", {"a": torch.ones(3)})


def test_entries_of_a_dict_may_be_replaced(tmp_path: Path) -> None:
    tensors = OrderedDict(a=torch.zeros(3), b=torch.zeros(4))
    with prepare(tensors, tmp_path / "m") as prepared:
        tensors["a"] = torch.ones(3)
        prepared.save()
        assert same(tmp_path / "m", tensors)
        tensors["a"] = tensors["a"].view(3, 1)
        with pytest.raises(ValueError, match="`a` has shape"):
            prepared.save()
        del tensors["a"]
        with pytest.raises(ValueError, match="`a` is missing"):
            prepared.save()
        tensors["a"] = torch.full((3,), 2.0)  # last now
        prepared.save()
        assert same(tmp_path / "m", tensors)


def test_bound_to_a_module(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 3)
    with prepare(dict(model.state_dict()), tmp_path / "m") as prepared:
        prepared.bind(model)
        model.weight.data = torch.ones(3, 3)
        prepared.save()
        assert same(tmp_path / "m", model.state_dict())
        with pytest.raises(ValueError, match="module, or a function"):
            prepared.bind("no tensors")  # type: ignore[arg-type]


def test_swapped_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tensors come first"):
        prepare(str(tmp_path / "m"), {"a": torch.zeros(3)})  # type: ignore[arg-type]
    for given in (None, 5, [torch.zeros(3)]):
        with pytest.raises(ValueError, match="Expected a dict"):
            prepare(given, tmp_path / "m")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="filename"):
        prepare({"a": torch.zeros(3)}, {"a": torch.zeros(3)})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="metadata"):
        prepare(tied(), tmp_path / "m", ["x"])  # type: ignore[arg-type]


def test_it_says_what_it_is(tmp_path: Path) -> None:
    prepared = prepare({"a": torch.zeros(300)}, tmp_path / "m", generations=3)
    assert repr(prepared) == (
        f"<PreparedSave of '{tmp_path}/m': 1 tensors, 3 generations of {prepared.nbytes:,} bytes, 0 saves made>"
    )
    prepared.save()
    assert prepared.saves == 1 and not prepared.closed and repr(prepared).endswith(" bytes, 1 save made>")
    nbytes = prepared.nbytes
    prepared.close()
    assert prepared.closed and prepared.nbytes == nbytes == (tmp_path / "m").stat().st_size
    assert repr(prepared).endswith("1 tensors, closed, 1 save made>")


# What a dict cannot know ---------------------------------------------------------------------------------

LEAVES: dict[str, Callable[[Model], object]] = {
    ".data": lambda m: setattr(m.inner.weight, "data", torch.ones(3, 3)),
    "assigned": lambda m: m.load_state_dict(grow(m), assign=True),
    "cast": lambda m: m.to(torch.float64),
    "replaced": lambda m: setattr(m.inner, "weight", torch.nn.Parameter(torch.ones(3, 3))),
}


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("what", LEAVES)
def test_a_dict_that_its_module_has_left_is_noticed(
    tmp_path: Path, what: str, kept: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model, path = Model(), tmp_path / "m"
    state = model.state_dict() if kept else None
    with prepare(model.state_dict() if state is None else state, path) as prepared:
        for _ in range(2):
            prepared.save()
            model.inner.weight.data.add_(1)
        prepared.save()
        before = path.read_bytes()
        LEAVES[what](model)
        with (
            caplog.at_level(logging.WARNING, "fastshard"),
            pytest.warns(UserWarning, match="repeats old values.*`inner.weight`") as found,
        ):
            prepared.save()
        assert found[0].filename == __file__
        assert len(caplog.records) == 1 and caplog.records[0].name == "fastshard"
        assert path.read_bytes() == before
        prepared.save()  # once
    del state


def test_a_warning_that_is_an_error_changes_nothing(tmp_path: Path) -> None:
    model = Model()
    with prepare(model.state_dict(), tmp_path / "m") as prepared:
        model.double()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match=r"\(and 2 others\)"):
                prepared.save()
        assert names(tmp_path) == []


def test_a_dict_that_is_filled_is_none_of_them(tmp_path: Path) -> None:
    """Warnings are errors here."""
    array = np.zeros(100, dtype=np.float32)
    base = torch.zeros(200)
    ema = copy.deepcopy(Model())
    filled = {
        "numpy": torch.from_numpy(array).detach(),
        "view": base[:100],
        "other view": base[100:],
        "parameter": torch.nn.Parameter(torch.zeros(5).detach()),
        "used": torch.ones(5, requires_grad=True),
        "shared": torch.zeros(5).share_memory_().detach(),
    }
    of_ema = ema.state_dict()
    loss = (filled["used"] * 2).sum()
    constant = [torch.ones(4)]
    with (
        prepare(filled, tmp_path / "m") as one,  # type: ignore[arg-type]
        prepare(of_ema, tmp_path / "e") as two,
        prepare({"a": torch.ones(4)}, tmp_path / "c") as three,
        prepare({"a": constant[0]}, tmp_path / "d") as four,
    ):
        loss.backward()
        del base, ema, loss
        for value in range(1, 4):
            array[:] = value
            for name, tensor in filled.items():
                if name != "numpy":
                    tensor.data.fill_(value)
            for tensor in of_ema.values():
                tensor.lerp_(torch.full_like(tensor, value), 0.5)
            for prepared in (one, two, three, four):
                prepared.save()
            assert same(tmp_path / "m", {name: tensor.detach() for name, tensor in filled.items()})
            assert same(tmp_path / "e", of_ema)


def test_a_replaced_entry_is_not_the_one_that_was_left(tmp_path: Path) -> None:
    model = Model()
    state = model.state_dict()
    with prepare(state, tmp_path / "m") as prepared:
        model.inner.weight.data = torch.ones(3, 3)
        state["inner.weight"] = model.inner.weight.data
        prepared.save()
        assert same(tmp_path / "m", model.state_dict())


# Signal handlers, finalizers -----------------------------------------------------------------------------


def interrupted(run: Callable[[], object], handler: Callable[[], object], at: int) -> int:
    """Calls ``run()``, and ``handler()`` once: at the line of that number in the files of prepared saves. How many
    lines there were."""
    lines = 0
    files = ("prepared.py", "sources.py", "holders.py", "planning.py", "saving.py")

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal lines
        if not frame.f_code.co_filename.endswith(tuple(f"fastshard/{name}" for name in files)):
            return None
        if event == "line":
            lines += 1
            if lines == at:
                sys.settrace(None)
                handler()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
    return lines


def filled_with(value: float) -> Tensors:
    return {name: torch.full((n,), value) for name, n in (("a", 1000), ("b", 3))}


@pytest.mark.parametrize("handler_saves", ["the same", "others", "itself bound to others"])
def test_a_signal_handler_may_save_at_any_line(tmp_path: Path, no_hang: None, handler_saves: str) -> None:
    path = tmp_path / "m"
    mine, others = filled_with(1), filled_with(2)
    handled = []
    with prepare(mine, path) as prepared:

        def handler() -> None:
            if handler_saves == "the same":
                prepared.save()
            elif handler_saves == "others":
                prepared.save(others)
                assert same(path, others)
            else:
                prepared.bind(others)
            handled.append(True)

        def run() -> None:
            prepared.save(mine)

        total = interrupted(run, lambda: None, 0)
        for at in range(1, total + 1):
            mine = filled_with(10 + at)
            handled.clear()
            interrupted(run, handler, at)
            assert handled and same(path, mine), f"line {at} of {total}"
    assert names(tmp_path) == ["m"]


def test_a_signal_handler_may_save_while_the_engine_writes(
    tmp_path: Path, no_hang: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right after the engine has begun, where Python does not yet know it."""
    from fastshard.engine.engine import Engine

    path, mine, others = tmp_path / "m", filled_with(1), filled_with(2)
    with prepare(mine, path) as prepared:
        submit, began = Engine.submit_prepared, []

        def submitted(*arguments: Any, **named: Any) -> Any:
            future = submit(*arguments, **named)
            began.append(future)
            if len(began) == 1:
                prepared.save(others)
                assert same(path, others)
            return future

        monkeypatch.setattr(Engine, "submit_prepared", submitted)
        prepared.save()
    assert len(began) == 3 or (len(began) == 2 and began[0].done())  # begun anew, unless it was done before


@pytest.mark.usefixtures("planned_in_python")
def test_what_only_this_thread_can_bring_is_refused_in_a_handler(
    tmp_path: Path, no_hang: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastshard.engine import tensors as module

    path, mine, refused = tmp_path / "m", filled_with(1), []
    monkeypatch.setattr(module, "device_number", lambda device: -2)
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda self: False))
    fetch = module.fetch

    def fetched(*arguments: Any) -> None:
        if not refused:
            with pytest.raises(RuntimeError, match="under way in this thread") as raised:
                prepared.save()
            refused.append(raised)
        fetch(*arguments)

    monkeypatch.setattr(module, "fetch", fetched)
    with prepare(mine, path) as prepared:
        prepared.save()
        assert refused and same(path, mine)
        prepared.save()


def test_closed_by_a_signal_handler(tmp_path: Path, no_hang: None) -> None:
    mine = filled_with(1)
    made: list[PreparedSave] = []

    def run() -> None:
        made.append(prepare(mine, tmp_path / "m"))
        made[0].save()

    def handler() -> None:
        for prepared in made:
            prepared.close()

    total = interrupted(run, lambda: None, 0)
    for at in range(1, total + 1, 5):
        made.clear()
        try:
            interrupted(run, handler, at)
        except RuntimeError as error:
            assert "closed" in str(error)
        made[0].close()
    assert names(tmp_path) == ["m"] and same(tmp_path / "m", mine)


def test_what_is_bound_holds_no_tensor(tmp_path: Path) -> None:
    tensors = filled_with(1)
    with prepare(lambda: tensors, tmp_path / "m") as prepared:
        prepared.save()
        bound = prepared._native.tag
        assert isinstance(bound, _Bound) and bound.fits(tensors)
        watched = [weakref.ref(tensor) for tensor in tensors.values()]
        tensors = filled_with(2)
        assert not bound.fits(tensors)
        gc.collect()
        assert watched and not any(tensor() for tensor in watched)


def test_a_missing_folder_is_an_error_by_name(tmp_path: Path) -> None:
    with pytest.raises(SaveError) as raised:
        prepare(Model(), tmp_path / "missing" / "m")
    assert raised.value.filename == str(tmp_path / "missing" / "m")
