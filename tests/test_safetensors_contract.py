# SPDX-License-Identifier: Apache-2.0
"""What callers of safetensors.torch rely on besides the bytes: signatures, errors, and nothing in their way.

Errors are compared by running the reference on the same input. Then what is not in the reference: figures,
progress, engines, threads and processes. What happens to files is in test_files.py.
"""

from __future__ import annotations

import ast
import collections
import ctypes
import dataclasses
import errno
import functools
import inspect
import os
import pickle
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch as reference
import torch
from helpers import DTYPES, FLOAT4, filled, parsed, release, said_now, snapshot
from safetensors import SafetensorError

import fastshard
from fastshard import Engine, Options, SaveError
from fastshard.engine.plan import HOST, FilePlan, TensorView
from fastshard.engine.progress import wait_with_bar

pytestmark = pytest.mark.usefixtures("planner")

MIB = 1 << 20
TENSORS = {"a": filled((100,)), "b": filled((3, 5), torch.bfloat16, 1)}


# Signatures ----------------------------------------------------------------------------------------------

EXTRAS = {
    "durable": False,
    "keep_cached": True,
    "progress": None,
    "allow_strided": False,
    "dtype": None,
    "checksums": False,
    "manifest": False,
    "base": None,
    "engine": None,
}


@pytest.mark.parametrize("name", ["save_file", "save", "save_model"])
def test_signatures_begin_as_the_references(name):
    theirs = list(inspect.signature(getattr(reference, name)).parameters.values())
    ours = list(inspect.signature(getattr(fastshard, name)).parameters.values())
    described = [[(p.name, p.kind, p.default) for p in parameters] for parameters in (theirs, ours)]
    assert described[1][: len(theirs)] == described[0]


@pytest.mark.parametrize("name", ["save_file", "save", "save_model", "save_files"])
def test_extras_are_keyword_only_and_the_same_everywhere(name):
    parameters = inspect.signature(getattr(fastshard, name)).parameters.values()
    extras = {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    expected = {
        key: value
        for key, value in EXTRAS.items()
        if name != "save" or key not in ("durable", "keep_cached", "checksums", "manifest", "base")
    }
    assert extras == expected


# Errors of the reference ---------------------------------------------------------------------------------


class StateDictOnly(torch.nn.Module):
    """A model of which only the state dict matters."""

    def __init__(self, tensors: Any) -> None:
        super().__init__()
        self.tensors = tensors

    def state_dict(self) -> Any:
        return self.tensors.copy() if isinstance(self.tensors, dict) else self.tensors


class NumberPath:
    def __fspath__(self) -> int:
        return 5


class BytesPath:
    def __fspath__(self) -> bytes:
        return b"model"


class TextSubclass(str):
    pass


def error_of(call: Callable[[], Any]) -> BaseException | None:
    try:
        call()
    except Exception as error:
        return error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of PyO3
            raise
        pytest.skip(f"this safetensors panics: {error}")
    return None


def comparable(error: BaseException) -> str:
    """The text, with the names of sets in order, and without the place in a string, which is our own."""

    def in_order(match: re.Match[str]) -> str:
        return str(sorted(sorted(names) for names in ast.literal_eval(match[0])))

    text = re.sub(r"in position \d+", "in position N", said_now(str(error)))
    return re.sub(r"\[(?:\{[^{}]*\}(?:, )?)+\]", in_order, text)


def check_same_error(theirs: BaseException | None, ours: BaseException | None) -> None:
    assert theirs is not None, "no error to compare with"
    assert ours is not None, f"the reference raises {theirs!r}"
    assert isinstance(ours, type(theirs)), f"{ours!r}, the reference raises {theirs!r}"
    assert comparable(ours) == comparable(theirs)


def check_save_file(make: Callable[[], Any], filename: Any, metadata: Any = None) -> None:
    """Both libraries refuse to save this, for the same reason."""
    theirs = error_of(lambda: reference.save_file(make(), filename, metadata))
    check_same_error(theirs, error_of(lambda: fastshard.save_file(make(), filename, metadata)))


def x() -> torch.Tensor:
    return filled((3, 4))


def strided() -> torch.Tensor:
    return x().t()


def scalar_float4() -> torch.Tensor:
    return filled((1,), torch.uint8).view(FLOAT4)[0]


def of_dtype(name: str) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of some, torch says that they are experimental
        return torch.empty(4, dtype=getattr(torch, name))


def quantized(dtype: torch.dtype) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(4), 0.1, 0, dtype)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def all_of(one: torch.Tensor, *views: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: view(one) for name, view in zip("abcdef", views)}


def same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


