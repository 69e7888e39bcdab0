"""Pictures from the web, from listed hosts alone, without letting anybody reach what only this machine can reach.

A name is resolved once, every address that it has must be public, and the connection goes to the address that was
checked: a name that means another machine a moment later changes nothing. Certificates are checked against the name.
Redirects are not followed.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import urllib.parse
from collections.abc import Iterable, Sequence
from typing import Any

import httpcore2

from pacevlm.errors import ImageError

FETCH_TIMEOUT_S = 5.0
"""Longest that finding, reaching and reading a picture's address may take together."""
MAX_FETCHES = 16
"""Pictures that are fetched at a time."""
_HTTPS_PORT = 443
# Addresses that a translator turns into others, which may be private: IPv4 in IPv6, 6to4, Teredo.
_TRANSLATED = tuple(map(ipaddress.ip_network, ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32")))


class PictureFetcher:
    """Fetches pictures over https from listed hosts.

    Args:
        hosts: names as they stand in addresses; none allows nothing.
        max_bytes: largest picture.
        network: what connects, once an address is checked; for tests.
    """

    def __init__(
        self, hosts: Sequence[str], max_bytes: int, network: httpcore2.AsyncNetworkBackend | None = None
    ) -> None:
        self._hosts = frozenset(host.lower() for host in hosts)
        self._max_bytes = max_bytes
        self._network = _PublicNetwork(network or httpcore2.AnyIOBackend())
        self._places = asyncio.Semaphore(MAX_FETCHES)
        self._certificates = httpcore2.default_ssl_context() if self._hosts else None

    async def fetch(self, url: str) -> bytes:
        """The picture's file; raises ImageError in a sentence."""
        host, target = self._checked(url)
        try:
            async with asyncio.timeout(FETCH_TIMEOUT_S), self._places:
                return await self._read(host, target)
        except TimeoutError:
            raise ImageError(f"the picture at {host} did not arrive within {FETCH_TIMEOUT_S:g} s") from None
        except (OSError, httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException):
            raise ImageError(f"the picture at {host} could not be read; send it as a data: URL") from None

    def _checked(self, url: str) -> tuple[str, bytes]:
        """Host and target of an allowed address."""
        try:
            parts = urllib.parse.urlsplit(url)
            host, port = (parts.hostname or "").lower(), parts.port
        except ValueError:
            raise ImageError("image_url cannot be read as an address; send the picture as a data: URL") from None
        if not self._hosts:
            raise ImageError(
                "image_url is no data: URL, and this server fetches no pictures; send data:image/png;base64,..."
            )
        if parts.scheme != "https" or port not in (None, _HTTPS_PORT) or parts.username is not None:
            raise ImageError("pictures are fetched from https addresses alone, on the usual port and without a user")
        if host not in self._hosts:
            raise ImageError("pictures are not fetched from that host; the server's operator lists those that are")
        target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
        return host, urllib.parse.quote(target, safe="/%?=&+:;,@!$'()*~[]-._").encode()

    async def _read(self, host: str, target: bytes) -> bytes:
        url = httpcore2.URL(scheme=b"https", host=host.encode(), port=None, target=target)
        headers = [("host", host), ("accept", "image/*"), ("accept-encoding", "identity"), ("user-agent", "pacevlm")]
        # A connection of its own for each picture, so that none outlives the check of its address.
        async with (
            httpcore2.AsyncConnectionPool(self._certificates, network_backend=self._network) as pool,
            pool.stream("GET", url, headers=headers) as response,
        ):
            if response.status != 200:
                raise ImageError(f"the picture at {host} came with status {response.status}; nothing is followed")
            content = bytearray()
            async for piece in response.aiter_stream():
                content += piece
                if len(content) > self._max_bytes:
                    raise ImageError(
                        f"the picture at {host} has more than {self._max_bytes:,} bytes, which is the most"
                    )
            return bytes(content)


class _PublicNetwork(httpcore2.AsyncNetworkBackend):
    """Connects to an address that was checked, whatever its name means later."""

    def __init__(self, network: httpcore2.AsyncNetworkBackend) -> None:
        self._network = network

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        address = await public_address(host, port)
        return await self._network.connect_tcp(address, port, timeout, local_address, socket_options)


async def public_address(host: str, port: int) -> str:
    """The first address of a host, all of whose addresses are public; raises ImageError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(address[0]) for *_, address in found]
    if not addresses or not all(map(is_public, addresses)):
        raise ImageError(f"{host} is an address inside a network; pictures are fetched from public ones alone")
    return addresses[0]


def is_public(text: str) -> bool:
    """Whether everybody could reach an address, and so nothing is given away by reaching it from here."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:  # such as one with a zone
        return False
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(str(address.ipv4_mapped))
        if any(address in network for network in _TRANSLATED):
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved
