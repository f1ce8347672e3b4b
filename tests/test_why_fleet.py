"""Why, on hardware of several kinds: alternatives equal enumeration of every part, of replicas and
of pipelines over parts; what binds is what it is said to be."""

import itertools
import json
import re
from dataclasses import dataclass, replace

import pytest
from test_fleet import LLAMA, PAIR, PIPED, least_over_parts, over_parts, tiny_fleet
from test_shares import every_share
from tiny_models import graph_of, with_memory

from cost_models.estimate import estimate
from cost_models.fleet import Fleet
from cost_models.hardware import load_hardware
from planner.asking import roomier
from planner.check import Checked, examine
from planner.decisions import Pins, parse_pins
from planner.fleet_asking import FleetAsking
from planner.fleet_planning import _planned
from planner.fleet_search import FleetSearch, searchers
from planner.fleet_space import FleetSearcher
from planner.infeasible import Questions, explained
from planner.options import TraceOptions
from planner.outcome import Outcome, Tried
from planner.plan import load, recost
from planner.refused import parse_refused
from planner.report.sensitivity import sensitivity
from planner.score import objective_below
from planner.search import Searcher
from planner.share_space import ShareSearcher
from planner.why import LEAST_GAIN, MOST_MEMORY, Why
from planner.why_layer import layers
from planner.why_text import alternative_text
from planner.workload import Asked, resolve

EVERY = 10**9


def checked_of(graph, fleet, asked):
    """The best plan of a fleet, as `plan why` reads it, and its workload."""
    workload, _ = resolve(graph, fleet, asked, Pins())
    found = FleetSearch(fleet=fleet, workload=workload)
    for searcher in searchers(graph, fleet, workload, TraceOptions(model="", effort=EVERY)):
        found.search(searcher)
    assert found.best is not None
    plan, made = _planned(graph, "two", found, Pins())
    checked = Checked(plan=plan, hardware=fleet, estimate=made, inputs=(), stale=False)
    return checked, workload


def every_objective(searcher, fleet, refused):
    """(mesh, least objective) of each mesh of several parts without what is refused, by trying
    all."""
    if isinstance(searcher, FleetSearcher):
        return least_over_parts(over_parts(searcher, fleet), fleet, refused).items()
    left = [row for row in refused if row[0] != "microbatches"]  # a mesh's are a mean
    meshes = [m for m in searcher.meshes()
              if not any(getattr(m, key, None) == value for key, value in left)]  # fmt: skip
    scores = [(m, every_share(searcher, m, refused)) for m in meshes]
    return [(m, x if x is None else objective_below(x, m)) for m, x in scores]


@dataclass
class Enumerated:
    """In place of a search: all is tried; of one part alone, which test_why enumerates, by it."""

    searcher: Searcher
    fleet: Fleet
    refused: tuple

    @property
    def costs(self):
        return self.searcher.costs

    def run(self, known=None):
        if not isinstance(self.searcher, FleetSearcher | ShareSearcher):
            return self.searcher.run(known)
        best = known
        for mesh, least in every_objective(self.searcher, self.fleet, self.refused):
            if least is not None:
                one = Tried(decisions=mesh, assignments={}, objective_ps=least)
                best = one if best is None or one.score < best.score else best
        return Outcome(best=best, bound=best.score if best else 1 << 62)


CASES = [
    (2, ["recompute=none"]), (1, ["shares=none"]), (9, ["tp_by_part=none"]), (6, ["pp=2"]),
    (10, ["shares=quick:2,slow:1", "micro_batch=1"]), (3, ["microbatches=2", "tp=2"]),
]  # fmt: skip
OTHERWISE = {"shares": {"shares": ()}, "tp_by_part": {"tp_by_part": ()}}


