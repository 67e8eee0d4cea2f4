# SPDX-License-Identifier: Apache-2.0
"""Files of a save that are links to files which are there already: all of a save, or none."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import SLOT, assert_same
from helpers import names, preload, run_engine
from test_fetch import fetched, noise

from fastshard import SaveError
from fastshard.engine.engine import Engine
from fastshard.engine.plan import FilePlan, Link

pytestmark = pytest.mark.usefixtures("no_hang")

NewEngine = Callable[..., Engine]
OLD = b"what stood there"


@pytest.fixture
def existing(tmp_path: Path) -> Path:
    """In a folder of its own, with a mode and a time of its own."""
    folder = tmp_path / "before"
    folder.mkdir()
    path = folder / "shard"
    path.write_bytes(noise(2 * SLOT + 5))
    path.chmod(0o640)
    os.utime(path, (1, 2))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the new names go."""
    made = tmp_path / "after"
    made.mkdir()
    return made


def link(path: Path, existing: Path) -> FilePlan:
    return FilePlan(Link(os.fsencode(path), os.fsencode(existing)), b"", [])


def new(path: Path, contents: bytes = b"new") -> FilePlan:
    return FilePlan(os.fsencode(path), contents, [])


def same_file(one: Path, other: Path) -> bool:
    return (one.stat().st_dev, one.stat().st_ino) == (other.stat().st_dev, other.stat().st_ino)


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("before", ["nothing", "a file", "a link", "the file itself"])
@pytest.mark.parametrize("beside", [0, 2])
def test_the_name_is_the_files_own(
    existing: Path, folder: Path, new_engine: NewEngine, beside: int, before: str, durable: bool
) -> None:
    path = folder / "shard"
    if before == "a file":
        path.write_bytes(OLD)
    elif before == "a link":
        path.symlink_to("somewhere")
    elif before == "the file itself":
        os.link(existing, path)
    stood = existing.stat()
    plans = [link(path, existing), *(new(folder / f"{i}") for i in range(beside))]
    stats = new_engine().submit(plans, keep_alive=None, durable=durable).result()
    assert same_file(path, existing) and not path.is_symlink()
    found = existing.stat()
    assert (found.st_mode, found.st_mtime, found.st_size) == (stood.st_mode, stood.st_mtime, stood.st_size)
    assert found.st_nlink == 2
    assert (stats.fallbacks, stats.nbytes, stats.files) == ((), 3 * beside, 1 + beside)
    assert stats.write_path == ("buffered+link" if beside else "link")
    assert names(folder) == sorted([*map(str, range(beside)), "shard"]) and names(existing.parent) == [
        "shard"
    ]


def test_many_names_and_few_descriptors(
    existing: Path, folder: Path, few_descriptors: None, new_engine: NewEngine
) -> None:
    plans = [link(folder / f"{i:03}", existing) for i in range(60)]
    new_engine().submit([*plans, new(folder / "new")], keep_alive=None, durable=True).result()
    assert all(same_file(folder / f"{i:03}", existing) for i in range(60))
    assert len(names(folder)) == 61


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_what_a_symbolic_link_leads_to_is_linked(existing: Path, folder: Path, new_engine: NewEngine) -> None:
    leading = folder / "leading"
    leading.symlink_to(existing)
    new_engine().submit([link(folder / "shard", leading)], keep_alive=None).result()
    assert same_file(folder / "shard", existing) and not (folder / "shard").is_symlink()


def test_one_save_may_link_what_the_one_before_wrote(folder: Path, new_engine: NewEngine) -> None:
    """An incremental checkpoint: what has not changed is linked, the rest written."""
    engine, steps = new_engine(), []
    for step in range(4):
        steps.append(folder / f"step-{step}")
        steps[-1].mkdir()
        kept = [link(steps[-1] / f"{i}", steps[-2] / f"{i}") for i in range(4) if step and i != step]
        changed = [
            new(steps[-1] / f"{i}", b"%d of %d" % (i, step)) for i in range(4) if not step or i == step
        ]
        engine.submit([*changed, *kept], keep_alive=None).result()
    shutil.rmtree(steps[0])
    assert [(steps[3] / f"{i}").read_bytes() for i in range(4)] == [
        b"0 of 0",
        b"1 of 1",
        b"2 of 2",
        b"3 of 3",
    ]


