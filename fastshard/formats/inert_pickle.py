# SPDX-License-Identifier: Apache-2.0
"""Reads pickles without unpickling them: nothing is imported or called, and what stands for an object of a class says
so.

Python's own unpickler would do what the pickle says, and takes memory as it says. Here an object is an
:class:`Inert` with the name of its class, its arguments and its state, and whoever asks for the pickle interprets
that. Classes that are not expected are an error.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Container
from typing import Any, Final

_MARK: Final = object()
_SIMPLE: Final = (str, int, float, bytes, type(None))
_LENGTHS: Final[dict[int, tuple[int, bool]]] = {
    0x8C: (1, True),  # SHORT_BINUNICODE
    0x58: (4, True),  # BINUNICODE
    0x8D: (8, True),  # BINUNICODE8
    0x43: (1, False),  # SHORT_BINBYTES
    0x42: (4, False),  # BINBYTES
    0x8E: (8, False),  # BINBYTES8
}
"""Bytes of the length before a text or bytes, and whether it is a text."""
_CONSTANTS: Final[dict[int, Any]] = {0x4E: None, 0x88: True, 0x89: False}
_NUMBERS: Final = {
    0x4A: struct.Struct("<i"),  # BININT
    0x4B: struct.Struct("<B"),  # BININT1
    0x4D: struct.Struct("<H"),  # BININT2
    0x47: struct.Struct(">d"),  # BINFLOAT
}
_TUPLES: Final = {0x85: 1, 0x86: 2, 0x87: 3}
_BY_NAME: Final = "builtins.getattr"
"""Of a class and a name: how Python 3.11.0 to 3.11.3 pickle a member of an enumeration."""


class Inert:
    """What stands for a class or a function, or for an object that would be made by it."""

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name: str, arguments: Any = None) -> None:
        self.name = name
        self.arguments = arguments
        """``None`` for the class or the function itself."""
        self.state: Any = None

    def field(self, name: str) -> Any:
        """Returns an attribute of the object. Raises ``ValueError`` if it has none of that name."""
        if not isinstance(self.state, dict) or name not in self.state:
            raise ValueError(f"a {self.name} without {name!r}")
        return self.state[name]


def read_pickle(data: bytes, known: Container[str]) -> Any:
    """Returns what a pickle describes. ``known`` are the full names of classes and functions that may occur in it.

    What is stored apart (``persistent_id``) is an :class:`Inert` of the name ``""``. Raises ``ValueError``, saying what
    is wrong.
    """
    reader = _Reader(data, known)
    try:
        return reader.run()
    except (IndexError, KeyError, struct.error, UnicodeDecodeError):
        raise ValueError(f"the pickle is damaged near byte {reader.at}") from None


class _Reader:
    def __init__(self, data: bytes, known: Container[str]) -> None:
        self.at = 0
        self._data = data
        self._known = known
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        data, operations = self._data, self._operations()
        while True:
            code = data[self.at]
            self.at += 1
            if code == 0x2E:  # STOP
                return self._stack.pop()
            operation = operations.get(code)
            if operation is not None:
                operation()
            elif code in _LENGTHS:
                width, is_text = _LENGTHS[code]
                found = self._take(int.from_bytes(self._take(width), "little"))
                self._stack.append(found.decode("utf-8", "surrogatepass") if is_text else found)
            elif code in _CONSTANTS:
                self._stack.append(_CONSTANTS[code])
            elif code in _NUMBERS:
                self._stack.append(*_NUMBERS[code].unpack(self._take(_NUMBERS[code].size)))
            elif code in _TUPLES:
                count = _TUPLES[code]
                if len(self._stack) < count:
                    raise IndexError
                self._stack[-count:] = [tuple(self._stack[-count:])]
            else:
                raise ValueError(f"the pickle has an operation {code:#x}, which is not expected there")

    def _operations(self) -> dict[int, Callable[[], None]]:
        stack, memo = self._stack, self._memo

        def put(number: int) -> None:
            memo[number] = stack[-1]

        return {
            0x80: lambda: self._skip(1),  # PROTO
            0x95: lambda: self._skip(8),  # FRAME
            0x28: self._mark,
            0x30: self._pop,
            0x7D: lambda: stack.append({}),  # EMPTY_DICT
            0x5D: lambda: stack.append([]),  # EMPTY_LIST
            0x29: lambda: stack.append(()),  # EMPTY_TUPLE
            0x74: lambda: self._close(tuple),
            0x73: lambda: self._set([stack.pop(-2), stack.pop()]),  # SETITEM
            0x75: lambda: self._set(self._marked()),  # SETITEMS
            0x61: lambda: self._extend([stack.pop()]),  # APPEND
            0x65: lambda: self._extend(self._marked()),  # APPENDS
            0x71: lambda: put(self._number(1)),  # BINPUT
            0x72: lambda: put(self._number(4)),  # LONG_BINPUT
            0x94: lambda: put(len(memo)),  # MEMOIZE
            0x68: lambda: stack.append(memo[self._number(1)]),  # BINGET
            0x6A: lambda: stack.append(memo[self._number(4)]),  # LONG_BINGET
            0x8A: lambda: stack.append(int.from_bytes(self._take(self._number(1)), "little", signed=True)),
            0x63: lambda: self._global(self._line(), self._line()),
            0x93: lambda: self._global(stack.pop(-2), stack.pop()),  # STACK_GLOBAL
            0x52: self._make,  # REDUCE
            0x81: self._make,  # NEWOBJ
            0x62: self._build,
            0x51: lambda: stack.append(Inert("", stack.pop())),  # BINPERSID
        }

    def _take(self, count: int) -> bytes:
        found = self._data[self.at : self.at + count]
        if len(found) != count:
            raise IndexError
        self.at += count
        return found

    def _skip(self, count: int) -> None:
        self._take(count)

    def _number(self, width: int) -> int:
        return int.from_bytes(self._take(width), "little")

    def _line(self) -> str:
        end = self._data.find(b"\n", self.at)
        if end < 0:
            raise IndexError
        found = self._take(end - self.at).decode()
        self.at += 1
        return found

    def _mark(self) -> None:
        self._stack.append(_MARK)

    def _pop(self) -> None:
        self._stack.pop()

    def _marked(self) -> list[Any]:
        """Removes what lies above the last mark, and the mark."""
        stack = self._stack
        begin = len(stack) - 1
        while stack[begin] is not _MARK:
            begin -= 1
            if begin < 0:
                raise IndexError
        found = stack[begin + 1 :]
        del stack[begin:]
        return found

    def _close(self, kind: type) -> None:
        self._stack.append(kind(self._marked()))

    def _set(self, pairs: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not dict or len(pairs) % 2:
            raise IndexError
        for key, value in zip(pairs[::2], pairs[1::2]):
            # No tuples: one may hold itself a thousand times, and its hash would take forever.
            if not isinstance(key, (*_SIMPLE, Inert)):
                raise ValueError(f"a {type(key).__name__} as a key of a dict in a pickle")
            target[key] = value

    def _extend(self, values: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise IndexError
        self._stack[-1].extend(values)

    def _global(self, module: Any, name: Any) -> None:
        full = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "?"
        if full not in self._known and full != _BY_NAME:
            raise ValueError(f"the pickle has a {full} in it, which is not expected there")
        self._stack.append(Inert(full))

    def _make(self) -> None:
        arguments = self._stack.pop()
        made_by = self._stack.pop()
        if type(made_by) is not Inert or made_by.arguments is not None or type(arguments) is not tuple:
            raise IndexError
        if made_by.name == _BY_NAME:
            found, name = arguments if len(arguments) == 2 else (None, None)
            if type(found) is not Inert or found.arguments is not None or type(name) is not str:
                raise ValueError(f"the pickle has a {_BY_NAME} in it, which is not expected there")
            made_by, arguments = found, (name,)
        is_dict = made_by.name == "collections.OrderedDict" and not arguments
        self._stack.append({} if is_dict else Inert(made_by.name, arguments))

    def _build(self) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if type(target) is not Inert or target.arguments is None:
            raise IndexError
        target.state = state
