"""What a job looks like in a terminal."""

import os
import subprocess
import sys
import termios
from pathlib import Path

from tests.avatar_client.answers import DONE, QUEUED, RUNNING

ROOT = Path(__file__).parents[2]


def test_a_progress_bar_follows_the_job_on_a_terminal(tmp_path: Path) -> None:
    script = tmp_path / "bar.py"
    script.write_text(
        "from avatar_client import JobStatus, progress_bar\n"
        "with progress_bar() as show:\n"
        f"    for body in {[QUEUED, RUNNING, DONE]}:\n"
        "        show(JobStatus.parse(body))\n"
    )
    terminal, end = os.openpty()
    termios.tcsetwinsize(end, (24, 120))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, script], stderr=end, env=environment, check=True)
    os.close(end)
    with os.fdopen(terminal, "rb") as screen:
        lines = screen.read1(100_000).decode().split("\r")

    shown = [line.strip() for line in lines if line.strip()]
    assert any(line.startswith("Waiting in the queue ") and " 0 %" in line for line in shown)
    assert any("Denoising 21/50" in line and "42 %" in line for line in shown)
    assert any("236 s left" in line for line in shown)
    assert shown[-1].startswith("Completed ")
    assert "100 %" in shown[-1]
    assert "left" not in shown[-1]