@pytest.mark.parametrize("mode", [0o640, 0o440])
def test_others_who_clean_up_do_not_take_the_name_away(
    existing: Path, folder: Path, preloaded: Path, mode: int
) -> None:
    """It is hidden for the moment until it replaces a file."""
    path = folder / "shard"
    path.write_bytes(OLD)
    existing.chmod(mode)
    script = """
    import threading
    from fastshard import _native
    from fastshard.engine.plan import Link
    existing, path = map(os.fsencode, sys.argv[1:])
    ended, seen = threading.Event(), set()
    def clean_up():
        while not ended.is_set():
            seen.update(os.listdir(os.path.dirname(path)))
            _native.remove_leftovers(path)
    cleaner = threading.Thread(target=clean_up)
    cleaner.start()
    try:
        Engine().submit([FilePlan(Link(path, existing), b"", [])], keep_alive=None).result()
    finally:
        ended.set()
        cleaner.join()
    print(len(seen))
    """
    done = run_engine(script, existing, path, env=preload(preloaded, "pause"))
    assert done.stdout == "2\n", done.stderr  # the hidden name was there to be seen
    assert same_file(path, existing) and names(folder) == ["shard"]


# Where there can be no hard link.


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A folder on another filesystem."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        if os.stat(folder).st_dev == tmp_path.stat().st_dev:
            pytest.skip("/dev/shm is no other filesystem than the tests'")
        yield Path(folder)


@pytest.mark.parametrize(
    "options", [{}, {"durable": True}, {"keep_cached": False}, {"checksums": True}], ids=str
)
@pytest.mark.parametrize("write_path", ["auto", "buffered", "direct", "mapped"])
def test_on_another_filesystem_it_is_copied(
    existing: Path, elsewhere: Path, new_engine: NewEngine, write_path: str, options: dict[str, bool]
) -> None:
    for source, target in ((existing, elsewhere / "there"), (elsewhere / "there", existing.parent / "back")):
        plans = [link(target, source), new(target.with_name("new"))]
        future = new_engine(write_path=write_path).submit(plans, keep_alive=None, **options)
        stats = future.result()
        assert_same(target.read_bytes(), source.read_bytes())
        assert target.stat().st_nlink == source.stat().st_nlink == 1
        assert f"link refused: {os.strerror(errno.EXDEV)}" in stats.fallbacks
        assert stats.nbytes == source.stat().st_size + 3 and "link" not in stats.write_path
        assert future.checksums() == ([[], []] if options == {"checksums": True} else [])
    assert names(existing.parent) == ["back", "new", "shard"] and names(elsewhere) == ["new", "there"]


def test_a_copy_has_the_attributes_of_a_new_file(
    existing: Path, elsewhere: Path, new_engine: NewEngine
) -> None:
    replaced = elsewhere / "replaced"
    replaced.write_bytes(OLD)
    replaced.chmod(0o604)
    mask = os.umask(0o027)
    try:
        plans = [link(replaced, existing), link(elsewhere / "made", existing)]
        new_engine().submit(plans, keep_alive=None).result()
    finally:
        os.umask(mask)
    assert [oct((elsewhere / name).stat().st_mode & 0o777) for name in ("replaced", "made")] == [
        "0o604",
        "0o640",
    ]


