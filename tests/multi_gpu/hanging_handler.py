"""`handler.py` beside a further GPU that stops computing in its first job."""

import handler
from tests.multi_gpu import failing_rank
from worker.generation import engine
from worker.multi_gpu import controller

engine.RANK_LOAD = failing_rank.LOAD
controller.GATHER_TIMEOUT_SECONDS = 1.0

if __name__ == "__main__":
    handler.main()
