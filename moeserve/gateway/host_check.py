"""Which names a server answers to: the guard against DNS rebinding.

A web page may send requests to its own host only, and the host is a name. Whoever owns the name can
let it point to 127.0.0.1 after the page has loaded: then the page talks to a server on its reader's
machine, and nothing but the Host header tells (Jackson et al., "Protecting Browsers from DNS
Rebinding Attacks", CCS 2007, section 5). With an API key such a page is a stranger like any other;
without one this check is what keeps it out.

Starlette's TrustedHostMiddleware knows names only, no loopback networks, and answers in plain text.
"""

from __future__ import annotations

import ipaddress
import re

from starlette.types import ASGIApp, Receive, Scope, Send

from moeserve.config import HttpConfig
from moeserve.gateway.errors import ApiError

HOST_HEADER = re.compile(r"(?P<host>\[[^\[\]]*\]|[^:\[\]]*)(:\d*)?")  # RFC 9110, section 7.2


class HostCheck:
    """ASGI middleware: 421 for a Host that is no name of this server, in any letter case or port.

    Its names are localhost, loopback addresses, the address it is bound to (when that is all of
    them: any address, for an address cannot be rebound) and `allowed_hosts`. A request without the
    header passes: no browser sends one.
    """

    def __init__(self, app: ASGIApp, bound_host: str, allowed_hosts: tuple[str, ...]) -> None:
        self.app = app
        self._names = {_plain(name) for name in ("localhost", bound_host, *allowed_hosts)}
        bound = _address(_plain(bound_host))
        self._any_address = bound is not None and bound.is_unspecified

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        for name, value in scope["headers"]:
            if name == b"host" and not self._is_ours(value.decode("latin-1")):
                await _refusal(value.decode("latin-1")).response()(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _is_ours(self, header: str) -> bool:
        match = HOST_HEADER.fullmatch(header.strip())
        if match is None:
            return False
        host = _plain(match["host"])
        address = _address(host)
        if address is not None and (self._any_address or address.is_loopback):
            return True
        return host in self._names


def needs_host_check(config: HttpConfig) -> bool:
    """Without a key always, with one if names were given."""
    return config.api_key is None or bool(config.allowed_hosts)


def is_loopback(host: str) -> bool:
    """Can only this machine reach a server that is bound there?"""
    address = _address(_plain(host))
    return _plain(host) == "localhost" if address is None else address.is_loopback


def _plain(host: str) -> str:
    """One spelling per name: lower case, without the final dot or the brackets of IPv6."""
    return host.lower().removesuffix(".").removeprefix("[").removesuffix("]")


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _refusal(header: str) -> ApiError:
    return ApiError(
        421,
        f"host: {header[:200]!r} is not a name of this server; use localhost, or start the server "
        "with --allowed-host NAME for every further name it has, or with --api-key",
        param="host",
        code="misdirected_request",
    )
