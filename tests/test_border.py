# SPDX-License-Identifier: Apache-2.0
"""What crosses the border to the native module, by names; and what it keeps alive there."""

from __future__ import annotations

import ctypes
import gc
import os
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import run_bare

from fastshard import _native
from fastshard.engine import plan as border
from fastshard.engine.engine import Engine
from fastshard.engine.plan import (
    FETCHED,
    HOST,
    FilePlan,
    ForeignFile,
    Link,
    Memory,
    Place,
    SaveOptions,
    TensorView,
    WriteItem,
)

NewEngine = Callable[..., Engine]
RECORDS = (TensorView, WriteItem, FilePlan, ForeignFile, Memory, Link, Place, SaveOptions)

CHANGE = """
import ctypes, os, sys
from collections import namedtuple
import fastshard.engine.plan as border
record = getattr(border, sys.argv[1])
fields = sys.argv[2].split()
changed = namedtuple(sys.argv[1], fields, defaults=[record._field_defaults.get(name) for name in fields])
if "nbytes" not in fields and hasattr(record, "nbytes"):
    changed.nbytes = vars(record)["nbytes"]
setattr(border, sys.argv[1], changed)
"""
SAVE = """
from fastshard.engine.engine import Engine
memory = ctypes.create_string_buffer(b"0123456789", 10)
view = border.TensorView(data=ctypes.addressof(memory), nbytes=10, device=border.HOST, itemsize=1)
items = [border.WriteItem(source=view, file_offset=6)]
plan = border.FilePlan(target=os.fsencode(sys.argv[3]), header=b"head", items=items, size=20)
Engine().submit([plan], keep_alive=memory).result()
"""


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_fields_may_stand_in_any_order(path: Path, record: type[TensorView]) -> None:
    turned = " ".join(reversed(record._fields))
    done = run_bare(CHANGE + SAVE, record.__name__, turned, path)
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == b"head\0\0" + b"0123456789" + b"\0" * 4


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)
def test_both_sides_know_the_same_fields(record: type[TensorView]) -> None:
    """Else the module cannot be imported: nothing is read from the wrong place."""
    for fields in (record._fields[1:], (*record._fields, "another")):
        done = run_bare(CHANGE + "import fastshard._native", record.__name__, " ".join(fields), "")
        assert (
            "ImportError" in done.stderr
            and record.__name__ in done.stderr
            and "different versions" in done.stderr
        )


def test_every_record_of_the_plan_is_known_here() -> None:
    found = {
        value for value in vars(border).values() if isinstance(value, type) and hasattr(value, "_fields")
    }
    assert found == set(RECORDS)


VIEW = TensorView(0, 0, HOST)


@pytest.mark.parametrize(
    ("plan", "what"),
    [
        (tuple(FilePlan(b"f", b"", [])), "expected a FilePlan, not a tuple"),
        (FilePlan(b"f", b"", [tuple(VIEW)]), "expected a TensorView, not a tuple"),
        (FilePlan(b"f", b"", [WriteItem((0, 0, HOST), 0)]), "expected a TensorView, not a tuple"),
        (FilePlan((0, 0), b"", []), "target is a path .bytes., ForeignFile, Memory or Link, not a tuple"),
        (FilePlan("f", b"", []), "target is a path .bytes., .*, not a str"),
    ],
)
def test_what_only_looks_like_a_plan(plan: FilePlan, what: str) -> None:
    with pytest.raises(TypeError, match=what):
        _native.schedule([plan], 1 << 20, 1 << 20, 1 << 20, 1024, True)


class Alive:
    """What a save is given to keep."""


def test_a_save_keeps_what_it_reads_from(path: Path, new_engine: NewEngine) -> None:
    kept, options = Alive(), SaveOptions({})
    seen = weakref.ref(kept)
    engine = new_engine()
    save = engine._natives[None].submit([FilePlan(os.fsencode(path), b"head", [])], options, [kept])
    del kept
    while not save.wait(1):
        pass
    gc.collect()
    assert seen() is not None
    del save
    gc.collect()
    assert seen() is None


def test_a_prepared_save_keeps_what_it_reads_from(path: Path, new_engine: NewEngine) -> None:
    prepared = new_engine().prepare(FilePlan(os.fsencode(path), b"head", []), 2, "tag")
    kept = Alive()
    seen = weakref.ref(kept)
    save = prepared.submit(SaveOptions({}), "tag", [kept])
    del kept
    assert save is not None
    save.wait(300)
    gc.collect()
    assert seen() is not None
    del save
    gc.collect()
    assert seen() is None


def test_nothing_is_kept_of_a_save_that_does_not_begin(path: Path, new_engine: NewEngine) -> None:
    native = new_engine()._natives[None]
    kept = Alive()
    seen = weakref.ref(kept)
    with pytest.raises(OSError):
        native.submit([FilePlan(os.fsencode(path / "missing" / "f"), b"", [])], SaveOptions({}), [kept])
    with pytest.raises(ValueError):
        native.submit([FilePlan(os.fsencode(path), b"", [TensorView(0, 8, HOST)])], SaveOptions({}), [kept])
    del kept
    gc.collect()
    assert seen() is None


def test_a_prepared_save_has_few_options(path: Path, new_engine: NewEngine) -> None:
    prepared = new_engine().prepare(FilePlan(os.fsencode(path), b"head", []), 2)
    for options in (
        SaveOptions({}, amended=True),
        SaveOptions({}, keep_cached=False),
        SaveOptions({}, follow_links=True),
    ):
        with pytest.raises(ValueError, match="no other options"):
            prepared.submit(options, None, None)


@pytest.mark.parametrize("target", [Memory(0, 4), ForeignFile(b"f"), Link(b"f", b"g")], ids=repr)
def test_only_a_new_file_can_be_prepared(new_engine: NewEngine, target: object) -> None:
    header = b"" if isinstance(target, Link) else b"head"
    with pytest.raises(ValueError, match="only new files can be prepared"):
        new_engine().prepare(FilePlan(target, header, []), 2)  # type: ignore[arg-type]


def test_a_gap_in_a_prepared_file(path: Path, new_engine: NewEngine) -> None:
    """Zeros, in every generation."""
    memory = ctypes.create_string_buffer(b"0123456789", 10)
    view = TensorView(ctypes.addressof(memory), 10, HOST)
    engine = new_engine()
    prepared = engine.prepare(FilePlan(os.fsencode(path), b"head", [WriteItem(view, 5000)], 6000), 2)
    for _ in range(3):
        future = engine.submit_prepared(prepared, keep_alive=memory, streams={}, durable=False, fetch=None)
        assert future is not None
        future.result()
        assert path.read_bytes() == b"head" + bytes(4996) + b"0123456789" + bytes(990)


def test_fetched_items_are_asked_for_by_their_place_in_the_plan(path: Path, new_engine: NewEngine) -> None:
    """Not by their place in the file."""
    asked = {}

    def fetch(file: int, item: int, first: int, nbytes: int, address: int) -> None:
        asked[item] = nbytes
        ctypes.memset(address, ord("a") + item, nbytes)

    items = [WriteItem(TensorView(0, 3, FETCHED), 9), WriteItem(TensorView(0, 2, FETCHED), 4)]
    new_engine().submit(
        [FilePlan(os.fsencode(path), b"head", items, 12)], keep_alive=None, fetch=fetch
    ).result()
    assert asked == {0: 3, 1: 2} and path.read_bytes() == b"headbb\0\0\0aaa"