UNSUPPORTED = ["complex128", "complex32", "int1", "int4", "uint3", "bits8"]
QUANTIZED = ["quint8", "qint8", "qint32"]
NEEDS_FLOAT4 = pytest.mark.skipif(FLOAT4 is None, reason="this torch has no float4")

# Made anew for each call: none of them must change them.
BAD_TENSORS: dict[str, Callable[[], Any]] = {
    # 1: no dict
    "UserDict": lambda: collections.UserDict(a=x()),
    "None": lambda: None,
    "list": lambda: [x()],
    # 2: no tensor
    "value None": lambda: {"a": x(), "b": None},
    "value array": lambda: {"a": x().numpy()},
    "value number": lambda: {"a": 1.5, "b": "text"},
    # 3: layout
    "sparse": lambda: {"a": x().to_sparse(), "b": x(), "c": x().to_sparse()},
    "mkldnn": lambda: {"a": x().to_mkldnn()},
    # 4: sharing
    "twice": lambda: all_of(x(), same, same),
    "rows": lambda: all_of(x(), same, lambda t: t[0], lambda t: t[0]),
    "two pairs": lambda: {**all_of(x(), same, same), **dict(zip("yz", all_of(x(), same, same).values()))},
    "other dtype": lambda: all_of(x(), same, lambda t: t.view(torch.int16)),
    "parameter and its data": lambda: all_of(torch.nn.Parameter(x()), same, lambda p: p.data),
    "conjugate": lambda: all_of(filled((4,), torch.complex64), same, torch.conj),
    "turned": lambda: all_of(x(), same, torch.t),
    "column halves": lambda: all_of(x(), lambda t: t[:, :2], lambda t: t[:, 2:]),
    "interleaved": lambda: all_of(filled((8,)), lambda t: t[::2], lambda t: t[1::2]),
    "single columns": lambda: all_of(x(), lambda t: t[:, 0], lambda t: t[:, 1]),
    "boxes of one row": lambda: all_of(x(), lambda t: t[1:2, 0:2], lambda t: t[0:2, 1:2]),
    # 5: not contiguous, no data, dtype
    "strided": lambda: {"a": x(), "b": strided()},
    "every second": lambda: {"a": filled((8,))[::2]},
    "expanded": lambda: {"a": filled((1,)).expand(3)},
    "channels last": lambda: {"a": filled((2, 3, 4, 5)).to(memory_format=torch.channels_last)},
    "meta": lambda: {"a": x(), "b": meta(3)},
    "meta parameter": lambda: {"a": torch.nn.Parameter(meta(3))},
    # 6: keys
    "key number": lambda: {"a": x(), 1: x()},
    "key None": lambda: {None: x()},
    "key bytes": lambda: {b"a": x()},
    "key surrogate": lambda: {"\ud800": x()},
    # Two faults: the first of these rules wins, then the order of the dict.
    "no tensor, sparse": lambda: {"a": x().to_sparse(), "b": 1},
    "no tensor, strided": lambda: {"a": strided(), "b": 1},
    "no tensor twice": lambda: {"b": None, "a": 1},
    "sparse, shared": lambda: {**all_of(x(), same, same), "z": x().to_sparse()},
    "shared, strided": lambda: {"z": strided(), **all_of(x(), same, same)},
    "shared, strided views of it": lambda: all_of(x(), torch.t, torch.t),
    "strided, an empty view of it": lambda: all_of(x(), torch.t, lambda t: t[:0]),
    "shared, unsupported": lambda: all_of(of_dtype("complex128"), same, same),
    "strided, unsupported": lambda: {"a": of_dtype("complex128"), "b": strided()},
    "unsupported, strided": lambda: {"b": strided(), "a": of_dtype("complex128")},
    "strided and unsupported": lambda: {"a": of_dtype("complex128")[::2]},
    "strided and meta": lambda: {"a": meta(3, 4).t()},
    "meta and unsupported": lambda: {"a": meta(3, dtype=torch.complex128)},
    "key, no tensor": lambda: {1: x(), "b": None},
    "key, strided": lambda: {1: strided()},
    "key, shared": lambda: dict(zip([1, 2], all_of(x(), same, same).values())),
    "key, unsupported": lambda: {1: x(), "b": of_dtype("complex128")},
    "two keys": lambda: {None: x(), 2: x()},
    **{
        name: functools.partial(lambda n: {"a": of_dtype(n)}, name)
        for name in UNSUPPORTED
        if hasattr(torch, name)
    },
    **{name: functools.partial(lambda n: {"a": quantized(getattr(torch, n))}, name) for name in QUANTIZED},
}
if FLOAT4 is not None:
    BAD_TENSORS |= {
        # 7: what is noticed last
        "scalar float4": lambda: {"a": scalar_float4()},
        "scalar float4, strided": lambda: {"a": scalar_float4(), "b": strided()},
        "scalar float4, no tensor": lambda: {"a": scalar_float4(), "b": 1},
        "scalar float4, key": lambda: {"a": scalar_float4(), 1: x()},
    }

