# SPDX-License-Identifier: Apache-2.0
"""``python tests/faults/rivals.py``: what is left of four files that replace four others when a save of them goes
wrong, by other savers and by fastshard.

Each saver writes the same tensors. Every system call fails once, mostly with EIO; the process is killed at every change that it makes;
somebody else takes all the room before a change, for each of the changes; files may not be larger than half of
what is saved. The disks are an ext4 and a tmpfs of their own, so this needs root. Exit status 77: it cannot be run
here. The output is a table in Markdown. A saver that is not installed is left out, and named.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import importlib.util
import json
import os
import resource
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"

import calls  # noqa: E402
import places  # noqa: E402
import torch  # noqa: E402
from calls import KILL, Call, Report  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import fastshard  # noqa: E402

SKIPPED: Final = 77
FILES: Final = 4
NBYTES: Final = 1 << 20
"""Of each of them."""
DISK_NBYTES: Final = 24 << 20
Save = Callable[[Path, int], object]


class Saver(NamedTuple):
    name: str
    save: Save
    needs: str = ""


class Found(NamedTuple):
    """What was left of one save."""

    ended: str
    """"returned", "raised", "killed", "died" or "hung"."""
    stands: str
    """"old", "new", or what else a loader finds."""
    told: bool
    """Whether the error says that the new files stand."""
    left: int
    """Files that the save after it leaves beside those that belong there."""

    @property
    def wrong(self) -> str:
        if self.ended == "hung":
            return "hung"
        if self.ended == "died":
            return f"killed by a signal ({self.stands} files)"
        if self.stands not in ("old", "new"):
            return f"{self.ended}: {self.stands}"
        if self.ended == "returned" and self.stands != "new":
            return "returned, and the old files stand"
        if self.ended == "raised" and (self.stands == "new") != self.told:
            return f"raised, and does not say that the {self.stands} files stand"
        return "temporary files stay for good" if self.left else ""


@functools.cache
def weights(seed: int) -> dict[str, torch.Tensor]:
    return {f"l.{i}.w": torch.full((NBYTES // 4,), float(seed * 100 + i)) for i in range(FILES)}


def _one_by_one(folder: Path, seed: int) -> None:
    for i, (name, tensor) in enumerate(weights(seed).items(), 1):
        save_file({name: tensor}, folder / f"model-{i:05}-of-{FILES:05}.safetensors")


def _parallel_saver(folder: Path, seed: int) -> None:
    from fastsafetensors import ParallelSaver

    ParallelSaver(num_shards=FILES, num_threads=2, fsync=True).save(weights(seed), str(folder / "model"))


def _save_files(folder: Path, seed: int) -> None:
    names = (folder / f"model-{i + 1:05}-of-{FILES:05}.safetensors" for i in range(FILES))
    fastshard.save_files(
        {path: {name: tensor} for path, (name, tensor) in zip(names, weights(seed).items())}, durable=True
    )


def _checkpoint(folder: Path, seed: int) -> None:
    fastshard.save_torch_state_dict(weights(seed), folder, max_shard_size=NBYTES, durable=True)


SAVERS: Final = (
    Saver("safetensors.save_file, one by one", _one_by_one),
    Saver("fastsafetensors.ParallelSaver", _parallel_saver, "fastsafetensors"),
    Saver("fastshard.save_files", _save_files),
    Saver("fastshard.save_torch_state_dict", _checkpoint, "huggingface_hub"),
)


def _loaded(folder: Path) -> dict[str, torch.Tensor]:
    """What a loader finds: the files that the index names, or all where there is none."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = set(json.loads(index.read_text())["weight_map"].values())
    else:
        names = {path.name for path in folder.glob("*.safetensors")}
    return {name: tensor for file in sorted(names) for name, tensor in load_file(folder / file).items()}


