"""Which addresses are of the public internet: one rule for downloads, stores and webhooks.

The networks are IANA's special-purpose registries (RFC 6890 and its successors), those of clouds
that answer inside them, and what is deprecated: a client of ours has no use for any of them. In
IPv6 it is the other way round, and global unicast (2000::/3) alone is public.
"""

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

_BLOCKED_IPV4 = tuple(
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",
        "100.64.0.0/10",  # shared by carriers (CGNAT)
        "127.0.0.0/8",
        "168.63.129.16/32",  # Azure's own services, from inside a machine there
        "169.254.0.0/16",  # link-local, with the metadata of most clouds
        "172.16.0.0/12",
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation, as are two more below
        "192.88.99.0/24",  # relays of 6to4, deprecated
        "192.168.0.0/16",
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
    )
)
_GLOBAL_IPV6 = IPv6Network("2000::/3")
_BLOCKED_IPV6 = tuple(
    IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments: Teredo, benchmarks, ORCHID
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4, deprecated: a way to IPv4, private ones too
        "3fff::/20",  # documentation
    )
)
_NAT64 = IPv6Network("64:ff9b::/96")  # how a host without IPv4 reaches one that has nothing else


def is_public(address: str) -> bool:
    """Whether an IP address, as a resolver writes it, is one of the public internet.

    An IPv4 address inside an IPv6 one counts as itself. What is no address is not public, nor is
    one with a zone.
    """
    try:
        ip = ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, IPv6Address):
        if ip.scope_id is not None:
            return False
        inner = _inner_ipv4(ip)
        if inner is None:
            return ip in _GLOBAL_IPV6 and not any(ip in network for network in _BLOCKED_IPV6)
        ip = inner
    return not any(ip in network for network in _BLOCKED_IPV4)


def is_loopback(address: str) -> bool:
    """Whether an IP address, as a resolver writes it, is this machine."""
    try:
        ip = ip_address(address)
    except ValueError:
        return False
    mapped = ip.ipv4_mapped if isinstance(ip, IPv6Address) else None
    return (mapped or ip).is_loopback


def _inner_ipv4(ip: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that packets to this one end at; None: they end at itself."""
    if ip.ipv4_mapped is not None:
        return ip.ipv4_mapped
    return IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None
