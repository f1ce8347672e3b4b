"""What an estimate rests on, in words."""

from __future__ import annotations

from cost_models.chain import Chain
from cost_models.decisions import Decisions
from cost_models.offload import host_note, tier_notes
from cost_models.step import Costs
from ir.stacks import as_written, stacks

STATISTICS = ("samples", "median_error", "p90_error", "held_out_median_error")


def is_moe(chain: Chain) -> bool:
    """Whether some of the model's matmuls are of experts."""
    return any(n.op == "grouped_matmul" for link in chain.links for n in link.unit.nodes)


def statistic(name: str) -> bool:
    """Whether a constant's name is of a figure about its fit: nothing is computed from it."""
    return name.rpartition(".")[2] in STATISTICS


def assumptions_of(costs: Costs, d: Decisions) -> tuple[str, ...]:
    """What the user should know the numbers rest on."""
    engine = costs.engine
    notes = [*costs.graph.notes, *_stacks(costs)]
    notes += [
        f"{c.name}: {c.source}" for c in costs.kernels.provenance()
        if any(w in c.source for w in ("assumed", "transferred")) and not statistic(c.name)
    ]  # fmt: skip
    notes += [f"{key}: {text}" for key, text in engine.sources if text.startswith("assumed")]
    if d.offload:
        notes += [host_note(costs.cluster), *tier_notes(costs.cluster, d)]
    if is_moe(costs.chain):
        notes.append(_expert_load(costs.workload.expert_imbalance, d.ep))
    return tuple(dict.fromkeys(notes))


def _stacks(costs: Costs) -> list[str]:
    """Of forwards that multiply every token with every expert: what the engine does instead, or
    that it does so too."""
    graph, engine, found = costs.graph, costs.engine, list[str]()
    for experts, own in dict.fromkeys(s for u in as_written(graph).units for s in stacks(u)):
        written = f"experts: the model's forward multiplies every token with all {experts} experts"
        source = dict(engine.sources)["routes_experts"]
        if graph.written is not None:
            found.append(f"{written}; {engine.name} with its own {own} alone ({source})")
        else:
            found.append(
                f"{written}, of which {own} of a token's own count, and is costed as it is written"
                f" ({source if not engine.routes_experts else 'not read as routed experts'})"
            )
    return found


def _expert_load(imbalance: float, ep: int) -> str:
    """imbalance: of the busiest ep rank over the mean; 1 is none (`Workload`)."""
    if imbalance == 1:
        return "expert load: balanced, every expert gets the same number of rows"
    if ep == 1:
        return (f"expert load: every rank has all experts (ep 1), where an imbalance of"
                f" {imbalance:g} between ranks is none")  # fmt: skip
    return f"expert load: the busiest of {ep} expert ranks gets {imbalance:g} times the mean"
