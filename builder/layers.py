"""Deals the files of a model directory out to folders, each of which is to be a layer of an image.

    python -m builder.layers MODEL_DIR LAYERS_DIR --count N

LAYERS_DIR/1 to N hold every file once, at its path in the model, and copied into one directory they
are the model again. They are of about the same size: a host fetches layers side by side.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

MAX_LAYER_BYTES = 10 * 10**9  # what registries take


def deal(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    """The names of each layer: one after the other, the largest first, to the smallest layer.

    Args:
        sizes: bytes by name.

    Raises:
        ValueError: a layer would be too large.
    """
    layers: list[list[str]] = [[] for _ in range(count)]
    totals = [0] * count
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        smallest = totals.index(min(totals))
        layers[smallest].append(name)
        totals[smallest] += sizes[name]
    if max(totals) > MAX_LAYER_BYTES:
        raise ValueError(f"{count} layers are too few: one would have {max(totals) / 1e9:.1f} GB")
    return layers


def move(model_dir: Path, layers_dir: Path, count: int) -> None:
    """Moves the files of the model to their layers, and removes what is left of its directory.

    Raises:
        ValueError: as `deal`.
    """
    paths = [path for path in model_dir.rglob("*") if path.is_file()]
    sizes = {str(path.relative_to(model_dir)): path.stat().st_size for path in paths}
    for number, names in enumerate(deal(sizes, count), start=1):
        layer = layers_dir / str(number)
        layer.mkdir(parents=True)
        for name in names:
            (layer / name).parent.mkdir(parents=True, exist_ok=True)
            (model_dir / name).rename(layer / name)
    for directory in sorted(model_dir.rglob("*"), reverse=True):
        directory.rmdir()
    model_dir.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m builder.layers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("layers_dir", type=Path)
    parser.add_argument("--count", type=int, required=True, help="how many layers")
    arguments = parser.parse_args()
    try:
        move(arguments.model_dir, arguments.layers_dir, arguments.count)
    except ValueError as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
