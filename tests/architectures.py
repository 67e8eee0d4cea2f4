# SPDX-License-Identifier: Apache-2.0
"""Every architecture of the installed transformers, small, saved by the original and by fastshard.

``python tests/architectures.py [--sample N] [--only NAME ...]``: the default configuration of each model type is shrunk
(widths, layers, heads, experts, vocabulary), the model made with random weights, and saved as one file, in three shards and
in bfloat16: by ``save_pretrained`` as it is and under ``fastshard.installed()``. Then ``fastshard shard --tp 2`` and
``fastshard merge``. All bytes of all files must be the same. Prints a line for each model type and the totals; exits 1
at any difference, and if a model type that is known to come out the same (``architectures.json``, by version of
transformers) no longer does, or can no longer be made. ``--remember`` writes that file anew.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import io
import itertools
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
import transformers

import fastshard
from fastshard.tools.reshard import merge_checkpoint, shard_checkpoint

KNOWN: Final = Path(__file__).with_name("architectures.json")
"""Version of transformers -> the model types that are saved the same, and those that come back from ``shard`` and
``merge``, too: they must stay so."""

MOST_PARAMETERS: Final = 40_000_000
SECONDS: Final = 90
"""For one model type."""

_LAYERS = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "encoder_layers",
    "decoder_layers",
    "depth",
)
_LAYERS += (
    "num_encoder_layers",
    "num_decoder_layers",
    "num_block_layers",
    "encoder_num_layers",
    "decoder_num_layers",
)
_LAYERS += (
    "num_hidden_layers_encoder",
    "num_conv_layers",
    "n_head_layers",
    "num_blocks",
    "num_transformer_layers",
)
_HEADS = (
    "num_attention_heads",
    "num_heads",
    "n_head",
    "n_heads",
    "encoder_attention_heads",
    "decoder_attention_heads",
)
_KV_HEADS = (
    "num_key_value_heads",
    "n_kv_heads",
    "num_kv_heads",
    "multi_query_group_num",
    "encoder_num_key_value_heads",
)
_WIDTHS = (
    "hidden_size",
    "d_model",
    "n_embd",
    "embed_dim",
    "embedding_size",
    "hidden_dim",
    "word_embed_proj_dim",
    "width",
)
_WIDTHS += (
    "d_embed",
    "hidden_channels",
    "embedding_dim",
    "encoder_hidden_size",
    "decoder_hidden_size",
    "feature_size",
    "emb_dim",
    "audio_hidden_size",
)
_WIDE = (
    "intermediate_size",
    "ffn_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "d_ff",
    "n_inner",
    "ffn_hidden_size",
    "mlp_dim",
)
_WIDE += (
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "feed_forward_hidden_size",
    "dim_feedforward",
    "d_inner",
)
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "n_experts")
_POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "max_source_positions",
    "max_target_positions",
    "max_seq_len",
    "n_ctx",
)
_HEAD_SIZES = ("head_dim", "d_kv", "attention_head_dim", "kv_channels")
_SCALED: Final = frozenset((*_WIDTHS, *_WIDE, *_HEAD_SIZES, "vocab_size"))
_SMALL: Final[dict[str, int]] = {
    **dict.fromkeys(_LAYERS, 2),
    **dict.fromkeys(_HEADS, 4),
    **dict.fromkeys(_KV_HEADS, 2),
    **dict.fromkeys(_HEAD_SIZES, 8),
    **dict.fromkeys(_WIDTHS, 32),
    **dict.fromkeys(_WIDE, 48),
    **dict.fromkeys(_EXPERTS, 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k", "moe_topk", "num_experts_per_token", "moe_k"), 2),
    **dict.fromkeys(
        ("vocab_size", "text_vocab_size", "vocab_size_per_layer_input", "entity_vocab_size"), 128
    ),
    **dict.fromkeys(_POSITIONS, 64),
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_ssm": 64,
}
_OPEN: Final = {
    **{"head_dim": 8, "prediction_length": 4, "context_length": 8, "vocab_size": 128, "num_experts": 4},
    **{
        "num_key_value_heads": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 48,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
    },
}
"""What some configurations leave open though their models need it: said if nothing works without."""
_FACTORS: Final = {"width_coefficient": 0.25, "depth_coefficient": 0.25}
_SETS: Final = (
    (frozenset(_SMALL), 1),
    (frozenset(_SMALL), 4),
    (frozenset(_SMALL) - {*_POSITIONS}, 1),
    (frozenset(_SMALL) - {"head_dim"}, 2),
    (frozenset((*_LAYERS, *_WIDE, *_EXPERTS, "vocab_size")), 1),
    (frozenset((*_LAYERS, *_EXPERTS, "vocab_size")), 1),
    (frozenset((*_LAYERS, *_EXPERTS)), 1),
    (frozenset(_LAYERS), 1),
    (frozenset(("vocab_size",)), 1),
    (frozenset(), 1),
)
"""What is shrunk, and how many times the small widths it keeps, in this order until a model can be made."""


class Outcome(NamedTuple):
    saved: str
    """``same``, what is different, or why there is nothing to compare."""
    sharded: str

    @property
    def is_wrong(self) -> bool:
        return "DIFFERENT" in self.saved or "DIFFERENT" in self.sharded


def known() -> dict[str, list[str]]:
    """``"saved"`` and ``"cut"``: what this version of transformers is known to do; nothing is known of others."""
    found: dict[str, dict[str, list[str]]] = json.loads(KNOWN.read_text())
    return found.get(minor(), {"saved": [], "cut": []})


def _remember(same: dict[str, list[str]], of: set[str]) -> None:
    """Writes down which of these model types are the same; what is known of others stays."""
    before = known()
    everything = json.loads(KNOWN.read_text())
    everything[minor()] = {
        what: sorted({*found, *(name for name in before[what] if name not in of)})
        for what, found in same.items()
    }
    KNOWN.write_text(json.dumps(everything, indent=0) + "\n")


def minor() -> str:
    """Its version, as the file has it."""
    return ".".join(transformers.__version__.split(".")[:2])


def kinds() -> list[str]:
    """The model types that transformers knows."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return sorted(CONFIG_MAPPING.keys())


