"""The log of a training in a small form: one file of lines, and its curves as a picture."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.loop import LOG

LOG_FILE = "demo-model-log.jsonl"
CURVES_FILE = "demo-model-curves.svg"
PARTS = ("audio_encoder_run", "vae_run", "transformer_run")
# Of each panel's curves: the measures of the parts differ.
MEASURES = ("layer_4", "loss", "cond", "uncond", "cached", "high", "low")
COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#8e5572", "#b58900", "#444444", "#2aa198")
WIDTH, HEIGHT, MARGIN = 640, 220, 44  # px of a panel


def read(work: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of each run's log, by its name, in the order in which they were run."""
    paths = [path for part in PARTS for path in (work / part).glob(f"**/{LOG}")]
    # a phase ends before the next one begins
    paths.sort(
        key=lambda path: (PARTS.index(path.relative_to(work).parts[0]), path.stat().st_mtime)
    )
    return {
        "/".join(path.relative_to(work).parts[:-1]): [
            json.loads(line) for line in path.read_text().splitlines()
        ]
        for path in paths
    }


def write(work: Path, directory: Path) -> None:
    """Writes the log and its curves into the directory."""
    runs = read(work)
    lines = [json.dumps({"run": name, **line}) for name, run in runs.items() for line in run]
    (directory / LOG_FILE).write_text("".join(line + "\n" for line in lines))
    (directory / CURVES_FILE).write_text(draw(runs))


def draw(runs: dict[str, list[dict[str, Any]]]) -> str:
    """An SVG with a panel for each run: its losses by the step, in decades."""
    drawn = [(name, run) for name, run in runs.items() if run]
    panels = [_panel(name, run, top * HEIGHT) for top, (name, run) in enumerate(drawn)]
    size = f'width="{WIDTH}" height="{HEIGHT * len(panels)}"'
    look = 'font-family="sans-serif" font-size="11"'
    begin = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {look}>'
    ground = '<rect width="100%" height="100%" fill="white"/>'
    return "\n".join([begin, ground, *panels, "</svg>\n"])


def _panel(name: str, run: Sequence[dict[str, Any]], top: int) -> str:
    names = [measure for measure in MEASURES if run[0].get(measure, 0) > 0]
    values = [line[measure] for measure in names for line in run if line.get(measure, 0) > 0]
    last = max(line["step"] for line in run)
    low, high = (math.log10(value) for value in (min(values), max(values)))
    spread = max(high - low, 1e-3)

    def at(step: int, value: float) -> str:
        x = MARGIN + (WIDTH - 3 * MARGIN) * step / last
        y = top + MARGIN / 2 + (HEIGHT - MARGIN) * (high - math.log10(value)) / spread
        return f"{x:.1f},{y:.1f}"

    title = f"{name}: {last} steps, {run[-1]['seconds']:.0f} s"
    parts = [f'<text x="{MARGIN}" y="{top + 12}">{title}</text>']
    for place, (value, align) in enumerate(((max(values), 24), (min(values), HEIGHT - 24))):
        parts.append(f'<text x="2" y="{top + align - 2 * place}">{value:.3g}</text>')
    for place, measure in enumerate(names):
        points = " ".join(at(line["step"], line[measure]) for line in run if line[measure] > 0)
        colour = COLOURS[MEASURES.index(measure)]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}"/>')
        label = f'x="{WIDTH - 2 * MARGIN + 6}" y="{top + 30 + 16 * place}" fill="{colour}"'
        parts.append(f"<text {label}>{measure} {run[-1][measure]:.3g}</text>")
    return "\n".join(parts)
