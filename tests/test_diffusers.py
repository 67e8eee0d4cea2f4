# SPDX-License-Identifier: Apache-2.0
"""Unchanged scripts of diffusers: the files they write without fastshard, all at once, and what earlier saves leave."""

from __future__ import annotations

import errno
import io
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch as st
import torch
from helpers import names
from side_by_side import both, files_of, same_weights

import fastshard
from fastshard.base import activity
from fastshard.publish.directory import Replacement

os.environ.setdefault("HF_HUB_OFFLINE", "1")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import diffusers
    import transformers
    from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DModel

pytestmark = [pytest.mark.filterwarnings("ignore")]  # of libraries; ours are errors in every other file
MODEL, PIPELINE = "ModelMixin.save_pretrained", "DiffusionPipeline.save_pretrained"
SHARDED = {"max_shard_size": "100KB"}


def unet(seed: int = 0, layers: int = 1) -> Any:
    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=layers,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def text_encoder(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=512
        )
    )


class Painter(DiffusionPipeline):
    """Models of two libraries, and what is saved as a configuration alone."""

    def __init__(self, text_encoder: Any, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(text_encoder=text_encoder, unet=unet, scheduler=scheduler)


# diffusers 0.36 looks for classes here, and in this file annotations are texts.
Painter.__init__.__annotations__.update(
    text_encoder=transformers.CLIPTextModel, unet=UNet2DModel, scheduler=DDPMScheduler
)


def painter(seed: int = 0) -> Painter:
    return Painter(text_encoder(seed), unet(seed), DDPMScheduler())


@pytest.fixture(autouse=True)
def counted() -> Iterator[None]:
    activity._forget()
    yield


@pytest.fixture
def installed() -> Iterator[None]:
    with fastshard.installed():
        yield


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        SHARDED,
        {"variant": "fp16", **SHARDED},
        {"safe_serialization": False},
        {"is_main_process": False},
    ],
)
def test_a_model_is_the_same_directory(tmp_path: Path, arguments: dict[str, Any]) -> None:
    model = unet()
    plain, ours = both(tmp_path, lambda path: model.save_pretrained(path, **arguments))
    assert ours == plain
    saved = fastshard.status().saved[MODEL]
    weights = [name for name in ours if name.endswith((".safetensors", ".bin"))]
    assert (saved.saves, saved.files) == (1, len(weights)) and (len(weights) > 1) == (
        "max_shard_size" in arguments
    )
    assert fastshard.status().left == {}
    if "is_main_process" not in arguments:
        kind = {name: arguments[name] for name in ("variant",) if name in arguments}
        assert same_weights(UNet2DModel.from_pretrained(tmp_path / "ours", **kind), model)


@pytest.mark.parametrize("arguments", [{}, {"variant": "fp16", **SHARDED}, {"save_directory": "by name"}])
def test_a_pipeline_is_the_same_directory(tmp_path: Path, arguments: dict[str, Any]) -> None:
    made = painter()

    def save(path: Path) -> None:
        if "save_directory" in arguments:
            made.save_pretrained(save_directory=str(path))
        else:
            made.save_pretrained(path, **arguments)

    plain, ours = both(tmp_path, save)
    assert ours == plain and {"model_index.json", "scheduler/scheduler_config.json"} < ours.keys()
    saved = fastshard.status().saved
    assert list(saved) == [PIPELINE] and saved[PIPELINE].saves == 1
    assert saved[PIPELINE].files == sum(name.endswith(".safetensors") for name in ours)


def test_a_pipeline_is_loaded_again(tmp_path: Path, installed: None) -> None:
    made = painter()
    made.save_pretrained(tmp_path / "a" / "b", **SHARDED)
    loaded = Painter.from_pretrained(tmp_path / "a" / "b")
    assert same_weights(loaded.unet, made.unet) and same_weights(loaded.text_encoder, made.text_encoder)


@pytest.mark.parametrize("variant", [None, "ema"])
@pytest.mark.parametrize("second", [{}, SHARDED])
@pytest.mark.parametrize("first", [SHARDED, {"max_shard_size": "60KB"}])
def test_the_newest_save_is_what_is_loaded(
    tmp_path: Path, installed: None, first: dict[str, Any], second: dict[str, Any], variant: str | None
) -> None:
    """diffusers leaves the index of a sharded save, which then leads to shards that it has removed."""
    unet(0).save_pretrained(tmp_path, variant=variant, **first)
    unet(1).save_pretrained(tmp_path, variant=variant, **second)
    assert same_weights(UNet2DModel.from_pretrained(tmp_path, variant=variant), unet(1))
    unet(1).save_pretrained(tmp_path / "alone", variant=variant, **second)
    assert names(tmp_path) == sorted([*names(tmp_path / "alone"), "alone"])


