"""Lines of a terminal's width."""

from __future__ import annotations

WIDTH = 80


def wrapped(line: str, indent: int = 4) -> str:
    """A line as lines of 80 columns, broken after a space or a comma where there is one; those
    that go on are indented."""
    lines = []
    while len(line) > WIDTH:
        cut = max(line.rfind(" ", indent + 1, WIDTH + 1), line.rfind(",", indent, WIDTH) + 1)
        cut = cut if cut > indent else WIDTH
        lines.append(line[:cut].rstrip())
        line = " " * indent + line[cut:].lstrip()
    return "\n".join([*lines, line])
