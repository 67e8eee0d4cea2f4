# SPDX-License-Identifier: Apache-2.0
"""Headers that somebody else wrote: the verdict of safetensors, in time and memory in proportion to the file."""

from __future__ import annotations

import json
import random
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from fastshard.formats.json_text import read_json
from fastshard.formats.safetensors import BITS, parse_header

Found = list[tuple[str, str, list[int], int]]

_GOOD = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'


def file_of(head: bytes, nbytes: int) -> bytes:
    return struct.pack("<Q", len(head)) + head + bytes(nbytes)


def theirs(head: bytes, nbytes: int) -> Found | None:
    try:
        found = deserialize(file_of(head, nbytes))
    except SafetensorError:
        return None
    return sorted((name, what["dtype"], what["shape"], len(what["data"])) for name, what in found)


def ours(head: bytes, nbytes: int) -> Found | None:
    try:
        found = parse_header(head)
    except ValueError:
        return None
    if found.data_nbytes != nbytes:
        return None
    return sorted((t.name, t.code, list(t.shape), t.end - t.begin) for t in found.tensors)


def known(code: str) -> bool:
    """To the installed safetensors."""
    entry = f'{{"a":{{"dtype":"{code}","shape":[0],"data_offsets":[0,0]}}}}'
    return theirs(entry.encode(), 0) is not None


CODES = [code for code in BITS if known(code)]


