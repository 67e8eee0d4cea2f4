# SPDX-License-Identifier: Apache-2.0
"""The ranks of a save, which agree at each step whether it goes on.

They speak through the store of the process group: a table of keys and values that each rank reaches by itself. So
no collective is called, which could mix with those of the training, and a rank that is dead or hangs has a number.
(What gloo says of it is "Connection closed by peer".)

Each step has one verdict, a key of the store that is set once. The first rank sets it to success when all ranks have
told their values. Any rank sets it to a failure: its own, or that of a rank it waits for in vain. Whichever comes
first counts for all, so no rank takes a save for done that another one has given up.
"""

from __future__ import annotations

import contextlib
import pickle
import threading
import time
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, TypeVar

_BEAT_SECONDS: Final = 1.0
_SILENT_SECONDS: Final = 30.0
"""A rank that is in a save says so each second. After this time without a word it counts as dead."""
_DEFAULT_SECONDS: Final = 1800.0
_PIECE_NBYTES: Final = 4 << 20
"""Most bytes of one value. TCPStore refuses more than 8 MiB."""
_POLL_SECONDS: Final = 0.001
_MOST_POLL_SECONDS: Final = 0.05

T = TypeVar("T")


def described(error: BaseException) -> str:
    """Returns an error in one line, with its class where that says something."""
    return str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"


