# SPDX-License-Identifier: Apache-2.0
"""Errors tell what happened: which call failed, of which file, and whether the new file stands all the same."""

from __future__ import annotations

import errno
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import names, preload, run_engine, same

from fastshard import Options, SaveError, save_file, save_files
from fastshard.errors import ArchiveError, rewritten

NEW, OLD = b"new contents", b"old"
MIB = 1 << 20

ATTEMPT = """
import json
from fastshard import _native
options = json.loads(sys.argv[1])
threads = options.pop("threads", 1)
prepared = options.pop("prepared", False)
found = {}
try:
    if prepared:
        from fastshard.engine.engine import Options
        engine = Engine(Options(threads=threads))
        standing = engine.prepare(FilePlan(os.fsencode(sys.argv[2]), b"new contents", []), 2)
        engine.submit_prepared(standing, keep_alive=None, streams={}, fetch=None, **options).result()
    else:
        found["fallbacks"] = save(*sys.argv[2:], **options).fallbacks
except SaveError as error:
    found = {"errno": error.errno, "filename": error.filename, "published": error.published, "text": str(error)}
_native.wait_for_closing()
found["descriptors"] = [
    to for to in (os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))
    if to.startswith(os.path.dirname(sys.argv[2]))
]
if prepared and "errno" in found:
    del os.environ["REFUSE"]
    engine.submit_prepared(standing, keep_alive=None, streams={}, fetch=None, **options).result()
    found["again"] = open(sys.argv[2], "rb").read().decode()
    engine.close()
print(json.dumps(found))
"""


def attempt(library: Path, refuse: str, *paths: Path, **options: Any) -> dict[str, Any]:
    """What came of a save of these files in a process of its own."""
    done = run_engine(ATTEMPT, json.dumps(options), *paths, env=preload(library, refuse))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert options.get("prepared") or found["descriptors"] == []
    assert ".fastshard-" not in found.get("text", "")
    return found


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def hidden(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*"))


# When the new file stands --------------------------------------------------------------------------------


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("prepared", [True, False])
def test_a_folder_that_cannot_be_synced(
    tmp_path: Path, preloaded: Path, prepared: bool, exists: bool
) -> None:
    path = tmp_path / "m"
    if exists:
        path.write_bytes(OLD)
    found = attempt(preloaded, "fsync@2:5", path, durable=True, prepared=prepared)
    assert (found["errno"], found["filename"], found["published"]) == (5, str(path), True)
    assert "is in place, but not known to be on stable storage" in found["text"]
    assert path.read_bytes() == NEW
    assert not prepared or found["again"] == NEW.decode()
    assert prepared or hidden(tmp_path) == []


def test_several_files_go_back_when_their_folder_cannot_be_synced(tmp_path: Path, preloaded: Path) -> None:
    files = [tmp_path / name for name in "ab"]
    files[0].write_bytes(OLD)
    found = attempt(preloaded, "fsync@3:5", *files, durable=True)
    assert (found["errno"], found["published"]) == (5, False)
    assert written(tmp_path) == {"a": OLD} and hidden(tmp_path) == []


def test_several_files_that_cannot_go_back(tmp_path: Path, preloaded: Path) -> None:
    """Without exchange and links nothing of the old files is left."""
    files = [tmp_path / name for name in "ab"]
    for path in files:
        path.write_bytes(OLD)
    found = attempt(preloaded, "exchange link fsync@3:5", *files, durable=True)
    assert (found["errno"], found["published"]) == (5, True)
    assert "all 2 new files are in place, but not known to be on stable storage" in found["text"]
    assert written(tmp_path) == {"a": NEW, "b": NEW} and hidden(tmp_path) == []


@pytest.mark.parametrize("durable", [True, False])
def test_an_old_file_that_cannot_be_removed(tmp_path: Path, preloaded: Path, durable: bool) -> None:
    files = [tmp_path / name for name in "ab"]
    for path in files:
        path.write_bytes(OLD)
    found = attempt(preloaded, "unlink@2:5", *files, durable=durable)
    assert (found["errno"], found["filename"], found["published"]) == (5, str(files[1]), True)
    assert "in place" in found["text"] and "could not be removed" in found["text"]
    assert written(tmp_path) == {"a": NEW, "b": NEW} and len(hidden(tmp_path)) == 1
    save_files({path: {"a": torch.ones(3)} for path in files})
    assert names(tmp_path) == ["a", "b"]


def test_files_that_cannot_be_put_back_are_named(tmp_path: Path, preloaded: Path) -> None:
    files = [tmp_path / name for name in "ab"]
    for path in files:
        path.write_bytes(OLD)
    # The second cannot be exchanged; the first cannot be renamed back.
    found = attempt(preloaded, "exchange@2:5 rename:13", *files)
    assert (found["errno"], found["filename"], found["published"]) == (5, str(files[1]), False)
    assert f"could not be restored and have their new content: {files[0]}" in found["text"]
    assert written(tmp_path) == {"a": NEW, "b": OLD}


def test_one_failed_attempt_to_put_back_is_no_mixture(tmp_path: Path, preloaded: Path) -> None:
    files = [tmp_path / name for name in "ab"]
    for path in files:
        path.write_bytes(OLD)
    found = attempt(preloaded, "exchange@2:5 rename@1:13", *files)
    assert (found["errno"], found["published"]) == (5, False) and "could" not in found["text"]
    assert written(tmp_path) == {"a": OLD, "b": OLD} and hidden(tmp_path) == []


# Which call, which file ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code", [errno.EIO, errno.EMFILE, errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EACCES]
)
def test_a_failed_nameless_file_is_no_missing_ability(tmp_path: Path, preloaded: Path, code: int) -> None:
    found = attempt(preloaded, f"tmpfile:{code}", tmp_path / "m")
    assert (found["errno"], found["filename"]) == (code, str(tmp_path / "m"))
    assert names(tmp_path) == []


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOSYS])
def test_kernels_without_nameless_files(tmp_path: Path, preloaded: Path, code: int) -> None:
    found = attempt(preloaded, f"tmpfile:{code}", tmp_path / "m")
    assert found["fallbacks"] == [f"O_TMPFILE refused: {os.strerror(code)}"]
    assert written(tmp_path) == {"m": NEW} and hidden(tmp_path) == []


