"""The process of an `ObjectStore`: one bucket of moto's S3 server.

    python -P moto_server.py <descriptor of a listening socket> <bucket>

Standard input brings a line with the access key's id. It is open as long as the endpoint lives, and
this process ends with it. Nothing of this repository is imported: moto alone takes a second.

moto checks no signature of an address. So a request must name the id, which is a secret here: else
other users of the machine, and pages in its browser, could read every video.
"""

import logging
import sys
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

from moto.moto_server.werkzeug_app import MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server
from werkzeug.wrappers import Request, Response

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment


def main() -> None:
    """Serves until standard input ends."""
    descriptor, bucket = int(sys.argv[1]), sys.argv[2]
    access_key_id = sys.stdin.readline().strip()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else it logs each address
    app = create_backend_app("s3")  # no other service of moto, nor its page of commands
    app.test_client().put(f"/{bucket}")
    server = make_server(
        "127.0.0.1",  # decides the address family alone: the socket is there already
        0,
        requiring_key(app, access_key_id),
        threaded=True,
        request_handler=MotoRequestHandler,
        fd=descriptor,
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()


def requiring_key(app: "WSGIApplication", access_key_id: str) -> "WSGIApplication":
    """The application for those requests that name the key, in their header or address."""

    def serve(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        header = environ.get("HTTP_AUTHORIZATION", "").partition("Credential=")[2]
        credential = Request(environ).args.get("X-Amz-Credential", header)
        if credential.partition("/")[0] == access_key_id:
            return app(environ, start_response)
        error = "<Error><Code>InvalidAccessKeyId</Code></Error>"
        return Response(error, 403, mimetype="application/xml")(environ, start_response)

    return serve


if __name__ == "__main__":
    main()
