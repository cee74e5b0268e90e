"""Which addresses a job may have the worker dial: public ones alone, however they are spelled."""

from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest

from avatar_client.contract.job_errors import (
    InputDownloadError,
    InputUrlBlockedError,
    InvalidInputError,
)
from worker.addresses import is_loopback, is_public
from worker.media import download

PRIVATE_IPV4 = [
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "10.255.255.255",
    "100.64.0.1",
    "100.100.100.200",  # a cloud's metadata
    "100.127.255.255",
    "127.0.0.1",
    "127.255.255.254",
    "168.63.129.16",  # another's
    "169.254.0.1",
    "169.254.169.254",  # most clouds'
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.1",
    "192.0.0.8",
    "192.0.0.170",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.0.1",
    "192.168.255.255",
    "198.18.0.1",
    "198.19.255.255",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
]
PUBLIC_IPV4 = [
    *("1.1.1.1", "8.8.8.8", "9.255.255.255", "11.0.0.1", "100.63.255.255", "100.128.0.1"),
    *("126.1.1.1", "128.0.0.1", "169.253.1.1", "172.15.0.1", "172.32.0.1", "192.0.1.1"),
    *("192.167.1.1", "198.17.1.1", "198.20.0.1", "203.0.114.1", "223.255.255.254"),
]
PRIVATE_IPV6 = [
    "::",
    "::1",
    "::7f00:1",  # an IPv4 address in a form that nobody may use
    "100::1",
    "2001::1",
    "2001:0:7f00:1::",  # Teredo
    "2001:2::1",
    "2001:10::1",
    "2001:20::1",
    "2001:db8::1",
    "2002::1",
    "3fff::1",
    "3fff:fff::1",
    "4000::1",
    "5f00::1",
    "64:ff9b:1::1",
    "64:ff9b:1:ffff::8.8.8.8",
    "fc00::1",
    "fd00:ec2::254",  # a cloud's metadata
    "fe80::1",
    "fe80::1%eth0",
    "2606:4700::1111%eth0",
    "febf::1",
    "fec0::1",
    "feff::1",
    "ff02::1",
    "ff0e::1",
    "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
]
PUBLIC_IPV6 = ["2606:4700::1111", "2a00:1450:4001::200e", "2400:cb00::1", "2001:4860:4860::8888"]


def inside_ipv6(address: str) -> dict[str, str]:
    """An IPv4 address in each of the ways in which IPv6 can hold one."""
    number = int(IPv4Address(address))
    return {
        "mapped": str(IPv6Address(0xFFFF << 32 | number)),
        "nat64": str(IPv6Address(0x64FF9B << 96 | number)),
        "compatible": str(IPv6Address(number)),
        "local nat64": str(IPv6Address(0x64FF9B0001 << 80 | number)),
        "6to4": str(IPv6Address(0x2002 << 112 | number << 80)),
        "teredo": str(IPv6Address(0x20010000 << 96 | (number ^ 0xFFFFFFFF))),
        "translated": str(IPv6Address(0xFFFF << 48 | number)),
    }


@pytest.mark.parametrize("address", [*PRIVATE_IPV4, *PRIVATE_IPV6])
def test_a_private_address_is_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", PRIVATE_IPV4)
def test_a_private_address_is_none_inside_ipv6_either(address: str) -> None:
    forms = inside_ipv6(address)
    assert not [form for form, spelled in forms.items() if is_public(spelled)]


@pytest.mark.parametrize("address", [*PUBLIC_IPV4, *PUBLIC_IPV6])
def test_a_public_address_is_public(address: str) -> None:
    assert is_public(address)


def test_a_public_ipv4_address_is_reached_through_ipv6_where_that_is_how_hosts_do() -> None:
    forms = inside_ipv6("8.8.8.8")
    assert {form for form, spelled in forms.items() if is_public(spelled)} == {"mapped", "nat64"}


@pytest.mark.parametrize(
    "text",
    ["", "host", "1.2.3", "8.8.8.8.", "08.8.8.8", "8.8.8.8 ", "8.8.8.8/32", "::g"],
)
def test_what_is_no_address_is_not_public(text: str) -> None:
    assert not is_public(text)
    assert not is_loopback(text)


def test_this_machine_is_known_by_each_of_its_addresses() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"]))
    assert not any(map(is_loopback, ["10.0.0.1", "0.0.0.0", "::", "8.8.8.8", "2002:7f00:1::"]))


# Hosts as strangers spell them; all lead to 127.0.0.1, 0.0.0.0, 10.0.0.1 or nowhere.
SPELLINGS = [
    "127.0.0.1",
    "127.1",
    "127.0.1",
    "2130706433",
    "0x7f000001",
    "0x7f.0.0.1",
    "0X7F.1",
    "0177.0.0.1",
    "017700000001",
    "0177.0x0.0.1",
    "127.0.0.1.",
    "127.00.00.01",
    "00000000.0.0.0",
    "0",
    "0.0.0.0",
    "167772161",
    "10.1",
    "１２７.0.0.1",  # noqa: RUF001  # full-width digits
    "127。0。0。1",  # ideographic stops
    "①②⑦.0.0.1",
    "127.0.0.1%00.example.com",
    "127.0.0.1%2f.example.com",
    "example.com@127.0.0.1",
    "example.com:x@127.0.0.1",
    "[::1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[0:0:0:0:0:ffff:10.0.0.1]",
    "[64:ff9b::10.0.0.1]",
    "[2002:a00:1::]",
    "[fe80::1%25lo]",
    "[fe80::1%lo]",
    "[fec0::1]",
    "localhost",
    "LOCALHOST",
    "localhost.",
    "ⓛocalhost",
    "localhost\t",
    "127.0.0.1\\@example.com",
    "127.0.0.1\n",
]


@pytest.mark.parametrize("host", SPELLINGS)
def test_no_spelling_of_a_private_host_is_dialled(host: str, tmp_path: Path) -> None:
    with pytest.raises((InputUrlBlockedError, InvalidInputError, InputDownloadError)) as caught:
        download.download(
            f"https://{host}:9/x",
            tmp_path / "file",
            max_bytes=10,
            timeout_seconds=5,
            field="image",
            allow_private=False,
        )
    # a refusal, or a name that no resolver knows: nothing was asked for a connection
    assert "could not be reached" not in caught.value.message
    assert caught.value.field == "image"


@pytest.mark.parametrize("host", SPELLINGS)
def test_no_spelling_of_a_private_host_is_a_clients_store(host: str) -> None:
    with pytest.raises((InputUrlBlockedError, InvalidInputError, InputDownloadError)):
        download.check_endpoint(f"https://{host}:9", field="s3Config.endpointUrl")


@pytest.mark.parametrize("host", ["xn--", "xn--a.com", "xn--0", "a..b", "a" * 64])
def test_a_name_that_no_host_can_have_is_no_store_s(host: str) -> None:
    with pytest.raises(InvalidInputError, match="well-formed"):
        download.check_endpoint(f"https://{host}/", field="s3Config.endpointUrl")
