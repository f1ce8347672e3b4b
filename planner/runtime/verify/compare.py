"""Two runs of a step compared: losses, the gradients' norm, every gradient and parameter."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

LOSS, TENSOR = 2e-6, 1e-5  # most relative error: of a loss in fp32, and of a tensor's norm
FLOOR = 1e-3  # of the root mean square of all gradients: a smaller one is compared with that


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensors:
    """A parameter's errors by norm: of its gradient, and of itself after the optimizer's step."""

    name: str
    gradient: float
    parameter: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """One number of the step under the plan and of the whole one."""

    what: str
    ours: float
    theirs: float
    allowed: float = LOSS

    @property
    def error(self) -> float:
        return abs(self.ours - self.theirs) / max(abs(self.theirs), 1e-12)


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """A parameter that learns, of the unsharded model: the norms that errors are relative to."""

    name: str
    elements: int
    gradient: float
    parameter: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A box of a parameter that a rank holds, and the squared errors in it."""

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    gradient: float
    parameter: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFound:
    """What one rank saw. replicated: unit, operation, times; uncompiled: class of unit, why."""

    numbers: tuple[Number, ...]
    wholes: tuple[Whole, ...]
    parts: tuple[Part, ...]
    replicated: tuple[tuple[str, str, int], ...]
    loose_edges: tuple[str, ...]
    uncompiled: tuple[tuple[str, str], ...]
    seed: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Something that does not agree: what, of which tensor, and by how much."""

    what: str
    name: str
    error: float
    allowed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """All ranks together. missing: parameters of which some part is on no rank."""

    numbers: tuple[Number, ...]
    tensors: tuple[Tensors, ...]
    missing: tuple[str, ...] = ()
    replicated: tuple[tuple[str, str, int], ...] = ()
    loose_edges: tuple[str, ...] = ()
    uncompiled: tuple[tuple[str, str], ...] = ()
    seed: int = 0
    seconds: float = 0.0
    differences: tuple[Difference, ...] = field(init=False)

    def __post_init__(self) -> None:
        found = [
            Difference(what=n.what, name="", error=n.error, allowed=n.allowed) for n in self.numbers
        ]
        for t in self.tensors:
            for what, error in (("gradient", t.gradient), ("after a step", t.parameter)):
                found.append(Difference(what=what, name=t.name, error=error, allowed=TENSOR))
        bad = [d for d in found if not d.error <= d.allowed]  # NaN is not within
        bad += [
            Difference(what="not on any rank", name=name, error=1.0, allowed=0.0)
            for name in self.missing
        ]
        object.__setattr__(self, "differences", tuple(bad))

    @property
    def holds(self) -> bool:
        return not self.differences

    def worst(self, what: str) -> Tensors:
        """The tensor with the largest error: what is "gradient" or "parameter"."""
        return max(self.tensors, key=lambda t: _ordered(getattr(t, what)))


def _ordered(error: float) -> float:
    return error if error == error else float("inf")


def together(ranks: list[RankFound]) -> Compared:
    """What the ranks saw: a tensor's error over all its parts, each at the worst of its copies."""
    boxes: dict[str, dict[tuple[tuple[int, ...], tuple[int, ...]], list[Part]]] = {}
    for part in (p for rank in ranks for p in rank.parts):
        copies = boxes.setdefault(part.name, {}).setdefault((part.offsets, part.sizes), [])
        copies.append(part)
    first = ranks[0]
    tensors, missing = [], []
    for whole in first.wholes:
        held = boxes.get(whole.name, {})
        if sum(prod(sizes) for _, sizes in held) < whole.elements:
            missing.append(whole.name)
            continue
        worst = [[max((getattr(p, key) for p in copies), key=_ordered) for copies in held.values()]
                 for key in ("gradient", "parameter")]  # fmt: skip
        tensors.append(
            Tensors(name=whole.name, gradient=sum(worst[0]) ** 0.5 / whole.gradient,
                    parameter=sum(worst[1]) ** 0.5 / whole.parameter)
        )  # fmt: skip
    counts: dict[tuple[str, str], int] = {}
    for rank in ranks:
        for unit, op, times in rank.replicated:
            counts[unit, op] = max(times, counts.get((unit, op), 0))
    return Compared(
        numbers=tuple(
            max(same, key=lambda n: _ordered(n.error)) for same in zip(*(r.numbers for r in ranks))
        ),
        tensors=tuple(tensors),
        missing=tuple(missing),
        replicated=tuple((unit, op, times) for (unit, op), times in counts.items()),
        loose_edges=tuple(dict.fromkeys(e for rank in ranks for e in rank.loose_edges)),
        uncompiled=tuple(dict(u for rank in ranks for u in rank.uncompiled).items()),
        seed=first.seed,
        seconds=max(rank.seconds for rank in ranks),
    )
