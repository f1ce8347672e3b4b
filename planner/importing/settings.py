"""A configuration file's settings, by name: what was read of it, and what was not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ir.errors import PlanError
from planner.export.pinned import Pinned

MOST = 10**9 - 1  # of a degree, a batch, a length: beyond that a number is a slip
AUTO = "auto"  # of Hugging Face's integrations: the launching program fills it in


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One value as the file has it, and its line (0 where lines are not known)."""

    value: object
    line: int = 0


@dataclass(slots=True, kw_only=True)
class Settings:
    """All of a file. `used` grows as they are asked for: what is left was not understood.

    source: the file's name, for messages. doubts: what was understood in part. unread: names that
    the file sets to what is no literal, with their lines; "section.**" is any of the section.
    """

    source: str
    values: dict[str, Setting]
    used: set[str] = field(default_factory=set)
    doubts: list[str] = field(default_factory=list)
    unread: dict[str, int] = field(default_factory=dict)

    def fault(self, name: str, what: str, *hints: str, why: str = "") -> PlanError:
        """An error about one setting, where it stands."""
        line = self.values[name].line if name in self.values else self.unread.get(name, 0)
        where = f"{self.source}:{line}" if line else self.source
        return PlanError(f"{name} {what}", where=where, why=why, hints=hints)

    def has(self, name: str) -> bool:
        """Whether the file sets it; "auto" and null are left open. Raises PlanError where what it
        sets is not known: no default stands for it."""
        self.used.add(name)
        rest = f"{name.rpartition('.')[0]}.**"
        for one in (name, *((rest,) if name not in self.values else ())):
            if one in self.unread:
                what = f"is no literal, and may say {name.rpartition('.')[2]}" if one == rest else (
                    "is no literal")  # fmt: skip
                raise self.fault(one, what, "write the value in", why="nothing in a file is run")
        return name in self.values and self.values[name].value not in (None, AUTO)

    def number(self, name: str, default: int, least: int = 1, most: int = MOST) -> int:
        """A whole number. Raises PlanError for another value."""
        if not self.has(name):
            return default
        value = self.values[name].value
        if isinstance(value, float) and value.is_integer():  # JSON's 5e8
            value = int(value)
        text = str(value).strip()
        if "$" in text:
            raise self.fault(name, f"is {text[:60]!r}", "write the number in",
                             why="the file itself does not set it, and nothing is run")  # fmt: skip
        if isinstance(value, bool) or not re.fullmatch(r"-?[0-9]+", text):
            raise self.fault(name, f"is {text[:60]!r}", why="expected a whole number")
        if len(text) > len(str(most)) + 1 or not least <= int(text) <= most:
            raise self.fault(name, f"is {text[:60]}", why=f"expected {least:,} to {most:,}")
        return int(text)

    def on(self, name: str, default: bool = False) -> bool:
        """A switch: true, false, or there without a value."""
        if not self.has(name):
            return default
        value = self.values[name].value
        word = "true" if value == "" else str(value).lower()
        if word not in ("true", "false"):
            raise self.fault(name, f"is {word[:60]!r}", why="expected true or false")
        return word == "true"

    def word(self, name: str, default: str, words: Iterable[str]) -> str:
        """One of the words. Raises PlanError for another, naming them."""
        if not self.has(name):
            return default
        value = str(self.values[name].value)
        known = sorted(words)
        if value not in known:
            raise self.fault(name, f"is {value[:60]!r}", why=f"known here: {', '.join(known)}")
        return value

    def left(self, pinned: Pinned) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What nothing asked for: (real settings that do not touch the layout, not understood)."""
        aside, unknown = [], []
        for name, setting in self.values.items():
            if name in self.used:
                continue
            prefix, _, last = name.rpartition(".")
            if pinned.other & {name, prefix, last, name.partition(".")[0]}:
                aside.append(name)
            else:
                value = "" if setting.value == "" else f" {str(setting.value)[:60]}"
                at = f" (line {setting.line})" if setting.line else ""
                unknown.append(f"{name}{value}{at}")
        return tuple(aside), (*unknown, *self.doubts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a reader may know of the model and the hardware. precision: as the file, or the user
    where the file leaves it open, has it."""

    precision: str
    layers: int
    experts: bool
    parameters: int
    gpus: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A configuration as decisions. pins: (key, value) as `--fix` takes them, without what the
    file leaves open; asked: of the workload; notes: what the user should know of the reading."""

    engine: str
    pins: dict[str, str]
    asked: dict[str, str]
    notes: tuple[str, ...] = ()


def data_ranks(settings: Settings, facts: Facts, degrees: dict[str, int]) -> int:
    """GPUs over the degrees. Raises PlanError where they do not divide the GPUs."""
    taken = 1
    for n in degrees.values():
        taken *= n
    if facts.gpus % taken:
        said = " x ".join(f"{key} {n}" for key, n in degrees.items())
        raise PlanError(
            f"{said} = {taken} ranks do not divide {facts.gpus} GPUs", where=settings.source,
            hints=(f"--hardware with a multiple of {taken} GPUs",),
        )  # fmt: skip
    return facts.gpus // taken


def even(settings: Settings, layers: int, stages: int) -> tuple[int, ...]:
    """The same number of layers on every stage. Raises PlanError where they do not divide."""
    if layers % stages:
        raise PlanError(f"{layers} layers do not divide by {stages} stages",
                        where=settings.source)  # fmt: skip
    return (layers // stages,) * stages


def steps(settings: Settings, batch: int, dp: int, micro: int) -> int:
    """Micro-batches a step. Raises PlanError where the batch does not divide."""
    if batch % (dp * micro):
        raise PlanError(
            f"a global batch of {batch} does not divide by {dp} data ranks x {micro} samples",
            where=settings.source,
            why="dp * micro_batch * microbatches = global batch",
        )
    return batch // (dp * micro)


def joined(numbers: Sequence[int], sep: str = ",") -> str:
    """Numbers as a pin writes them."""
    return sep.join(map(str, numbers))


def switch(value: bool) -> str:
    """A switch as a pin writes it."""
    return "on" if value else "off"
