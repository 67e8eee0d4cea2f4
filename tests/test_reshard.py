# SPDX-License-Identifier: Apache-2.0
"""Checkpoints cut into ranks' parts, put together, cut anew: bytes, agreement with transformers, hostile input."""

import filecmp
import json
import os
import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from conftest import by_one_worker
from helpers import filled, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fastshard import merge_checkpoint, reshard_checkpoint, shard_checkpoint
from fastshard.cli import command as cli
from fastshard.engine import pipeline
from fastshard.formats.hf_index import read_checkpoint
from fastshard.tools import outputs, reshard
from fastshard.tools import parts as parts_module
from fastshard.tools.tp_plan import Split

RANKS = 2


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below, with its contents."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def checkpoint(folder: Path, *files: dict[str, torch.Tensor], **metadata: str) -> Path:
    """A folder with these files, and an index if there are several."""
    folder.mkdir()
    if len(files) == 1:
        save_file(files[0], folder / "model.safetensors", metadata or None)
        return folder
    names = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    for name, tensors in zip(names, files):
        save_file(tensors, folder / name, metadata or None)
    places = {tensor: name for name, tensors in zip(names, files) for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": places})
    )
    return folder


SIMPLE = {"up": "colwise", "down": "rowwise"}


def simple(folder: Path) -> Path:
    return checkpoint(
        folder,
        {"up.weight": filled((8, 6)), "down.weight": filled((6, 8), seed=1)},
        {"up.bias": filled((8,), torch.bfloat16), "down.bias": filled((6,), seed=2), "n": torch.tensor(3)},
        format="pt",
    )


# Models of transformers ------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
MODELS = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True, "attention_bias": True},
    "qwen2": {},
    "mixtral": {"num_local_experts": 4},
}