def _classes_of(config: Any) -> list[Any]:
    """The classes that may take the configuration, those with a head first."""
    classes: list[Any] = []
    for name in ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM", "AutoModel"):
        mapping = getattr(getattr(transformers, name, None), "_model_mapping", {})
        if type(config) in mapping:
            found = mapping[type(config)]
            classes += [found[0] if isinstance(found, (list, tuple)) else found]
    try:
        module = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    except ImportError:
        return classes
    for name, found in sorted(vars(module).items(), reverse=True):
        is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
        if is_model and found.config_class is type(config) and not name.endswith("PreTrainedModel"):
            classes.append(found)
            break
    return list(dict.fromkeys(classes))


def _said(config: Any, name: str) -> Any:
    """By that name or the one that the configuration has for it; of all layers, if they are not alike."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return vars(config).get(name)


def _shrink(config: Any, names: frozenset[str], times: int, complete: bool) -> None:
    values = dict(vars(config))
    layers_before = _said(config, "num_hidden_layers")
    small = {name: size * (times if name in _SCALED else 1) for name, size in _SMALL.items() if name in names}
    if "num_attention_heads" in small:
        alike = [name for name in _KV_HEADS if values.get(name) == values.get("num_attention_heads")]
        small.update(dict.fromkeys(alike, small["num_attention_heads"]))
    for name, value in values.items():
        if isinstance(value, transformers.PretrainedConfig):
            _shrink(value, names, times, complete)
        elif name in small and type(value) is int and value > small[name]:
            setattr(config, name, small[name])
        elif name in _KV_HEADS and value == 1 and names:
            setattr(config, name, 2)  # a single one cannot be cut
        elif complete and name in _OPEN and value is None:
            setattr(config, name, small.get(name, _OPEN[name]))
        elif name in _FACTORS and names:
            setattr(config, name, _FACTORS[name])
    values = dict(vars(config))
    layers, vocabulary = _said(config, "num_hidden_layers"), _said(config, "vocab_size")
    for name, value in values.items():
        if isinstance(value, list) and value and len(value) == layers_before != layers:
            with contextlib.suppress(Exception):
                setattr(config, name, value[:layers])
        if (
            name.endswith("_token_id")
            and type(value) is int
            and type(vocabulary) is int
            and value >= vocabulary
        ):
            setattr(config, name, 0)
    _shorten(config, layers_before, layers, small)


def _shorten(config: Any, before: object, layers: object, small: dict[str, int]) -> None:
    """What a configuration says of each of its layers, where there are fewer now."""
    values = vars(config)
    if type(before) is not int or type(layers) is not int:
        return
    stages = values.get("stage_names")
    if isinstance(stages, list) and len(stages) == before + 1:
        values.update(stage_names=stages[: layers + 1], _out_features=[stages[layers]], _out_indices=[layers])
    overrides = getattr(values.get("_heterogeneity_spec"), "per_layer_overrides", None)
    if isinstance(overrides, dict):
        kept = {layer: said for layer, said in overrides.items() if layer < layers}
        overrides.clear()
        for layer, said in kept.items():
            overrides[layer] = {
                name: min(value, small[name]) if name in small and type(value) is int else value
                for name, value in said.items()
            }


def _read_again(config: Any) -> Any:
    """``None``: it cannot be read. What is read may be another: values that follow from others are reckoned then."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            config.save_pretrained(folder)
            return transformers.AutoConfig.from_pretrained(folder)
        except TimeoutError:
            raise
        except Exception:
            return None


