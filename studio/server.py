"""The page's server: for this machine alone, with a page that fetches nothing from elsewhere."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import gradio as gr
import uvicorn
from fastapi import FastAPI

from studio.connection import Connection
from studio.guard import GuardMiddleware
from studio.page import MAX_FILE_BYTES, Page, theme
from studio.tracker import JobTracker

STYLE = Path(__file__).with_name("style.css")


def is_not_stream_cancellation(record: logging.LogRecord) -> bool:
    """False for the log of a page's stream that ends: it is open until it is cancelled."""
    is_cancelled = record.exc_info is not None and isinstance(
        record.exc_info[1], asyncio.CancelledError
    )
    return not is_cancelled and not str(record.msg).startswith("Cancel %s running task")


def serve(
    page: Page, tracker: JobTracker, connection: Connection | None, *, host: str, port: int
) -> None:
    """Serves the page until the process is told to stop.

    Raises:
        OSError: the port is taken, or the host is not this machine's.
    """
    listener = socket.create_server((host, port))
    # the history's own files are shown as they are
    gr.set_static_paths([tracker.history.directory])

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if connection is not None:
            tracker.resume(connection)
        print(f"The studio is at http://{host}:{port}", flush=True)  # noqa: T201
        yield
        await tracker.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(GuardMiddleware, host=host)
    gr.mount_gradio_app(
        app,
        page.blocks,
        path="/",
        server_name=host,
        server_port=port,
        footer_links=[],
        run_history=False,  # it keeps inputs in the browser, keys too
        max_file_size=MAX_FILE_BYTES,
        show_error=False,  # what the page has to say it says itself, without others' text
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        theme=theme(),
        css_paths=STYLE,
    )
    # of a mounted page gradio would take any path of this machine for an uploaded file
    page.blocks.has_launched = True
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    logging.getLogger("uvicorn.error").addFilter(is_not_stream_cancellation)
    with listener:
        uvicorn.Server(config).run(sockets=[listener])
