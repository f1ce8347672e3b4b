"""State bytes of a rank, computed again by hand for every way to hold them."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import costs_of, graph_of

from cost_models.decisions import Decisions, Workload
from cost_models.engines import load_engine
from cost_models.layout import PARTIAL, options
from cost_models.state import Held, held, ranks_of, state_of, update_bytes
from cost_models.step import replicated
from cost_models.words import sharding_of
from planner.search import Searcher

BF16 = Workload(precision="bf16", optimizer="adamw")
NATIVE, MEGATRON = load_engine("native"), load_engine("megatron")
CPU = (("optimizer", "cpu"),)


def weight(rows, *more, expert=False):
    n = 1
    for size in more:
        n *= size
    return Held(name="w", rows=rows, row_elements=n, expert=expert)


def spread(zero, shard, **more):
    more = {"microbatches": 2} | more
    return Decisions(dp=shard, zero=zero, shard=shard if zero else 1, **more)


def state(h, d, workload=BF16, engine=NATIVE):
    """(parameters, gradients, optimizer, gathered) bytes of one parameter."""
    s = state_of((h,), d, workload, engine)
    return s.parameter_bytes, s.gradient_bytes, s.optimizer_bytes, s.gathered_bytes


# A bf16 copy 2, fp32 gradient 4, fp32 master 4, Adam's moments 8 bytes a parameter. P is whole, W
# whole with what pads it to rows that the ranks share, S a rank's share.
# zero, reshard, pp -> parameters, gradients, optimizer, gathered
MODES = {
    (0, False, 1): lambda P, W, S: (2 * P, 4 * P, 12 * P, 0),
    (1, False, 1): lambda P, W, S: (2 * W, 4 * P, 12 * S, 0),
    (2, False, 1): lambda P, W, S: (2 * W, 4 * S, 12 * S, 4 * W),
    (3, True, 1): lambda P, W, S: (4 * S, 4 * S, 8 * S, 6 * W),
    (3, False, 1): lambda P, W, S: (2 * W, 4 * S, 12 * S, 4 * W),
    (0, False, 2): lambda P, W, S: (2 * P, 4 * P, 12 * P, 0),
    (1, False, 2): lambda P, W, S: (2 * W, 4 * P, 12 * S, 0),
    (2, False, 2): lambda P, W, S: (2 * W, 4 * P, 12 * S, 0),
    (3, False, 2): lambda P, W, S: (2 * W, 4 * P, 12 * S, 0),
}


@pytest.mark.parametrize("shard", [2, 8])
@pytest.mark.parametrize(("zero", "reshard", "pp"), list(MODES))
def test_adamw_in_bf16(zero, reshard, pp, shard):
    whole = 1024 * 4096
    found = state(weight(1024, 4096), spread(zero, shard, reshard=reshard, pp=pp))
    assert found == MODES[zero, reshard, pp](whole, whole, whole // shard)


def test_closed_forms():
    """16 bytes a parameter at DDP, 4 + 12/D at ZeRO-1, 16/D at ZeRO-3, gradients in bf16; FSDP2
    makes a reduced gradient fp32 again, as its parameter is."""
    h, n = weight(4096, 1024), 4096 * 1024

    def at_rest(zero, shard, engine=MEGATRON, **more):
        d = spread(zero, shard, grad_dtype="bf16", **more)
        return sum(state(h, d, engine=engine)[:3]) / n

    assert at_rest(0, 8) == 16
    assert at_rest(1, 8) == 4 + 12 / 8
    assert at_rest(2, 8) == 2 + 14 / 8
    # fp32 parameters, bf16 gradients, Adam's moments: 4 + 2 + 8
    assert at_rest(3, 8, reshard=True) == 14 / 8
    assert at_rest(0, 8, NATIVE) == 18
    assert at_rest(1, 8, NATIVE) == 4 + 12 / 8
    assert at_rest(2, 8, NATIVE) == 2 + 16 / 8
    assert at_rest(3, 8, NATIVE, reshard=True) == 16 / 8


def test_one_micro_batch_accumulates_nothing():
    """FSDP2 reduces each unit's gradients as they come: with one micro-batch, ZeRO-1 holds
    ZeRO-2's; Megatron's buffer is whole."""
    h = weight(1024, 64)
    for engine, same in ((NATIVE, True), (MEGATRON, False)):
        one, two = (state(h, spread(z, 8, microbatches=1), engine=engine) for z in (1, 2))
        assert (one == two) == same


def test_rows_are_padded():
    """FSDP2 gives ceil(rows / shard) rows of storage to each rank; a flat shard pads elements."""
    assert state(weight(10, 16), spread(3, 8, reshard=True))[0] == 128
    assert state(weight(10, 16), spread(1, 8))[0] == 2 * 16 * 16  # gathered with its padding
    assert state(weight(10, 16), spread(1, 8))[2] == 12 * 2 * 16
    assert state(weight(10, 16), spread(1, 8), engine=MEGATRON)[2] == 12 * 20
    assert state(weight(10, 3), spread(1, 8), engine=MEGATRON)[2] == 12 * 4
    assert state(weight(1), spread(1, 8))[2] == 12


def test_fp32_has_no_second_copy_but_fsdp_s():
    """FSDP2 keeps the shard beside what it gathered from it, of the same dtype or not."""
    wide = replace(BF16, precision="fp32")
    h, n = weight(64, 64), 64 * 64
    assert state(h, spread(0, 1), wide, MEGATRON) == (4 * n, 4 * n, 8 * n, 0)
    assert state(h, spread(1, 4), wide, MEGATRON) == (4 * n, 4 * n, 8 * n // 4, 0)
    assert state(h, spread(0, 1), wide) == (4 * n, 4 * n, 12 * n, 0)
    assert state(h, spread(1, 4), wide) == (4 * n, 4 * n, 12 * n // 4, 0)
    assert state(h, spread(3, 4, reshard=True), wide) == (n, n, 2 * n, 8 * n)


@pytest.mark.parametrize(
    ("optimizer", "bytes_each"),
    [("adamw", 8), ("sgd", 4), ("muon", 4), ("adamw8bit", 2 + 2 * 4 / 256)],
)
def test_optimizers(optimizer, bytes_each):
    h, n = weight(256, 256), 256 * 256
    w = replace(BF16, optimizer=optimizer)
    assert state(h, spread(0, 1), w)[2] == (4 + bytes_each) * n
    assert state(h, spread(1, 8), w)[2] == (4 + bytes_each) * n / 8
    assert state(h, spread(3, 8, reshard=True), w)[2] == bytes_each * n / 8


def test_adafactor_keeps_a_row_and_a_column():
    w = replace(BF16, optimizer="adafactor")
    assert state(weight(512, 128), spread(0, 1), w)[2] == 4 * 512 * 128 + 4 * (512 + 128)


def test_offloaded_optimizer_leaves_the_gpu():
    """Masters and moments are the host's; what computes stays, and the fp32 share of a unit is
    there while it comes up. Gradients leave as they are reduced."""
    h, n = weight(64, 64), 64 * 64
    assert state(h, spread(1, 4, offload=CPU)) == (2 * n, 4 * n, 0, n)
    assert state(h, spread(0, 4, offload=CPU)) == (2 * n, 4 * n, 0, 4 * n)
    assert state(h, spread(1, 4, offload=CPU, microbatches=1)) == (2 * n, 0, 0, n + 4 * n)
    assert state(h, spread(1, 4, offload=CPU), engine=MEGATRON) == (2 * n, 4 * n, 0, 0)


def test_offloaded_parameters_leave_the_gpu():
    """Shards are the host's. Above: one unit's gathered copy and whole gradients (6 bytes), and
    its fp32 share; everything gathered, where that is kept till backward or under a pipeline."""
    h, n = weight(64, 64), 64 * 64
    below = {"offload": (*CPU, ("params", "cpu"))}
    assert state(h, spread(3, 4, reshard=True, **below)) == (0, 0, 0, 6 * n + n)
    assert state(h, spread(3, 4, **below)) == (2 * n, 0, 0, 4 * n + n)
    assert state(h, spread(3, 4, pp=2, **below)) == (2 * n, 4 * n, 0, n)


def test_replicas_do_not_shard():
    """HSDP: 16 ranks in groups of 4 hold what 4 ranks would."""
    h = weight(1024, 64)
    for zero in (1, 2, 3):
        d = Decisions(dp=16, zero=zero, shard=4, reshard=zero == 3)
        assert state(h, d) == state(h, replace(d, dp=4))
        assert ranks_of(d, False).replicas == 4


def test_cp_ranks_share_state():
    d = Decisions(dp=2, cp=4, zero=1, shard=8)
    assert state(weight(64, 64), d) == state(weight(64, 64), replace(d, dp=8, cp=1))


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize(("ep", "etp"), [(1, 1), (2, 1), (8, 1), (2, 2), (4, 2)])
def test_experts_lie_over_their_own_ranks(ep, etp, zero):
    """16 ranks: experts / ep, features / etp, and the edp = 16 / (ep etp) ranks share the state."""
    graph = graph_of("moe")
    unit = next(u for u in graph.units if any(n.op == "grouped_matmul" for n in u.nodes))
    d = spread(zero, 16, ep=ep, etp=etp, reshard=zero == 3)
    found = {h.name: h for h in held(unit, replicated(unit, 1), ep, etp)}
    experts = [h for h in found.values() if h.expert]
    assert sorted(h.name for h in experts) == ["experts.w1", "experts.w2", "experts.w3"]
    for h in experts:
        n = 8 * 64 * 128 // (ep * etp)
        edp = 16 // (ep * etp)
        share = -(-(8 // ep) // edp) * (64 * 128 // etp)  # whole experts are its rows
        assert h.elements == n
        assert state(h, d) == MODES[zero, zero == 3, 1](n, share * edp, share)
    assert found["experts.router.weight"].elements == 8 * 64


def test_tp_splits_what_the_assignment_splits():
    """Over tp a rank holds its part of each weight that is split, and all of the others."""
    costs = costs_of(graph_of("llama", size="8b", n_layers=2), "h100x8", seq_len=1024)
    for tp in (2, 8):
        for (unit, _), assignment in Searcher(costs=costs).assign(tp, True).items():
            whole = {h.name: h.elements for h in held(unit, replicated(unit, 1), 1, 1)}
            words = dict(sharding_of(unit, assignment).parameters)
            assert set(words) == set(whole)
            for h in held(unit, assignment, 1, 1):
                assert h.elements * (1 if words[h.name] == "R" else tp) == whole[h.name]
                assert (words[h.name] == "R") == ("norm" in h.name or whole[h.name] == 4096)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_every_parameter_is_held_once(zero):
    """The rows of a whole model on one pp rank hold its parameters, tied ones once."""
    for name in ("llama", "gpt", "moe"):
        graph = graph_of(name)
        costs = costs_of(graph, "h100x8", seq_len=256, global_batch=8)
        d = Decisions(dp=8, zero=zero, shard=8 if zero else 1, microbatches=1, reshard=zero == 3)
        step = costs.step(d, Searcher(costs=costs).assign(1, False))
        rows = [step.row(i) for i in range(len(step.chain.links))]
        assert sum(r.state.elements for r in rows) == graph.parameter_count


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 5000), width=st.integers(1, 300), log_shard=st.integers(0, 9),
    zero=st.integers(0, 3), reshard=st.booleans(), pp=st.sampled_from([1, 2]),
    optimizer=st.sampled_from(["adamw", "sgd", "muon", "adamw8bit", "adafactor"]),
    precision=st.sampled_from(["bf16", "fp16", "fp32", "fp8"]),
    engine=st.sampled_from([NATIVE, MEGATRON]), offload=st.sampled_from([(), CPU]),
)  # fmt: skip
def test_state_never_rises_when_sharding_doubles(
    rows, width, log_shard, zero, reshard, pp, optimizer, precision, engine, offload
):
    w = Workload(precision=precision, optimizer=optimizer)
    h = weight(rows, width)
    more = {"reshard": reshard and zero == 3 and pp == 1, "pp": pp, "offload": offload}
    few = state(h, spread(zero, 1 << log_shard, **more), w, engine)
    many = state(h, spread(zero, 2 << log_shard, **more), w, engine)
    padded = rows % (2 << log_shard)  # what is gathered may grow, by padding
    assert all(b <= a for a, b in zip(*((x[1:3] if padded else x) for x in (few, many))))


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 3000), width=st.integers(1, 50), shard=st.integers(1, 64))
def test_shards_cover_a_parameter(rows, width, shard):
    """The fullest rank's share times the ranks covers it, padding less than a row a rank."""
    share = state(weight(rows, width), spread(3, shard, reshard=True))[0] // 4
    assert rows * width <= share * shard < (rows + shard) * width


