"""Downloading from untrusted hosts: many files at a time, bounded in time, size and number.

Only http and https are allowed and, by default, only public addresses: a list of URLs must not reach the network of the
machine that processes it. Every redirect is checked like the first address, and so is every address that a name
resolves to, in the same lookup that the connection uses. Each address is sent to the server byte for byte as in the
list or redirect, because signatures cover these bytes.
"""

import asyncio
import ipaddress
import random
import re
import socket
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar
from urllib.parse import urljoin

from codi_jax.cli.flags import Flags, Topic
from codi_jax.io.decoding import RejectedError

Result = TypeVar("Result")

_REDIRECTS = 5
_GIVE_UP = 8  # consecutive failures after which a host is not asked again
_RETRIED = (408, 425, 429, 500, 502, 503, 504)
_LOOKUPS = 32  # threads: a name server that is slow for one host must not stop the others
_LONGEST_WAIT = 30.0  # seconds between two attempts
_CHUNK = 2**16
# Every text matches (RFC 3986, appendix B).
_ADDRESS = re.compile(
    r"(?P<scheme>(?:[a-z][a-z0-9+.-]*:)?)(?P<host>(?://[^/?#]*)?)(?P<path>[^?#]*)(?P<query>(?:\?[^#]*)?)(?:#.*)?",
    re.DOTALL | re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class DownloadFlags(Flags):
    """How pictures are downloaded."""

    topic: ClassVar[Topic] = Topic.DOWNLOADS

    connections: int = 64
    """Concurrent downloads of each process."""
    connections_per_host: int = 8
    """Concurrent downloads from one host, so that a slow host does not take them all."""
    timeout: float | int = 20.0
    """Seconds after which an attempt is abandoned."""
    retries: int = 2
    """Retries after a timeout, a broken connection or a temporary refusal (429, 5xx), with waits of 1, 2, 4 … seconds
    in between."""
    max_megabytes: float | int = 20.0
    """Size limit of a file; the download of a larger one is aborted."""
    allow_private_addresses: bool = False
    """Also download from this machine and its local network."""

    def check(self) -> None:
        super().check()
        self.require_at_least(1, "connections", "connections_per_host")
        self.require_at_least(0, "retries")
        for flag in ("timeout", "max_megabytes"):
            self.require(flag, getattr(self, flag) > 0, "above 0")


def download(
    urls: Sequence[str], flags: DownloadFlags, then: Callable[[int, bytes | RejectedError], Result]
) -> list[Result]:
    """Downloads all files and calls a function with each as it arrives; each connection holds at most one in memory.

    Args:
      urls: the addresses.
      flags: the user's flags.
      then: called with the index of a URL and its contents, or the reason why it was rejected. Calls are sequential, in
        a thread.

    Returns:
      The results of ``then``, in the order of the URLs.

    Raises:
      ValueError: if aiohttp is not installed.
    """
    try:
        import aiohttp  # noqa: F401
    except ImportError:
        raise ValueError('downloading needs aiohttp: pip install "codi_jax[data]".') from None
    if not _has_loop():
        return asyncio.run(_download(urls, flags, then))
    with ThreadPoolExecutor(1) as thread:  # a notebook already has an event loop in its own
        return thread.submit(lambda: asyncio.run(_download(urls, flags, then))).result()


def fetch(address: str, flags: DownloadFlags) -> bytes:
    """Downloads one file.

    Raises:
      RejectedError: if the file does not exist or is too large, or the address is not allowed.
    """
    (found,) = download([address], flags, lambda _, data: data)
    if isinstance(found, RejectedError):
        raise found
    return found


def is_public(address: str) -> bool:
    """Whether an IP address is public: neither this machine's nor a private network's."""
    ip = ipaddress.ip_address(address.split("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if inner is not None:
            ip = inner
    return ip.is_global and not ip.is_multicast


async def _download(urls: Sequence[str], flags: DownloadFlags, then: Callable[[int, Any], Result]) -> list[Result]:
    import aiohttp

    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(_LOOKUPS))  # where names are looked up
    connector = aiohttp.TCPConnector(limit=0, resolver=_resolver(flags.allow_private_addresses), ttl_dns_cache=300)
    session = aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None),
        auto_decompress=False,  # images are already compressed; data that unpacks to gigabytes is an attack
        cookie_jar=aiohttp.DummyCookieJar(),
        headers={"User-Agent": "Mozilla/5.0 (compatible; codi_jax)", "Accept-Encoding": "identity"},
    )
    with ThreadPoolExecutor(1, thread_name_prefix="prepare") as worker:
        async with session:
            downloads = _Downloads(session, flags, worker, then)
            return await asyncio.gather(*(downloads.one(index, url) for index, url in enumerate(urls)))


