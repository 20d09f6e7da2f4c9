"""The peak of a process's memory, in code that tests run in a process of its own."""

# Not getrusage's: on Linux a new process begins with the peak of the one that starts it, and pytest's hides the rest.
PEAK = """
from pathlib import Path

def peak():
    "KiB."
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""