BAD_METADATA: dict[str, Any] = {
    "list": ["a"],
    "text": "a",
    "number": 5,
    "UserDict": collections.UserDict(a="b"),
    "value number": {"a": 1},
    "value None": {"a": None},
    "value bytes": {"a": b"b"},
    "key number": {1: "a"},
    "key None": {None: "a"},
    "value before the next key": {"a": 1, None: "b"},
    "key before its value": {1: None},
    "surrogate": {"a": "\ud800"},
    "surrogate key": {"\udfff": "a"},
}

BAD_FILENAMES: dict[str, Any] = {
    "number": 5,
    "None": None,
    "bytes": b"model.safetensors",
    "path of bytes": BytesPath(),
    "path of a number": NumberPath(),
    "surrogate": "\ud800",
}


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    """An old file, which every failed save leaves as it is, alone in its directory."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")
    yield path
    assert snapshot(tmp_path) == {path.name: b"old"}


def parametrize(name: str, cases: dict[str, Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(name, cases.values(), ids=cases.keys())


@parametrize("make", BAD_TENSORS)
def test_save_file_refuses_tensors(target, make):
    check_save_file(make, target)


@parametrize("make", BAD_TENSORS)
def test_save_refuses_tensors(make):
    check_same_error(error_of(lambda: reference.save(make())), error_of(lambda: fastshard.save(make())))


@parametrize("make", BAD_TENSORS)
def test_save_files_refuses_tensors(target, make):
    files = {target: TENSORS, target.with_name("other"): make()}
    check_same_error(error_of(lambda: reference.save(make())), error_of(lambda: fastshard.save_files(files)))


@parametrize("make", BAD_TENSORS)
@pytest.mark.parametrize("force_contiguous", [True, False])
def test_save_model_refuses_what_the_reference_refuses(tmp_path, make, force_contiguous):
    """Of what it saves, tied and strided tensors, it makes the same file."""
    errors, files = [], []
    for library in (reference, fastshard):
        target = tmp_path / library.__name__ / "model"
        target.parent.mkdir()
        target.write_bytes(b"old")
        model = StateDictOnly(make())
        errors.append(
            error_of(lambda: library.save_model(model, target, force_contiguous=force_contiguous))  # noqa: B023
        )
        files.append(snapshot(target.parent))
    if "None is covering the entire storage" in str(errors[0]) and errors[1] is None:
        # Parts of larger storages, tied to nobody: taken here, as their copies would be.
        copies = {name: t.clone(memory_format=torch.contiguous_format) for name, t in make().items()}
        assert files[1]["model"] == reference.save(copies)
    elif "None is covering the entire storage" in str(errors[0]):
        assert isinstance(errors[1], (RuntimeError, ValueError)) and files[1] == {"model": b"old"}
    elif errors[0] is not None:
        if "unsupported memory format" not in str(
            errors[0]
        ):  # an older torch's .contiguous() of sparse tensors
            check_same_error(*errors)
        assert errors[1] is not None and files[1] == {"model": b"old"}
    else:
        assert errors[1] is None
        assert parsed(files[1]["model"]) == parsed(files[0]["model"])


@parametrize("metadata", BAD_METADATA)
def test_metadata_that_is_no_dict_of_text(target, metadata):
    check_save_file(lambda: TENSORS, target, metadata)
    check_same_error(
        error_of(lambda: reference.save(TENSORS, metadata)),
        error_of(lambda: fastshard.save(TENSORS, metadata)),
    )
    model = StateDictOnly(TENSORS)
    check_same_error(
        error_of(lambda: reference.save_model(model, target, metadata)),
        error_of(lambda: fastshard.save_model(model, target, metadata)),
    )


@parametrize("filename", BAD_FILENAMES)
def test_filenames_that_are_none(target, filename, monkeypatch):
    monkeypatch.chdir(target.parent)
    check_save_file(lambda: TENSORS, filename)


@pytest.mark.parametrize(
    ("tensors", "filename", "metadata"),
    [
        ("strided", "number", "list"),
        ("unsupported", "number", "list"),
        ("meta", "bytes", "value number"),
        ("key number", "number", "list"),
        ("key surrogate", "number", None),
        ("key surrogate", None, "list"),
        ("scalar float4", "number", None),
        ("scalar float4", None, "list"),
        ("fine", "number", "list"),
        ("fine", "bytes", "surrogate"),
        ("fine", "surrogate", "value number"),
    ],
)
def test_tensors_are_checked_before_the_filename_and_that_before_the_metadata(
    target, tensors, filename, metadata, monkeypatch
):
    monkeypatch.chdir(target.parent)
    cases = {**BAD_TENSORS, "fine": lambda: TENSORS, "unsupported": lambda: {"a": of_dtype("complex128")}}
    if tensors not in cases:
        pytest.skip("this torch has no float4")
    check_save_file(cases[tensors], BAD_FILENAMES.get(filename, target), BAD_METADATA.get(metadata))


@pytest.mark.parametrize("name", ["model.safetensors", "missing/model"])
def test_header_that_no_reader_accepts(target, name):
    """Noticed before the file is looked at."""
    if release("safetensors") < (0, 8):
        pytest.skip("this safetensors writes what it cannot read")
    check_save_file(lambda: TENSORS, target.parent / name, {"a": "b" * 100_000_000})


@pytest.mark.parametrize(
    "tensors", [collections.OrderedDict(TENSORS), {TextSubclass("a"): x()}], ids=["dict", "str"]
)
def test_subclasses_of_dict_and_text_are_fine(tensors):
    assert fastshard.save(tensors, collections.OrderedDict(a=TextSubclass("b"))) == reference.save(
        tensors, {"a": "b"}
    )


def test_wrapper_of_tensors_has_no_memory_of_its_own(target):
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor")
    with pytest.raises(
        RuntimeError, match="^Attempted to access the data pointer on an invalid python storage"
    ):
        fastshard.save_file({"fine": x(), "wrapped": two_tensor.TwoTensor(x(), x())}, target)


# Errors of the system ------------------------------------------------------------------------------------


IO_ERRORS = [
    ("missing/model", errno.ENOENT),
    ("", errno.ENOENT),
    ("folder", errno.EISDIR),
    ("model.safetensors/model", errno.ENOTDIR),
    ("n" * 300, errno.ENAMETOOLONG),
    ("a\0b", errno.EINVAL),
]


@pytest.mark.parametrize(("name", "number"), IO_ERRORS, ids=[errno.errorcode[n] for _, n in IO_ERRORS])
def test_io_errors_are_of_both_kinds(target, name, number):
    (target.parent / "folder").mkdir()
    path = f"{target.parent}/{name}" if name else ""
    theirs = error_of(lambda: reference.save_file(TENSORS, path))
    assert type(theirs) is SafetensorError
    ours = error_of(lambda: fastshard.save_file(TENSORS, path))
    assert isinstance(ours, SaveError) and isinstance(ours, SafetensorError) and isinstance(ours, OSError)
    assert (ours.errno, ours.filename) == (number, path)
    beginning = f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})"
    assert said_now(str(theirs)).startswith(beginning)
    assert str(ours) == f'{beginning}: "{path}"'
    copy = pickle.loads(pickle.dumps(ours))
    assert (type(copy), copy.errno, copy.filename, str(copy)) == (SaveError, number, path, str(ours))


def test_every_door_raises_save_errors(target):
    missing = target.parent / "missing" / "model"
    for call in (
        lambda: fastshard.save_file(TENSORS, missing, durable=True),
        lambda: fastshard.save_model(torch.nn.Linear(2, 2), missing),
        lambda: fastshard.save_files({target: TENSORS, missing: TENSORS}),
        lambda: fastshard.save_files({"a\0b": TENSORS}),
    ):
        error = error_of(call)
        assert isinstance(error, SaveError) and error.errno in (errno.ENOENT, errno.EINVAL)


# Where we differ on purpose ------------------------------------------------------------------------------


def test_no_tensor_can_be_called_metadata(target):
    with pytest.raises(ValueError, match="__metadata__"):
        fastshard.save_file({"__metadata__": x()}, target)
    check_save_file(lambda: {"__metadata__": x(), "b": strided()}, target)  # other faults come first


@pytest.mark.skipif(torch.complex64 not in DTYPES, reason="this safetensors has no complex numbers")
def test_conjugates_are_saved_as_what_they_are():
    base = torch.tensor([[1 + 2j, 3 - 4j]], dtype=torch.complex64)
    negative = base.conj().imag[:, :1]
    assert base.conj().is_conj() and negative.is_neg() and negative.is_contiguous()
    loaded = fastshard.load(fastshard.save({"conj": base.conj(), "neg": negative.detach().clone()}))
    assert loaded["conj"].tolist() == [[1 - 2j, 3 + 4j]]
    assert fastshard.load(fastshard.save({"neg": negative}))["neg"].tolist() == [[-2.0]]


@pytest.mark.skipif(torch.complex64 not in DTYPES, reason="this safetensors has no complex numbers")
def test_conjugates_in_strided_views():
    base = filled((4, 6), torch.complex64).nan_to_num()
    tensors = {
        "turned": base.conj().t(),
        "half": filled((4, 6), torch.complex64, 1).nan_to_num().conj()[:, ::2],
    }
    assert all(tensor.is_conj() for tensor in tensors.values())
    loaded = fastshard.load(fastshard.save(tensors, allow_strided=True))
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor.resolve_conj())


# Figures -------------------------------------------------------------------------------------------------


def test_stats_of_a_file(tmp_path):
    fastshard.save_file(TENSORS, tmp_path / "model", durable=True)
    stats = fastshard.stats()
    assert (stats.files, stats.nbytes) == (1, (tmp_path / "model").stat().st_size)
    assert stats.write_path in ("buffered", "mapped")
    assert (stats.staging, stats.staging_nbytes) == ("none", 0)
    assert stats.sync_seconds > 0 and stats.write_seconds > 0
    assert stats.seconds >= stats.plan_seconds > 0
    assert isinstance(stats.fallbacks, tuple)


@pytest.mark.parametrize("write_path", ["buffered", "mapped"])
def test_stats_name_the_write_path(tmp_path, write_path):
    fastshard.save_file(TENSORS, tmp_path / "model", engine=Options(write_path=write_path))
    stats = fastshard.stats()
    # A file is only mapped where its space can be had beforehand.
    refused = write_path == "mapped" and any("fallocate" in text for text in stats.fallbacks)
    assert stats.write_path == ("buffered" if refused else write_path)


def test_stats_of_memory():
    data = fastshard.save(TENSORS)
    stats = fastshard.stats()
    assert (stats.files, stats.nbytes, stats.write_path, stats.staging) == (1, len(data), "memory", "none")


def test_strided_tensors_are_staged_within_the_budget(tmp_path):
    options = Options(memory_budget=MIB, threads=2, write_path="buffered")
    matrix = filled((1024, 1024), torch.int32)
    fastshard.save_file({"a": matrix.t()}, tmp_path / "model", allow_strided=True, engine=options)
    stats = fastshard.stats()
    assert stats.staging == "pageable"
    assert 0 < stats.staging_nbytes <= MIB


def test_stats_are_the_threads_own_or_else_the_newest_of_all():
    fastshard.save(TENSORS)
    mine = fastshard.stats()
    with ThreadPoolExecutor(1) as pool, ThreadPoolExecutor(1) as watcher:
        assert watcher.submit(fastshard.stats).result() is mine  # that thread has made none
        pool.submit(fastshard.save, {}).result()
        theirs = pool.submit(fastshard.stats).result()
        assert theirs.nbytes == 16 != mine.nbytes
        assert watcher.submit(fastshard.stats).result() is theirs
    assert fastshard.stats() is mine


def test_stats_of_a_save_in_a_worker_thread():
    script = """
