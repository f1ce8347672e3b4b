"""Twins keep a plan's kinds, compute what the model does, and say so where they do not."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from cost_models.decisions import Decisions, Workload
from cost_models.schedule import schedule_illegal
from ir.errors import GateError, PlanError, UsageError
from planner import cli
from planner.console import run
from planner.legality import VIRTUAL_STAGES, illegal, inconsistent
from planner.runtime.verify import scale
from planner.runtime.verify.compare import Compared, Number, Part, RankFound, Whole, together
from planner.runtime.verify.sample import draw_batch, draw_constants, ties, without_dropout

pytestmark = pytest.mark.usefixtures("world")  # whose server forks the workers of `plan verify`

# --- the smaller mesh ---------------------------------------------------------------------------


def small(d: Decisions, layers: int = 8, limit: int = 32) -> Decisions:
    d = replace(d, stages=d.stages or (layers // (d.pp * d.virtual_stages),) * (
        d.pp * d.virtual_stages))  # fmt: skip
    workload = Workload(engine="native", seq_len=4096,
                        global_batch=d.dp * d.micro_batch * d.microbatches)  # fmt: skip
    found = scale.smallest(d, workload, layers, 32, limit, lambda d, w: None)
    assert not isinstance(found, str), found
    assert inconsistent(*found, layers=layers) is None and illegal(*found) is None
    return found[0]


@pytest.mark.parametrize(
    ("plan", "mesh"),
    [
        ({"dp": 64, "zero": 3, "shard": 64}, (1, 2, 1, 1, 2)),
        ({"dp": 64, "zero": 0, "shard": 1}, (1, 2, 1, 1, 1)),
        ({"dp": 64, "zero": 3, "shard": 8}, (1, 4, 1, 1, 2)),  # HSDP: 2 x 2
        ({"tp": 8}, (1, 1, 1, 2, 1)),
        ({"pp": 8, "dp": 2, "tp": 4, "zero": 1, "shard": 2, "microbatches": 16}, (2, 2, 1, 2, 2)),
        ({"cp": 4, "dp": 8, "zero": 2, "shard": 32}, (1, 2, 2, 1, 4)),
        ({"cp": 4, "dp": 8, "zero": 2, "shard": 8}, (1, 2, 2, 1, 2)),
        ({"dp": 64, "ep": 8, "zero": 1, "shard": 64}, (1, 4, 1, 1, 4)),  # experts replicated: edp 2
        ({"dp": 8, "ep": 8, "zero": 1, "shard": 8}, (1, 2, 1, 1, 2)),  # and not: edp 1
        ({"dp": 8, "tp": 4, "ep": 4, "etp": 2, "zero": 1, "shard": 8}, (1, 4, 1, 2, 4)),
    ],
)
def test_an_axis_becomes_two_and_kinds_are_kept(plan, mesh):
    """mesh: pp, dp, cp, tp, shard."""
    found = small(Decisions(compile=False, **plan))
    assert (found.pp, found.dp, found.cp, found.tp, found.shard) == mesh
    whole = Decisions(**plan)
    assert (found.ep > 1, found.etp > 1) == (whole.ep > 1, whole.etp > 1)
    assert (found.edp > 1) == (whole.edp > 1)


@pytest.mark.parametrize("schedule", list(VIRTUAL_STAGES))
def test_schedules_keep_their_stages_and_enough_microbatches(schedule):
    virtual = VIRTUAL_STAGES[schedule][0] * (2 if schedule == "interleaved" else 1)
    d = Decisions(pp=4, dp=2, microbatches=16, schedule=schedule, virtual_stages=virtual,
                  compile=False, stages=(4,) * (4 * virtual))  # fmt: skip
    found = small(d)
    assert found.pp == 2 and found.virtual_stages == min(2, virtual)
    assert found.schedule == schedule and len(found.stages) == 2 * found.virtual_stages
    assert schedule_illegal(schedule, 2, found.microbatches, found.virtual_stages) is None
    assert found.microbatches == 4


@pytest.mark.parametrize(
    ("stages", "count", "layers", "cut"),
    [
        ((8, 8), 2, 4, (2, 2)),
        ((8, 7), 2, 4, (3, 1)),
        ((7, 8), 2, 4, (1, 3)),
        ((9, 9, 9, 8), 2, 5, (3, 2)),
        ((4, 4, 4, 4), 4, 4, (1, 1, 1, 1)),
        ((32,), 1, 4, (4,)),
        ((8, 9, 9, 8), 4, 5, (1, 2, 1, 1)),
    ],
)
def test_uneven_stages_stay_uneven(stages, count, layers, cut):
    assert scale.cut_stages(stages, count, layers) == cut


def test_kinds_of_recomputation_stay():
    d = Decisions(pp=2, stages=(8, 8), recompute=((8, 0), (2, 3)))
    assert scale.least_layers(d) == 6
    assert scale.cut_recompute(d, (3, 3)) == ((3, 0), (1, 1))
    between = Decisions(pp=4, stages=(4,) * 4, recompute=((0, 0), (4, 0), (0, 0), (0, 0)))
    assert scale.cut_recompute(between, (2, 2)) == ((1, 0), (0, 0))
    assert scale.lost(d, replace(d, stages=(1, 1), recompute=((1, 0), (1, 0)))) == (
        "no layer of the twin has recompute none",
        "no layer of the twin has recompute selective",
    )


def test_more_than_32_processes_become_pairs_of_axes():
    d = Decisions(pp=2, dp=16, cp=2, tp=4, zero=3, shard=4, microbatches=8, stages=(4, 4),
                  recompute=((2, 0), (0, 1)), sequence_parallel=True, compile=False)  # fmt: skip
    pairs = scale.pairs(d)
    assert len(pairs) == 6
    for part in pairs:
        ones = [getattr(part, axis) for axis in scale.AXES]
        assert sum(n > 1 for n in ones) == 2
        assert small(part).gpus <= 8
        assert part.sequence_parallel == (part.tp > 1)


def test_every_twin_is_of_the_plans_kind():
    for pp, dp, cp, tp, ep, shard in itertools.product((1, 2, 4, 8), repeat=6):
        if (dp * cp * tp) % ep or (dp * cp) % shard:
            continue
        d = Decisions(pp=pp, dp=dp, cp=cp, tp=tp, ep=ep, shard=shard, zero=1 if shard > 1 else 0,
                      microbatches=2 * pp, stages=(2,) * pp, compile=False)  # fmt: skip
        workload = Workload(engine="native", seq_len=64, global_batch=dp * 2 * pp)
        found = scale.smallest(d, workload, 4, 32, 32, lambda d, w: None)
        assert not isinstance(found, str), (d, found)
        twin = found[0]
        for axis in ("pp", "dp", "cp", "tp", "ep", "edp"):
            assert (getattr(twin, axis) > 1) == (getattr(d, axis) > 1)
        assert (twin.shard > 1, twin.shard < twin.dp * twin.cp) == (shard > 1, shard < dp * cp)
        assert twin.gpus <= min(32, d.gpus)


# --- what it computes with ----------------------------------------------------------------------


class Drops(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 16)
        self.attention_dropout = 0.5
        self.dropout = nn.Dropout(0.5)
        self.out = nn.Linear(16, 5)
        self.gate = nn.Parameter(torch.zeros(16))

    def forward(self, ids):
        return self.out(self.dropout(self.table(ids)) * (1 + self.gate))


def test_nothing_is_dropped_and_no_gate_stays_zero():
    model = Drops()
    without_dropout(model)
    draw_constants(model, 0)
    ids = torch.arange(7)
    assert torch.equal(model(ids), model(ids)) and model.attention_dropout == 0.0
    assert float(model.gate.detach().std()) > 0


def test_integers_stay_below_their_table_and_targets_below_the_classes():
    ids = torch.zeros(64, 9, dtype=torch.long)
    kept = torch.arange(9).expand(64, 9)
    model = Drops()
    batch, targets = draw_batch(
        model, {"ids": ids}, None, lambda out, y: nn.functional.cross_entropy(
            out.flatten(0, 1), y.flatten()), 3)  # fmt: skip
    assert batch["ids"].max() == 6 and batch["ids"].min() == 0
    assert targets.shape == (64, 9) and targets.max() == 4
    again, _ = draw_batch(model, (kept.fmod(7),), torch.zeros(64, 9), lambda o, y: o.sum(), 3)
    assert torch.equal(again[0], kept.fmod(7)), "what the file drew stays"


def test_near_ties_are_counted():
    clear = torch.tensor([[3.0, 2.0, 1.0], [1.0, 3.0, 2.5]])
    with ties() as found:
        clear.topk(2, dim=-1)
        torch.topk(clear, 1)
        clear.argmax(dim=-1)
    assert found.near == 0
    near = torch.tensor([[3.0, 2.0, 2.0 - 1e-6], [1.0, 3.0, 2.5]])
    with ties() as found:
        near.topk(2, dim=-1)
        near.topk(1)  # the tie is not at the boundary of this choice
    assert found.near == 1


# --- what is compared ---------------------------------------------------------------------------


def part(name="a", offsets=(0,), sizes=(4,), gradient=0.0, parameter=0.0) -> Part:
    return Part(name=name, offsets=offsets, sizes=sizes, gradient=gradient, parameter=parameter)


def rank_found(*parts, **changes) -> RankFound:
    given = {
        "numbers": (Number(what="loss", ours=1.0, theirs=1.0),),
        "wholes": (Whole(name="a", elements=4, gradient=1.0, parameter=2.0),),
        "parts": parts or (part(),), "replicated": (), "loose_edges": (), "uncompiled": (),
        "seed": 0, "seconds": 0.1,
    }  # fmt: skip
    return RankFound(**{**given, **changes})


def test_a_tensors_error_is_over_all_its_parts():
    first, second = (part(offsets=(at,), sizes=(2,), gradient=9e-10) for at in (0, 2))
    assert together([rank_found(first)] * 2).missing == ("a",), "copies cover nothing new"
    found = together([rank_found(first), rank_found(first), rank_found(second)])
    assert found.tensors[0].gradient == pytest.approx(18e-10**0.5)
    assert [(d.what, d.name) for d in found.differences] == [("gradient", "a")]
    assert together([rank_found()]).holds


def test_the_worst_copy_counts_and_nan_is_a_difference():
    nan = float("nan")
    found = together([rank_found(), rank_found(part(parameter=nan))])
    assert [(d.what, d.name) for d in found.differences] == [("after a step", "a")]
    assert not together([rank_found(numbers=(Number(what="loss", ours=nan, theirs=1.0),))]).holds


def test_a_part_on_no_rank_is_a_difference():
    found = together([rank_found(part(sizes=(3,)))])
    assert isinstance(found, Compared) and not found.holds
    assert [(d.what, d.name) for d in found.differences] == [("not on any rank", "a")]


# --- the whole command --------------------------------------------------------------------------

MODEL = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x):
        return x + self.down(self.up(x).relu())

class Model(nn.Module):
    def __init__(self, dim, layers):
        super().__init__()
        self.embed = nn.Embedding(100, dim)
        self.layers = nn.ModuleList(Block(dim) for _ in range(layers))
        self.head = nn.Linear(dim, 100)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x){wrong}

def build(dim: int = 512, layers: int = 8):
    return Model(dim, layers)

def inputs(batch, seq_len):
    return (torch.zeros(batch, seq_len, dtype=torch.long),)
"""
TWIN = '\nTWIN = {"dim": 32, "layers": 4}\n'
WRONG = " * (1 + (torch.distributed.is_initialized() and torch.distributed.get_rank()))"