def make(kind: str) -> Any:
    """A small model, if possible as its configuration has it when it is read again: of another, transformers could not
    load what it saves. Raises ``LookupError`` with the reason if none can be made."""
    reason = "no class for its configuration"
    second = None
    for complete, (names, times) in (
        *itertools.product([False], _SETS),
        *itertools.product([True], _SETS[:4]),
    ):
        try:
            config = transformers.AutoConfig.for_model(kind)
            _shrink(config, names, times, complete)
            classes = _classes_of(config)
            read = _read_again(config)
        except TimeoutError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".partition("\n")[0][:90]
            continue
        for cls in classes:
            try:
                with torch.device("meta"):
                    count = sum(p.numel() for p in cls(read or config).parameters())
                if count > MOST_PARAMETERS:
                    reason = f"{count / 1e6:.0f} million parameters"
                    continue
                torch.manual_seed(0)
                if read is None:
                    second = second or (cls, config)
                    continue
                return cls(read).eval()
            except TimeoutError:
                raise
            except Exception as error:
                reason = f"{type(error).__name__}: {error}".partition("\n")[0][:90]
    if second is not None:
        cls, config = second
        return cls(config).eval()
    raise LookupError(reason)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def difference(expected: dict[str, bytes], found: dict[str, bytes]) -> str:
    """What is different, if anything is."""
    if expected.keys() != found.keys():
        return f"other files: {sorted(expected.keys() ^ found.keys())[:3]}"
    return ", ".join(name for name in expected if expected[name] != found[name])


def _save(model: Any, folder: Path, size: int | str) -> str | dict[str, bytes]:
    try:
        model.save_pretrained(folder, max_shard_size=size)
    except TimeoutError:
        raise
    except Exception as error:
        return f"{type(error).__name__}"
    return tree(folder)


