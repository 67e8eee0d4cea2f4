# SPDX-License-Identifier: Apache-2.0
"""``dtype=``: the files are those of tensors cast beforehand, ``tensor.to(dtype)``, to the bit.

Except for the bits of NaNs, which torch itself writes one way or the other: what they become has its own test.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch as reference
import torch
from conftest import BUDGET, assert_same
from helpers import DTYPES, FLOAT4, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st

import fastshard
from fastshard import Options, _native
from fastshard.engine import tensors
from fastshard.engine.plan import CASTS, FETCHED, HOST, FilePlan, TensorView

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TARGETS = [F32, F16, BF16, E4M3, E5M2]
NATIVE = [F64, *TARGETS]
FOREIGN = [
    getattr(torch, name)
    for name in ("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
    if getattr(torch, name, None) in DTYPES
]
"""Floating-point types that torch casts for us, of those that the installed safetensors can save."""
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SMALL = Options(memory_budget=BUDGET, threads=2)
ENGINES = [
    Options(memory_budget=BUDGET, threads=threads, write_path=write_path)
    for threads, write_path in ((1, "buffered"), (3, "mapped"))
]
StateDict = dict[str, torch.Tensor]


def words(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of the elements."""
    return tensor.view(WORDS[tensor.element_size()])


def from_words(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The inverse, of non-negative integers."""
    sign = 1 << (8 * dtype.itemsize - 1)
    if dtype.itemsize > 1:
        bits = torch.where(bits >= sign, bits - 2 * sign, bits)
    return bits.to(WORDS[dtype.itemsize]).view(dtype)


def cast_beforehand(tensors_: StateDict, dtype: torch.dtype) -> StateDict:
    return {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in tensors_.items()
    }


def reference_bytes(tensors_: StateDict, dtype: torch.dtype) -> bytes:
    return bytes(reference.save(cast_beforehand(tensors_, dtype)))


def numbers(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> torch.Tensor:
    """Of all magnitudes that float16 has, and some beyond; no NaN."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-28, 18, shape, generator=generator)
    found = (torch.randn(shape, generator=generator, dtype=F64) * 2.0**exponents).to(dtype)
    return torch.where(found.isnan(), torch.ones((), dtype=dtype), found) if dtype.itemsize > 1 else found


# Every kind of number ------------------------------------------------------------------------------------


def halves_and_neighbours() -> list[int]:
    """Mantissas of a float32 at, just below and just above every tie of a shorter mantissa."""
    found = {0, 1, 0x7FFFFF}
    for bit in range(23):
        for odd, beside in itertools.product((1, 3, 5, 7), (-1, 0, 1)):
            found.add((odd << bit) + beside & 0x7FFFFF)
            found.add(-(odd << bit) + beside & 0x7FFFFF)
    return sorted(found)


def float32s() -> torch.Tensor:
    """Every sign and exponent with all these mantissas, and anything."""
    heads = torch.arange(512) << 23
    listed = (heads[:, None] | torch.tensor(halves_and_neighbours())).flatten()
    anything = torch.randint(0, 1 << 32, (1_000_000,), generator=torch.Generator().manual_seed(1))
    return from_words(torch.cat([listed, anything]), F32)


def float64s() -> torch.Tensor:
    """Those, half way between two of them, their neighbours, and what is subnormal as float32, and anything."""
    singles = words(float32s()[::5].to(F64))
    generator = torch.Generator().manual_seed(2)
    anything = torch.randint(-(1 << 63), (1 << 63) - 1, (400_000,), generator=generator)
    exponents = torch.randint(840, 1160, (400_000,), generator=generator) << 52
    zeros = torch.tensor(-1) << torch.randint(0, 52, (400_000,), generator=generator)
    near = anything & zeros & ~(0x7FF << 52) | exponents
    ties = [singles + delta for delta in (0, 1, -1, 1 << 28, (1 << 28) - 1, (1 << 28) + 1)]
    return torch.cat([*ties, anything, near]).view(F64)


def every(dtype: torch.dtype) -> torch.Tensor:
    if dtype is F64:
        return float64s()
    if dtype is F32:
        return float32s()
    return from_words(torch.arange(1 << 8 * dtype.itemsize), dtype)


def saved(tensor: torch.Tensor, dtype: torch.dtype, **options: object) -> torch.Tensor:
    """As it comes back from the file."""
    found: torch.Tensor = fastshard.load(fastshard.save({"t": tensor}, dtype=dtype, **options))["t"]
    return found


def assert_cast(source: torch.Tensor, found: torch.Tensor, dtype: torch.dtype) -> None:
    expected = source.to(dtype).contiguous()
    assert found.dtype is dtype
    nans = expected.to(F32).isnan()
    assert torch.equal(found.to(F32).isnan(), nans)
    differ = ((words(found) != words(expected)) & ~nans).nonzero()
    if len(differ):
        at = tuple(differ[0].tolist())
        pytest.fail(f"{source[at]} became {found[at]}, expected {expected[at]}")


@pytest.mark.parametrize("source", [*NATIVE, *FOREIGN], ids=str)
def test_every_number(source: torch.dtype) -> None:
    values = every(source)
    for target in TARGETS:
        assert_cast(values, saved(values, target), target)
        # Through the loop for elements that lie apart, too.
        apart = words(values)[::17].repeat(2, 1).t().contiguous().view(source)[:, 0]
        assert_cast(apart, saved(apart, target, allow_strided=True), target)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.floats(width=64) | st.floats(width=32) | st.floats(width=16), max_size=70))