def planned(folder: Path, text: str, *more: str) -> tuple[str, str]:
    """(plan, model) of a model file, on eight simulated GPUs with its state sharded."""
    model, plan = folder / "model.py", folder / "plan.json"
    model.write_text(text)
    assert run(cli.app(), ["trace", str(model), "--hardware", "h100x8", "--seq-len", "64",
                           "--global-batch", "32", "--engine", "native", "--fix", "zero=3",
                           "--fix", "tp=1", "--fix", "pp=1", "--no-cache", "-o", str(plan),
                           *more]) == 0  # fmt: skip
    return str(plan), str(model)


def verify(plan: str, model: str, *more: str) -> int:
    return run(cli.app(), ["verify", plan, "--model", model, "--no-cache", *more])


def at_first(model: str, code: str) -> None:
    """Make the model's forward run code first; the graph, with its line numbers, stays."""
    text = Path(model).read_text().replace("x = self.embed(ids)", "x = self.embed(first(ids))")
    Path(model).write_text(text + f"\ndef first(ids):\n    {code}\n    return ids\n")


def test_a_plan_that_holds(tmp_path, capsys):
    plan, model = planned(tmp_path, MODEL.format(wrong="") + TWIN)
    capsys.readouterr()
    assert verify(plan, model, "--no-ledger") == 0
    out = capsys.readouterr().out
    assert out.startswith(
        "model on h100x8\nholds: a twin on 2 ranks computed what the unsharded model does\n"
    )
    assert "pp 1, dp 2, cp 1, tp 1 = 2 ranks" in out and "19 gradients" in out
    assert max(map(len, out.splitlines())) <= 80
    assert verify(plan, model, "--no-ledger", "--json", "--twin", "layers=2") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "verify/1" and found["holds"] is True
    assert found["twins"][0]["decisions"]["stages"] == [2]
    assert found["twins"][0]["workload"]["precision"] == "fp32"


