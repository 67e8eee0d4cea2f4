# SPDX-License-Identifier: Apache-2.0
"""Files appear complete or not at all, whatever happens: faults, signals, kills, forks, odd filesystems."""

import errno
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from helpers import PRELUDE, names, open_descriptors, preload, run, run_engine, same
from safetensors.torch import load_file

import fastshard
from fastshard import Options, SaveError, save_file, save_files

TENSORS = {"a": torch.arange(1000, dtype=torch.float32), "b": torch.ones(3, 5, dtype=torch.bfloat16)}
OTHERS = {"a": torch.full((1000,), 7.0), "c": torch.zeros(17, dtype=torch.int8)}
MIB = 1 << 20


# Modes, links, targets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
@pytest.mark.parametrize("nameless", [True, False])
def test_mode_of_a_new_file_follows_the_umask(
    tmp_path: Path, mask: int, nameless: bool, preloaded: Path
) -> None:
    script = """
    os.umask(int(sys.argv[2]))
    save_file({"a": torch.ones(3)}, sys.argv[1])
    print(oct(os.stat(sys.argv[1]).st_mode & 0o777))
    """
    env = dict(os.environ) if nameless else preload(preloaded, "tmpfile")
    done = run(script, tmp_path / "m.safetensors", mask, env=env)
    assert done.stdout.split() == [oct(0o666 & ~mask)], done.stderr


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o400, 0o755])
def test_replaced_file_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"old")
    path.chmod(mode)
    save_file(TENSORS, path)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert same(path, TENSORS)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_replaced_file_keeps_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"old")
    os.chown(path, 1234, 5678)
    save_file(TENSORS, path)
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 5678)


def test_hard_link_keeps_the_old_contents(tmp_path: Path) -> None:
    path, other = tmp_path / "m.safetensors", tmp_path / "other.safetensors"
    save_file(OTHERS, path)
    os.link(path, other)
    save_file(TENSORS, path)
    assert same(path, TENSORS) and same(other, OTHERS)


def test_relative_names_and_names_without_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    save_file(TENSORS, "plain.safetensors")
    save_file(TENSORS, Path("sub/../sub/é ü.safetensors"))
    assert same(tmp_path / "plain.safetensors", TENSORS)
    assert same(tmp_path / "sub" / "é ü.safetensors", TENSORS)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("write_path", ["buffered", "direct", "mapped"])
def test_saving_over_the_file_the_tensors_are_mapped_from(
    tmp_path: Path, threads: int, write_path: str
) -> None:
    path = tmp_path / "m.safetensors"
    expected = {f"w{i}": torch.randn(1 << 18) for i in range(6)}
    save_file(expected, path)
    mapped = load_file(path)
    save_file(mapped, path, engine=Options(threads=threads, write_path=write_path))
    assert same(path, expected)
    assert all(torch.equal(mapped[name], expected[name]) for name in expected)


# Errors --------------------------------------------------------------------------------------------------


def fails(path: os.PathLike[str] | str, code: int, **options: object) -> SaveError:
    with pytest.raises(SaveError) as raised:
        save_file(TENSORS, path, **options)  # type: ignore[arg-type]
    assert raised.value.errno == code
    assert f"(os error {code})" in str(raised.value)
    assert raised.value.filename == os.fspath(path)
    return raised.value


def test_missing_directory(tmp_path: Path) -> None:
    fails(tmp_path / "missing" / "m.safetensors", errno.ENOENT)
    assert names(tmp_path) == []


