"""Pipelines over parts on local ranks, and with another tp on each: what goes over the border."""

import itertools
import json
from collections import Counter
from dataclasses import replace

import pytest
import runtime_cases_checkpoint as checkpoints
import runtime_cases_weights as weights
import test_runtime_pipeline as pipelines
import test_verify_ledger as ledgers
from tiny_models import EXAMPLES

from cost_models.borders import busiest_bytes, messages, pieces
from cost_models.decisions import Decisions, Workload
from cost_models.fleet import load_any
from ir.errors import UsageError
from planner import trace
from planner.decisions import parse_pins
from planner.legality import tp_fault
from planner.pin_checks import check_pins
from planner.plan import load, recost
from planner.runtime.lines import lines
from planner.runtime.verify import scale

LLAMA = str(EXAMPLES / "llama.py")


def test_every_taker_gets_its_own_part_and_nothing_twice():
    for givers, takers in itertools.product((1, 2, 4, 8), repeat=2):
        held = {g: range(g * 8 // givers, (g + 1) * 8 // givers) for g in range(givers)}
        got = {t: [None] * (8 // takers) for t in range(takers)}
        given, taken = Counter(), Counter()
        for x in pieces(givers, takers, 8):
            assert x.of[1] == x.into[1]
            for i in range(x.of[1]):
                assert got[x.taker][x.into[0] + i] is None
                got[x.taker][x.into[0] + i] = held[x.giver][x.of[0] + i]
            given[x.giver] += x.of[1]
            taken[x.taker] += x.of[1]
        assert [i for t in got for i in got[t]] == list(range(8))
        each, most = messages(givers, takers, 800, True)
        assert each * most == 100 * max(given.values())
        assert busiest_bytes(givers, takers, 800, True) == 100 * max((*given.values(),
                                                                      *taken.values()))  # fmt: skip
        whole = Counter(x.giver for x in pieces(givers, takers, None))
        assert sorted(x.taker for x in pieces(givers, takers, None)) == list(range(takers))
        assert messages(givers, takers, 800, False) == (800, max(whole.values()))
        assert busiest_bytes(givers, takers, 800, False) == 800 * max(whole.values())


THREE = {"parts": (("a", 1), ("b", 1)), "tp_by_part": (("a", 1), ("b", 2)), "tp": 2, "pp": 2,
         "stages": (2, 2)}  # fmt: skip


def test_ranks_lie_part_by_part():
    d = Decisions(**THREE | {"dp": 2})
    assert (d.gpus, d.tp_of_rank) == (6, (1, 2))
    assert lines(d) == (((0,), (2, 3)), ((1,), (4, 5)))
    assert [d.at_pp_rank(r).tp for r in (0, 1)] == [1, 2] and d.alone("b").gpus == 4


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({}, None), ({"tp": 1}, "largest"), ({"tp_by_part": (("b", 2), ("a", 1))}, "order"),
        ({"tp_by_part": (("a", 2), ("b", 2))}, "same"), ({"ep": 2}, "experts"),
        ({"tp_by_part": (("a", 2), ("b", 3)), "tp": 3}, "divide"),
    ],
)  # fmt: skip
def test_what_parts_may_have(changed, word):
    fault = tp_fault(Decisions(**THREE | changed))
    assert fault is None if word is None else word in fault


@pytest.mark.parametrize(
    ("pins", "word"),
    [
        (("tp_by_part=a:1,b:2", "tp=2"), "every stage"), (("tp_by_part=a:2,b:2",), "one tp"),
        (("tp_by_part=a:2,b:3",), "divide"), (("tp_by_part=a:1,b:2", "cp=2"), "share a sequence"),
        (("tp_by_part=a:1,b:2", "shares=a:1,b:2"), "reduced rank by rank"),
    ],
)  # fmt: skip
def test_pins_that_contradict_it(pins, word):
    workload = Workload(engine="native", global_batch=12, seq_len=16)
    with pytest.raises(UsageError) as caught:
        check_pins(parse_pins(pins), workload, gpus=12)
    assert word in "\n".join(caught.value.lines())


# --- running -----------------------------------------------------------------------------------


def planned(hardware, *fix):
    """A plan of the small model whose parts have these tps, in fp32."""
    model, loss = pipelines.cases.example("llama")
    return trace(
        model, pipelines.inputs, loss=loss, hardware=hardware, seq_len=16, global_batch=8,
        precision="fp32", engine="native", fix=fix,
    )  # fmt: skip


def test_a_pipeline_over_parts_gives_the_gradients_of_the_whole_model(world):
    """Two stages on one kind and one on the other; then two data ranks a stage."""
    fix = ("tp=1", "cp=1", "schedule=1f1b")
    three = planned("h100x2+a100x1", *fix, "pp=3", "micro_batch=2")
    assert sorted(three.decisions.parts) == [("a100", 1), ("h100", 2)]
    pipelines.run(world, 3, [("llama", three)])
    four = planned("h100x2+a100x2", *fix, "pp=2", "zero=1", "micro_batch=1", "stages=3,1")
    assert [n for _, n in four.decisions.parts] == [1, 1] and four.decisions.dp == 2
    pipelines.run(world, 4, [("llama", four)])


def test_a_step_is_that_of_the_whole_model_and_sends_what_the_ledger_says(world):
    """Two stages of two tp ranks and one of one, the sequence split and not, either order, on two
    kinds and in two groups of one; the bytes of every message of the rank that sends most."""
    fix = ("tp_by_part=h100:2,a100:1", "micro_batch=2", "recompute=none")
    plans = [planned("h100x4+a100x1", *fix, f"sequence_parallel={word}", f"schedule={schedule}")
             for word, schedule in (("on", "1f1b"), ("off", "zbh1"))]  # fmt: skip
    d = plans[1].decisions
    assert d.gpus == 5 and sorted(d.tp_by_part) == [("a100", 1), ("h100", 2)]
    first = plans[0].decisions
    turned = replace(d, parts=first.parts[::-1], tp_by_part=first.tp_by_part[::-1])
    plans[1] = replace(plans[1], decisions=turned)
    alike = ("tp_by_part=h100:2,h100#2:1", *fix[1:], "sequence_parallel=on", "schedule=gpipe")
    plans.append(planned("h100x4+h100x1", *alike))
    assert dict(plans[2].decisions.tp_by_part) == {"h100": 2, "h100#2": 1}
    found = world.run(5, pipelines.cases.compare_and_count, [("llama", plan) for plan in plans])
    for i, plan in enumerate(plans):
        for ranks in found:
            assert all(ranks[i][0][key] <= most for key, most in pipelines.EXACT.items())
        estimate = recost(plan, load_any(plan.hardware))
        for stage, rank in zip(lines(plan.decisions)[0], estimate.ranks):
            planned_of = Counter()
            for row in rank.collectives:
                planned_of.update({row.size_bytes: row.count} if row.kind == "p2p" else {})
            most = max((found[r][i][1] for r in stage), key=lambda sent: sum(sent.values()))
            assert most == planned_of


def test_data_ranks_share_state_on_each_part(world):
    plan = planned("h100x2+a100x4", "tp_by_part=h100:1,a100:2", "dp=2", "zero=1",
                   "sequence_parallel=on", "micro_batch=2")  # fmt: skip
    assert (plan.decisions.pp, plan.decisions.shard, plan.decisions.gpus) == (2, 2, 6)
    pipelines.run(world, 6, [("llama", plan)])


def test_a_checkpoint_is_restored_by_stages_of_other_shapes(world, tmp_path):
    """Weights drawn by part are those of any mesh; training goes on where the parts are turned."""
    folder = str(tmp_path / "checkpoint")
    base = weights.planned("llama", pp=2, tp=2)
    layers = len(base.graph.layers)
    d = replace(base.decisions, **THREE | {"stages": (1, layers - 1)})
    turned = replace(d, tp_by_part=(("a", 2), ("b", 1)))
    case = (checkpoints.trained, "llama")
    (expected, _), = world.run(1, *case, weights.planned("llama"), range(2), None, None)
    first, then = (replace(base, decisions=each) for each in (d, turned))
    before, _ = world.run(3, *case, first, range(1), None, folder)[0]
    after, _ = world.run(3, *case, then, range(1, 2), folder, None)[0]
    assert before + after == pytest.approx(expected, rel=1e-6)


def test_the_ledger_is_what_ranks_hold_and_send():
    """At full size, of the first rank of a stage on each part; one stage talks to both."""
    plan, found = ledgers.assert_as_planned(
        "llama", "h100x8+a100x8", "tp_by_part=h100:4,a100:2 sequence_parallel=on zero=1 dp=2"
        " recompute=none micro_batch=4",
    )  # fmt: skip
    sizes = {(row.pp_rank, row.size_bytes) for row in found.rows if row.what == "p2p"}
    assert plan.decisions.pp == 3 and {rank for rank, _ in sizes} == {0, 1, 2}


# --- commands ----------------------------------------------------------------------------------

TINY = ("--arg", "size=8b", "--arg", "n_layers=3", "--global-batch", "8", "--seq-len", "2048")
PARTS = ("--hardware", "h100x8+a100x8", "--fix", "tp_by_part=h100:2,a100:4")


def test_groups_of_one_kind_have_a_tp_each(plan, tmp_path):
    groups = ("--hardware", "h100x16+h100x8", "--fix", "tp_by_part=h100:4,h100#2:2")
    assert plan("trace", LLAMA, *groups, *TINY)[0] == 0
    d = load(str(tmp_path / "plan.json")).decisions
    assert dict(d.tp_by_part) == {"h100": 4, "h100#2": 2} and d.gpus == 24
    shown = plan("show")[1]
    assert "8 h100#2: stage" in shown and "16 h100: stage" in shown and ", tp 4" in shown
    assert plan("check")[0] == 0 and plan("show", "--stage", "0")[0] == 0
    code, _, err = plan("export", "--to", "megatron")
    assert code == 1 and "tp_by_part" in err


def test_it_is_planned_written_read_shown_and_refused(plan, tmp_path):
    assert plan("trace", LLAMA, *PARTS, *TINY)[0] == 0
    path = tmp_path / "plan.json"
    raw, d = json.loads(path.read_text()), load(str(path)).decisions
    assert raw["decisions"]["tp"] == 4 and raw["decisions"]["tp_by_part"] == dict(d.tp_by_part)
    assert dict(d.tp_by_part) == {"h100": 2, "a100": 4} and d.gpus == 16
    stages = dict(d.parts)
    assert stages == {"h100": 4 // d.dp, "a100": 2 // d.dp}
    shown = plan("show")[1]
    assert "8 h100: stage" in shown and ", tp 2" in shown and ", tp 4" in shown
    assert plan("check")[0] == 0
    found = recost(load(str(path)), load_any("h100x8+a100x8"))
    assert sum(ps for _, ps in found.breakdown_ps) == found.step_time_ps and found.gpus == 16
    code, _, err = plan("export", "--to", "megatron")
    assert code == 1 and "tp_by_part" in err
    text = path.read_text()
    for old, new, word in (
        ('"h100": 2', '"h100": 0', "tp_by_part.h100"), ('"h100": 2', '"h100": 4', "same"),
        ('"h100": 2', '"b200": 2', "name"), ('"h100": 2', '"h100": 1', "h100"),
    ):
        assert old in text
        path.write_text(text.replace(old, new))
        code, _, err = plan("check")
        assert code == 1 and word in err, err


@pytest.mark.parametrize(
    ("model", "words", "said"),
    [
        ("llama.py", ("--hardware", "h100x16", *PARTS[2:]), "several kinds"),
        ("llama.py", (*PARTS[:3], "tp_by_part=h100:2,b200:4"), "b200"),
        ("llama.py", (*PARTS[:3], "tp_by_part=h100:2"), "one part"),
        ("llama.py", (*PARTS, "--engine", "megatron"), "as many ranks"),
        ("gpt.py", PARTS, "several stages hold one parameter"),
        ("moe.py", PARTS, "experts lie over all ranks"),
    ],
)
def test_what_it_is_not_for(plan, model, words, said):
    size = ("--global-batch", "8", "--seq-len", "128")
    code, _, err = plan("trace", str(EXAMPLES / model), *words, *size)
    assert code == 64 and said in err, err


def test_a_twin_keeps_the_kinds_of_tp():
    """Two stages, the least tp 1 only where the plan's is; the axes alone are of one tp."""
    d = replace(
        Decisions(**THREE), parts=(("a", 4), ("b", 2), ("c", 2)), pp=8, dp=4, zero=1, shard=4,
        stages=(1,) * 8, recompute=((0, 0),) * 8, microbatches=16, sequence_parallel=True,
    )  # fmt: skip
    workload = Workload(engine="native", global_batch=64, seq_len=32)
    for tps, gpus, small in (((1, 8, 2), 6, (1, 2)), ((8, 2, 4), 12, (4, 2))):
        whole = replace(d, tp=8, tp_by_part=tuple(zip("abc", tps)))
        assert tp_fault(whole) is None
        found, work = scale.smallest(whole, workload, 4, 32, 32, lambda *_: None)
        assert (found.gpus, found.tp_of_rank, found.tp) == (gpus, small, max(small))
        assert [name for name, _ in found.parts] == ["a", "b"] and found.dp == 2
        assert any("two" in note for note in scale.lost(whole, found)) and work.global_batch
        alone = scale.only(whole, ("dp", "tp"))
        assert alone.tp_by_part == () and alone.tp == 8
