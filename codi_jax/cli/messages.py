"""Phrases for messages to the user."""

_LISTED = 10  # entries of a list in a message


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def counted(number: int, what: str) -> str:
    """So many of something: "1 step", "4 steps"."""
    return f"{number} {what}{'s' * (number != 1)}"


def listed(entries: list[str]) -> str:
    """The first entries of a list and the number of remaining ones, for messages."""
    rest = f" and {len(entries) - _LISTED} more" if len(entries) > _LISTED else ""
    return (", ".join(entries[:_LISTED]) + rest) or "nothing"