def test_any_numbers(values: list[float]) -> None:
    for source, target in itertools.product((F64, F32), TARGETS):
        tensor = torch.tensor(values, dtype=source)
        assert_cast(tensor, saved(tensor, target), target)


@pytest.mark.parametrize("number", [0.0, -0.0, float("inf"), float("-inf"), 1e-45, -1e-45, 448.0, 464.0, 1e9])
def test_remarkable_numbers(number: float) -> None:
    for target in TARGETS:
        assert_cast(torch.full((33,), number), saved(torch.full((33,), number), target), target)


@pytest.mark.parametrize("source", NATIVE, ids=str)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_nans(source: torch.dtype, target: torch.dtype) -> None:
    """To bfloat16 0x7fc0; to a float8 0x7f with their sign; else sign and leading payload, made quiet."""
    values = every(source)
    if source.itemsize == 1:  # which not every torch can pick from
        values = words(values)[values.to(F32).isnan()].view(source)
    else:
        values = values[values.to(F32).isnan()]
    if source is target:
        assert torch.equal(words(saved(values, target)), words(values))
        return
    found = words(saved(values, target)).to(torch.int64) & (1 << 8 * target.itemsize) - 1
    sign = (words(values).to(torch.int64) >> 8 * source.itemsize - 1 & 1) << 8 * target.itemsize - 1
    if target is BF16:
        expected = torch.full_like(found, 0x7FC0)
    elif target.itemsize == 1:
        expected = sign | 0x7F
    else:
        mantissa = {F64: 52, F32: 23, F16: 10, BF16: 7, E4M3: 3, E5M2: 2}
        payload = words(values).to(torch.int64) & (1 << mantissa[source]) - 1
        shift = mantissa[target] - mantissa[source]
        payload = payload << shift if shift > 0 else payload >> -shift
        quiet = 0 if (source, target) == (BF16, F32) else 1 << mantissa[target] - 1
        infinity = {F32: 0xFF << 23, F16: 0x1F << 10}[target]
        expected = sign | infinity | quiet | payload
    assert torch.equal(found, expected)


# Every kind of tensor ------------------------------------------------------------------------------------


def mixed() -> StateDict:
    """Every type there is a cast from, those there is none of, and unusual shapes."""
    found = {f"{dtype}.{n}": numbers(3, n, dtype=dtype, seed=n) for dtype in NATIVE for n in (1, 37)}
    return {
        **found,
        **{str(dtype): torch.arange(64).to(torch.uint8).view(dtype) for dtype in FOREIGN},
        "int": torch.arange(7),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        **({"complex": torch.complex(numbers(3), numbers(3))} if torch.complex64 in DTYPES else {}),
        "scalar": torch.tensor(3.3),
        "empty": torch.empty(0, 3),
        "empty double": torch.empty(4, 0, dtype=F64),
        "parameter": torch.nn.Parameter(numbers(3, 3)),
    }


