"""A plan's ledger against what a rank of it would hold and send, at full size in one process."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from cost_models.fleet import load_any
from ir.capture import capture_graph
from ir.capture.module import source_of
from ir.errors import PlanError
from planner.capturing import Clock
from planner.decisions import parse_pins
from planner.objectives import plan_for
from planner.options import TraceOptions
from planner.runtime.meta import meta
from planner.runtime.verify.full_size import look_at
from planner.runtime.verify.ledger import LedgerResult, Row, check_ledger
from planner.workload import Asked, precision_of

pytestmark = pytest.mark.usefixtures("shared_shardings", "no_baselines")
EXAMPLES = Path(__file__).parent.parent / "examples"


@functools.cache
def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(name, **sizes):
    with meta():
        return example(name).build(size="tiny", **sizes)


def planned(name, hardware, fix, *, layers=3, global_batch=16, **workload):
    """(plan, model) of a tiny example."""
    asked = Asked(**{"engine": "native", "seq_len": 64, "global_batch": global_batch} | workload)
    cluster = load_any(hardware)
    graph = graph_of(name, layers, precision_of(asked, cluster)[0])
    options = TraceOptions(model=name, hardware=hardware, pins=parse_pins(fix.split()), asked=asked)
    return plan_for(graph, options, cluster, Clock()).plan, build(name, n_layers=layers)


@functools.cache
def graph_of(name, layers, precision):
    """Of a module that exists, as `planner.trace` takes it, and not of its file."""
    model = build(name, n_layers=layers)
    source = source_of(model, example(name).inputs, example(name).loss, None)
    return capture_graph(source, precision=precision)


def check(name, plan, model, **more):
    return check_ledger(plan, model, example(name).inputs, example(name).loss, **more)


def assert_as_planned(name, hardware, fix, **more):
    plan, model = planned(name, hardware, fix, **more)
    found = check(name, plan, model)
    assert found.equal, "\n".join(str(r) for r in found.differences if not r.reason)
    assert not dist.is_initialized()
    return plan, found


def rows(found, what, axis):
    mine = (r for r in found.rows if (r.what, r.axis) == (what, axis))
    return {(r.pp_rank, r.size_bytes): r.found for r in mine}


DATA = "tp=1 pp=1 cp=1 micro_batch=1 "


@pytest.mark.parametrize(
    "fix",
    ["zero=0", "zero=1", "zero=2", "zero=3 reshard=on", "zero=3 reshard=off",
     "zero=3 shard=4 reshard=on", "zero=1 shard=2"],
)  # fmt: skip
def test_every_zero_variant(fix):
    for microbatches in (1, 2, 5):
        assert_as_planned("llama", "h100x8", DATA + fix, layers=1, global_batch=8 * microbatches)


@pytest.mark.parametrize("more", [{"precision": "fp32"}, {"optimizer": "sgd"}])
def test_formats_and_optimizers(more):
    for fix in ("zero=0", "zero=1", "zero=3 reshard=on"):
        assert_as_planned("llama", "h100x4", DATA + fix, layers=1, **more)


def test_gradients_in_16_bits():
    assert_as_planned("llama", "h100x4", DATA + "zero=1 grad_dtype=bf16", layers=1)
    assert_as_planned("llama", "h100x4", DATA + "zero=2 grad_dtype=bf16", layers=1)


@pytest.mark.parametrize("zero", [1, 3])
def test_rows_that_ranks_cannot_share_evenly(zero):
    """Six ranks: every parameter is padded, at rest and on its way."""
    assert_as_planned("gpt", "h100x6", f"{DATA}zero={zero}", layers=2, global_batch=12)


def test_zero_3_by_hand():
    """Two layers of 24,640 fp32 elements and a head and an embedding of 16,384 over 8 ranks: each
    is gathered twice in bf16 (an end that follows no other once more) and reduced once in fp32."""
    _, found = assert_as_planned(
        "llama", "h100x8", DATA + "zero=3 reshard=on shard=8", layers=2, global_batch=8
    )
    layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128 + 2 * 64
    assert rows(found, "reduce_scatter", "dp") == {
        (0, 4 * layer): 2, (0, 4 * 256 * 64): 2, (0, 4 * 64): 1
    }  # fmt: skip
    assert rows(found, "all_gather", "dp")[0, 2 * layer] in (3, 4)
    state = {r.what: r.found for r in found.rows if not r.axis}
    whole = 2 * layer + 2 * 256 * 64 + 64
    assert state == {
        "parameters": 4 * whole // 8, "gradients": 4 * whole // 8, "optimizer": 8 * whole // 8
    }  # fmt: skip


@pytest.mark.parametrize(
    "fix",
    [
        "tp=2 zero=3 reshard=on sequence_parallel=on recompute=none",
        "tp=2 zero=1 sequence_parallel=off recompute=full",
        "tp=4 zero=1 sequence_parallel=on recompute=full",
        "cp=2 cp_kind=ring zero=1 recompute=none",
        "cp=4 cp_kind=ring zero=3 recompute=full",
        "cp=2 cp_kind=allgather zero=1",
        "cp=2 cp_kind=ulysses zero=1",
        "tp=2 cp=2 zero=1 sequence_parallel=on",
    ],
)
def test_inside_a_layer(fix):
    rest = " ".join(f"{axis}=1" for axis in ("tp", "cp", "pp") if f"{axis}=" not in fix)
    assert_as_planned("llama", "h100x8", f"{fix} {rest} micro_batch=1")


SPLIT = {"attention.wq": 0, "attention.wo": 1, "feed_forward.w1": 0, "feed_forward.w2": 1}
PLACED = " ".join(f"place:layers.*.{name}.weight=S({dim})" for name, dim in SPLIT.items())


def test_a_pipelines_only_micro_batch():
    """Its gradients wait in fp32 as those of many do, and are summed over tp so."""
    fix = "pp=2 tp=2 micro_batch=16 schedule=gpipe zero=0 sequence_parallel=on recompute=none"
    _, found = assert_as_planned("llama", "h100x4", fix, layers=2)
    assert rows(found, "all_reduce", "tp")[0, 4 * 64 * 256] == 1


@pytest.mark.parametrize(("engine", "repeated"), [("native", 3), ("native-compiled", 4)])
def test_a_repeated_layers_last_sum(engine, repeated):
    """Two sums a layer in forward, two in backward, and again the first: eager code is repeated as
    far as backward needs it, which is not the sum behind the last matmul; compiled code whole."""
    fix = f"{DATA} tp=2 sequence_parallel=off recompute=full zero=1 {PLACED}".replace("tp=1 ", "")
    _, found = assert_as_planned("llama", "h100x4", fix, layers=2, engine=engine)
    (count,) = rows(found, "all_reduce", "tp").values()
    assert count == 2 * 8 * (2 + repeated)


@pytest.mark.parametrize(
    "fix",
    [
        "schedule=1f1b zero=1 pp=4", "schedule=gpipe zero=0", "schedule=zbh1 zero=1",
        "schedule=interleaved virtual_stages=2 zero=3", "schedule=zbv virtual_stages=2 zero=1",
        "schedule=dualpipev virtual_stages=2 zero=1",
    ],
)  # fmt: skip
def test_every_schedule(fix):
    """Few micro-batches are run, and the third stands for all behind it."""
    rest = fix if "pp=" in fix else f"{fix} pp=2"
    plan, found = assert_as_planned(
        "llama", "h100x8", f"{rest} tp=1 cp=1 micro_batch=1 recompute=none", layers=4,
        global_batch=64,
    )  # fmt: skip
    d = plan.decisions
    assert d.microbatches >= 8
    sends = rows(found, "p2p", "pp")
    hidden = d.micro_batch * 64 * 64 * 2
    if "virtual" not in fix:
        assert sends[0, hidden] == d.microbatches


def test_tied_weights_send_their_gradients_between_stages():
    """256 x 64 fp32 over two data ranks, from the first stage to the last and back."""
    _, found = assert_as_planned(
        "gpt", "h100x4", "pp=2 tp=1 cp=1 zero=1 micro_batch=1 schedule=1f1b recompute=none",
        layers=4,
    )  # fmt: skip
    assert rows(found, "p2p", "pp")[0, 4 * 256 * 64 // 2] == 1
    assert rows(found, "p2p", "pp")[1, 4 * 256 * 64 // 2] == 1


@pytest.mark.parametrize(
    "fix",
    [
        "ep=4 zero=3 reshard=on tp=1", "ep=4 etp=2 zero=1 tp=1", "ep=8 zero=0 recompute=full tp=1",
        "ep=4 tp=2 sequence_parallel=on zero=1",
    ],
)  # fmt: skip
def test_experts(fix):
    more = "" if "recompute" in fix else " recompute=none"
    assert_as_planned("moe", "h100x8", f"{fix} pp=1 cp=1 micro_batch=1{more}", layers=2)


class Listed(nn.Module):
    """A routed module with a loop over experts that are modules of a list."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(64, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.top_k = 2

    def forward(self, x):
        rows = x.flatten(0, 1)
        weights, chosen = self.router(rows).softmax(-1).topk(2, dim=-1)
        out = torch.zeros_like(rows)
        for i, expert in enumerate(self.experts):
            row, slot = torch.where(chosen == i)
            out.index_add_(0, row, expert(rows[row]) * weights[row, slot, None])
        return out.view_as(x)


