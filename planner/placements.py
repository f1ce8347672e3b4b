"""Placements on tp between the plan file's rules, by full name, and shardings, by unit class."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from cost_models.chain import chain_of
from cost_models.decisions import Decisions
from cost_models.sharding import Edge, Sharding
from ir.errors import PlanError
from ir.graph import Graph, Parameter, Unit, full_name
from planner.names import expand, fold, fold_text

_WORD = re.compile(r"R|P(\(\w+\))?|S\((0|[1-9][0-9]*)\)")


def instances(graph: Graph) -> Iterator[tuple[str, Unit]]:
    """(module path, class) of every unit of the chain, in execution order."""
    return ((link.path, link.unit) for link in chain_of(graph).links)


def placements(shardings: Mapping[str, Sharding], graph: Graph) -> dict[str, str]:
    """The placement of every parameter by its full name; R where none is said."""
    said: dict[str, str] = {}
    for path, unit in instances(graph):
        for name, placement in shardings.get(unit.name, Sharding()).parameters:
            said.setdefault(full_name(path, name), placement)
    return {name: said.get(name, "R") for name in graph.parameters}


def tp_idle(d: Decisions, shardings: Mapping[str, Sharding]) -> bool:
    """Whether tp has several ranks, and each of them computes and holds the same."""
    split = any(s.edges or any(word != "R" for _, word in s.parameters) for s in shardings.values())
    return d.tp > 1 and d.ep * d.etp == 1 and not d.sequence_parallel and not split


def parameter_rules(shardings: Mapping[str, Sharding], graph: Graph) -> list[dict[str, str]]:
    """Disjoint and total rules: one a folded pattern, grouped by placement."""
    groups: dict[str, list[str]] = {}
    for name, placement in placements(shardings, graph).items():
        groups.setdefault(placement, []).append(name)
    return [
        {"match": pattern, "tp": placement}
        for placement, names in groups.items()
        for pattern in fold(names)
    ]


def edge_rules(shardings: Mapping[str, Sharding], graph: Graph) -> list[dict[str, str]]:
    """Rules of what changes placement where, both directions; `:in` and `:out` apart."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for path, unit in instances(graph):
        sharding = shardings.get(unit.name, Sharding())
        for edge in _ordered(sharding.edges, unit):
            port = edge.at.rpartition(":")[2] if ":" in edge.at else ""
            change = ("->".join(edge.forward), "->".join(edge.backward), port)
            groups.setdefault(change, []).append(_full_edge(path, edge.at))
    return [
        {"at": pattern, "forward": forward, "backward": backward}
        for (forward, backward, _), names in groups.items()
        for pattern in fold(list(dict.fromkeys(names)))
    ]


def parse_placements(
    rules: list[dict[str, str]], edges: list[dict[str, str]], graph: Graph, *, tp: int
) -> tuple[tuple[str, Sharding], ...]:
    """Shardings by unit class from the rules of a plan file; none where tp = 1.

    Raises PlanError for a parameter matched by no rule or by two, a rule for no parameter, a
    dimension a tensor does not have, and instances of one class that differ.
    """
    said = _matched(rules, graph)
    changes = _changes(edges, graph)
    if tp == 1:
        for name, placement in said.items():
            if placement != "R":
                raise PlanError(f"{name} is {placement}, but tp is 1", why="expected R")
        if edges:
            raise PlanError(f"edges[0] is at {edges[0]['at']}, but tp is 1", why="expected none")
        return ()
    owner = dict(graph.tied)
    found: dict[str, tuple[str, Sharding]] = {}
    for path, unit in instances(graph):
        names = [(p.name, full_name(path, p.name)) for p in unit.parameters if p.kind != "buffer"]
        sharding = Sharding(
            parameters=tuple((short, said[owner.get(full, full)]) for short, full in names),
            edges=_ordered(changes.get(path, ()), unit),
        )
        first, other = found.setdefault(unit.name, (path, sharding))
        if other != sharding:
            raise PlanError(
                f"{path} and {first} are one class, {unit.name}, but laid out differently",
                why="this version lays out all units of a class alike",
            )
    laid = {full for path, unit in instances(graph) for full in _names(path, unit)}
    for name, placement in said.items():
        if placement != "R" and name not in laid:
            raise PlanError(f"{name} is {placement}", why="it lies in no unit: expected R")
    return tuple((name, sharding) for name, (_, sharding) in found.items())