@pytest.mark.parametrize(
    ("count", "refuse"),
    [
        (1, "rename:5"),
        (1, "tmpfile rename:5"),
        (1, "fallocate:5"),
        (1, "fsync:5"),
        (2, "exchange:5"),
        (2, "tmpfile exchange:5"),
        (2, "exchange link:5"),
        (2, "exchange rename:5"),
        (2, "exchange rename@2:5"),
        (2, "fallocate@2:5"),
        (2, "fsync@2:5"),
    ],
)
def test_the_errno_is_that_of_the_call(tmp_path: Path, preloaded: Path, refuse: str, count: int) -> None:
    files = [tmp_path / f"f{number}" for number in range(count)]
    for path in files:
        path.write_bytes(OLD)
    found = attempt(preloaded, refuse, *files, durable=True)
    assert found["errno"] == 5 and found["filename"] in map(str, files)
    assert set(written(tmp_path).values()) == {OLD}
    assert hidden(tmp_path) == []


# What the disk says --------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("call", [1, 6])
def test_failed_writeback_fails_the_save(
    tmp_path: Path, preloaded: Path, durable: bool, code: int, call: int
) -> None:
    """``keep_cached=False`` waits for the disk: what it says there, fsync does not say again."""
    path = tmp_path / "m"
    path.write_bytes(OLD)
    script = f"""
    data = [TensorView(0, 16 << 20, FETCHED)] * 8
    plan = FilePlan(os.fsencode(sys.argv[1]), b"new", data)
    from fastshard.engine.engine import Options
    try:
        engine = Engine(Options(write_path="buffered", threads=1, memory_budget=8 << 20))
        engine.submit([plan], keep_alive=None, fetch=lambda *_: None, keep_cached=False, durable={durable}).result()
    except SaveError as error:
        print(error.errno, error.filename, error.published)
    """
    done = run_engine(script, path, env=preload(preloaded, f"range@{call}:{code}"))
    assert done.stdout.split() == [str(code), str(path), "False"], done.stderr
    assert written(tmp_path) == {"m": OLD} and hidden(tmp_path) == []


@pytest.mark.parametrize("refuse", ["range:5", "range:5 late"])
def test_failed_writeback_behind_the_writers_fails_a_durable_save(
    tmp_path: Path, preloaded: Path, refuse: str
) -> None:
    """The thread that starts writeback is told of an error that nobody else will hear of; late: when fsync() has
    succeeded already."""
    path = tmp_path / "m"
    path.write_bytes(OLD)
    script = """
    import ctypes, time
    from fastshard.engine.engine import Options
    refused = ctypes.c_int.in_dll(ctypes.CDLL(None), "refused_calls")
    def fetch(file, item, first, nbytes, address):
        while item == 11 and refused.value == 0:  # until that thread has been told
            time.sleep(0.01)
    plan = FilePlan(os.fsencode(sys.argv[1]), b"new", [TensorView(0, 1 << 20, FETCHED)] * 12)
    try:
        engine = Engine(Options(write_path="buffered", threads=1, memory_budget=1 << 20))
        engine.submit([plan], keep_alive=None, fetch=fetch, durable=True).result()
    except SaveError as error:
        print(error.errno, error.filename)
    """
    done = run_engine(script, path, env=preload(preloaded, refuse))
    assert done.stdout.split() == ["5", str(path)], done.stderr
    assert written(tmp_path) == {"m": OLD} and hidden(tmp_path) == []