def stands(folder: Path) -> str:
    try:
        found = _loaded(folder)
    except Exception as error:  # whatever a loader says of it
        return f"no loader reads it ({type(error).__name__})"
    seeds = []
    for seed in (0, 1):
        same = [
            name for name, tensor in weights(seed).items() if torch.equal(found.get(name, tensor[:0]), tensor)
        ]
        seeds.append(len(same))
    if FILES in seeds:
        return ("old", "new")[seeds.index(FILES)]
    return "files of two saves, mixed" if sum(seeds) == FILES else "files are missing or damaged"


def _left(folder: Path) -> int:
    """Files that no loader wants."""
    return sum(
        path.is_file() and not (path.name.endswith(".safetensors") or path.name.endswith(".index.json"))
        for path in folder.rglob("*")
    )


def _told(error: BaseException | None) -> bool:
    return bool(getattr(error, "published", False))


class Trial:
    """A saver over the files of an earlier save of its own, in a folder that is made anew each time."""

    def __init__(self, saver: Saver, place: str) -> None:
        self.saver = saver
        self.folder = Path(place) / "work"

    def run(
        self,
        act: Callable[[Call], int | None] = lambda call: None,
        before: Callable[[], None] = lambda: None,
        keep_log: bool = False,
    ) -> Report:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self._apart(0)
        return calls.run(
            lambda: self.saver.save(self.folder, 1),
            act=act,
            seen=lambda name, path: path.startswith(str(self.folder)),
            before=before,
            after=lambda value, error: _told(error),
            keep_log=keep_log,
        )

    def _apart(self, seed: int) -> None:
        """Saves in a process of its own, as every other save is made in one."""
        if (report := calls.run(lambda: self.saver.save(self.folder, seed))).outcome != "returned":
            raise RuntimeError(f"{self.saver.name}: {report}")

    def found(self, report: Report) -> Found:
        state = stands(self.folder)
        self._apart(1)
        return Found(report.outcome, state, bool(report.value), _left(self.folder))

    def changes(self) -> list[Call]:
        """The calls of an undisturbed save, each of which the save below may be disturbed at."""
        report = self.run(keep_log=True)
        if report.outcome != "returned" or stands(self.folder) != "new":
            raise RuntimeError(f"{self.saver.name}: {report.outcome}, {stands(self.folder)}")
        return report.log


def at(wanted: Call, answer: Callable[[], int | None]) -> Callable[[Call], int | None]:
    """What becomes of the wanted call is what ``answer`` returns; all others go on."""
    return lambda call: answer() if (call.name, call.nth) == (wanted.name, wanted.nth) else None


def _answering(number: int) -> Callable[[], int]:
    return lambda: number


def _changing(log: list[Call]) -> list[Call]:
    return [call for call in log if calls.CALLS[call.name].changes or call.name == "mmap"]


def failing(trial: Trial, log: list[Call]) -> Iterator[Found]:
    for wanted in log:
        report = trial.run(act=at(wanted, _answering(calls.CALLS[wanted.name].errors[0])))
        if report.hit is not None:
            yield trial.found(report)


def killed(trial: Trial, log: list[Call]) -> Iterator[Found]:
    for wanted in _changing(log):
        report = trial.run(act=at(wanted, _answering(KILL)))
        if report.outcome == "killed":
            yield trial.found(report)


def filled(trial: Trial, log: list[Call]) -> Iterator[Found]:
    """There is room when the save begins, and none from some call on."""
    ballast = trial.folder.parent / "ballast"
    for wanted in _changing(log):
        report = trial.run(act=at(wanted, functools.partial(take_room, ballast, 0)))
        ballast.unlink(missing_ok=True)
        yield trial.found(report)


