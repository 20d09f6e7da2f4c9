"""Command lines: groups of flags, their parsing, checks and error reports."""