def test_a_plan_that_does_not_hold_exits_4_with_a_table(tmp_path, capsys):
    plan, model = planned(tmp_path, MODEL.format(wrong=WRONG) + TWIN)
    capsys.readouterr()
    assert verify(plan, model, "--no-ledger") == GateError.exit_code == 4
    shown = capsys.readouterr()
    assert "computed something else" in shown.out
    assert re.search(r"gradient +\d\.\de[+-]\d\d +1e-05  head.weight", shown.out)
    assert "error: the plan does not compute what the model does" in shown.err


def test_a_stale_plan_names_the_first_unit_that_differs(tmp_path, capsys):
    plan, model = planned(tmp_path, MODEL.format(wrong="") + TWIN)
    Path(model).write_text(MODEL.format(wrong="").replace("3 * dim", "").replace(
        "nn.Linear(dim, 100)", "nn.Linear(dim, 100, bias=False)") + TWIN)  # fmt: skip
    assert verify(plan, model) == 4
    assert "the first unit that differs is head" in capsys.readouterr().err


def test_lines_that_moved_make_no_other_model(tmp_path, capsys):
    plan, model = planned(tmp_path, MODEL.format(wrong="") + TWIN)
    Path(model).write_text("# a comment\n\n" + Path(model).read_text())
    assert run(cli.app(), ["check", plan, "--model", model, "--no-cache"]) == 0


