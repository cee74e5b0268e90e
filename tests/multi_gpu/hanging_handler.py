"""`handler.py` beside a further GPU that stops computing in its first job."""

import handler
from worker.multi_gpu import controller

controller.FOLLOWER = "tests.multi_gpu.failing_rank"
controller.LAGGING_SECONDS = 1.0

if __name__ == "__main__":
    handler.main()
