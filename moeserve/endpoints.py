"""What an endpoint's text says of who can reach it."""

from __future__ import annotations

import ipaddress
import re

from moeserve.core import ConfigError


def tcp_host(endpoint: str) -> str:
    """The host of tcp://HOST:PORT, without brackets. Raises ConfigError for anything else."""
    match = re.fullmatch(r"tcp://(\[[^\]]+\]|[^:]+):(\d+|\*)", endpoint)
    if match is None:
        raise ConfigError(
            f"endpoint: {endpoint} is not tcp://HOST:PORT (IPv6 in brackets)", field="endpoint"
        )
    return match[1].strip("[]")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it. Names are not resolved: but localhost, none is."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
