# SPDX-License-Identifier: Apache-2.0
"""The bytes of the header, checked by hand and by reading them back. No torch, no safetensors."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import struct
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastshard.formats import safetensors as layout
from fastshard.formats.safetensors import BITS, CODES, DTYPE_ORDER, HeaderTooLarge, header, quote, read_header

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
DIMS = st.integers(0, 2**40)


def prefixed(text: str, padding: int) -> bytes:
    """The header this JSON text makes when it takes so many spaces."""
    encoded = text.encode() + b" " * padding
    return len(encoded).to_bytes(8, "little") + encoded


# What is written -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "metadata", "expected"),
    [
        ([], None, prefixed("{}", 6)),
        ([], {}, prefixed('{"__metadata__":{}}', 5)),
        ([], {"format": "pt"}, prefixed('{"__metadata__":{"format":"pt"}}', 0)),
        (
            [("a", "F32", (2, 3), 24)],
            None,
            prefixed('{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}', 7),
        ),
        (
            [("a", "F32", (2, 3), 24)],
            {},
            prefixed('{"__metadata__":{},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}', 5),
        ),
        (
            [("x", "I64", (), 8), ("e", "F16", (0, 7), 0), ("", "BOOL", (1,), 1)],
            {"z": "1", "a": "2"},
            prefixed(
                '{"__metadata__":{"z":"1","a":"2"},'
                '"x":{"dtype":"I64","shape":[],"data_offsets":[0,8]},'
                '"e":{"dtype":"F16","shape":[0,7],"data_offsets":[8,8]},'
                '"":{"dtype":"BOOL","shape":[1],"data_offsets":[8,9]}}',
                6,
            ),
        ),
        (
            [("big", "U8", (2**53 + 1,), 2**53 + 1)],
            None,
            prefixed(
                '{"big":{"dtype":"U8","shape":[9007199254740993],"data_offsets":[0,9007199254740993]}}', 3
            ),
        ),
    ],
    ids=["nothing", "empty metadata", "metadata only", "one", "one and metadata", "three", "beyond doubles"],
)
def test_header(tensors, metadata, expected):
    assert header(tensors, metadata) == expected


@pytest.mark.parametrize("length", range(9))
def test_padding_is_the_least_that_aligns_the_data(length):
    written = header([("n" * length, "U8", (1,), 1)], None)
    text = written[8:]
    assert int.from_bytes(written[:8], "little") == len(text)
    assert len(text) % 8 == 0
    assert len(text) - len(text.rstrip(b" ")) < 8
    assert text.rstrip(b" ").endswith(b"}")


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("", '""'),
        ('"', r'"\""'),
        ("\\", r'"\\"'),
        ("/", '"/"'),
        ("\b\f\n\r\t", r'"\b\f\n\r\t"'),
        ("\0\x01\x0b\x1e\x1f", r'"\u0000\u0001\u000b\u001e\u001f"'),
        ("\x7f\x80\xa0", '"\x7f\x80\xa0"'),
        ("\u2028\u2029\ufeff\uffff", '"\u2028\u2029\ufeff\uffff"'),
        ("é漢\U0001f600\U0010ffff", '"é漢\U0001f600\U0010ffff"'),
        ("</script>&'", '"</script>&\'"'),
    ],
)
def test_escapes(text, quoted):
    assert quote(text) == quoted


@pytest.mark.parametrize("number", range(32))
def test_every_control_character_is_escaped(number):
    short = {8: "b", 9: "t", 10: "n", 12: "f", 13: "r"}
    assert quote(chr(number)) == f'"\\{short.get(number, f"u{number:04x}")}"'


@pytest.mark.parametrize("where", ["name", "key", "value"])
def test_lone_surrogates_are_refused(where):
    name, key, value = ("\ud800" if place == where else "a" for place in ("name", "key", "value"))
    with pytest.raises(UnicodeEncodeError):
        header([(name, "U8", (1,), 1)], {key: value})


def test_metadata_comes_first_and_in_the_order_given():
    keys = ["z", "", "a", "__metadata__", 'k"', "\U0001f600", "Z"]
    metadata = {key: str(position) for position, key in enumerate(keys)}
    written = header([("", "U8", (1,), 1)], metadata)
    entries = json.loads(written[8:])
    assert list(entries) == ["__metadata__", ""]
    assert list(entries["__metadata__"].items()) == list(metadata.items())


def test_too_long_a_header_is_refused(monkeypatch):
    """At a limit that is cheap to reach."""
    assert layout.MAX_HEADER_NBYTES == 100_000_000
    overhead = len('{"__metadata__":{"":""}}')
    monkeypatch.setattr(layout, "MAX_HEADER_NBYTES", 1000)
    for nbytes in (993, 999, 1000):  # the padding counts
        assert len(header([], {"": "v" * (nbytes - overhead)})) == 8 + 1000
    for nbytes in (1001, 1008, 5000):
        with pytest.raises(HeaderTooLarge):
            header([], {"": "v" * (nbytes - overhead)})
    assert len(header([], {"": "é" * 488})) == 8 + 1000
    with pytest.raises(HeaderTooLarge):  # bytes count, not characters
        header([], {"": "é" * 489})


# The order in the file -----------------------------------------------------------------------------------


def width(code: str) -> int:
    """Bits of one element, from the code's own digits."""
    if code == "BOOL":
        return 0  # eight bits in the file, but the last of all
    return int(re.sub(r"^B?[A-Z]+(\d+).*$", r"\1", code))