@pytest.mark.parametrize(
    "change",
    [
        (b"", b""),
        (b"{", b" \n\t\r{"),
        (b"}}", b"}}\n\t "),
        (b"}}", b"}}x"),
        (b"}}", b"}}{}"),
        (b"}}", b"}},"),
        (b"}}", b"},}"),
        (b"{", b"\xef\xbb\xbf{"),
        (b"{", b"\xff{"),
        (b'"a"', b'"\xed\xa0\x80"'),
        (b'"a"', b'"\xc0\x80"'),
        (b'"a"', b'"\xf4\x90\x80\x80"'),
        (b'"a"', b'"\xf0\x9f\x98\x80"'),
        (b'"a"', b'"\\ud83d\\ude00"'),
        (b'"a"', b'"\\ud83d"'),
        (b'"a"', b'"\\ude00\\ud83d"'),
        (b'"a"', b'"\\u0000"'),
        (b'"a"', b'"a\x00"'),
        (b'"a"', b'"a\x1f"'),
        (b'"a"', b'"a\x7f"'),
        (b'"a"', b'"\\/\\b\\f\\n\\r\\t\\\\\\""'),
        (b'"a"', b'"\\x"'),
        (b'"a"', b"'a'"),
        (b'"a"', b'""'),
        (b'"a"', b"1"),
        (b'"dtype"', b'"dty\\u0070e"'),
        (b'"dtype":"F32",', b""),
        (b'"dtype":"F32",', b'"dtype":"F32","dtype":"F32",'),
        (b'"shape":[2],', b""),
        (b'"shape":[2],', b'"shape":[2],"shape":[2],'),
        (b',"data_offsets":[0,8]', b""),
        (b',"data_offsets":[0,8]', b',"data_offsets":[0,8],"data_offsets":[0,8]'),
        (b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]}', b'["F32",[2],[0,8]]'),
        (b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]}', b'["F32",[2],[0,8],1]'),
        (b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]}', b'["F32",[2]]'),
        (b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]}', b"null"),
        (b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]}', b"5"),
        (b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]}', b'"a"'),
        (b'"F32"', b'{"F32":null}'),
        (b'"F32"', b'{"F32":1}'),
        (b'"F32"', b"{}"),
        (b'"F32"', b'{"F32":null,"F16":null}'),
        (b'"F32"', b"null"),
        (b'"F32"', b'"f32"'),
        (b'"F32"', b'["F32"]'),
        (b'"F32"', b'"F\\u00332"'),
        *(
            (b"[2]", b"[%s]" % number)
            for number in (b"2.0", b"2e0", b"20e-1", b"02", b"+2", b"-2", b"-0", b"0x2")
        ),
        *(
            (b"[2]", b"[%s]" % value)
            for value in (b"true", b"null", b'"2"', b"[2]", b"2,", b",2", b"2 1", b"NaN")
        ),
        (b"[2]", b"[2,1,1]"),
        (b"[2]", b"[ 2 ,\n1 ]"),
        (b"[2]", b"[1,2,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]"),
        (b"[2]", b"2"),
        (b"[2]", b"null"),
        (b"[2]", b'{"0":2}'),
        (b"[2]", b"[18446744073709551616]"),
        (b'[2],"data_offsets":[0,8]', b'[9223372036854775808,0],"data_offsets":[0,0]'),
        (b'[2],"data_offsets":[0,8]', b'[18446744073709551615,0],"data_offsets":[0,0]'),
        (b'[2],"data_offsets":[0,8]', b'[18446744073709551616,0],"data_offsets":[0,0]'),
        (b'[2],"data_offsets":[0,8]', b'[4294967296,4294967296,0],"data_offsets":[0,0]'),
        (b'[2],"data_offsets":[0,8]', b'[0,4294967296,4294967296],"data_offsets":[0,0]'),
        (b'[2],"data_offsets":[0,8]', b'[2305843009213693953],"data_offsets":[0,9223372036854775812]'),
        (b"[0,8]", b"[0,8,8]"),
        (b"[0,8]", b"[0]"),
        (b"[0,8]", b"[]"),
        (b"[0,8]", b"[0,8.0]"),
        (b"[0,8]", b"[false,8]"),
        (b"[0,8]", b"[8,0]"),
        (b"[0,8]", b"[-0,8]"),
        (b"[0,8]", b"[0,18446744073709551616]"),
        (b"[0,8]", b"[1,9]"),
        *(
            (b'"dtype"', b'"x":%s,"dtype"' % value)
            for value in (
                *(
                    b"1",
                    b"NaN",
                    b"Infinity",
                    b"-Infinity",
                    b"1e999",
                    b"-1e999",
                    b"1e-999",
                    b"0e999",
                    b"1e308",
                    b"1e309",
                ),
                *(
                    b"0." + b"0" * 400 + b"1e700",
                    b"0." + b"0" * 400 + b"1e710",
                    b"1" * 309,
                    b"1" * 308,
                    b"9" * 309,
                ),
                *(
                    b"1.7976931348623157e308",
                    b"1.7976931348623158e308",
                    b"1.7976931348623159e308",
                    b"1e",
                    b"1.",
                    b".5",
                ),
                *(
                    b"1e+99999999999999999999",
                    b"1e-99999999999999999999",
                    b"0.0e99999999999999",
                    b"-",
                    b"tru",
                    b"True",
                ),
                *(
                    b'"\\ud800"',
                    b'{"\\ud800":1}',
                    b'{"a":1,"a":2}',
                    b"[]",
                    b"{}",
                    b"[1,]",
                    b'{"a":1,}',
                    b'{"a"}',
                    b"",
                ),
                *(b"[" * depth + b"]" * depth for depth in (1, 125, 126, 1000)),
                *(b'{"a":' * depth + b"1" + b"}" * depth for depth in (1, 125, 126, 1000)),
                *(
                    b"1 2",
                    b"[1 2]",
                    b"[1,,2]",
                    b"/**/1",
                    b"1//\n",
                    b"'a'",
                    b'"\n"',
                    b"nul",
                    b"nulll",
                    b"[1:2]",
                ),
            )
        ),
        *(
            (b"{", b'{"__metadata__":%s,' % value, 1)
            for value in (
                *(
                    b"null",
                    b"{}",
                    b'{"k":"v"}',
                    b'{"k":"v","k":"w"}',
                    b'{"k":null}',
                    b'{"k":1}',
                    b'{"k":{}}',
                    b'{"k":["v"]}',
                ),
                *(
                    b"[]",
                    b'["k"]',
                    b'"x"',
                    b"3",
                    b"true",
                    b'{"k":"\\ud800"}',
                    b'{"k":"\\u00e9"}',
                    b'{"k":"v",}',
                    b'{"k"}',
                ),
                *(
                    b'null,"__metadata__":null',
                    b'{},"__metadata__":{}',
                    b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]}',
                ),
                *(b'{ "k" : "v" , "l" : "\\n" }', b'{"k":"v" "l":"w"}', b'{"":""}'),
            )
        ),
        (b"{", b'{"__metadat\\u0061__":{"k":"v"},', 1),
        (b"{", b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},', 1),
        (b"{", b'{"a":{"dtype":"F32","shape":["1"],"data_offsets":[0,4]},', 1),
        (b"{", b'{"a":{"dtype":"F32","shape":[77],"data_offsets":[5,4]},', 1),
        (b"{", b'{"b":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},', 1),
        (b"{", b'{"b":{"dtype":"F32","shape":[0],"data_offsets":[8,8]},', 1),
        (b"{", b'{"b":{"dtype":"F32","shape":[0],"data_offsets":[4,4]},', 1),
        (b"{", b'{"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]},', 1),
        (b'{"a":', b"["),
        (b"}}", b"}]"),
        (_GOOD, b"{}"),
        (_GOOD, b"[]"),
        (_GOOD, b"null"),
        (_GOOD, b""),
        (_GOOD, b"   "),
    ],
    ids=lambda change: repr(change[1][:60]),
)
@pytest.mark.parametrize("nbytes", [8, 0])
def test_the_verdict_is_that_of_safetensors(change: tuple[bytes, ...], nbytes: int) -> None:
    head = _GOOD.replace(change[0], change[1], 1) if change[0] else _GOOD
    assert ours(head, nbytes) == theirs(head, nbytes)


