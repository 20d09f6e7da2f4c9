"""A web server on this machine that behaves as badly as the web does."""

import functools
import io
import struct
import threading
import time
import zlib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image


def jpeg(number: int, size: tuple[int, int] = (48, 40)) -> bytes:
    """A picture whose content depends on its number."""
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
    data = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).save(data, "jpeg", quality=92)
    return data.getvalue()


@functools.cache
def bomb(side: int = 12_000) -> bytes:
    """A valid png of 18 KB with 144 million black pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer = zlib.compressobj(9)
    line = bytes(1 + side // 8 + 1)
    packed = b"".join(packer.compress(line) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


class Web:
    """The server.

    Attributes:
      url: of it.
      asked: how often each path was asked for.
      sent: bytes that went out for each path.
      lines: the request lines as they came, with the bytes of each as Latin-1.
    """

    def __init__(self) -> None:
        web = self
        self.asked: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.lines: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None: ...

            def do_GET(self) -> None:
                web.asked[self.path] += 1
                web.lines.append(self.requestline)
                _, kind, *rest = self.path.split("/")
                try:
                    getattr(self, f"send_{kind}", self.send_missing)(rest[0].split(".")[0] if rest else "")
                except (ConnectionError, TimeoutError):
                    self.close_connection = True

            def answer(self, body: bytes, kind: str = "image/jpeg", status: int = 200, length: int | None = None):
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body) if length is None else length))
                self.end_headers()
                self.wfile.write(body)

            def redirect(self, to: str, status: int = 302) -> None:
                self.send_response(status)
                self.send_header("Location", to)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def send_good(self, number: str) -> None:
                self.answer(jpeg(int(number)))

            def send_typed(self, number: str) -> None:
                self.answer(jpeg(int(number)), "text/plain")

            def send_missing(self, _: str) -> None:
                self.answer(b"not here", "text/plain", 404)

            def send_forbidden(self, _: str) -> None:
                self.answer(b"no", "text/plain", 403)

            def send_flaky(self, number: str) -> None:
                if web.asked[self.path] == 1:
                    self.answer(b"busy", "text/plain", 503)
                else:
                    self.answer(jpeg(int(number)))

            def send_redirect(self, number: str) -> None:
                self.redirect(f"/good/{number}.jpg", 301)

            def send_onward(self, _: str) -> None:
                """Redirects to what stands behind the first question mark, byte for byte."""
                self.redirect(bytes.fromhex(self.path.partition("?")[2]).decode("latin-1"))

            def send_loop(self, _: str) -> None:
                self.redirect(self.path)

            def send_file(self, _: str) -> None:
                self.redirect("file:///etc/passwd")

            def send_slow(self, _: str) -> None:
                time.sleep(5)

            def send_drip(self, _: str) -> None:
                self.send_response(200)
                self.send_header("Content-Length", "100000")
                self.end_headers()
                for _ in range(50):
                    self.wfile.write(b"\xff")
                    self.wfile.flush()
                    time.sleep(0.1)

            def send_truncated(self, number: str) -> None:
                body = jpeg(int(number))
                self.answer(body[: len(body) // 2], length=len(body))
                self.close_connection = True

            def send_half(self, number: str) -> None:
                body = jpeg(int(number))
                self.answer(body[: len(body) // 2])

            def send_html(self, _: str) -> None:
                self.answer(b"<html><body>Log in</body></html>", "text/html")

            def send_liar(self, _: str) -> None:
                self.answer(b"<html><body>Log in</body></html>", "image/jpeg")

            def send_empty(self, _: str) -> None:
                self.answer(b"")

            def send_bomb(self, _: str) -> None:
                self.answer(bomb(), "image/png")

            def send_endless(self, _: str) -> None:
                self.stream(10 * 2**30)

            def send_announced(self, _: str) -> None:
                self.answer(b"\xff\xd8", length=10 * 2**30)
                self.close_connection = True

            def stream(self, size: int) -> None:
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                block = bytes(2**16)
                for _ in range(size // len(block)):
                    self.wfile.write(f"{len(block):x}\r\n".encode() + block + b"\r\n")
                    web.sent[self.path] += len(block)

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_: object) -> None: ...

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stops it."""
        self._server.shutdown()
        self._server.server_close()