@pytest.mark.parametrize("durable", [True, False])
def test_the_disk_is_asked_early_only_where_somebody_waits_for_it(
    tmp_path: Path, preloaded: Path, durable: bool
) -> None:
    counts = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    dirty = int(counts["nr_dirty"]) + int(counts["nr_writeback"])
    if dirty > int(counts["nr_dirty_background_threshold"]) // 2:
        pytest.skip("others have made so many dirty pages that the kernel is about to write them")
    script = f"""
    import ctypes, time
    from fastshard.engine.engine import Options
    refused = ctypes.c_int.in_dll(ctypes.CDLL(None), "refused_calls")
    def fetch(file, item, first, nbytes, address):
        if item == 19:  # 16 are written
            ends = time.monotonic() + {10 if durable else 0.2}
            while refused.value == 0 and time.monotonic() < ends:
                time.sleep(0.01)
    plan = FilePlan(os.fsencode(sys.argv[1]), b"new", [TensorView(0, 1 << 20, FETCHED)] * 20)
    engine = Engine(Options(write_path="buffered", threads=1, memory_budget=1 << 20))
    engine.submit([plan], keep_alive=None, fetch=fetch, durable={durable}).result()
    print(refused.value)
    """
    # EOPNOTSUPP: the call is counted, and the save goes on.
    done = run_engine(script, tmp_path / "m", env=preload(preloaded, "range:95"))
    assert (int(done.stdout) > 0) is durable, done.stderr


def test_without_that_call_fsync_tells(tmp_path: Path, preloaded: Path) -> None:
    for refuse in ("range", "range:38", "range:1"):
        found = attempt(preloaded, refuse, tmp_path / "m", durable=True, keep_cached=False)
        assert "errno" not in found and written(tmp_path) == {"m": NEW}


# No room -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write_path", ["buffered", "direct", "mapped"])
def test_a_full_disk_tells_how_much_was_needed(small_disk: Path, write_path: str) -> None:
    engine, path = Options(write_path=write_path), small_disk / "m.safetensors"
    with pytest.raises(SaveError) as raised:
        save_file({"a": torch.zeros(8 * MIB)}, path, engine=engine)
    assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(path)
    text = str(raised.value)
    assert "No space left on device; 32.0 MiB needed, " in text and " MiB free" in text
    assert "old file" not in text
    old = {"a": torch.zeros(2 * MIB)}
    save_file(old, path, engine=engine)
    with pytest.raises(SaveError, match="the old file is kept until the new one stands") as raised:
        save_files({path: {"a": torch.zeros(8 * MIB)}, small_disk / "n": old}, engine=engine)
    assert raised.value.errno == errno.ENOSPC and "(40.0 MiB for all of the save)" in str(raised.value)
    assert same(path, old) and names(small_disk)[-1] == path.name and hidden(small_disk) == []


def test_quotas_and_limits(tmp_path: Path, preloaded: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(OLD)
    for code in (errno.EDQUOT, errno.EFBIG):
        found = attempt(preloaded, f"fallocate:{code}", path)
        assert found["errno"] == code and f"{os.strerror(code)}; 12 bytes needed" in found["text"]
    assert written(tmp_path) == {"m": OLD}


# The exceptions ------------------------------------------------------------------------------------------


def test_rewritten_errors_lose_nothing() -> None:
    error = OSError(5, "Input/output error", "hidden")
    error.published = True  # type: ignore[attr-defined]
    made = rewritten(error, ArchiveError, "mine")
    assert (made.errno, made.strerror, made.filename, made.published) == (5, error.strerror, "mine", True)
    assert isinstance(made, RuntimeError) and "None" not in str(made)
    assert rewritten(error, SaveError).filename == "hidden"
    plain = rewritten(OSError("no file named tokenizer.json"), SaveError)
    assert str(plain) == "no file named tokenizer.json" and plain.errno is None and not plain.published
    assert pickle.loads(pickle.dumps(made)).errno == 5
    assert SaveError.published is False