def listed():
    with meta():
        model = example("gpt").build(size="tiny", n_layers=2)
        for block in model.layers:
            block.mlp = Listed()
    return model


@pytest.mark.parametrize(
    "fix", ["tp=2 pp=2 zero=0 sequence_parallel=off schedule=1f1b recompute=full:1", "dp=4 zero=3"]
)
def test_a_loop_over_experts(fix):
    """What it reads of its tokens, shapes do not tell: it counts as it was captured."""
    gpt = example("gpt")
    graph = capture_graph(source_of(listed(), gpt.inputs, gpt.loss, None))
    asked = Asked(engine="native", seq_len=64, global_batch=16)
    options = TraceOptions(
        model="listed", hardware="h100x4", pins=parse_pins(fix.split()), asked=asked
    )
    plan = plan_for(graph, options, load_any("h100x4"), Clock()).plan
    found = check_ledger(plan, listed(), gpt.inputs, gpt.loss)
    assert found.equal, "\n".join(str(r) for r in found.differences if not r.reason)


def test_products():
    assert_as_planned(
        "llama", "h100x16",
        "pp=2 tp=2 cp=2 zero=1 micro_batch=1 schedule=1f1b sequence_parallel=on recompute=full:1",
        layers=4, global_batch=16,
    )  # fmt: skip
    assert_as_planned(
        "moe", "h100x16", "pp=2 cp=2 tp=1 ep=4 zero=1 micro_batch=1 schedule=1f1b recompute=none",
        layers=2,
    )  # fmt: skip


