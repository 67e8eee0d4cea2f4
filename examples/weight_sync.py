# SPDX-License-Identifier: Apache-2.0
"""Trains a small language model and hands its weights to a running server after every round, through a file in
``/dev/shm``. The server is vLLM if that is installed, else a process of its own with transformers. After each round
both generate from the same prompts, and the example stops with an error unless the answers are the same.

    python examples/weight_sync.py
    python examples/weight_sync.py --server vllm --rounds 9 --compare

``--compare`` takes turns between three ways to hand the weights over, and prints how long each of them takes:
``prepare`` (a prepared save, then vLLM's ``reload_weights``), ``save_file`` (that of safetensors, then the same), and
``transfer`` (vLLM's weight transfer with the backend ``fastshard_shm``).
"""

import argparse
import importlib.util
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastshard
from fastshard.mapped import load_mapped

PROMPTS = [[5, 6, 7, 8], [100, 200, 250, 3, 1, 4, 1, 5]]
NEW_TOKENS = 16

Answers = list[list[int]]


# The trainer.


def make_model(width: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,  # heads of 64, which vLLM has on all devices
        num_key_value_heads=width // 64,
        max_position_embeddings=128,
        initializer_range=0.2,  # so that the answers depend on every layer
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, seed: int) -> None:
    tokens = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(seed))
    for _ in range(2):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def generate(model: LlamaForCausalLM) -> Answers:
    """What the weights answer, by transformers: the reference."""
    answers = []
    for prompt in PROMPTS:
        asked = torch.tensor([prompt])
        told = model.generate(
            asked,
            attention_mask=torch.ones_like(asked),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
        answers.append(told[0, len(prompt) :].tolist())
    return answers


# The servers. Each has its model in another process.


class Server(Protocol):
    def reload(self, folder: Path) -> None: ...

    def generate(self) -> Answers: ...

    def close(self) -> None: ...


class Transformers:
    """A process that maps the file and copies what it needs."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve, args=(folder, other), daemon=True)
        self._process.start()
        self._asked("ready")

    def reload(self, folder: Path) -> None:
        self._asked("reload", folder)

    def generate(self) -> Answers:
        answers: Answers = self._asked("generate")
        return answers

    def close(self) -> None:
        self._pipe.close()
        self._process.join()

    def _asked(self, *request: object) -> Any:
        self._pipe.send(request)
        return self._pipe.recv()


def serve(folder: Path, pipe: Connection) -> None:
    torch.set_num_threads(1)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).eval()
    try:
        while True:
            call, *arguments = pipe.recv()
            answer = None
            if call == "reload":
                # The tensors lie in the file. What is read is what this process needs, straight from the pages that the
                # trainer has filled; the next save but one fills them again, so the weights are copied here.
                model.load_state_dict(load_mapped(arguments[0] / "model.safetensors"))
            elif call == "generate":
                answer = generate(model)
            pipe.send(answer)
    except EOFError:
        pass


class Vllm:
    """vLLM, whose workers read the folder."""

    def __init__(self, folder: Path) -> None:
        from vllm import LLM

        self.llm = LLM(
            model=str(folder),
            dtype="float32",
            max_model_len=64,
            skip_tokenizer_init=True,
            enforce_eager=True,
            weight_transfer_config={"backend": "fastshard_shm"},
        )

    def reload(self, folder: Path) -> None:
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        self.llm.reset_prefix_cache()  # what it keeps was computed with the old weights

    def generate(self) -> Answers:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
        asked = [TokensPrompt(prompt_token_ids=prompt) for prompt in PROMPTS]
        return [
            list(told.outputs[0].token_ids) for told in self.llm.generate(asked, sampling, use_tqdm=False)
        ]

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()

    # What the trainer's side of vLLM's weight transfer calls. For a server behind HTTP vLLM has
    # HTTPVLLMWeightSyncClient, which does the same.

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        self.llm.start_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.llm.finish_weight_update(weight_version)
        self.llm.reset_prefix_cache()


# The ways from one to the other. Each returns the seconds until the server had loaded the weights, and those of them
# that it took until the file stood; the weight transfer is one call, which does not tell.

Way = Callable[[], tuple[float, float | None]]


def by_prepare(prepared: fastshard.PreparedSave, server: Server, folder: Path) -> Way:
    def way() -> tuple[float, float | None]:
        began = time.perf_counter()
        prepared.save()  # reads the model's weights as they are now
        saved = time.perf_counter()
        server.reload(folder)
        return time.perf_counter() - began, saved - began

    return way


def by_save_file(model: LlamaForCausalLM, server: Server, folder: Path) -> Way:
    def way() -> tuple[float, float | None]:
        began = time.perf_counter()
        safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
        saved = time.perf_counter()
        server.reload(folder)
        return time.perf_counter() - began, saved - began

    return way


def by_transfer(model: LlamaForCausalLM, server: Vllm, path: Path) -> Way:
    from vllm.distributed.weight_transfer import ModuleSource, WeightTransferTrainerFactory

    from fastshard.vllm_transfer import ShmTrainerInitInfo

    engine = WeightTransferTrainerFactory.trainer_init(
        ShmTrainerInitInfo(str(path), rank=0), client=server, source=ModuleSource(model)
    )

    def way() -> tuple[float, float | None]:
        began = time.perf_counter()
        engine.send_weights()
        return time.perf_counter() - began, None

    return way


def new_folder(model: LlamaForCausalLM, parent: Path, name: str) -> Path:
    """A model folder without weights, for a server that looks for its configuration."""
    folder = parent / name
    folder.mkdir()
    model.config.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    has_vllm = importlib.util.find_spec("vllm") is not None
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"), help="where the weights go (/dev/shm)")
    parser.add_argument(
        "--server",
        choices=("vllm", "transformers"),
        default="vllm" if has_vllm else "transformers",
        help="who serves the weights (vllm if it is installed)",
    )
    parser.add_argument("--rounds", type=int, default=3, help="of training and handing over (default: 3)")
    parser.add_argument("--width", type=int, default=128, help="of the model, in steps of 64 (default: 128)")
    parser.add_argument("--layers", type=int, default=2, help="of the model (default: 2)")
    parser.add_argument("--compare", action="store_true", help="all ways, in turn")
    args = parser.parse_args()

    model = make_model(args.width, args.layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    parent = Path(tempfile.mkdtemp(prefix="weight-sync-", dir=args.dir))
    folder = new_folder(model, parent, "prepared")
    seconds: dict[str, list[tuple[float, float | None]]] = {}
    try:
        # Reserves and maps two files of the model's size, once. Every save after that only copies.
        with fastshard.prepare(model, folder / "model.safetensors", {"format": "pt"}) as prepared:
            prepared.save()
            print(f"{prepared.nbytes:,} bytes of weights in {folder}", flush=True)
            server: Server = Vllm(folder) if args.server == "vllm" else Transformers(folder)
            ways = {"prepare": by_prepare(prepared, server, folder)}
            if args.compare:
                ways["save_file"] = by_save_file(model, server, new_folder(model, parent, "saved"))
            if args.compare and isinstance(server, Vllm):
                ways["transfer"] = by_transfer(model, server, parent / "transferred.safetensors")
            before = None
            for number in range(args.rounds):
                train(model, optimizer, number)
                expected = generate(model)
                name = list(ways)[number % len(ways)]
                seconds.setdefault(name, []).append(ways[name]())
                answers = server.generate()
                if answers != expected:
                    raise SystemExit(f"round {number + 1}: {args.server} answers {answers}, not {expected}")
                if answers == before:
                    raise SystemExit(f"round {number + 1}: the training has not changed the answers")
                before = answers
                print(f"round {number + 1}: {name}, {args.server} answers as the trainer does", flush=True)
            server.close()
    finally:
        shutil.rmtree(parent)
    for name, measured in seconds.items():
        later = measured[1:] or measured  # the first of each way meets memory that nobody has touched
        loaded = statistics.median(total for total, _ in later)
        saved = [part for _, part in later if part is not None]
        of_it = f", {1000 * statistics.median(saved):.1f} ms of it to save" if saved else ""
        print(
            f"{name}: {1000 * loaded:.1f} ms until the server had the weights{of_it} (median of {len(later)})"
        )


if __name__ == "__main__":
    main()
