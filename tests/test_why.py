"""Alternatives equal enumeration without the refused value; what binds is what it is said to be."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from enumerated import least_by_mesh
from test_search import searched
from tiny_models import EXAMPLES, with_memory

from cost_models.estimate import estimate_step, whole_step_ps
from cost_models.units import format_bytes, format_seconds
from ir.errors import UsageError
from planner import load
from planner.check import Checked, examine
from planner.decisions import Pins, Recompute
from planner.plan import Solver, make_plan
from planner.refused import lacks, parse_refused, refused_words, require_held
from planner.score import score_of
from planner.why import LEAST_GAIN, MOST_MEMORY, Alternative, Binding, Why
from planner.why_layer import layers
from planner.why_text import alternative_text, document, table_text

LLAMA = str(EXAMPLES / "llama.py")


def best_of(name, folder, **pins):
    """(the problem, the best plan as `plan why` reads it) of a case."""
    problem = searched(name, folder)
    costs, searcher = problem.costs, problem.searcher
    best = searcher.under(Pins(**pins)).run().best
    step = costs.step(best.decisions, best.assignments)
    made = estimate_step(costs, step, best.decisions)
    plan = make_plan(
        costs.graph, "h100x8", costs.cluster, costs.workload, best.decisions, {}, made, Solver()
    )
    checked = Checked(plan=plan, hardware=costs.cluster, estimate=made, inputs=(), stale=False)
    return problem, checked


REFUSED = [
    ("two", ["pp=1"]), ("four", ["dp=4"]), ("four", ["tp=1"]), ("four", ["zero=2"]),
    ("four", ["zero=1", "zero=2", "zero=3"]), ("tp", ["tp=2"]), ("both", ["cp=1"]),
    ("offload", ["offload=optimizer:cpu"]), ("two", ["micro_batch=1"]), ("moe, four", ["ep=1"]),
    ("eager, slow", ["pp=1", "schedule=1f1b"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "texts"), REFUSED)
def test_an_alternative_equals_enumeration(name, texts, tmp_path):
    problem, base = best_of(name, tmp_path)
    costs, searcher = problem.costs, problem.searcher
    refused = parse_refused(texts)
    found = Why(base).alternative(refused, 10**9)
    # without a pipeline a schedule is a formality, which is not refused
    least = [least_by_mesh(problem, refused)]
    if any(key == "schedule" for key, _ in refused):
        rest = tuple(row for row in refused if row[0] != "schedule")
        least.append(least_by_mesh(problem, rest, pp=1))
    scores = [score_of(x, m) for rows in least for m, x in rows.items() if x is not None]
    if not scores:
        assert found.estimate is None and found.binding.kind in ("memory", "rule")
        return
    d = found.decisions
    again = costs.step(d, searcher.assign(d.tp, d.sequence_parallel))
    made = estimate_step(costs, again, found.decisions)
    assert made.step_time_ps == found.estimate.step_time_ps and found.estimate.fits
    best = next(x for rows in least for m, x in rows.items()
                if x is not None and score_of(x, m) == min(scores))  # fmt: skip
    assert found.solver.status == "OPTIMAL"
    assert whole_step_ps(costs, best) == found.estimate.step_time_ps
    for key, value in refused:
        assert key == "schedule" or getattr(found.decisions, key) != value


def test_recomputation_is_refused_by_kind(tmp_path):
    *_, base = best_of("recompute", tmp_path, offload=())
    used = [bool(sum(n)) for n in zip(*base.plan.decisions.recompute)]
    assert any(used)
    for text, place in (("recompute=full", 0), ("recompute=selective:3", 1)):
        found = Why(base).alternative(parse_refused([text]), 10**9)
        if found.decisions is not None:
            assert not any(pair[place] for pair in found.decisions.recompute)
    every = Why(base).alternative(parse_refused(["recompute=none"]), 10**9).decisions
    assert all(sum(pair) == n for pair, n in zip(every.recompute, every.stages))
    assert every.schedule == "1f1b" or every.pp > 1


def test_an_optimizer_without_its_tier_lies_on_the_next(tmp_path):
    """Also where the search itself would not lay it there, as the refused one has room."""
    problem, base = best_of("offload", tmp_path)
    cpu = problem.costs.cluster.tier("cpu")
    slower = [
        replace(cpu, name=name, read_bytes_per_s=rate, write_bytes_per_s=rate)
        for name, rate in (("near", 5e10), ("far", 1e10))
    ]
    hardware = replace(base.hardware, tiers=(cpu, *slower))
    why = Why(replace(base, hardware=hardware))
    for away, tier in ((["cpu"], "near"), (["cpu", "near"], "far"), (["cpu", "far"], "near")):
        refused = parse_refused([f"offload=optimizer:{name}" for name in away])
        found = why.alternative(refused, 10**9)
        assert dict(found.decisions.offload) == {"optimizer": tier}
        assert found.estimate.fits and found.solver.status == "OPTIMAL"
    # a full cpu: the plan's own tier is refused, and not taken again
    full = replace(hardware, tiers=(replace(cpu, bytes=10 * 10**9), *slower))
    pinned = best_of("offload", tmp_path, offload=(("optimizer", "cpu"),))[1]
    decisions = replace(pinned.plan.decisions, offload=(("optimizer", "near"),))
    pinned = replace(pinned, plan=replace(pinned.plan, decisions=decisions), hardware=full)
    found = Why(pinned).alternative(parse_refused(["offload=optimizer:near"]), 10**9)
    assert found.decisions is not None and found.decisions.tiers.get("optimizer") != "near"


def test_memory_binds_where_more_of_it_gains(tmp_path):
    """The told plan is over by what is told, and would be quicker; else twice gains nothing."""
    seen = set()
    for name, text in (("tp", "tp=2"), ("both", "cp=2"), ("four", "dp=4"), ("recompute", "pp=2")):
        problem, base = best_of(name, tmp_path)
        found = Why(base).alternative(parse_refused([text]), 10**9)
        if found.estimate is None:
            continue
        b = found.binding
        seen.add(b.kind)
        memory = problem.costs.cluster.device.memory_bytes
        roomy = with_memory(problem.costs.cluster, int(MOST_MEMORY * memory))
        freed = Why(replace(base, hardware=roomy)).alternative(parse_refused([text]), 10**9)
        quicker = freed.estimate.step_time_s < found.estimate.step_time_s * (1 - 1 / LEAST_GAIN)
        if b.kind == "memory":
            assert b.over_bytes > 0 and b.step_s < found.estimate.step_time_s
            assert b.component_bytes > 0
        else:
            assert b.kind == "time" and not quicker
            old = dict(base.estimate.breakdown_ps)
            grown = {k: ps - old[k] for k, ps in found.estimate.breakdown_ps}
            assert b.more_s == max(grown.values()) / 1e12 == grown[b.component] / 1e12
    assert seen == {"memory", "time"}


def test_memory_that_binds_is_said_of_a_quicker_alternative(tmp_path):
    """Beside why it was not chosen, with the step that room would give; in the table in short."""
    *_, base = best_of("tp", tmp_path, zero=3)
    found = Why(base).alternative(parse_refused(["zero=3"]), 10**9)
    b = found.binding
    assert b.kind == "memory" and b.step_s < found.estimate.step_time_s
    assert found.estimate.step_time_s < base.estimate.step_time_s
    text = " ".join(alternative_text(base, found).split())
    over = f"pp rank {b.pp_rank} (stage {b.stage}) is {format_bytes(b.over_bytes)} over"
    assert "binding none: quicker by" in text and over in text
    assert f"then memory: with more it would take {format_seconds(b.step_s)};" in text
    short = " ".join(table_text(base, (found,)).split())
    assert f"; memory: rank {b.pp_rank} +{format_bytes(b.over_bytes)} ({b.component})" in short


def test_of_what_does_not_fit_the_step_is_said_and_whether_it_were_quicker(tmp_path):
    *_, base = best_of("recompute", tmp_path)
    found = Why(base).alternative(parse_refused(["micro_batch=1"]), 10**9)
    assert found.estimate is None and found.binding.kind == "memory"
    for seconds, said in ((1.25, ""), (0.75, ", quicker by 25.0%")):
        step_s = seconds * base.estimate.step_time_s
        row = replace(found, binding=replace(found.binding, step_s=step_s))
        text = " ".join(alternative_text(base, row).split())
        assert text.endswith(f"; the nearest would take {format_seconds(step_s)}{said}")


def test_what_is_not_searched_is_said_to_be(tmp_path):
    """bf16 gradients are quicker, and were no choice: not a matter of pins, constants or effort."""
    *_, base = best_of("four", tmp_path)
    found = Why(base).alternative(parse_refused(["grad_dtype=fp32"]), 10**9)
    assert found.estimate.step_time_ps <= base.estimate.step_time_ps
    text = " ".join(alternative_text(base, found).split())
    assert "grad_dtype is not searched unless a pin says so" in text
    assert max(map(len, alternative_text(base, found).splitlines())) <= 80


def test_a_rule_is_named(tmp_path):
    """One layer has no pipeline; no experts, no ep."""
    *_, base = best_of("four", tmp_path)
    found = Why(base).alternative(parse_refused(["ep=1"]), 50)
    assert found.estimate is None and found.binding.kind == "rule"
    assert "ep=2" in found.binding.reason and "experts" in found.binding.reason
    assert "nothing legal is left" in alternative_text(base, found)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["banana=2"], ["--not banana=2", "tp"]), (["tp=0"], ["--not tp=0"]),
        (["stages=1,2"], ["cannot be refused"]), (["place:a=R"], ["cannot be refused"]),
        (["recompute=none", "recompute=full", "recompute=selective"], ["every kind"]),
    ],
)  # fmt: skip
def test_what_cannot_be_refused(texts, words):
    with pytest.raises(UsageError) as fault:
        parse_refused(texts)
    for word in words:
        assert word in "\n".join(fault.value.lines())


@pytest.mark.parametrize(("text", "reason"), [
    ("formats=none", "formats: --precision allows one format"),
    ("shares=none", "shares: the hardware has one kind of GPUs"),
    ("tp_by_part=none", "tp_by_part: the hardware has one kind of GPUs"),
    ("dp_outer=1", "dp_outer: the hardware lists no levels"),
])  # fmt: skip
def test_what_has_no_other_value_here_says_why(text, reason, tmp_path):
    base = best_of("two", tmp_path)[1]
    found = Why(base).alternative(parse_refused([text]))
    assert found.estimate is None and found.binding.reason.startswith(reason)


@pytest.mark.parametrize(("text", "without"), [
    ("schedule=1f1b", "a pipeline"), ("virtual_stages=1", "a pipeline"), ("cp_kind=ring", "cp"),
    ("keep=default", "layers recomputed in part"),
])  # fmt: skip
def test_a_formality_is_not_refused(text, without, tmp_path):
    """The answer would be the plan itself, or one that is worse for no reason."""
    plan = best_of("two", tmp_path, pp=1, cp=1, recompute=Recompute())[1].plan
    with pytest.raises(UsageError) as fault:
        require_held(parse_refused([text]), plan.decisions, plan.graph, plan.workload)
    said = "\n".join(fault.value.lines())
    assert f"says nothing of a plan without {without}" in said and f"hint: --not {text}" not in said


def test_words_read_back():
    for texts in (
        ["tp=8"], ["offload=optimizer:cpu"], ["reshard=on"], ["recompute=full"],
        ["offload=params:nvme"], ["offload=none"],
    ):  # fmt: skip
        assert refused_words(parse_refused(texts)) == texts[0]


def test_of_an_offload_what_is_written_is_refused(tmp_path):
    """A pin of parameters has the optimizer beside them; their refusal speaks of them alone."""
    plan = best_of("offload", tmp_path)[1].plan
    refused = parse_refused(["offload=params:nvme"])
    below = replace(plan.decisions, offload=(("optimizer", "nvme"), ("params", "nvme")))
    require_held(refused, below, plan.graph, plan.workload)
    assert not lacks(below, refused, plan.graph, plan.workload)
    assert lacks(below.on("cpu", "params"), refused, plan.graph, plan.workload)


def test_the_command(plan, tmp_path):
    """Text of 80 columns, JSON, exit codes; answers repeat."""
    assert plan("trace", LLAMA, "--arg", "size=tiny", "--arg", "n_layers=4", "--hardware",
                "h100x4", "--global-batch", "16")[0] == 0  # fmt: skip
    base = examine(load(tmp_path / "plan.json"), Path())
    tp = base.plan.decisions.tp
    code, out, err = plan("why", "--not", f"tp={tp}")
    assert (code, err) == (0, "") and plan("why", "--not", f"tp={tp}")[1] == out
    assert all(len(line) <= 80 for line in out.splitlines()), out
    for word in (f"without tp={tp}: step", "binding", "where the step differs", "proof"):
        assert word in out
    code, out, _ = plan("why", "--not", f"tp={tp}", "--json")
    row = json.loads(out)["alternatives"][0]
    assert code == 0 and row["fits"] and row["decisions"]["tp"] != tp
    changes = sum(row["breakdown_change_s"].values())
    assert changes == pytest.approx(row["step_time_s"] - base.estimate.step_time_s, abs=1e-9)
    code, out, _ = plan("why", "--not", "ep=1")
    assert code == 3 and "nothing legal is left" in out
    code, out, _ = plan("why", "--not", "ep=1", "--json")
    assert code == 3 and json.loads(out)["alternatives"][0]["binding"]["kind"] == "rule"
    code, out, _ = plan("why")
    assert code == 0 and "first binding constraint" in out
    assert all(len(line) <= 80 for line in out.splitlines()), out
    assert plan("why", "--not", "tp=x")[0] == 64
    assert plan("why", "none.json")[0] == 1


def test_a_layer(plan, tmp_path):
    assert plan("trace", LLAMA, "--arg", "size=tiny", "--arg", "n_layers=4", "--hardware",
                "h100x4", "--global-batch", "16", "--fix", "tp=2",
                "--fix", "recompute=full:1")[0] == 0  # fmt: skip
    base = examine(load(tmp_path / "plan.json"), Path())
    (found,) = layers(base, "layers.0")
    assert found.level == "full" and len(found.ways) == 3
    fewer = next(way for way in found.ways if way.level == "none")
    plan("trace", LLAMA, "--arg", "size=tiny", "--arg", "n_layers=4", "--hardware", "h100x4",
         "--global-batch", "16", "--fix", "recompute=none", "-o", "none.json",
         *(f"--fix={key}={getattr(base.plan.decisions, key)}"
           for key in ("tp", "pp", "cp", "zero", "micro_batch", "shard")),
         f"--fix=sequence_parallel={'on' if base.plan.decisions.sequence_parallel else 'off'}",
         f"--fix=reshard={'on' if base.plan.decisions.reshard else 'off'}")  # fmt: skip
    other = examine(load(tmp_path / "none.json"), Path()).estimate
    if base.plan.decisions.pp == 1:
        assert fewer.step_s == other.step_time_s
        assert fewer.over_bytes == other.peak_memory_bytes - other.capacity_bytes
    assert any(name.startswith("layers.0.") and word != "R" for name, word in found.placements)
    assert layers(base, "norm")[0].ways == ()
    code, out, _ = plan("why", "--layer", "layers.0")
    assert code == 0 and "recompute full" in out and all(len(x) <= 80 for x in out.splitlines())
    code, out, _ = plan("why", "--layer", "layers.0", "--json")
    assert code == 0 and json.loads(out)["layer"]["stage"] == found.stage
    code, _, err = plan("why", "--layer", "layer.0")
    assert code == 64 and "layers.0" in err


def test_documents_are_whole(tmp_path):
    *_, base = best_of("both", tmp_path)
    rows = Why(base).rows()
    made = document(base, rows)
    assert made["schema"] == "why/1" and len(made["alternatives"]) == len(rows)
    assert {"pp", "tp", "cp", "zero", "micro_batch"} <= {row.refused[0][0] for row in rows}
    text = table_text(base, rows)
    assert all(len(line) <= 80 for line in text.splitlines()) and "..." not in text


@pytest.mark.parametrize(("name", "effort"), [
    ("both", 1), ("both", 3), ("recompute", 2), ("two", 1), ("four", 1),
])  # fmt: skip
def test_rows_do_not_contradict_each_other(name, effort, tmp_path):
    """No row's plan that has not what another row refuses is better than that row's, and what binds
    is of the plan that is shown."""
    *_, base = best_of(name, tmp_path)
    why = Why(base)
    rows = why.rows(effort)
    graph, workload = base.plan.graph, base.plan.workload
    made = [row for row in rows if row.estimate is not None]
    assert made
    for row in rows:
        for other in made:
            if not lacks(other.decisions, row.refused, graph, workload):
                continue
            assert row.estimate is not None
            scores = [score_of(r.estimate.step_time_ps, r.decisions) for r in (row, other)]
            assert scores[0] <= scores[1], (row.refused, other.refused)
        if row.estimate is None:
            continue
        assert lacks(row.decisions, row.refused, graph, workload)
        assert row.solver.status in ("OPTIMAL", "FEASIBLE") and row.solver.gap_ppm >= 0
        if row.binding.kind == "time":
            assert row.binding.step_s == row.estimate.step_time_s
        elif row.binding.kind == "memory":
            assert row.binding.step_s < row.estimate.step_time_s


def test_a_row_of_the_table_is_whole(tmp_path):
    """A long word stands above its figures, which keep their columns; a reason is folded."""
    *_, base = best_of("four", tmp_path)
    offload = (("optimizer", "cpu:6"), ("params", "cpu"), ("activations", "cpu:71"))
    reason = "tp=16 is not legal; heads: 8 are not split over 16 ranks, and " + "no more " * 12
    row = Alternative(
        refused=(("offload", offload),), binding=Binding(kind="rule", reason=reason.strip())
    )
    lines = table_text(base, (row,)).splitlines()
    head, figures = lines[3], lines[5]
    assert lines[4].strip() == "offload=optimizer:cpu:6,params:cpu,activations:cpu:71"
    assert figures.index("none") + len("none") == head.index("step") + len("step")
    assert all(len(line) <= 80 for line in lines)
    assert " ".join(" ".join(lines[5:]).split()) == f"none rule: {reason.strip()}"
