"""Pictures come from listed hosts and public addresses alone, whatever a name or a server says."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import httpcore2
import pytest

from pacevlm.errors import ImageError
from pacevlm.server import remote
from pacevlm.server.remote import PictureFetcher, is_public

HOST = "images.example.org"
OK = [b"HTTP/1.1 200 OK\r\n", b"content-length: 6\r\n\r\n", b"abc", b"def"]


class Network(httpcore2.AsyncMockBackend):
    """Answers as told, and remembers what was connected to."""

    def __init__(self, buffer: list[bytes]) -> None:
        super().__init__(buffer)
        self.reached: list[str] = []

    async def connect_tcp(self, host: str, port: int, *arguments: Any, **settings: Any) -> Any:
        self.reached.append(f"{host}:{port}")
        return await super().connect_tcp(host, port)


def fetch(
    url: str, network: Network, addresses: list[str], monkeypatch: pytest.MonkeyPatch, max_bytes: int = 100
) -> bytes:
    async def run() -> bytes:
        async def getaddrinfo(host: str, port: int, **settings: Any) -> list[Any]:
            assert host == HOST
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
        return await PictureFetcher((HOST,), max_bytes, network).fetch(url)

    return asyncio.run(run())


def test_a_listed_host_is_reached_at_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(OK)
    assert fetch(f"https://{HOST.upper()}/a%20b.png?x=1#y", network, ["93.184.216.34"], monkeypatch) == b"abcdef"
    assert network.reached == ["93.184.216.34:443"]


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["93.184.216.34", "10.0.0.1"], ["::1"], ["169.254.169.254"], []])
def test_a_name_that_leads_inside_is_refused(addresses: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(OK)
    with pytest.raises(ImageError, match="public"):
        fetch(f"https://{HOST}/a.png", network, addresses, monkeypatch)
    assert network.reached == []


@pytest.mark.parametrize(
    "url",
    [
        *(f"http://{HOST}/a.png", f"https://{HOST}:8443/a", f"https://u@{HOST}/a", f"https://{HOST}.evil.org/"),
        *(f"https://evil.org/{HOST}", f"https://sub.{HOST}/a", "https://127.0.0.1/a", "ftp://x/", "https://[::1/"),
        *(
            f"https://{HOST}@evil.org/",
            f"https://evil.org\\@{HOST}/",
            f"https://{HOST}:99999/",
            "https:///a",
            "a" * 9999,
        ),
    ],
)
def test_other_addresses_are_refused_before_any_name_is_looked_up(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(OK)
    with pytest.raises(ImageError):
        fetch(url, network, ["10.0.0.1"], monkeypatch)
    assert network.reached == []


@pytest.mark.parametrize(
    ("buffer", "message"),
    [
        ([b"HTTP/1.1 302 Found\r\nlocation: https://10.0.0.1/\r\ncontent-length: 0\r\n\r\n"], "status 302"),
        ([b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n"], "status 404"),
        ([b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n", b"x" * 1000], "more than 100 bytes"),
        ([b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n", b"x"], "could not be read"),
        ([b"nonsense\r\n\r\n"], "could not be read"),
    ],
)
def test_what_a_host_may_not_say_is_refused(buffer: list[bytes], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(buffer)
    with pytest.raises(ImageError, match=message):
        fetch(f"https://{HOST}/a.png", network, ["93.184.216.34"], monkeypatch)
    assert len(network.reached) == 1


def test_a_slow_host_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(Network):
        async def connect_tcp(self, *arguments: Any, **settings: Any) -> Any:
            await asyncio.sleep(30)

    monkeypatch.setattr(remote, "FETCH_TIMEOUT_S", 0.05)
    with pytest.raises(ImageError, match="within"):
        fetch(f"https://{HOST}/a.png", Slow(OK), ["93.184.216.34"], monkeypatch)


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "0.0.0.0",
            "224.0.0.1",
        ),
        *("::1", "fe80::1", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1"),
        *("2002:7f00:1::", "255.255.255.255", "198.18.0.1", "ff02::1", "::", "not an address"),
    ],
)
def test_inner_addresses_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946", "::ffff:93.184.216.34"])
def test_others_are(address: str) -> None:
    assert is_public(address)
