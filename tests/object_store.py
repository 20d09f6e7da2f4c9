"""Google Cloud Storage on this machine: an emulator by others, and what it lacks that Orbax relies on."""

import contextlib
from collections.abc import Iterator
from http import HTTPStatus
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec
import pytest
from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from several import free_address


class _Handler(server.RequestHandler):
    """Says which version of an object it sends, and writes only over the version that the client has seen."""

    def __init__(self, storage: object, *args: object, **kwargs: object) -> None:
        self._objects = storage
        super().__init__(storage, *args, **kwargs)

    def end_headers(self) -> None:
        if self.command == "GET" and "alt=media" in self.path:
            bucket, _, name = urlsplit(self.path).path.partition("/b/")[2].partition("/o/")
            self.send_header("x-goog-generation", self._generation(bucket, unquote(name)))
        super().end_headers()

    def do_POST(self) -> None:
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        bucket = url.path.partition("/b/")[2].partition("/")[0]
        if "ifGenerationMatch" in query and query["ifGenerationMatch"][0] != self._generation(bucket, query["name"][0]):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(HTTPStatus.PRECONDITION_FAILED)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        super().do_POST()

    def _generation(self, bucket: str, name: str) -> str:
        """``0`` if there is no such object, as in the protocol."""
        try:
            return self._objects.get_file_obj(bucket, name)["generation"]
        except NotFound:
            return "0"


@contextlib.contextmanager
def serve_store() -> Iterator[fsspec.AbstractFileSystem]:
    """A store with a bucket ``bucket``, which this process and those that it starts take for the real one."""
    host, port = free_address().split(":")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(server, "RequestHandler", _Handler)
        patched.setenv("STORAGE_EMULATOR_HOST", f"http://{host}:{port}")
        patched.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://{host}:{port}")
        patched.setenv("GOOGLE_CLOUD_PROJECT", "project")
        with server.create_server(host, int(port), in_memory=True, default_bucket="bucket"):
            yield fsspec.filesystem("gs")
