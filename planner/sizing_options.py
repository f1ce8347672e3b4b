"""What `plan size` is asked, read and checked: targets, limits, devices, prices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cost_models.decisions import Workload
from cost_models.fleet import Hardware, load_any
from cost_models.hardware import canonical, catalogue, describe, summands
from cost_models.operations import Operations
from cost_models.prices import Price
from cost_models.units import (
    format_bytes,
    format_count,
    format_seconds,
    format_short_rate,
    parse_count,
)
from ir.errors import UsageError
from ir.graph import Graph
from planner.limits import Limits
from planner.sizing import AXES, Target

DAY_S = 86_400
TARGETS = ("tokens_per_s", "days", "step_time_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """All that is asked of one model. tokens: of the whole training, 0 where none was said.
    without: (why, names) of devices that cannot take part."""

    graph: Graph
    workload: Workload
    target: Target
    tokens: float = 0.0
    limits: Limits = field(default_factory=Limits)
    operations: Operations = field(default_factory=Operations)
    prices: Mapping[str, Price] = field(default_factory=dict)
    objective: str = "gpus"
    without: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def unit(self) -> str:
        return "tokens" if self.graph.seq_in_input else "samples"

    @property
    def axes(self) -> tuple[str, ...]:
        """What the front is of: what is known; free memory where it is the objective."""
        known = {
            "cost": any(p.usd_per_gpu_hour is not None for p in self.prices.values()),
            "spot": any(p.spot_usd_per_gpu_hour is not None for p in self.prices.values()),
            "memory": self.objective == "memory",
        }
        return tuple(axis for axis in AXES if known.get(axis, True))

    @property
    def targets_said(self) -> tuple[str, ...]:
        said = []
        if self.target.tokens_per_s:
            rate = f"{format_short_rate(self.target.tokens_per_s)} {self.unit}/s expected"
            if self.tokens:
                days = self.tokens / self.target.tokens_per_s / DAY_S
                rate += f" ({format_count(self.tokens)} in {days:.3g} days)"
            said.append(rate)
        if self.target.step_time_s < math.inf:
            said.append(f"a step of {format_seconds(self.target.step_time_s)} at most")
        return tuple(said)

    @property
    def limits_said(self) -> tuple[str, ...]:
        found = {
            f"{self.limits.gpus} GPUs": self.limits.gpus,
            f"{format_bytes(self.limits.memory_bytes or 0)} a GPU": self.limits.memory_bytes,
            f"{self.limits.usd_per_million_tokens} USD a million {self.unit}": (
                self.limits.usd_per_million_tokens
            ),
        }
        return tuple(words for words, limit in found.items() if limit is not None)


def parse_target(texts: Sequence[str], tokens: float) -> Target:
    """Read `--target k=v`; days are of `tokens`. Raises UsageError for a key that is none."""
    if not texts:
        raise UsageError("plan size needs a --target",
                         hints=("--target tokens_per_s=1e6", "--target days=30 --tokens 15T",
                                "--target step_time_s=10"))  # fmt: skip
    numbers: dict[str, float] = {}
    for text in texts:
        key, _, value = text.partition("=")
        if key not in TARGETS:
            raise UsageError(f"--target {text} is no target",
                             why=f"known: {', '.join(f'{k}=' for k in TARGETS)}")  # fmt: skip
        if key in numbers:
            raise UsageError(f"--target {key} is given twice")
        numbers[key] = parse_count(value, f"--target {text}")
        if not numbers[key]:
            raise UsageError(f"--target {text} asks nothing", why="expected more than 0")
    if "days" in numbers and not tokens:
        raise UsageError(f"--target days={numbers['days']:g}: of how many tokens?",
                         hints=("--tokens 15T",))  # fmt: skip
    rates = [numbers.get("tokens_per_s", 0.0)]
    rates += [tokens / (numbers["days"] * DAY_S)] if "days" in numbers else []
    return Target(tokens_per_s=max(rates), step_time_s=numbers.get("step_time_s", math.inf))


def parse_devices(text: str) -> tuple[Hardware, ...]:
    """The devices of `--hardware h100,b200,mine.toml`; the whole catalogue where it is empty. A sum
    of several kinds, `h100x32+a100x64` or a file of parts, is one as it is.

    Raises UsageError for another name with a count: how many is what is sought.
    """
    if not text:
        return tuple(describe(name) for name in catalogue())
    found: list[Hardware] = []
    for word in (part.strip() for part in text.split(",")):
        if word.endswith(".toml") or len(summands(word)) > 1:
            found.append(load_any(word))
            continue
        name, _, count = word.lower().rpartition("x")
        if name in catalogue() and count.isdigit():
            raise UsageError(f"--hardware {word}: plan size chooses the count",
                             hints=(f"--hardware {name} --max-gpus {count}",))  # fmt: skip
        found.append(describe(canonical(word)))
    if len({one.name for one in found}) < len(found):
        raise UsageError(f"--hardware {text} names a device twice")
    return tuple(found)
