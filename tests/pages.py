# SPDX-License-Identifier: Apache-2.0
"""The code blocks of a Markdown page, and a process in which they run in order. CONTRIBUTING.md says how a page is
written for this."""

from __future__ import annotations

import doctest
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from sybil import Document, Example, Region
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser
from sybil.parsers.markdown.lexers import DirectiveInHTMLCommentLexer, FencedCodeBlockLexer

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
LANGUAGES = "python|console|bash"
NOT_RUN = re.compile(
    rf"<!-- not run: (\S.*?) -->\n\s*```(?:{LANGUAGES})\n(.*?)^\s*```$", re.DOTALL | re.MULTILINE
)
STATUS = re.compile(r"<!-- exit status: (\d+) -->\n$")
# What a shell has to do, where a command of ours alone runs in this process.
SHELL = re.compile(r"""[|&;<>$`*~]""")


def text_to_run(path: Path) -> str:
    """Returns the page with nothing in the blocks that are not run, and as many lines as before."""

    def emptied(match: re.Match[str]) -> str:
        return "\n" * match[0].count("\n")

    return NOT_RUN.sub(emptied, path.read_text())


def reasons_not_run(path: Path) -> list[str]:
    return [match[1] for match in NOT_RUN.finditer(path.read_text())]


def count_blocks(path: Path) -> int:
    """Returns how many blocks of the page run."""
    return len(list(FencedCodeBlockLexer(LANGUAGES)(Document(text_to_run(path), str(path)))))


def run(path: Path) -> None:
    """Runs the blocks of the page in the current folder, in order, and raises what goes wrong."""
    document = Document(text_to_run(path), str(path))
    for parse in (
        PythonCodeBlockParser(doctest_optionflags=FLAGS),
        CodeBlockParser("console", _console),
        CodeBlockParser("bash", _bash),
        _hidden,
    ):
        for region in parse(document):
            document.add(region)
    document.namespace["__name__"] = "__main__"
    for example in document.examples():
        example.evaluate()


def _hidden(document: Document) -> Iterator[Region]:
    """Python code that readers do not see: ``<!-- run:`` in a line, the code, ``-->`` in another."""
    for region in DirectiveInHTMLCommentLexer("run")(document):
        region.parsed = region.lexemes["source"]
        region.evaluator = PythonEvaluator()
        yield region


def _bash(example: Example) -> str | None:
    return _compare(example, "", *_in_shell(f"set -e\n{example.parsed}"))


def _console(example: Example) -> str | None:
    """Runs each command behind a dollar sign, and compares what it prints with what is shown, if anything is."""
    for command, shown in _commands(example.parsed):
        words = shlex.split(command, comments=True)
        alone = words[:1] == ["fastshard"] and words[1:2] != ["run"] and not SHELL.search(command)
        ended = _in_this_process(words[1:]) if alone else _in_shell(command)
        if problem := _compare(example, shown, *ended, command):
            return problem
    return None


def _commands(source: str) -> Iterator[tuple[str, str]]:
    parts = re.split(r"^\$ ", source, flags=re.MULTILINE)
    assert not parts[0].strip(), f"a console block begins with a command: {parts[0]!r}"
    for part in parts[1:]:
        lines = part.splitlines(keepends=True)
        length = 1
        while lines[length - 1].rstrip().endswith("\\"):
            length += 1
        yield "".join(lines[:length]), "".join(lines[length:])


def _in_this_process(arguments: list[str]) -> tuple[int, str]:
    from fastshard.cli import main

    with os.fdopen(os.memfd_create("output"), "w+", errors="replace") as output:
        kept = os.dup(1), os.dup(2)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        try:
            status = main(arguments)
        except SystemExit as end:  # of argparse
            status = int(end.code or 0)
        finally:
            sys.stdout.flush()
            for number, file in enumerate(kept, 1):
                os.dup2(file, number)
                os.close(file)
        output.seek(0)
        return status, output.read()


def _in_shell(command: str) -> tuple[int, str]:
    beside = os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"]))
    done = subprocess.run(
        ["bash", "-c", command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PATH": beside},
    )
    return done.returncode, done.stdout


def _compare(example: Example, shown: str, status: int, printed: str, command: str = "") -> str | None:
    before = STATUS.search(example.document.text[: example.start])
    expected = int(before[1]) if before else 0
    if status != expected:
        return f"{command or 'the block'} has ended with {status}, not {expected}:\n{printed}"
    if shown.strip() and not doctest.OutputChecker().check_output(shown, printed, FLAGS):
        return f"{command} has printed:\n{printed}\nwhere the page shows:\n{shown}"
    return None