@pytest.mark.parametrize(
    ("text", "more", "code", "said"),
    [
        ("", (), 64, "does not say how it is cut"),
        (TWIN, ("--twin", "depth=4"), 64, "--twin depth: the factory has no such argument"),
        (TWIN, ("--twin", "layers"), 64, "--twin layers is no argument"),
        (TWIN, ("--twin", "layers=four"), 64, "--twin layers=four: expected int"),
        ('\nTWIN = {"depth": 4}\n', (), 64, "TWIN: depth: the factory has no such argument"),
        ("\nTWIN = 4\n", (), 1, "TWIN is no dictionary"),
    ],
)  # fmt: skip
def test_twins_that_cannot_be_meant(tmp_path, capsys, text, more, code, said):
    plan, model = planned(tmp_path, MODEL.format(wrong="") + text)
    capsys.readouterr()
    assert verify(plan, model, *more) == code
    assert said in capsys.readouterr().err


def test_a_model_that_raises_on_a_rank_is_told_once(tmp_path, capsys):
    plan, model = planned(tmp_path, MODEL.format(wrong="") + TWIN)
    at_first(model, "if torch.distributed.is_initialized(): raise ValueError('not here')")
    capsys.readouterr()
    assert verify(plan, model, "--no-ledger") == 1
    err = capsys.readouterr().err
    told = r"error: rank \d failed: ValueError: not here\n  .*model.py:\d+ in first\n"
    assert re.match(told, err), err
    assert err.count("not here") == 1


