"""Makes the demo model, in one run that resumes an earlier one.

The speech encoder, the autoencoder and then the denoiser are trained; what comes out is a model
directory as the worker loads it.
"""

import argparse
import logging
import os
import time
from pathlib import Path

import torch

from training import demo_model, report, transformer
from training.processes import LOG_FORMAT

WRITING_SECONDS = 60  # that the files take in the end, and what the device still has to do


def main() -> None:
    """Trains what is not trained yet and writes the model."""
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(".cache/training"))
    parser.add_argument("--out", type=Path, default=Path("out/demo-model"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--processes",
        type=int,
        default=min(max((os.cpu_count() or 1) - 2, 1), 16),
        help="that make the training data",
    )
    parser.add_argument(
        "--scenes",
        type=int,
        default=transformer.FIRST_SCENES,
        help="that are made before the denoiser's first step; fewer begin sooner",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help="that the whole run may take; the denoiser gets what the other two leave."
        " 0 writes what an earlier run has left, as it is",
    )
    arguments = parser.parse_args()
    deadline = None
    if arguments.minutes is not None:
        deadline = time.monotonic() + 60 * arguments.minutes - WRITING_SECONDS
    if arguments.device != "cpu":  # what is left to the CPU is too small for many threads
        torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    demo_model.make(
        arguments.work,
        arguments.seed,
        torch.device(arguments.device),
        arguments.processes,
        arguments.scenes,
        deadline,
    )
    demo_model.write(arguments.work, arguments.out)
    report.write(arguments.work, arguments.out.parent)


if __name__ == "__main__":
    main()
