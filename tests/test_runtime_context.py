"""Context parallelism: each kind on local ranks against the whole model, and what is refused."""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import runtime_cases_context as cases
import torch
from tiny_models import graph_of

from ir.errors import PlanError, UsageError
from planner import trace
from planner.runtime import context_parallel
from planner.runtime.shares import Shares
from planner.token_flow import flow_of

KINDS = ("ring", "allgather", "ulysses")
PINNED = ("tp=1", "pp=1", "cp=1", "recompute=none", "schedule=1f1b", "compile=off", "zero=0")
EXACT = {"loss": 1e-6, "gradient": 1e-5}


def inputs(batch, seq_len):
    return {"input_ids": torch.zeros(batch, seq_len, dtype=torch.long)}


@cache
def base(name, fix=(), engine="native-compiled", loss=cases.loss_of):
    """A plan of the model on one device."""
    return trace(
        cases.model_of(name), inputs, loss=loss, hardware="h100x1", seq_len=32, global_batch=4,
        precision="fp32", engine=engine, fix=(*PINNED, *fix),
    )  # fmt: skip


def planned(name, kind, cp, **decided):
    """The plan with a context-parallel axis."""
    plan = base(name)
    d = replace(plan.decisions, cp=cp, cp_kind=kind, micro_batch=2, microbatches=2, **decided)
    d = replace(d, microbatches=4 // (2 * d.dp))
    if d.zero:
        d = replace(d, shard=d.dp * cp)
    return replace(plan, decisions=d)


def run(world, ranks, named):
    found = world.run(ranks, cases.compare, [(name, plan) for name, plan in named])
    for results in found:
        for (name, plan), result in zip(named, results):
            for key, allowed in EXACT.items():
                assert result[key] <= allowed, (name, plan.decisions.cp_kind, key, result)
            assert not result["uncompiled"]


# --- attention ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ways", [2, 4])
def test_attention_is_that_of_the_whole_sequence(world, ways):
    sizes = (4, 4, 32, 8, 8)
    asked = [
        {"kind": "ring"}, {"kind": "ring", "causal": True},
        {"kind": "ring", "causal": True, "zigzag": True}, {"kind": "ring", "zigzag": True},
        {"kind": "ring", "zigzag": True, "mask": True}, {"kind": "ring", "mask": True},
        {"kind": "allgather"}, {"kind": "allgather", "causal": True},
        {"kind": "allgather", "causal": True, "zigzag": True},
        {"kind": "allgather", "zigzag": True, "mask": True},
        {"kind": "ulysses", "sizes": sizes}, {"kind": "ulysses", "causal": True, "sizes": sizes},
        {"kind": "ulysses", "mask": True, "sizes": sizes},
        {"kind": "ring", "causal": True, "sizes": (4, 1, 16, 12, 8)},
        {"kind": "allgather", "causal": True, "sizes": (4, 1, 16, 8, 12)},
    ]  # fmt: skip
    for results in world.run(ways, cases.attention, asked):
        for case, found in zip(asked, results):
            assert found["error"] < 2e-6, (case, found)


@pytest.mark.parametrize("ways", [2, 4])
def test_what_is_sent_is_what_the_ledger_counts(world, ways):
    """k and v of [2, 2, 16/ways, 8] fp32 each; q and the result of 4 heads."""
    kv = 2 * (2 * 2 * 16 // ways * 8) * 4
    asked = [{"kind": "ring"}, {"kind": "allgather"}]
    asked += [{"kind": "ulysses", "sizes": (4, 4, 16, 8, 8)}]
    for around, gathered, exchanged in world.run(ways, cases.attention, asked):
        # forward sends keys and values on ways-1 times, backward them and their gradients
        assert around["sends"] == around["said"] == 3 * (ways - 1)
        assert around["sent_bytes"] == around["said_bytes"] == 3 * (ways - 1) * kv
        # gathered in forward and in backward, gradients reduced and scattered
        assert (gathered["said"], gathered["said_bytes"]) == (3, 3 * ways * kv)
        # q, keys and values, the result: each way, kv of 4 heads being twice the above
        assert (exchanged["said"], exchanged["said_bytes"]) == (6, 2 * (kv + 2 * kv + kv))


@pytest.mark.parametrize("zigzag", [False, True])
@pytest.mark.parametrize("ways", [1, 2, 3, 4])
def test_shares_are_all_of_the_sequence(ways, zigzag):
    shares, tokens = Shares(ways=ways, zigzag=zigzag), torch.arange(24).view(1, 24)
    parts = torch.stack([shares.take(tokens, 1, rank) for rank in range(ways)])
    assert torch.equal(shares.join(parts, 1), tokens)
    assert torch.equal(shares.part(tokens, 1), parts)


@pytest.mark.parametrize("zigzag", [False, True])
@pytest.mark.parametrize("ways", [2, 4])
def test_blocks_cover_the_triangle_once(ways, zigzag):
    """Every visible (query, key) pair is in one block, no hidden one in any."""
    shares, length = Shares(ways=ways, zigzag=zigzag), 24 // ways
    tokens = torch.arange(24)
    visible = tokens[:, None] >= tokens
    for rank in range(ways):
        mine = shares.take(tokens, 0, rank)
        by_step, by_piece = torch.zeros(length, 24), torch.zeros(length, 24)
        for source in range(ways):
            piece = shares.step(rank, source, length, True)
            if piece is not None:
                theirs = shares.take(tokens, 0, source)
                _cover(by_step, piece, mine, theirs[slice(*piece.columns)])
        for piece in shares.pieces(rank, length, True):
            _cover(by_piece, piece, mine, tokens[slice(*piece.columns)])
        assert torch.equal(by_step, visible[mine].float())
        assert torch.equal(by_piece, visible[mine].float())
    if zigzag:  # the same work on each rank
        work = [
            sum((p.rows[1] - p.rows[0]) * (p.columns[1] - p.columns[0]) / (2 if p.causal else 1)
                for s in range(ways) if (p := shares.step(r, s, length, True)))
            for r in range(ways)
        ]  # fmt: skip
        assert len(set(work)) == 1


def _cover(table, piece, mine, columns):
    rows = torch.arange(*piece.rows)
    seen = torch.ones(len(rows), len(columns))
    table[rows[:, None], columns] += seen.tril() if piece.causal else seen


def test_tokens_that_do_not_divide_are_refused():
    with pytest.raises(PlanError, match="10 tokens cannot be shared by 3"):
        Shares(ways=3, zigzag=False).take(torch.zeros(10), 0, 0)


# --- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_models_on_two_ranks(world, kind):
    """Grouped heads, windows (a mask), routed experts, glue that reads shapes, a mean beside."""
    names = ("llama", "moe", "gpt", "hf llama", "hf mistral", "hf mixtral", "tiny both ways",
             "tiny buffer", "tiny mask", "tiny penalty")  # fmt: skip
    run(world, 2, [(name, planned(name, kind, 2)) for name in names])


def test_models_on_four_ranks(world):
    run(world, 4, [
        ("hf llama", planned("hf llama", "ring", 4)),
        ("llama", planned("llama", "allgather", 4)),
        ("tiny", planned("tiny", "ulysses", 4)),
        *(("llama", planned("llama", kind, 2, dp=2, zero=3, reshard=True)) for kind in KINDS),
        ("llama", planned("llama", "ring", 2, dp=2, zero=1)),
    ])  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_recomputed(world, kind):
    run(world, 2, [
        ("llama", planned("llama", kind, 2, recompute=((2, 0),))),
        ("llama", planned("llama", kind, 2, recompute=((0, 2),))),
    ])  # fmt: skip


def test_compiled(world):
    run(
        world,
        2,
        [("llama", planned("llama", kind, 2, compile=True)) for kind in ("ring", "ulysses")],
    )


MEGATRON = tuple(f"place:layers.*.{name}={word}" for name, word in (
    ("attention.wq.weight", "S(0)"), ("attention.wk.weight", "S(0)"),
    ("attention.wv.weight", "S(0)"), ("attention.wo.weight", "S(1)"),
    ("feed_forward.w2.weight", "S(1)"),
))  # fmt: skip


def test_with_tensor_parallelism(world):
    """Heads split on tp, tokens on cp and, under sequence parallelism, on both."""
    named = []
    for kind, split in (("ring", "on"), ("ring", "off"), ("allgather", "on")):
        fix = ("tp=2", "cp=2", "pp=1", f"cp_kind={kind}", f"sequence_parallel={split}", *MEGATRON)
        plan = trace(
            cases.model_of("llama"), inputs, loss=cases.loss_of, hardware="h100x4", seq_len=32,
            global_batch=4, precision="fp32", engine="native", fix=fix,
        )  # fmt: skip
        named.append(("llama", plan))
    run(world, 4, named)


def test_in_a_pipeline(world):
    run(world, 4, [
        ("llama", planned("llama", kind, 2, pp=2, stages=(1, 1), recompute=((0, 0), (1, 0))))
        for kind in KINDS
    ])  # fmt: skip


def test_attention_that_is_not_called_by_name_is_refused(monkeypatch):
    monkeypatch.setattr(context_parallel, "Ways", lambda context: None)
    forward = context_parallel.sharing("layers.0", (True,), None, lambda x: x.softmax(-1) @ x)
    with pytest.raises(PlanError, match="0 times, and has 1 attentions in the plan"):
        forward(torch.randn(2, 2))
    site = SimpleNamespace(path="layers.0", module=cases.model_of("hf llama eager").model.layers[0])
    with pytest.raises(PlanError, match="attends by 'eager'"):
        context_parallel.check_attention(site)


# --- what is refused when the plan is made ---------------------------------------------


@pytest.mark.parametrize("how, reason", [
    ("cumsum", "layers.0: cumsum (cumsum) needs the whole sequence"),
    ("centred", "layers.0: sub (sub) is of a rank's tokens, not of the sequence"),
    ("squared mean", "layers.1: after/pow_1 (pow) is of a rank's tokens, not of the sequence"),
    ("largest", "layers.0: amax (amax) needs the whole sequence"),
    ("previous", "layers.0: roll (roll) needs the whole sequence"),
    ("arange", "layers.0: create (create) makes positions for the sequence inside the unit"),
    ("scores", "layers.0: matmul compares every token with every other outside attention"),
    ("first token", "layers.1: after/slice_0 (slice) needs the whole sequence"),
])  # fmt: skip
def test_what_needs_other_tokens_is_named(how, reason):
    assert flow_of(base(f"tiny {how}").graph).reason == reason


@pytest.mark.parametrize("name, reason", [
    ("hf mamba2", "causal_conv1d) needs the whole sequence"),
    ("hf bert", "makes positions for the sequence inside the unit"),
])  # fmt: skip
def test_families_that_are_refused(name, reason):
    assert reason in flow_of(base(name).graph).reason


@pytest.mark.parametrize("name, reason", [
    ("dit", "no value that a unit is given has a sequence dimension"),
    ("resnet", "no value that a unit is given has a sequence dimension"),
])  # fmt: skip
def test_examples_that_are_refused(name, reason):
    assert reason in flow_of(graph_of(name)).reason


@pytest.mark.parametrize("name", ["llama", "gpt", "moe", "hf llama", "hf mixtral", "hf qwen3_moe"])
def test_families_that_are_shared(name):
    assert not flow_of(base(name).graph).reason


def test_a_loss_that_looks_at_neighbours_is_refused():
    found = flow_of(base("tiny", loss=cases.shifted_loss).graph)
    assert "slice" in found.reason or "s-1" in found.reason


def test_a_mean_that_only_adds_to_the_loss_is_shared():
    assert not flow_of(base("tiny penalty").graph).reason


def test_order_is_kept_where_the_forward_mixes_whole_and_shared():
    assert flow_of(base("tiny buffer").graph).ordered
    assert not flow_of(base("tiny").graph).ordered


def test_pins_name_the_operation():
    with pytest.raises(UsageError, match="--fix cp=2 cannot be run of this model") as fault:
        trace(cases.model_of("tiny cumsum"), inputs, loss=cases.loss_of, hardware="h100x2",
              seq_len=32, global_batch=4, precision="fp32", engine="native",
              fix=("cp=2",))  # fmt: skip
    assert "cumsum" in fault.value.why
