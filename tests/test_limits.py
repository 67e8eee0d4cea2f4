# SPDX-License-Identifier: Apache-2.0
"""Memory limits of control groups: read as the kernel shows them, and kept before a file in memory exceeds them."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch as reference
import torch
from helpers import names

import fastshard
from fastshard import SaveError
from fastshard.engine import limits

MIB = 1 << 20


def tree(root: Path, cgroup: str, mounts: list[str], files: dict[str, object], swap: int = 0) -> str:
    """A filesystem with what is read of ``/proc`` and of the mounted groups."""
    lines = ["31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n", *(f"{line}\n" for line in mounts)]
    texts = {
        "proc/self/cgroup": cgroup,
        "proc/self/mountinfo": "".join(lines),
        "proc/meminfo": f"MemTotal: 24000000 kB\nSwapFree: {swap >> 10} kB\n",
        **{f"sys/fs/cgroup/{name}": text for name, text in files.items()},
    }
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(str(text))
    return str(root)


V2 = "41 31 0:38 / /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw"
V1 = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
V1_CONTAINER = "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro,relatime - cgroup cgroup rw,memory,hugetlb"
V2_CONTAINER = r"41 31 0:38 /a\040b/c /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw"
NONE = 9223372036854771712
OURS_V1 = "5:cpu,cpuacct:/x\n4:memory:/a/b\n0::/\n"


def v2(group: str, limit: object, current: int, *, file: int = 0, **more: object) -> dict[str, object]:
    stat = (
        f"anon 5\nfile 999999999\ninactive_file {file - 7 if file else 0}\nactive_file {7 if file else 0}\n"
    )
    names = {"memory.max": limit, "memory.current": current, "memory.stat": stat}
    return {f"{group}{name}": value for name, value in {**names, **more}.items()}


def v1(group: str, limit: int, usage: int, *, file: int = 0, **more: object) -> dict[str, object]:
    stat = f"inactive_file 3\ntotal_inactive_file {file}\ntotal_active_file 0\ntotal_shmem 5\n"
    names = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": usage, "memory.stat": stat}
    return {f"memory/{group}{name}": value for name, value in {**names, **more}.items()}


ROOMS: dict[str, tuple[str, list[str], dict[str, object], int, int | None]] = {
    "v2": ("0::/a/b\n", [V2], v2("a/b/", 1000, 300), 0, 700),
    "v2, no limit": ("0::/a/b\n", [V2], v2("a/b/", "max", 300), 0, None),
    "v2, above": ("0::/a/b\n", [V2], {**v2("a/b/", "max", 300), **v2("a/", 900, 500)}, 0, 400),
    "v2, smaller above": ("0::/a/b\n", [V2], {**v2("a/b/", 1000, 300), **v2("a/", 900, 500)}, 0, 400),
    "v2, larger above": ("0::/a/b\n", [V2], {**v2("a/b/", 1000, 300), **v2("a/", 9000, 500)}, 0, 700),
    "v2, cached files": ("0::/a\n", [V2], v2("a/", 1000, 900, file=500), 0, 600),
    "v2, over the limit": ("0::/a\n", [V2], v2("a/", 1000, 1200), 0, -200),
    "v2, swap": ("0::/a\n", [V2], v2("a/", 5000, 5000), 4096, 4096),
    "v2, swap of its own": (
        "0::/a\n",
        [V2],
        v2("a/", 5000, 5000, **{"memory.swap.max": 3000, "memory.swap.current": 1000}),
        4096,
        2000,
    ),
    "v2, no swap": ("0::/a\n", [V2], v2("a/", 5000, 5000, **{"memory.swap.max": 0}), 4096, 0),
    "v2 in a namespace": ("0::/\n", [V2], v2("", 1000, 300), 0, 700),
    "v2 of another namespace": ("0::/../../x\n", [V2], v2("", 1000, 300), 0, 700),
    "v2, a part is mounted": (
        "0::/a b/c/d\n",
        [V2_CONTAINER],
        {**v2("", 1000, 900), **v2("d/", 500, 50)},
        0,
        100,
    ),
    "v1": (OURS_V1, [V1], {**v1("", NONE, 5), **v1("a/", NONE, 5), **v1("a/b/", 1000, 300)}, 0, 700),
    "v1, above": (OURS_V1, [V1], {**v1("a/", 800, 700), **v1("a/b/", 1000, 300)}, 0, 100),
    "v1, cached files": (OURS_V1, [V1], v1("a/b/", 1000, 900, file=500), 0, 600),
    "v1, swap": (OURS_V1, [V1], v1("a/b/", 5000, 5000), 4096, 4096),
    "v1, swap of its own": (
        OURS_V1,
        [V1],
        v1("a/b/", 5000, 5000, **{"memory.memsw.limit_in_bytes": 6000, "memory.memsw.usage_in_bytes": 5500}),
        4096,
        500,
    ),
    "v1 in a container": ("4:memory:/docker/abc\n0::/\n", [V1_CONTAINER], v1("", 1000, 300), 0, 700),
    "v1 beside v2": ("4:memory:/a\n0::/\n", [V1, V2], {**v1("a/", 1000, 300), **v2("", "max", 1)}, 0, 700),
    "no groups": ("", [], {}, 0, None),
    "nonsense": ("0::/a\n", [V2], v2("a/", "much", 300), 0, None),
    "no usage": ("0::/a\n", [V2], {"a/memory.max": 1000}, 0, None),
    "no stat": ("0::/a\n", [V2], {"a/memory.max": 1000, "a/memory.current": 100}, 0, 900),
}


@pytest.mark.parametrize("what", ROOMS)
def test_the_smallest_room_counts(tmp_path: Path, what: str) -> None:
    cgroup, mounts, files, swap, expected = ROOMS[what]
    room = limits.memory_room(tree(tmp_path, cgroup, mounts, files, swap))
    assert (room.nbytes if room else None) == expected


def test_without_proc(tmp_path: Path) -> None:
    assert limits.memory_room(str(tmp_path)) is None


def saves(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, object]:
    return {
        "save_file": lambda: fastshard.save_file(tensors, folder / "m"),
        "save_files": lambda: fastshard.save_files({folder / "m": tensors}),
        "prepare": lambda: fastshard.prepare(tensors, folder / "m"),
        "torch_save": lambda: fastshard.torch_save(tensors, folder / "m"),
        "save_sharded_state": lambda: fastshard.save_sharded_state(tensors, folder / "m"),
        "save_torch_state_dict": lambda: fastshard.save_torch_state_dict(tensors, folder),
    }


@pytest.mark.parametrize(
    "saver",
    ["save_file", "save_files", "prepare", "torch_save", "save_sharded_state", "save_torch_state_dict"],
)
def test_nothing_is_begun_that_would_not_fit(
    memory: Path, tmp_path: Path, saver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = limits.Room(30 * MIB, 512 * MIB, "/sys/fs/cgroup/job")
    monkeypatch.setattr(limits, "memory_room", lambda root="/": room)
    (memory / "old").write_bytes(b"old")
    tensors = {"a": torch.zeros(10 * MIB)}
    save = saves(memory, tensors)[saver]
    with pytest.raises(SaveError, match="40 MiB|80 MiB") as raised:
        save()  # type: ignore[operator]
    assert raised.value.errno == errno.ENOMEM
    assert "512 MiB of /sys/fs/cgroup/job leaves 30 MiB" in str(raised.value)
    assert ".fastshard" not in str(raised.value)
    assert names(memory) == ["old"]
    made = saves(tmp_path, tensors)[saver]()  # type: ignore[operator]
    if saver == "prepare":
        made.save()
        made.close()
    assert names(tmp_path) != []  # on a disk, whose pages the kernel can take back


def test_each_generation_counts(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = limits.Room(60 * MIB, 512 * MIB, "/job")
    monkeypatch.setattr(limits, "memory_room", lambda root="/": room)
    tensors = {"a": torch.zeros(6 * MIB)}
    with pytest.raises(SaveError, match="72 MiB"):
        fastshard.prepare(tensors, memory / "m", generations=3)
    with fastshard.prepare(tensors, memory / "m") as prepared:
        prepared.save()
        assert reference.load_file(memory / "m")["a"].numel() == 6 * MIB


def test_small_saves_do_not_look(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "memory_room", lambda root="/": pytest.fail("looked"))
    fastshard.save_file({"a": torch.zeros(MIB)}, memory / "m")


@pytest.fixture
def limited() -> Iterator[Path]:
    """A control group of this machine with 700 MiB: its folder."""
    found = None
    for mount in limits._mounts("/"):
        if mount.type == "cgroup2" and not found:
            found = Path(mount.point), "memory.max", "memory.swap.max"
        if mount.type == "cgroup" and "memory" in mount.options:
            found = Path(mount.point), "memory.limit_in_bytes", ""
    if found is None:
        pytest.skip("no control groups here")
    parent, limit, swap = found
    group = parent / f"fastshard-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / limit).write_text(str(700 * MIB))
        if swap and (group / swap).exists():
            (group / swap).write_text("0")
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"control groups cannot be made here: {error}")
    yield group
    group.rmdir()


@pytest.mark.parametrize("saver", ["save_file", "prepare"])
def test_a_process_in_a_small_group_lives(memory: Path, limited: Path, saver: str) -> None:
    script = """
    import os, sys
    with open(os.path.join(sys.argv[1], "cgroup.procs"), "w") as file:
        file.write(str(os.getpid()))
    import torch, fastshard
    large, small = ({"a": torch.empty(mib << 18)} for mib in (900, 40))  # never written to, so none of it is there
    save = getattr(fastshard, sys.argv[3])
    try:
        save(large, sys.argv[2])
    except fastshard.SaveError as error:
        print(error.errno, os.listdir(os.path.dirname(sys.argv[2])), error)
    save(small, sys.argv[2])
    print("lives")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), limited, memory / "m", saver],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parent,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[1:] == ["lives"], (done.returncode, done.stderr)
    assert lines[0].startswith(f"{errno.ENOMEM} [] ") and limited.name in lines[0]