def too_little(trial: Trial, log: list[Call]) -> Iterator[Found]:
    """Half of what is saved fits."""
    ballast = trial.folder.parent / "ballast"
    report = trial.run(before=lambda: take_room(ballast, FILES * NBYTES // 2))
    ballast.unlink(missing_ok=True)
    yield trial.found(report)


def limited(trial: Trial, log: list[Call]) -> Iterator[Found]:
    """As ``ulimit -f`` does it."""
    half = NBYTES // 2
    report = trial.run(before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (half, half)))
    yield trial.found(report)


def take_room(ballast: Path, leave: int) -> None:
    """Takes all the room of a filesystem but for some bytes, as another process would."""
    fd = os.open(ballast, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    try:
        step = 1 << 20
        while step >= 4096:
            free = os.statvfs(ballast)
            step = min(step, free.f_bavail * free.f_frsize - leave)
            if step < 4096:
                return
            try:
                os.posix_fallocate(fd, os.fstat(fd).st_size, step)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                step //= 2
    finally:
        os.close(fd)


@contextlib.contextmanager
def disks() -> Iterator[dict[str, str]]:
    with tempfile.TemporaryDirectory(prefix="rivals-", dir="/dev/shm") as top:
        found = {}
        for name in ("ext4", "tmpfs"):
            place = os.path.join(top, name)
            os.makedirs(place)
            if name == "ext4":
                image = os.path.join(top, "image")
                with open(image, "wb") as file:
                    file.truncate(DISK_NBYTES)
                mounted = places.mount_ext4(image, place)
            else:
                mounted = not places.run("mount", "-t", "tmpfs", "-o", f"size={DISK_NBYTES}", "rivals", place)
            if mounted:
                found[name] = place
        try:
            yield found
        finally:
            for place in found.values():
                places.run("umount", "-l", place)


DISTURBANCES: Final[dict[str, Callable[[Trial, list[Call]], Iterator[Found]]]] = {
    "half of the room from the start": too_little,
    "the room goes on the way": filled,
    "`ulimit -f`, half a file": limited,
    "a system call fails": failing,
    "killed": killed,
}


def table(rows: list[tuple[str, str, str, list[Found]]]) -> Iterator[str]:
    yield "| disturbed by | on | saver | cases | right | what was wrong |"
    yield "|---|---|---|---|---|---|"
    for disturbance, disk, saver, found in rows:
        wrong = Counter(one.wrong for one in found)
        right = wrong.pop("", 0)
        said = "; ".join(f"{count} {text}" for text, count in wrong.most_common())
        yield f"| {disturbance} | {disk} | {saver} | {len(found)} | {right} | {said} |"


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/faults/rivals.py", description=__doc__)
    parser.add_argument("--saver", help="only those of whose names this is a part")
    parser.add_argument("--disturbance", help="the same of disturbances")
    parser.add_argument("--json", type=Path, help="write the outcome of each case here")
    given = parser.parse_args()
    if refusal := calls.refusal():
        print(f"skipped: {refusal}")
        return SKIPPED
    if not places.own_mounts():
        print("skipped: filesystems of a known size need root, and mounts of one's own")
        return SKIPPED
    rows: list[tuple[str, str, str, list[Found]]] = []
    with disks() as found:
        for disk, place in found.items():
            for saver in SAVERS:
                if given.saver and given.saver not in saver.name:
                    continue
                if saver.needs and importlib.util.find_spec(saver.needs) is None:
                    print(f"{saver.name}: left out, as {saver.needs} is not installed")
                    continue
                trial = Trial(saver, place)
                saver.save(_made(trial.folder), 0)  # so that its children import nothing
                log = trial.changes()
                for name, disturb in DISTURBANCES.items():
                    if not given.disturbance or given.disturbance in name:
                        rows.append((name, disk, saver.name, list(disturb(trial, log))))
                        print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    order = list(DISTURBANCES)
    rows.sort(key=lambda row: (order.index(row[0]), row[1]))
    print("\n".join(table(rows)))
    if given.json:
        keys = ("disturbance", "disk", "saver", "found")
        document: list[Any] = [dict(zip(keys, (*row[:3], [one._asdict() for one in row[3]]))) for row in rows]
        given.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


def _made(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


if __name__ == "__main__":
    sys.exit(main())