@pytest.mark.parametrize(("seed", "texts"), CASES)
def test_an_alternative_equals_enumeration(seed, texts, tmp_path):
    graph, fleet, asked = tiny_fleet(seed, tmp_path)
    checked, workload = checked_of(graph, fleet, asked)
    refused = parse_refused(texts)
    found = Why(checked).alternative(refused, EVERY)
    pins = [row for key, value in refused if value for row in OTHERWISE.get(key, {}).items()]
    options = TraceOptions(model="", effort=EVERY, pins=replace(Pins(), **dict(pins)))
    expected = FleetSearch(fleet=fleet, workload=workload)
    for searcher in searchers(graph, fleet, workload, options, refused=refused):
        expected.search(Enumerated(searcher, fleet, refused))
    if expected.best is None:
        assert found.estimate is None and found.binding.kind in ("memory", "rule")
        return
    assert found.estimate.step_time_ps == expected.step_ps and found.estimate.fits
    proved = expected.bound_ps() >= expected.step_ps
    assert (found.solver.status == "OPTIMAL") == proved
    d = found.decisions
    assert not any(getattr(d, key) == value for key, value in refused if key != "schedule")
    if d.tp == 1:
        again = estimate(graph, fleet, workload, d, {})
        assert again.step_time_ps == found.estimate.step_time_ps


def test_memory_binds_on_the_part_that_is_over(tmp_path):
    """What is told to be over is over on its part, and quicker with so much more."""
    seen = set()
    for seed, text in ((2, "pp=2"), (8, "dp=1"), (10, "tp=1")):
        graph, fleet, asked = tiny_fleet(seed, tmp_path)
        checked, _ = checked_of(graph, fleet, asked)
        found = Why(checked).alternative(parse_refused([text]), EVERY)
        b = found.binding
        seen.add(b.kind)
        if found.estimate is None or b.kind == "rule":
            continue
        parts = tuple(roomier(part, MOST_MEMORY) for part in fleet.parts)
        freed = Why(replace(checked, hardware=replace(fleet, parts=parts)))
        quicker = freed.alternative(parse_refused([text]), EVERY).estimate.step_time_s
        gains = quicker < found.estimate.step_time_s * (1 - 1 / LEAST_GAIN)
        if b.kind == "memory":
            part = fleet.part(b.part)
            assert b.capacity_bytes == part.device.memory_bytes and b.over_bytes > 0
            assert b.step_s < found.estimate.step_time_s and gains
        else:
            assert b.kind == "time" and not gains
    assert seen == {"memory", "time", "rule"}


def test_the_command(plan, tmp_path):
    """One alternative, one layer: text of 80 columns, JSON with the part."""
    assert plan("trace", LLAMA, *PAIR, "--effort", "9")[0] == 0
    raw = json.loads((tmp_path / "plan.json").read_text())
    counts = {name: row["microbatches"] for name, row in raw["decisions"]["shares"].items()}
    words = "shares=" + ",".join(f"{name}:{n}" for name, n in counts.items())
    code, out, _ = plan("why", "--not", words, "--effort", "9", "--json")
    row = json.loads(out)["alternatives"][0]
    assert code == 0 and row["fits"] and "shares" not in row["decisions"]
    base = examine(load("plan.json"), tmp_path)
    text = alternative_text(base, Why(base).alternative(parse_refused(["zero=0"]), 1))
    assert "without zero=0: step" in text and all(len(x) <= 80 for x in text.splitlines()), text
    code, out, _ = plan("why", "--layer", "layers.0")
    assert code == 0 and "pp rank 0 of h100" in out and "pp rank 0 of a100" in out
    assert all(len(line) <= 80 for line in out.splitlines()), out
    found = json.loads(plan("why", "--layer", "layers.0", "--json")[1])
    assert [found["layer"]["part"], *(x["part"] for x in found["others"])] == ["h100", "a100"]


