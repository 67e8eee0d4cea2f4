# SPDX-License-Identifier: Apache-2.0
"""A disk that remembers: every write it was given, in order, and after which of them it was told to flush.

A file of a FUSE filesystem that this module serves itself is the backing file of a loop device. What the
power fails on is any beginning of the record: with all of it, or without some of what came after the last
flush, as a disk's volatile cache may have written things in any order. Root is needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import random
import signal
import stat
import struct
import subprocess
from collections.abc import Iterator
from typing import Final

import calls
import places

FLUSH: Final = -1
_HEADER: Final = struct.Struct("=IIQQIIII")
_ANSWER: Final = struct.Struct("=IiQ")
_ATTRIBUTES: Final = struct.Struct("=QQQQQQIIIIIIIIII")
_ENTRY: Final = struct.Struct("=QQQQII")
_RECORD: Final = struct.Struct("=qI")
_MOST_WRITTEN: Final = 1 << 20
_LOOKUP, _FORGET, _GETATTR, _SETATTR, _OPEN, _READ, _WRITE = 1, 2, 3, 4, 14, 15, 16
_STATFS, _RELEASE, _FSYNC, _FLUSH, _INIT, _OPENDIR, _RELEASEDIR, _INTERRUPT, _DESTROY, _FORGETS = (
    17, 18, 20, 25, 26, 27, 29, 36, 38, 42,
)  # fmt: skip
_libc = ctypes.CDLL(None, use_errno=True)


class Record:
    """What a disk was told: ``(offset, data)``, or ``(FLUSH, b"")``."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._count = mmap.mmap(-1, 8)  # shared with the process that serves the disk

    def __len__(self) -> int:
        return int.from_bytes(self._count[:8], "little")

    def append(self, offset: int, data: bytes) -> None:
        with open(self._path, "ab") as file:
            file.write(_RECORD.pack(offset, len(data)) + data)
        self._count[:8] = (len(self) + 1).to_bytes(8, "little")

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        with open(self._path, "rb") as file:
            while head := file.read(_RECORD.size):
                offset, nbytes = _RECORD.unpack(head)
                yield offset, file.read(nbytes)


def cut(image: str, record: list[tuple[int, bytes]], length: int, lose: random.Random | None) -> None:
    """Makes of ``image``, the disk before, what it holds when the power fails after ``length`` entries of the
    record.

    ``lose``: chooses what is lost of that which no flush has made safe; without it nothing is.
    """
    safe = max((at for at in range(length) if record[at][0] == FLUSH), default=0)
    with open(image, "r+b") as file:
        for at in range(length):
            offset, data = record[at]
            if offset == FLUSH or at > safe and lose is not None and lose.random() < 0.5:
                continue
            file.seek(offset)
            file.write(data)


@contextlib.contextmanager
def recorded(image: str, folder: str, options: str) -> Iterator[tuple[Record, str]]:
    """Mounts the filesystem in ``image``, which is not changed; gives the record of what the disk is told
    meanwhile, and the place of the filesystem."""
    served, mounted, log = (os.path.join(folder, name) for name in ("served", "mounted", "log"))
    for path in (served, mounted):
        os.makedirs(path, exist_ok=True)
    with open(log, "wb"):
        record = Record(log)
    fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    told = f"fd={fuse},rootmode=40000,user_id=0,group_id=0".encode()
    if _libc.mount(b"recorded", served.encode(), b"fuse", ctypes.c_ulong(0), told):
        raise OSError(ctypes.get_errno(), "mount of a FUSE filesystem", served)
    server = os.fork()
    if server == 0:
        try:
            calls.end_with_parent()
            _serve(fuse, image, record)
        finally:
            os._exit(0)
    os.close(fuse)
    device = ""
    try:
        found = subprocess.run(
            ("losetup", "--show", "-f", os.path.join(served, "disk")),
            capture_output=True,
            text=True,
            check=True,
        )
        device = found.stdout.strip()
        subprocess.run(("mount", "-o", options, device, mounted), check=True)
        try:
            yield record, mounted
        finally:
            places.run("umount", mounted)
    finally:
        if device:
            places.run("losetup", "-d", device)
        places.run("umount", "-l", served)
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)


def _serve(fuse: int, image: str, record: Record) -> None:
    """Answers the kernel until the filesystem is gone. There is one file, ``disk``."""
    with open(image, "rb") as file:
        disk = bytearray(file.read())
    while True:
        try:
            request = os.read(fuse, _MOST_WRITTEN + 8192)
        except OSError as error:
            if error.errno in (errno.ENODEV, errno.EBADF):
                return
            continue
        _, operation, unique, node, *_ = _HEADER.unpack_from(request)
        if operation in (_FORGET, _FORGETS, _INTERRUPT):
            continue
        answer = _answer(operation, node, request[_HEADER.size :], disk, record)
        data, number = (b"", answer) if isinstance(answer, int) else (answer, 0)
        with contextlib.suppress(FileNotFoundError):
            os.write(fuse, _ANSWER.pack(_ANSWER.size + len(data), -number, unique) + data)
        if operation == _DESTROY:
            return


def _answer(operation: int, node: int, body: bytes, disk: bytearray, record: Record) -> bytes | int:
    """What the kernel gets; a number is an errno."""
    if operation == _INIT:
        flags = 1 << 5 | 1 << 22  # writes of more than a page, and how many
        return struct.pack("=IIIIHHIIHHI28x", 7, 31, 1 << 16, flags, 16, 12, _MOST_WRITTEN, 1, 256, 0, 0)
    if operation == _LOOKUP:
        return (
            _ENTRY.pack(2, 0, 0, 0, 0, 0) + _attributes(2, len(disk)) if body == b"disk\0" else errno.ENOENT
        )
    if operation in (_GETATTR, _SETATTR):
        return struct.pack("=QII", 0, 0, 0) + _attributes(node, len(disk))
    if operation in (_OPEN, _OPENDIR):
        return struct.pack("=QII", 0, 1, 0)  # past the page cache
    if operation == _READ:
        _, offset, nbytes = struct.unpack_from("=QQI", body)
        return bytes(disk[offset : offset + nbytes])
    if operation == _WRITE:
        _, offset, nbytes = struct.unpack_from("=QQI", body)
        data = body[40 : 40 + nbytes]
        disk[offset : offset + nbytes] = data
        record.append(offset, data)
        return struct.pack("=II", nbytes, 0)
    if operation == _FSYNC:
        record.append(FLUSH, b"")
        return b""
    if operation == _STATFS:
        return struct.pack("=QQQQQIIII24x", 1 << 20, 1 << 20, 1 << 20, 9, 9, 4096, 255, 4096, 0)
    return b"" if operation in (_FLUSH, _RELEASE, _RELEASEDIR, _DESTROY) else errno.ENOSYS


def _attributes(node: int, nbytes: int) -> bytes:
    mode = stat.S_IFDIR | 0o700 if node == 1 else stat.S_IFREG | 0o600
    size = 0 if node == 1 else nbytes
    return _ATTRIBUTES.pack(node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)
