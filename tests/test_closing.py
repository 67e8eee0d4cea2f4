# SPDX-License-Identifier: Apache-2.0
"""Descriptors that a thread of the native module closes."""

from __future__ import annotations

import errno
import os

import pytest
import refusals

from fastshard import _native


def _open(count: int) -> list[int]:
    return [os.open(os.devnull, os.O_RDONLY) for _ in range(count)]


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError as error:
        assert error.errno == errno.EBADF
        return False
    return True


def _files(descriptors: list[int]) -> list[tuple[int, int] | None]:
    """What each of them leads to."""
    return [(os.fstat(d).st_dev, os.fstat(d).st_ino) if _is_open(d) else None for d in descriptors]


def _has_some(descriptors: list[int], files: list[tuple[int, int] | None]) -> bool:
    """Whether some lead there still. libuv, which torch's stores may have started in this process, opens a pipe in each
    forked child, by the first numbers that are free."""
    return any(now == before for now, before in zip(_files(descriptors), files))


def test_all_are_closed_when_it_has_been_waited_for(no_hang: None) -> None:
    descriptors = _open(40)
    closing = _native.close_later(descriptors)
    closing.wait()
    assert closing.done()
    assert not any(map(_is_open, descriptors))
    closing.wait()  # again


def test_none_are_closed_at_once(no_hang: None) -> None:
    closing = _native.close_later([])
    closing.wait()
    assert closing.done()


def test_dropped_without_waiting_they_are_closed_nevertheless(no_hang: None) -> None:
    reader, writer = os.pipe()
    _native.close_later([writer])
    assert os.read(reader, 1) == b""  # the end of the pipe: nobody holds the other one
    os.close(reader)


def test_a_forked_child_keeps_none_and_waits_for_nothing(no_hang: None) -> None:
    for _ in range(50):
        reader, writer = os.pipe()
        inherited = [*_open(10), writer]
        files = _files(inherited)
        closing = _native.close_later(inherited)
        pid = os.fork()
        if pid == 0:
            closing.wait()
            os._exit(_has_some(inherited, files))
        assert os.waitpid(pid, 0)[1] == 0
        closing.wait()
        os.close(reader)


@pytest.mark.parametrize("kind", ["thread", "memory"])
def test_without_a_thread_or_memory_they_are_closed_by_the_caller(kind: str) -> None:
    said = refusals.run(
        """
kind = sys.argv[1].encode()
def work():
    fds = [os.open(os.devnull, os.O_RDONLY) for _ in range(5)]
    before = descriptors()
    _native.close_later(fds).wait()
    return before - descriptors()
for call in range(1, int(child(work, kind, 0)) + 1):
    print(child(work, kind, call))
""",
        kind,
    )
    assert set(said.splitlines()) == {"returned 5"}


def test_soon_is_closed_by_a_thread_that_stays(no_hang: None) -> None:
    for _ in range(3):  # the thread is started by the first
        descriptors = _open(100)  # more than may wait: the others are closed by the caller
        for descriptor in descriptors:
            _native.close_soon(descriptor)
        _native.wait_for_closing()
        assert not any(map(_is_open, descriptors))
        assert not _native.wait_for_closing()


def test_whoever_needs_the_space_waits_for_all_of_them(no_hang: None) -> None:
    descriptors = [*_open(100), *_open(100)]
    closing = _native.close_later(descriptors[:100])
    for descriptor in descriptors[100:]:
        _native.close_soon(descriptor)
    _native.wait_for_closing()
    assert closing.done() and not any(map(_is_open, descriptors))


def test_a_forked_child_keeps_none_that_are_to_be_closed_soon(no_hang: None) -> None:
    for _ in range(50):
        reader, writer = os.pipe()
        inherited = [*_open(10), writer]
        files = _files(inherited)
        for descriptor in inherited:
            _native.close_soon(descriptor)
        pid = os.fork()
        if pid == 0:
            waited = _native.wait_for_closing()
            own = os.open(os.devnull, os.O_RDONLY)
            _native.close_soon(own)  # by a thread of the child's own
            _native.wait_for_closing()
            os._exit(waited or _is_open(own) or _has_some(inherited, files))
        assert os.waitpid(pid, 0)[1] == 0
        _native.wait_for_closing()
        assert os.read(reader, 1) == b""
        os.close(reader)


@pytest.mark.parametrize("kind", ["thread", "memory"])
def test_soon_without_a_thread_or_memory_is_now(kind: str) -> None:
    said = refusals.run(
        """
kind = sys.argv[1].encode()
def work():
    fds = [os.open(os.devnull, os.O_RDONLY) for _ in range(5)]
    before = descriptors()
    for fd in fds:
        _native.close_soon(fd)
    _native.wait_for_closing()
    return before - descriptors()
for call in range(1, int(child(work, kind, 0)) + 1):
    print(child(work, kind, call))
""",
        kind,
    )
    assert set(said.splitlines()) == {"returned 5"}