def test_a_ledger_that_is_wrong_is_told():
    """The plan says ZeRO-1, the ranks run ZeRO-3: state and collectives differ, by name."""
    plan, model = planned("llama", "h100x8", DATA + "zero=1", layers=1)
    other = replace(plan, decisions=replace(plan.decisions, zero=3, reshard=True))
    seen = look_at(other, 0, model, example("llama").inputs, None, example("llama").loss)
    right = look_at(plan, 0, model, example("llama").inputs, None, example("llama").loss)
    assert seen.sent != right.sent and seen.gradients != right.gradients
    bad = Row(pp_rank=1, what="all_gather", axis="dp", size_bytes=128, where="u2 parameters",
              planned=2, found=1)  # fmt: skip
    excused = replace(bad, what="all_reduce", size_bytes=4, planned=0, reason="the mean loss")
    assert not LedgerResult(rows=(bad, excused)).equal
    assert LedgerResult(rows=(excused,)).equal
    assert str(bad) == (
        "pp rank 1: all_gather of 128 bytes over dp: planned 2, found 1 (u2 parameters)"
    )


def test_only_where_no_group_is():
    plan, model = planned("llama", "h100x4", DATA + "zero=1", layers=1)
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(PlanError, match="process group already"):
            check("llama", plan, model)
    finally:
        dist.destroy_process_group()


def test_the_model_and_the_process_are_left_alone():
    plan, model = planned("llama", "h100x4", DATA + "zero=1", layers=1)
    before = {n: (p.shape, p.device.type) for n, p in model.named_parameters()}
    assert check("llama", plan, model).equal
    assert {n: (p.shape, p.device.type) for n, p in model.named_parameters()} == before
    assert check("llama", plan, model) == check("llama", plan, model)


def test_the_8b_model_on_4096_ranks():
    """At full size, in a process of its own: seconds, and as planned to the byte."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import test_verify_ledger as t, planner\n"
        "from planner.runtime.meta import meta\n"
        "with meta(): model = t.example('llama').build(size='8b')\n"
        "plan = planner.trace(model, t.example('llama').inputs, hardware='h100x4096',\n"
        "    fix=['tp=1', 'pp=1', 'cp=1', 'zero=3', 'micro_batch=1', 'reshard=on'],\n"
        "    loss=t.example('llama').loss, engine='native', seq_len=4096, global_batch=4096)\n"
        "found = t.check('llama', plan, model)\n"
        "print(*found.differences, sep='\\n')\n"
        "sys.exit(0 if found.equal else 4)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
