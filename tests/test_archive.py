# SPDX-License-Identifier: Apache-2.0
"""The archives of torch.save: the same bytes, whatever is in them and whichever way they go; never half a file."""

from __future__ import annotations

import copyreg
import ctypes
import errno
import gc
import inspect
import io
import mmap
import os
import pickle
import random
import stat
import threading
import types
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
from conftest import assert_same
from helpers import DTYPES as KNOWN_DTYPES
from helpers import filled, names, saved_by_torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simcuda import SimCuda
from test_cuda_path import on_device

import fastshard
from fastshard import ArchiveError, stats, torch_save
from fastshard.api import archive, archive_skeleton
from fastshard.engine import tensors
from fastshard.engine.engine import Engine
from fastshard.engine.mapped import load_mapped
from fastshard.engine.plan import FETCHED, HOST
from fastshard.formats.torch_archive import Archive, UnknownLayout

pytestmark = [
    pytest.mark.usefixtures("no_hang"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]

MIB = 1 << 20

DTYPES = [dtype for dtype in KNOWN_DTYPES if saved_by_torch(dtype)]
NewEngine = Callable[..., Engine]
by_the_engine = pytest.mark.skipif(
    not hasattr(torch.serialization, "skip_data"), reason="this torch leaves no holes"
)


@pytest.fixture
def left_to_torch(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Why each of the saves that were."""
    reasons: list[str] = []
    monkeypatch.setattr(archive, "count_left", lambda _, reason: reasons.append(reason))
    return reasons


def by_torch(obj: object, folder: Path, name: str, **keywords: Any) -> bytes:
    """What torch.save writes to a file of this name, which goes into the archive."""
    (folder / "reference").mkdir(parents=True, exist_ok=True)
    torch.save(obj, str(folder / "reference" / name), **keywords)
    return (folder / "reference" / name).read_bytes()


def check(obj: object, folder: Path, name: str = "model.pt", **keywords: Any) -> None:
    expected = by_torch(obj, folder, name, **keywords)
    (folder / "ours").mkdir(exist_ok=True)
    for large in (1, archive_skeleton._LARGE):  # all storages are holes, or the large ones
        with pytest.MonkeyPatch.context() as patch:
            if large == 1:
                patch.setattr(archive_skeleton, "_LARGE", large)
                patch.setattr(archive_skeleton, "_SMALL", 0)
            torch_save(obj, str(folder / "ours" / name), **keywords)
        assert_same((folder / "ours" / name).read_bytes(), expected)
        assert names(folder / "ours") == [name]


@pytest.fixture
def all_holes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small storages are not left inside the skeleton."""
    monkeypatch.setattr(archive_skeleton, "_LARGE", 1)
    monkeypatch.setattr(archive_skeleton, "_SMALL", 0)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(30, 40)
        self.tied = torch.nn.Linear(30, 40)
        self.tied.weight = self.first.weight
        self.norm = torch.nn.BatchNorm1d(40)


def trained() -> torch.optim.Optimizer:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters())
    model.norm(model.tied(torch.ones(3, 30)) + model.first(torch.ones(3, 30))).sum().backward()
    optimizer.step()
    return optimizer


BASE = torch.arange(5000.0)
OBJECTS: dict[str, Callable[[], object]] = {
    "no tensors": lambda: {"a": 1, "b": [2.5, "text", None, 1 << 80]},
    "none": lambda: None,
    "tensor": lambda: torch.arange(12.0).view(3, 4),
    "dtypes": lambda: {str(dtype): filled((5, 4), dtype) for dtype in DTYPES},
    "complex": lambda: torch.randn(5, dtype=torch.complex128, generator=torch.Generator().manual_seed(0)),
    "lazy bits": lambda: [
        torch.ones(3, dtype=torch.complex64).conj(),
        torch.ones(3).neg(),
        torch._neg_view(BASE),
    ],
    "bytes": lambda: filled((3 * MIB + 7,), torch.uint8),
    "empty": lambda: [torch.empty(0), torch.empty(0, 5, dtype=torch.int8), {}],
    "scalars": lambda: [torch.tensor(2.5), torch.tensor(True)],
    "views": lambda: {
        "whole": BASE,
        "part": BASE[7:90],
        "strided": BASE[::3],
        "turned": BASE.view(50, 100).t(),
    },
    "expanded": lambda: torch.ones(1).expand(50, 50),
    "parameters": lambda: torch.nn.Parameter(torch.ones(5)),
    "with attributes": lambda: with_attributes(),
    "module": lambda: Model(),
    "state dict": lambda: Model().state_dict(),
    "optimizer": lambda: trained().state_dict(),
    "whole optimizer": trained,
    "untyped storage": lambda: torch.arange(9).untyped_storage(),
    "typed storage": lambda: torch.arange(9).storage(),
    "meta": lambda: {"a": torch.empty(3, device="meta"), "b": torch.ones(3)},
    "quantized": lambda: torch.quantize_per_tensor(torch.arange(9.0), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "sparse": lambda: [torch.eye(5).to_sparse(), torch.eye(5).to_sparse_csr()],
    "arrays": lambda: {"a": np.arange(9), "t": torch.from_numpy(np.arange(9))},
    "generator state": lambda: {"rng": torch.Generator().manual_seed(3).get_state(), "at": 5},
    "many": lambda: {f"t{i}": torch.full((i % 9,), float(i)) for i in range(700)},
    "cyclic": lambda: cyclic(),
}


def with_attributes() -> torch.Tensor:
    tensor = torch.ones(3)
    tensor.note = {"of": torch.zeros(2)}  # type: ignore[attr-defined]
    return tensor


def cyclic() -> list[object]:
    found: list[object] = [torch.ones(3)]
    found.append(found)
    return found


@pytest.mark.parametrize("kind", OBJECTS)
def test_same_bytes(kind: str, tmp_path: Path, left_to_torch: list[str]) -> None:
    check(OBJECTS[kind](), tmp_path)
    if hasattr(torch.serialization, "skip_data"):
        assert left_to_torch == []


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_protocols(tmp_path: Path, protocol: int) -> None:
    check({"a": BASE, "b": [BASE[3:], 5]}, tmp_path, pickle_protocol=protocol)


@pytest.mark.parametrize(
    "name",
    [
        "model",
        "model.bin",
        "a.b.pth",
        "..pt",
        "with space.pt",
        "größe.pt",
        ".hidden.pt",
        "x" * 200,
        "-",
        "a%sb.pt",
    ],
)
@pytest.mark.parametrize("folder", ["plain", "größer", "with.dot"])
def test_names(tmp_path: Path, folder: str, name: str) -> None:
    """The stem goes into the archive, or "archive" where anything in the path is not ASCII."""
    check({"a": BASE}, tmp_path / folder, name)


def test_a_relative_path_and_path_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(BASE, "m.pt")
    expected = Path("m.pt").read_bytes()
    for where in ("m.pt", Path("m.pt"), "./m.pt", tmp_path / "m.pt"):
        os.unlink("m.pt")
        torch_save(BASE, where)
        assert_same(Path("m.pt").read_bytes(), expected)


def test_no_temporary_folder_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_to_torch: list[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    check({"a": BASE}, tmp_path)
    if hasattr(torch.serialization, "skip_data"):
        assert left_to_torch == []


@pytest.mark.parametrize("kind", ["module", "views", "empty", "no tensors"])
@pytest.mark.parametrize("switch", ["compute_crc32", "storage_alignment", "byteorder"])
def test_settings_of_torch(kind: str, switch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    obj = OBJECTS[kind]()
    if switch == "byteorder":
        return check(obj, tmp_path, _disable_byteorder_record=True)
    config = pytest.importorskip("torch.utils.serialization.config")
    if not hasattr(config.save, switch):
        pytest.skip("not in this torch")
    before = getattr(config.save, switch)
    try:
        setattr(config.save, switch, {"compute_crc32": False, "storage_alignment": 4096}[switch])
        check(obj, tmp_path)
    finally:
        setattr(config.save, switch, before)


@by_the_engine
@pytest.mark.parametrize("write_path", ["buffered", "direct", "mapped"])
@pytest.mark.parametrize("options", [{}, {"durable": True}, {"keep_cached": False}], ids=str)
def test_ways_into_the_file(
    tmp_path: Path, new_engine: NewEngine, write_path: str, options: dict[str, bool]
) -> None:
    obj = {"large": filled((3 * MIB + 5,), torch.uint8), **{str(i): torch.full((i,), i) for i in range(40)}}
    expected = by_torch(obj, tmp_path, "m.pt")
    torch_save(obj, tmp_path / "m.pt", engine=new_engine(write_path=write_path), **options)
    assert_same((tmp_path / "m.pt").read_bytes(), expected)
    figures = stats()
    assert figures is not None and figures.nbytes == len(expected)
    assert figures.write_path == write_path


shapes = st.lists(st.integers(0, 5), max_size=3)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=5),
    st.tuples(shapes, st.sampled_from(DTYPES)).map(lambda t: filled(tuple(t[0]), t[1])),
    st.tuples(st.integers(0, 50), st.integers(1, 4)).map(lambda t: BASE[t[0] : 60 : t[1]]),
)
objects = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=9,
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(obj=objects)
def test_any_object(tmp_path_factory: pytest.TempPathFactory, obj: object) -> None:
    check(obj, tmp_path_factory.mktemp("any"))


# It is read.


def test_torch_reads_it(tmp_path: Path) -> None:
    state = {"a": BASE, "tied": BASE, "n": 5, "b": torch.ones(3, dtype=torch.bfloat16)}
    torch_save(state, tmp_path / "m.pt")
    for keywords in ({"weights_only": True}, {"weights_only": True, "mmap": True}, {"weights_only": False}):
        loaded = torch.load(tmp_path / "m.pt", **keywords)
        assert loaded["n"] == 5 and torch.equal(loaded["a"], BASE) and torch.equal(loaded["b"], state["b"])
        assert loaded["a"].data_ptr() == loaded["tied"].data_ptr()
    assert zipfile.ZipFile(tmp_path / "m.pt").testzip() is None


def test_over_the_file_that_the_tensors_are_mapped_from(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch_save({"a": filled((MIB,), torch.float32), "b": BASE}, path)
    before = path.read_bytes()
    mapped = torch.load(path, mmap=True, weights_only=True)
    torch_save(mapped, path)
    assert_same(path.read_bytes(), before)
    assert torch.equal(mapped["b"], BASE)


# Pickling is torch's.


def test_signature() -> None:
    theirs, ours = (list(inspect.signature(f).parameters.values()) for f in (torch.save, torch_save))
    assert [(p.name, p.default, p.kind) for p in ours[: len(theirs)]] == [
        (p.name, p.default, p.kind) for p in theirs
    ]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[len(theirs) :])


class Nested:
    """Saves something else while it is pickled."""

    def __reduce__(self) -> tuple[Callable[[bytes], bytes], tuple[bytes]]:
        buffer = io.BytesIO()
        torch.save(torch.arange(100), buffer)
        return bytes, (buffer.getvalue(),)


def test_whatsaved_by_torch_while_pickling_has_its_data(tmp_path: Path) -> None:
    check([torch.ones(3), Nested()], tmp_path)
    (inner,) = [
        b for b in torch.load(tmp_path / "ours" / "model.pt", weights_only=False) if isinstance(b, bytes)
    ]
    assert torch.equal(torch.load(io.BytesIO(inner), weights_only=True), torch.arange(100))


def special_pickle() -> types.ModuleType:
    module = types.ModuleType("special")

    class Pickler(pickle._Pickler):  # type: ignore[name-defined, misc]
        """In Python, and with an opinion on integers."""

        dispatch_table = {**copyreg.dispatch_table, complex: lambda value: (complex, (value.real, 7.0))}

    module.Pickler = Pickler  # type: ignore[attr-defined]
    return module


def test_pickle_modules(tmp_path: Path) -> None:
    check({"a": BASE, "c": 1 + 2j}, tmp_path, pickle_module=special_pickle())
    loaded = torch.load(tmp_path / "ours" / "model.pt", weights_only=False)
    assert loaded["c"] == 1 + 7j


def test_dill(tmp_path: Path) -> None:
    dill = pytest.importorskip("dill")
    check({"a": BASE}, tmp_path, pickle_module=dill)


@pytest.mark.parametrize(
    "bad", [lambda: None, (i for i in ()), threading.Lock()], ids=["lambda", "generator", "lock"]
)
def test_what_cannot_be_pickled(tmp_path: Path, bad: object) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(b"old")
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        torch.save({"a": BASE, "bad": bad}, io.BytesIO())
    with pytest.raises(type(theirs.value)) as ours:
        torch_save({"a": BASE, "bad": bad}, path)
    assert str(ours.value) == str(theirs.value)
    assert names(tmp_path) == ["m.pt"] and path.read_bytes() == b"old"


class Failing:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> str:
        raise self.error


@pytest.mark.parametrize(
    "error", [OSError(5, "mine"), RuntimeError("mine"), KeyboardInterrupt("mine")], ids=repr
)
@pytest.mark.parametrize("old_format", [False, True])
def test_errors_of_objects_are_theirs(tmp_path: Path, error: BaseException, old_format: bool) -> None:
    with pytest.raises(type(error)) as raised:
        torch_save([BASE, Failing(error)], tmp_path / "m.pt", _use_new_zipfile_serialization=not old_format)
    assert raised.value is error
    assert names(tmp_path) == []


def test_one_storage_as_two_types(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="view the same data as different types"):
        torch_save([BASE, BASE.view(torch.int32)], tmp_path / "m.pt")
    assert names(tmp_path) == []


@by_the_engine
def test_nothing_is_kept(tmp_path: Path) -> None:
    gc.collect()
    gc.disable()
    try:
        tensor = torch.ones(1000)
        kept = weakref.ref(tensor.untyped_storage())
        torch_save({"a": tensor}, tmp_path / "m.pt")
        assert kept() is not None
        del tensor
        assert kept() is None
    finally:
        gc.enable()


# What is left to torch.


def test_objects_with_write() -> None:
    ours, theirs = io.BytesIO(), io.BytesIO()
    torch_save({"a": BASE}, ours)
    torch.save({"a": BASE}, theirs)
    assert ours.getvalue() == theirs.getvalue()
    for keywords in ({"durable": True}, {"keep_cached": False}):
        with pytest.raises(ValueError, match="need a path, not BytesIO"):
            torch_save({"a": BASE}, ours, **keywords)  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="expected 'f' to be"):
        torch_save(BASE, 5)
    with pytest.raises(AttributeError):
        torch_save(BASE, b"path")


def test_devices_and_pipes(tmp_path: Path) -> None:
    torch_save(BASE, "/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    os.mkfifo(tmp_path / "pipe.pt")
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit((tmp_path / "pipe.pt").read_bytes)
        torch_save(BASE, tmp_path / "pipe.pt")
        assert torch.equal(torch.load(io.BytesIO(reading.result()), weights_only=True), BASE)


@pytest.mark.parametrize("options", [{}, {"durable": True}, {"keep_cached": False}], ids=str)
@pytest.mark.parametrize("name", ["m.pt", "größe.pt"])
def test_the_old_format(
    tmp_path: Path, left_to_torch: list[str], name: str, options: dict[str, bool]
) -> None:
    path = tmp_path / name
    expected = by_torch({"a": BASE}, tmp_path, name, _use_new_zipfile_serialization=False)
    path.write_bytes(b"old")
    path.chmod(0o640)
    link = tmp_path / f"link-{name}"
    link.symlink_to(name)
    torch_save({"a": BASE}, link, _use_new_zipfile_serialization=False, **options)
    assert left_to_torch == ["the old format"]
    # Keys are addresses of storages, and so is what follows from them.
    assert len(path.read_bytes()) == len(expected)
    assert torch.equal(torch.load(path, weights_only=True)["a"], BASE)
    assert link.is_symlink() and stat.S_IMODE(path.stat().st_mode) == 0o640
    assert names(tmp_path) == sorted([name, f"link-{name}", "reference"])


@by_the_engine
def test_within_skip_data(tmp_path: Path, left_to_torch: list[str]) -> None:
    with torch.serialization.skip_data():
        check({"a": torch.arange(5.0)}, tmp_path)
    assert left_to_torch == ["an active skip_data()"] * 2
    assert torch.load(tmp_path / "ours" / "model.pt", weights_only=True)["a"].tolist() == [0] * 5


def test_a_torch_that_leaves_no_holes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_to_torch: list[str]
) -> None:
    monkeypatch.setattr(archive_skeleton, "torch_makes_holes", lambda: False)
    check({"a": BASE}, tmp_path)
    check({"a": BASE}, tmp_path / "other", "größe.pt")
    assert left_to_torch == ["a torch that makes no holes"] * 4


@by_the_engine
def test_an_unknown_layout_is_left_to_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_to_torch: list[str]
) -> None:
    monkeypatch.setattr("fastshard.formats.torch_archive._IDENTITY", "something else")
    check({"a": BASE}, tmp_path)
    assert left_to_torch == ["an archive of another layout"]


