"""What is kept of a layer, against the model's own classes and operations: of a pin, of a plan."""

from __future__ import annotations

from cost_models.decisions import Keep
from ir.errors import PlanError, UsageError
from ir.graph import Graph
from ir.keep import words
from planner.chain import layer_units
from planner.keep_words import EVERY


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