def compare(kind: str, work: Path) -> Outcome:
    try:
        model = make(kind)
    except LookupError as error:
        return Outcome(f"not made: {error}", "")
    nbytes = sum(t.nbytes for t in model.state_dict().values())
    halved = copy.deepcopy(model).to(torch.bfloat16)
    variants = (("one", model, "50GB"), ("three", model, max(1, nbytes // 3 + 1)), ("bf16", halved, "50GB"))
    there = {variant: _save(one, work / variant, size) for variant, one, size in variants}
    with fastshard.installed():
        ours = {variant: _save(one, work / f"{variant}.ours", size) for variant, one, size in variants}
    for variant, expected in there.items():
        found = ours[variant]
        if isinstance(expected, str):
            if expected == found:
                return Outcome(f"not saved by the original either: {expected}", "")
            return Outcome(f"DIFFERENT ({variant}): {expected} there", "")
        if isinstance(found, str):
            return Outcome(f"DIFFERENT ({variant}): {found}", "")
        if different := difference(expected, found):
            return Outcome(f"DIFFERENT ({variant}): {different}", "")
    return Outcome("same", _cut_and_merged(work))


def _cut_and_merged(work: Path) -> str:
    try:
        shard_checkpoint(work / "three", work / "parts", 2)
    except ValueError as error:
        return "no plan" if "has no tensor-parallel plan" in str(error) else f"refused: {error}"[:150]
    merge_checkpoint(work / "parts", work / "whole")
    different = difference(tree(work / "three"), tree(work / "whole"))
    return f"DIFFERENT: {different}" if different else "same"


@contextlib.contextmanager
def _limited(seconds: int) -> Iterator[None]:
    """Of the processors' time: a busy machine is no reason."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def outcome_of(kind: str) -> Outcome:
    work = Path(tempfile.mkdtemp(prefix="architectures-"))
    hidden = io.StringIO()
    try:
        with _limited(SECONDS), contextlib.redirect_stdout(hidden), contextlib.redirect_stderr(hidden):
            return compare(kind, work)
    except TimeoutError as error:
        return Outcome(f"not compared: {error}", "")
    except Exception as error:
        return Outcome(f"DIFFERENT: {type(error).__name__}: {error}".replace("\n", " ")[:300], "")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def quiet() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    os.environ["HF_HUB_OFFLINE"] = "1"


def sample(names: list[str], count: int) -> list[str]:
    """So many of them, evenly spread, always the same."""
    return names if count >= len(names) else [names[i * len(names) // count] for i in range(count)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sample", type=int, metavar="N", help="only so many model types, evenly spread")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these model types")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="at the same time (default: 2)")
    parser.add_argument(
        "--remember", action="store_true", help="write down which are the same, if none is different"
    )
    given = parser.parse_args(arguments)
    names = given.only or kinds()
    if given.sample is not None:
        names = sample(names, given.sample)
    began = time.monotonic()
    outcomes: dict[str, Outcome] = {}
    with ProcessPoolExecutor(given.processes, get_context("spawn"), initializer=quiet) as pool:
        for name, outcome in zip(names, pool.map(outcome_of, names)):
            outcomes[name] = outcome
            print(f"{name:32} {outcome.saved:40} {outcome.sharded}".rstrip(), flush=True)
    seconds = time.monotonic() - began
    print(f"\ntransformers {transformers.__version__}, {len(names)} model types, {seconds:.0f} s")
    totals = Counter(
        f"saved: {found.saved.partition(':')[0].partition(' (')[0]}" for found in outcomes.values()
    )
    totals += Counter(
        f"cut and merged: {found.sharded.partition(':')[0]}" for found in outcomes.values() if found.sharded
    )
    for what, count in sorted(totals.items()):
        print(f"{count:5} {what}")
    saved = [name for name, found in outcomes.items() if found.saved == "same"]
    cut = [name for name, found in outcomes.items() if found.sharded == "same"]
    wrong = [name for name, found in outcomes.items() if found.is_wrong]
    lost = [
        name
        for what, found in (("saved", saved), ("cut", cut))
        for name in known()[what]
        if name in outcomes and name not in found
    ]
    if wrong:
        print(f"DIFFERENT: {', '.join(wrong)}")
    if lost:
        print(f"the same before, and no longer: {', '.join(dict.fromkeys(lost))}")
    if given.remember and not wrong:
        _remember({"saved": saved, "cut": cut}, set(outcomes))
    return int(bool(wrong or lost))


if __name__ == "__main__":
    sys.exit(main())