def test_every_dtype_has_a_rank():
    assert set(CODES.values()) <= set(DTYPE_ORDER)
    assert len(set(CODES.values())) == len(CODES)


def test_wide_dtypes_come_first():
    widths = [width(code) for code in sorted(DTYPE_ORDER, key=DTYPE_ORDER.__getitem__)]
    assert widths == sorted(widths, reverse=True)


def test_ranks_of_equal_widths():
    """As safetensors declares them: not alphabetical, and not by kind."""
    by_width = itertools.groupby(sorted(DTYPE_ORDER, key=DTYPE_ORDER.__getitem__), width)
    assert [" ".join(codes) for _, codes in by_width] == [
        "U64 I64 F64 C64",
        "F32 U32 I32",
        "BF16 F16 U16 I16",
        "F8_E5M2FNUZ F8_E4M3FNUZ F8_E8M0 F8_E4M3 F8_E5M2 I8 U8",
        "F6_E3M2 F6_E2M3",
        "F4",
        "BOOL",
    ]


# Reading it back -----------------------------------------------------------------------------------------


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    st.dictionaries(
        NAMES.filter(lambda name: name != "__metadata__"),
        # The 4 makes whole bytes of any number of the narrow ones.
        st.tuples(
            st.sampled_from(sorted(DTYPE_ORDER)), st.lists(DIMS, max_size=3).map(lambda dims: (4, *dims))
        )
        .map(lambda what: (*what, math.prod(what[1]) * BITS[what[0]] // 8))
        # Readers count in 64 bits, and the dimensions one after another: a zero at the end comes too late.
        .filter(lambda what: math.prod(filter(None, what[1])) < 2**56),
        max_size=5,
    ),
    st.none() | st.dictionaries(NAMES, NAMES, max_size=4),
)
def test_what_is_written_can_be_read(tensors, metadata):
    written = header(((name, *what) for name, what in tensors.items()), metadata)
    nbytes = sum(size for _, _, size in tensors.values())
    found = read_header(io.BytesIO(written), len(written) + nbytes)
    assert found.nbytes == len(written)
    assert found.metadata == metadata
    offsets = list(itertools.accumulate((size for _, _, size in tensors.values()), initial=0))
    expected = {
        (name, code, shape, begin, begin + size)
        for (name, (code, shape, size)), begin in zip(tensors.items(), offsets)
    }
    assert set(found.tensors) == expected
    assert [tensor.begin for tensor in found.tensors] == offsets[:-1]


def stored(entries: object) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def entry(begin: int, end: int) -> dict[str, object]:
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("data", "nbytes_behind"),
    [
        (b"", 0),
        (b"\x10\0\0", 0),
        (struct.pack("<Q", 100) + b"{}", 0),
        (struct.pack("<Q", 100_000_001) + b"{}", sys.maxsize),
        (struct.pack("<Q", 2**64 - 1) + b"{}", 0),
        (stored(b"{"), 0),
        (stored(b'{"\xff":1}'), 0),
        (stored(b"[" * 100_000), 0),
        (stored([1]), 0),
        (stored({"a": 1}), 0),
        (stored({"a": {"dtype": "U8", "shape": [1]}}), 1),
        (stored({"a": {"dtype": "U8", "shape": 1, "data_offsets": [0, 1]}}), 1),
        (stored({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0]}}), 1),
        (stored({"a": {"dtype": "U8", "shape": [1], "data_offsets": ["0", "1"]}}), 1),
        (stored({"a": entry(0, 4), "b": {**entry(0, 4), "data_offsets": ["0", "4"]}}), 4),
        (stored({"a": {**entry(0, 4), "shape": [5]}}), 4),
        (stored({"a": {**entry(0, 4), "shape": [2, 2], "dtype": "F32"}}), 4),
        (stored({"a": {**entry(0, 4), "shape": [-2, -2]}}), 4),
        (stored({"a": {**entry(0, 4), "shape": [2.0, 2]}}), 4),
        (stored({"a": {**entry(0, 4), "shape": [True, 4]}}), 4),
        (stored({"a": {**entry(0, 4), "dtype": "F128"}}), 4),
        (stored({"a": {**entry(0, 4), "dtype": ["U8"]}}), 4),
        (stored({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 2]}}), 2),
        (
            stored(
                b'{"a":'
                + json.dumps(entry(0, 4)).encode()
                + b',"a":'
                + json.dumps(entry(4, 8)).encode()
                + b"}"
            ),
            8,
        ),
        (stored({"a": entry(0, 4), "b": entry(3, 8)}), 8),
        (stored({"a": entry(0, 4), "b": entry(5, 8)}), 8),
        (stored({"a": entry(4, 0)}), 0),
        (stored({"a": entry(1, 4)}), 4),
        (stored({"a": entry(0, 4)}), 3),
        (stored({"a": entry(0, 4)}), 5),
    ],
    ids=(
        "empty, short prefix, cut, over the limit, absurd length, no JSON, no UTF-8, too deep, a list, a number, no offsets,"
        " shape no list, one offset, offsets as text, some offsets as text,"
        " too many elements, too few bytes, negative shape, fraction, truth, dtype, list of dtypes, half a byte, name twice, overlap, gap, backwards, late start, too short, too long"
    ).split(", "),
)
def test_files_that_cannot_be_right_are_refused(data, nbytes_behind):
    with pytest.raises(ValueError):
        read_header(io.BytesIO(data), len(data) + nbytes_behind)
