"""Which operations recomputation in part may keep: what a search tries."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from cost_models.decisions import Decisions, Keep
from cost_models.formats import Formats
from cost_models.keeping import Way, ladder, offers_ops
from cost_models.step import Assignments, Costs
from cost_models.work import Axes


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
