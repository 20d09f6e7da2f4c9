"""Pieces of the sentences that a user reads."""

_LISTED = 10  # entries of a list in a message


def first_line(error: Exception) -> str:
    """What an error says first, for messages: its kind if it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def listed(entries: list[str]) -> str:
    """The first entries of a list, and how many more there are, for messages."""
    rest = f" and {len(entries) - _LISTED} more" if len(entries) > _LISTED else ""
    return (", ".join(entries[:_LISTED]) + rest) or "nothing"
