"""Groups of command-line flags: dataclasses that a script's own flags inherit from, and checks of their values."""

import dataclasses
import enum
import inspect
import json
import math
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from codi_jax.cli.outputs import file_in_place_of, obstacle

Group = TypeVar("Group", bound="Flags")
_T = TypeVar("_T")


class Scope(enum.IntEnum):
    """The scope that shares one value of a flag, declared in its annotation: ``logging_steps: Operational[int]``.

    Default: ``RUN``.
    """

    RUN = 0
    """The entire run: resuming with another value is refused."""
    RESUME = 1
    """The run until it is stopped: a resumed run may have another learning rate, or find its data elsewhere."""
    START = 2
    """The processes of one start; the flag does not influence the training result."""
    PROCESS = 3
    """One process, such as a path on its machine."""
    SECRET = 4
    """One process; the value is never saved."""


class Topic(enum.StrEnum):
    """What a flag is about, which groups the flags in the help: its class says it, or its annotation."""

    MODEL = "model"
    INPUT = "input"
    DATA = "data"
    METHOD = "method"
    SAMPLING = "sampling"
    METRICS = "metrics"
    OPTIMIZER = "optimizer"
    RUN = "run"
    CHECKPOINTS = "checkpoints"
    VALIDATION = "validation"
    LOGS = "logs"
    HUB = "hub"
    PLAN = "plan"
    PICTURES = "pictures"
    DOWNLOADS = "downloads"
    OUTPUT = "output"
    PAGE = "page"
    MACHINES = "machines"


Adjustable = Annotated[_T, Scope.RESUME]
Operational = Annotated[_T, Scope.START]
Local = Annotated[_T, Scope.PROCESS]
Secret = Annotated[_T, Scope.SECRET]
ForValidation = Annotated[_T, Scope.START, Topic.VALIDATION]

LARGEST_SIDE = 2**14
"""The longest side of an image, in pixels. No device has the memory for more, and failing would take minutes."""
LARGEST_SEED = 2**63 - 1
"""The largest seed that JAX takes."""
_LARGEST = 2**31 - 1  # for any other number: steps and sizes are int32 on devices
_FOLDERS = ("output_dir", "cache_dir", "cache_latents_dir", "ccache", "logging_dir")


class Flags:
    """Base class of groups of flags.

    A group that rejects values overrides `check` and calls ``super().check()``, so that a script that combines several
    groups checks them all. The limits of all numbers and output folders are checked here.

    Attributes:
      topic: what the flags are about.
      essential: the flags that matter to everyone, which the help explains first.
      may_be_infinite: the flags for which inf means no limit.
    """

    topic: ClassVar[Topic] = Topic.METHOD
    essential: ClassVar[tuple[str, ...]] = ()

    may_be_infinite: ClassVar[tuple[str, ...]] = ("max_grad_norm",)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The flags of the group."""
        fields: Any = dataclasses.fields  # for subclasses, which are dataclasses
        return tuple(field.name for field in fields(cls))

    @classmethod
    def of(cls: type[Group], flags: "Flags") -> Group:
        """This group, extracted from the flags of a script that combines several groups."""
        return cls(**{name: getattr(flags, name) for name in cls.names()})

    @classmethod
    def scopes(cls) -> dict[str, Scope]:
        """The scope of each flag; a flag that a subclass redeclares keeps its scope unless it names another."""
        scopes = dict.fromkeys(cls.names(), Scope.RUN)
        for base in reversed(cls.__mro__):
            for name, annotation in inspect.get_annotations(base, eval_str=True).items():
                found = [mark for mark in getattr(annotation, "__metadata__", ()) if isinstance(mark, Scope)]
                if found and name in scopes:
                    scopes[name] = found[-1]
        return scopes

    def values_within(self, widest: Scope) -> dict[str, Any]:
        """The flags whose scope is at most ``widest``, as JSON values; secrets are never included."""
        wanted = [name for name, scope in self.scopes().items() if scope <= min(widest, Scope.PROCESS)]
        return json.loads(json.dumps({name: getattr(self, name) for name in wanted}, default=str))

    def check(self) -> None:
        """Rejects flags that contradict each other or make no sense.

        Raises:
          ValueError: one sentence, naming the flag.
          OSError: if ``--output_dir`` cannot be written.
        """
        for flag in self.names():
            self._check_numbers(flag)
        for flag in _FOLDERS:
            self._check_folder(flag)

    def require(self, flag: str, holds: bool, what: str) -> None:
        """Raises `ValueError` unless the condition holds; ``what`` says what the flag must be."""
        if not holds:
            raise ValueError(f"--{flag} {_shown(getattr(self, flag))} is not possible: it must be {what}.")

    def require_at_least(self, least: int, *flags: str) -> None:
        """Raises `ValueError` unless the numbers of the flags are at least ``least``; ``None`` is accepted."""
        for flag in flags:
            self.require(flag, all(value >= least for value in self._values(flag)), f"at least {least}")

    def require_positive(self, *flags: str) -> None:
        """Raises `ValueError` unless the numbers of the flags are above 0; ``None`` is accepted."""
        for flag in flags:
            self.require(flag, all(value > 0 for value in self._values(flag)), "positive")

    def require_in(self, low: float | int, high: float | int, *flags: str) -> None:
        """Raises `ValueError` unless the numbers of the flags are from ``low`` to ``high``; ``None`` is accepted."""
        for flag in flags:
            possible = all(low <= value <= high for value in self._values(flag))
            self.require(flag, possible, f"between {low:g} and {high:g}")

    def _values(self, flag: str) -> tuple[Any, ...]:
        value = getattr(self, flag)
        return value if isinstance(value, tuple) else () if value is None else (value,)

    def _check_numbers(self, flag: str) -> None:
        values = self._values(flag)
        whole = [value for value in values if isinstance(value, int)]
        if flag in ("seed", "seeds"):
            self.require(flag, all(0 <= value <= LARGEST_SEED for value in whole), "from 0 to 2^63 - 1")
            return
        self.require(flag, all(abs(value) <= _LARGEST for value in whole), "below 2^31")
        for value in values:
            without_limit = value == math.inf and flag in self.may_be_infinite
            self.require(flag, not isinstance(value, float) or math.isfinite(value) or without_limit, "a finite number")

    def _check_folder(self, flag: str) -> None:
        folder = getattr(self, flag, None)
        if folder is None:
            return
        path = Path(getattr(self, "output_dir", ""), folder) if flag == "logging_dir" else Path(folder)
        # Other folders may be read-only: their contents can still be used.
        if flag == "output_dir" and (reason := obstacle(path)):
            raise OSError(f"--{flag} {folder} cannot be written ({reason}): choose another.")
        if file := file_in_place_of(path):
            raise ValueError(f"--{flag} {folder} is not possible: {file} is a file, but must be a folder.")


def _shown(value: Any) -> str:
    """A value as written on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
