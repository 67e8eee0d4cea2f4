# SPDX-License-Identifier: Apache-2.0
"""SGLang's own hook registry and ``ShardedStateLoader`` with our plugin; started by serving.py with the folder that has
``sglang/srt``. The rest of SGLang, which does not run here, is left out: ranks and model are given."""

from __future__ import annotations

import ast
import collections
import glob
import os
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch

from fastshard.formats.manifest import read_manifest
from fastshard.integrations import sglang as ours

LOADER = "sglang.srt.model_loader.loader"
RANKS = types.SimpleNamespace(tp_rank=1, tp_size=2, pp_size=1)


class Model(torch.nn.Module):
    def __init__(self, fill: float = 0) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(7, 4)
        self.head = torch.nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        # As some quantization methods leave them; SGLang 0.5.23 fails to save these itself.
        self.strided = torch.nn.Parameter(torch.empty(3, 5).t())
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                parameter.copy_(fill + number + torch.arange(parameter.numel()).view(parameter.shape))


class Base:
    def __init__(self, load_config: Any) -> None:
        self.load_config = load_config


def stand_in(name: str, folder: Path, **contents: object) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(contents, __path__=[str(folder.joinpath(*name.split(".")))])
    sys.modules[name] = module
    parent, _, attribute = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], attribute, module)
    return module


def main(folder: Path) -> None:
    stand_in("sglang", folder, __version__="0.5.23")
    for name in ("sglang.srt", "sglang.srt.plugins", "sglang.srt.model_loader"):
        stand_in(name, folder)  # not their own __init__, which imports the engine
    stand_in("sglang.srt.runtime_context", folder, get_parallel=lambda: RANKS)
    made: list[Model] = []
    loader = stand_in(
        LOADER,
        folder,
        BaseModelLoader=Base,
        collections=collections,
        glob=glob,
        os=os,
        torch=torch,
        Dict=dict,
        List=list,
        Tuple=tuple,
        Any=Any,
        logger=__import__("logging").getLogger("sglang"),
        get_parallel=lambda: RANKS,
        set_default_torch_dtype=lambda dtype: torch.no_grad(),
        _initialize_model=lambda *_: made.append(Model()) or made[-1],
        _get_quantization_config=lambda *_: None,
        post_load_weights=lambda model: None,
    )
    tree = ast.parse(folder.joinpath(*LOADER.split(".")).with_suffix(".py").read_text())
    (found,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "ShardedStateLoader")
    exec(compile(ast.Module([found], []), "sglang", "exec"), vars(loader))
    their_save = loader.ShardedStateLoader.save_model

    ours.register()
    from sglang.srt.plugins.hook_registry import HookRegistry

    HookRegistry.apply_hooks()
    assert loader.ShardedStateLoader.save_model is not their_save
    model = Model(fill=100)
    with tempfile.TemporaryDirectory() as path:
        try:
            their_save(model, path)
        except ValueError as error:
            print("theirs:", str(error)[:70])
        loader.ShardedStateLoader.save_model(model, path, None, "0.1KB")
        manifest = read_manifest(os.path.join(path, "fastshard-model-rank-1.json"))
        assert (
            manifest.writer == ("sglang", "0.5.23") and manifest.post_processed and len(manifest.files) == 2
        )
        config = types.SimpleNamespace(model_loader_extra_config={}, load_format="sharded_state")
        loaded = loader.ShardedStateLoader(config).load_model(
            model_config=types.SimpleNamespace(model_path=path, dtype=torch.float32, revision=None),
            device_config=types.SimpleNamespace(device="cpu"),
        )
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
    print("ours: saved, and loaded by SGLang's loader")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
