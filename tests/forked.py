# SPDX-License-Identifier: Apache-2.0
"""Python scripts run in processes of their own that need not import torch, which takes a second and a half of a core.

Each is forked from a process that has imported torch and done nothing else: no thread, nothing of fastshard. A script
that begins with :data:`PRELUDE` comes from one that has imported fastshard, too. From there on it is what ``python -c`` makes: the script is ``__main__``, its environment, folder and output are its own, and the
interpreter ends as it always does, but that torch's own objects are frozen to the garbage collector, which would take
half a second at the end: ``gc.unfreeze()`` in scripts about the end, and in those that replace functions, for whose
referrers fastshard asks the collector. A variable that the start of Python, the dynamic loader or torch may read gets a
process with that value to fork from; so tests of what is imported first, or before what, start Python themselves.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

TESTS = Path(__file__).resolve().parent
ANSWER_BYTES = 32
PRELUDE = "import sys, os, torch, fastshard\nfrom fastshard import *\n"

# Two processes, of which the second runs the prelude before its first script. One child of each at a time: it tells the
# child's number, then how it ended.
_SERVER = """
import gc, json, os, socket, sys
import torch

gc.collect()
gc.freeze()

def requested(number, prelude):
    control = socket.socket(fileno=number)
    while True:
        request, files, *_ = socket.recv_fds(control, 1 << 20, 2)
        if not request:
            os._exit(0)
        exec(prelude, {})
        pid = os.fork()
        if pid == 0:
            control.close()
            for number, file in enumerate(files, 1):
                os.dup2(file, number)
                os.close(file)
            return json.loads(request)
        for file in files:
            os.close(file)
        control.send(str(pid).encode())
        control.send(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())

plain, ready = map(int, sys.argv[1:3])
second = os.fork() == 0
os.close(plain if second else ready)
script, sys.argv, variables, folder = requested(ready, sys.argv[3]) if second else requested(plain, "")
os.environ.clear()
os.environ.update(variables)
os.chdir(folder)
del gc, json, os, requested, socket, torch, variables, folder, plain, ready, second
exec(compile(script, "<string>", "exec"))
"""
_servers: dict[
    frozenset[tuple[str, str]], tuple[tuple[socket.socket, socket.socket], subprocess.Popen[bytes]]
] = {}


def _server(environment: Mapping[str, str], ready: bool) -> socket.socket:
    """The connection to the process to fork from; to the one that has run the prelude, if ``ready``."""
    # What nothing reads before the script begins.
    late = ("FASTSHARD_", "PYTEST_", "REFUSE")
    key = frozenset((name, value) for name, value in environment.items() if not name.startswith(late))
    if key not in _servers:
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
        passed = [theirs.fileno() for _, theirs in pairs]
        command = [sys.executable, "-c", _SERVER, *map(str, passed), PRELUDE]
        quiet = subprocess.DEVNULL
        process = subprocess.Popen(
            command, stdin=quiet, stdout=quiet, pass_fds=passed, env=dict(key), cwd=TESTS
        )
        for _, theirs in pairs:
            theirs.close()
        _servers[key] = (pairs[0][0], pairs[1][0]), process
    return _servers[key][0][ready]


def preloading(library: Path) -> dict[str, str]:
    """An environment in which the dynamic loader puts the library before all others but what it puts there already: a
    sanitizer has to come first."""
    libraries = [os.environ.get("LD_PRELOAD", ""), str(library)]
    return {**os.environ, "LD_PRELOAD": " ".join(filter(None, libraries))}


@atexit.register
def _end() -> None:
    for connections, process in _servers.values():
        for connection in connections:
            connection.close()  # which it takes for the end
        process.wait()


class Started:
    """A script that runs, with what of ``subprocess.Popen`` the tests use. One at a time can run (of those with the prelude,
    and of those without)."""

    def __init__(
        self,
        script: str,
        *arguments: object,
        stdout: int,
        stderr: int,
        env: Mapping[str, str] | None = None,
        cwd: os.PathLike[str] | str = TESTS,
    ) -> None:
        environment = dict(os.environ if env is None else env)
        script = textwrap.dedent(script)
        self._server = _server(environment, script.startswith(PRELUDE))
        argv = ["-c", *map(str, arguments)]
        request = json.dumps([script, argv, environment, os.fspath(cwd)])
        socket.send_fds(self._server, [request.encode()], [stdout, stderr])
        told = self._server.recv(ANSWER_BYTES)
        assert told, "the process to fork from has ended"
        self.pid = int(told)
        self.returncode: int | None = None

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def wait(self, timeout: float = 300) -> int:
        if self.returncode is None:
            if not select.select([self._server], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("a forked script", timeout)
            self.returncode = int(self._server.recv(ANSWER_BYTES))
        return self.returncode


@contextlib.contextmanager
def started(script: str, *arguments: object, **options: object) -> Iterator[tuple[Started, IO[str]]]:
    """A script that runs while the test goes on, and its output; killed at the end if it still runs."""
    reader, writer = os.pipe()
    with os.fdopen(reader) as output:
        try:
            child = Started(script, *arguments, stdout=writer, stderr=2, **options)  # type: ignore[arg-type]
        finally:
            os.close(writer)
        try:
            yield child, output
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()


def run(
    script: str, *arguments: object, timeout: float = 300, **options: object
) -> subprocess.CompletedProcess[str]:
    """As ``subprocess.run`` of ``python -c``, with its output captured as text."""
    with (
        os.fdopen(os.memfd_create("stdout"), "w+") as stdout,
        os.fdopen(os.memfd_create("stderr"), "w+") as stderr,
    ):
        child = Started(script, *arguments, stdout=stdout.fileno(), stderr=stderr.fileno(), **options)  # type: ignore[arg-type]
        try:
            code = child.wait(timeout)
        except BaseException:
            child.send_signal(signal.SIGKILL)
            child.wait()
            raise
        said = []
        for file in (stdout, stderr):
            file.seek(0)
            said.append(file.read())
        return subprocess.CompletedProcess(["-c", *map(str, arguments)], code, *said)
