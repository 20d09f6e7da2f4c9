"""Downloading from a real server that answers in every way that the web does."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest
from web import Web, jpeg

from codi_jax.preparation.download import DownloadFlags, download, is_public
from codi_jax.preparation.rows import RejectedError


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


def test_addresses_that_are_none():
    addresses = ["ftp://a.org/x.jpg", "file:///etc/passwd", "/etc/passwd", "", "http://", "http://[::1", "data:,x"]
    assert set(get(addresses)) <= {"neither http nor https", "no valid address"}
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
