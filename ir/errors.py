"""The one family of errors a user sees: what was found, where, why, and what would fix it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher


class PlanError(Exception):
    """A fault of the input, not of ours. Printed without a traceback; `exit_code` is the shell's.

    what: what was found. where: file and line, layer path or key. why: what was expected.
    hints: what would fix it, one line each. there: the traceback, where another process met it.
    """

    exit_code = 1
    there = ""

    def __init__(
        self, what: str, *, where: str = "", why: str = "", hints: tuple[str, ...] = ()
    ) -> None:
        super().__init__(what)
        self.what, self.where, self.why, self.hints = what, where, why, hints

    def lines(self) -> list[str]:
        """The message as printed: the cause first, then hints."""
        lines = [f"error: {self.what}"]
        lines += [f"  {line}" for text in (self.where, self.why) for line in text.splitlines()]
        return lines + [f"hint: {hint}" for hint in self.hints]


def known_words(word: str, words: Iterable[str], most: int = 0) -> str:
    """What of a message says which words there are, the nearest to what was found first; `most`: so
    many of them, 0 for all."""
    alike = SequenceMatcher(b=word)  # it remembers its second

    def near(other: str) -> float:
        alike.set_seq1(other)
        return -alike.ratio()

    every = sorted(words, key=near)
    more = f" and {len(every) - most} more" if most and most < len(every) else ""
    return f"known: {', '.join(every[: most or None])}{more}"


class UsageError(PlanError):
    """A flag, pin, device or count that cannot be meant."""

    exit_code = 64


class InfeasibleError(PlanError):
    """No plan fits, or the pins do not."""

    exit_code = 3


class GateError(PlanError):
    """A plan is stale, a gate failed, or two things that must agree do not."""

    exit_code = 4
