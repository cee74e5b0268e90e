"""Contact with addresses that a client chose: the only module that fetches one.

The SDK's address rule decides which addresses are public; this module adds https, one deadline
for the whole download and a check of every redirect.
"""

from pathlib import Path


def download(
    url: str,
    target: Path,
    *,
    max_bytes: int,
    timeout_seconds: float,
    field: str,
    allow_private: bool,
) -> None:
    """Writes what the address serves to `target`.

    Raises:
        InputUrlBlockedError: the address, or one it redirects to, is not https or not public.
        InputDownloadError: DNS, TLS, HTTP status, or the deadline passed.
        InputTooLargeError: more than `max_bytes`.
    """
    raise NotImplementedError


def check_endpoint(url: str, *, field: str, allow_private: bool) -> None:
    """Returns if the worker may talk to a store at this address.

    Raises:
        InputUrlBlockedError: not https, or not a public address.
        InputDownloadError: the host cannot be resolved.
    """
    raise NotImplementedError