_TOKEN = re.compile(rb'"[^"]*"|[0-9.]+|[\[\]{},:]|\w+')
_PIECES = [
    *(
        b'1e3 1.0 -0 -1 18446744073709551615 18446744073709551616 true null NaN "0" [ ] { } , : " \\ [] {}'
    ).split(),
    *(b"\\ud800 \\u0061 F8_E8M0 F6_E3M2 F4 C64 e E+5 .5 0 1e400 /*x*/").split(),
    *(
        b" ",
        b"\n",
        b"\x0b",
        b"\x00",
        b"\xff",
        b"\xc3\xa9",
        b"\xef\xbb\xbf",
        b"\xc2\xa0",
        b'"dtype":"F32",',
        b'"x":1,',
    ),
    *(b'"__metadata__":null,', b'"__metadata__":{},', b'{"F16":null}', b'["F32",[1],[0,4]]'),
]


def _entry(draw: st.DrawFn, begin: int) -> tuple[bytes, int]:
    code = draw(st.sampled_from([code for code in CODES if BITS[code] >= 8]))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    count = 1
    for size in shape:
        count *= size
    end = begin + count * BITS[code] // 8
    fields = [f'"dtype":"{code}"', f'"shape":{json.dumps(shape)}', f'"data_offsets":[{begin},{end}]']
    if draw(st.booleans()):
        fields.append('"more":{"x":[1,-2.5e3,null,"\\n"]}')
    return f"{{{','.join(draw(st.permutations(fields)))}}}".encode(), end


@st.composite
def heads(draw: st.DrawFn) -> tuple[bytes, int]:
    """A header that is right, with up to three places changed, and the number of bytes behind it."""
    parts, reached = [], 0
    for name in draw(st.lists(st.sampled_from(["a", "b", "c", "é", "\\u00e9", "\\n"]), max_size=3)):
        text, reached = _entry(draw, reached)
        parts.append(f'"{name}":'.encode() + text)
    if draw(st.booleans()):
        parts.insert(draw(st.integers(0, len(parts))), b'"__metadata__":{"k":"v"}')
    head = b"{" + b",".join(parts) + b"}"
    for _ in range(draw(st.integers(0, 3))):
        spans = [match.span() for match in _TOKEN.finditer(head)] or [(0, 0)]
        begin, end = draw(st.sampled_from(spans))
        first, last = draw(st.sampled_from(spans))
        piece = draw(st.sampled_from([b"", head[first:last], *_PIECES]))
        head = head[:begin] + piece + head[end if draw(st.booleans()) else begin :]
    return head, draw(st.sampled_from([reached, reached, 8, 0]))


@settings(derandomize=True, deadline=None, max_examples=600)
@given(heads())
def test_the_verdict_on_what_chance_makes_is_that_of_safetensors(what: tuple[bytes, int]) -> None:
    assert ours(*what) == theirs(*what)


def test_thousands_of_changes() -> None:
    """More than hypothesis looks at in the time."""
    chance = random.Random(11)
    taken = 0
    seeds = [
        _GOOD,
        b'{"__metadata__":{"k":"v","l":"\\u00e9"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b'{"b":{"dtype":"BF16","shape":[2,1],"data_offsets":[0,4]},"a":{"x":[1,{"y":-1.5e3}],"dtype":{"F16":null},"shape":[2],"data_offsets":[4,8]}}',
        b'{"a":["F64",[1],[0,8]] , "b":{"shape":[0,3],"dtype":"U8","data_offsets":[8,8]}}',
    ]
    for _ in range(15_000):
        head = chance.choice(seeds)
        for _ in range(chance.randint(1, 3)):
            spans = [match.span() for match in _TOKEN.finditer(head)] or [(0, 0)]
            (begin, end), (first, last) = chance.choice(spans), chance.choice(spans)
            piece = chance.choice((head[first:last], bytes([chance.randrange(256)]), b"", *_PIECES))
            head = head[:begin] + piece + head[end if chance.random() < 0.7 else begin :]
        verdict = theirs(head, 8)
        assert ours(head, 8) == verdict, head
        taken += verdict is not None
    assert 100 < taken < 19_000