def test_storages_without_memory(tmp_path: Path) -> None:
    storage = torch.UntypedStorage(16, device="meta")
    outcomes = []
    for save in (torch.save, torch_save):
        try:
            save(storage, tmp_path / "m.pt")
            outcomes.append((tmp_path / "m.pt").read_bytes())
        except Exception as error:
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]


def test_in_the_place_of_torch_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever installs it there leaves the original behind ``__wrapped__``."""
    expected = by_torch({"a": BASE}, tmp_path, "m.pt")
    original = torch.save

    def replacement(*arguments: Any, **keywords: Any) -> None:
        torch_save(*arguments, **keywords)

    replacement.__wrapped__ = original  # type: ignore[attr-defined]
    monkeypatch.setattr(torch, "save", replacement)
    monkeypatch.setattr(torch.serialization, "save", replacement)
    torch.save({"a": BASE}, tmp_path / "m.pt")
    assert_same((tmp_path / "m.pt").read_bytes(), expected)
    buffer = io.BytesIO()
    torch.save({"a": BASE}, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=True)["a"], BASE)


# Files that cannot be written.


def test_missing_folder(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "m.pt"
    for obj in (BASE, lambda: None):  # before anything is pickled
        with pytest.raises(RuntimeError, match="Parent directory .*missing does not exist") as raised:
            torch_save(obj, path)
        assert isinstance(raised.value, ArchiveError) and isinstance(raised.value, OSError)
        assert isinstance(raised.value, fastshard.SaveError)
        assert raised.value.errno == errno.ENOENT and raised.value.filename == str(path)


@pytest.mark.parametrize("old_format", [False, True])
def test_a_folder_in_its_place(tmp_path: Path, old_format: bool) -> None:
    with pytest.raises(ArchiveError) as raised:
        torch_save(BASE, tmp_path, _use_new_zipfile_serialization=not old_format)
    assert raised.value.errno == errno.EISDIR


@pytest.mark.parametrize("name", ["", ".pt", "folder/", "a/b.pt\\"])
def test_names_that_torch_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError) as theirs:
        torch.save(BASE, name)
    with pytest.raises(RuntimeError) as ours:
        torch_save(BASE, name)
    assert str(ours.value).splitlines()[0] == str(theirs.value).splitlines()[0]
    assert names(tmp_path) == []


def test_a_name_with_a_zero_byte(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError) as raised:
        torch_save(BASE, f"{tmp_path}/a\0b.pt")
    assert raised.value.errno == errno.EINVAL and names(tmp_path) == []


@pytest.mark.parametrize("old_format", [False, True])
def test_full_disk(small_disk: Path, old_format: bool) -> None:
    path = small_disk / "m.pt"
    keywords = {"_use_new_zipfile_serialization": not old_format}
    torch_save({"a": BASE}, path, **keywords)
    before, present = path.read_bytes(), names(small_disk)
    with pytest.raises(Exception) as raised:  # noqa: PT011
        torch_save({"a": torch.zeros(8 * MIB)}, path, **keywords)
    if not old_format and hasattr(torch.serialization, "skip_data"):
        assert isinstance(raised.value, ArchiveError) and raised.value.errno == errno.ENOSPC
    assert path.read_bytes() == before and names(small_disk) == present
    del raised  # torch's file is open as long as the exception knows of it
    gc.collect()
    torch_save({"b": BASE}, path, **keywords)


@pytest.mark.parametrize("old_format", [False, True])
def test_mode_and_links(tmp_path: Path, old_format: bool) -> None:
    keywords = {"_use_new_zipfile_serialization": not old_format}
    before = os.umask(0o027)
    try:
        torch_save(BASE, tmp_path / "new.pt", **keywords)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new.pt").stat().st_mode) == 0o640
    (tmp_path / "new.pt").chmod(0o604)
    (tmp_path / "link.pt").symlink_to("new.pt")
    torch_save([BASE], tmp_path / "link.pt", **keywords)
    assert (tmp_path / "link.pt").is_symlink()
    assert stat.S_IMODE((tmp_path / "new.pt").stat().st_mode) == 0o604
    assert len(torch.load(tmp_path / "new.pt", weights_only=True)) == 1
    (tmp_path / "dangling.pt").symlink_to("made.pt")
    torch_save(BASE, tmp_path / "dangling.pt", **keywords)
    assert (tmp_path / "dangling.pt").is_symlink() and torch.equal(
        torch.load(tmp_path / "made.pt", weights_only=True), BASE
    )
    if not old_format:  # the link's stem is in the archive, as torch has it
        assert zipfile.ZipFile(tmp_path / "new.pt").namelist()[0] == "link/data.pkl"


@by_the_engine
def test_killed_leaves_nothing(tmp_path: Path) -> None:
    script = (
        "import os, sys, torch, fastshard\nfrom fastshard.formats.torch_archive import Archive\n"
        "Archive.amendments = lambda *_: os.kill(os.getpid(), 9)\n"
        "fastshard.torch_save({'a': torch.ones(1 << 20)}, sys.argv[1])"
    )
    path = tmp_path / "m.pt"
    assert forked.run(script, path).returncode == -9 and names(tmp_path) == []


@by_the_engine
def test_interrupted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, all_holes: None) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Archive, "amendments", interrupt)
    (tmp_path / "m.pt").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        torch_save({"a": BASE}, tmp_path / "m.pt")
    assert names(tmp_path) == ["m.pt"] and (tmp_path / "m.pt").read_bytes() == b"old"


def test_many_threads(tmp_path: Path) -> None:
    """Each its own file; nobody's holes are in another's."""
    objs = [{"a": filled((1000 * (i + 1),), torch.float32, i), "i": i} for i in range(8)]
    expected = [by_torch(obj, tmp_path, f"{i}.pt") for i, obj in enumerate(objs)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: torch_save(objs[i], tmp_path / f"{i}.pt"), range(8)))
    for i, data in enumerate(expected):
        assert_same((tmp_path / f"{i}.pt").read_bytes(), data)


# Other devices.


@by_the_engine
def test_storages_that_torch_brings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_engine: NewEngine, all_holes: None
) -> None:
    obj = {
        "large": filled((3 * MIB,), torch.uint8),
        "view": BASE[5:],
        "empty": torch.empty(0),
        "b": torch.ones(9),
    }
    expected = by_torch(obj, tmp_path, "m.pt")
    monkeypatch.setattr(tensors, "device_number", lambda device: FETCHED)
    torch_save(obj, tmp_path / "m.pt", engine=new_engine())
    assert_same((tmp_path / "m.pt").read_bytes(), expected)
    figures = stats()
    assert figures is not None and figures.staging == "pageable"


@by_the_engine
@pytest.mark.parametrize("write_path", ["buffered", "direct", "mapped"])
def test_storages_on_a_gpu(
    sim: SimCuda,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    new_engine: NewEngine,
    write_path: str,
    all_holes: None,
) -> None:
    """Simulated: torch pickles tensors of the host, the engine is given the device's copies of their storages."""
    sim.set_delay(0, 2000)
    obj = {
        "large": filled((3 * MIB,), torch.uint8),
        "host": BASE,
        **{str(i): torch.full((i,), i) for i in range(50)},
    }
    expected = by_torch(obj, tmp_path, "m.pt")
    view_of = archive_skeleton.view_of
    moved = []

    def on_the_device(storage: Any) -> Any:
        view = view_of(storage)
        if isinstance(storage, bytes):  # the pickle
            return view
        if view is None or not view.nbytes or storage.data_ptr() == BASE.data_ptr():
            return view
        data = (ctypes.c_ubyte * view.nbytes).from_address(view.data)
        moved.append(on_device(sim, np.frombuffer(bytes(data), np.uint8), len(moved) % 2))
        return moved[-1].view

    monkeypatch.setattr(archive_skeleton, "view_of", on_the_device)
    asked: set[int] = set()
    monkeypatch.setattr(tensors, "current_streams", lambda devices: asked.update(devices) or {})
    torch_save(obj, tmp_path / "m.pt", engine=new_engine(write_path=write_path))
    assert_same((tmp_path / "m.pt").read_bytes(), expected)
    assert len(moved) == 50 and asked == {HOST, 0, 1}