import threading, torch, fastshard
assert fastshard.stats() is None
worker = threading.Thread(target=fastshard.save, args=({"a": torch.zeros(9)},))
worker.start(); worker.join()
print(fastshard.stats().files)
"""
    assert python(script) == "1\n"


def test_a_save_within_another_leaves_the_outer_ones_figures(tmp_path):
    """As a signal handler makes it: the figures of the save that ends last are the newest."""
    inner = []

    def hook(frame, event, argument):
        if frame.f_code.co_name == "finish" and not inner:
            inner.append(None)
            inner[0] = (fastshard.save({}), fastshard.stats())
        return None

    sys.settrace(hook)
    try:
        fastshard.save(TENSORS)
    finally:
        sys.settrace(None)
    assert inner[0][1].nbytes == 16
    assert fastshard.stats().nbytes == len(reference.save(TENSORS))


def test_failed_save_leaves_the_stats(target):
    fastshard.save(TENSORS)
    before = fastshard.stats()
    assert error_of(lambda: fastshard.save_file({"a": 1}, target)) is not None
    assert error_of(lambda: fastshard.save_file(TENSORS, target.parent / "missing" / "m")) is not None
    assert fastshard.stats() is before


# Progress ------------------------------------------------------------------------------------------------


def test_the_bar_shows_the_rate_of_the_whole_save(tmp_path, new_engine, monkeypatch):
    import tqdm.auto

    shown = []

    class Bar(tqdm.auto.tqdm):
        def close(self):
            shown.append(self.format_dict)
            super().close()

    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    memory = ctypes.create_string_buffer(MIB)
    future = new_engine().submit([plan_of(tmp_path / "model", memory)], keep_alive=memory)
    time.sleep(0.2)  # the bar comes late, and finds all of it done
    wait_with_bar(future, "model")
    figures = shown[0]
    rate = figures["rate"] or (figures["n"] - figures["initial"]) / figures["elapsed"]
    assert figures["n"] == figures["total"] == MIB + 4
    assert figures["elapsed"] >= 0.2
    assert rate <= (MIB + 4) / 0.2


@pytest.mark.parametrize(
    ("argument", "variable", "shown"),
    [
        (None, None, False),
        (None, "0", False),
        (None, "", False),
        (None, "1", True),
        (True, None, True),
        (True, "0", True),
        (False, "1", False),
    ],
)
def test_progress(tmp_path, capsys, monkeypatch, argument, variable, shown):
    monkeypatch.delenv("FASTSHARD_PROGRESS", raising=False)
    if variable is not None:
        monkeypatch.setenv("FASTSHARD_PROGRESS", variable)
    path = tmp_path / "shown.safetensors"
    for save in (
        lambda: fastshard.save_file(TENSORS, path, progress=argument),
        lambda: fastshard.save_files({path: TENSORS}, progress=argument),
        lambda: fastshard.save_model(torch.nn.Linear(2, 2), path, progress=argument),
        lambda: fastshard.save(TENSORS, progress=argument),
    ):
        save()
        out, err = capsys.readouterr()
        assert out == ""
        assert ("100%" in err and "B/s" in err) is shown
        assert shown or err == ""
    assert fastshard.load_file(path).keys() == {"weight", "bias"}


# Importing -----------------------------------------------------------------------------------------------


def python(script: str, *arguments: object) -> str:
    """Output of a Python script in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", script, *map(str, arguments)]
    # Not from the checkout's top: its package would come before the installed one.
    here = Path(__file__).parent
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=here)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_nothing_heavy():
    script = """
import sys, fastshard
print(sorted({"torch", "numpy", "safetensors", "tqdm", "fastshard._native"} & set(sys.modules)))
print(set(fastshard.__all__) <= set(dir(fastshard)))
fastshard.Options, fastshard.Engine, fastshard.Stats
print(sorted({"torch", "fastshard._native"} & set(sys.modules)))
"""
    assert python(script).splitlines() == ["[]", "True", "[]"]