def test_directory_as_target(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    fails(tmp_path / "d", errno.EISDIR)
    assert names(tmp_path) == ["d"] and names(tmp_path / "d") == []


def test_file_as_directory(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    fails(tmp_path / "f" / "m.safetensors", errno.ENOTDIR)


def test_empty_name() -> None:
    fails("", errno.ENOENT)


def test_name_too_long(tmp_path: Path) -> None:
    fails(tmp_path / ("x" * 256), errno.ENAMETOOLONG)
    longest = tmp_path / ("x" * 255)
    save_file(TENSORS, longest)
    save_file(TENSORS, longest)  # replacing takes a temporary name
    assert same(longest, TENSORS) and names(tmp_path) == [longest.name]


def test_devices_and_pipes_are_not_replaced(tmp_path: Path) -> None:
    fails("/dev/null", errno.EINVAL)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    os.mkfifo(tmp_path / "pipe")
    fails(tmp_path / "pipe", errno.EINVAL)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_read_only_directory(public: Path) -> None:
    script = """
    if os.geteuid() == 0:
        os.setuid(65534)
    try:
        save_file({"a": torch.ones(3)}, sys.argv[1])
    except SaveError as error:
        print(error.errno)
    """
    folder = public / "locked"
    folder.mkdir()
    folder.chmod(0o555)
    done = run(script, folder / "m.safetensors")
    assert done.stdout.split() == [str(errno.EACCES)], done.stderr
    assert names(folder) == []


@pytest.mark.parametrize("write_path", ["buffered", "direct", "mapped"])
def test_file_size_limit(tmp_path: Path, write_path: str) -> None:
    path = tmp_path / "m.safetensors"
    save_file(TENSORS, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))
    try:
        with pytest.raises(SaveError) as raised:
            save_file({"a": torch.zeros(MIB)}, path, engine=Options(write_path=write_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.errno == errno.EFBIG
    assert same(path, TENSORS) and names(tmp_path) == [path.name]


@pytest.mark.parametrize("write_path", ["buffered", "direct", "mapped"])
def test_full_disk_is_noticed_before_anything_changes(small_disk: Path, write_path: str) -> None:
    engine = Options(write_path=write_path)
    path = small_disk / "m.safetensors"
    save_file(TENSORS, path, engine=engine)
    before = names(small_disk)
    with pytest.raises(SaveError) as raised:
        save_file({"a": torch.zeros(8 * MIB)}, path, engine=engine)
    assert raised.value.errno == errno.ENOSPC
    assert same(path, TENSORS) and names(small_disk) == before
    with pytest.raises(SaveError) as raised:  # each fits, both do not
        parts = {small_disk / f"{i}.safetensors": {"a": torch.zeros(4 * MIB)} for i in range(2)}
        save_files(parts, engine=engine)
    assert raised.value.errno == errno.ENOSPC
    assert same(path, TENSORS) and names(small_disk) == before
    save_file(OTHERS, path, engine=engine)
    assert same(path, OTHERS)


# Many files ----------------------------------------------------------------------------------------------


def test_save_files_writes_all(tmp_path: Path) -> None:
    files = {tmp_path / f"{i}.safetensors": {"a": torch.full((100 * i,), float(i))} for i in range(20)}
    save_files(files, {"format": "pt"}, durable=True)
    assert all(same(path, tensors) for path, tensors in files.items())
    assert len(names(tmp_path)) == 20
    save_files({})


def test_save_files_refuses_one_file_under_two_names(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to("sub")
    with pytest.raises(ValueError, match="are the same file"):
        save_files({tmp_path / "sub" / "m.safetensors": TENSORS, tmp_path / "link" / "m.safetensors": OTHERS})
    assert names(tmp_path / "sub") == []


def test_one_bad_file_stops_all(tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    save_file(OTHERS, good)
    with pytest.raises(SaveError):
        save_files({good: TENSORS, tmp_path / "new.safetensors": TENSORS, tmp_path / "no" / "m": TENSORS})
    with pytest.raises(ValueError, match="torch.Tensor"):
        save_files({good: TENSORS, tmp_path / "bad.safetensors": {"a": 1}})  # type: ignore[dict-item]
    assert same(good, OTHERS) and names(tmp_path) == ["good.safetensors"]


# Filesystems that cannot do everything -------------------------------------------------------------------


SAVE_OVER = """
import json
old, new = ({"a": torch.full((5000,), float(i))} for i in range(2))
refuse = os.environ.pop("REFUSE")
for targets in sys.argv[2:]:
    folder = f"{sys.argv[1]}/{targets}"
    os.mkdir(folder)
    for name in "ab":
        save_file(old, f"{folder}/{name}.safetensors")
    os.environ["REFUSE"] = refuse
    found = {"error": None}
    try:
        save_files({f"{folder}/{name}.safetensors": new for name in targets}, durable=True)
        found["fallbacks"] = stats().fallbacks
    except SaveError as error:
        found["error"] = error.errno
    del os.environ["REFUSE"]
    left = sorted(os.listdir(folder))
    found["left"] = {name[0]: load_file(f"{folder}/{name}")["a"][0].item() for name in left if name[0] != "."}
    found["others"] = [name for name in left if name[0] == "."]
    print(json.dumps(found))
"""


def save_over(folder: Path, library: Path, refuse: str, *targets: str) -> list[dict[str, Any]]:
    """Saves new contents (1) to the files ``targets`` of a folder with old (0) a and b; tells what came of it."""
    done = run(SAVE_OVER, folder, *targets, env=preload(library, refuse))
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(targets) and all(each["others"] == [] for each in found)
    return found


@pytest.mark.parametrize(
    "refuse",
    [
        "",
        "tmpfile",
        "fallocate",
        "exchange",
        "exchange link",
        "tmpfile exchange",
        "tmpfile fallocate exchange link",
    ],
)
def test_named_fallbacks(tmp_path: Path, preloaded: Path, refuse: str) -> None:
    sets = ["a", "c", "ab", "abc", "cd"]
    for targets, found in zip(sets, save_over(tmp_path, preloaded, refuse, *sets), strict=True):
        assert found["error"] is None
        assert found["left"] == {name: float(name in targets) for name in sorted({*"ab", *targets})}
        told = " ".join(found["fallbacks"])
        assert ("O_TMPFILE" in told) == ("tmpfile" in refuse)
        assert ("fallocate" in told) == ("fallocate" in refuse)


@pytest.mark.parametrize(
    ("refuse", "targets", "code"),
    [
        ("exchange@2:5", "ab", 5),  # the second file cannot be put in place: the first goes back
        ("exchange@2:5", "abc", 5),
        ("tmpfile exchange@3:5", "abc", 5),
        ("exchange rename@2:5", "ab", 5),  # the same without an exchange
        ("tmpfile exchange rename@3:5", "abc", 5),
        ("fsync:5", "ab", 5),
        ("fsync@3:5", "ab", 5),  # the directory
        ("rename:5", "a", 5),
        ("fallocate:28", "ab", errno.ENOSPC),
    ],
)
def test_failed_publication_leaves_everything_as_it_was(
    tmp_path: Path, preloaded: Path, refuse: str, targets: str, code: int
) -> None:
    (found,) = save_over(tmp_path, preloaded, refuse, targets)
    assert found["error"] == code
    assert found["left"] == {"a": 0.0, "b": 0.0}


def test_without_rename_a_new_file_is_copied(tmp_path: Path, preloaded: Path) -> None:
    (found,) = save_over(tmp_path, preloaded, "tmpfile rename exchange", "c")
    assert found["error"] is None and found["left"]["c"] == 1.0
    assert any("rename" in text for text in found["fallbacks"])


def test_without_rename_nothing_is_overwritten(tmp_path: Path, preloaded: Path) -> None:
    (found,) = save_over(tmp_path, preloaded, "tmpfile rename", "a")
    assert found["error"] == errno.ENOTSUP
    assert found["left"] == {"a": 0.0, "b": 0.0}


# Signals, kills, forks, many callers ---------------------------------------------------------------------

BIG = """
tensors = {str(i): torch.full((1 << 20,), float(sys.argv[2])) for i in range(32)}
"""


@pytest.mark.parametrize("refuse", ["", "tmpfile"])
def test_ctrl_c_leaves_the_old_file(tmp_path: Path, preloaded: Path, refuse: str) -> None:
    """The save is in the middle of its file when the signal comes: Python is bringing bytes of it."""
    path = tmp_path / "m.safetensors"
    save_file(TENSORS, path)
    script = """
    import signal
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell has put in the background
    try:
        while_writing(sys.argv[1], lambda: os.kill(os.getpid(), signal.SIGINT))
    except KeyboardInterrupt:
        print("interrupted")
    save(sys.argv[1] + ".after")
    """
    done = run_engine(script, path, env=preload(preloaded, refuse))
    assert done.stdout.split() == ["interrupted"], done.stderr
    assert same(path, TENSORS)
    assert names(tmp_path) == ["m.safetensors", "m.safetensors.after"]


@pytest.mark.parametrize("refuse", ["", "tmpfile"])
@pytest.mark.parametrize("delay", [0.05, 0.15, 0.3])
def test_kill_in_the_middle(tmp_path: Path, preloaded: Path, refuse: str, delay: float) -> None:
    path = tmp_path / "m.safetensors"
    script = BIG + textwrap.dedent("""
    print("ready", flush=True)
    while True:
        save_file(tensors, sys.argv[1])
    """)
    save_file(TENSORS, path)
    with forked.started(PRELUDE + script, path, 3, env=preload(preloaded, refuse)) as (child, output):
        assert output.readline() == "ready\n"
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    loaded = load_file(path)
    assert same(path, TENSORS) or (len(loaded) == 32 and all((t == 3).all() for t in loaded.values()))
    left = [name for name in names(tmp_path) if name != path.name]
    assert len(left) <= 1 and all(name.startswith(".fastshard-") for name in left)


def test_two_savers_of_one_path(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    mine = [{"a": torch.full((1 << 18,), float(i))} for i in range(4)]
    errors: list[BaseException] = []

    def save(tensors: dict[str, torch.Tensor]) -> None:
        try:
            for _ in range(5):
                save_file(tensors, path)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(tensors,)) for tensors in mine]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert any(same(path, tensors) for tensors in mine)
    assert names(tmp_path) == [path.name]


def test_many_callers(tmp_path: Path) -> None:
    sets = {tmp_path / f"{i}.safetensors": {"a": torch.full((10_000 + i,), float(i))} for i in range(40)}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda pair: save_file(pair[1], pair[0]), sets.items()))
    assert all(same(path, tensors) for path, tensors in sets.items())


def test_fork_while_a_save_runs(tmp_path: Path) -> None:
    script = """
    import threading, warnings
    # Python 3.12 warns of forking with threads, rightly; that it works here is what is tested.
    warnings.simplefilter("ignore")
    tensors = {str(i): torch.full((1 << 20,), 5.0) for i in range(16)}
    stop = threading.Event()
    def saves():
        while not stop.is_set():
            save_file(tensors, sys.argv[1] + "/parent.safetensors")
    thread = threading.Thread(target=saves)
    thread.start()
    save_file({"a": torch.ones(3)}, sys.argv[1] + "/first.safetensors")
    status = []
    mine = {"a": torch.full((1 << 18,), 1.0)}  # not made in the child: torch's own threads do not survive
    for number in range(5):
        child = os.fork()
        if child == 0:
            save_file(mine, f"{sys.argv[1]}/child{number}.safetensors")
            sys.exit(0)
        status.append(os.waitpid(child, 0)[1])
    stop.set()
    thread.join()
    print(status)
    """
    done = run(script, tmp_path)
    assert done.stdout.splitlines()[-1] == "[0, 0, 0, 0, 0]", done.stderr
    assert names(tmp_path) == [
        *(f"child{i}.safetensors" for i in range(5)),
        "first.safetensors",
        "parent.safetensors",
    ]
    assert len(load_file(tmp_path / "parent.safetensors")) == 16
    for number in range(5):
        assert (load_file(tmp_path / f"child{number}.safetensors")["a"] == 1).all()


def test_exit_while_a_save_runs(tmp_path: Path) -> None:
    script = """
    import threading
    tensors = {str(i): torch.full((1 << 20,), 5.0) for i in range(64)}
    threading.Thread(target=save_file, args=(tensors, sys.argv[1])).start()
    """
    done = run(script, tmp_path / "m.safetensors")
    assert done.returncode == 0, done.stderr
    assert len(load_file(tmp_path / "m.safetensors")) == 64


def test_durable_syncs_the_file_before_the_rename_and_the_directory_after(tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("no strace here")
    log = tmp_path / "log"
    script = "import sys, torch; from fastshard import *; save_file({'a': torch.ones(3)}, sys.argv[1], durable=True)"
    traced = "openat,fsync,fdatasync,linkat,rename,renameat2"
    command = ["strace", "-f", "-o", log, "-e", f"trace={traced}", sys.executable, "-c", script]
    subprocess.run([*command, tmp_path / "m.safetensors"], check=True, cwd=Path(__file__).parent)
    text = log.read_text()
    calls = [line.split(" ", 1)[1].strip() for line in text[text.index("O_TMPFILE") :].splitlines()[1:]]
    kinds = [call.split("(")[0] for call in calls if call.startswith(("fsync", "linkat"))]
    assert kinds == ["fsync", "linkat", "fsync"]


def test_descriptors_do_not_leak(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "m.safetensors")
    with fastshard.Engine() as engine:
        before = open_descriptors()
        for _ in range(20):
            save_file(TENSORS, tmp_path / "m.safetensors", engine=engine)
            with pytest.raises(SaveError):
                save_file(TENSORS, tmp_path / "no" / "m.safetensors", engine=engine)
    assert len(open_descriptors()) <= len(before)
