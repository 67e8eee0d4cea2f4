# SPDX-License-Identifier: Apache-2.0
"""fastshard in vLLM and SGLang, as far as it goes without them: ``tests/integration/serving.py`` has the real engine."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import types
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import fake_vllm
import pytest
import torch
from helpers import names, run, same, snapshot
from safetensors.torch import load_file, save_file

import fastshard
from fastshard.base import settings
from fastshard.cli import command as cli
from fastshard.formats.manifest import read_manifest
from fastshard.integrations import sglang, vllm, vllm_save, vllm_states
from fastshard.integrations.vllm_save import check_engine, copy_metadata

PART = "model-rank-0-part-0.safetensors"
MANIFEST = "fastshard-model-rank-0.json"
RECORD = "fastshard.manifest.json"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> fake_vllm.Vllm:
    return fake_vllm.plug_in(monkeypatch)


def expected(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return fake_vllm.filtered(model.state_dict())


def empty_the_linear_layer(model: Any) -> None:
    """As vLLM does on CPUs."""
    model.linear.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)


def test_the_entry_points_lead_to_functions() -> None:
    found = {point.group: point for point in distribution("fastshard").entry_points}
    for group, module in (("vllm.general_plugins", vllm), ("sglang.srt.plugins", sglang)):
        assert found[group].name == vllm_save.PLUGIN == "fastshard"
        assert found[group].load() is module.register


def test_importing_fastshard_imports_no_engine() -> None:
    done = run(
        """
        import fastshard.integrations.vllm, fastshard.integrations.sglang, fastshard.integrations.vllm_save
        print([name for name in sys.modules if name.split(".")[0] in ("vllm", "sglang")])
        """
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_a_spawned_worker_may_import_the_program() -> None:
    importlib.import_module("fastshard.__main__")  # and nothing runs


def test_a_plugin_without_its_engine_says_so_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "sglang", None)
    sglang.register()
    assert "fastshard is not at work in this SGLang: ModuleNotFoundError" in caplog.text
    monkeypatch.setitem(sys.modules, "vllm", None)
    vllm.register()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("vllm.model_executor.model_loader.base_loader")


def test_another_vllm_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = fake_vllm.Vllm()
    made.base.process_weights_after_loading = process = lambda engine: None
    made.loader.save_model = save = lambda model: None
    initialize = made.base.initialize_model
    for name, module in made.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    vllm.register()
    assert "has the parameters ('engine',), not ('model', 'model_config')" in caplog.text
    assert "has the parameters ('model',), not ('model', 'path'" in caplog.text
    assert made.base.process_weights_after_loading is process
    assert made.base.initialize_model is initialize and made.loader.save_model is save


def test_loaders_are_hooked_when_they_are_imported(tmp_path: Path) -> None:
    folder = tmp_path / "vllm" / "model_executor" / "model_loader"
    folder.mkdir(parents=True)
    for package in (folder, *list(folder.parents)[:2]):
        (package / "__init__.py").touch()
    (folder / "base_loader.py").write_text(
        "def initialize_model(vllm_config): return 1\n"
        "def process_weights_after_loading(model, model_config, target_device): return 2\n"
    )
    (folder / "sharded_state_loader.py").write_text(
        "from vllm.model_executor.model_loader import base_loader\n"
        "class ShardedStateLoader:\n"
        "    _filter_subtensors = staticmethod(lambda tensors: tensors)\n"
        "    @staticmethod\n"
        "    def save_model(model, path, pattern=None, max_size=None): pass\n"
    )
    done = run(
        """
        sys.path.insert(0, sys.argv[1])
        import fastshard.integrations.vllm as plugin
        plugin.register(), plugin.register()
        print([name for name in sys.modules if name.startswith("vllm")])
        from vllm.model_executor.model_loader import base_loader, sharded_state_loader
        plugin.register()
        print(sharded_state_loader.ShardedStateLoader.save_model is plugin.save_model)
        for function in (base_loader.initialize_model, base_loader.process_weights_after_loading):
            print(function.__wrapped__.__code__.co_filename == base_loader.__file__)
        """,
        tmp_path,
    )
    assert done.stdout.split() == ["[]", "True", "True", "True"], done.stderr


def test_twice_is_once(fake: fake_vllm.Vllm) -> None:
    initialize, process = fake.base.initialize_model, fake.base.process_weights_after_loading
    vllm.register()
    assert fake.base.initialize_model is initialize and fake.base.process_weights_after_loading is process
    assert fake.loader.save_model is vllm.save_model


def test_a_live_engine_whose_weights_are_as_they_were_loaded(fake: fake_vllm.Vllm, tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "model-rank-1-part-7.safetensors")  # of another world
    (tmp_path / "config.json").write_text("{}")
    model = fake.load_model(fake_vllm.config())
    fake.loader.save_model(model, str(tmp_path), max_size=100)
    assert names(tmp_path) == sorted(
        ["config.json", MANIFEST, PART, *(PART.replace("part-0", f"part-{i}") for i in (1, 2))]
    )
    manifest = read_manifest(tmp_path / MANIFEST)
    loaded = {}
    for name in manifest.files:
        loaded.update(load_file(tmp_path / name))
    assert loaded.keys() == expected(model).keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected(model).items())
    assert manifest.post_processed is False and manifest.writer == ("vllm", "0.0")
    assert manifest.aliases["lm_head.weight"].tensor == "embed.weight"


def test_the_worker_extension_saves(fake: fake_vllm.Vllm, tmp_path: Path) -> None:
    model = fake.load_model(fake_vllm.config())

    class Worker(vllm.WorkerExtension):
        def get_model(self) -> Any:
            return types.SimpleNamespace(unwrap=lambda: model)  # as a CUDA graph's wrapper

    Worker().fastshard_save(str(tmp_path), "m-{rank}-{part}.safetensors", "1KB")
    assert same(tmp_path / "m-0-0.safetensors", expected(model))


def shuffle(model: Any) -> None:
    model.linear.weight.data = model.linear.weight.data.flip(0).contiguous()


def widen(model: Any) -> None:
    model.linear.bias = torch.nn.Parameter(model.linear.bias.double(), requires_grad=False)


def add(model: Any) -> None:
    model.register_buffer("scale", torch.ones(1))


@pytest.mark.parametrize(
    ("process", "reason"),
    [
        (empty_the_linear_layer, "linear.weight is missing"),
        (shuffle, "linear.weight has other values"),
        (widen, r"linear.bias is float64 \[8\] instead of float32 \[8\]"),
        (add, "scale is not expected"),
    ],
)
def test_a_live_engine_with_repacked_weights_is_refused(
    fake: fake_vllm.Vllm, tmp_path: Path, process: Any, reason: str
) -> None:
    fake.process = process
    model = fake.load_model(fake_vllm.config())
    (tmp_path / PART).write_text("old")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=rf"has repacked the weights .*: {reason}\..*vllm-save"):
        fake.loader.save_model(model, str(tmp_path))
    assert snapshot(tmp_path) == before and names(tmp_path) == [PART]


def test_weights_that_loading_has_changed_are_refused(fake: fake_vllm.Vllm, tmp_path: Path) -> None:
    fake.load = widen  # as quantization on the way does
    model = fake.load_model(fake_vllm.config())
    with pytest.raises(ValueError, match="changed the weights while it loaded them.*linear.bias is float64"):
        fake.loader.save_model(model, str(tmp_path))


def test_weights_may_be_updated_but_not_changed_later(fake: fake_vllm.Vllm, tmp_path: Path) -> None:
    model: Any = fake.load_model(fake_vllm.config())
    model.linear.weight.fill_(7)
    fake.loader.save_model(model, str(tmp_path))
    assert same(tmp_path / PART, expected(model))
    widen(model)
    with pytest.raises(ValueError, match="has changed since it was loaded: linear.bias"):
        fake.loader.save_model(model, str(tmp_path))


def test_a_model_that_nobody_saw_being_loaded_is_refused(fake: fake_vllm.Vllm, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did not see how vLLM loaded this model"):
        fake.loader.save_model(fake_vllm.Model(), str(tmp_path))
    assert names(tmp_path) == []


@pytest.mark.parametrize("parallel", [{"data_parallel_size": 2}, {"world_size": 2}])
def test_ranks_that_the_names_do_not_tell_apart_are_refused(
    fake: fake_vllm.Vllm, tmp_path: Path, parallel: dict[str, int]
) -> None:
    model = fake.load_model(fake_vllm.config(**parallel))
    with pytest.raises(ValueError, match="would overwrite each other's files"):
        fake.loader.save_model(model, str(tmp_path))
    assert names(tmp_path) == []


def test_an_engine_starts_whatever_goes_wrong_in_a_hook(
    fake: fake_vllm.Vllm, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(tensors: object) -> None:
        raise RuntimeError("view size is not compatible")

    fake.loader._filter_subtensors = fails
    processed = []
    fake.process = processed.append
    model = fake.load_model(fake_vllm.config())
    assert processed == [model] and "view size is not compatible" in caplog.text
    with pytest.raises(ValueError, match="did not see"):
        fake.loader.save_model(model, str(tmp_path))


def test_what_could_not_be_compared_is_refused(
    fake: fake_vllm.Vllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(tensor: object, most: int) -> None:
        raise RuntimeError("not implemented for this type")

    monkeypatch.setattr(vllm_states, "some_elements", fails)
    model = fake.load_model(fake_vllm.config())
    assert "the state of a loaded model was not noted: RuntimeError: not implemented" in caplog.text
    with pytest.raises(ValueError, match="was not seen"):
        fake.loader.save_model(model, str(tmp_path))


def test_what_post_processing_raises_is_raised(fake: fake_vllm.Vllm) -> None:
    def fails(model: object) -> None:
        raise RuntimeError("no such kernel")

    fake.process = fails
    with pytest.raises(RuntimeError, match="no such kernel"):
        fake.load_model(fake_vllm.config())


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.int64, torch.complex64, torch.float64]
)
def test_repacking_of_every_dtype_is_seen(dtype: torch.dtype) -> None:
    raw = torch.arange(96 * dtype.itemsize, dtype=torch.uint8)
    tensor = (raw % 2 if dtype == torch.bool else raw % 100).view(dtype).view(12, 8)
    before = vllm_states.sampled({"w": tensor})
    assert vllm_states.why_changed(before, vllm_states.sampled({"w": tensor.clone()})) is None
    assert vllm_states.why_changed(before, vllm_states.sampled({"w": tensor.t()})) is not None
    moved = tensor.t().contiguous().view(12, 8)
    assert "w has other values" in (vllm_states.why_changed(before, vllm_states.sampled({"w": moved})) or "")


def test_a_scalar_that_has_changed_is_seen() -> None:
    before = vllm_states.sampled({"s": torch.tensor(1.0)})
    assert "s has other values" in (
        vllm_states.why_changed(before, vllm_states.sampled({"s": torch.tensor(2.0)})) or ""
    )


RANKS = """
import torch.distributed as dist
sys.path.insert(0, sys.argv[3])
import fake_vllm
from fastshard.integrations import vllm

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", rank=rank, world_size=2, store=dist.FileStore(folder + ".store", 2))
fake_vllm_ = fake_vllm.Vllm(fake_vllm.Group(rank, 2, dist.group.WORLD))
fake_vllm_.install()
vllm.register()

