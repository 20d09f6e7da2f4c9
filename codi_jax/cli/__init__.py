"""Command lines: groups of flags, and how they are parsed, checked and reported."""
