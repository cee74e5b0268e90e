"""The demo model: the real architecture at toy width, trained in a drawn world of talking faces.

It lies beside this file, in the worker's own format, and needs neither a GPU nor a download.
`AVATAR_MODEL=demo` selects it and nothing else does. Its card says what it is and what it can do.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "demo_model"