def test_a_layer_on_its_part_computed_again(plan, tmp_path):
    """What the step would be is what the plan so changed is costed at."""
    code, _, err = plan("trace", LLAMA, *PAIR, *PIPED,
                        "--fix", "schedule=1f1b", "--effort", "9")  # fmt: skip
    assert code == 0, err
    base = examine(load("plan.json"), tmp_path)
    d = base.plan.decisions
    last = len(d.stages) - 1
    (found,) = layers(base, f"layers.{sum(d.stages) - 1}")
    assert (found.part, found.stage) == (d.part_of_rank[last], last)
    way = next(w for w in found.ways if w.level == "full" != found.level)
    pairs = [*(d.recompute or ((0, 0),) * len(d.stages))]
    pairs[last] = (pairs[last][0] + 1, max(0, pairs[last][1] - (found.level == "selective")))
    made = recost(replace(base.plan, decisions=replace(d, recompute=tuple(pairs))), base.hardware)
    assert way.step_s == made.step_time_s
    over = max(rank.peak_bytes - rank.capacity_bytes for rank in made.ranks)
    assert way.over_bytes == over


def test_the_core_is_minimal():
    """By solving every subset of the pins on all parts; hints are plans that fit."""
    megabytes, texts = (8_000, 6_000), ["recompute=none", "offload=none"]
    parts = [with_memory(replace(load_hardware("h100x2"), name=name), 10**6 * size)
             for name, size in zip(("quick", "slow"), megabytes)]  # fmt: skip
    fleet = Fleet(name="two", parts=tuple(parts))
    graph = graph_of("llama", size="8b", n_layers=2)
    asked = Asked(engine="native", seq_len=2048, global_batch=4)
    workload, _ = resolve(graph, fleet, asked, Pins())
    asking = FleetAsking(graph=graph, fleet=fleet, workload=workload)

    def fits(words):
        answer = asking.ask(parse_pins(words), effort=EVERY)
        return answer is not None and answer.outcome.best is not None

    every = {kept: fits(kept) for n in range(len(texts) + 1)
             for kept in itertools.combinations(texts, n)}  # fmt: skip
    assert not every[tuple(texts)]
    pins = parse_pins(texts)
    core = Questions(asked=asking, pins=pins).core()
    words = tuple(t for t in texts if t in {c.said(pins) for c in core.pins})
    assert core.limits[0] == "memory" and core.hints and not every[words]
    assert all(every[tuple(w for w in words if w != one)] for one in words)
    assert bool(words) == every[()]
    answer = asking.ask(pins, effort=EVERY)
    fault = explained(asking, pins, answer.outcome, "", "")
    assert fault.what.startswith("no plan fits") and "binding: memory" in fault.why
    for hint in core.hints:
        assert float(re.search(r"([0-9.]+) GB a GPU", hint)[1]) <= max(megabytes) / 1000


def test_inputs_of_each_part_are_scaled(tmp_path):
    """An effect is the plan costed on hardware so changed; a flip puts another plan first there;
    memory is asked of each part that is used."""
    graph, fleet, asked = tiny_fleet(12, tmp_path)
    checked, workload = checked_of(graph, fleet, asked)
    d, shardings = checked.plan.decisions, checked.plan.sharding_by_unit
    why = Why(checked)
    rows = [why.alternative(parse_refused([text]), 50) for text in ("pp=2", "micro_batch=1")]
    found = sensitivity(checked, why, rows, 50)
    names = [e.name for e in found.effects]
    assert {"network bandwidth", "arithmetic rate of quick", "arithmetic rate of slow"} <= {*names}
    effect = next(e for e in found.effects if e.name == "arithmetic rate of slow")
    for factor, change in effect.changes:
        parts = tuple(
            part if part.name == "quick" else replace(part, device=replace(
                part.device, peak_flop_per_s=tuple(
                    (name, factor * rate) for name, rate in part.device.peak_flop_per_s)))
            for part in fleet.parts
        )  # fmt: skip
        made = estimate(graph, replace(fleet, parts=parts), workload, d, shardings)
        assert change == made.step_time_ps / checked.estimate.step_time_ps - 1
    assert [room.part for room in found.rooms] == [name for name, _ in d.parts]
    for room in found.rooms:
        ranks = [r.peak_bytes for r, part in zip(checked.estimate.ranks, d.part_of_rank)
                 if part == room.part]  # fmt: skip
        assert room.needs_bytes == max(ranks) <= room.capacity_bytes
        assert room.more is None or room.capacity_bytes < room.more_bytes