def save(how):
    model = fake_vllm_.load_model(fake_vllm.config(world_size=2))
    if how == "changed" and rank == 1:
        model.linear.bias = torch.nn.Parameter(torch.ones(8).double())
    if how == "killed" and rank == 1:
        vllm.save_sharded_state = lambda *a, **k: os._exit(9)
    try:
        fake_vllm_.loader.save_model(model, folder)
        print(how, "saved", flush=True)
    except Exception as error:
        print(how, type(error).__name__, error, flush=True)
    found = {name: open(os.path.join(folder, name), "rb").read() for name in os.listdir(folder)}
    print(how, "left" if found == before else "changed", flush=True)
    return found

before = {name: open(os.path.join(folder, name), "rb").read() for name in os.listdir(folder)}
save("changed")
dist.barrier()
before = save("well")
dist.barrier()
save("killed")
os._exit(0)
"""


def test_ranks_of_a_live_engine_save_together_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    for name in (PART, "model-rank-1-part-0.safetensors", "model-rank-1-part-1.safetensors"):
        (folder / name).write_text("old")
    script = "import sys, os, torch, fastshard\n" + RANKS
    here = Path(__file__).parent
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank), str(folder), str(here)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=here,
        )
        for rank in range(2)
    ]
    shown = [process.communicate(timeout=300) for process in ranks]
    first, second = ([line for line in output.splitlines() if line] for output, _ in shown)
    assert first[0].startswith(
        "changed RuntimeError rank 1 could not save its part: the model has changed"
    ), shown
    assert second[0].startswith(
        "changed ValueError the model has changed since it was loaded: linear.bias"
    ), shown
    assert first[1] == second[1] == "changed left"
    assert first[2] == second[2] == "well saved" and first[3] == second[3] == "well changed"
    assert first[4].startswith("killed ") and first[-1] == "killed left" and len(second) == 4, shown
    for rank in range(2):
        loaded = load_file(folder / f"model-rank-{rank}-part-0.safetensors")
        assert loaded["embed.weight"][0, 0] == 1000 * rank
        assert read_manifest(folder / f"fastshard-model-rank-{rank}.json").ranks.tp_size == 2
    assert len(names(folder)) == 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's."""
    made = tmp_path / "model"
    (made / "1_Pooling").mkdir(parents=True)
    (made / ".cache").mkdir()
    (made / ".cache" / "lock").touch()
    (tmp_path / "blob").write_text("{}")
    (made / "tokenizer.json").symlink_to(tmp_path / "blob")
    (made / "config.json").write_text('{"tie_word_embeddings": true, "text_config": {"a": 1}}')
    (made / "1_Pooling" / "model.safetensors").write_text("a small layer")
    for name in (
        "model.safetensors",
        "pytorch_model.bin",
        "model.safetensors.index.json",
        MANIFEST,
        ".gitattributes",
    ):
        (made / name).write_text("not to be copied")
    return made