@by_the_engine
@pytest.mark.parametrize("kind", ["dtypes", "empty", "views", "whole optimizer", "typed storage"])
def test_storages_on_a_device_are_not_copied_by_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_to_torch: list[str], kind: str
) -> None:
    """Torch is given stand-ins for them, and the engine the storages themselves."""
    obj = OBJECTS[kind]()
    expected = by_torch(obj, tmp_path, "m.pt")
    met: list[Any] = []
    make_hole = archive_skeleton._Writer._make_hole

    def noted(self: Any, name: str, held: Any, nbytes: int) -> None:
        met.append(held)
        make_hole(self, name, held, nbytes)

    monkeypatch.setattr(archive_skeleton._Writer, "_make_hole", noted)
    monkeypatch.setattr(archive_skeleton, "_is_elsewhere", lambda _: True)
    torch_save(obj, tmp_path / "m.pt")
    assert_same((tmp_path / "m.pt").read_bytes(), expected)
    assert left_to_torch == [] and met and all(isinstance(held, torch.UntypedStorage) for held in met)


def test_on_a_real_gpu(real_cuda: torch.device, tmp_path: Path) -> None:
    state = {k: v.to(real_cuda) for k, v in Model().state_dict().items()}
    check({"model": state, "part": torch.arange(1 << 20, device=real_cuda)[5:70], "host": BASE}, tmp_path)