# Bombs ---------------------------------------------------------------------------------------------------

_BOMBS = r"""
import io, resource, struct, sys
from fastshard.formats import json_text as jsontext, safetensors as layout, hf_index as checkpoint

def one(shape, offsets=b"0,0", more=b""):
    return b'{"a":{%s"dtype":"F32","shape":[%s],"data_offsets":[%s]}}' % (more, shape, offsets)

heads = {
    "2,000,000 twos": one(b",".join([b"2"] * 2_000_000)),
    "2,000,000 zeros": one(b",".join([b"0"] * 2_000_000)),
    "4,000 dimensions of 4,200 digits": one(b",".join([b"9" * 4200] * 4000)),
    "a dimension of 4,000,000 digits": one(b"9" * 4_000_000),
    "an offset of 4,000,000 digits": one(b"1", b"0," + b"9" * 4_000_000),
    "a number of 4,000,000 digits somewhere": one(b"0", more=b'"x":' + b"9" * 4_000_000 + b","),
    "a fraction of 40,000,000 digits somewhere": one(b"0", more=b'"x":0.' + b"9" * 40_000_000 + b","),
    "brackets": b"[" * 10_000_000,
    "braces": b'{"a":' * 10_000_000,
    "brackets in an entry": b'{"a":' + b"[" * 10_000_000,
    "empty lists": b'{"a":[' + b"[]," * 10_000_000,
    "empty lists in metadata": b'{"__metadata__":[' + b"[]," * 10_000_000,
    "empty lists in another field": one(b"0", more=b'"x":[' + b"[]," * 10_000_000),
    "10,000,000 strings": b'{"a":[' + b'"xy",' * 10_000_000,
    "a long name": b'{"' + b"n" * 40_000_000 + b'":{"dtype":"U8","shape":[1],"data_offsets":[0,0]}}',
    "spaces": b"{" + b" " * 60_000_000,
    "escapes": b'{"' + b"\\n" * 10_000_000,
}
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))  # all of them together take two or three seconds
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), used + (1 << 30)))
for name, head in heads.items():
    head += b" " * (-len(head) % 8)
    try:
        layout.read_header(io.BytesIO(struct.pack("<Q", len(head)) + head), 8 + len(head))
    except ValueError as error:
        assert len(str(error)) < 1000, name
    else:
        print("taken:", name)
texts = {
    "brackets": "[" * 10_000_000,
    "deep": "[" * 9_000 + "]" * 9_000,
    "lists": "[" + ",".join(["[]"] * 10_000_000) + "]",
    "objects": "[" + ",".join(["{}"] * 10_000_000) + "]",
    "digits": '{"weight_map":' + "9" * 4_000_000 + "}",
    "twice": '{"' + "n" * 4_000_000 + '":1,"' + "n" * 4_000_000 + '":1}',
}
for name, text in texts.items():
    for read in (checkpoint.files_of_index, checkpoint.read_object):
        try:
            read(text, "index")
        except ValueError as error:
            assert len(str(error)) < 1000, name
        else:
            print("taken:", name)
"""


def test_bombs_are_refused_within_a_gibibyte_and_a_minute() -> None:
    done = subprocess.run([sys.executable, "-c", _BOMBS], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_long_list_of_texts_is_read(tmp_path: Path) -> None:
    pairs = {str(i): "v" for i in range(50_000)} | {'quoted " and \n': "é\u2028"}
    entries = {f"t{i}": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(50_000)}
    for separators in ((",", ":"), (", ", ": ")):
        head = json.dumps({"__metadata__": pairs, **entries}, separators=separators).encode()
        found = parse_header(head)
        assert found.metadata == pairs and list(found.metadata) == list(pairs)
        assert [t.name for t in found.tensors] == list(entries)


# Small files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"a":1,"a":2}', "'a' occurs twice"),
        ('{"a":NaN}', "NaN is not JSON"),
        ('{"a":-Infinity}', "is not JSON"),
        ('{"a":"\\ud800"}', "surrogates not allowed"),
        ('{"a":' + "1" * 50 + "}", "a number of 50 digits"),
        ("\ufeff{}", "BOM"),
        ("[1]", None),
        ('{"a":"\\ud83d\\ude00"}', None),
    ],
)
def test_small_files(text: str, words: str | None) -> None:
    if words is None:
        assert read_json(text) == json.loads(text)
        return
    with pytest.raises(ValueError, match=words):
        read_json(text)


def test_a_small_file_in_another_encoding() -> None:
    with pytest.raises(ValueError):
        read_json('{"a": "é"}'.encode("utf-16"))
