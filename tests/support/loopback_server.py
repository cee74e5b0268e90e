"""An HTTP server on the loopback interface, inside its context; what it answers is a subclass's."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


class LoopbackServer:
    """Has each request answered by `serve`, in a thread of its own."""

    server_class = ThreadingHTTPServer
    origin: str  # its address, inside the context

    def serve(self, request: BaseHTTPRequestHandler) -> None:
        """Answers one request."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        serve = self.serve

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                serve(self)

            do_POST = do_PUT = do_HEAD = do_DELETE = do_GET  # noqa: N815

            def log_message(self, *_: Any) -> None: ...

        self._server = self.server_class(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.origin = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