def test_public_names():
    star: dict[str, Any] = {}
    exec("from fastshard import *", star)
    star.pop("__builtins__")
    assert (
        set(star)
        == set(fastshard.__all__)
        == {
            *(
                "save_file",
                "save_model",
                "save",
                "save_files",
                "prepare",
                "load_file",
                "load_model",
                "load",
                "safe_open",
            ),
            *("save_torch_model", "save_torch_state_dict", "install", "installed", "uninstall"),
            *(
                "status",
                "Status",
                "stats",
                "Stats",
                "Options",
                "PreparedSave",
                "Engine",
                "SaveFuture",
                "SaveError",
            ),
            *("torch_save", "ArchiveError"),
            *("save_sharded_state", "load_sharded_state", "save_distributed", "load_distributed"),
            *("shard_checkpoint", "merge_checkpoint", "reshard_checkpoint", "convert_dcp"),
            *("asynchronous", "wait_all", "save_file_async", "save_files_async", "save_model_async"),
            *(
                "save_torch_state_dict_async",
                "save_torch_model_async",
                "save_sharded_state_async",
                "torch_save_async",
            ),
            *("verify", "Report", "write_manifest", "Changed"),
            *("diff_checkpoints", "list_checkpoints", "latest_checkpoint", "prune_checkpoints"),
        }
    )
    assert all(getattr(fastshard, name) is value for name, value in star.items())
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = fastshard.nonsense