def config_of(model: str, **changed: object):
    transformers = pytest.importorskip("transformers")
    kind = model.partition("-")[0]
    return transformers.AutoConfig.for_model(kind, **{**SIZES, **MODELS[model], **changed})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders as ``save_pretrained`` makes them, in several files."""
    pytest.importorskip("transformers")
    return by_one_worker(tmp_path_factory, "models", saved_models)


def saved_models(top: Path) -> dict[str, Path]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    for name in MODELS:
        model = transformers.AutoModelForCausalLM.from_config(config_of(name))
        model.save_pretrained(top / name, max_shard_size="20KB")
        (top / name / "tokenizer.json").write_text('{"version": "1.0"}')
    return {name: top / name for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_merged_it_is_the_source_again(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    shard_checkpoint(models[name], tmp_path / "parts", RANKS)
    merge_checkpoint(tmp_path / "parts", tmp_path / "whole")
    assert tree(tmp_path / "whole") == tree(models[name])
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 2


def transformers_parts(source: Path, rank: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """What transformers' own loader leaves on that rank; the other ranks are not there."""
    transformers = pytest.importorskip("transformers")
    distributed = pytest.importorskip("transformers.distributed")
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    for variable, value in (("RANK", rank), ("WORLD_SIZE", RANKS), ("LOCAL_RANK", rank)):
        monkeypatch.setenv(variable, str(value))
    torch.distributed.init_process_group("fake", store=fake.FakeStore(), rank=rank, world_size=RANKS)
    try:
        config = distributed.DistributedConfig(tp_size=RANKS)
        model = transformers.AutoModelForCausalLM.from_pretrained(source, distributed_config=config)
        return {name: getattr(t, "_local_tensor", t).clone() for name, t in model.state_dict().items()}
    finally:
        torch.distributed.destroy_process_group()
        for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(variable)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_a_rank_has_what_transformers_loads_on_it(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A rank's part is a model of its own, with a share of the heads, of the inner width and of the vocabulary."""
    transformers = pytest.importorskip("transformers")
    shard_checkpoint(models[name], tmp_path / "parts", RANKS)
    shares = ("vocab_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    config = config_of(name, **{share: SIZES[share] // RANKS for share in shares})
    for rank in range(RANKS):
        folder = tmp_path / "parts" / f"rank-{rank}"
        config.save_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        ours = model.state_dict()
        theirs = transformers_parts(models[name], rank, monkeypatch)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.filterwarnings("ignore")
def test_a_rank_has_its_share_of_each_parameter_that_a_tensor_becomes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries, and fewer keys and values, in one tensor. transformers' own loader cannot cut such a tensor, but does cut
    what it becomes."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if "sarvam_moe" not in CONFIG_MAPPING:
        pytest.skip("this transformers does not know such a model")
    sizes = {**SIZES, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}
    config = transformers.AutoConfig.for_model("sarvam_moe", **sizes, attention_bias=True)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    shard_checkpoint(tmp_path / "source", tmp_path / "parts", RANKS)
    merge_checkpoint(tmp_path / "parts", tmp_path / "whole")
    assert tree(tmp_path / "whole") == tree(tmp_path / "source")
    checkpoint(tmp_path / "converted", model.state_dict(), format="pt")
    config.save_pretrained(tmp_path / "converted")
    shares = ("vocab_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads")
    shared = {name: sizes[name] // RANKS for name in (*shares, "num_key_value_heads")}
    config = transformers.AutoConfig.for_model("sarvam_moe", **{**sizes, **shared}, attention_bias=True)
    for rank in range(RANKS):
        folder = tmp_path / "parts" / f"rank-{rank}"
        stored = {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
        assert stored["model.layers.0.attention.query_key_value.weight"].shape == (32, 32)
        config.save_pretrained(folder)
        ours = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
        theirs = transformers_parts(tmp_path / "converted", rank, monkeypatch)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.filterwarnings("ignore")
def test_styles_split_as_in_transformers() -> None:
    tensor_parallel = pytest.importorskip("transformers.distributed.tensor_parallel")
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    from torch.distributed.tensor import Replicate, Shard

    from fastshard.tools.tp_plan import STYLES, split_of

    shapes = {"weight": [(8, 4), (3, 8, 4)], "bias": [(8,)]}
    torch.distributed.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=2)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        known = set(STYLES) & set(tensor_parallel.ALL_PARALLEL_STYLES)
        assert len(known) > 15
        for style in sorted(known - {"embedding_colwise", "embedding_rowwise"}):
            for parameter, shape in ((p, s) for p in shapes for s in shapes[p]):
                module = torch.nn.Module()
                module.register_parameter(parameter, torch.nn.Parameter(torch.empty(shape, device="meta")))
                tensor_parallel.ALL_PARALLEL_STYLES[style].shard_param(module, parameter, mesh)
                (placement,) = getattr(getattr(module, parameter), "placements", (Replicate(),))
                if isinstance(placement, Replicate):
                    expected = None
                else:
                    groups = 1 if isinstance(placement, Shard) else placement.split_factor
                    expected = Split(placement.dim % len(shape), groups)
                assert split_of(f"m.{parameter}", shape, style) == expected, (style, parameter, shape)
    finally:
        torch.distributed.destroy_process_group()


def test_most_plans_of_transformers_are_known() -> None:
    pytest.importorskip("transformers")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from fastshard.tools.tp_plan import STYLES

    expert_parallel = {"ep_dispatch_experts", "grouped_gemm", "moe_topk", "moe_renormalize"}
    for kind in (
        "llama",
        "qwen2",
        "qwen3",
        "mixtral",
        "mistral",
        "gemma3_text",
        "phi3",
        "deepseek_v3",
        "glm4",
    ):
        plan = CONFIG_MAPPING[kind].base_model_tp_plan
        assert plan and set(plan.values()) - expert_parallel <= set(STYLES), kind


def test_heads_that_cannot_be_shared_out_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"k_proj\.weight: 2 key and value heads .* by 4 ranks"):
        shard_checkpoint(models["llama"], tmp_path / "parts", 4)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight: dimension 0 of \[64, 32\] .* 3 ranks"):
        shard_checkpoint(models["llama"], tmp_path / "parts", 3, plan={"model.embed_tokens": "colwise"})
    assert not (tmp_path / "parts").exists()


def test_a_plan_file_may_replicate_key_and_value_heads(models: dict[str, Path], tmp_path: Path) -> None:
    plan = {"model.layers.*.self_attn.q_proj": "colwise", "model.layers.*.self_attn.k_proj": "replicate"}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    shard_checkpoint(models["llama"], tmp_path / "parts", 4, plan=tmp_path / "plan.json")
    found = {
        name: tensor.shape
        for path in (tmp_path / "parts" / "rank-3").glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    assert found["model.layers.1.self_attn.q_proj.weight"] == (8, 32)
    assert found["model.layers.1.self_attn.k_proj.weight"] == (16, 32)
    merge_checkpoint(tmp_path / "parts", tmp_path / "whole")
    assert tree(tmp_path / "whole") == tree(models["llama"])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, r"extra\.scale is not a parameter .* quantized"),
        ({}, r"extra\.scale is not a parameter of LlamaForCausalLM"),
        ({"num_hidden_layers": 1}, r"layers\.1\..* is not a parameter"),
        ({"hidden_size": 16}, r"has shape \[.*\], LlamaForCausalLM has"),
        ({"model_type": "nothing-known"}, "nothing-known"),
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "no tensor-parallel plan"),
        (
            {"architectures": ["BertModel", 3, "os", "__name__", "PreTrainedModel"]},
            r"is not a parameter of LlamaModel",
        ),
    ],
    ids="quantized, extra tensor, missing layer, other width, unknown model, no plan, other classes".split(
        ", "
    ),
)
def test_tensors_the_model_does_not_have(
    models: dict[str, Path], tmp_path: Path, change: dict[str, object], text: str
) -> None:
    source = tmp_path / "source"
    shutil.copytree(models["llama"], source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **change}))
    first = sorted(source.glob("*.safetensors"))[0]
    index = source / "model.safetensors.index.json"
    if "scale" in text or "PreTrainedModel" in str(change):
        save_file({**load_file(first), "extra.scale": torch.ones(1)}, first)
        told = json.loads(index.read_text())
        told["weight_map"]["extra.scale"] = first.name
        index.write_text(json.dumps(told))
    with pytest.raises(ValueError, match=text):
        shard_checkpoint(source, tmp_path / "parts", RANKS)
    assert not (tmp_path / "parts").exists()


