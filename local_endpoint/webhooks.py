"""Calls to the addresses that clients leave with their jobs.

The address is resolved once, checked, and that very IP is called, so that a name cannot lead
elsewhere between the two. This machine and public addresses are called, a private network is not.
Redirects are not followed.
"""

import asyncio
import ipaddress
import logging
import socket
from urllib.parse import urlsplit, urlunsplit

import httpx

from local_endpoint.job_queue import Webhook

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 10.0


async def call(webhook: Webhook) -> bool:
    """Whether the address took the job's state, which it says with HTTP 200."""
    address = urlsplit(webhook.url)
    try:
        ip = await _resolve(address.hostname or "", address.port or _port(address.scheme))
        host = f"[{ip}]" if ":" in ip else ip
        netloc = f"{host}:{address.port}" if address.port else host
        async with httpx.AsyncClient(timeout=TIMEOUT_SECONDS, trust_env=False) as client:
            answer = await client.post(
                urlunsplit((address.scheme, netloc, address.path, address.query, "")),
                json=webhook.body,
                headers={"Host": address.netloc.rpartition("@")[2]},
                extensions={"sni_hostname": address.hostname},
            )
    except (OSError, ValueError, httpx.HTTPError) as error:  # the text may hold the address
        logger.warning("webhook of job %s: %s", webhook.job_id, type(error).__name__)
        return False
    if answer.status_code != 200:
        logger.warning("webhook of job %s: HTTP %d", webhook.job_id, answer.status_code)
    return answer.status_code == 200


async def _resolve(host: str, port: int) -> str:
    """The IP to call.

    Raises:
        OSError: the host has none, or one of a private network.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    ips = [str(address[0]) for *_, address in found]
    for ip in ips:
        parsed = ipaddress.ip_address(ip)
        if not (parsed.is_global or parsed.is_loopback):
            raise PermissionError("not a public address")
    return ips[0]


def _port(scheme: str) -> int:
    return 443 if scheme == "https" else 80