# The records.


@by_the_engine
def test_more_than_4_gib(tmp_path: Path) -> None:
    """Sizes and offsets that take 64 bits: of holes, so that it costs nothing."""
    (tmp_path / "data").touch()
    os.truncate(tmp_path / "data", 5 << 30)
    large = torch.from_file(str(tmp_path / "data"), shared=True, size=5 << 30, dtype=torch.uint8)
    path = tmp_path / "m.pt"
    with torch.serialization.skip_data():
        torch.save([BASE, large, torch.ones(9), large[7:]], path)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        found = Archive(bytes_of := memoryview(memory))
        listed = zipfile.ZipFile(path).infolist()
        assert [(r.nbytes, r.crc) for r in found.records] == [(i.file_size, i.CRC) for i in listed]
        assert max(record.nbytes for record in found.records) == 5 << 30
        assert max(record.begin for record in found.records) > 5 << 30
        crcs = {f"data/{key}": random.Random(key).getrandbits(32) for key in range(3)}
        for offset, data in found.amendments(crcs):
            memory[offset : offset + len(data)] = data
        again = Archive(bytes_of)
        assert [r._replace(crc=0) for r in again.records] == [r._replace(crc=0) for r in found.records]
        listed = zipfile.ZipFile(path).infolist()
        for record, info in zip(again.records, listed, strict=True):
            assert record.crc == info.CRC
            assert record.described is not None
            described = memory[record.described - 4 : record.described + 20]
            assert described[:4] == b"PK\x07\x08" and int.from_bytes(described[4:8], "little") == record.crc
            width = 8 if record.nbytes >= 1 << 32 else 4
            assert int.from_bytes(described[8 : 8 + width], "little") == record.nbytes
            if record.name.startswith("data/"):
                assert record.crc == crcs[record.name]
        identity = again.records[-1]
        assert zlib.crc32(memory[identity.begin : identity.begin + 40]) == identity.crc
        del found, again
        bytes_of.release()