@functools.cache
def strided() -> StateDict:
    """More than a slot of each, so that chunks cut them everywhere."""
    return {
        "transposed": numbers(701, 603).t(),
        "columns": numbers(600, 700)[:, 100:633],
        "every other": numbers(600_001)[::2],
        "swapped": numbers(53, 61, 97, dtype=F16).permute(2, 0, 1),
        "double transposed": numbers(401, 503, dtype=F64).t(),
        "rows of pairs": numbers(90_001, 3, dtype=BF16)[:, :2],
        "narrow": numbers(333_333, dtype=E5M2)[1::2],
        "plain": numbers(600_003),
        "int": torch.arange(40_000).view(200, 200).t(),
    }


@pytest.mark.parametrize("dtype", TARGETS, ids=str)
def test_mixed_dict(tmp_path: Path, dtype: torch.dtype) -> None:
    expected = reference_bytes(mixed(), dtype)
    assert_same(fastshard.save(mixed(), dtype=dtype), expected)
    for engine in ENGINES:
        path = tmp_path / "weights"
        fastshard.save_file(mixed(), path, dtype=dtype, engine=engine)
        assert_same(path.read_bytes(), expected)


@pytest.mark.parametrize("dtype", [F32, BF16, E5M2], ids=str)
def test_strided(tmp_path: Path, dtype: torch.dtype) -> None:
    expected = reference_bytes(strided(), dtype)
    for engine in ENGINES:
        path = tmp_path / "weights"
        fastshard.save_file(strided(), path, dtype=dtype, allow_strided=True, engine=engine)
        assert_same(path.read_bytes(), expected)
        stats = fastshard.stats()
        assert stats is not None
        assert stats.staging_nbytes <= BUDGET
    assert_same(fastshard.save(strided(), dtype=dtype, allow_strided=True, engine=SMALL), expected)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_any_view(data: st.DataObject) -> None:
    source = data.draw(st.sampled_from(NATIVE))
    shape = data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=3))
    tensor = numbers(*shape, dtype=source).permute(data.draw(st.permutations(range(len(shape)))))
    for dim in range(tensor.dim()):
        first, step = data.draw(st.integers(0, tensor.shape[dim])), data.draw(st.integers(1, 3))
        tensor = tensor[(slice(None),) * dim + (slice(first, None, step),)]
    target = data.draw(st.sampled_from(TARGETS))
    assert_same(
        fastshard.save({"t": tensor}, dtype=target, allow_strided=True),
        reference_bytes({"t": tensor}, target),
    )


def test_misaligned_memory() -> None:
    memory = bytearray(words(numbers(1001)).numpy().tobytes() + b"...")
    memory[1:] = memory[:-1]
    tensor = torch.frombuffer(memory, dtype=F32, offset=1, count=1001)
    assert_same(fastshard.save({"t": tensor}, dtype=F16), reference_bytes({"t": tensor}, F16))


def test_expanded() -> None:
    tensor = numbers(1, 5, 1).expand(7, 5, 3)
    assert_same(
        fastshard.save({"t": tensor}, dtype=BF16, allow_strided=True), reference_bytes({"t": tensor}, BF16)
    )


def test_negative_bit() -> None:
    tensor = torch.complex(numbers(50), numbers(50)).conj().imag
    assert_same(
        fastshard.save({"t": tensor}, dtype=BF16, allow_strided=True), reference_bytes({"t": tensor}, BF16)
    )


def test_of_the_target_type_already() -> None:
    tensors_ = {"a": numbers(100, dtype=BF16), "b": torch.arange(4)}
    entries = tensors.describe(tensors_, allow_strided=False, dtype=BF16)
    assert entries == tensors.describe(tensors_, allow_strided=False)


# The public functions ------------------------------------------------------------------------------------