@settings(max_examples=100, deadline=None)
@given(
    zero=st.sampled_from([1, 2, 3]), ep=st.sampled_from([1, 2, 4]), shard=st.integers(0, 4),
    experts=st.sampled_from([8, 64]),
)
def test_expert_state_never_rises_with_shard(zero, ep, shard, experts):
    h = weight(experts // ep, 128, expert=True)
    d = Decisions(dp=16, tp=2, ep=ep, zero=zero, shard=1 << shard, reshard=zero == 3)
    more = replace(d, shard=min(16, 2 << shard))
    padded = h.rows % ranks_of(more, True).shard  # what is gathered may grow, by padding
    sizes = [state(h, x)[1:3] if padded else state(h, x) for x in (d, more)]
    assert all(b <= a for a, b in zip(*sizes))


@pytest.mark.parametrize(("optimizer", "moments"), [("adamw", 8), ("sgd", 4), ("muon", 4)])
def test_an_update_reads_and_writes_its_moments(optimizer, moments):
    """30 bytes of AdamW: 16 of them are its two fp32 moments, read and written."""
    assert update_bytes(optimizer, 30.0) == 14 + 2 * moments


def test_a_bias_behind_a_sum_is_whole_on_every_rank():
    """Row parallel, y = sum_ranks(x_r W_r) + b: one rank adds b, and its gradient, a sum over
    tokens, is of the whole dL/dy, which every rank has. A norm under sequence parallelism meets a
    rank's own tokens alone: its gradient is summed."""
    searcher = Searcher(costs=costs_of(graph_of("gpt", size="1.3b", n_layers=2), "h100x4"))
    (unit, laid) = next(
        (unit, a) for (unit, layer), a in searcher.assign(4, True).items() if layer
    )
    rows = {
        n.inputs[2] for n, o in zip(unit.nodes, laid.chosen)
        if n.op == "linear" and len(n.inputs) == 3 and o.outs == (PARTIAL,)
    }
    assert rows and not rows & {h.name for h in held(unit, laid, 1, 1) if h.summed}
    norm = next(n for n in unit.nodes if n.op == "layer_norm")
    (split,) = (o for o in options(unit, 4)[norm.name] if o.ins[0] == 1)
    assert split.grads[1:] == (PARTIAL, PARTIAL)