# Engines -------------------------------------------------------------------------------------------------


def plan_of(path: Path, memory: ctypes.Array[ctypes.c_char]) -> FilePlan:
    """A file of these bytes, for callers of the engine itself."""
    return FilePlan(os.fsencode(path), b"head", [TensorView(ctypes.addressof(memory), len(memory), HOST)])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"memory_budget": 0}, ValueError),
        ({"memory_budget": MIB - 1}, ValueError),
        ({"memory_budget": -1}, ValueError),
        ({"memory_budget": "1 parsec"}, ValueError),
        ({"memory_budget": "1KB"}, ValueError),
        ({"memory_budget": 1 << 63}, ValueError),
        ({"memory_budget": 1e9}, TypeError),
        ({"memory_budget": None}, TypeError),
        ({"memory_budget": True}, TypeError),
        ({"threads": 0}, ValueError),
        ({"threads": -1}, ValueError),
        ({"threads": 1 << 40}, ValueError),
        ({"threads": "4"}, TypeError),
        ({"threads": 2.0}, TypeError),
        ({"threads": True}, TypeError),
        ({"write_path": "fast"}, ValueError),
        ({"write_path": ""}, ValueError),
        ({"write_path": None}, TypeError),
        ({"device_scratch": -1}, ValueError),
        ({"device_scratch": "much"}, ValueError),
        ({"device_scratch": b"1MB"}, TypeError),
    ],
    ids=str,
)
def test_options_that_cannot_work(tmp_path, options, error):
    with pytest.raises(error, match=next(iter(options))):
        Engine(Options(**options))
    with pytest.raises(error):
        fastshard.save_file(TENSORS, tmp_path / "model", engine=Options(**options))
    assert snapshot(tmp_path) == {}


