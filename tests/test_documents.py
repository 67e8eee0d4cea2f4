# SPDX-License-Identifier: Apache-2.0
"""README and the pages of the documentation: every code block runs, and what they say of the package is so."""

from __future__ import annotations

import re
from pathlib import Path

import forked
import pytest

pytest.importorskip("sybil")
import pages

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = {}
"""How many blocks of each page do not run. Each of them says why."""

SCRIPT = """
import gc, os, sys
from pathlib import Path

gc.unfreeze()  # a page may replace functions
sys.path.insert(0, sys.argv[1])
import pages

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
    for library in pages.needed(page):
        pytest.importorskip(library)
    done = forked.run(SCRIPT, ROOT / "tests", page, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_blocks_that_do_not_run_are_few_and_say_why() -> None:
    found = {page.name: len(pages.reasons_not_run(page)) for page in PAGES}
    assert {name: count for name, count in found.items() if count} == NOT_RUN