def test_save_files(tmp_path: Path) -> None:
    files = {tmp_path / str(seed): {"w": numbers(300, 300, seed=seed)} for seed in range(5)}
    fastshard.save_files(files, dtype=F16, durable=True, engine=SMALL)
    for path, tensors_ in files.items():
        assert_same(path.read_bytes(), reference_bytes(tensors_, F16))


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(30, 20)
        self.second = torch.nn.Linear(30, 20)
        self.second.weight = self.first.weight
        self.register_buffer("count", torch.arange(3))
        self.turned = torch.nn.Parameter(numbers(20, 30).t())


@pytest.mark.parametrize("dtype", [BF16, E4M3], ids=str)
def test_save_model(tmp_path: Path, dtype: torch.dtype) -> None:
    model = Tied()
    fastshard.save_model(model, tmp_path / "ours", dtype=dtype)
    reference.save_model(model.to(dtype), tmp_path / "theirs")
    assert_same((tmp_path / "ours").read_bytes(), (tmp_path / "theirs").read_bytes())


@pytest.mark.usefixtures("planned_in_python")
def test_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from an accelerator without a native device: cast on this side, a slot at a time."""
    monkeypatch.setattr(tensors, "_PIECE_NBYTES", 5000)
    foreign = {**mixed(), **strided()}
    expected = reference_bytes(foreign, BF16)
    plain_view = tensors.view_of

    def unusual(tensor: torch.Tensor, _: int, nbytes: int) -> tuple[torch.Tensor, TensorView]:
        return plain_view(tensor, FETCHED, nbytes)

    monkeypatch.setattr(tensors, "view_of", unusual)  # of what is strided
    fastshard.save_file(foreign, tmp_path / "weights", dtype=BF16, allow_strided=True, engine=SMALL)
    assert_same((tmp_path / "weights").read_bytes(), expected)


# Errors --------------------------------------------------------------------------------------------------

FUNCTIONS: list[Callable[..., object]] = [
    lambda tensors_, path, **options: fastshard.save(tensors_, **options),
    fastshard.save_file,
    lambda tensors_, path, **options: fastshard.save_files({path: tensors_}, **options),
    lambda tensors_, path, **options: fastshard.save_model(
        torch.nn.ParameterDict({**tensors_}), path, **options
    ),
]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [F64, torch.int8, torch.complex64, torch.bool, "float15", "f", "", 16])
def test_no_such_target(tmp_path: Path, function: Callable[..., object], dtype: object) -> None:
    with pytest.raises(
        ValueError,
        match=f"^cannot save as {dtype}: dtype must be one of float32 .*float8_e5m2 .*, not {dtype}$",
    ):
        function({"a": numbers(3)}, tmp_path / "weights", dtype=dtype)
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    "name", ["bf16", "bfloat16", "torch.bfloat16", "BF16", "fp8_e4m3fn", "float8_e4m3fn", "half"]
)
def test_targets_by_name(tmp_path: Path, function: Callable[..., object], name: str) -> None:
    target = {"b": BF16, "f": torch.float8_e4m3fn, "h": torch.float16}[name.lower().removeprefix("torch.")[0]]
    state = {"a": numbers(300)}
    found: list[object] = [
        function(state, tmp_path / "weights", dtype=target),
        function(state, tmp_path / "other", dtype=name),
    ]
    if found[0] is None:
        found = [(tmp_path / "weights").read_bytes(), (tmp_path / "other").read_bytes()]
    assert found[0] == found[1]


@pytest.mark.usefixtures("planned_in_python")
def test_targets_by_name_on_the_way_through_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"a": numbers(300)}
    fastshard.save_file(state, tmp_path / "expected", dtype=BF16)
    monkeypatch.setattr(tensors, "device_number", lambda device: FETCHED)
    monkeypatch.setattr(tensors, "HOST", FETCHED)
    fastshard.save_file(state, tmp_path / "weights", dtype="bf16")
    assert (tmp_path / "weights").read_bytes() == (tmp_path / "expected").read_bytes()
    fastshard.save_torch_state_dict(state, tmp_path, dtype="bf16")
    assert (tmp_path / "model.safetensors").read_bytes()[-600:] == (tmp_path / "expected").read_bytes()[-600:]


@pytest.mark.skipif(FLOAT4 is None, reason="this torch has no type it cannot cast")
def test_what_torch_cannot_cast_either(tmp_path: Path) -> None:
    tensors_ = {"fine": numbers(3), "four bits": torch.arange(8).to(torch.uint8).view(FLOAT4)}
    with pytest.raises(NotImplementedError, match="cannot save `four bits` as torch.bfloat16: .*copy"):
        fastshard.save_file(tensors_, tmp_path / "weights", dtype=BF16)
    assert snapshot(tmp_path) == {}


def test_sources_are_judged_first(tmp_path: Path) -> None:
    tensor = numbers(4, 4)
    with pytest.raises(RuntimeError, match="share memory"):
        fastshard.save_file({"a": tensor, "b": tensor}, tmp_path / "weights", dtype=BF16)
    with pytest.raises(ValueError, match="non contiguous tensor: `a`"):
        fastshard.save_file({"a": tensor.t()}, tmp_path / "weights", dtype=BF16)
    assert snapshot(tmp_path) == {}


@pytest.mark.skipif(not FOREIGN, reason="this safetensors has no type that torch casts for us")
@pytest.mark.parametrize("write_path", ["buffered", "mapped"])
def test_a_failing_fetch_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_path: str
) -> None:
    def fetch(*_: object) -> None:
        raise RuntimeError("gone")

    monkeypatch.setattr(tensors, "fetch", fetch)
    foreign = {"a": numbers(300_000), "b": torch.arange(64).to(torch.uint8).view(FOREIGN[0])}
    options = Options(memory_budget=BUDGET, write_path=write_path)
    with pytest.raises(RuntimeError, match="gone"):
        fastshard.save_file(foreign, tmp_path / "weights", dtype=E4M3, engine=options)
    assert snapshot(tmp_path) == {}


# Plans ---------------------------------------------------------------------------------------------------


def view(elements: int, cast: tuple[str, str], device: int = HOST) -> TensorView:
    itemsize = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
    source, target = cast
    return TensorView(
        0x10000, elements * itemsize.get(target, 1), device, cast=(CASTS[source], CASTS[target])
    )


@given(
    st.lists(st.integers(0, 5000), max_size=9),
    st.sampled_from([HOST, 0]),
    st.sampled_from(["F32", "BF16", "F8_E4M3"]),
    st.integers(1, 5),
)
def test_elements_stay_whole(sizes: list[int], device: int, target: str, pages: int) -> None:
    plan = FilePlan(b"file", bytes(72), [view(size, ("F64", target), device) for size in sizes])
    (chunks,) = _native.schedule([plan], pages * 4096, pages * 4096, 40960, 3, True)
    itemsize = plan.items[0].nbytes // sizes[0] if sizes and sizes[0] else 1
    reached = 0
    for offset, nbytes, route, ops in chunks:
        assert offset == reached
        reached += nbytes
        for item, _, first_byte, length in ops:
            if item == 0:
                continue
            assert route == ("packed" if device == HOST else "device")
            assert first_byte % itemsize == length % itemsize == 0
    assert reached == plan.nbytes


@pytest.mark.parametrize(
    ("header", "bad", "what"),
    [
        (8, TensorView(0x10000, 8, HOST, cast=(0, 2)), "unsupported cast"),
        (8, TensorView(0x10000, 8, HOST, cast=(2, 0)), "unsupported cast"),
        (8, TensorView(0x10000, 8, HOST, cast=(2, 1)), "unsupported cast"),
        (8, TensorView(0x10000, 8, HOST, cast=(7, 2)), "unsupported cast"),
        (8, TensorView(0x10000, 8, HOST, cast=(2, 8)), "unsupported cast"),
        (7, TensorView(0x10000, 8, HOST, cast=(2, 4)), "not aligned"),
        (8, TensorView(0x10000, 8, HOST, 4, (2, 2), (3, 1), (2, 3 + 2)), "does not match"),
        (8, TensorView(0x10000, 2, HOST, 6, (2,), (2,), (2, 5)), "whole elements"),
    ],
)
def test_bad_views(header: int, bad: TensorView, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        _native.schedule([FilePlan(b"file", bytes(header), [bad])], 4096, 4096, 4096, 8, True)
