# SPDX-License-Identifier: Apache-2.0
"""What we save they load, what they save we load, with vLLM's and SGLang's own classes; started by loaders.py."""

from __future__ import annotations

import ast
import collections
import glob
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import filled, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st

from fastshard import load_sharded_state, save_sharded_state

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs, about what is not installed

State = dict[str, torch.Tensor]
SIZES = [None, 5000, 1]


class Engine:
    """One of the two, as a rank of any world."""

    name: str
    ranks: types.SimpleNamespace

    def at(self, tp_rank: int = 0, tp_size: int = 1, pp_rank: int = 0, pp_size: int = 1) -> None:
        self.ranks = types.SimpleNamespace(tp_rank=tp_rank, tp_size=tp_size, pp_rank=pp_rank, pp_size=pp_size)

    def save(self, state: State, path: Path, pattern: str | None, max_size: int | None) -> None:
        self.loader.save_model(types.SimpleNamespace(state_dict=lambda: state), str(path), pattern, max_size)

    loader: Any


class VLLM(Engine):
    name = "vllm"

    def __init__(self) -> None:
        sys.path.append(os.environ["FASTSHARD_VLLM"])
        import vllm.distributed as distributed
        from vllm.config.load import LoadConfig
        from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader

        self.loader, self._config = ShardedStateLoader, LoadConfig
        distributed.get_tensor_model_parallel_rank = lambda: self.ranks.tp_rank
        distributed.get_pipeline_model_parallel_rank = lambda: self.ranks.pp_rank
        distributed.get_tp_group = lambda: types.SimpleNamespace(world_size=self.ranks.tp_size)
        distributed.get_pp_group = lambda: types.SimpleNamespace(world_size=self.ranks.pp_size)

    def load(self, state: State, path: Path, pattern: str | None) -> None:
        extra = {"pattern": pattern} if pattern else {}
        loader = self.loader(self._config(load_format="sharded_state", model_loader_extra_config=extra))
        model = types.SimpleNamespace(state_dict=lambda: state)
        loader.load_weights(model, types.SimpleNamespace(model=str(path), model_weights=None))


class SGLang(Engine):
    """Only the class: its module imports the whole engine."""

    name = "sglang"

    def __init__(self) -> None:
        tree = ast.parse(Path(os.environ["FASTSHARD_SGLANG_LOADER"]).read_text())
        (found,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "ShardedStateLoader")
        code = compile(
            ast.Module([found], []), "sglang", "exec"
        )  # its annotations stay texts, as this file's do

        class Base:
            def __init__(self, load_config: Any) -> None:
                self.load_config = load_config

        class Model(torch.nn.Module):
            def state_dict(self, *args: Any, **kwargs: Any) -> State:  # type: ignore[override]
                return state_of[0]

        state_of: list[State] = []
        self._state_of = state_of
        names: dict[str, Any] = {
            "BaseModelLoader": Base,
            "collections": collections,
            "glob": glob,
            "os": os,
            "torch": torch,
            "Dict": dict,
            "List": list,
            "Tuple": tuple,
            "Any": Any,
            "logger": __import__("logging").getLogger("sglang"),
            "get_parallel": lambda: types.SimpleNamespace(tp_rank=self.ranks.tp_rank),
            "set_default_torch_dtype": lambda dtype: torch.no_grad(),
            "_initialize_model": lambda *_: Model(),
            "_get_quantization_config": lambda *_: None,
            "post_load_weights": lambda model: None,
        }
        exec(code, names)
        self.loader = names["ShardedStateLoader"]

    def load(self, state: State, path: Path, pattern: str | None) -> None:
        extra = {"pattern": pattern} if pattern else {}
        config = types.SimpleNamespace(model_loader_extra_config=extra, load_format="sharded_state")
        self._state_of[:] = [state]
        self.loader(config).load_model(
            model_config=types.SimpleNamespace(model_path=str(path), dtype=torch.float32, revision=None),
            device_config=types.SimpleNamespace(device="cpu"),
        )


ENGINES: dict[str, Callable[[], Any]] = {"vllm": VLLM, "sglang": SGLang}


