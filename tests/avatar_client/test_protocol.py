"""The calls of an endpoint, without the network."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from avatar_client import (
    AsyncAvatarEndpoint,
    AvatarEndpoint,
    EndpointUnavailableError,
    JobStatus,
    protocol,
)


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("abc123", "https://api.runpod.ai/v2/abc123"),
        ("https://api.runpod.ai/v2/abc123/", "https://api.runpod.ai/v2/abc123"),
        ("https://api.runpod.ai/v2/abc123/run", "https://api.runpod.ai/v2/abc123"),
        ("http://127.0.0.1:8000/v2/local", "http://127.0.0.1:8000/v2/local"),
    ],
)
def test_an_endpoint_is_named_by_its_id_or_its_address(
    make_client: Callable[..., Any], given: str, url: str
) -> None:
    assert make_client(given).url == url


@pytest.mark.parametrize(
    "given",
    [
        "",
        "a b",
        "ftp://x/v2/a",
        "https://",
        "https://u:p@x/v2/a",
        "https://x/v2/a?b=c",
        "https://xn--/v2/a",
    ],
)
def test_what_cannot_be_an_endpoint_is_refused(make_client: Callable[..., Any], given: str) -> None:
    with pytest.raises(ValueError, match="an endpoint is an id"):
        make_client(given)


@pytest.mark.parametrize("key", ["", "a b", "k\n", "schlüssel"])
@pytest.mark.parametrize("kind", [AvatarEndpoint, AsyncAvatarEndpoint])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(kind: type[Any], key: str) -> None:
    with pytest.raises(ValueError, match="API key") as caught:
        kind("abc", key)
    assert not key or key not in str(caught.value)


@pytest.mark.parametrize("failure", [httpx.ConnectError("x"), httpx.ConnectTimeout("x")])
def test_a_submit_is_repeated_if_there_was_no_connection(
    failure: httpx.ConnectError | httpx.ConnectTimeout,
) -> None:
    call = protocol.submit({})
    assert protocol.read(call, failure, 1, 1.0) == protocol.Pause(1.0)
    assert protocol.read(call, failure, 4, 1.0) == protocol.Pause(8.0)
    with pytest.raises(EndpointUnavailableError):
        protocol.read(call, failure, protocol.ATTEMPTS, 1.0)


def test_a_submit_that_may_have_arrived_is_repeated_if_it_has_an_id_of_its_own() -> None:
    lost = httpx.ReadTimeout("x")
    call = protocol.submit({"input": {"request_id": "order-1"}})
    assert protocol.read(call, lost, 1, 1.0) == protocol.Pause(1.0)
    for fields in ({}, {"request_id": None}):
        with pytest.raises(EndpointUnavailableError, match="not sent again; one with a request_id"):
            protocol.read(protocol.submit({"input": fields}), lost, 1, 1.0)


def test_the_pauses_of_a_wait_grow_to_five_times_the_first() -> None:
    pace = protocol.Pace(1.0, None)
    pauses = [pace.pause_after(JobStatus("a", "IN_QUEUE")) for _ in range(8)]
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (1.0, 5.0)