class _Downloads:
    """The downloads of one list of URLs, which share connections."""

    def __init__(self, session: Any, flags: DownloadFlags, worker: ThreadPoolExecutor, then: Callable) -> None:
        self._session = session
        self._flags = flags
        self._worker = worker
        self._then = then
        self._room = asyncio.Semaphore(flags.connections)
        self._rooms: dict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(flags.connections_per_host))
        self._failures: Counter[str] = Counter()  # of each host, since it last answered

    async def one(self, index: int, address: str) -> Any:
        """Downloads one file, in several attempts, and hands it on; between attempts it occupies no connection."""
        try:
            url = self._checked(address)
        except RejectedError as error:
            return await self._hand_on(index, error)
        async with self._rooms[url.host]:
            reason = RejectedError("the host does not answer")
            for attempt in range(self._flags.retries + 1):
                if self._failures[url.host] >= _GIVE_UP:
                    break
                if attempt:
                    await asyncio.sleep(min(2 ** (attempt - 1) * random.uniform(0.75, 1.25), _LONGEST_WAIT))
                async with self._room:
                    try:
                        data = await self._attempt(url)
                    except _TemporaryError as error:
                        reason = error
                        continue
                    except RejectedError as error:
                        return await self._hand_on(index, error)
                    return await self._hand_on(index, data)
        return await self._hand_on(index, RejectedError(reason.reason))

    async def _hand_on(self, index: int, result: bytes | RejectedError) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._worker, self._then, index, result)

    async def _attempt(self, url: Any) -> bytes:
        import aiohttp

        host = url.host
        try:
            async with asyncio.timeout(self._flags.timeout):
                data = await self._follow(url)
        except TimeoutError:
            self._failures[host] += 1
            raise _TemporaryError("timed out") from None
        except aiohttp.ClientPayloadError:
            raise _TemporaryError("broken off") from None
        except (aiohttp.InvalidURL, aiohttp.ClientResponseError):
            raise RejectedError("no valid answer") from None
        except aiohttp.ClientConnectorDNSError as error:
            self._failures[host] += 1
            busy = error.os_error.errno == socket.EAI_AGAIN
            raise (_TemporaryError if busy else RejectedError)("no such host") from None
        except (aiohttp.ClientError, OSError):
            self._failures[host] += 1
            raise _TemporaryError("no connection") from None
        except ValueError:  # aiohttp and yarl have no specific error for some invalid answers
            raise RejectedError("no valid answer") from None
        self._failures[host] = 0
        return data

    async def _follow(self, url: Any) -> bytes:
        for _ in range(_REDIRECTS + 1):
            async with self._session.get(url, allow_redirects=False) as response:
                if response.status in (301, 302, 303, 307, 308) and "Location" in response.headers:
                    url = self._checked(str(response.headers["Location"]), url)
                    continue
                if response.status != 200:
                    self._failures[url.host] = 0
                    kind = _TemporaryError if response.status in _RETRIED else RejectedError
                    raise kind(f"HTTP {response.status}")
                return await self._body(response)
        raise RejectedError("too many redirects")

    async def _body(self, response: Any) -> bytes:
        limit = int(self._flags.max_megabytes * 1e6)
        too_large = RejectedError(f"larger than {self._flags.max_megabytes:g} MB")
        if (response.content_length or 0) > limit:
            raise too_large
        body = bytearray()
        async for chunk in response.content.iter_chunked(_CHUNK):
            body += chunk
            if len(body) > limit:
                raise too_large
        return bytes(body)

    def _checked(self, address: str, base: Any = None) -> Any:
        """The address as a URL, joined to the one that redirects to it."""
        url = _parse(address.strip() if base is None else _joined(str(base), address.strip()))
        host = url.host
        if not self._flags.allow_private_addresses and _is_address(host) and not is_public(host):
            raise RejectedError("a private address")
        return url


def _parse(address: str) -> Any:
    """A yarl URL whose path holds path and query unchanged, because yarl would otherwise normalize them."""
    from yarl import URL

    found = _ADDRESS.fullmatch(address)
    if found is None or found["scheme"].lower() not in ("http:", "https:"):
        raise RejectedError("neither http nor https")
    try:
        url = URL(found["scheme"] + found["host"])
        asked = _sendable(found["path"] + found["query"])
    except ValueError:
        raise RejectedError("no valid address") from None
    if not url.host:
        raise RejectedError("no valid address")
    return url.with_path(asked if asked.startswith("/") else f"/{asked}", encoded=True)


def _sendable(text: str) -> str:
    """The text as allowed in a request: percent-encoded where it is not printable ASCII, unchanged elsewhere."""
    encoded = text.encode("utf-8", "surrogateescape")  # as aiohttp decodes header fields
    return "".join(chr(byte) if 0x20 < byte < 0x7F else f"%{byte:02X}" for byte in encoded)


def _joined(base: str, location: str) -> str:
    """The address that a redirect leads to (RFC 3986, section 5.2); only the path of a relative one is normalized."""
    origin, new = _ADDRESS.fullmatch(base), _ADDRESS.fullmatch(location)
    assert origin is not None
    assert new is not None
    if new["scheme"]:
        return location
    if new["host"]:
        return origin["scheme"] + location
    path = urljoin(origin["path"], new["path"]) if new["path"][:1] != "/" else new["path"]
    return origin["scheme"] + origin["host"] + path + new["query"]


def _has_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class _TemporaryError(RejectedError):
    """A failure that may not recur in another attempt."""


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.split("%")[0])
    except ValueError:
        return False
    return True


def _resolver(allow_private: bool) -> Any:
    from aiohttp import ThreadedResolver

    class PublicResolver(ThreadedResolver):
        """Resolves names to public addresses only, whatever they resolved to a moment ago."""

        async def resolve(self, *args: Any, **kwargs: Any) -> Any:
            found = await super().resolve(*args, **kwargs)
            if allow_private or all(is_public(each["host"]) for each in found):
                return found
            raise RejectedError("a private address")

    return PublicResolver()
