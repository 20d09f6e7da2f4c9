"""Groups of command line flags: dataclasses that a script's own inherits from, and the checks of their values."""

import dataclasses
import enum
import inspect
import json
from typing import Annotated, Any, TypeVar

Group = TypeVar("Group", bound="Flags")
_T = TypeVar("_T")


class Scope(enum.IntEnum):
    """What has to share one value of a flag; a flag says it in its annotation: ``logging_steps: Operational[int]``.

    A flag that says nothing belongs to the run.
    """

    RUN = 0
    """The whole run: one that is resumed with another value is refused."""
    RESUME = 1
    """The run until it is stopped: a resumed run may have another learning rate, or find its data elsewhere."""
    START = 2
    """The processes of one start: it changes nothing of what is trained."""
    PROCESS = 3
    """One process: paths on a machine, for example."""
    SECRET = 4
    """One process, and it is never written down."""


Adjustable = Annotated[_T, Scope.RESUME]
Operational = Annotated[_T, Scope.START]
Local = Annotated[_T, Scope.PROCESS]
Secret = Annotated[_T, Scope.SECRET]


class Flags:
    """Base of the groups.

    A group with values to refuse overrides `check`, and calls that of ``super()`` in it, so that a script that is made
    of several groups checks them all.
    """

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The flags of the group."""
        fields: Any = dataclasses.fields  # of subclasses, which are dataclasses
        return tuple(field.name for field in fields(cls))

    @classmethod
    def of(cls: type[Group], flags: Any) -> Group:
        """The group alone, of the flags of a script that is made of several."""
        return cls(**{name: getattr(flags, name) for name in cls.names()})

    @classmethod
    def scopes(cls) -> dict[str, Scope]:
        """The scope of each flag; a flag that a subclass declares again keeps its scope unless it names another."""
        scopes = dict.fromkeys(cls.names(), Scope.RUN)
        for base in reversed(cls.__mro__):
            for name, annotation in inspect.get_annotations(base, eval_str=True).items():
                found = [mark for mark in getattr(annotation, "__metadata__", ()) if isinstance(mark, Scope)]
                if found and name in scopes:
                    scopes[name] = found[-1]
        return scopes

    def values(self, widest: Scope) -> dict[str, Any]:
        """The flags of this scope and of narrower ones, as JSON values.

        Args:
          widest: the last scope to take part; secrets never do.
        """
        wanted = [name for name, scope in self.scopes().items() if scope <= min(widest, Scope.PROCESS)]
        return json.loads(json.dumps({name: getattr(self, name) for name in wanted}, default=str))

    def check(self) -> None:
        """Refuses flags that contradict each other or make no sense.

        Raises:
          ValueError: one sentence, naming the flag.
        """

    def require(self, flag: str, holds: bool, what: str) -> None:
        """Raises that sentence unless the condition holds; ``what`` the flag must be ends it."""
        if not holds:
            raise ValueError(f"--{flag} {getattr(self, flag)} is not possible: it must be {what}.")

    def require_at_least(self, least: int, *flags: str) -> None:
        """The same for numbers; those that are left out pass."""
        for flag in flags:
            value = getattr(self, flag)
            self.require(flag, value is None or value >= least, f"at least {least}")

    def require_in(self, low: float | int, high: float | int, *flags: str) -> None:
        """The same for numbers from ``low`` to ``high``."""
        for flag in flags:
            self.require(flag, low <= getattr(self, flag) <= high, f"between {low:g} and {high:g}")
