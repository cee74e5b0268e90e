"""`handler.py` beside a further GPU that stops computing in its first job."""

import handler
from worker import team

team.FOLLOWER = "tests.failing_follower"
team.LAGGING_SECONDS = 1.0

if __name__ == "__main__":
    handler.main()
