"""What docs/security.md promises has a test each, and there are as many inputs as it says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/security.md"
ENOUGH = 1000  # inputs, as the page says


def test_each_promise_has_its_test() -> None:
    promises = PAGE.read_text().partition("## What is promised")[2].partition("## What is not")[0]
    rows = [line for line in promises.splitlines() if line.startswith("| ")][2:]
    named = [re.findall(r"`(tests/[\w./]+)`", row) for row in rows]
    assert all(named)
    assert not [path for row in named for path in row if not (ROOT / path).is_file()]


@pytest.mark.slow
def test_there_are_as_many_inputs_as_the_page_says() -> None:
    words = ["-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests/security"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    found = re.search(r"^(\d+)(?:/\d+)? tests collected", done.stdout, re.MULTILINE)
    assert found is not None, done.stdout[-2000:]
    assert int(found[1]) >= ENOUGH
