"""Downloading from a real server that answers in every way that the web does."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from web import Web, jpeg

from codi_jax.io.decoding import RejectedError
from codi_jax.io.download import DownloadFlags, download, fetch, is_public


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    server = Web()
    yield server
    server.close()


def flags(**changes) -> DownloadFlags:
    return DownloadFlags(
        **{"timeout": 1.0, "retries": 1, "allow_private_addresses": True, "max_megabytes": 1} | changes
    )


def get(urls: list[str], **changes) -> list:
    """The bytes, or the reason."""
    return download(urls, flags(**changes), lambda _, data: data.reason if isinstance(data, RejectedError) else data)


def test_what_is_good_arrives_and_what_is_not_has_a_reason(web: Web):
    expected = {
        "good/1.jpg": jpeg(1),
        "typed/2.jpg": jpeg(2),
        "redirect/3.jpg": jpeg(3),
        "flaky/4.jpg": jpeg(4),
        "missing/5.jpg": "HTTP 404",
        "forbidden/6.jpg": "HTTP 403",
        "loop/7.jpg": "too many redirects",
        "file/8.jpg": "neither http nor https",
        "slow/9.jpg": "timed out",
        "drip/10.jpg": "timed out",
        "truncated/11.jpg": "broken off",
        "endless/12.jpg": "larger than 1 MB",
        "announced/13.jpg": "larger than 1 MB",
        "empty/14.jpg": b"",
    }
    start = time.monotonic()
    found = get([f"{web.url}/{path}" for path in expected])
    assert dict(zip(expected, found, strict=True)) == expected
    assert time.monotonic() - start < 8
    assert web.asked["/missing/5.jpg"] == 1, "what will not be there next time either is asked for once"
    assert web.asked["/slow/9.jpg"] == web.asked["/truncated/11.jpg"] == web.asked["/flaky/4.jpg"] == 2
    assert web.sent["/endless/12.jpg"] < 50e6, "a stream is cut off, not read to its end"


AS_WRITTEN = [
    "/missing/1.jpg?X-Amz-Credential=A%2F2026%2Fs3&X-Amz-Signature=%7e%2B%2f+~",
    "/missing/2.jpg?sig=a%2Bb%3D%3D&se=2026-01-01T00%3A00%3A00Z&empty=&flag",
    "/missing/3.jpg?url=https%3A%2F%2Fa.org%2Fx%3Fy%3D1&url=http://b.org/?q=1",
    "/missing/4.jpg?",
    "/missing/5.jpg;v=1?a=1;b=2&c=%e4%c3%a4&d=%41%zz%",
    "/missing/%7Euser/../6/./x%2e%2E//y.jpg",
    "/missing/7.jpg?q=!$&'()*,-._:@[]{}|\\^`\"<>",
    "?good=1",
]


@pytest.mark.parametrize("asked", AS_WRITTEN)
def test_the_server_sees_the_address_byte_for_byte(web: Web, asked: str):
    """Of a list and of a redirect: a signature is of these bytes."""
    expected = f"GET {asked if asked.startswith('/') else f'/{asked}'} HTTP/1.1"
    web.lines.clear()
    get([f"{web.url}{asked}#fragment", f"{web.url}/onward/x?{f'{web.url}{asked}'.encode().hex()}"], connections=1)
    assert web.lines[0] == web.lines[2] == expected


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("/a/../b?x=%2F", "/a/../b?x=%2F"), ("c%2Fd?y=%2f", "/onward/deep/c%2Fd?y=%2f"),
        ("?only=%41", "/onward/deep/x?only=%41"),
        ("../up.jpg", "/onward/up.jpg"), ("//127.0.0.1:{port}/n%65t", "/n%65t"), ("HTTP://127.0.0.1:{port}/s", "/s"),
    ],
)  # fmt: skip
def test_relative_redirects(web: Web, location: str, expected: str):
    location = location.format(port=web.url.rpartition(":")[2])
    web.lines.clear()
    get([f"{web.url}/onward/deep/x?{location.encode().hex()}"])
    assert web.lines[1] == f"GET {expected} HTTP/1.1"


def test_what_no_request_can_hold_is_encoded(web: Web):
    """Spaces, line breaks and other letters as UTF-8, or, of a redirect, as the bytes that came; nothing else."""
    web.lines.clear()
    get([f"  {web.url}/missing/ü x%20\r\nHost: evil.jpg?q=ä%C3%A4\n"])
    get([f"{web.url}/onward/x?{'/latin-ü'.encode('latin-1').hex()}", f"{web.url}/onward/x?{'/utf-ü'.encode().hex()}"])
    lines = [line.split(" ")[1] for line in web.lines if "onward" not in line]
    assert lines[0] == "/missing/%C3%BC%20x%20%0D%0AHost:%20evil.jpg?q=%C3%A4%C3%A4"
    assert sorted(lines[1:]) == ["/latin-%FC", "/utf-%C3%BC"]


def test_one_file_is_fetched_in_a_thread_that_has_a_loop(web: Web):
    """As a notebook has."""

    async def from_a_loop() -> bytes:
        return fetch(f"{web.url}/good/1.jpg", flags())

    assert asyncio.run(from_a_loop()) == jpeg(1)
    with pytest.raises(RejectedError, match="HTTP 404"):
        fetch(f"{web.url}/missing/1.jpg", flags())


def test_addresses_that_are_none():
    addresses = [
        "ftp://a.org/x.jpg",
        "file:///etc/passwd",
        "/etc/passwd",
        "",
        "http://",
        "http://[::1",
        "data:,x",
        "http:x",
        "http:///x",
    ]
    assert set(get(addresses)) <= {"neither http nor https", "no valid address"}
    assert get(["http://a.org/\ud800.jpg", "http://a.org:port/"]) == ["no valid address"] * 2
    assert get(["http://no-such-host.invalid/x.jpg"]) == ["no such host"]
    closed = socket.create_server(("127.0.0.1", 0))
    port = closed.getsockname()[1]
    closed.close()
    assert get([f"http://127.0.0.1:{port}/x.jpg"], retries=0) == ["no connection"]


def test_private_addresses_are_refused(web: Web):
    """Also as names, and as numbers that the resolver understands."""
    port = web.url.rpartition(":")[2]
    hosts = ["127.0.0.1", "localhost", "0x7f.1", "[::1]", "[::ffff:127.0.0.1]", "10.0.0.1", "169.254.169.254"]
    before = web.asked.total()
    found = get([f"http://{host}:{port}/good/1.jpg" for host in hosts], allow_private_addresses=False)
    assert found == ["a private address"] * len(hosts)
    assert get([f"http://2130706433:{port}/good/1.jpg"], allow_private_addresses=False) == ["no valid answer"]
    assert web.asked.total() == before


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("2606:4700::1111", True), ("127.0.0.1", False), ("192.168.1.1", False), ("0.0.0.0", False),
        ("100.64.0.1", False), ("169.254.169.254", False), ("::ffff:10.0.0.1", False), ("2002:7f00:1::", False),
        ("fe80::1%eth0", False), ("224.0.0.1", False),
    ],
)  # fmt: skip
def test_public_addresses(address: str, public: bool):
    assert is_public(address) == public


def test_a_slow_host_does_not_stall_the_others(web: Web):
    """Two thirds are of a host that never answers: the others come at once, and it is given up."""
    silent = socket.create_server(("127.0.0.2", 0), backlog=256)
    try:
        slow = [f"http://127.0.0.2:{silent.getsockname()[1]}/{i}.jpg" for i in range(80)]
        good = [f"{web.url}/good/{i}.jpg" for i in range(40)]
        came: dict[int, float] = {}
        start = time.monotonic()

        def note(index: int, data: bytes | RejectedError) -> bytes | str:
            came[index] = time.monotonic() - start
            return data.reason if isinstance(data, RejectedError) else data

        found = download([*slow, *good], flags(retries=2, timeout=2.0, connections=16), note)
    finally:
        silent.close()
    assert found[80:] == [jpeg(i) for i in range(40)]
    assert max(came[index] for index in range(80, 120)) < 1.9
    assert set(found[:80]) == {"timed out", "the host does not answer"}
    assert max(came.values()) < 20, "a dead host is asked for each of its files"


def test_no_more_connections_than_allowed():
    """Of one host and of all, counted by the server."""
    lock, open_now, most = threading.Lock(), [0], [0]
    server = socket.create_server(("127.0.0.1", 0), backlog=256)

    def serve(connection: socket.socket) -> None:
        with lock:
            open_now[0] += 1
            most[0] = max(most[0], open_now[0])
        connection.recv(4096)
        time.sleep(0.1)
        with lock:
            open_now[0] -= 1
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nConnection: close\r\n\r\nx")
        connection.close()

    def accept() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    urls = [f"http://127.0.0.1:{server.getsockname()[1]}/{i}" for i in range(20)]
    assert get(urls, connections_per_host=3) == [b"x"] * 20
    assert most[0] == 3
    assert get(urls, connections_per_host=10, connections=5) == [b"x"] * 20
    assert most[0] == 5
    server.close()


def test_an_error_of_the_work_ends_the_downloads(web: Web):
    def fail(index: int, data: object) -> None:
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        download([f"{web.url}/good/{i}.jpg" for i in range(5)], flags(), fail)
