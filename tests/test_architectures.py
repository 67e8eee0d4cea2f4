# SPDX-License-Identifier: Apache-2.0
"""A sample of what tests/architectures.py does with every model type of transformers; and how its conversions are followed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

core_model_loading = pytest.importorskip("transformers.core_model_loading")
import architectures  # noqa: E402
from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist, Transpose  # noqa: E402

from fastshard.tools.model_plan import _class_named, _followed, _of_layer, _on_meta, _Place  # noqa: E402
from fastshard.tools.tp_plan import Split, slices  # noqa: E402

FEWEST = {"5.24": (702, 226)}
"""Version of transformers -> model types known to be saved the same, and to come back from ``shard`` and ``merge``:
neither may become fewer."""

SAMPLE = {
    "llama": "same",
    "internlm3": "same",  # its class is another model's
    "exaone": "same",
    "qwen3_vl_moe": "same",  # transposed experts
    "gpt_oss": "same",
    "bert": "no plan",
    "altclip_text_model": "no plan",  # its class is not exported
    "gemma4_text": "same",  # its layers are not alike
    "sarvam_moe": "same",  # queries, keys and values are one tensor
    "t5gemma": "same",  # what its configuration says of one part follows from the other
}
REFUSED = {
    "diffusion_gemma": "lm_head.weight and model.decoder.embed_tokens.weight are the same tensor, but ",
    "shieldgemma2": "embed_tokens.weight is not a parameter of Gemma3ForConditionalGeneration",
}
"""What has no right answer: the plan splits the encoder and not the decoder, though all their weights are tied; the class
that the configuration leads to does not load what it saves, in transformers either."""

KNOWN = architectures.known()
NO_PLAN = [kind for kind in KNOWN["saved"] if kind not in KNOWN["cut"]]


def test_no_fewer_than_before() -> None:
    if not KNOWN["saved"]:
        pytest.skip("nothing is known of this transformers")
    saved, cut = FEWEST[architectures.minor()]
    assert len(KNOWN["saved"]) >= saved
    assert len(KNOWN["cut"]) >= cut
    assert set(KNOWN["cut"]) <= set(KNOWN["saved"]) <= set(architectures.kinds())
    for kind, sharded in SAMPLE.items():
        assert kind in KNOWN["saved"]
        assert (kind in KNOWN["cut"]) == (sharded == "same")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", architectures.sample(KNOWN["cut"], 8) + architectures.sample(NO_PLAN, 6))
def test_known_to_be_the_same(kind: str) -> None:
    found = architectures.outcome_of(kind)
    assert found.saved == "same"
    assert (found.sharded == "same") == (kind in KNOWN["cut"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", SAMPLE)
def test_saved_and_cut_the_same(kind: str) -> None:
    if kind not in architectures.kinds():
        pytest.skip("this transformers does not know it")
    found = architectures.outcome_of(kind)
    assert found == ("same", SAMPLE[kind])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_refused_with_the_reason(kind: str) -> None:
    if architectures.minor() != "5.24":
        pytest.skip("other versions have other plans")
    found = architectures.outcome_of(kind)
    assert found.saved == "same"
    assert found.sharded.startswith("refused: ")
    assert REFUSED[kind] in found.sharded


def cut(whole: torch.Tensor, split: Split, rank: int) -> torch.Tensor:
    intervals = slices("w", whole.shape, split, 2)[rank]
    return torch.cat([whole.narrow(split.dim, begin, end - begin) for begin, end in intervals], split.dim)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("groups", [1, 2])
def test_what_is_cut_into_several_parameters(dim: int, groups: int) -> None:
    """A rank's part of the tensor becomes the rank's parts of the parameters."""
    fused = torch.arange(24 * 8).view(24, 8)
    parameters = Chunk(dim=0).convert({"f": fused}, ["f"], ["q", "k", "v"])
    place = _Place(("q", "k", "v"), (Chunk(dim=0),))
    split = Split(dim, groups)
    followed = _followed(split, [(8, 8)] * 3, place, (24, 8))
    assert followed is not None
    for rank in range(2):
        made = Chunk(dim=0).convert({"f": cut(fused, followed, rank)}, ["f"], ["q", "k", "v"])
        for name, parameter in parameters.items():
            assert torch.equal(made[name], cut(parameter, split, rank))
    assert _followed(split, [(8, 8)] * 3, place, (16, 8)) is None  # not of that size
    assert _followed(split, [(8, 8), (8, 8), (4, 8)], place, (20, 8)) is None  # Chunk makes equal ones
    assert _followed(split, [(8, 8)], _Place(("q",), (Chunk(dim=0),)), (24, 8)) is None


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("at", [0, 1])
def test_what_is_cut_into_parameters_of_different_sizes(dim: int, groups: int, at: int) -> None:
    """Queries, and fewer keys and values."""
    split_operation = getattr(core_model_loading, "Split", None)
    if split_operation is None:
        pytest.skip("this transformers has no such conversion")
    operation = split_operation(dim=at)
    sizes = {"q": 16, "k": 8, "v": 8}
    shapes = [(size, 8) if at == 0 else (8, size) for size in sizes.values()]

    def parameters(fused: torch.Tensor, ranks: int) -> dict[str, torch.Tensor]:
        """As the operation makes them of a model whose parameters are a rank's."""
        held = {
            n: [s // (ranks if i == dim else 1) for i, s in enumerate(shape)]
            for n, shape in zip(sizes, shapes)
        }
        model = SimpleNamespace(get_parameter=lambda name: torch.empty(held[name]))
        return operation.convert({"f": fused}, ["f"], list(sizes), full_layer_name="q", model=model)

    fused = torch.arange(32 * 8).view((32, 8) if at == 0 else (8, 32))
    place, split = _Place(("q", "k", "v"), (operation,)), Split(dim, groups)
    followed = _followed(split, shapes, place, tuple(fused.shape))
    assert followed is not None
    for rank in range(2):
        made = parameters(cut(fused, followed, rank), 2)
        for name, parameter in parameters(fused, 1).items():
            assert torch.equal(made[name], cut(parameter, split, rank))
    assert _followed(split, shapes, place, (24, 24)) is None  # not of that size
    assert _followed(split, [*shapes[:2], (8, 9) if at == 0 else (9, 8)], place, tuple(fused.shape)) is None
    behind = _Place(place.parameters, (operation, Transpose(0, 1)))
    assert _followed(split, shapes, behind, (32, 16) if at == 0 else (16, 32)) is None
    assert _followed(split, [(8, 8)] * 3, place, (24, 8) if at == 0 else (8, 24)) == _followed(
        split, [(8, 8)] * 3, _Place(place.parameters, (Chunk(dim=at),)), (24, 8) if at == 0 else (8, 24)
    )


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("check", [False, True])
def test_what_is_transposed(dim: int, groups: int, check: bool) -> None:
    stored = torch.arange(4 * 8 * 12).view(4, 8, 12)
    split = Split(dim, groups)
    operation = Transpose(1, 2, check_dims=check)
    followed = _followed(split, [(4, 12, 8)], _Place(("w",), (operation,)), (4, 8, 12))
    assert followed is not None
    for rank in range(2):
        assert torch.equal(
            cut(stored, followed, rank).transpose(1, 2), cut(stored.transpose(1, 2), split, rank)
        )
    as_it_is = _followed(split, [(4, 12, 8)], _Place(("w",), (operation,)), (4, 12, 8))
    assert as_it_is == (split if check else None)


def test_what_cannot_be_followed() -> None:
    other = SimpleNamespace(dim=0)
    assert _followed(Split(0), [(8, 8)], _Place(("w",), (other,)), (8, 8)) is None
    counted = Concatenate(dim=0, num_shards_attribute="n")
    assert _followed(Split(0), [(8, 8)], _Place(("w",), (counted,)), (4, 8)) is None
    assert (
        _followed(Split(0), [(4, 8, 8)], _Place(("w",), (MergeModulelist(dim=0),)), (8, 8)) is None
    )  # whole experts
    assert _followed(Split(1), [(4, 8, 8)], _Place(("w",), (MergeModulelist(dim=0),)), (8, 8)) == Split(0)
    assert _followed(Split(1), [(4, 8, 8)], _Place(("w",), (MergeModulelist(dim=0),)), (8, 9)) is None
    joined_and_cut = _Place(("p", "q"), (Concatenate(dim=0), Chunk(dim=0)))
    assert _followed(Split(0), [(8, 8)] * 2, joined_and_cut, (4, 8)) is None
    both = _Place(("w",), (MergeModulelist(dim=0), Concatenate(dim=1)))
    assert _followed(Split(1, 2), [(4, 16, 8)], both, (8, 8)) == Split(0)


def folder_of(tmp_path: Path, config: object) -> str:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def test_a_class_that_is_not_exported(tmp_path: Path) -> None:
    """The parts of models have configurations and checkpoints of their own, but lie in no automatic class."""
    config = {
        "model_type": "altclip_text_model", "architectures": ["AltRobertaModel"],
        "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 9,
    }  # fmt: skip
    if "altclip_text_model" not in architectures.kinds():
        pytest.skip("this transformers does not know it")
    assert not hasattr(transformers, "AltRobertaModel")
    assert [type(model).__name__ for model in _on_meta(folder_of(tmp_path, config))] == ["AltRobertaModel"]
    found = transformers.LlamaConfig()
    assert _class_named("LlamaModel", found) is transformers.LlamaModel
    for name in ("os", "torch", "logger", "apply_rotary_pos_emb", "LlamaConfig", "NoSuchModel", 3, None):
        assert _class_named(name, found) is None


def test_a_class_that_cannot_be_made_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the configuration names no architecture, one of those it may be is enough."""
    config = {
        "model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 9,
    }  # fmt: skip

    def fails(self: object, config: object) -> None:
        raise RuntimeError("not this one")

    monkeypatch.setattr(transformers.LlamaModel, "__init__", fails)
    with pytest.raises(ValueError, match="cannot make a LlamaModel: not this one"):
        list(_on_meta(folder_of(tmp_path, {**config, "architectures": ["LlamaModel"]})))
    monkeypatch.undo()
    monkeypatch.setattr(transformers.LlamaForCausalLM, "__init__", fails)
    made = [type(model).__name__ for model in _on_meta(folder_of(tmp_path, config))]
    assert made
    assert "LlamaForCausalLM" not in made


def test_heads_of_a_layer() -> None:
    layers = [SimpleNamespace(num_key_value_heads=2), SimpleNamespace(num_key_value_heads=1)]
    mixed = SimpleNamespace(is_heterogeneous=True, per_layer_config=layers)
    assert _of_layer(mixed, "model.layers.1.self_attn.k_proj.weight") is layers[1]
    assert _of_layer(mixed, "layers.0.self_attn.k_proj.weight") is layers[0]
    assert _of_layer(mixed, "vision.layers.2.self_attn.k_proj.weight") is None
    assert _of_layer(mixed, "vision.self_attn.k_proj.weight") is None
    assert _of_layer(layers[0], "layers.1.self_attn.k_proj.weight") is layers[0]


def test_the_sample_is_always_the_same() -> None:
    names = [str(i) for i in range(100)]
    assert architectures.sample(names, 4) == ["0", "25", "50", "75"]
    assert architectures.sample(names, 1000) == names
    assert Path(architectures.__file__).name == "architectures.py"
