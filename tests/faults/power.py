# SPDX-License-Identifier: Apache-2.0
"""Power cuts: what a disk holds in the middle of a durable save, and after it returned.

The filesystem is an ext4 that helps nobody (``data=writeback,noauto_da_alloc``) on a disk that remembers all
it was told. For each cut the disk is made anew as it would be found, mounted (the journal is replayed), and
looked at: a loader must find the old files or the new ones, only the new ones if the save had returned; and
the next save succeeds and leaves nothing hidden.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import calls
import cases
import disk
import places as filesystems
from cases import Wrong
from savers import Saver

OPTIONS: Final = "data=writeback,noauto_da_alloc"
_IMAGE_NBYTES: Final = 48 << 20


class Cut(NamedTuple):
    saver: str
    number: int
    """Of how many the power fails at this one: it is all that is needed to repeat it."""


@dataclass
class Outcome:
    cut: Cut
    place: str
    wrong: list[Wrong]


@dataclass
class Recording:
    """What the disk was told in one save."""

    template: cases.Template
    image: str
    """The disk before."""
    record: list[tuple[int, bytes]] = field(default_factory=list)
    returned: int = 0
    """How much of the record was there when the save had returned."""


def refusal() -> str:
    """Why the power cannot be cut here; empty where it can."""
    if os.getuid():
        return "power cuts need root"
    if filesystems.mkfs() is None or shutil.which("losetup") is None:
        return "power cuts need mkfs.ext4 and losetup"
    if not os.path.exists("/dev/fuse") or not os.path.exists("/dev/loop-control"):
        return "power cuts need FUSE and loop devices"
    if not os.environ.get("FAULTS_PRIVATE_SHM"):
        return "power cuts need mounts of one's own"
    return ""


def record(saver: Saver, template: cases.Template, memory: str) -> Recording:
    """Saves once, on a disk that remembers."""
    folder = os.path.join(memory, "power", saver.name)
    os.makedirs(folder)
    made = Recording(template, os.path.join(folder, "before"))
    with open(made.image, "wb") as file:
        file.truncate(_IMAGE_NBYTES)
    mounted = os.path.join(folder, "mounted")
    if not filesystems.mount_ext4(made.image, mounted):
        raise RuntimeError("an ext4 cannot be made and mounted here")
    try:
        shutil.copytree(template.folder, os.path.join(mounted, "root"), symlinks=True)
    finally:
        filesystems.run("umount", mounted)
    with disk.recorded(made.image, folder, OPTIONS) as (told, place):
        root = os.path.join(place, "root")
        report = calls.run(
            lambda: saver.save(root),
            before=lambda: cases.enter(root, saver),
            after=lambda value, error: (len(told), cases.traceback_of(error)),
        )
        if report.outcome != "returned":
            raise RuntimeError(f"{saver.name}: does not work on a recorded disk: {report.value}")
        made.returned = report.value[0]
    made.record = list(told)
    os.unlink(os.path.join(folder, "log"))
    return made


def after_return(which: Cut) -> bool:
    """Every third one."""
    return which.number % 3 == 2


def cut(recording: Recording, which: Cut, memory: str) -> Outcome:
    """Every other one loses what was not flushed."""
    saver, template = recording.template.saver, recording.template
    chance = random.Random(f"{which.saver} {which.number}")
    finished = after_return(which)
    length = (
        chance.randint(recording.returned, len(recording.record))
        if finished
        else chance.randint(0, recording.returned)
    )
    loses = which.number % 2 == 1
    folder = os.path.join(memory, "power", f"cut-{os.getpid()}")
    os.makedirs(folder, exist_ok=True)
    image, mounted = os.path.join(folder, "image"), os.path.join(folder, "mounted")
    shutil.copyfile(recording.image, image)
    disk.cut(image, recording.record, length, chance if loses else None)
    place = f"entry {length} of {len(recording.record)}, returned at {recording.returned}" + (
        ", unflushed writes lost" if loses else ""
    )
    os.makedirs(mounted, exist_ok=True)
    if filesystems.run("mount", "-o", f"loop,{OPTIONS}", image, mounted):
        return Outcome(which, place, [Wrong("died", "cannot be mounted")])
    try:
        root = os.path.join(mounted, "root")
        wrong = list(_judge(template, root, saver, finished))
    finally:
        filesystems.run("umount", "-l", mounted)
    return Outcome(which, place, wrong)


def _judge(template: cases.Template, root: str, saver: Saver, finished: bool) -> Iterable[Wrong]:
    if finished:
        found = cases.state_of(root, template)
        if found != "new":
            yield Wrong("lie", f"the save had returned, and what stands is {found}")
    yield from (
        wrong for wrong in cases.judge_kill(template, root, 60.0) if not finished or wrong.kind != "mixture"
    )
