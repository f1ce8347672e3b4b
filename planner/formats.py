"""Which formats a layer's matmuls may be in: what the user allows and model, engine and device do.

Formats are one decision of the whole model, by group of matmuls. They are searched among what
`--precision bf16,fp8` allows beside the precision: fewer bits lose digits, which no cost knows.
"""

from __future__ import annotations

import functools
import itertools

from cost_models.chain import chain_of
from cost_models.decisions import Workload
from cost_models.engines import load_engine
from cost_models.formats import GROUPS, NARROW, Formats, groups_in
from cost_models.hardware import Cluster
from ir.errors import UsageError
from ir.graph import Graph
from planner.decisions import WHOLE


@functools.lru_cache(maxsize=64)
def _groups(graph: Graph) -> tuple[str, ...]:
    return groups_in(link.unit for link in chain_of(graph).links if link.is_layer)


def settled(formats: Formats, graph: Graph, workload: Workload) -> Formats:
    """What is said of the groups that the model has, where it is not the precision."""
    said, has = dict(formats), _groups(graph)
    return tuple(
        (group, said[group]) for group in GROUPS
        if group in said and group in has and said[group] != workload.precision
    )  # fmt: skip


def format_ways(graph: Graph, workload: Workload, pinned: Formats | None) -> tuple[Formats, ...]:
    """Every choice of formats that the search has: the pinned one, or all that is allowed, those
    with the most narrow groups first."""
    if pinned is not None:
        return (settled(pinned, graph, workload),)
    words = (workload.precision, *workload.allowed_formats)
    groups = _groups(graph)
    found = [
        settled(tuple(zip(groups, chosen)), graph, workload)
        for chosen in itertools.product(words, repeat=len(groups))
    ]
    legal = [way for way in found if fault(way, graph, workload) is None]
    return tuple(sorted(legal, key=lambda way: -len(way)))


def fault(formats: Formats, graph: Graph, workload: Workload) -> tuple[str, str] | None:
    """Why the engine does not run these formats of the model, and what would fix it; None: it
    does. formats: as `settled`."""
    engine = load_engine(workload.engine)
    said = dict(formats)
    narrow = {group: word for group, word in formats if word in NARROW}
    if not said:
        return None
    if workload.precision not in ("bf16", *NARROW):
        return (
            f"8-bit and 4-bit matmuls are given bf16 values, and --precision is"
            f" {workload.precision}", "--precision bf16",
        )  # fmt: skip
    wide = [word for word in said.values() if word not in NARROW and word != "bf16"]
    if wide:
        return (
            f"{wide[0]} has the bytes and the speed of bf16, and needs a cast of every value and"
            " scaled losses", f"--precision {wide[0]} for the whole plan",
        )  # fmt: skip
    for group, word in narrow.items():
        if word not in engine.formats or group not in engine.format_groups:
            runs = f"{', '.join(engine.formats)} in {', '.join(engine.format_groups)}"
            return (
                f"--engine {engine.name} does not run {group} in {word}"
                + (f"; it runs {runs}" if engine.formats else ""),
                "formats=none, or --engine torchtitan",
            )  # fmt: skip
    base = dict.fromkeys(_groups(graph), workload.precision)
    if not engine.formats_apart and len(set((base | said).values())) > 1:
        word = next(iter(said.values()))
        return (
            f"--engine {engine.name} has one format for all matmuls of its layers",
            f"formats={WHOLE}:{word}",
        )  # fmt: skip
    return None


def check_formats(
    formats: Formats | None, graph: Graph, cluster: Cluster, workload: Workload
) -> None:
    """Raise UsageError where what is pinned, or allowed, cannot be run."""
    for word in workload.allowed_formats:
        if not any(word in dict(w).values() for w in format_ways(graph, workload, None)):
            every = tuple((group, word) for group in _groups(graph))
            why, fix = fault(every, graph, workload) or ("the model has no matmuls in layers", "")
            raise UsageError(f"--precision {workload.precision},{word} allows what cannot be run",
                             why=why, hints=(fix,) if fix else ())  # fmt: skip
    if formats is None:
        return
    said = "--fix formats=" + ",".join(f"{group}:{word}" for group, word in formats)
    missing = [group for group, _ in formats if group not in _groups(graph)]
    if missing and len(formats) < len(GROUPS):
        raise UsageError(f"{said}: the model has no {missing[0]}",
                         why=f"its layers have {', '.join(_groups(graph)) or 'none'}")
    own = settled(formats, graph, workload)
    found = fault(own, graph, workload)
    if found:
        raise UsageError(f"{said} cannot be run", why=found[0], hints=(found[1],))
    for _, word in own:
        cluster.device.peak(word)

