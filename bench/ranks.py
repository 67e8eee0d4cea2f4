# SPDX-License-Identifier: Apache-2.0
"""Cases whose sides run in several ranks at once: the same rounds, ceilings and figures as all others have.

The ranks are processes that stay for a whole case. A run is timed from the moment when the first rank leaves a barrier
until the last one has ended, by the clock that all processes share.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import random
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from . import memory
from .ceilings import CEILINGS
from .fitting import NO_TIME, Settings, asked, fitting, why_not
from .harness import empty, settle, skipped, text_of
from .job import SOURCES, Rival, Shard
from .machine import MEMORY_BACKED, memory_nbytes, mount_of
from .rank_cases import RankCase
from .rank_job import fill, shared_nbytes
from .rank_process import Spec, command
from .rank_readers import READERS
from .rivals_ranks import RANK_RIVALS
from .samples import FILE, STALL, CaseResult, Memory, Row
from .verify import Mismatch, Written

PATIENCE_SECONDS = 20.0
"""For the other ranks once one of them has failed: they may wait for it in a collective."""
SHARDS = 4
LOADED = "loaded"


class Failed(Exception):
    """A side has failed on a rank."""

    def __init__(self, text: str, absent: bool = False) -> None:
        super().__init__(text)
        self.absent = absent


class Group:
    """Processes that are ranks of one group."""

    def __init__(self, specs: list[Spec]) -> None:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.ranks = [
            subprocess.Popen(
                command(replace(spec, port=self.store.port)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                pass_fds=[spec.memory],
                text=True,
            )
            for spec in specs
        ]
        self.broken = False

    def tell(self, **told: Any) -> None:
        for rank in self.ranks:
            assert rank.stdin
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps(told), file=rank.stdin, flush=True)

    def ask(
        self, watch: Callable[[], None] = lambda: None, every: float = 1.0, **told: Any
    ) -> list[dict[str, Any]]:
        """Tells all ranks the same and returns their answers, or raises what is wrong with the first that fails."""
        self.tell(**told)
        answers: dict[int, dict[str, Any]] = {}
        waiting: dict[Any, int] = {rank.stdout: number for number, rank in enumerate(self.ranks)}
        failure: tuple[int, dict[str, Any]] | None = None
        deadline = float("inf")
        while waiting and time.monotonic() < deadline:
            ready, _, _ = select.select(list(waiting), [], [], every)
            watch()
            for stream in ready:
                number = waiting.pop(stream)
                answer = self._answer(number)
                answers[number] = answer
                if "error" in answer and failure is None:
                    failure, deadline = (number, answer), time.monotonic() + PATIENCE_SECONDS
        if failure is not None:
            number, answer = failure
            absent = not waiting and all(answer.get("absent") for answer in answers.values())
            self.broken = not absent
            raise Failed(answer["error"] if absent else f"rank {number}: {answer['error']}", absent)
        return [answers[number] for number in range(len(self.ranks))]

    def _answer(self, number: int) -> dict[str, Any]:
        stream = self.ranks[number].stdout
        assert stream
        line = stream.readline()
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
        self.errors.seek(0)
        said = self.errors.read().strip().splitlines() or ["it has ended"]
        return {"error": said[-1]}

    def close(self) -> None:
        for rank in self.ranks:
            assert rank.stdin
            with contextlib.suppress(BrokenPipeError):
                rank.stdin.close()
        for rank in self.ranks:
            try:
                rank.wait(0 if self.broken else PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                rank.kill()
                rank.wait()
            assert rank.stdout
            rank.stdout.close()
        self.errors.close()


class _Entry(NamedTuple):
    rival: Rival
    row: Row
    file: Row
    """Of a save that returns before its files stand."""


class RankContest:
    """One case: all its sides and ceilings, over all rounds, in one group."""

    def __init__(self, case: RankCase, rivals: list[Rival], settings: Settings) -> None:
        self.case, self.settings = case, settings
        self.rivals = rivals
        self.modes = [mode for mode in settings.modes if mode in case.modes]
        self.nbytes = fitting(case, settings)
        self.out = settings.out
        self._fd = os.memfd_create("fastshard-bench")
        os.ftruncate(self._fd, shared_nbytes(self.nbytes))
        self.whole: Shard = fill(mmap.mmap(self._fd, 0), self.nbytes)
        self.result = CaseResult(
            name=case.name,
            about=case.about,
            nbytes=sum(t.nbytes for t in self.whole.values()),
            full_nbytes=case.natural_nbytes,
            fitted=self.nbytes < asked(case, settings),
            tensors=len(self.whole),
            files=case.ranks,
            ceilings=case.bound_by,
            us=case.us,
            base=case.base,
        )
        self._group: Group | None = None
        self._prepared: set[tuple[str, str]] = set()
        self._reference: Written | None = None

    def _specs(self) -> list[Spec]:
        return [
            Spec(
                rank=rank,
                size=self.case.ranks,
                port=0,
                memory=self._fd,
                nbytes=self.nbytes,
                shards=SHARDS,
                out=str(self.out),
                sources=str(self.out.with_name(SOURCES)),
                preallocate=self.settings.preallocate,
            )
            for rank in range(self.case.ranks)
        ]

    def group(self) -> Group:
        """The ranks; new ones where a side has left the former ones in a collective."""
        if self._group is not None and self._group.broken:
            self.close_group()
        if self._group is None:
            self._group = Group(self._specs())
        return self._group

    def close_group(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None
        self._prepared.clear()

    def close(self) -> None:
        self.close_group()
        self.whole.clear()
        os.close(self._fd)

    def run(self, deadline: float | None) -> CaseResult:
        entries = list(self._entries())
        self.result.rows = [entry.row for entry in entries]
        for round_ in range(self.settings.rounds):
            started = time.monotonic()
            for entry in self._turn(entries, round_):
                if not self.settings.in_time() or (deadline and time.monotonic() > deadline and round_):
                    if not entry.row.seconds:
                        entry.row.error, entry.row.absent = NO_TIME, True
                    continue
                self._run_one(entry, round_)
            took = time.monotonic() - started
            note = f"{self.case.name}: round {round_ + 1} of {self.settings.rounds}, {took:.1f} s"
            print(note, file=sys.stderr, flush=True)
            if deadline is not None and time.monotonic() + took > deadline:
                break
        self.result.rows += [entry.file for entry in entries if entry.file.seconds]
        return self.result

    def _entries(self) -> Iterator[_Entry]:
        for rival in [*self.rivals, *(CEILINGS[name] for name in self.case.measures)]:
            modes = self.settings.slow_modes if rival.slow else self.modes
            for mode in (m for m in modes if m in rival.modes and m in self.modes):
                ceiling = rival.writes is None
                yield _Entry(rival, Row(rival.name, mode, ceiling=ceiling), Row(rival.name, FILE))

    def _turn(self, entries: list[_Entry], round_: int) -> list[_Entry]:
        """Who runs in a round, shuffled within each mode."""
        turn: list[_Entry] = []
        for mode in self.modes:
            ready = [e for e in entries if e.row.mode == mode and not e.row.error]
            if round_ >= self.settings.slow_rounds:
                ready = [e for e in ready if not e.rival.slow]
            turn += random.Random(round_).sample(ready, len(ready))
        return turn

    def prepare(self, rival: Rival, mode: str, warm_up: bool = True) -> None:
        """Once for each group. Where a saver keeps what it needs for the next time, that is there before the rounds."""
        if (rival.name, mode) in self._prepared:
            return
        empty(self.out)
        self.group().ask(do="prepare", side=rival.name, mode=mode, warm_up=warm_up)
        if mode == STALL and rival.writes is not None and warm_up:
            empty(self.out)
            self.group().ask(do="run", side=rival.name, mode=mode)
        self._prepared.add((rival.name, mode))

    def _run_one(self, entry: _Entry, round_: int) -> None:
        rival, row, file = entry
        try:
            self.group()  # before it is asked what is prepared
            self.prepare(rival, row.mode)
            settle(rival.footprint + (rival.writes is not None and rival.slow), self.result.nbytes, self.out)
            answers = self.group().ask(do="run", side=rival.name, mode=row.mode)
            began = min(answer["began"] for answer in answers)
            row.seconds.append(max(answer["ended"] for answer in answers) - began)
            row.cpu_seconds.append(sum(answer["cpu"] for answer in answers))
            row.rounds.append(round_)
            if row.mode == STALL and rival.writes is not None:
                file.seconds.append(max(answer["stood"] for answer in answers) - began)
                file.cpu_seconds.append(row.cpu_seconds[-1])
                file.rounds.append(round_)
            self._keep(row, [answer["detail"] for answer in answers])
            if self.settings.verify and rival.writes is not None and not row.checked:
                row.checked = file.checked = self._check(rival, row.mode)
        except Mismatch as error:
            row.wrong, row.error = True, f"WRONG: {error}"
        except Failed as error:
            row.error, row.absent = str(error), error.absent
        except Exception as error:  # whatever a side does, the others go on
            row.error = text_of(error)

    def _keep(self, row: Row, details: list[dict[str, Any] | None]) -> None:
        """Of the rank that has read most for what it wanted, or else of the first one."""
        known = [detail for detail in details if detail]
        if known:
            row.keep(max(known, key=lambda detail: detail.get("read_ratio", 0.0)))

    def _check(self, rival: Rival, mode: str) -> str:
        """Every tensor is compared; where final files are written also every byte with those of the other sides."""
        if rival.writes == LOADED:
            for number, answer in enumerate(self.group().ask(do="check", side=rival.name, mode=mode)):
                if answer["wrong"]:
                    raise Mismatch(f"rank {number}: {answer['wrong']}")
            return "same values"
        try:
            READERS[str(rival.writes)](self.out, self.whole)
        except Mismatch:
            raise
        except Exception as error:
            raise Mismatch(f"cannot be read back: {text_of(error)}") from error
        if rival.writes != "safetensors":
            return "loads back"
        if self._reference is None:
            self._reference = Written(self.out)
        else:
            self._reference.same_bytes(self.out)
        return "same bytes"

    def memory(self, name: str) -> Memory:
        """Extra memory of the rank that takes most, in fresh processes, of one save without a smaller one before."""
        try:
            self.close_group()
            rival = RANK_RIVALS[name]
            mode = next(mode for mode in self.case.modes if mode in rival.modes)
            self.prepare(rival, mode, warm_up=False)
            group = self.group()
            group.ask(do="settle")
            empty(self.out)
            return self._watched(group, name, mode)
        except Exception as error:
            return Memory(name, error=text_of(error))
        finally:
            self.close_group()

    def _watched(self, group: Group, name: str, mode: str) -> Memory:
        with_shared = mount_of(self.out)[0] not in MEMORY_BACKED
        pids = [rank.pid for rank in group.ranks]
        before = [memory.held(pid, with_shared) for pid in pids]
        resident = [memory_nbytes("VmRSS", f"/proc/{pid}/status") for pid in pids]
        peak = list(before)

        def watch() -> None:
            for number, pid in enumerate(pids):
                peak[number] = max(peak[number], memory.held(pid, with_shared))

        group.ask(watch, memory.INTERVAL_S, do="run", side=name, mode=mode)
        high = [memory_nbytes("VmHWM", f"/proc/{pid}/status") for pid in pids]
        return Memory(
            name,
            extra_nbytes=max(after - held for after, held in zip(peak, before)),
            high_water_nbytes=max(after - held for after, held in zip(high, resident)),
        )


def run_rank_case(
    case: RankCase, rivals: list[Rival], settings: Settings, deadline: float | None = None
) -> CaseResult:
    """The rounds, then the memory in fresh ranks."""
    reason = why_not(case, settings)
    if reason:
        return skipped(case, reason)
    contest = RankContest(case, rivals, settings)
    try:
        result = contest.run(deadline)
        for name in (rival.name for rival in rivals if rival.name in case.memory):
            if name in settings.memory and settings.in_time():
                result.memory.append(contest.memory(name))
    finally:
        contest.close()
        for directory in (contest.out, contest.out.with_name(SOURCES)):
            shutil.rmtree(directory, ignore_errors=True)
    return result
