# SPDX-License-Identifier: Apache-2.0
"""Reads JSON that somebody else wrote, strictly, in time and memory in proportion to the text.

:func:`read_json` is for small files: indices, manifests, plans. :class:`Scanner` reads a text value by value
and builds nothing that is not asked for. Headers of safetensors files are read with it, by the rules of
serde_json, the parser that safetensors uses. These differ from Python's: numbers too large for a double, lone
surrogates and more than 127 levels are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any, Final

MAX_UNSIGNED: Final = 2**64 - 1
MAX_DEPTH: Final = 127
_MAX_DIGITS: Final = 40
"""The most digits of a whole number in a small file. For longer ones Python takes quadratic time."""
_MOST_SHOWN: Final = 100

_SPACE: Final = re.compile(r"[ \t\n\r]*")
_SEPARATOR: Final = re.compile(r"[ \t\n\r]*([,\]}:]?)[ \t\n\r]*")
_UNSIGNED: Final = re.compile(r"(0|[1-9][0-9]{0,19})(?![0-9.eE])")
_NUMBER: Final = re.compile(r"-?(0|[1-9][0-9]*)(?:\.([0-9]+))?(?:[eE]([+-]?)([0-9]+))?")
_LONG_NUMBER: Final = re.compile(f"[0-9]{{{_MAX_DIGITS + 1}}}")
_SURROGATE: Final = re.compile(r"\\u[dD][89a-fA-F]")


def unique(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    """Makes an object of these pairs, for ``json.loads(..., object_pairs_hook=unique)``.

    Raises ``ValueError`` for a name that occurs twice.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{shown(name)} occurs twice")
            seen.add(name)
    return found


def shown(value: object) -> str:
    """Returns text from an untrusted file in a form that can stand in an error message."""
    text = repr(value[: _MOST_SHOWN + 1] if isinstance(value, (str, bytes, list, tuple)) else value)
    return text if len(text) <= _MOST_SHOWN + 2 else f"{text[:_MOST_SHOWN]}..."


def read_json(data: bytes | str) -> Any:
    """Returns what a small JSON file holds.

    Raises ``ValueError``, also for names that occur twice in an object, for lone surrogates, and for texts
    that consist of brackets only, which would take many times their size in memory.
    """
    text = data if isinstance(data, str) else data.decode()
    if text.count("[") + text.count("{") > 10_000 + len(text) // 8:
        raise ValueError("it has nothing but brackets in it")
    integer = _short_integer if _LONG_NUMBER.search(text) else None
    try:
        found = json.loads(text, object_pairs_hook=unique, parse_constant=_no_constant, parse_int=integer)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if _SURROGATE.search(text):
        json.dumps(found, ensure_ascii=False).encode()
    return found


def read_json_object(data: bytes | str) -> dict[str, Any]:
    """Returns the object that a small JSON file holds. Raises as :func:`read_json`, and for any other value."""
    found = read_json(data)
    if not isinstance(found, dict):
        raise ValueError("it does not hold a JSON object")
    return found


def _short_integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