def test_options():
    assert Options() == Options(memory_budget=128 * MIB, write_path="auto")
    assert 1 <= Options().writers <= 16
    assert hash(Options()) == hash(Options())
    with pytest.raises(AttributeError):
        Options().threads = 3  # type: ignore[misc]


def test_options_take_sizes_as_the_command_line_does(tmp_path):
    options = Options(memory_budget="1GB", device_scratch="64MiB")
    assert options == Options(memory_budget=10**9, device_scratch=64 * MIB)
    assert dataclasses.replace(options, device_scratch="0").device_scratch == 0
    assert Options(threads=numpy.int64(2)).threads == 2
    fastshard.save_file(TENSORS, tmp_path / "model", engine=Options(memory_budget="2MiB"))


def test_default_number_of_threads_can_be_asked_for():
    cpus = len(os.sched_getaffinity(0))
    assert Options(threads=None).writers == Options().writers == min(16, cpus)
    assert Options(threads=3).writers == 3
    with Engine(Options(threads=None)) as engine:
        assert fastshard.save(TENSORS, engine=engine) == reference.save(TENSORS)


@pytest.mark.parametrize("options", ["fast", {"threads": 1}, Engine, 3], ids=str)
def test_what_are_no_options(options):
    with pytest.raises(TypeError, match="must be .*Options, not"):
        Engine(options)


@pytest.mark.parametrize(
    "call",
    [
        lambda path: fastshard.save_file(path, TENSORS),  # type: ignore[arg-type]
        lambda path: fastshard.save_file([1], path),  # type: ignore[arg-type]
        lambda path: fastshard.save_files(path),  # type: ignore[arg-type]
        lambda path: fastshard.save_files([TENSORS]),  # type: ignore[arg-type]
    ],
)
def test_arguments_in_the_wrong_place(tmp_path, call):
    with pytest.raises(ValueError, match=r"Expected a dict of \[.*\] but received <class '(str|list)'>"):
        call(str(tmp_path / "x"))
    with pytest.raises(ValueError, match="Expected a dict of"):
        reference.save_file(str(tmp_path / "x"), TENSORS)
    assert snapshot(tmp_path) == {}


def test_what_is_no_engine():
    with pytest.raises(TypeError, match="engine must be an Engine or Options, not str"):
        fastshard.save(TENSORS, engine="fast")


def test_engine_is_a_context_manager_that_waits(tmp_path):
    memory = ctypes.create_string_buffer(b"x" * (8 * MIB), 8 * MIB)
    with Engine() as engine:
        future = engine.submit([plan_of(tmp_path / "model", memory)], keep_alive=memory)
    assert future.done()
    assert (tmp_path / "model").read_bytes() == b"head" + memory.raw


def test_closed_engine(tmp_path):
    with Engine(Options(threads=1)) as engine:
        fastshard.save_file(TENSORS, tmp_path / "a", engine=engine)
    engine.close()
    for call in (
        lambda: fastshard.save_file(TENSORS, tmp_path / "b", engine=engine),
        lambda: fastshard.save(TENSORS, engine=engine),
        lambda: engine.submit([], keep_alive=None),
    ):
        with pytest.raises(RuntimeError, match="the engine is closed"):
            call()
    assert snapshot(tmp_path).keys() == {"a"}


def test_future(tmp_path, new_engine, no_hang):
    memory = ctypes.create_string_buffer(b"abc", 3)
    future = new_engine().submit([plan_of(tmp_path / "model", memory)], keep_alive=memory)
    stats = future.result()
    assert future.done()
    assert future.result() == future.stats == stats
    assert (stats.files, stats.nbytes, stats.plan_seconds) == (1, 7, 0)
    assert (tmp_path / "model").read_bytes() == b"headabc"


def test_future_dropped_without_waiting(tmp_path, new_engine, no_hang):
    memory = ctypes.create_string_buffer(b"y" * (32 * MIB), 32 * MIB)
    new_engine().submit([plan_of(tmp_path / "model", memory)], keep_alive=memory)
    assert (tmp_path / "model").read_bytes() == b"head" + memory.raw


