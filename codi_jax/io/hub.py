"""The folders that models are read from, local or on the Hugging Face Hub."""

import contextlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from codi_jax.cli.messages import listed
from codi_jax.io.json_files import JsonError, read_object
from codi_jax.io.single_file import recognize
from codi_jax.models.config import WeightsError

WEIGHT_ENDINGS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack")
"""How the names of weight files end."""


@dataclass(frozen=True)
class ModelFolder:
    """Where the files of a model, or of one of its parts, are found: a local folder or the hub.

    A model in a single file (`codi_jax.io.single_file`) looks like a folder without weights.

    Attributes:
      source: a folder, the id of a repository, or a single file.
      subfolder: the part's folder; ``None`` for the complete model.
      revision: branch, tag or commit on the hub.
      cache_dir: folder for the hub's files. Default: the hub's.
      local_files_only: never contact the hub.
      config: for a single file, the folder or repository with its configurations. Default: one of the file's family.
    """

    source: str
    subfolder: str | None = None
    revision: str | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    config: str | Path | None = None

    def __str__(self) -> str:
        return f"{self.source}/{self.subfolder}" if self.subfolder else self.source

    def part(self, subfolder: str) -> "ModelFolder":
        """The folder of one part of the model."""
        return replace(self, subfolder=subfolder)

    def find(self, name: str) -> Path | None:
        """The local path of a file, downloaded if necessary; ``None`` if it does not exist or cannot be reached.

        Raises:
          WeightsError: if the repository does not exist or denies access, or the download fails.
        """
        if self.is_single_file:
            return self._configurations.find(name)
        if self._is_local:
            path = Path(self.source, self.subfolder or "", name)
            return path if path.is_file() else None
        try:
            return Path(
                hf_hub_download(
                    self.source,
                    name,
                    subfolder=self.subfolder,
                    revision=self.revision,
                    cache_dir=self.cache_dir,
                    local_files_only=self.local_files_only,
                )
            )
        except EntryNotFoundError:
            return None
        except Exception as error:
            raise self._explained(error, name) from error

    def require(self, name: str) -> Path:
        """The local path of a file that must exist.

        Raises:
          WeightsError: if it does not exist, saying what the folder holds.
        """
        path = self.find(name)
        if path is None:
            raise WeightsError(f"There is no {name} in {self}: {self.describe_contents()}.")
        return path

    def read_json(self, name: str) -> dict[str, Any]:
        """The contents of a JSON file.

        Raises:
          WeightsError: if the file does not exist, or is not a JSON object.
        """
        path = self.require(name)
        try:
            values = read_object(path, "download it again")
        except JsonError as error:
            raise WeightsError(str(error)) from None
        return values | (recognize(self.source).corrections(self.subfolder, name) if self.is_single_file else {})

    @property
    def is_single_file(self) -> bool:
        """Whether the source is a file."""
        return Path(self.source).is_file()

    @property
    def _configurations(self) -> "ModelFolder":
        config = self.config or recognize(self.source).family.config
        return replace(self, source=str(Path(config).expanduser()), revision=None, config=None)

    def pinned(self, path: Path) -> "ModelFolder":
        """The same folder at the commit that ``path`` was downloaded from, so that all files are from one version."""
        commit = re.search(r"/snapshots/([0-9a-f]{40})/", path.as_posix())
        if commit is None or self._is_local or self.is_single_file:
            return self
        return replace(self, revision=commit[1])

    def names(self) -> list[str] | None:
        """The files in the folder, an empty list if it does not exist; ``None`` if the hub cannot be reached."""
        if self.is_single_file:
            return self._configurations.names()
        if self._is_local:
            folder = Path(self.source, self.subfolder or "")
            return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        if self.local_files_only:
            return None
        prefix = f"{self.subfolder}/" if self.subfolder else ""
        # The hub is asked only to word an error message: another failure must not replace that message.
        with contextlib.suppress(Exception):
            files = HfApi().list_repo_files(self.source, revision=self.revision)
            return sorted(name.removeprefix(prefix) for name in files if name.startswith(prefix))
        return None

    def describe_contents(self) -> str:
        """Half a sentence about the contents of the folder, for messages about what is missing."""
        names = self.names()
        if names is None:
            return (
                "it is not a folder on this machine, the local cache does not have it, and the Hugging Face Hub was "
                "not reached; check the spelling, the connection and HF_HUB_OFFLINE"
            )
        if names:
            return f"it holds {listed(names)}"
        if self.subfolder and not Path(self.source, self.subfolder).is_dir():
            return f"{self.source} holds {listed(replace(self, subfolder=None).names() or [])}"
        return "it is empty"

    @property
    def _is_local(self) -> bool:
        return Path(self.source).is_dir()

    def _explained(self, error: Exception, name: str) -> WeightsError:
        page = f"https://huggingface.co/{self.source}"
        if isinstance(error, GatedRepoError):
            return WeightsError(f"{self.source} is gated: accept its license at {page}, then run `hf auth login`.")
        if isinstance(error, RevisionNotFoundError):
            return WeightsError(f"{self.source} has no revision {self.revision!r}; the branches are listed at {page}.")
        if isinstance(error, RepositoryNotFoundError):
            return WeightsError(
                f"{self.source} is neither a folder on this machine nor a public repository at {page}; "
                "check the spelling, or run `hf auth login` if it is private."
            )
        if isinstance(error, HFValidationError):
            return WeightsError(f"There is no folder {self.source}, and it is not an id such as owner/name on the hub.")
        return WeightsError(f"Downloading {name} of {self} failed: {error}")


def is_file(source: str | Path) -> bool:
    """Whether a text names a file, of this machine or in a repository, and not a folder or a repository."""
    path = Path(source).expanduser()
    return path.is_file() or (path.suffix in WEIGHT_ENDINGS and not path.is_dir())


def named_file(source: str) -> tuple[str, str]:
    """The repository and the file in it of ``owner/name/file.safetensors``, which may be in a subfolder.

    Raises:
      WeightsError: if the text is the path of a file that does not exist.
    """
    path, parts = Path(source).expanduser(), source.split("/")
    if path.is_absolute() or len(parts) < 3 or path.parent.is_dir() or parts[0] in ("", ".", "..", "~"):
        raise WeightsError(f"There is no weight file {path}.")
    return "/".join(parts[:2]), "/".join(parts[2:])


def find_file(source: str | Path, **hub: Any) -> Path:
    """The local path of a file, or of a file in a repository, ``owner/name/file.safetensors``.

    Args:
      source: the file.
      **hub: other attributes of `ModelFolder`.

    Raises:
      WeightsError: if it does not exist.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    repository, name = named_file(str(source))
    return ModelFolder(repository, **hub).require(name)
