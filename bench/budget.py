# SPDX-License-Identifier: Apache-2.0
"""Commands one after the other under one clock: each may take its part of the time that is left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

GRACE_SECONDS = 5.0
"""Between asking a command to end (it removes its scratch files) and ending it."""


class Budget:
    """Seconds that everything together may take."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    def left(self) -> float:
        return max(0.0, self._end - self._clock())

    def share(self, most: float, keep: float = 0.0) -> float:
        """Seconds for one command: at most ``most``, and so that ``keep`` are left for the others."""
        return max(0.0, min(most, self.left() - keep))


@dataclass
class Outcome:
    """How a command ended."""

    status: int
    seconds: float
    timed_out: bool
    output: str
    """The end of what it printed."""

    @property
    def ok(self) -> bool:
        return self.status == 0 and not self.timed_out


def run(
    command: Sequence[str],
    seconds: float,
    log: Path,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Outcome:
    """The command with its output appended to ``log``; ended, and all it started, after ``seconds``."""
    began = time.monotonic()
    with log.open("ab") as out:
        out.write(f"$ {' '.join(command)}\n".encode())
        out.flush()
        begin = out.tell()
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            cwd=cwd,
            start_new_session=True,
        )
    timed_out = False
    try:
        child.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        timed_out = True
    finally:
        _end(child)
    with log.open("rb") as written:
        written.seek(begin)
        output = written.read().decode(errors="replace")
    return Outcome(child.returncode, time.monotonic() - began, timed_out, output[-20_000:])


def _end(child: subprocess.Popen[bytes]) -> None:
    for how, patience in ((signal.SIGINT, GRACE_SECONDS), (signal.SIGKILL, None)):
        if child.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(patience)
