"""The avatar worker: one portrait and one speech recording in, a talking-avatar video out."""

from worker import import_guard

import_guard.arm()  # here, so that every process that imports anything of ours passes it