def test_exit_of_the_interpreter_right_after_submit(tmp_path):
    script = """
import ctypes, os, sys
from fastshard import Engine
from fastshard.engine.plan import HOST, FilePlan, TensorView
from fastshard.engine.progress import wait_with_bar
memory = ctypes.create_string_buffer(b"z" * (32 << 20), 32 << 20)
engine = Engine()
future = engine.submit(
    [FilePlan(os.fsencode(sys.argv[1]), b"head", [TensorView(ctypes.addressof(memory), len(memory), HOST)])],
    keep_alive=memory,
)
assert "torch" not in sys.modules
"""
    assert python(script, tmp_path / "model") == ""
    assert (tmp_path / "model").read_bytes() == b"head" + b"z" * (32 * MIB)
    assert len(snapshot(tmp_path)) == 1


# Threads and processes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["save_file", "save"])
def test_other_threads_run_meanwhile(tmp_path, no_hang, function):
    tensors = {str(number): torch.ones(25 * MIB // 4) for number in range(8)}
    call = {
        "save_file": lambda: fastshard.save_file(tensors, tmp_path / "big"),
        "save": lambda: fastshard.save(tensors),
    }
    ticks = 0
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(call[function])
        while not future.done():
            ticks += 1
            time.sleep(0.001)
        future.result()
    assert ticks > 5  # not one, as when the interpreter is held all the time


def test_two_engines_at_once(tmp_path, new_engine):
    engines = [new_engine(threads=1), new_engine(threads=3, write_path="mapped")]
    tensors = [{"a": filled((300, 400), seed=number).t()} for number in range(20)]
    expected = [reference.save({"a": one["a"].contiguous()}) for one in tensors]

    def save(number: int) -> None:
        path = tmp_path / str(number)
        fastshard.save_file(tensors[number], path, allow_strided=True, engine=engines[number % 2])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(save, range(20)))
    assert snapshot(tmp_path) == {str(number): data for number, data in enumerate(expected)}


def test_many_callers_of_one_engine(tmp_path, new_engine):
    """More callers than threads and slots, each with files of its own."""
    engine = new_engine()
    tensors = [{"a": filled((200 + number, 300), seed=number)[:, ::3]} for number in range(40)]
    expected = [reference.save({"a": one["a"].contiguous()}) for one in tensors]

    def save(number: int) -> int:
        fastshard.save_file(tensors[number], tmp_path / str(number), allow_strided=True, engine=engine)
        return fastshard.stats().nbytes

    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(save, range(40)))
    assert sizes == list(map(len, expected))
    assert snapshot(tmp_path) == {str(number): data for number, data in enumerate(expected)}


def test_two_threads_saving_one_path(tmp_path, new_engine):
    """A new one each time: one of the two files stands there in the end, complete, and nothing else."""
    engine, start = new_engine(), threading.Barrier(2)
    tensors = [{"a": filled((5000 + 1000 * number,), seed=number)} for number in range(2)]
    expected = [reference.save(one) for one in tensors]

    def save(number: int) -> None:
        start.wait()
        fastshard.save_file(tensors[number], tmp_path / "model", engine=engine)

    with ThreadPoolExecutor(2) as pool:
        for _ in range(30):
            list(pool.map(save, range(2)))
            found = snapshot(tmp_path)
            assert found.keys() == {"model"} and found["model"] in expected
            (tmp_path / "model").unlink()


def test_forked_child(tmp_path):
    """The default engine starts anew there; a save of the parent's is none of the child's."""
    script = """
import ctypes, os, sys, torch, fastshard
from fastshard.engine.plan import FETCHED, FilePlan, TensorView
os.chdir(sys.argv[1])
tensors = {"a": torch.arange(1000.0)}
fastshard.save_file(tensors, "parent")
engine = fastshard.Engine()
view = TensorView(0, 5, FETCHED)
under_way = engine.submit(
    [FilePlan(b"fetched", b"head", [view])],
    keep_alive=None,
    fetch=lambda file, item, first, nbytes, address: ctypes.memset(address, 120, nbytes),
)
child = os.fork()
if child == 0:
    try:
        under_way.result()
    except RuntimeError as error:
        assert "parent" in str(error)
    else:
        raise AssertionError("waited for the parent's save")
    fastshard.save_file(tensors, "child")
    fastshard.save_file(tensors, "child of an engine", engine=engine)
    assert fastshard.save(tensors) == open("parent", "rb").read()
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
under_way.result()
engine.close()
"""
    python(script, tmp_path)
    data = reference.save({"a": torch.arange(1000.0)})
    expected = {"parent": data, "child": data, "child of an engine": data, "fetched": b"headxxxxx"}
    assert snapshot(tmp_path) == expected