@pytest.fixture(scope="session", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Any:
    return ENGINES[request.param]()


def plain(seed: int) -> State:
    return {f"layers.{i}.weight": filled((32, 16), seed=seed + i) for i in range(9)}


def tied(seed: int) -> State:
    embedding = filled((40, 16), seed=seed)
    return {"model.embed_tokens.weight": embedding, **plain(seed + 1), "lm_head.weight": embedding}


def overlapping(seed: int) -> State:
    qkv, halves = filled((48, 16), seed=seed), filled((20, 8), seed=seed + 1)
    return {
        "q": qkv[:16],
        "scale": filled((), seed=seed),
        "qkv": qkv,
        "a": halves[:10],
        "none": torch.zeros(0, 4),
        "b": halves[10:],
        "kv": qkv[16:],
    }


def fp8(seed: int) -> State:
    state = {f"{i}.weight": filled((64, 48), torch.float8_e4m3fn, seed + i) for i in range(4)}
    scales = {f"{i}.weight_scale": filled((1,), seed=seed + i) for i in range(4)}
    return {
        **state,
        **scales,
        "e5m2": filled((33,), torch.float8_e5m2, seed),
        "bf16": filled((7,), torch.bfloat16),
    }


STATES = {make.__name__: make for make in (plain, tied, overlapping, fp8)}


def blank(state: State) -> State:
    """The same tensors, views and all, with other bytes."""
    storages: dict[int, torch.UntypedStorage] = {}
    out = {}
    for name, tensor in state.items():
        storage = tensor.untyped_storage()
        copy = storages.setdefault(storage.data_ptr(), torch.UntypedStorage(storage.nbytes()).fill_(0x55))
        out[name] = torch.empty(0, dtype=tensor.dtype).set_(
            copy, tensor.storage_offset(), tensor.shape, tensor.stride()
        )
    return out


def assert_same(found: State, expected: State) -> None:
    for name, tensor in expected.items():
        one, other = (t.contiguous().view(-1).view(torch.uint8) for t in (found[name], tensor))
        assert torch.equal(one, other), name


def worlds(engine: Any) -> Iterator[dict[str, int]]:
    for tp_size in (1, 2, 4):
        for tp_rank in range(tp_size):
            yield {"tp_rank": tp_rank, "tp_size": tp_size}
    if engine.name == "vllm":  # SGLang's names have no stage
        for pp_rank in range(2):
            for tp_rank in range(2):
                yield {"tp_rank": tp_rank, "tp_size": 2, "pp_rank": pp_rank, "pp_size": 2}


@pytest.mark.parametrize("max_size", SIZES)
@pytest.mark.parametrize("make", STATES)
def test_files_and_loaders(engine: Any, make: str, max_size: int | None, tmp_path: Path) -> None:
    for number, world in enumerate(worlds(engine)):
        # The ranks of one world share a directory.
        size = f"{world['tp_size']}-{world.get('pp_size', 1)}"
        ours, theirs = tmp_path / size / "ours", tmp_path / size / "theirs"
        for directory in (ours, theirs):
            directory.mkdir(parents=True, exist_ok=True)
        state = STATES[make](100 * number)
        engine.at(**world)
        save_sharded_state(state, ours, max_size=max_size, **world)
        engine.save(state, theirs, None, max_size)
        for load, path in ((load_ours(world), theirs), (load_ours(world), ours), (engine.load, ours)):
            empty = blank(state)
            load(empty, path, None)
            assert_same(empty, state)
    for directory in tmp_path.iterdir():
        assert_same_parts(snapshot(directory / "ours"), snapshot(directory / "theirs"))


def load_ours(world: dict[str, int]) -> Callable[[State, Path, str | None], None]:
    return lambda state, path, pattern: load_sharded_state(state, path, pattern=pattern, **world) and None


def assert_same_parts(ours: dict[str, bytes], theirs: dict[str, bytes]) -> None:
    """To the byte; the empty first part, which they write and we do not, moves the numbers of the others."""
    for found in (ours, theirs):
        for name in [
            name for name, data in found.items() if len(data) <= 16 or name.startswith("fastshard-")
        ]:
            del found[name]
    ranks = {name.split("-part-")[0] for name in theirs}
    assert ranks == {name.split("-part-")[0] for name in ours}
    for rank in ranks:
        parts = [
            [
                found[name]
                for name in sorted(found, key=lambda n: (len(n), n))
                if name.startswith(f"{rank}-part-")
            ]
            for found in (ours, theirs)
        ]
        assert parts[0] == parts[1]


@pytest.mark.parametrize("max_size", SIZES)
def test_strided_parameters(engine: Any, max_size: int | None, tmp_path: Path) -> None:
    state = {
        **plain(0),
        "transposed": filled((24, 16), seed=5).t(),
        "columns": filled((8, 32), seed=6)[:, 4:20],
    }
    engine.at()
    with pytest.raises((RuntimeError, ValueError)):
        engine.save(state, tmp_path, None, None)
    for path in tmp_path.iterdir():
        path.unlink()
    save_sharded_state(state, tmp_path, max_size=max_size)
    contiguous = {name: torch.zeros(tensor.shape) for name, tensor in state.items()}
    engine.load(contiguous, tmp_path, None)
    assert_same(contiguous, state)
    strided = blank(state)
    if engine.name == "sglang":
        engine.load(strided, tmp_path, None)
    else:
        load_sharded_state(strided, tmp_path)
    assert_same(strided, state)


def test_patterns(engine: Any, tmp_path: Path) -> None:
    for number, pattern in enumerate(
        ["draft-{rank}-{part}.safetensors", "{{x}}.{rank:03d}.p{part}.st", "a{part}"]
    ):
        path = tmp_path / str(number)
        path.mkdir()
        engine.at()
        state = plain(number)
        save_sharded_state(state, path, pattern=pattern, max_size=5000)
        empty = blank(state)
        engine.load(empty, path, pattern)
        assert_same(empty, state)
        engine.save(state, path, pattern, 5000)
        empty = blank(state)
        load_sharded_state(empty, path, pattern=pattern)
        assert_same(empty, state)


def test_modules(engine: Any, tmp_path: Path) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_tokens = torch.nn.Embedding(50, 16)
            self.layers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(3))
            self.lm_head = torch.nn.Linear(16, 50, bias=False)
            self.lm_head.weight = self.embed_tokens.weight
            self.register_buffer("inv_freq", torch.rand(8))

    model, other = Model(), Model()
    engine.at()
    engine.loader.save_model(model, str(tmp_path))
    load_sharded_state(other, tmp_path)
    assert_same(other.state_dict(), model.state_dict())
    save_sharded_state(Model(), tmp_path, max_size=2000)
    engine.load(other.state_dict(), tmp_path, None)
    load_sharded_state(model, tmp_path)
    assert_same(other.state_dict(), model.state_dict())


