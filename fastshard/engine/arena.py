# SPDX-License-Identifier: Apache-2.0
"""Host memory for snapshots, which stays mapped between saves.

What costs in a snapshot is not the copy but the first touch of new memory (2 GiB: 4.6 s in new pages of 4 KiB,
0.33 s in memory that was used before). So the arena keeps its blocks, in huge pages where the kernel has them,
until the engine rests or others need the room. All of its blocks together never exceed the budget.

No lock is taken here: a signal handler may save while it interrupts a thread in any of these steps. A block is
claimed by one step of the interpreter, and new blocks queue for the budget in the order of a list.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import mmap
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from . import limits

if TYPE_CHECKING:
    from .. import _native

_HUGE_PAGE: Final = 2 << 20
_SHARE_OF_FREE: Final = 0.5
"""Of the memory that is free when the first snapshot is made, what the arena may take if nobody has said so."""
_MOST_WASTED: Final = 64 << 20
"""A block that is larger than wanted by more than this, and by more than half, is left to larger snapshots."""


class Block:
    """Memory of the arena that one save uses, or that waits for the next one.

    Args:
        shared: it is a file in memory, which other processes can map.
    """

    def __init__(self, nbytes: int, user: object, shared: bool = False) -> None:
        self.nbytes: Final = nbytes
        self.address = 0
        self.shared: Final = shared
        self.file: io.FileIO | None = None
        """What other processes map, if it is shared."""
        self.locked: _native.PageLock | str | None = None
        """What keeps it page-locked for devices, or why the driver does not do it; ``None`` until that is asked."""
        self._mapping: mmap.mmap | None = None
        self._claims: dict[str, object] = {"user": user}

    def claim(self, user: object) -> bool:
        """Returns whether nobody else has it, and takes it."""
        return self._claims.setdefault("user", user) is user

    def give_back(self) -> None:
        """Leaves the block to the next save. Nothing reads or writes it any more."""
        self._claims.pop("user", None)

    @property
    def idle(self) -> bool:
        return not self._claims

    def map(self) -> None:
        """Maps the memory. Raises ``OSError`` if there is none."""
        if self.shared:
            self.file = io.FileIO(os.memfd_create("fastshard"), "r+")
            os.posix_fallocate(self.file.fileno(), 0, self.nbytes)  # which fails where a store would kill
            self._mapping = mmap.mmap(self.file.fileno(), self.nbytes)
        else:
            self._mapping = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with contextlib.suppress(OSError):  # a kernel without huge pages
                self._mapping.madvise(mmap.MADV_HUGEPAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))

    def lock(self, native: _native.Engine, ordinal: int) -> _native.PageLock | None:
        """Page-locks the memory for devices, once in its life. Returns ``None`` if the driver refuses that."""
        if self.locked is None:
            self.locked = native.page_lock(self.address, self.nbytes, ordinal)
        return None if isinstance(self.locked, str) else self.locked

    def unlock(self) -> None:
        """Makes ordinary memory of it, which forked processes get a copy of."""
        if self.locked is not None and not isinstance(self.locked, str):
            self.locked.release()  # the plans of old saves may still have it
        self.locked = None

    def unmap(self) -> None:
        self.unlock()
        self.address = 0
        self._mapping = None
        if self.file is not None:
            self.file.close()


class Arena:
    """The blocks of one engine.

    Args:
        budget: the most bytes of all blocks together; ``None``: half of the memory that is free when the first
            block is asked for.
        shared: other processes can map the blocks.
    """

    def __init__(self, budget: int | None, shared: bool = False) -> None:
        self._budget = budget
        self._shared = shared
        self._closed = False
        self._blocks: list[Block] = []
        self.peak = 0
        """The most bytes that were mapped at once."""

    @property
    def budget(self) -> int:
        """The most bytes of all blocks together."""
        if self._budget is None:
            self._budget = _whole_pages(int(_SHARE_OF_FREE * limits.free_memory()))
        return self._budget

    @property
    def nbytes(self) -> int:
        """Bytes that are mapped or about to be."""
        return sum(block.nbytes for block in self._blocks[:])

    def take(self, nbytes: int, wait: Callable[[], bool]) -> Block | str:
        """Returns a block of at least so many bytes, or why there is none.

        Where the budget is used up, ``wait`` is called until blocks have been given back. It returns ``False`` if
        nothing is left to wait for.
        """
        size = _whole_pages(nbytes)
        if size > self.budget:
            return f"{nbytes} bytes are more than the snapshot_budget of {self.budget}"
        while True:
            user = object()
            for block in sorted(self._blocks[:], key=lambda block: block.nbytes):
                fits = size <= block.nbytes <= max(2 * size, size + _MOST_WASTED)
                if fits and block.address and block.claim(user):
                    return block
            block = Block(size, user, self._shared)
            self._blocks.append(block)
            if self._fits(block):
                try:
                    if size > limits.free_memory():
                        raise OSError("free")
                    block.map()
                except OSError:
                    self._blocks.remove(block)
                    return f"{nbytes} bytes of memory are not free"
                self.peak = max(self.peak, self.nbytes)
                return block
            self._blocks.remove(block)
            if not wait():
                return "all of the snapshot_budget is in use"

    def _fits(self, block: Block) -> bool:
        """Returns whether a block that is queued is within the budget, for which idle ones go, the largest
        first."""
        while True:
            queued = self._blocks[: self._blocks.index(block) + 1]
            if sum(one.nbytes for one in queued) <= self.budget:
                return True
            idle = [one for one in queued if one.idle]
            if not idle:
                return False
            self._drop(max(idle, key=lambda one: one.nbytes))

    def _drop(self, block: Block) -> None:
        if block.claim(self):
            block.unmap()
            self._blocks.remove(block)

    def give_back(self, block: Block) -> None:
        """Leaves a block to the next save, or to nobody where there will be none."""
        block.give_back()
        if self._closed:
            self.release()

    def close(self) -> None:
        """Unmaps all blocks: those that are in use, when they are given back."""
        self._closed = True
        self.release()

    def release(self) -> None:
        """Unmaps all blocks that no save uses."""
        for block in self._blocks[:]:
            if block.idle:
                self._drop(block)

    def abandon(self) -> list[object]:
        """Forgets all blocks, in a forked child, where the parent's saves have no copies of them. Returns what is
        the parent's: page-locks, and with them memory that the child does not have, so that it must not be
        unmapped."""
        parents = [(block.locked, block._mapping) for block in self._blocks if block.locked is not None]
        self._blocks = []
        return list(parents)


def _whole_pages(nbytes: int) -> int:
    """Returns a size that is made of whole pages, of huge ones if it is large."""
    page = _HUGE_PAGE if nbytes >= _HUGE_PAGE else mmap.PAGESIZE
    return max(page, -(-nbytes // page) * page)
