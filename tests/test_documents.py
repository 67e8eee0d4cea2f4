# SPDX-License-Identifier: Apache-2.0
"""README and the pages of the documentation: every code block runs, and what they say of the package is so."""

from __future__ import annotations

import argparse
import ast
import re
from pathlib import Path

import forked
import pages
import pytest

from fastshard.bench.save import _parser as bench_parser
from fastshard.cli.command import make_parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = {
    "README.md": 2,
    "examples.md": 5,
    "install.md": 2,
    "performance.md": 3,
    "quickstart.md": 2,
    "rivals.md": 2,
    "runs.md": 1,
    "serving-image.md": 4,
    "sglang.md": 1,
    "torch-distributed-checkpoint.md": 1,
    "vllm.md": 2,
    "weight-sync.md": 3,
}
"""How many blocks of each page do not run. Each of them says why."""

SCRIPT = """
import gc, os, sys
from pathlib import Path

gc.unfreeze()  # a page may replace functions
sys.path.insert(0, sys.argv[1])
import pages

from fastshard.bench.save import _parser as bench_parser
from fastshard.cli.command import make_parser

try:
    pages.run(Path(sys.argv[2]))
    if "fastshard" in sys.modules:
        sys.modules["fastshard"].wait_all()
except BaseException:
    import traceback

    traceback.print_exc()
    os._exit(1)
os._exit(0)  # the end of a process that has torch in it takes half a second
"""


@pytest.mark.parametrize(
    "page", [pytest.param(page, id=page.name) for page in PAGES if pages.count_blocks(page)]
)
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path) -> None:
    done = forked.run(SCRIPT, ROOT / "tests", page, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_blocks_that_do_not_run_are_few_and_say_why() -> None:
    found = {page.name: len(pages.reasons_not_run(page)) for page in PAGES}
    assert {name: count for name, count in found.items() if count} == NOT_RUN


def tables_of_commands() -> dict[str, str]:
    """Returns, by command, the table of its arguments as it stands in the page."""
    (commands,) = (
        action for action in make_parser()._actions if isinstance(action, argparse._SubParsersAction)
    )
    return {name: table_of(parser) for name, parser in (*commands.choices.items(), ("bench", bench_parser()))}


def table_of(parser: argparse.ArgumentParser) -> str:
    rows = []
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
            continue
        # An option's value: as it is named, or the choices.
        value = action.metavar or (
            f"{{{','.join(action.choices)}}}" if action.choices else action.dest.upper()
        )
        named = ", ".join(action.option_strings) or str(value)
        if action.option_strings and action.nargs != 0:
            named += f" {value}"
        rows.append(f"| `{named}` | {action.help} |\n")
    return "| argument | what it does |\n|---|---|\n" + "".join(rows) if rows else ""


def test_the_page_of_the_command_line_has_every_argument() -> None:
    page = (ROOT / "docs" / "command-line.md").read_text()
    for command, table in tables_of_commands().items():
        section = page.partition(f"\n## {command}\n")[2].partition("\n## ")[0]
        assert section, command
        assert table in section, f"the table of {command} should be:\n{table}"


def test_links_between_files_of_the_repository_lead_somewhere() -> None:
    """Those of the pages are followed by ``make docs``, with their sections; here it is seen from the repository."""
    files = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "DESIGN.md", ROOT / "tests" / "README.md"]
    found = [(file, link) for file in files for link in re.findall(r"\]\(([^)#]+)[^)]*\)", file.read_text())]
    lost = [
        f"{file.name}: {link}"
        for file, link in found
        if "://" not in link and not (file.parent / link).exists()
    ]
    assert len(found) > 80 and lost == []


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_page_can_be_reached() -> None:
    reached = set(re.findall(r"([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert reached == {page.name for page in PAGES} - {"README.md"}


def texts_of_messages() -> str:
    """Returns every text in the sources, the parts of formatted ones apart."""
    texts = []
    for file in (ROOT / "fastshard").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    texts += [file.read_text() for file in (ROOT / "csrc").rglob("*.cc")]
    return "\n".join(texts)


def test_troubleshooting_has_the_texts_of_messages() -> None:
    headings = re.findall(r"^### `(.*)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    known = texts_of_messages()
    parts = [part.strip(" :`;") for heading in headings for part in re.split("<.*?>| / ", heading)]
    assert len(headings) > 20
    assert [part for part in parts if len(part) > 8 and part not in known] == []