@settings(deadline=None, max_examples=150)
@given(
    views=st.lists(
        st.tuples(
            st.sampled_from("zyxwvutsrqponm"), st.integers(0, 2), st.integers(0, 20), st.integers(0, 20)
        ),
        max_size=10,
    ),
    max_size=st.one_of(st.none(), st.integers(1, 200)),
)
def test_views_are_filtered_alike(
    engine: Any,
    tmp_path_factory: pytest.TempPathFactory,
    views: list[tuple[str, int, int, int]],
    max_size: int | None,
) -> None:
    """Only those that they can save: of views that overlap in part they refuse the file."""
    bases = [filled((40,), seed=i) for i in range(3)]
    state = {name: bases[base][begin : begin + length] for name, base, begin, length in views}
    path = tmp_path_factory.mktemp("views")
    for name in ("ours", "theirs"):
        (path / name).mkdir()
    engine.at()
    save_sharded_state(state, path / "ours", max_size=max_size)
    try:
        engine.save(state, path / "theirs", None, max_size)
    except RuntimeError as error:
        assert "share memory" in str(error)
        empty = blank(state)
        engine.load(empty, path / "ours", None)
        assert_same(empty, state)
        return
    assert_same_parts(snapshot(path / "ours"), snapshot(path / "theirs"))
