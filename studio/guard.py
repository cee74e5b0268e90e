"""Who is answered by the studio, and how its files are served. Needs no gradio."""

import re
import socket
from ipaddress import ip_address
from urllib.parse import unquote

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")

# gradio's page runs scripts and styles that stand in it; recordings and previews are blobs
PAGE_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
FILE_POLICY = "default-src 'none'; sandbox"  # of a file that is opened as if it were a page


class GuardMiddleware:
    """Answers the studio's own page alone, and serves no file as a page.

    A name that somebody else has pointed to this machine is not answered, and so is no request that
    another page makes: not even one that it could not read the answer of.

    Args:
        host: what the studio listens at.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app = app
        self._host = host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request, or refuses it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        is_file = "/file=" in unquote(scope["path"])

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = MutableHeaders(scope=message)
                added["Content-Security-Policy"] = FILE_POLICY if is_file else PAGE_POLICY
                added["Referrer-Policy"] = "same-origin"
                added["X-Content-Type-Options"] = "nosniff"
                added["Cross-Origin-Resource-Policy"] = "same-origin"
                if is_file:
                    _, _, name = added.get("Content-Disposition", "").partition(";")
                    added["Content-Disposition"] = f"attachment;{name}" if name else "attachment"
            await send(message)

        refusal = self._refusal(scope, headers)
        if refusal is None:
            await self._app(scope, receive, send_with_headers)
        elif scope["type"] == "http":
            await PlainTextResponse(refusal, 403)(scope, receive, send_with_headers)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _refusal(self, scope: Scope, headers: Headers) -> str | None:
        """Why the request is not served; None: it is."""
        host = headers.get("host", "")
        if len(headers.getlist("host")) != 1 or not is_own_host(host, self._host):
            return "The studio does not answer to this name."
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return "The studio takes nothing from another page."
        # a link to the page may stand anywhere
        is_page = scope["type"] == "http" and scope["method"] == "GET" and scope["path"] == "/"
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none") and not is_page:
            return "The studio takes nothing from another page."
        return None


def is_own_host(header: str, served: str) -> bool:
    """Whether a Host header names this server, which listens at `served`.

    An address cannot be pointed to another machine as a name can, so any is good where the studio
    is served to others.
    """
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(?::[0-9]{1,5})?", header)
    if match is None:
        return False
    name = match[1].lower()
    if name in LOCAL_NAMES or name in (served.lower(), f"[{served.lower()}]"):
        return True
    if served in LOCAL_NAMES or served == "::1":
        return False
    try:
        ip_address(name.strip("[]"))
    except ValueError:
        own = socket.gethostname().lower()
        return name in (own, f"{own}.local")
    return True