COPIED = ["1_Pooling", "config.json", "tokenizer.json"]


def test_metadata_is_copied_and_what_would_be_stale_is_not(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (folder / "out").mkdir()
    copy_metadata(str(folder), str(target), leave_out=str(folder / "out"))
    assert names(target) == COPIED and names(target / "1_Pooling") == ["model.safetensors"]
    assert not (target / "tokenizer.json").is_symlink() and (target / "tokenizer.json").read_text() == "{}"


def saved(folder: Path, output: Path, *more: str) -> int:
    return cli.main(["vllm-save", "--model", str(folder), "--output", str(output), *more])


def test_vllm_save(
    fake: fake_vllm.Vllm, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.process = empty_the_linear_layer  # too late to matter
    output = tmp_path / "some" / "where"
    assert saved(folder, output) == 0
    assert names(output) == sorted([*COPIED, MANIFEST, RECORD, PART])
    assert same(output / PART, expected(fake_vllm.Model()))
    assert 'load_format="sharded_state"' in capsys.readouterr().out
    first = snapshot(output)
    (output / "model-rank-1-part-0.safetensors").write_text("of two ranks")
    (output / "notes.txt").write_text("mine")
    assert saved(folder, output, "--max-file-size", "0.1KB") == 0  # again
    assert names(output) == sorted(
        [*COPIED, MANIFEST, RECORD, "notes.txt", PART, *(PART.replace("part-0", f"part-{i}") for i in (1, 2))]
    )
    assert saved(folder, output, "--file-pattern", "m-{rank}-{part}.safetensors") == 0
    assert names(output) == sorted([*COPIED, "fastshard-m-0.json", RECORD, "m-0-0.safetensors", "notes.txt"])
    assert snapshot(output)["config.json"] == first["config.json"]


@pytest.mark.parametrize("digests", [[], ["--sha256"]])
def test_vllm_save_notes_what_verify_compares(
    fake: fake_vllm.Vllm, folder: Path, tmp_path: Path, digests: list[str]
) -> None:
    output = tmp_path / "out"
    save_file({"dense.weight": torch.ones(3)}, folder / "1_Pooling" / "model.safetensors")
    for _ in range(2):  # the second one replaces the record of the first
        assert saved(folder, output, *digests) == 0
        report = fastshard.verify(output)
        assert report.ok and report.without_digests == []
        assert report.files == len([*COPIED, MANIFEST, PART, *digests]) and report.compared == report.nbytes
    assert (output / "SHA256SUMS").exists() == bool(digests)
    (output / "tokenizer.json").write_text("[]")
    found = {problem.path for problem in fastshard.verify(output).problems}
    assert found == {str(output / "tokenizer.json")}


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda fake: setattr(fake, "load", widen), "rank 0 of 1: vLLM has changed the weights while"),
        (lambda fake: setattr(fake, "process", lambda model: 1 / 0), "ZeroDivisionError"),
        (
            lambda fake: setattr(fake, "load_model", lambda config: torch.nn.Module()),
            "not active in vLLM's workers",
        ),
    ],
)
def test_a_vllm_save_that_fails_leaves_the_old_folder(
    fake: fake_vllm.Vllm,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Any,
    reason: str,
) -> None:
    output = tmp_path / "out"
    assert saved(folder, output) == 0
    before = snapshot(output)
    (folder / "config.json").write_text("new")
    spoil(fake)
    assert saved(folder, output) == 1
    assert reason in capsys.readouterr().err
    assert snapshot(output) == before and names(output) == sorted([*COPIED, MANIFEST, RECORD, PART])
    assert saved(folder, tmp_path / "new") == 1 and not (tmp_path / "new").exists()


