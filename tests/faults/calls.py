# SPDX-License-Identifier: Apache-2.0
"""System calls of a forked child, watched: each can be made to fail, or be the last thing that the child
does.

A seccomp filter in the child hands every call of :data:`CALLS` to this process before the kernel does it,
whoever makes it: Python, the engine's threads, torch. The supervisor lets the call go on, answers in the
kernel's place with an errno, or kills the child. No root is needed; Linux 5.9 or newer, on x86-64 or aarch64.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import os
import pickle
import platform
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

_TABLE: Final = """
open            2   -    path0   ! EIO EMFILE EINTR
openat          257 56   at0     ! EIO EMFILE EINTR
openat2         437 437  at0     ! EIO EMFILE
creat           85  -    path0   ! EIO ENOSPC
close           3   57   fd0     . EIO
stat            4   -    path0   . EIO EACCES
lstat           6   -    path0   . EIO EACCES
fstat           5   80   fd0     . EIO
newfstatat      262 79   at0     . EIO EACCES
statx           332 291  at0     . EIO EACCES
access          21  -    path0   . EIO
faccessat       269 48   at0     . EIO
faccessat2      439 439  at0     . EIO
readlink        89  -    path0   . EIO EACCES
readlinkat      267 78   at0     . EIO EACCES
getdents64      217 61   fd0     . EIO
statfs          137 43   path0   . EIO
fstatfs         138 44   fd0     . EIO
lseek           8   62   fd0     . EIO
read            0   63   fd0     . EIO
pread64         17  67   fd0     . EIO
preadv          295 69   fd0     . EIO
write           1   64   fd0     ! EIO ENOSPC EINTR
pwrite64        18  68   fd0     ! EIO ENOSPC EINTR
writev          20  66   fd0     ! EIO ENOSPC
pwritev         296 70   fd0     ! EIO ENOSPC EINTR
pwritev2        328 287  fd0     ! EIO ENOSPC
sendfile        40  71   fd0     ! EIO ENOSPC
copy_file_range 326 285  fd2     ! EIO ENOSPC
fallocate       285 47   fd0     ! EIO ENOSPC EINTR
truncate        76  45   path0   ! EIO
ftruncate       77  46   fd0     ! EIO ENOSPC
fsync           74  82   fd0     ! EIO ENOSPC
fdatasync       75  83   fd0     ! EIO ENOSPC
sync_file_range 277 84   fd0     ! EIO
msync           26  227  anon    ! EIO
fadvise64       221 223  fd0     . EIO
rename          82  -    path1   ! EIO ENOSPC
renameat        264 38   at2     ! EIO ENOSPC
renameat2       316 276  at2     ! EIO ENOSPC
link            86  -    path1   ! EIO EPERM
linkat          265 37   at2     ! EIO EPERM
symlink         88  -    path1   ! EIO EPERM
symlinkat       266 36   at1     ! EIO EPERM
unlink          87  -    path0   ! EIO EPERM
unlinkat        263 35   at0     ! EIO EPERM
rmdir           84  -    path0   ! EIO EPERM
mkdir           83  -    path0   ! EIO ENOSPC
mkdirat         258 34   at0     ! EIO ENOSPC
chmod           90  -    path0   ! EIO EPERM
fchmod          91  52   fd0     ! EIO EPERM
fchmodat        268 53   at0     ! EIO EPERM
fchmodat2       452 452  at0     ! EIO EPERM
chown           92  -    path0   ! EIO EPERM
fchown          93  55   fd0     ! EIO EPERM
lchown          94  -    path0   ! EIO EPERM
fchownat        260 54   at0     ! EIO EPERM
utimensat       280 88   at0     ! EIO EPERM
getxattr        191 8    path0   . EIO
lgetxattr       192 9    path0   . EIO
fgetxattr       193 10   fd0     . EIO
listxattr       194 11   path0   . EIO
llistxattr      195 12   path0   . EIO
flistxattr      196 13   fd0     . EIO
setxattr        188 5    path0   ! EIO EPERM
lsetxattr       189 6    path0   ! EIO EPERM
fsetxattr       190 7    fd0     ! EIO EPERM
flock           73  32   fd0     . EIO ENOLCK EINTR
fcntl           72  25   fd0     . EIO ENOLCK
mmap            9   222  fd4     . ENOMEM EAGAIN
mprotect        10  226  anon    . ENOMEM
mlock           149 228  anon    . ENOMEM
madvise         28  233  anon    . EIO ENOMEM
clone           56  220  anon    . EAGAIN ENOMEM
clone3          435 435  anon    . EAGAIN ENOMEM
memfd_create    319 279  path0   . EMFILE ENOMEM
io_uring_setup  425 425  anon    . ENOMEM EPERM
io_uring_enter  426 426  anon    ! EIO EAGAIN EINTR
"""
# name, its number on x86-64 and on aarch64, where its path is (pathN: argument N; atN: a folder's descriptor
# there and the path behind it; fdN: a descriptor), ! where it may change a filesystem, and the errors that it
# is made to fail with.
_LOCKS: Final = frozenset((5, 6, 7, 36, 37, 38))
"""What fcntl() is asked for when it is about locks; all else goes on unseen."""
_MARK: Final = 0x7FFFFFFF
"""flock() of this descriptor tells the supervisor that the work begins and that it has ended."""
_NOTIFICATION: Final = struct.Struct("=QIIiIQ6Q")
_ANSWER: Final = struct.Struct("=QqiI")
_RECEIVE, _SEND, _ADD_DESCRIPTOR = 0xC0502100, 0xC0182101, 0x40182103
_IDLE_SECONDS: Final = 4.0
_libc = ctypes.CDLL(None, use_errno=True)


class CallKind(NamedTuple):
    """A row of the table."""

    name: str
    number: int
    place: str
    changes: bool
    errors: tuple[int, ...]


def _rows(column: int) -> dict[int, CallKind]:
    rows = (line.split() for line in _TABLE.split("\n") if line)
    return {
        int(row[column]): CallKind(
            row[0], int(row[column]), row[3], row[4] == "!", tuple(getattr(errno, name) for name in row[5:])
        )
        for row in rows
        if row[column] != "-"
    }


MACHINE: Final = platform.machine() if sys.platform == "linux" else ""
_BY_NUMBER: Final = _rows(2 if MACHINE == "aarch64" else 1)
CALLS: Final = {kind.name: kind for kind in _BY_NUMBER.values()}


class Call(NamedTuple):
    """One call of the child: the ``nth`` of its name, on ``path`` ("" where there is none)."""

    name: str
    nth: int
    path: str
    creates: bool


Act = Callable[[Call], "int | None"]
"""What becomes of a call: an errno, :data:`KILL`, or ``None``: it goes on."""
KILL: Final = -1


@dataclass
class Report:
    """How the child's work ended."""

    outcome: str
    """"returned", "raised", "killed", "hung", or "died"."""
    value: Any = None
    """Of ``after()``, which was given what the work returned or raised."""
    hit: Call | None = None
    """What was made to fail, or was killed at."""
    log: list[Call] = field(default_factory=list)