class Group:
    """The ranks of a process group that make one save. All of them must make one, in the same order of saves. A load
    is agreed in the same way; ``doing`` is the word for it in errors.

    ``timeout`` is how many seconds one rank may keep the others waiting in a step; ``None`` stands for half an hour.
    A rank that has died or was stopped is noticed earlier: see :data:`_SILENT_SECONDS`. Where ``torch.distributed``
    is not initialized there is one rank.
    """

    def __init__(
        self, process_group: Any = None, *, timeout: float | None = None, doing: str = "save"
    ) -> None:
        self._doing = doing
        self.timeout: Final = _DEFAULT_SECONDS if timeout is None else timeout
        found = _ranks_and_store(process_group)
        self.rank, self.size = 0, 1
        self._step = 0
        self._store: Any = None
        if found is not None:
            self.rank, self.size, store = found
        if self.size > 1:
            number = store.add(f"fastshard/saves/{self.rank}", 1)
            self._store = _Keys(store, f"fastshard/{number}/")
            self._silence = min(self.timeout, _SILENT_SECONDS)
            self._stop = threading.Event()
            weakref.finalize(self, self._stop.set)
            beats = threading.Thread(
                target=_beat,
                args=(self._store, f"alive/{self.rank}", self._stop, min(_BEAT_SECONDS, self._silence / 6)),
                daemon=True,
            )
            with contextlib.suppress(RuntimeError):  # no thread can be started: then only the timeout tells
                beats.start()

    @property
    def first(self) -> bool:
        """Whether this is the rank that does what only one may do."""
        return self.rank == 0

    def close(self) -> None:
        """Says nothing any more. A group whose save has ended is closed."""
        if self._store is not None:
            self._stop.set()

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def gather(self, value: T) -> list[T]:
        """Returns the values of all ranks, to all ranks."""
        gathered: list[T] = self.exchange(lambda: value, lambda values: [values] * self.size)
        return gathered

    def broadcast(self, value: T) -> T:
        """Returns the value that the first rank has given."""
        return self.from_first(lambda: value)

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """A step that all ranks take. If it fails in one of them it fails in all, so nobody waits for the others.

        Raises what the block raises, and ``RuntimeError``, saying which rank and why, if only others have failed.
        """
        step = self._next()
        with self._told_if_it_fails(step):
            yield
        self._decide(step, None, lambda _: [None] * self.size)

    def exchange(self, work: Callable[[], T], decide: Callable[[list[T]], list[Any]]) -> Any:
        """A step that all ranks take: ``decide`` is called on the first rank with what ``work`` returns on each
        rank, and returns the answer for each rank. Raises as :meth:`agreed`."""
        step = self._next()
        with self._told_if_it_fails(step):
            value = work()
        return self._decide(step, value, decide)

    def from_first(self, action: Callable[[], T]) -> T:
        """Calls ``action`` on the first rank, and returns its value to all of them. Raises as :meth:`agreed`."""
        step = self._next()
        if self.size == 1:
            return action()
        if self.rank == 0:
            with self._told_if_it_fails(step):
                value = action()
                self._store.put(f"{step}/all", pickle.dumps(value))
            self._succeed(step)
            return value
        self._await_verdict(step)
        answer: T = pickle.loads(self._store.get(f"{step}/all"))
        return answer

    def _next(self) -> int:
        self._step += 1
        return self._step

    @contextlib.contextmanager
    def _told_if_it_fails(self, step: int) -> Iterator[None]:
        """Tells the others of an error. If one of them has failed before, that is the reason on this rank, too: the
        files that it writes to may be gone since."""
        try:
            yield
        except BaseException as error:
            text = f"rank {self.rank} could not {self._doing} its part: {described(error)}"
            counts = text
            if self.size > 1:
                with contextlib.suppress(Exception):  # whoever waits will give this rank up
                    counts = self._fail(step, text)
            if counts != text and isinstance(error, Exception):
                raise RuntimeError(counts) from error
            raise

    def _decide(self, step: int, value: T, decide: Callable[[list[T]], list[Any]]) -> Any:
        if self.size == 1:
            return decide([value])[0]
        if self.rank != 0:
            self._store.put(f"{step}/{self.rank}", pickle.dumps(value))
            self._await_verdict(step)
            return pickle.loads(self._store.take(f"{step}/for/{self.rank}"))
        values = [value, *(pickle.loads(data) for data in self._collect(step))]
        if step > 1:  # everybody has left the step before
            self._store.remove(f"{step - 1}/verdict", f"{step - 1}/all")
        with self._told_if_it_fails(step):
            answers = decide(values)
            known: dict[int, bytes] = {}
            for rank in range(1, self.size):
                answer = answers[rank]
                data = known.get(id(answer)) or known.setdefault(id(answer), pickle.dumps(answer))
                self._store.put(f"{step}/for/{rank}", data)
        self._succeed(step)
        return answers[0]

    def _succeed(self, step: int) -> None:
        verdict = self._store.settle(f"{step}/verdict", "ok")
        if verdict != "ok":
            raise RuntimeError(verdict)

    def _fail(self, step: int, text: str) -> str:
        """Returns what counts as the failure of a step."""
        verdict: str = self._store.settle(f"{step}/verdict", text)
        return verdict if verdict != "ok" else text

    def _collect(self, step: int) -> list[bytes]:
        """Returns what all other ranks have told."""
        told: dict[int, bytes] = {}
        missing = [*range(1, self.size)]
        for _ in self._waiting(step, missing, self.timeout):
            for rank in missing[:]:
                key = f"{step}/{rank}"
                if not self._store.has(key):
                    break  # the others are looked at when this one is there
                told[rank] = self._store.take(key)
                missing.remove(rank)
            if not missing:
                break
            if self._store.has(f"{step}/verdict"):
                raise RuntimeError(self._store.text(f"{step}/verdict"))
        return [told[rank] for rank in range(1, self.size)]

    def _await_verdict(self, step: int) -> None:
        # The first rank may itself wait that long for another one, which it then names, and begin later.
        for _ in self._waiting(step, [0], 2 * self.timeout + _BEAT_SECONDS):
            if self._store.has(f"{step}/verdict"):
                verdict = self._store.text(f"{step}/verdict")
                if verdict != "ok":
                    raise RuntimeError(verdict)
                return

    def _waiting(self, step: int, missing: list[int], patience: float) -> Iterator[None]:
        """Yields until the caller has what it waits for. Raises when the ranks in ``missing`` let it wait in vain."""
        began = looked = time.monotonic()
        heard: dict[int, tuple[int, float]] = {}
        pause = _POLL_SECONDS
        while True:
            yield
            now = time.monotonic()
            if now - looked >= min(_BEAT_SECONDS, self._silence / 4):
                looked = now
                silent = [rank for rank in missing if self._is_silent(step, rank, heard, now)]
                if silent:
                    self._give_up(
                        step, silent, f"has not been heard of for {self._silence:g} s: it was killed or hangs"
                    )
            if now - began > patience:
                gone = [rank for rank in missing if not self._store.has(f"{step}/{rank}")] or missing
                self._give_up(
                    step, gone, f"has not come to this step of the {self._doing} within {patience:g} s"
                )
            time.sleep(pause)
            pause = min(2 * pause, max(_MOST_POLL_SECONDS, 1e-4 * self.size))

    def _is_silent(self, step: int, rank: int, heard: dict[int, tuple[int, float]], now: float) -> bool:
        if not self._store.has(f"alive/{rank}") or self._store.has(f"{step}/{rank}"):
            return False  # it has not come to the save yet, or has told its value
        beats = self._store.counted(f"alive/{rank}")
        if not beats:
            return False  # it has left the save in this moment
        last, when = heard.get(rank, (0, now))
        if beats != last:
            heard[rank] = (beats, now)
            return False
        return now - when > self._silence

    def _give_up(self, step: int, ranks: Iterable[int], reason: str) -> None:
        names = ", ".join(f"rank {rank}" for rank in ranks)
        raise RuntimeError(self._fail(step, f"{names} {reason}"))


