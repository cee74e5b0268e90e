"""Signing by a service that keeps the key to itself.

It gets what is to be signed by POST, as bytes, and answers with the signature, as bytes.
docs/provenance.md is the operator's page.
"""

import httpcore
import httpx

from avatar_client.contract.job_errors import WorkerError
from worker.media.connection import Rule, Transport, Wait, nothing_to_check

ANSWER_SECONDS = 20.0  # for a signature; a video waits for it
MAX_SIGNATURE_BYTES = 4096  # RSA's with 16384 bits takes half
HEADERS = {"Content-Type": "application/octet-stream", "Accept": "application/octet-stream"}


class SigningServiceError(RuntimeError):
    """There is no signature. Says why, and nothing of the address, which may hold a secret."""


def signature_of(content: bytes, url: str) -> bytes:
    """The service's signature of the content.

    `url` is the operator's, so it may be http and in a private network; a name and a password in
    it are sent as HTTP's basic authentication.

    Raises:
        SigningServiceError: the service cannot be reached, answers too late, or with something
            else.
    """
    rule = Rule(None, allow_private=True)
    try:
        with (
            Transport(rule, Wait(ANSWER_SECONDS, nothing_to_check)) as transport,
            httpx.Client(transport=transport, trust_env=False, headers=HEADERS) as client,
            client.stream("POST", rule.parse(url), content=content) as response,
        ):
            if response.status_code != httpx.codes.OK:
                raise SigningServiceError(f"it answered HTTP {response.status_code}")
            signature = b""
            for chunk in response.iter_raw():
                signature += chunk
                if len(signature) > MAX_SIGNATURE_BYTES:
                    raise SigningServiceError("it answered more than a signature")
    except TimeoutError:
        raise SigningServiceError(f"no answer in {ANSWER_SECONDS:g} s") from None
    except (OSError, httpx.HTTPError, httpcore.ProtocolError, ValueError) as error:
        raise SigningServiceError(f"no answer: {type(error).__name__}") from None
    except WorkerError as error:  # of an address that is none, or a name that is not known
        raise SigningServiceError(error.message) from None
    return signature
