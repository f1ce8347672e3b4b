"""Which operations recomputation in part may keep: what a search tries, and what a user pins."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from cost_models.decisions import Decisions, Keep
from cost_models.formats import Formats
from cost_models.keeping import Way, ladder, offers_ops
from cost_models.step import Assignments, Costs
from cost_models.work import Axes
from ir.errors import PlanError, UsageError
from ir.graph import Graph
from ir.keep import words
from planner.chain import layer_units
from planner.keep_words import EVERY


def keep_sets(
    costs: Costs, tp: int, split: bool, formats: Formats, assignments: Assignments
) -> tuple[Keep, ...]:
    """What may be kept otherwise than by default, of one sample of the whole sequence; none where
    the engine does not choose."""
    if not offers_ops(costs.engine):
        return ()
    at = replace(costs, points=((1, 1),), _units={}, _fsdp={}, _points={})
    d, ways = Decisions(tp=tp, sequence_parallel=split, formats=formats), []
    links = costs.chain.links
    counts = Counter((links[i].unit, links[i].is_layer) for i in costs.chain.layers)
    for (unit, is_layer), count in counts.items():
        laid = assignments[unit, is_layer]
        work = at.work(Axes(tp=tp, sequence_parallel=split, formats=formats), is_layer)
        alone = at.unit(unit, is_layer, laid, d)[0]
        ways.append(Way(unit=unit, assignment=laid, work=work, alone=alone, count=count))
    return ladder(ways)


def pinned_keep(pin: Keep, graph: Graph) -> Keep:
    """A pin as a plan holds it: of each class of layers what it keeps of the words given, nothing
    where that is all of them. Raises UsageError for a class or a word that there is not."""
    units = layer_units(graph)
    known = {unit.name: words(unit) for unit in units if words(unit)}
    found: dict[str, tuple[str, ...]] = {}
    for name, asked in pin:
        if name != EVERY and name not in known:
            raise UsageError(
                f"--fix keep={name}:...: the model has no such class of layers that can choose",
                why=f"it has {', '.join(known) or 'none'}",
                hints=("plan show --layers names them",),
            )
        classes = list(known) if name == EVERY else [name]
        for one in asked:
            if not any(one in known[c] for c in classes):
                raise UsageError(
                    f"--fix keep: no operation {one!r} can be kept",
                    why=f"known: {' '.join(dict.fromkeys(w for c in classes for w in known[c]))}",
                    hints=("keep=default keeps all of them, keep=none none",),
                )
        for c in classes:
            found[c] = tuple(w for w in known[c] if w in asked)
    return tuple((c, kept) for c, kept in found.items() if kept != known[c])


def check_keep(keep: Keep, graph: Graph) -> None:
    """Raise PlanError where a plan's classes and words are not the model's."""
    known = {unit.name: words(unit) for unit in layer_units(graph)}
    for name, kept in keep:
        if name not in known:
            raise PlanError(f"decisions.keep.{name} is no class of layers",
                            why=f"known: {', '.join(known)}")  # fmt: skip
        for one in kept:
            if one not in known[name]:
                raise PlanError(f"decisions.keep.{name} has {one!r}",
                                why=f"known: {', '.join(known[name])}")  # fmt: skip