@pytest.mark.parametrize("variants", [("ema", None), (None, "ema")])
def test_other_variants_keep_their_shards(tmp_path: Path, installed: None, variants: Any) -> None:
    """diffusers removes the shards of ``ema``, whose names begin as its own do, and leaves their index."""
    other, own = variants
    unet(0).save_pretrained(tmp_path, variant=other, **SHARDED)
    unet(1).save_pretrained(tmp_path, variant=own, **SHARDED)
    unet(2).save_pretrained(tmp_path, variant=own)
    assert same_weights(UNet2DModel.from_pretrained(tmp_path, variant=other), unet(0))
    assert same_weights(UNet2DModel.from_pretrained(tmp_path, variant=own), unet(2))


def test_shards_of_the_other_container_go_with_their_index(tmp_path: Path, installed: None) -> None:
    unet(0).save_pretrained(tmp_path, **SHARDED)
    unet(1).save_pretrained(tmp_path, safe_serialization=False)
    assert names(tmp_path) == ["config.json", "diffusion_pytorch_model.bin"]
    assert same_weights(UNet2DModel.from_pretrained(tmp_path), unet(1))


def test_a_single_file_that_loaders_prefer_is_named(
    tmp_path: Path, installed: None, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be there on purpose, as diffusers keeps it, too."""
    unet(0).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, "fastshard"):
        unet(1).save_pretrained(tmp_path, safe_serialization=False)
    [text] = [record.getMessage() for record in caplog.records if record.name == "fastshard"]
    assert text.startswith(f"{tmp_path}/diffusion_pytorch_model.safetensors is of an earlier save")
    assert same_weights(UNet2DModel.from_pretrained(tmp_path, use_safetensors=False), unet(1))


def test_a_pipeline_keeps_nothing_stale_of_its_components(tmp_path: Path, installed: None) -> None:
    painter(0).save_pretrained(tmp_path / "p", **SHARDED)
    painter(3).save_pretrained(tmp_path / "p", variant="ema", **SHARDED)
    (tmp_path / "p" / "unet" / "notes.txt").write_text("kept")
    painter(1).save_pretrained(tmp_path / "p")
    painter(1).save_pretrained(tmp_path / "alone")
    painter(3).save_pretrained(tmp_path / "ema", variant="ema", **SHARDED)
    alone, ema = files_of(tmp_path / "alone"), files_of(tmp_path / "ema")
    assert files_of(tmp_path / "p") == {**ema, **alone, "unet/notes.txt": b"kept"}


def test_everything_appears_in_one_step(
    tmp_path: Path, installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    publish = Replacement.publish

    def watched(change: Replacement, *args: Any) -> None:
        seen.append(visible())
        publish(change, *args)
        seen.append(visible())

    def visible() -> set[str]:
        return {name for name in files_of(tmp_path) if not name.startswith(".fastshard-")}

    monkeypatch.setattr(Replacement, "publish", watched)
    painter(0).save_pretrained(tmp_path / "p", **SHARDED)
    first = visible()
    assert seen == [set(), first] and len(first) >= 8
    painter(1).save_pretrained(tmp_path / "p")
    assert seen[2:] == [first, visible()] and visible() != first
    assert names(tmp_path) == ["p"]


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_a_failed_component_leaves_the_old_pipeline(tmp_path: Path, component: str) -> None:
    """Its error is diffusers' or transformers' own. Without fastshard half of the folder is of the new pipeline."""

    def broken() -> Painter:
        made = painter(1)
        model = getattr(made, component)
        name, weight = next(iter(model.named_parameters()))
        holder, _, last = name.rpartition(".")
        setattr(model.get_submodule(holder), last, torch.nn.Parameter(weight.to(torch.complex128)))
        return made

    with pytest.raises(KeyError) as theirs:
        broken().save_pretrained(tmp_path / "plain")
    with fastshard.installed():
        painter(0).save_pretrained(tmp_path / "p", **SHARDED)
        before = files_of(tmp_path / "p")
        with pytest.raises(KeyError) as ours:
            broken().save_pretrained(tmp_path / "p")
        with pytest.raises(KeyError):
            broken().save_pretrained(tmp_path / "new")
    assert str(ours.value) == str(theirs.value)
    assert files_of(tmp_path / "p") == before and names(tmp_path) == ["p", "plain"]


def test_a_full_disk_leaves_the_old_pipeline(
    tmp_path: Path, installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    painter(0).save_pretrained(tmp_path / "p")
    before = files_of(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("fastshard.publish.staged.start", full)
    with pytest.raises(OSError, match="No space") as caught:
        painter(1).save_pretrained(tmp_path / "p")
    assert ".fastshard" not in str(caught.value) and files_of(tmp_path) == before


def test_a_directory_that_is_a_file_is_refused_as_before(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    outcomes = []
    for _ in range(2):
        unet().save_pretrained(tmp_path / "file")
        with pytest.raises(OSError) as caught:
            painter().save_pretrained(tmp_path / "file")
        outcomes.append((type(caught.value), str(caught.value)))
        fastshard.install()
    fastshard.uninstall()
    assert outcomes[0] == outcomes[1] and files_of(tmp_path) == {"file": b"kept"}


def test_messages_name_the_final_places(tmp_path: Path, installed: None) -> None:
    stream = io.StringIO()
    logger, handler = logging.getLogger("diffusers"), logging.StreamHandler(stream)
    logger.addHandler(handler)
    before = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_info()
    try:
        painter().save_pretrained(tmp_path / "p", **SHARDED)
    finally:
        diffusers.utils.logging.set_verbosity(before)
        logger.removeHandler(handler)
    said = stream.getvalue()
    assert f"{tmp_path}/p/unet/config.json" in said and f"{tmp_path}/p/model_index.json" in said
    assert f"{tmp_path}/p/unet/diffusion_pytorch_model.safetensors.index.json" in said
    assert ".fastshard" not in said


def test_a_component_of_the_users_own_sees_what_it_sees_without_fastshard(
    tmp_path: Path, installed: None
) -> None:
    seen = []

    class Watching(DDPMScheduler):
        def save_config(self, save_directory: Any, **kwargs: Any) -> None:
            super().save_config(save_directory, **kwargs)
            seen.append((str(save_directory), names(Path(save_directory))))

    made = Painter(text_encoder(), unet(), Watching())
    made.save_pretrained(tmp_path / "p")
    assert seen == [(f"{tmp_path}/p/scheduler", ["scheduler_config.json"])]
    assert fastshard.status().left == {PIPELINE: {"Watching.save_config is not its library's own": 1}}
    assert fastshard.status().saved[MODEL].saves == 1  # its models still appear at once, each


def test_a_wrapped_save_file_is_called_as_ever(
    tmp_path: Path, installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    inner = st.save_file

    def mine(tensors: Any, filename: Any, metadata: Any = None) -> None:
        inner(tensors, filename, metadata)
        called.append((os.path.exists(filename), str(filename)))

    monkeypatch.setattr(st, "save_file", mine)
    unet().save_pretrained(tmp_path)
    assert called == [(True, f"{tmp_path}/diffusion_pytorch_model.safetensors")]
    assert list(fastshard.status().left) == [MODEL]


def test_a_pipeline_is_saved_while_its_models_go_on(tmp_path: Path, installed: None) -> None:
    made = painter(0)
    with fastshard.asynchronous() as saves:
        made.save_pretrained(tmp_path / "p", **SHARDED)
        with torch.no_grad():
            for model in (made.unet, made.text_encoder):
                for parameter in model.parameters():
                    parameter.zero_()
    saves.wait()
    assert saves.futures and same_weights(UNet2DModel.from_pretrained(tmp_path / "p" / "unet"), unet(0))
    assert same_weights(
        transformers.CLIPTextModel.from_pretrained(tmp_path / "p/text_encoder"), text_encoder(0)
    )
    assert fastshard.status().saved[PIPELINE].saves == 1 and fastshard.status().on_the_spot == {}


def test_one_manifest_names_all_files_of_a_pipeline(tmp_path: Path) -> None:
    with fastshard.installed(manifest=True):
        painter().save_pretrained(tmp_path / "p", **SHARDED)
        unet().save_pretrained(tmp_path / "m")
    for folder in (tmp_path / "p", tmp_path / "m"):
        assert not list(folder.glob("*/fastshard.manifest.json"))
        report = fastshard.verify(folder)
        assert report.ok and not report.without_digests and report.files == len(files_of(folder)) - 1