# Bytes -----------------------------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.float8_e4m3fn]


@st.composite
def tensors_and_plans(draw: st.DrawFn):
    ranks = draw(st.integers(1, 4))
    tensors, plan = {}, {}
    for i in range(draw(st.integers(1, 5))):
        style = draw(
            st.sampled_from(["colwise", "rowwise", "packed_colwise", "packed_rowwise", "replicate", None])
        )
        shape = draw(st.lists(st.integers(0, 5), min_size=2, max_size=4))
        dim = {"c": len(shape) - 2, "r": len(shape) - 1}.get((style or "").removeprefix("packed_")[:1], 0)
        shape[dim] *= ranks * 2
        name = f"t{i}.weight"
        tensors[name] = filled(tuple(shape), draw(st.sampled_from(DTYPES)), seed=i)
        if style is not None:
            plan[f"t{i}"] = style
    return ranks, tensors, plan


@settings(
    derandomize=True,
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(what=tensors_and_plans(), short_runs=st.booleans())
def test_any_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what, short_runs: bool) -> None:
    ranks, tensors, plan = what
    # By system calls that deal out rows, or run by run as the engine does it.
    monkeypatch.setattr(parts_module, "_FEW_RUNS", 0 if short_runs else 1 << 20)
    monkeypatch.setattr(parts_module, "_MAX_PARTS", 3)
    for name in ("source", "parts", "whole"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    source = checkpoint(tmp_path / "source", tensors)
    shard_checkpoint(source, tmp_path / "parts", ranks, plan=plan)
    for rank in range(ranks):
        found = load_file(tmp_path / "parts" / f"rank-{rank}" / "model.safetensors")
        for name, tensor in tensors.items():
            expected = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
            style = plan.get(name.removesuffix(".weight"), "replicate")
            if style != "replicate":
                dim = tensor.dim() - (1 if "row" in style else 2)
                groups = expected.chunk(2, dim) if "packed" in style else [expected]
                expected = torch.cat([torch.tensor_split(g, ranks, dim)[rank] for g in groups], dim)
            assert torch.equal(found[name].view(expected.dtype), expected), (name, style)
    merge_checkpoint(tmp_path / "parts", tmp_path / "whole")
    assert tree(tmp_path / "whole") == tree(source)


@pytest.mark.parametrize("shape", [(16, 5), (2, 3, 16), (4, 16, 3), (0, 16), (16, 0)])
@pytest.mark.parametrize("sizes", [(8, 4, 4), (12, 0, 4)])
@pytest.mark.parametrize("short_runs", [False, True])
def test_parts_of_different_sizes_in_any_dimension(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    sizes: tuple[int, ...],
    short_runs: bool,
) -> None:
    monkeypatch.setattr(parts_module, "_FEW_RUNS", 0 if short_runs else 1 << 20)
    dim = shape.index(16)
    whole = filled(shape, torch.bfloat16)
    source = checkpoint(tmp_path / "source", {"a": filled((3,)), "w": whole, "z": filled((5,), seed=1)})
    splits = {"a": None, "w": Split(dim, len(sizes), sizes), "z": None}
    monkeypatch.setattr(reshard, "splits_of", lambda tensors, plan: splits)
    shard_checkpoint(source, tmp_path / "parts", 4, plan={})
    for rank in range(4):
        found = load_file(tmp_path / "parts" / f"rank-{rank}" / "model.safetensors")
        expected = [group.chunk(4, dim)[rank] for group in whole.split(sizes, dim) if group.shape[dim]]
        assert torch.equal(found["w"], torch.cat(expected, dim))
        assert torch.equal(found["z"], filled((5,), seed=1))
    merge_checkpoint(tmp_path / "parts", tmp_path / "whole")
    assert tree(tmp_path / "whole") == tree(source)


def test_rows_that_begin_and_end_inside_a_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine asks for 16 MiB at a time, whatever a row's length."""
    from fastshard import Options

    tensors = {"a": filled((700, 3 * 1001)), "b": filled((3, 5, 300_000), torch.uint8, seed=1)}
    source = checkpoint(tmp_path / "source", tensors)
    shard_checkpoint(source, tmp_path / "parts", 3, plan={"a": "rowwise", "b": "rowwise"})
    monkeypatch.setattr(parts_module, "_FEW_RUNS", 0)
    merge_checkpoint(tmp_path / "parts", tmp_path / "whole", engine=Options(memory_budget=1 << 20))
    assert tree(tmp_path / "whole") == tree(source)


def test_headers_that_others_wrote_come_back_too(tmp_path: Path) -> None:
    """Order, spaces and metadata as in the source, though not as safetensors has them."""
    source = tmp_path / "source"
    source.mkdir()
    text = json.dumps(
        {
            "z": {"data_offsets": [0, 8], "shape": [2, 4], "dtype": "F8_E4M3"},
            "a\u00e9": {"dtype": "F6_E2M3", "shape": [4, 8], "data_offsets": [8, 32]},
            "__metadata__": {"b": "1", "a": "\ud83d\ude00"},
        },
        indent=1,
    ).encode()
    (source / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(range(32)))
    shard_checkpoint(source, tmp_path / "parts", 2, plan={"z": "rowwise", "a\u00e9": "rowwise"})
    merge_checkpoint(tmp_path / "parts", tmp_path / "whole")
    assert tree(tmp_path / "whole") == tree(source)


def test_a_byte_is_not_split(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    text = b'{"w":{"dtype":"F4","shape":[2,2],"data_offsets":[0,2]}}'
    (source / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"ab")
    with pytest.raises(ValueError, match="w: 1 elements of F4 do not end at a byte"):
        shard_checkpoint(source, tmp_path / "parts", 2, plan={"w": "rowwise"})


def test_descriptions_go_to_the_engine_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "_MAX_ITEMS", 3)
    source = simple(tmp_path / "source")
    shard_checkpoint(source, tmp_path / "parts", 2, plan=SIMPLE)
    merge_checkpoint(tmp_path / "parts", tmp_path / "whole")
    assert tree(tmp_path / "whole") == tree(source)


def test_a_rank_s_folder_is_a_checkpoint(tmp_path: Path) -> None:
    source = simple(tmp_path / "source")
    shard_checkpoint(source, tmp_path / "parts", 2, plan=SIMPLE)
    found = read_checkpoint(tmp_path / "parts" / "rank-1")
    assert found.files.keys() == read_checkpoint(source).files.keys()
    assert all(file.header.metadata == {"format": "pt"} for file in found.files.values())
    index = json.loads((tmp_path / "parts" / "rank-1" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 2 * 96 + 8 + 24 + 8}
    told = json.loads((tmp_path / "parts" / "rank-1" / "tensor_parallel.json").read_text())
    assert (told["ranks"], told["rank"]) == (2, 1)
    assert told["tensors"]["down.weight"] == {"shape": [6, 8], "dim": 1, "intervals": [[4, 8]]}
    assert told["tensors"]["down.bias"] == {"shape": [6], "dim": None}


# Other sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["20KB", 20_000])
def test_resharded_as_save_pretrained_does_it(
    models: dict[str, Path], tmp_path: Path, size: int | str
) -> None:
    reshard_checkpoint(models["qwen2"], tmp_path / "one", "1GB")
    assert sorted(p.name for p in (tmp_path / "one").glob("model*")) == ["model.safetensors"]
    reshard_checkpoint(tmp_path / "one", tmp_path / "many", size)
    files = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(files) > 3 and all(path.stat().st_size < 30_000 for path in files)
    told = [read_checkpoint(folder) for folder in (models["qwen2"], tmp_path / "one", tmp_path / "many")]
    bytes_of = [
        {name: (t.code, t.shape, contents(c, name)) for name, (_, t) in c.home().items()} for c in told
    ]
    assert bytes_of[0] == bytes_of[1] == bytes_of[2]
    pytest.importorskip("transformers").AutoModelForCausalLM.from_pretrained(tmp_path / "many")


def contents(found, name: str) -> bytes:
    filename, tensor = found.home()[name]
    file = found.files[filename]
    data = Path(file.path).read_bytes()
    return data[file.header.nbytes + tensor.begin : file.header.nbytes + tensor.end]


def test_resharded_in_place(models: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(models["llama"], tmp_path / "m")
    (tmp_path / "m" / "notes.txt").write_text("mine")
    reshard_checkpoint(tmp_path / "m", tmp_path / "m", "1GB", force=True)
    assert {p.name for p in (tmp_path / "m").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "notes.txt", "tokenizer.json",
    }  # fmt: skip
    reshard_checkpoint(models["llama"], tmp_path / "one", "1GB")
    whole = "model.safetensors"
    assert (tmp_path / "m" / whole).read_bytes() == (tmp_path / "one" / whole).read_bytes()


def test_ranks_files_of_another_size(models: dict[str, Path], tmp_path: Path) -> None:
    shard_checkpoint(models["mixtral"], tmp_path / "parts", 2, max_shard_size="10KB")
    assert len(list((tmp_path / "parts" / "rank-0").glob("*.safetensors"))) > len(
        list(models["mixtral"].glob("*.safetensors"))
    )
    merge_checkpoint(tmp_path / "parts", tmp_path / "whole")
    assert tree(tmp_path / "whole") == tree(models["mixtral"])


@pytest.mark.parametrize("size", ["5GiB", "x", "-"])
def test_sizes_nobody_understands(tmp_path: Path, size: str) -> None:
    source = simple(tmp_path / "source")
    with pytest.raises(ValueError):
        reshard_checkpoint(source, tmp_path / "out", size)
    assert not (tmp_path / "out").exists()


def test_metadata_that_contradict_each_other(tmp_path: Path) -> None:
    source = simple(tmp_path / "source")
    first = sorted(source.glob("*.safetensors"))[0]
    save_file(load_file(first), first, {"format": "tf"})
    with pytest.raises(ValueError, match="00002.*'format'"):
        reshard_checkpoint(source, tmp_path / "out", "1GB")


# Targets ---------------------------------------------------------------------------------------------------


def test_a_target_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    source = simple(tmp_path / "source")
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    for call in (
        lambda: shard_checkpoint(source, out, 2, plan=SIMPLE),
        lambda: reshard_checkpoint(source, out, "1GB"),
    ):
        with pytest.raises(FileExistsError) as caught:
            call()
        assert caught.value.filename == str(out)
    assert tree(out) == {"precious": b"x"}


def test_forced_it_replaces_what_was_made_before(tmp_path: Path) -> None:
    source = simple(tmp_path / "source")
    (source / "config.json").write_text("{}")
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    shard_checkpoint(source, out, 4, plan={"up": "colwise"})
    (out / "notes").write_text("mine")
    shard_checkpoint(source, out, 2, plan=SIMPLE, force=True)
    shard_checkpoint(source, fresh, 2, plan=SIMPLE)
    assert tree(out) == {**tree(fresh), "notes": b"mine"}
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["rank-0", "rank-1"]


def test_the_source_is_no_target(tmp_path: Path) -> None:
    source = simple(tmp_path / "source")
    before = tree(source)
    with pytest.raises(ValueError, match="is the source itself"):
        shard_checkpoint(source, source, 2, plan=SIMPLE, force=True)
    assert tree(source) == before


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = simple(tmp_path / "source")
    shard_checkpoint(source, tmp_path / "parts", 2, plan=SIMPLE)
    before = tree(tmp_path / "parts")
    finish = pipeline.finish

    def fail(*what: object) -> None:
        finish(*what)
        raise OSError(5, "no more", "x")

    monkeypatch.setattr("fastshard.engine.pipeline.finish", fail)
    for force, out in ((True, tmp_path / "parts"), (False, tmp_path / "new" / "deep")):
        with pytest.raises(OSError):
            shard_checkpoint(source, out, 4, plan={"up": "colwise"}, force=force)
    assert tree(tmp_path / "parts") == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("ranks", [0, -1, 1 << 20, 2.0, True])
def test_numbers_of_ranks(tmp_path: Path, ranks: object) -> None:
    with pytest.raises(ValueError, match="number of ranks"):
        shard_checkpoint(simple(tmp_path / "source"), tmp_path / "out", ranks, plan=SIMPLE)


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """Of 240 MiB, in a process of its own: mapped pages count too."""
    tensors = {f"w{i}.weight": torch.zeros(1024, 20480) for i in range(3)}
    source = checkpoint(tmp_path / "source", tensors)
    script = """
        import fastshard.tools.reshard
        def kib(key):
            return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
        source, out = sys.argv[1:]
        styles = {"w0": "colwise", "w1": "rowwise", "w2": "packed_rowwise"}
        save_file({"a": torch.ones(5)}, out + ".warm")
        open("/proc/self/clear_refs", "w").write("5")
        before = kib("VmRSS")
        shard_checkpoint(source, out, 4, plan=styles)
        merge_checkpoint(out, out + "-whole")
        print(kib("VmHWM") - before)
    """
    done = run(script, source, tmp_path / "parts")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < 128 << 10
    name = "model.safetensors"
    assert filecmp.cmp(source / name, tmp_path / "parts-whole" / name, shallow=False)


# Data that lies --------------------------------------------------------------------------------------------


def rewritten(path: Path, change) -> None:
    told = json.loads(path.read_text())
    change(told)
    path.write_text(json.dumps(told))


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def stored(entries: object, data: bytes) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


INDICES = {
    "elsewhere": (lambda m: m.update({"up.weight": "../model.safetensors"}), "'up.weight'.*model"),
    "absolute": (lambda m: m.update({"up.weight": "/etc/x.safetensors"}), "'up.weight'.*/etc"),
    "below": (lambda m: m.update({"up.weight": "a/x.safetensors"}), "'up.weight'.*a/x"),
    "no weights": (lambda m: m.update({"up.weight": "config.json"}), "'up.weight'.*config"),
    "the folder": (lambda m: m.update({"up.weight": ".."}), "'up.weight'"),
    "a number": (lambda m: m.update({"up.weight": 3}), "'up.weight'.*3"),
    "nul": (lambda m: m.update({"up.weight": "a\0.safetensors"}), "'up.weight'"),
    "hidden": (lambda m: m.update({"up.weight": ".x.safetensors"}), "'up.weight'"),
    "missing file": (lambda m: m.update({"x": "x.safetensors"}), r"x\.safetensors' is missing"),
    "missing tensor": (lambda m: m.update({"x": FIRST}), rf"'x' is not in '{FIRST}'"),
    "wrong file": (lambda m: m.update({"up.weight": SECOND}), rf"{FIRST}'.*'up.weight'.*{SECOND}"),
    "unnamed tensor": (lambda m: m.pop("n"), rf"{SECOND}'.*'n'.*nowhere"),
    "unnamed file": (
        lambda m: [m.pop(name) for name in ("n", "up.bias", "down.bias")],
        rf"{SECOND}' does not belong",
    ),
}


@pytest.mark.parametrize("case", INDICES)
def test_indices(tmp_path: Path, case: str) -> None:
    source = simple(tmp_path / "source")
    (tmp_path / "model.safetensors").write_bytes((source / FIRST).read_bytes())
    change, text = INDICES[case]
    rewritten(source / "model.safetensors.index.json", lambda told: change(told["weight_map"]))
    with pytest.raises(ValueError, match=text):
        shard_checkpoint(source, tmp_path / "parts", 2, plan=SIMPLE)
    assert not (tmp_path / "parts").exists()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": "b", "a": "c"}}', "\udcff", "[" * 100_000],
    ids="empty, list, no map, list as map, name twice, no text, too deep".split(", "),
)
def test_what_is_no_index(tmp_path: Path, text: str) -> None:
    source = simple(tmp_path / "source")
    (source / "model.safetensors.index.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"index\.json"):
        reshard_checkpoint(source, tmp_path / "out", "1GB")


HEADERS = {
    "size": stored({"up.weight": {"dtype": "F32", "shape": [8, 600], "data_offsets": [0, 4]}}, bytes(4)),
    "overlap": stored(
        {
            "up.weight": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
            "down.weight": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},
        },
        bytes(4),
    ),
    "short file": stored({"up.weight": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}}, bytes(4)),
    "name twice": stored(
        b'{"w":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"w":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}',
        bytes(4),
    ),
    "no header": b"\xff" * 8,
    "empty": b"",
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_lie(tmp_path: Path, case: str) -> None:
    source = simple(tmp_path / "source")
    (source / FIRST).write_bytes(HEADERS[case])
    with pytest.raises(ValueError, match=FIRST):
        shard_checkpoint(source, tmp_path / "parts", 2, plan=SIMPLE)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    source = simple(tmp_path / "source")
    save_file({**load_file(source / SECOND), "up.weight": torch.ones(1)}, source / SECOND)
    with pytest.raises(ValueError, match=rf"{SECOND}'.*'up.weight'.*{FIRST}"):
        shard_checkpoint(source, tmp_path / "parts", 2, plan=SIMPLE)


def test_folders_that_hold_no_checkpoint(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="empty' holds no .safetensors file"):
        shard_checkpoint(empty, tmp_path / "out", 2)
    two = checkpoint(tmp_path / "two", {"a": torch.ones(2)})
    save_file({"b": torch.ones(2)}, two / "other.safetensors")
    with pytest.raises(ValueError, match="several files and no index: model.safetensors, other.safetensors"):
        shard_checkpoint(two, tmp_path / "out", 2)
    with pytest.raises(FileNotFoundError):
        shard_checkpoint(tmp_path / "nowhere", tmp_path / "out", 2)
    (two / "other.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no config\.json"):
        shard_checkpoint(two, tmp_path / "out", 2)
    (two / "model.safetensors").unlink()
    os.mkfifo(two / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors' is not a regular file"):
        shard_checkpoint(two, tmp_path / "out", 2)


def test_links_are_followed_and_other_weights_stay_behind(tmp_path: Path) -> None:
    """As in the hub's cache, where a folder consists of links."""
    blobs = simple(tmp_path / "blobs")
    (blobs / "config.json").write_text("{}")
    (blobs / "pytorch_model.bin").write_text("pickled")
    (blobs / ".hidden").write_text("x")
    source = tmp_path / "source"
    source.mkdir()
    for path in blobs.iterdir():
        (source / path.name).symlink_to(Path("..") / "blobs" / path.name)
    shard_checkpoint(source, tmp_path / "parts", 2, plan=SIMPLE)
    assert {p.name for p in (tmp_path / "parts").iterdir() if p.is_file()} == {
        "config.json",
        "tensor_parallel.index.json",
    }
    assert not (tmp_path / "parts" / "config.json").is_symlink()
    merge_checkpoint(tmp_path / "parts", tmp_path / "whole")
    assert (tmp_path / "whole" / FIRST).read_bytes() == (blobs / FIRST).read_bytes()


def header_of_first(told):
    return json.loads(told["source"]["files"][FIRST])


def with_header(told, change) -> None:
    entries = header_of_first(told)
    change(entries)
    told["source"]["files"][FIRST] = json.dumps(entries)


ROOTS = {
    "file elsewhere": lambda t: t["source"]["files"].update({"../x.safetensors": "{}"}),
    "header is no text": lambda t: t["source"]["files"].update({FIRST: 3}),
    "lone surrogate": lambda t: t["source"]["files"].update({FIRST: '{"\ud800":1}'}),
    "header is no header": lambda t: t["source"]["files"].update({FIRST: "[]"}),
    "file that index lacks": lambda t: t["source"]["files"].update({"x.safetensors": '{"y":{"dtype":"U8"}}'}),
    "huge": lambda t: with_header(
        t,
        lambda h: h.update({"up.weight": {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 1 << 62]}}),
    ),
    "gone": lambda t: t["source"]["files"].pop(SECOND),
    "other shape": lambda t: with_header(t, lambda h: h["up.weight"].update(shape=[6, 8])),
    "other dtype": lambda t: with_header(t, lambda h: h["up.weight"].update(dtype="I32")),
    "other tensor": lambda t: with_header(t, lambda h: h.update(x=h.pop("up.weight"))),
    "index elsewhere": lambda t: t["source"]["index"].update(name="../x.safetensors.index.json"),
    "index without text": lambda t: t["source"]["index"].update(text=None),
    "more ranks": lambda t: t.update(ranks=3),
    "fewer ranks": lambda t: t.update(ranks=1),
    "no ranks": lambda t: t.update(ranks=0),
    "half a rank": lambda t: t.update(ranks=1.5),
    "version": lambda t: t.update(version=99),
    "no source": lambda t: t.update(source=None),
}


@pytest.fixture
def cut(tmp_path: Path) -> Path:
    shard_checkpoint(simple(tmp_path / "source"), tmp_path / "parts", 2, plan=SIMPLE)
    return tmp_path / "parts"


@pytest.mark.parametrize("case", ROOTS)
def test_manifests_that_lie_of_the_source(cut: Path, tmp_path: Path, case: str) -> None:
    rewritten(cut / "tensor_parallel.index.json", ROOTS[case])
    before = tree(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=r"tensor_parallel|rank-"):
        merge_checkpoint(cut, tmp_path / "whole")
    assert tree(tmp_path) == before


PARTS = {
    "another rank": lambda t: t.update(rank=0),
    "no tensors": lambda t: t.update(tensors=None),
    "tensor gone": lambda t: t["tensors"].pop("up.weight"),
    "no description": lambda t: t["tensors"].update({"up.weight": 1}),
    "dimension": lambda t: t["tensors"]["up.weight"].update(dim=1),
    "dimension is no number": lambda t: t["tensors"]["up.weight"].update(dim="0"),
    "shape": lambda t: t["tensors"]["up.weight"].update(shape=[8, 7]),
    "replicated": lambda t: t["tensors"]["up.weight"].update(dim=None),
    "no intervals": lambda t: t["tensors"]["up.weight"].update(intervals=[]),
    "overlap": lambda t: t["tensors"]["up.weight"].update(intervals=[[0, 4]]),
    "gap": lambda t: t["tensors"]["up.weight"].update(intervals=[[5, 8]]),
    "longer": lambda t: t["tensors"]["up.weight"].update(intervals=[[4, 9]]),
    "backwards": lambda t: t["tensors"]["up.weight"].update(intervals=[[8, 4]]),
    "negative": lambda t: t["tensors"]["up.weight"].update(intervals=[[-4, 0]]),
    "fractions": lambda t: t["tensors"]["up.weight"].update(intervals=[[4.0, 8]]),
    "no pair": lambda t: t["tensors"]["up.weight"].update(intervals=[[4, 6, 8]]),
}


@pytest.mark.parametrize("case", PARTS)
def test_manifests_that_lie_of_a_rank(cut: Path, tmp_path: Path, case: str) -> None:
    rewritten(cut / "rank-1" / "tensor_parallel.json", PARTS[case])
    with pytest.raises(ValueError, match=r"rank-[01]"):
        merge_checkpoint(cut, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_ranks_that_differ_in_what_all_of_them_hold(cut: Path, tmp_path: Path) -> None:
    path = cut / "rank-1" / SECOND
    save_file({**load_file(path), "down.bias": torch.ones(6)}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"rank-1/{SECOND}'.*'down.bias' differs"):
        merge_checkpoint(cut, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts_module, "_FEW_RUNS", 0)
    source = checkpoint(tmp_path / "source", {"w.weight": filled((64, 4096))})
    shard_checkpoint(source, tmp_path / "parts", 2, plan={"w": "rowwise"})
    path = tmp_path / "parts" / "rank-1" / "model.safetensors"
    fetch = parts_module.Interleaved.fetch

    def cut_first(self, *what: int) -> None:
        os.truncate(path, 5000)
        fetch(self, *what)

    monkeypatch.setattr(parts_module.Interleaved, "fetch", cut_first)
    with pytest.raises(ValueError, match=r"rank-1/model\.safetensors' has been cut"):
        merge_checkpoint(tmp_path / "parts", tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


# The command line ------------------------------------------------------------------------------------------


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = simple(tmp_path / "source")
    (tmp_path / "plan.json").write_text(json.dumps(SIMPLE))
    plan = str(tmp_path / "plan.json")
    parts, whole, one = (str(tmp_path / name) for name in ("parts", "whole", "one"))
    assert cli.main(["shard", str(source), "-o", parts, "--tp", "2", "--plan", plan]) == 0
    told = capsys.readouterr()
    assert re.fullmatch(rf"fastshard: shard of {re.escape(str(source))}: 2 files, \d+ B \.\.\.\n", told.err)
    assert re.fullmatch(rf"{re.escape(parts)}: 4 files, \S+ KiB in \d+\.\d s\n", told.out)
    assert cli.main(["merge", parts, "-o", whole, "--durable", "--quiet"]) == 0
    assert tree(Path(whole)) == tree(source)
    assert cli.main(["reshard", whole, "-o", one, "--max-shard-size", "1GB", "--quiet"]) == 0
    assert sorted(os.listdir(one)) == ["model.safetensors"]
    assert capsys.readouterr() == ("", "")
    assert cli.main(["merge", parts, "-o", whole]) == 1
    assert f"fastshard: {whole}: the target is not empty" in capsys.readouterr().err
    assert cli.main(["merge", parts, "-o", whole, "--force"]) == 0
    assert cli.main(["shard", str(source), "-o", whole + "2", "--tp", "3", "--plan", plan]) == 1
    assert "down.weight: dimension 1 of [6, 8] is not divisible by 3 ranks" in capsys.readouterr().err
    assert cli.main(["merge", str(source), "-o", whole + "2"]) == 1
    assert f"{source}/tensor_parallel.index.json: No such file" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        cli.main(["shard", str(source), "-o", whole])
    assert caught.value.code == 2