def _names(path: str, unit: Unit) -> list[str]:
    return [full_name(path, p.name) for p in unit.parameters if p.kind != "buffer"]


def _matched(rules: list[dict[str, str]], graph: Graph) -> dict[str, str]:
    """Each parameter's placement; every parameter matched by exactly one rule."""
    said: dict[str, tuple[str, str]] = {}
    aliases = {alias for alias, _ in graph.tied}
    for rule in rules:
        for name in expand(rule["match"]):
            if name not in graph.parameters:
                tied = " (it is tied; name its owner)" if name in aliases else ""
                raise PlanError(f"rule {rule['match']!r} names {name}, no parameter{tied}")
            if name in said:
                raise PlanError(f"{name} is matched by two rules",
                                why=f"{said[name][0]!r} and {rule['match']!r}")  # fmt: skip
            _check_word(rule["tp"], name, graph.parameters[name])
            said[name] = (rule["match"], rule["tp"])
    missing = [name for name in graph.parameters if name not in said]
    if missing:
        raise PlanError(
            f"{missing[0]} is matched by no rule",
            why=f"parameters without a rule: {_shortened(fold_text(missing))}",
            hints=('add {"match": PATTERN, "tp": PLACEMENT} to parameters',),
        )
    return {name: placement for name, (_, placement) in said.items()}


def _check_word(word: str, name: str, parameter: Parameter) -> None:
    rank = len(parameter.tensor.shape)
    found = _WORD.fullmatch(word)
    if found is None or word[0] == "P":
        raise PlanError(f"{name} is placed {word!r}", why="expected R or S(dim)")
    if found[2] and int(found[2]) >= rank:
        raise PlanError(f"{name} is placed {word}", why=f"its tensor has {rank} dimensions")


def _changes(rules: list[dict[str, str]], graph: Graph) -> dict[str, tuple[Edge, ...]]:
    """The edges of each instance, by module path."""
    paths = {path for path, _ in instances(graph)}
    found: dict[str, dict[str, Edge]] = {}
    for rule in rules:
        for name in expand(rule["at"]):
            path = _unit_of(name, paths)
            at = name[len(path) :].removeprefix(".")
            if at in found.setdefault(path, {}):
                raise PlanError(f"edge {name} is in two rules")
            edge = Edge(at=at, forward=_change(rule, "forward"), backward=_change(rule, "backward"))
            found[path][at] = edge
    return {path: tuple(edges.values()) for path, edges in found.items()}


def _unit_of(name: str, paths: set[str]) -> str:
    """The longest module path that `name` lies under. Raises PlanError where there is none."""
    path = name.partition(":")[0]
    while path and path not in paths:
        path = path.rpartition(".")[0]
    if not path:
        raise PlanError(f"edge {name} is in no unit", why="expected UNIT.MODULE:in or :out")
    return path


def _change(rule: dict[str, str], key: str) -> tuple[str, str]:
    before, _, after = rule[key].partition("->")
    if not (_WORD.fullmatch(before) and _WORD.fullmatch(after)):
        raise PlanError(f"edge {rule['at']}: {key} is {rule[key]!r}",
                        why="expected FROM->TO of R, P and S(dim)")  # fmt: skip
    return before, after


def _ordered(edges: Iterable[Edge], unit: Unit) -> tuple[Edge, ...]:
    """Edges in the order the unit runs: by the first operation of a module, `:in` first."""
    order: dict[str, int] = {}
    for index, node in enumerate(unit.nodes):
        order[node.name] = index
        module = node.module
        while module:
            order.setdefault(module, index)
            module = module.rpartition(".")[0]

    def key(edge: Edge) -> tuple[int, int, str]:
        place = edge.at.partition(":")[0].partition("[")[0]
        return order.get(place, len(order)), place.count("."), edge.at

    return tuple(sorted(edges, key=key))


def _full_edge(path: str, at: str) -> str:
    """An edge's place in the model; `:in` alone is the unit's own."""
    return f"{path}{at}" if at.startswith(":") else f"{path}.{at}"


def _shortened(text: str, most: int = 200) -> str:
    return text if len(text) <= most else text[:most].rpartition(",")[0] + ", ..."