def test_a_worker_whose_command_is_gone_leaves_nothing(fake: fake_vllm.Vllm, tmp_path: Path) -> None:
    gone = tmp_path / "out" / "staging" / "new"
    request = vllm.Request(str(gone), None, None, durable=False, manifest=True)
    executor = fake.executor(fake_vllm.config({vllm.REQUEST: request._asdict()}))
    (said,) = executor.collective_rpc(vllm.outcome)
    assert said.files == () and said.error == f"[Errno 2] No such file or directory: '{gone}'"
    assert names(tmp_path) == []


def test_vllm_save_without_the_plugin_says_why(
    fake: fake_vllm.Vllm, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    fake.load_model = lambda config: torch.nn.Module()  # type: ignore[method-assign]
    assert saved(folder, tmp_path / "out") == 1
    assert "VLLM_PLUGINS='other' leaves 'fastshard' out" in capsys.readouterr().err


@pytest.mark.parametrize("own_head", [True, False])
def test_a_head_of_its_own_in_spite_of_the_config(
    fake: fake_vllm.Vllm, folder: Path, tmp_path: Path, own_head: bool
) -> None:
    def make() -> torch.nn.Module:
        return fake_vllm.Model(tied=False)

    def load(model: Any) -> None:
        if not own_head:
            model.lm_head.weight.copy_(model.embed.weight)

    fake.make, fake.load = make, load
    engine = fake_vllm.EngineArgs(str(folder), untied_by_checkpoint=True)
    vllm_save.save(engine, str(tmp_path / "out"))
    stored = load_file(tmp_path / "out" / PART)
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    if own_head:
        assert {"lm_head.weight", "embed.weight"} < stored.keys()
        assert said == {"tie_word_embeddings": False, "text_config": {"a": 1, "tie_word_embeddings": False}}
    else:  # vLLM ties them, and so does its loader
        assert "lm_head.weight" not in stored and "embed.weight" in stored
        assert said["tie_word_embeddings"] is True


def test_vllm_save_refuses_what_it_cannot_save(folder: Path, tmp_path: Path) -> None:
    check_engine(fake_vllm.EngineArgs(str(folder)))
    for arguments, reason in (
        ({"enable_lora": True}, "LoRA"),
        ({"speculative_config": {"model": "draft"}}, "draft model"),
        ({"data_parallel_size": 2}, "data parallelism"),
        ({"model": "Qwen/Qwen2-0.5B"}, "local directory"),
    ):
        with pytest.raises(ValueError, match=reason):
            check_engine(fake_vllm.EngineArgs(**{"model": str(folder), **arguments}))
    with pytest.raises(ValueError, match="the model's own folder"):
        vllm_save.save(fake_vllm.EngineArgs(str(folder)), str(folder / "." / ""))


def test_vllm_save_without_vllm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert cli.main(["vllm-save", "--model", "m", "--output", "o"]) == 1
    assert "vllm-save needs vLLM" in capsys.readouterr().err


def test_wrong_arguments(fake: fake_vllm.Vllm, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--model", "m"], ["--model", "m", "-o", "x", "--max-file-size", "5 apples"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["vllm-save", *arguments])
        assert stopped.value.code == 2
    assert "--max-file-size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [
        (7, 7),
        ("7", 7),
        ("5GB", 5 * 10**9),
        ("5gb", 5 * 10**9),
        (" 5 GiB ", 5 * 2**30),
        ("1.5MB", 1_500_000),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_sizes(size: int | str, nbytes: int) -> None:
    assert settings.parse_size(size) == nbytes


@pytest.mark.parametrize("size", ["", "GB", "5 apples", "-1", "0", "0.1", "1e9", 0, -1, 1.5])
def test_sizes_that_are_none(size: Any) -> None:
    with pytest.raises(ValueError, match="is not a size|less than a byte"):
        settings.parse_size(size)


@pytest.fixture
def parallel(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Stand-ins for SGLang's modules; its ``get_parallel()``."""
    parallel = types.SimpleNamespace(tp_rank=1, tp_size=2, pp_size=1)
    registered: list[tuple[object, ...]] = []
    modules = {
        "sglang": {"__version__": "0.0"},
        "sglang.srt": {},
        "sglang.srt.runtime_context": {"get_parallel": lambda: parallel},
        "sglang.srt.plugins": {},
        "sglang.srt.plugins.hook_registry": {
            "HookType": types.SimpleNamespace(REPLACE="replace", AFTER="after"),
            "HookRegistry": types.SimpleNamespace(register=lambda *hook: registered.append(hook)),
        },
    }
    for name, contents in modules.items():
        module = types.ModuleType(name)
        module.__dict__.update(contents, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)
    parallel.registered = registered
    return parallel


def test_sglang_registers_its_hook(parallel: types.SimpleNamespace) -> None:
    sglang.register()
    loaded = [(target, sglang.loaded, "after") for target in sglang.LOADED]
    assert parallel.registered == [(sglang.TARGET, sglang.save_model, "replace"), *loaded]


class Attention(torch.nn.Module):
    """As SGLang's MLA attention: its first forward registers a weight once more, under a smaller name."""

    def __init__(self) -> None:
        super().__init__()
        self.attn_mha = torch.nn.Module()
        self.kv_b_proj = torch.nn.Linear(3, 2, bias=False)

    def run(self) -> None:
        self.attn_mha.kv_b_proj = self.kv_b_proj


def test_sglang_saves_what_a_new_model_has(parallel: types.SimpleNamespace, tmp_path: Path) -> None:
    model = Attention()
    assert sglang.loaded(model, "config", device="cpu") is None
    before = dict(model.state_dict())
    model.run()
    assert len(model.state_dict()) == 2
    sglang.save_model(model, str(tmp_path))
    assert same(tmp_path / "model-rank-1-part-0.safetensors", before) and list(before) == ["kv_b_proj.weight"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda model: delattr(model, "kv_b_proj"), "kv_b_proj.weight is missing"),
        (lambda model: model.half(), "kv_b_proj.weight has another shape or dtype"),
        (lambda model: model.register_buffer("scale", torch.ones(2)), "scale is not expected"),
    ],
)
def test_sglang_refuses_what_a_new_model_would_not_load(
    parallel: types.SimpleNamespace, tmp_path: Path, change: Any, text: str
) -> None:
    model = Attention()
    sglang.loaded(model)
    change(model)
    with pytest.raises(ValueError, match=f"changed since it was loaded: {text}"):
        sglang.save_model(model, str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_sglang_says_that_it_did_not_see_a_model_loaded(
    parallel: types.SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sglang.save_model(Attention(), str(tmp_path))
    assert "did not see how SGLang loaded this model" in caplog.text


def test_sglang_saves_a_rank_and_leaves_others_alone(parallel: types.SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / PART).write_text("of rank 0")
    model = torch.nn.Linear(3, 2)
    model.weight = torch.nn.Parameter(
        torch.arange(6.0).view(3, 2).t()
    )  # strided, which SGLang's own saver refuses
    sglang.save_model(model, str(tmp_path), None, "5GB")
    assert same(tmp_path / "model-rank-1-part-0.safetensors", dict(model.state_dict()))
    assert (tmp_path / PART).read_text() == "of rank 0"
    manifest = read_manifest(tmp_path / "fastshard-model-rank-1.json")
    assert manifest.post_processed is True and manifest.writer == ("sglang", "0.0")


def test_sglang_refuses_stages_without_names(parallel: types.SimpleNamespace, tmp_path: Path) -> None:
    parallel.pp_size = 2
    with pytest.raises(ValueError, match="stages of pipeline parallelism"):
        sglang.save_model(torch.nn.Linear(3, 2), str(tmp_path))
    assert os.listdir(tmp_path) == []