class _Keys:
    """The keys of one save in a store."""

    def __init__(self, store: Any, prefix: str) -> None:
        self._store = store
        self._prefix = prefix

    def put(self, key: str, value: bytes) -> None:
        """Sets a value of any size."""
        data = zlib.compress(value, 1)
        pieces = [data[at : at + _PIECE_NBYTES] for at in range(0, len(data), _PIECE_NBYTES)]
        for number, piece in enumerate(pieces[1:], 1):
            self._set(f"{key}/{number}", piece)
        self._set(key, len(pieces).to_bytes(4, "little") + pieces[0])

    def get(self, key: str) -> bytes:
        return self._read(key)[0]

    def take(self, key: str) -> bytes:
        """Returns a value that nobody else reads, and removes it."""
        value, count = self._read(key)
        self.remove(key, *(f"{key}/{number}" for number in range(1, count)))
        return value

    def has(self, key: str) -> bool:
        with _reached():
            return bool(self._store.check([self._prefix + key]))

    def text(self, key: str) -> str:
        return self._get(key).decode()

    def settle(self, key: str, text: str) -> str:
        """Sets a key that nobody has set, and returns what it says then."""
        with _reached():
            said: bytes = self._store.compare_set(self._prefix + key, "", text)
        return said.decode()

    def count(self, key: str) -> None:
        self._store.add(self._prefix + key, 1)

    def counted(self, key: str) -> int:
        """Returns how often a key was counted since it was removed. Unlike ``text``, which would wait for the key until
        the store's own timeout, it returns at once if somebody has removed the key meanwhile."""
        with _reached():
            times = int(self._store.add(self._prefix + key, 0))
        if not times:
            self.remove(key)  # it is there since
        return times

    def remove(self, *keys: str) -> None:
        for key in keys:
            with contextlib.suppress(RuntimeError):  # a store that removes nothing keeps a little more
                self._store.delete_key(self._prefix + key)

    def _read(self, key: str) -> tuple[bytes, int]:
        first = self._get(key)
        count = int.from_bytes(first[:4], "little")
        pieces = [first[4:], *(self._get(f"{key}/{number}") for number in range(1, count))]
        return zlib.decompress(b"".join(pieces)), count

    def _get(self, key: str) -> bytes:
        with _reached():
            return bytes(self._store.get(self._prefix + key))

    def _set(self, key: str, value: bytes) -> None:
        with _reached():
            self._store.set(self._prefix + key, value)


@contextlib.contextmanager
def _reached() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch's DistError is one
        raise RuntimeError(
            f"the store of the process group does not answer, so the rank or agent that holds it has ended: {error}"
        ) from error


def _beat(store: _Keys, key: str, stop: threading.Event, seconds: float) -> None:
    """Says that this rank is in the save, until ``stop`` is set."""
    with contextlib.suppress(Exception):  # without a store the save fails by itself
        while True:
            store.count(key)
            if stop.wait(seconds):
                break
        store.remove(key)


def _ranks_and_store(process_group: Any) -> tuple[int, int, Any] | None:
    """Returns this process's rank in a process group, how many there are, and their store."""
    from torch import distributed

    if not distributed.is_available() or not distributed.is_initialized():
        if process_group is not None:
            raise ValueError("torch.distributed is not initialized, but a process group was given")
        return None
    group: Any = distributed.group.WORLD if process_group is None else process_group
    rank = distributed.get_rank(group)
    if rank < 0:
        raise ValueError("this process is not in the process group")
    return rank, distributed.get_world_size(group), store_of(group)


def store_of(group: Any) -> Any:
    """Returns the store of a process group, which older versions of torch give by a private function only."""
    if hasattr(group, "get_group_store"):
        return group.get_group_store()
    from torch.distributed import distributed_c10d

    borrowed = getattr(distributed_c10d, "_get_process_group_store", None)
    if borrowed is None:
        raise RuntimeError(
            "this version of torch does not give access to the store of a process group, by which ranks agree"
        )
    return borrowed(group)
