# SPDX-License-Identifier: Apache-2.0
"""One case: one call of one saver fails, or is the last that its process does; and what is wrong afterwards.

Right is: a call that returns has put the new files in place. One that raises has left the old ones, or says
that the new ones stand nevertheless; it names the errno and a file that the caller knows. After a kill a
loader finds the old files or the new ones. Nothing hangs, no descriptor stays open, and the next save through
the same path succeeds and leaves nothing hidden, wherever that lies.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import re
import shutil
import stat
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import calls
import torch
from savers import Broken, CommandFailed, Saver, State

import fastshard

KINDS: Final = ("mixture", "lie", "unsaid", "leak", "hang", "died", "next", "leftover", "mode", "error")
"""Of wrong outcomes: part of a save is there; success is returned that is none; the new files stand and the
error does not say so; a descriptor stays open; the process hangs; it crashes; the next save fails, or is not
what is there after it; something hidden is left; another file mode; an error of another kind, errno, file
name or text."""
KILLED: Final = "KILL"
_LIBRARIES: Final = tuple(
    {
        os.path.realpath(path) + os.sep
        for path in (
            sys.prefix,
            sys.base_prefix,
            "/usr",
            "/lib",
            "/etc",
            os.path.dirname(fastshard.__file__),
            os.path.dirname(torch.__file__),
        )
        if os.path.realpath(path) != "/"
    }
)
_WRITEBACK: Final = ("fsync", "fdatasync", "sync_file_range", "msync")
_MODES: Final = ("chmod", "fchmod", "fchmodat", "fchmodat2")
"""Some filesystems know no modes, and say EPERM: the file is then what they make it."""
_OF_MEMORY: Final = (
    "mmap mprotect mlock madvise clone clone3 memfd_create io_uring_setup io_uring_enter".split()
)
_SAYS_IN_PLACE: Final = re.compile(
    r"\b(is|are) (already )?in place\b|\bnot (yet )?(known to be )?(durable|on stable storage)\b", re.I
)
_HIDDEN_IN_TEXT: Final = re.compile(
    r"[^\s'\":]*\.fastshard-[^\s'\":]*|-> None|\[Errno None\]|memfd:|/proc/self/fd"
)


class Case(NamedTuple):
    saver: str
    call: str
    nth: int
    error: str
    """Name of an errno, or :data:`KILLED`."""


class Wrong(NamedTuple):
    kind: str
    text: str


@dataclass
class Result:
    case: Case
    reached: bool
    outcome: str
    place: str
    """What the call was about."""
    wrong: list[Wrong]


@dataclass
class Template:
    """A saver's folder before a save, and what stands there before, after and on the way."""

    saver: Saver
    folder: str
    old: State
    new: State
    halfway: State | None
    modes: dict[str, int]
    value: object
    log: list[calls.Call]


class Places(NamedTuple):
    """Where the cases of one process work."""

    disk: str
    memory: str

    def root(self, saver: Saver) -> str:
        return os.path.join(self.memory if saver.memory else self.disk, f"work-{os.getpid()}")


def visible(root: str) -> State:
    """What readers see, through links."""
    found: State = {}
    for folder, folders, files in os.walk(root):
        folders[:] = [
            name for name in folders if not name.startswith(".") and (folder, name) != (root, "tmp")
        ]
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in (*files, *links):
            path = os.path.join(folder, name)
            if name.startswith(".") or os.path.isdir(path):
                continue
            relative = os.path.relpath(path, root)
            try:
                with open(path, "rb") as file:
                    found[relative] = file.read()
            except FileNotFoundError:
                found[relative] = None
    return found


def hidden(root: str) -> list[str]:
    """What readers do not see, in the temporary directory too."""
    found = []
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = os.path.join(folder, name)
            if name.startswith(".") or path.startswith(os.path.join(root, "tmp") + os.sep):
                found.append(os.path.relpath(path, root))
    return sorted(found) + sorted(
        name for name in os.listdir("/dev/shm") if "fastshard" in name and _shm_is_private()
    )


def _shm_is_private() -> bool:
    return bool(os.environ.get("FAULTS_PRIVATE_SHM"))


def _modes(root: str) -> dict[str, int]:
    return {
        name: stat.S_IMODE(os.stat(os.path.join(root, name)).st_mode)
        for name, data in visible(root).items()
        if data is not None
    }