def archives() -> Iterator[bytes]:
    buffer = io.BytesIO()
    torch.save({"a": BASE, "b": torch.empty(0)}, buffer)
    yield buffer.getvalue()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a/data.pkl", b"x")
    yield buffer.getvalue()
    yield b""
    yield b"PK" * 100


def test_what_is_no_archive_of_torch() -> None:
    good, *bad = archives()
    assert [record.name for record in Archive(good).records][-1] == ".data/serialization_id"
    for data in (*bad, good[:-1], good[1:], good + b"x", good[: len(good) // 2]):
        with pytest.raises(UnknownLayout):
            Archive(data)


def test_damaged_archives_never_do_worse_than_raise() -> None:
    good = next(archives())
    chance = random.Random(3)
    refused = 0
    for _ in range(2000):
        damaged = bytearray(good)
        for _ in range(chance.randrange(1, 4)):
            damaged[-chance.randrange(1, 1200)] = chance.randrange(256)
        try:
            Archive(bytes(damaged)).amendments({"data/0": 1})
        except UnknownLayout:
            refused += 1
    assert refused > 500  # how many depends on how a torch fills up its records


def test_tensors_that_lie_in_files(tmp_path: Path) -> None:
    fastshard.save_file({"a": filled((MIB,), torch.uint8), "b": filled((9,))}, tmp_path / "source")
    check(load_mapped(tmp_path / "source"), tmp_path)