class Scanner:
    """A position in a JSON text. Its methods read what must follow there and move behind it, or raise
    ``ValueError``."""

    def __init__(self, text: str, at: int = 0) -> None:
        self.text = text
        self.at = at

    def peek(self) -> str:
        """Returns the next character that is no white space; an empty text at the end."""
        match = _SPACE.match(self.text, self.at)
        assert match is not None
        self.at = match.end()
        return self.text[self.at : self.at + 1]

    def wrong(self, wanted: str) -> ValueError:
        found = shown(self.text[self.at : self.at + 20]) if self.at < len(self.text) else "the end"
        return ValueError(f"{wanted} is wanted at {self.at}, not {found}")

    def end(self) -> None:
        """Checks that nothing but white space follows."""
        if self.peek():
            raise self.wrong("the end")

    def string(self) -> str:
        if self.peek() != '"':
            raise self.wrong("a string")
        found: str
        found, self.at = scanstring(self.text, self.at + 1, True)
        if not found.isascii():
            found.encode()  # may be no Unicode: half of a surrogate pair
        return found

    def unsigned(self) -> int:
        """Reads a whole number of at most 64 bits, without sign, point and exponent."""
        self.peek()
        match = _UNSIGNED.match(self.text, self.at)
        number = MAX_UNSIGNED + 1 if match is None else int(match[1])
        if match is None or number > MAX_UNSIGNED:
            raise self.wrong("a whole number of 64 bits")
        self.at = match.end()
        return number

    def null(self) -> bool:
        """Returns whether a null follows, and moves behind it."""
        self.peek()
        found = self.text.startswith("null", self.at)
        self.at += 4 * found
        return found

    def members(self, depth: int) -> Iterator[str]:
        """Yields the keys of an object, each with the scanner before its value, which the caller must read.

        ``depth`` is the level of this object, counted from 1.
        """
        for _ in self._inside("{", "}", depth):
            yield self.key()

    def key(self) -> str:
        """Reads the key of a member and the colon behind it."""
        found = self.string()
        self.separator(":")
        return found

    def begin_object(self) -> str:
        """Moves behind the opening brace of an object. Returns the closing one, and moves behind it, if it
        follows at once."""
        if self.peek() != "{":
            raise self.wrong("an object")
        self.at += 1
        if self.peek() != "}":
            return ""
        self.at += 1
        return "}"

    def elements(self, depth: int) -> Iterator[int]:
        """Yields the numbers of an array's elements, each with the scanner before the element, which the
        caller must read."""
        yield from self._inside("[", "]", depth)

    def _inside(self, opening: str, closing: str, depth: int) -> Iterator[int]:
        if self.peek() != opening:
            raise self.wrong("an object" if opening == "{" else "a list")
        if depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} levels")
        self.at += 1
        if self.peek() == closing:
            self.at += 1
            return
        count = 0
        while True:
            yield count
            count += 1
            if self.separator("," + closing) == closing:
                return

    def separator(self, wanted: str) -> str:
        """Reads one of these characters and returns it. White space after a comma or a colon is skipped,
        too."""
        match = _SEPARATOR.match(self.text, self.at)
        assert match is not None
        if not match[1] or match[1] not in wanted:
            self.peek()
            raise self.wrong(" or ".join(wanted))
        self.at = match.end() if match[1] in ",:" else match.end(1)
        return match[1]

    def skip(self, depth: int, most: int) -> None:
        """Skips any value, whose level is ``depth``. Also raises ``ValueError`` if the value goes on behind
        ``most``."""
        first = self.peek()
        if self.at > most:
            raise ValueError("there is too much in fields that the format does not have")
        if first == '"':
            self.string()
        elif first == "{":
            for _ in self.members(depth):
                self.skip(depth + 1, most)
        elif first == "[":
            for _ in self.elements(depth):
                self.skip(depth + 1, most)
        else:
            for word in ("null", "true", "false"):
                if self.text.startswith(word, self.at):
                    self.at += len(word)
                    return
            self._number()

    def _number(self) -> None:
        match = _NUMBER.match(self.text, self.at)
        if match is None:
            raise self.wrong("a value")
        if _is_out_of_range(*match.groups()):
            raise ValueError(f"{shown(match[0])} is too large a number")
        self.at = match.end()


def _is_out_of_range(digits: str, fraction: str | None, sign: str | None, power: str | None) -> bool:
    """Returns whether serde_json refuses this number, which it makes of the first 64 bits of the digits and a
    power of ten."""
    if fraction is None and power is None and len(digits) < 300:
        return False
    taken = 0
    significand = 0
    for digit in digits[:20]:
        longer = significand * 10 + int(digit)
        if longer > MAX_UNSIGNED:
            break
        significand, taken = longer, taken + 1
    exponent = len(digits) - taken
    if exponent == 0:
        for digit in fraction or "":
            longer = significand * 10 + int(digit)
            if longer > MAX_UNSIGNED:
                break
            significand, exponent = longer, exponent - 1
    if significand == 0:
        return False
    if power:
        short = power.lstrip("0")
        if len(short) > 10 or int(short or 0) > 2**31 - 1:
            return sign != "-"
        exponent += -int(short or 0) if sign == "-" else int(short or 0)
    return exponent > 308 or (exponent >= 0 and float(significand) * float(f"1e{exponent}") == float("inf"))