def _descriptors() -> Counter[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue
    ours = ("socket:", "/proc/", "anon_inode:", "pipe:", "/dev/null")
    return Counter(path for path in found if not path.startswith(ours))


def _leaked(before: Counter[str]) -> list[str]:
    """What is open that was not; what is closed on a thread of its own has a moment for it."""
    end = time.monotonic() + 3
    while (more := _descriptors() - before) and time.monotonic() < end:
        time.sleep(0.02)
    return list(more)


def enter(root: str, saver: Saver) -> None:
    """In the child, before it is watched."""
    tempfile.tempdir = os.environ["TMPDIR"] = os.path.join(root, "tmp")
    if saver.installed:
        fastshard.install()


def _fill(root: str, folder: str | None) -> None:
    shutil.rmtree(root, ignore_errors=True)
    if folder is None:
        os.makedirs(os.path.join(root, "d"))
        os.makedirs(os.path.join(root, "tmp"))
    else:
        shutil.copytree(folder, root, symlinks=True)


def _do(root: str, saver: Saver, work: Any, what: str) -> Any:
    """Undisturbed, in a child; what it returned."""
    report = calls.run(
        lambda: work(root),
        before=lambda: enter(root, saver),
        after=lambda value, error: (value, traceback_of(error)),
    )
    if report.outcome != "returned":
        raise RuntimeError(f"{saver.name}: {what} does not work: {report.outcome} {report.value}")
    return report.value[0]


def traceback_of(error: BaseException | None) -> str:
    return "".join(traceback.format_exception(error)) if error is not None else ""


def warm(saver: Saver, places: Places) -> None:
    """Saves once in this process, so that its children import nothing."""
    root = places.root(saver)
    _fill(root, None)
    try:
        with fastshard.installed() if saver.installed else contextlib.nullcontext():
            saver.before(root)
            saver.save(root)
    finally:
        shutil.rmtree(root)


def make_template(saver: Saver, places: Places) -> Template:
    root = places.root(saver)
    folder = os.path.join(os.path.dirname(root), "templates", saver.name)
    _fill(root, None)
    _do(root, saver, saver.before, "the save before")
    shutil.copytree(root, folder, symlinks=True)
    old = visible(root)
    halfway = None
    if saver.halfway is not None:
        _do(root, saver, saver.halfway, "the save on the way")
        halfway = visible(root)
        _fill(root, folder)
    value = _do(root, saver, saver.save, "the save")
    new, modes = visible(root), _modes(root)
    if left := hidden(root):
        raise RuntimeError(f"{saver.name} leaves {left} when nothing fails")
    _fill(root, folder)
    report = calls.run(
        lambda: saver.save(root), seen=_seen(), before=lambda: enter(root, saver), keep_log=True
    )
    shutil.rmtree(root)
    return Template(saver, folder, old, new, halfway, modes, value, report.log)


def _seen() -> Any:
    cached: dict[str, bool] = {}

    def seen(name: str, path: str) -> bool:
        if path not in cached:
            cached[path] = not path.startswith(
                (*_LIBRARIES, "socket:", "pipe:", "anon_inode:", "/dev/null", "/dev/urandom")
            )
        return cached[path]

    return seen


def cases_of(template: Template, root: str) -> list[Case]:
    """Every failure of every call, and a kill at every change of a file."""
    found = []
    for call in template.log:
        kind = calls.CALLS[call.name]
        errors = [errno.errorcode[number] for number in kind.errors]
        if call.path.startswith(root) and kind.changes and (call.creates or not call.name.startswith("open")):
            errors.append(KILLED)
        found += [Case(template.saver.name, call.name, call.nth, error) for error in errors]
    return [*found, Case(template.saver.name, "end", 1, KILLED)]


def run_case(case: Case, template: Template, places: Places, limit: float) -> Result:
    saver, root = template.saver, places.root(template.saver)
    _fill(root, template.folder)
    wanted = calls.KILL if case.error == KILLED else getattr(errno, case.error)

    def act(call: calls.Call) -> int | None:
        return wanted if (call.name, call.nth) == (case.call, case.nth) else None

    opened: list[Counter[str]] = []

    def before() -> None:
        enter(root, saver)
        opened.append(_descriptors())

    def after(value: object, error: BaseException | None) -> dict[str, Any]:
        found: dict[str, Any] = {"value": value, "error": _describe(error)}
        _forget(error)
        found["leaked"] = _leaked(opened[0])
        found |= {"state": state_of(root, template), "hidden": hidden(root), "modes": _modes(root)}
        return found | _next_save(root, template)

    report = calls.run(
        lambda: saver.save(root), act=act, seen=_seen(), before=before, after=after, limit=limit
    )
    place = report.hit.path.replace(root, "") if report.hit else ""
    if report.hit is None and report.outcome in ("returned", "raised"):
        return Result(case, False, report.outcome, "", [])
    wrong = list(_judge(case, template, report, root, limit))
    return Result(case, True, report.outcome, place or "memory", wrong)


def state_of(root: str, template: Template) -> str:
    now = visible(root)
    named = {"new": template.new, "old": template.old, "halfway": template.halfway}
    for name, state in named.items():
        if now == state:
            return name
    return f"a mixture ({', '.join(_mixture(now, template))})"


def _mixture(now: State, template: Template) -> list[str]:
    found = []
    for name in sorted({*now, *template.old, *template.new}):
        data = now.get(name)
        new, old = template.new.get(name), template.old.get(name)
        if name not in now:
            what = "missing" if name in template.new and name in template.old else ""
            what = what or ("not yet" if name in template.new else "gone")
        elif data is None:
            what = "leads nowhere"
        elif new == old == data:
            continue
        else:
            what = "new" if data == new else "old" if data == old else "broken"
        found.append(f"{name.removeprefix('d/')}: {what}")
    return found[:8]


def _next_save(root: str, template: Template) -> dict[str, Any]:
    """In the child."""
    try:
        (template.saver.again or template.saver.save)(root)
    except BaseException as error:
        return {"next": f"raises {type(error).__name__}: {error}".replace(root, ""), "left": hidden(root)}
    end = time.monotonic() + 2  # what is removed on a thread of its own
    while (left := hidden(root)) and time.monotonic() < end:
        time.sleep(0.02)
    state = state_of(root, template)
    return {"next": "" if state == "new" else f"leaves {state}", "left": left}


def _forget(error: BaseException | None) -> None:
    """A traceback keeps what its frames have open."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()


def _describe(error: BaseException | None) -> dict[str, Any] | None:
    if error is None:
        return None
    chain, published = error, False
    texts = []
    while chain is not None:
        published |= getattr(chain, "published", False) is True
        texts += getattr(chain, "__notes__", [])
        chain = chain.__cause__  # type: ignore[assignment]
    filename = getattr(error, "filename", None)
    return {
        "types": [kind.__name__ for kind in type(error).__mro__],
        "text": " ".join([str(error), *texts]),
        "errno": getattr(error, "errno", None),
        "filename": os.fsdecode(filename)
        if isinstance(filename, (str, bytes))
        else filename and str(filename),
        "published": published,
        "trace": traceback_of(error),
    }


def _judge(case: Case, template: Template, report: calls.Report, root: str, limit: float) -> Iterable[Wrong]:
    saver, found = template.saver, report.value
    if report.outcome == "hung":
        yield Wrong("hang", "hangs")
        return
    if report.outcome in ("died", "failed"):
        yield Wrong("died", f"dies {found or ''}")
        return
    if report.outcome == "killed":
        yield from judge_kill(template, root, limit)
        return
    hit = report.hit
    assert hit is not None
    if report.outcome == "returned":
        if found["state"] != "new":
            yield Wrong("lie", f"returns, and what stands is {found['state']}")
        elif found["value"] != template.value:
            yield Wrong("lie", "returns another value")
        elif (saver.durable or saver.waits) and case.call in _WRITEBACK and hit.path.startswith(root):
            yield Wrong("lie", f"returns although {case.call} failed")
        elif found["modes"] != template.modes and not (case.call in _MODES and case.error == "EPERM"):
            yield Wrong("mode", f"returns with modes {_differences(found['modes'], template.modes)}")
    else:
        told = found["error"]
        says = told["published"] or _SAYS_IN_PLACE.search(told["text"]) is not None
        if found["state"] not in ("old", "halfway") and not (found["state"] == "new" and says):
            if found["state"] == "new":
                yield Wrong("unsaid", f"raises, and the new files stand: {_shown(told, root)}")
            else:
                yield Wrong("mixture", f"raises, and what stands is {found['state']}")
        elif found["state"] == "old" and says:
            yield Wrong("error", f"says that the new files stand: {_shown(told, root)}")
        if found["hidden"] and case.call not in ("unlink", "unlinkat", "rmdir") and not says:
            yield Wrong("leftover", f"raises and leaves {found['hidden'][0]}")
        yield from _judge_error(saver, case, hit, told, root)
    # torch.load(mmap=True) does not close the file that it cannot map.
    if found["leaked"] and not (case.call == "mmap" and saver.name.startswith("convert")):
        yield Wrong("leak", f"leaves open {found['leaked'][0].replace(root, '')}")
    if found["next"]:
        yield Wrong("next", f"the next save {found['next']}")
    if found["left"]:
        yield Wrong("leftover", f"the next save leaves {found['left'][0]}")


def _differences(found: dict[str, int], expected: dict[str, int]) -> str:
    return ", ".join(
        f"{name}: {found.get(name, 0):o} not {mode:o}"
        for name, mode in expected.items()
        if found.get(name) != mode
    )


def _shown(told: dict[str, Any], root: str) -> str:
    return f"{told['types'][0]}: {told['text']}".replace(root, "")


def _judge_error(
    saver: Saver, case: Case, hit: calls.Call, told: dict[str, Any], root: str
) -> Iterable[Wrong]:
    shown = _shown(told, root)
    number = getattr(errno, case.error)
    types = told["types"]
    if found := _HIDDEN_IN_TEXT.search(told["text"]):
        yield Wrong("error", f"says {found[0]!r}: {shown}")
    elif os.path.join(root, "tmp") in told["text"]:
        yield Wrong("error", f"names a temporary directory: {shown}")
    if CommandFailed.__name__ in types:
        if os.strerror(number) not in told["text"] and not (
            case.call in _OF_MEMORY and "memory" in told["text"].lower()
        ):
            yield Wrong("error", f"does not say {os.strerror(number)!r}: {shown}")
        if "Traceback" in told["text"]:
            yield Wrong("error", f"ends in a traceback: {shown}")
        return
    if case.call in _OF_MEMORY and ("MemoryError" in types or "can't start new thread" in told["text"]):
        return
    if "OSError" not in types:
        yield Wrong("error", f"raises no OSError: {shown}")
        return
    if told["errno"] == errno.EEXIST and saver.installed and "stat" in case.call:
        return  # of the other library's os.makedirs(), which takes a folder that it cannot look at for a file
    if told["errno"] != number:
        name = errno.errorcode.get(told["errno"], told["errno"])
        yield Wrong("error", f"raises {name}: {shown}")
    filename = told["filename"]
    if filename is None:
        if hit.path.startswith((root, "/memfd:")):
            yield Wrong("error", f"names no file: {shown}")
    elif hit.path.startswith(root) and not filename.startswith(root):
        yield Wrong("error", f"names another file, {filename.replace(root, '')}")
    elif ".fastshard-" in filename or filename.startswith(os.path.join(root, "tmp") + os.sep):
        yield Wrong("error", f"names a hidden file, {filename.replace(root, '')}")


def judge_kill(template: Template, root: str, limit: float) -> Iterable[Wrong]:
    saver = template.saver
    now = visible(root)
    if not _is_whole(now, template):
        yield Wrong("mixture", f"after a kill there is a mixture ({', '.join(_mixture(now, template))})")
    report = calls.run(
        lambda: None,
        before=lambda: enter(root, saver),
        after=lambda value, error: _next_save(root, template),
        limit=limit,
    )
    if report.outcome != "returned":
        yield Wrong("next", f"the next save {report.outcome}")
        return
    if report.value["next"]:
        yield Wrong("next", f"the next save {report.value['next']}")
    if report.value["left"]:
        yield Wrong("leftover", f"the next save leaves {report.value['left'][0]}")


def _is_whole(now: State, template: Template) -> bool:
    """Whether a loader finds one of the saves that may be there."""
    saver = template.saver
    right = [state for state in (template.old, template.new, template.halfway) if state is not None]
    if now in right:
        return True
    if saver.each:
        names = {*now, *template.old, *template.new}
        return all(any(now.get(name, b"") == state.get(name, b"") for state in right) for name in names)
    if saver.reads is None:
        return False
    try:
        return saver.reads(now) in [saver.reads(state) for state in right]
    except (Broken, ValueError, KeyError):
        return False
