"""A job in the terminal: one line that follows it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from avatar_client.responses import JobStatus, Progress

FORM = "{desc:<40}|{bar}| {percentage:3.0f} %  {elapsed}{postfix}"


@contextmanager
def progress_bar() -> Iterator[Callable[[JobStatus], None]]:
    """What `wait` tells each status, drawn as a bar on stderr if that is a terminal."""
    with tqdm(total=100, bar_format=FORM, disable=None) as bar:

        def show(job: JobStatus) -> None:
            bar.set_description_str(_words(job), refresh=False)
            bar.set_postfix_str(_time_left(job.progress), refresh=False)
            percent = 100.0 if job.status == "COMPLETED" else bar.n
            if job.progress is not None:
                percent = 100 * job.progress.progress
            bar.update(percent - bar.n)
            bar.refresh()

        yield show


def _words(job: JobStatus) -> str:
    if job.status == "IN_QUEUE":
        return "Waiting in the queue"
    return job.progress.message if job.progress else job.status.replace("_", " ").capitalize()


def _time_left(progress: Progress | None) -> str:
    if progress is None or progress.eta_seconds is None:
        return ""
    return f"{progress.eta_seconds:.0f} s left"
