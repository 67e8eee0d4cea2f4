# SPDX-License-Identifier: Apache-2.0
"""A file that somebody else has made and will publish (``OutputFile``, without what makes and publishes files): bytes go to
their offsets, and nothing else happens to it."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent / "csrc"
SOURCES = ("output", "suspended", "filesystem", "mapping")
MIB = 1 << 20


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no compiler here")
    library = tmp_path_factory.mktemp("others_file") / "others_file.so"
    sources = [Path(__file__).with_name("others_file.cc"), *(CSRC / f"file/{name}.cc" for name in SOURCES)]
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-fPIC", "-shared", "-Wl,-z,defs", f"-I{CSRC}"]
    subprocess.run([compiler, *flags, *map(str, sources), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def write_at(
    native: ctypes.CDLL,
    path: Path,
    data: bytes,
    offset: int,
    *,
    fd: int = -1,
    keep_cached: bool = True,
    suspend: bool = False,
) -> None:
    action = ctypes.create_string_buffer(100)
    error = native.write_at(
        fd,
        os.fsencode(path),
        data,
        ctypes.c_uint64(len(data)),
        ctypes.c_uint64(offset),
        ctypes.c_bool(keep_cached),
        ctypes.c_bool(suspend),
        action,
    )
    if error:
        raise OSError(error, action.value.decode())


def by_name_or_descriptor(path: Path, how: str) -> int:
    return -1 if how == "name" else os.open(path, os.O_WRONLY)


@pytest.mark.parametrize("suspend", [False, True])
@pytest.mark.parametrize("keep_cached", [True, False])
@pytest.mark.parametrize("how", ["name", "descriptor"])
def test_what_others_wrote_stays(
    native: ctypes.CDLL, tmp_path: Path, how: str, keep_cached: bool, suspend: bool
) -> None:
    path = tmp_path / "shared"
    others = os.urandom(3 * MIB)
    path.write_bytes(others)
    path.chmod(0o640)
    before, descriptors = path.stat(), len(os.listdir("/proc/self/fd"))
    mine = os.urandom(MIB + 17)
    fd = by_name_or_descriptor(path, how)
    write_at(native, path, mine, MIB + 1, fd=fd, keep_cached=keep_cached, suspend=suspend)
    assert path.read_bytes() == others[: MIB + 1] + mine + others[2 * MIB + 18 :]
    after = path.stat()
    assert (after.st_ino, after.st_mode, after.st_size) == (before.st_ino, before.st_mode, before.st_size)
    assert os.listdir(tmp_path) == ["shared"]
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize("how", ["name", "descriptor"])
def test_the_size_is_what_the_writes_give(native: ctypes.CDLL, tmp_path: Path, how: str) -> None:
    path = tmp_path / "shared"
    path.touch()
    write_at(native, path, b"end", 5000, fd=by_name_or_descriptor(path, how))
    assert path.read_bytes() == bytes(5000) + b"end"


def test_a_link_is_followed_and_stays(native: ctypes.CDLL, tmp_path: Path) -> None:
    path, link = tmp_path / "file", tmp_path / "link"
    path.touch()
    link.symlink_to(path)
    write_at(native, link, b"through", 0, suspend=True)
    assert path.read_bytes() == b"through"
    assert link.is_symlink()


def test_a_file_that_is_not_there_is_not_made(native: ctypes.CDLL, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_at(native, tmp_path / "none", b"bytes", 0)
    assert os.listdir(tmp_path) == []


def test_only_regular_files(native: ctypes.CDLL, tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        write_at(native, tmp_path, b"bytes", 0)
    with pytest.raises(IsADirectoryError):
        write_at(native, tmp_path, b"bytes", 0, fd=os.open(tmp_path, os.O_RDONLY))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError) as refused:
        write_at(native, pipe, b"bytes", 0)
    assert refused.value.errno == errno.ENXIO
    with pytest.raises(OSError) as refused:
        write_at(native, pipe, b"bytes", 0, fd=os.open(pipe, os.O_RDWR))
    assert refused.value.errno == errno.EINVAL


def test_a_descriptor_that_appends_is_refused(native: ctypes.CDLL, tmp_path: Path) -> None:
    """The kernel appends what ``pwrite`` is given an offset for."""
    path = tmp_path / "log"
    path.write_bytes(b"before")
    with pytest.raises(OSError) as refused:
        write_at(native, path, b"bytes", 0, fd=os.open(path, os.O_WRONLY | os.O_APPEND))
    assert refused.value.errno == errno.EINVAL
    assert path.read_bytes() == b"before"


def test_a_descriptor_for_reading_says_so(native: ctypes.CDLL, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(OSError, match="write") as refused:
        write_at(native, path, b"bytes", 0, fd=os.open(path, os.O_RDONLY))
    assert refused.value.errno == errno.EBADF


def test_another_file_under_the_name_is_not_written_to(native: ctypes.CDLL, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()

    def replace() -> None:
        (tmp_path / "other").write_bytes(b"other")
        (tmp_path / "other").replace(path)

    callback = ctypes.CFUNCTYPE(None)
    assert native.awake_after(os.fsencode(path), callback(lambda: None)) == 0
    assert native.awake_after(os.fsencode(path), callback(replace)) == errno.ESTALE
    assert path.read_bytes() == b"other"


def test_a_write_that_is_refused_is_an_error(native: ctypes.CDLL, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="write") as refused:
            write_at(native, path, b"bytes", 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert refused.value.errno == errno.EFBIG
    assert path.read_bytes() == b""
