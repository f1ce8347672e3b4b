"""Lines of a terminal's width."""

from __future__ import annotations

from collections.abc import Sequence

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


def side_by_side(notes: Sequence[str]) -> tuple[str, ...]:
    """Short notes that come one after the other in a line together, where it has room for them."""
    lines: list[str] = []
    for note in notes:
        both = f"{lines[-1]}; {note}" if lines else ""
        if both and len(both) <= WIDTH:
            lines[-1] = both
        else:
            lines.append(note)
    return tuple(lines)