def refusal() -> str:
    """Why calls cannot be watched here; empty where they can."""
    if MACHINE not in ("x86_64", "aarch64"):
        return "calls are watched by a seccomp filter, which is written for Linux on x86-64 and aarch64"
    pid = os.fork()
    if pid == 0:
        try:
            _install_filter()  # not closed: that call would wait for a supervisor
        except OSError as error:
            os._exit(error.errno or 1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return f"seccomp's user notification is refused: {os.strerror(status)}" if status else ""


def end_with_parent() -> None:
    """This process is killed when the one that forked it ends, however that ends."""
    _libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def run(
    work: Callable[[], Any],
    *,
    act: Act = lambda call: None,
    seen: Callable[[str, str], bool] = lambda name, path: True,
    before: Callable[[], None] = lambda: None,
    after: Callable[[Any, BaseException | None], Any] = lambda value, error: None,
    limit: float = 60.0,
    keep_log: bool = False,
) -> Report:
    """Does ``work()`` in a forked child, where ``act`` decides about each of its calls that ``seen`` (of name
    and path) admits.

    ``before()`` and ``after()`` run in the child, too, and are not watched. A child that has done nothing for
    some seconds, with all of its threads asleep, hangs, and so does one that takes longer than ``limit``.
    """
    here, there = socket.socketpair()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        here.close()
        _child(there, work, before, after)
    there.close()
    supervisor = _Supervisor(pid, here, act, seen, limit, keep_log)
    try:
        report = supervisor.watch()
    finally:
        supervisor.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return report


def _child(
    there: socket.socket,
    work: Callable[[], Any],
    before: Callable[[], None],
    after: Callable[[Any, BaseException | None], Any],
) -> None:
    try:
        end_with_parent()
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        if not os.environ.get("FAULTS_STDERR"):
            os.dup2(quiet, 2)
        os.close(quiet)
        fd = _install_filter()
        there.sendmsg([b"F"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
        os.close(fd)
        before()
        value, error = None, None
        _libc.flock(_MARK, 1)
        try:
            value = work()
        except BaseException as caught:
            error = caught
        _libc.flock(_MARK, 0)
        data = pickle.dumps(("raised" if error else "returned", after(value, error)))
        there.sendall(struct.pack("I", len(data)) + data)
    except BaseException:
        import traceback

        data = pickle.dumps(("failed", traceback.format_exc()))
        there.sendall(struct.pack("I", len(data)) + data)
    finally:
        os._exit(0)


def _install_filter(watched: Iterable[str] = ()) -> int:
    """Hands the calls of these names, or all of them, made by this thread and those that it starts, to whoever
    reads the descriptor that is returned."""
    numbers = [CALLS[name].number for name in watched] or list(_BY_NUMBER)
    code = [(0x20, 0, 0, 0)]  # load the number of the call
    for number in sorted(numbers):
        code += [(0x15, 0, 1, number), (0x06, 0, 0, 0x7FC00000)]  # SECCOMP_RET_USER_NOTIF
    code.append((0x06, 0, 0, 0x7FFF0000))  # SECCOMP_RET_ALLOW
    raw = b"".join(struct.pack("HBBI", *instruction) for instruction in code)
    buffer = ctypes.create_string_buffer(raw, len(raw))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]

    _libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    number = 277 if MACHINE == "aarch64" else 317
    fd: int = _libc.syscall(number, 1, 8, ctypes.byref(Program(len(code), ctypes.addressof(buffer))))
    if fd < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return fd


class Held(NamedTuple):
    """A call that waits for an answer."""

    identity: int
    thread: int
    name: str
    arguments: tuple[int, ...]


class Holding:
    """Calls of this very process and of the processes that it forks, each of which waits for an answer.

    Whoever answers must not make such a call. A process can be held so only once.
    """

    def __init__(self, *names: str) -> None:
        self._fd = _install_filter(names)

    def next(self) -> Held:
        """Waits for a call."""
        buffer = bytearray(_NOTIFICATION.size)
        fcntl.ioctl(self._fd, _RECEIVE, buffer)
        identity, thread, _, number, _, _, *arguments = _NOTIFICATION.unpack(bytes(buffer))
        return Held(identity, thread, _BY_NUMBER[number].name, tuple(arguments))

    def answer(self, held: Held, error: int = 0) -> None:
        """The call fails, or goes on."""
        with contextlib.suppress(FileNotFoundError):  # its process has gone
            fcntl.ioctl(self._fd, _SEND, bytearray(_ANSWER.pack(held.identity, 0, -error, 0 if error else 1)))

    def answer_all(self, decide: Callable[[Held], int] = lambda held: 0) -> None:
        """Answers all that come from here on, in a thread."""

        def answer() -> None:
            while True:
                with contextlib.suppress(FileNotFoundError):
                    held = self.next()
                    self.answer(held, decide(held))

        threading.Thread(target=answer, daemon=True).start()


class _Supervisor:
    """Answers the calls of one child."""

    def __init__(
        self,
        pid: int,
        channel: socket.socket,
        act: Act,
        seen: Callable[[str, str], bool],
        limit: float,
        keep_log: bool,
    ) -> None:
        self._pid = pid
        self._channel = channel
        self._act = act
        self._seen = seen
        self._limit = limit
        self._keep_log = keep_log
        self._armed = False
        self._count: Counter[str] = Counter()
        self._report = Report("died")
        message, extra, _, _ = channel.recvmsg(1, 64)
        self._fd: int = struct.unpack("i", extra[0][2][:4])[0] if message and extra else -1

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._channel.close()

    def watch(self) -> Report:
        if self._fd < 0:
            return self._report
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(self._channel, select.POLLIN)
        data = b""
        end = time.monotonic() + self._limit
        idle = _Idle(self._pid)
        while True:
            events = dict(poll.poll(200))
            if events.get(self._fd, 0) & select.POLLIN:
                idle.reset()
                if not self._answer():
                    return self._report
            elif events.get(self._fd, 0) & select.POLLHUP:
                poll.unregister(self._fd)
            if self._channel.fileno() in events:
                got = self._channel.recv(1 << 20)
                data += got
                if len(data) >= 4 and len(data) >= 4 + struct.unpack("I", data[:4])[0]:
                    self._report.outcome, self._report.value = pickle.loads(data[4:])
                    return self._report
                if not got:
                    return self._report
            if time.monotonic() > end or not events and idle.for_long():
                self._report.outcome = "hung"
                return self._report

    def _answer(self) -> bool:
        """Whether the child lives on."""
        buffer = bytearray(_NOTIFICATION.size)
        try:
            fcntl.ioctl(self._fd, _RECEIVE, buffer)
        except OSError:  # it was killed meanwhile, or interrupted
            return True
        identity, thread, _, number, _, _, *arguments = _NOTIFICATION.unpack(bytes(buffer))
        kind = _BY_NUMBER[number]
        if kind.name == "flock" and arguments[0] & 0xFFFFFFFF == _MARK:
            self._armed = bool(arguments[1] & 1)
            if not self._armed and self._act(Call("end", 1, "", False)) == KILL:
                self._report.outcome, self._report.hit = "killed", Call("end", 1, "", False)
                return False
            self._send(identity, 0)
            return True
        decision = self._decide(kind, thread, arguments) if self._armed else None
        if decision == KILL:
            os.kill(self._pid, signal.SIGKILL)
            self._report.outcome = "killed"
            return False
        if decision is not None and kind.name == "close":
            self._close_in_child(identity, arguments[0] & 0xFFFFFFFF)
        self._send(identity, decision)
        return True

    def _decide(self, kind: CallKind, thread: int, arguments: list[int]) -> int | None:
        if kind.name == "fcntl" and arguments[1] not in _LOCKS:
            return None
        path = _path(thread, kind.place, arguments)
        if not self._seen(kind.name, path):
            return None
        self._count[kind.name] += 1
        call = Call(kind.name, self._count[kind.name], path, _creates(kind.name, arguments))
        if self._keep_log:
            self._report.log.append(call)
        decision = self._act(call)
        if decision is not None and self._report.hit is None:
            self._report.hit = call
        return decision

    def _send(self, identity: int, error: int | None) -> None:
        flags = 1 if error is None else 0  # SECCOMP_USER_NOTIF_FLAG_CONTINUE
        with contextlib.suppress(FileNotFoundError):  # the call was interrupted by a signal
            fcntl.ioctl(self._fd, _SEND, bytearray(_ANSWER.pack(identity, 0, -(error or 0), flags)))

    def _close_in_child(self, identity: int, descriptor: int) -> None:
        """As a close() that fails closes all the same: what is left in its place leads to the null device."""
        null = os.open(os.devnull, os.O_RDONLY)
        request = bytearray(struct.pack("=QIIII", identity, 1, null, descriptor, 0))
        try:
            with contextlib.suppress(FileNotFoundError):  # the call, or the process, has ended meanwhile
                fcntl.ioctl(self._fd, _ADD_DESCRIPTOR, request)
        finally:
            os.close(null)


class _Idle:
    """Whether a process has done nothing for a while: every thread asleep, and no processor time spent."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.reset()

    def reset(self) -> None:
        self._since: float | None = None
        self._spent = 0

    def for_long(self) -> bool:
        asleep, spent = True, 0
        try:
            for thread in os.listdir(f"/proc/{self._pid}/task"):
                with open(f"/proc/{self._pid}/task/{thread}/stat") as file:
                    fields = file.read().rpartition(")")[2].split()
                asleep &= fields[0] == "S"
                spent += int(fields[11]) + int(fields[12])
        except OSError:
            return False
        if self._since is None or not asleep or spent > self._spent + 2:
            self._since, self._spent = time.monotonic(), spent
        return time.monotonic() - self._since > _IDLE_SECONDS


def _creates(name: str, arguments: list[int]) -> bool:
    flags = {"open": 1, "openat": 2}.get(name)
    temporary = 0o20000000
    return flags is not None and bool(arguments[flags] & (os.O_CREAT | os.O_TRUNC | temporary))


def _path(thread: int, place: str, arguments: list[int]) -> str:
    """The path that the call is about; a descriptor's is what it leads to."""
    try:
        if place.startswith("fd"):
            return os.readlink(f"/proc/{thread}/fd/{_signed(arguments[int(place[2:])])}")
        if place.startswith("path"):
            return os.path.join(os.readlink(f"/proc/{thread}/cwd"), _text(thread, arguments[int(place[4:])]))
        if place.startswith("at"):
            folder = _signed(arguments[int(place[2:])])
            path = _text(thread, arguments[int(place[2:]) + 1])
            if path.startswith("/"):
                return path
            base = os.readlink(f"/proc/{thread}/cwd" if folder == -100 else f"/proc/{thread}/fd/{folder}")
            return os.path.join(base, path) if path else base
    except OSError:
        pass
    return ""


def _signed(argument: int) -> int:
    return ctypes.c_int(argument & 0xFFFFFFFF).value


def _text(thread: int, address: int) -> str:
    if not address:
        return ""
    with open(f"/proc/{thread}/mem", "rb", 0) as memory:
        memory.seek(address)
        return os.fsdecode(memory.read(512).split(b"\0")[0])
