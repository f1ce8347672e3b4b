"""The tensor-parallel layout that engines have of a transformer, to compare a plan's with.

Megatron-LM, torchtitan, DeepSpeed's AutoTP and the serving engines split the matrices that read a
layer's input by columns and those behind them by rows (arXiv:1909.08053). A plan may have another
layout where the per-op program found one that costs less.
"""

from __future__ import annotations

from ir.errors import PlanError
from ir.graph import Graph, full_name
from planner.names import fold
from planner.plan import Plan

_WORDS = {"column": "S(0)", "row": "S(1)"}


def classic(graph: Graph) -> dict[str, dict[str, str]]:
    """Of every unit class, the placement of its matrices on tp; others (norms, keys and values,
    embeddings) are left out. Raises PlanError for a model that is not read so."""
    from cost_models.serving_reading import parts_of  # numpy, which completion of words needs not

    return {
        unit: {name: _WORDS[part.split] for name, part in parts.items()
               if part.block and part.split in _WORDS}
        for unit, parts in parts_of(graph).items()
    }  # fmt: skip


def classic_places(graph: Graph) -> tuple[tuple[str, str], ...]:
    """The same as (pattern of parameters, placement) pairs."""
    from cost_models.chain import chain_of

    links = chain_of(graph).links
    found: list[tuple[str, str]] = []
    for unit, words in classic(graph).items():
        paths = [link.path for link in links if link.unit.name == unit]
        for name, word in words.items():
            found += [(pattern, word) for pattern in fold([full_name(p, name) for p in paths])]
    return tuple(found)


def differs(plan: Plan) -> str:
    """Which matrices the plan lays out otherwise; empty where none, or where tp is 1."""
    if plan.decisions.tp == 1:
        return ""
    try:
        expected = classic(plan.graph)
    except PlanError as fault:
        return f"the layout could not be compared: {fault.what}"
    from cost_models.chain import chain_of

    found: list[str] = []
    for unit, sharding in plan.shardings:
        paths = [link.path for link in chain_of(plan.graph).links if link.unit.name == unit]
        for name, word in sharding.parameters:
            engine = expected.get(unit, {}).get(name, word)
            if engine != word:
                patterns = fold([full_name(path, name) for path in paths])
                found += [f"{pattern} {word}, the engine {engine}" for pattern in patterns]
    if not found:
        return ""
    more = f"; {len(found) - 4} more" if len(found) > 4 else ""
    return "the plan has " + "; ".join(found[:4]) + more
