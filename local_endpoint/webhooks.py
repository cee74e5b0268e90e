"""Calls to the addresses that clients leave with their jobs.

The address is resolved once, checked, and that very IP is called, so that a name cannot lead
elsewhere between the two. This machine and public addresses are called, a private network is not.
Redirects are not followed, and of an answer nothing but its status is read.
"""

import asyncio
import json
import logging
import socket
from urllib.parse import urlsplit, urlunsplit

import httpx

from local_endpoint.job_queue import Webhook
from worker.addresses import is_loopback, is_public

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 10.0  # for all of a call, the name included
DEFAULT_PORTS = {"https": 443, "http": 80}


async def call(webhook: Webhook) -> bool:
    """Whether the address took the job's state, which it says with HTTP 200."""
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            status = await _post(webhook)
    except Exception as error:  # any: a call that has no end would be repeated without end
        logger.warning("webhook of job %s: %s", webhook.job_id, type(error).__name__)
        return False
    if status != 200:
        logger.warning("webhook of job %s: HTTP %d", webhook.job_id, status)
    return status == 200


async def _post(webhook: Webhook) -> int:
    """The status of the answer, whose body stays where it is: it may have no end."""
    address = urlsplit(webhook.url)
    ip = await _resolve(address.hostname or "", address.port or DEFAULT_PORTS[address.scheme])
    host = f"[{ip}]" if ":" in ip else ip
    netloc = f"{host}:{address.port}" if address.port else host
    url = urlunsplit((address.scheme, netloc, address.path, address.query, ""))
    headers = {
        "Host": address.netloc.rpartition("@")[2],
        "Content-Type": "application/json",
        "Accept-Encoding": "identity",
    }
    async with (
        httpx.AsyncClient(timeout=TIMEOUT_SECONDS, trust_env=False) as client,
        client.stream(
            "POST",
            url,
            content=json.dumps(webhook.body).encode(),
            headers=headers,
            extensions={"sni_hostname": address.hostname},
        ) as answer,
    ):
        return answer.status_code


async def _resolve(host: str, port: int) -> str:
    """The IP to call.

    Raises:
        OSError: the host has none, or one of a private network.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    ips = [str(address[0]) for *_, address in found]
    if not all(is_public(ip) or is_loopback(ip) for ip in ips):
        raise PermissionError("not a public address")
    return ips[0]
