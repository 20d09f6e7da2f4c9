"""A hub on this machine that huggingface_hub takes for the real one."""

import os
import threading
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import hub_standin
import huggingface_hub
import pytest
from PIL import Image
from web import Web

ROOT = Path(__file__).resolve().parent.parent


def serve_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Serves ``folder/hub`` while the caller goes on; a fixture yields from it.

    Yields:
      ``root``, where its models are; ``url``; and ``token_file``, which does not exist.
    """
    handler = type("Handler", (hub_standin.Handler,), {"store": hub_standin.Store(folder / "hub")})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    constants = huggingface_hub.constants
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield SimpleNamespace(root=folder / "hub/models", url=url, token_file=folder / "token")
    server.shutdown()


def serve_hub_and_web(folder: Path, fill: Callable[[SimpleNamespace, Path], None]) -> Iterator[SimpleNamespace]:
    """The same, filled, and with ``web``, a server of pictures; a fixture of any scope yields from it."""
    with pytest.MonkeyPatch.context() as patched:
        for served in serve_hub(folder, patched):
            served.web = Web()
            fill(served, folder)
            yield served
            served.web.close()


def environment_of(hub: SimpleNamespace, home: Path) -> dict[str, str]:
    """The environment of processes that take the hub for the real one, and ``home`` for its cache."""
    return {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home),
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip


def folder_of_model(hub: SimpleNamespace, name: str) -> Path:
    """The folder for a model's files, of its main branch unless the name goes on with another."""
    path = hub.root / name
    return path if name.count("/") > 1 else path / "main"


def serve_data_set(hub: SimpleNamespace, name: str, columns: dict[str, list[Any]]) -> None:
    """A data set in one file of parquet; pictures are inside of it."""
    rows = datasets.Dataset.from_dict(columns)
    for column, values in columns.items():
        if isinstance(values[0], Image.Image):
            rows = rows.cast_column(column, datasets.Image())
    (folder := hub.root.parent / "datasets" / name / "main/data").mkdir(parents=True)
    rows.to_parquet(folder / "train-00000-of-00001.parquet")


def serve_addresses(hub: SimpleNamespace, name: str, texts: list[str]) -> None:
    """A data set of addresses of the web's pictures, and texts for them."""
    urls = [f"{hub.web.url}/good/{i}.jpg" for i in range(len(texts))]
    serve_data_set(hub, name, {"id": list(range(len(texts))), "url": urls, "text": texts})