def test_an_empty_file(tmp_path: Path, elsewhere: Path, new_engine: NewEngine) -> None:
    (tmp_path / "empty").touch()
    plans = [link(elsewhere / "copied", tmp_path / "empty"), link(tmp_path / "linked", tmp_path / "empty")]
    new_engine().submit(plans, keep_alive=None).result()
    assert (elsewhere / "copied").read_bytes() == b"" and same_file(tmp_path / "linked", tmp_path / "empty")


LINK = """
from fastshard.engine.plan import Link
existing, path, *others = map(os.fsencode, sys.argv[1:])
plans = [FilePlan(Link(path, existing), b"", []), *(FilePlan(other, b"new contents", []) for other in others)]
try:
    print(Engine().submit(plans, keep_alive=None).result().fallbacks)
except SaveError as error:
    print(error.errno, error.filename)
"""


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS])
@pytest.mark.parametrize("before", [None, OLD])
def test_where_links_are_refused_it_is_copied(
    existing: Path, folder: Path, preloaded: Path, before: bytes | None, code: int
) -> None:
    path = folder / "shard"
    if before is not None:
        path.write_bytes(before)
    done = run_engine(LINK, existing, path, env=preload(preloaded, f"linkat@1:{code}"))
    assert done.stdout == f"('link refused: {os.strerror(code)}',)\n", done.stderr
    assert_same(path.read_bytes(), existing.read_bytes())
    assert not same_file(path, existing) and names(folder) == ["shard"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_other_errors_are_errors(existing: Path, folder: Path, preloaded: Path, code: int) -> None:
    done = run_engine(
        LINK, existing, folder / "shard", folder / "other", env=preload(preloaded, f"linkat@1:{code}")
    )
    assert done.stdout.split() == [str(code), str(folder / "shard")], done.stderr
    assert names(folder) == []


# All or nothing.


@pytest.mark.parametrize("before", [None, OLD])
@pytest.mark.parametrize("first", [True, False])
def test_none_is_there_when_another_file_fails(
    existing: Path, folder: Path, new_engine: NewEngine, first: bool, before: bytes | None
) -> None:
    path = folder / "shard"
    if before is not None:
        path.write_bytes(before)

    def fetch(*_: int) -> None:
        raise ZeroDivisionError

    failing = FilePlan(os.fsencode(folder / "failing"), b"head", [fetched(bytes(100))])
    plans = [link(path, existing), failing] if first else [failing, link(path, existing)]
    with pytest.raises(ZeroDivisionError):
        new_engine().submit(plans, keep_alive=None, fetch=fetch).result()
    assert (path.read_bytes() if path.exists() else None) == before
    assert existing.stat().st_nlink == 1 and names(folder) == ([] if before is None else ["shard"])


@pytest.mark.parametrize("before", [None, OLD])
@pytest.mark.parametrize("refuse", ["", " exchange", " tmpfile"])
@pytest.mark.parametrize("how", ["link", "copy"])
def test_it_is_put_back_when_another_file_cannot_be_put_in_place(
    existing: Path, folder: Path, preloaded: Path, how: str, refuse: str, before: bytes | None
) -> None:
    """The folder takes the place of the last file, which cannot replace it then."""
    path = folder / "shard"
    if before is not None:
        path.write_bytes(before)
    script = """
    from fastshard.engine.plan import Link
    existing, path, last = map(os.fsencode, sys.argv[1:])
    plans = [FilePlan(Link(path, existing), b"", []), FilePlan(last, b"head", [TensorView(0, 100, FETCHED)])]
    try:
        Engine().submit(plans, keep_alive=None, fetch=lambda *_: os.mkdir(last)).result()
    except SaveError as error:
        print(error.errno, error.filename)
    """
    refused = f"linkat@1:{errno.EXDEV}{refuse}" if how == "copy" else refuse
    done = run_engine(script, existing, path, folder / "last", env=preload(preloaded, refused))
    assert done.stdout.split() == [str(errno.EISDIR), str(folder / "last")], done.stderr
    assert (path.read_bytes() if path.exists() else None) == before
    assert existing.stat().st_nlink == 1
    assert names(folder) == (["last"] if before is None else ["last", "shard"])


@pytest.mark.parametrize("call", range(1, 9))
@pytest.mark.parametrize("what", ["linkat", "exchange", "unlink"])
def test_killed_at_any_moment(existing: Path, folder: Path, preloaded: Path, what: str, call: int) -> None:
    """Each name leads to a complete file, the old one or the new one, and the next save leaves nothing hidden."""
    path, other = folder / "shard", folder / "other"
    for old in (path, other):
        old.write_bytes(OLD)
    done = run_engine(LINK, existing, path, other, env=preload(preloaded, f"{what}@{call}:999"))
    assert done.returncode == -9 or (call > 1 and done.returncode == 0)
    assert path.read_bytes() in (OLD, existing.read_bytes())
    assert other.read_bytes() in (OLD, b"new contents")
    assert existing.stat().st_size == 2 * SLOT + 5
    assert run_engine(LINK, existing, path, other).stdout == "()\n"
    assert same_file(path, existing) and names(folder) == ["other", "shard"]
    assert existing.stat().st_nlink == 2


# What cannot be linked.


def test_nothing_to_link_to(existing: Path, folder: Path, new_engine: NewEngine) -> None:
    engine = new_engine()
    pipe = folder.parent / "pipe"
    os.mkfifo(pipe)
    for source, code in (
        (existing.with_name("missing"), errno.ENOENT),
        (folder, errno.EISDIR),
        (pipe, errno.EINVAL),
    ):
        with pytest.raises(SaveError) as raised:
            engine.submit([new(folder / "new"), link(folder / "shard", source)], keep_alive=None)
        assert (raised.value.errno, raised.value.filename) == (code, str(source))
    with pytest.raises(SaveError) as raised:
        engine.submit([link(folder / "missing" / "shard", existing)], keep_alive=None)
    assert raised.value.errno == errno.ENOENT
    (folder / "taken").mkdir()
    with pytest.raises(SaveError) as raised:
        engine.submit([link(folder / "taken", existing)], keep_alive=None).result()
    assert raised.value.errno == errno.EISDIR
    assert names(folder) == ["taken"] and existing.stat().st_nlink == 1


def test_a_link_has_no_bytes_of_its_own(existing: Path, folder: Path, new_engine: NewEngine) -> None:
    target = Link(os.fsencode(folder / "shard"), os.fsencode(existing))
    for plan in (
        FilePlan(target, b"head", []),
        FilePlan(target, b"", [fetched(b"data")]),
        FilePlan(target, b"", [], 5),
    ):
        with pytest.raises(ValueError, match="a link cannot have bytes of its own"):
            new_engine().submit([plan], keep_alive=None)
    with pytest.raises(ValueError, match="outside of its file"):
        plans = [FilePlan(target, b"", [])]
        new_engine().submit(plans, keep_alive=None, amend=lambda _: [(0, 0, b"x")]).result()
    assert names(folder) == [] and existing.stat().st_nlink == 1


def test_a_source_that_is_cut_while_it_is_copied(
    existing: Path, elsewhere: Path, new_engine: NewEngine
) -> None:
    """An error, not a signal."""
    with existing.open("wb") as file:
        file.truncate(64 << 20)
    blocker = FilePlan(os.fsencode(elsewhere / "a"), b"head", [fetched(bytes(80 << 20))])

    def fetch(file: int, item: int, first: int, nbytes: int, address: int) -> None:
        ctypes.memset(address, 0, nbytes)
        os.truncate(existing, 0)

    plans = [blocker, link(elsewhere / "b", existing)]
    with pytest.raises(SaveError) as raised:
        new_engine(threads=1).submit(plans, keep_alive=None, fetch=fetch).result()
    assert (raised.value.errno, raised.value.filename) == (errno.EIO, str(existing))
    assert names(elsewhere) == []