def test_ctrl_c_ends_the_workers_too(tmp_path, heeds_interrupts):
    plan, model = planned(tmp_path, MODEL.format(wrong="") + TWIN)
    mark = tmp_path / "running"
    at_first(
        model,
        "import pathlib, time; there = torch.distributed.is_initialized();"
        f" there and pathlib.Path({str(mark)!r}).touch(); time.sleep(600 * there)",
    )
    command = [sys.executable, "-m", "planner.cli", "verify", plan, "--model", model, "--no-ledger"]
    job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True,
                           cwd=Path(cli.__file__).parents[1], env=dict(os.environ),
                           preexec_fn=heeds_interrupts)  # fmt: skip
    end = time.monotonic() + 180
    while not mark.exists() and time.monotonic() < end and job.poll() is None:
        time.sleep(0.05)
    children = _descendants(job.pid)
    os.killpg(job.pid, signal.SIGINT)
    _, err = job.communicate(timeout=300)  # far less than the ranks would sleep
    assert mark.exists() and len(children) >= 3, err
    assert job.returncode == 130 and "Traceback" not in err
    end = time.monotonic() + 5
    while any(map(_is_alive, children)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not [pid for pid in children if _is_alive(pid)]


def _descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *_descendants(child)]
    return found


def _is_alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().split()[2] != "Z"


def test_errors_keep_their_kind():
    from planner.runtime.world import RankFailure
    from planner.verifying import explained

    told = explained(RankFailure(3, "Traceback", GateError("x is not y", where="layers.1")))
    assert isinstance(told, GateError) and told.what == "rank 3: x is not y"
    told = explained(RankFailure(0, "", UsageError("no")))
    assert type(told) is PlanError


def test_a_twin_keeps_the_placements_of_a_model_that_drops_values(plan):
    """The twin runs without dropout; its units are the plan's, with it."""
    from planner.plan import load
    from planner.runtime.verify.twin import make_twins

    gpt = str(Path(__file__).parents[1] / "examples" / "gpt.py")
    args = {"size": "tiny", "dropout": "0.1"}
    said = [word for key, value in args.items() for word in ("--arg", f"{key}={value}")]
    code, _, err = plan(
        "trace", gpt, *said, "--hardware", "h100x2", "--seq-len", 32, "--global-batch", 8,
        "--fix", "tp=2", "--fix", "compile=off", "--fix", "place:layers.*.mlp.c_fc.weight=S(0)",
        "-o", "dropout.json",
    )  # fmt: skip
    assert code == 0, err
    (twin,) = make_twins(load("dropout.json"), gpt, args, {}, 32)
    assert twin.notes == ()
    placed = {w for s in twin.plan.sharding_by_unit.values() for w in s.parameters}
    assert ("mlp.c_fc.weight", "S(0)") in placed
    code, _, err = plan("trace", gpt, *said, "--hardware", "h100x2", "--seq-len", 32,
                        "--global-batch", 8, "--fix", "tp=2", "--fix", "compile=on")  # fmt: skip
    assert code == 64 and "dropout" in err
