"""Groups of command line flags: dataclasses that a script's own inherits from, and the checks of their values."""

import dataclasses
from typing import Any, TypeVar

Group = TypeVar("Group", bound="Flags")


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
