"""What lies on the host: which bytes leave the GPU, and which seconds its link takes for them."""

from dataclasses import replace

import pytest
from tiny_models import costs_of, graph_of

from cost_models.decisions import Decisions
from cost_models.estimate import estimate_step
from cost_models.hardware import load_hardware
from cost_models.rank_ledger import moved_level
from cost_models.tiers import Tier
from planner.search import Searcher

H100 = load_hardware("h100x8")
LAYERS, LINK = 4, 5e10  # bytes/s of one GPU's link; the host's 5.6e11 for 8 GPUs is more
POOLED = replace(H100, tiers=(*H100.tiers, Tier(
    name="cxl", bytes=8 << 40, read_bytes_per_s=2e11, write_bytes_per_s=2e11, gpus=32
)))  # fmt: skip
BELOW = (("optimizer", "cpu"), ("params", "cpu"))
KEPT = (("activations", "cpu"),)
BASE = Decisions(
    dp=8, zero=3, shard=8, reshard=True, micro_batch=1, microbatches=2, compile=False,
    stages=(LAYERS,), recompute=((0, 0),),
)  # fmt: skip


def stepped(d, cluster=H100):
    """(costs, step, estimate) of Llama 8B cut to four layers, 8,192 tokens a sample."""
    graph = graph_of("llama", size="8b", n_layers=LAYERS)
    costs = costs_of(graph, cluster, seq_len=8192, global_batch=16, engine="native")
    step = costs.step(d, Searcher(costs=costs).assign(1, False))
    return costs, step, estimate_step(costs, step, d)


def layer(step):
    return step.row(step.chain.layers[0])


def with_host(rate, sharing=1):
    tiers = tuple(
        replace(t, read_bytes_per_s=rate, write_bytes_per_s=rate) if t.name == "cpu" else t
        for t in H100.tiers
    )
    return replace(H100, tiers=tiers, uplink_gpus=sharing)


@pytest.mark.parametrize("full", [0, LAYERS])
def test_activations_leave_the_gpu(full):
    """None of the layers' are counted in flight, two layers' are there while they are copied."""
    base = replace(BASE, recompute=((full, 0),))
    _, above, e = stepped(base)
    _, below, moved = stepped(replace(base, offload=KEPT))
    level = 2 if full else 0
    kept = layer(above).kept[level]
    before, after = (dict(x.ranks[0].memory_bytes) for x in (e, moved))
    assert before["activations"] - after["activations"] == LAYERS * kept
    assert layer(below).working[level] == layer(above).working[level] + 2 * kept
    others = set(before) - {"activations", "workspace", "logits", "fragmentation"}
    assert {k: before[k] for k in others} == {k: after[k] for k in others}


@pytest.mark.parametrize(
    ("rate", "sharing", "link"), [(5.6e11, 1, LINK), (8e10, 1, 1e10), (5.6e11, 2, LINK / 2)]
)
@pytest.mark.parametrize("full", [0, LAYERS])
def test_activations_take_the_link_each_way(full, rate, sharing, link):
    """What a layer keeps goes down behind its forward and comes up behind its backward; a slow
    host's memory is shared by the node's eight GPUs, an uplink by those behind its switch."""
    d = replace(BASE, zero=1, reshard=False, recompute=((full, 0),), offload=KEPT)
    costs, step, e = stepped(d, with_host(rate, sharing))
    _, above, plain = stepped(replace(d, offload=()), with_host(rate, sharing))
    got = f"{link / 1e9:.1f} GB/s each"
    assert any(got in note for note in e.assumptions) and not any(
        "host copies" in note for note in plain.assumptions
    )
    level = 2 if full else 0
    seconds = layer(above).kept[level] / link
    unit = step.chain.links[step.chain.layers[0]].unit
    point = costs.at(d, unit, True, Searcher(costs=costs).assign(1, False)[unit, True])
    ahead, back = point.kernels_s
    share = costs.engine.fsdp_interference
    expected = [
        max(share * seconds, seconds - hidden) for hidden in (ahead, back + (ahead if full else 0))
    ]
    row = layer(step)
    assert row.moved[level] == pytest.approx([s * 1e12 for s in expected], abs=1)
    each = sum(row.moved[level]) * LAYERS * d.microbatches
    assert dict(e.breakdown_ps)["offload"] - dict(plain.breakdown_ps)["offload"] == each
    assert moved_level(d) == level


def test_parameters_come_up_to_be_gathered_and_gradients_go_down():
    """ZeRO-3 gathers twice and reduces once a micro-batch: 4 bytes a share each time, in the
    streams of the gathers; the update then has no link left to take."""
    d = replace(BASE, offload=BELOW)
    costs, step, e = stepped(d)
    _, above, plain = stepped(BASE)
    row = layer(step)
    hidden, rows = 4096, 14336
    elements = (2 * hidden * hidden + 2 * hidden * 1024 + 3 * hidden * rows + 2 * hidden) // 8
    assert row.state.shard == row.state.updated == elements
    assert (row.state.parameter_bytes, row.state.gradient_bytes, row.state.optimizer_bytes) == (
        0, 0, 0,
    )  # fmt: skip
    unit = step.chain.links[step.chain.layers[0]].unit
    point = costs.at(d, unit, True, Searcher(costs=costs).assign(1, False)[unit, True])
    share, each = costs.engine.fsdp_interference, 4 * elements / LINK
    gather = costs.transfers(d, row.state, "all_gather", 2)
    reduce = costs.transfers(d, row.state, "reduce_scatter", 4)
    for found, alone, transfer, copies, kernels in (
        (row.forward, layer(above).forward, gather, each, point.kernels_s[0]),
        (row.backward, layer(above).backward, gather + reduce, 2 * each, point.kernels_s[1]),
    ):
        both = transfer + copies
        expected = max(share * both, both - kernels) * 1e12
        assert found[-1] == alone[-1]
        assert found[-2] + found[-1] == pytest.approx(expected, abs=2)
        assert found[:-2] == alone[:-2]
    # the update: 30 bytes a share of the host's memory, shared by eight GPUs, and no link
    gap_s = costs.kernels.rates.gap_s
    assert row.offload_ps == pytest.approx((30 * elements * 8 / 5.6e11 + gap_s) * 1e12, rel=1e-9)
    assert e.step_time_ps > plain.step_time_ps
    assert e.peak_memory_bytes < plain.peak_memory_bytes


def test_the_optimizer_s_link_is_taken_once_a_step():
    """FSDP2 sends fp32 gradients down and fp32 parameters up, a share each."""
    d = replace(BASE, zero=1, reshard=False, offload=BELOW[:1])
    costs, step, _ = stepped(d)
    n, gaps_s = layer(step).state.updated, 3 * costs.kernels.rates.gap_s  # down, update, up
    assert layer(step).offload_ps == pytest.approx(
        (8 * n / LINK + 30 * n * 8 / 5.6e11 + gaps_s) * 1e12, rel=1e-9
    )
    # behind a switch that two share the link takes twice as long, and so where memory is slow
    for host in (with_host(5.6e11, 2), with_host(8 * LINK / 2)):
        _, slow, _ = stepped(replace(d, offload=BELOW[:1]), host)
        share = host.tier("cpu").read_bytes_per_s / 8
        assert layer(slow).offload_ps == pytest.approx(
            (8 * n / (LINK / 2) + 30 * n / share + gaps_s) * 1e12, rel=1e-9
        )
    # a disk reads and writes the moments, 8 bytes, at the node's rates
    _, disk, _ = stepped(replace(d, offload=(("optimizer", "nvme"),)))
    more = 8 * n * 8 * (1 / 5e10 + 1 / 3e10) * 1e12
    assert layer(disk).offload_ps - layer(step).offload_ps == pytest.approx(more, rel=1e-9)


@pytest.mark.parametrize("below", [BELOW[:1], BELOW])
def test_no_update_is_quicker_below_however_few_parameters(below):
    """Where all that counts is how many kernels there are, one after the other."""
    costs = costs_of(graph_of("llama", n_layers=2), H100, global_batch=16, engine="native")
    laid = Searcher(costs=costs).assign(1, False)
    d = replace(BASE, zero=3 if len(below) > 1 else 1, reshard=False, stages=(2,))
    on, off = (costs.step(replace(d, offload=offload), laid) for offload in ((), below))
    for k in range(len(on.chain.links)):
        assert off.row(k).offload_ps > on.row(k).optimizer_ps or not on.row(k).state.updated


def test_activations_on_another_tier_go_there_through_the_host():
    """A CXL pool of 200 GB/s leaves each of eight GPUs 25, less than its link of 50: what a layer
    keeps takes so long each way, all but what kernels hide."""
    d = replace(BASE, zero=1, reshard=False, offload=(("activations", "cxl"),))
    costs, step, e = stepped(d, POOLED)
    kept = layer(stepped(replace(d, offload=()))[1]).kept[0]
    unit = step.chain.links[step.chain.layers[0]].unit
    point = costs.at(d, unit, True, Searcher(costs=costs).assign(1, False)[unit, True])
    share, seconds = costs.engine.fsdp_interference, kept / (2e11 / 8)
    expected = [max(share * seconds, seconds - hidden) for hidden in point.kernels_s]
    assert layer(step).moved[0] == pytest.approx([s * 1e12 for s in expected], abs=1)
    assert any("tier cxl: through the host's memory" in note for note in e.assumptions)
    (use,) = e.tiers  # eight GPUs' layers of the one micro-batch in flight
    assert (use.name, use.used_bytes, use.bytes) == ("cxl", 8 * LAYERS * kept, 8 << 40)
    by_count = replace(d, offload=(("activations", "cxl:3"),))
    assert stepped(by_count, POOLED)[2].tiers[0].used_bytes == 8 * 3 * kept


def test_parameters_on_another_tier():
    """fp32 shards lie there and are gathered from there at its rate; gradients go to the host's
    memory, and the update reads and writes the shards on the tier besides."""
    pool = 2e11 / 8
    d = replace(BASE, offload=(("optimizer", "cpu"), ("params", "cxl")))
    _, near, _ = stepped(replace(d, offload=BELOW), POOLED)
    costs, step, e = stepped(d, POOLED)
    row, state = layer(step), layer(step).state
    n = state.updated
    assert n == state.shard and dict(row.below) == {"cpu": 12 * n, "cxl": 4 * n}
    more = 4 * n * 8 * (2 / 2e11) * 1e12
    assert row.offload_ps - layer(near).offload_ps == pytest.approx(more, rel=1e-6)
    unit = step.chain.links[step.chain.layers[0]].unit
    point = costs.at(d, unit, True, Searcher(costs=costs).assign(1, False)[unit, True])
    gather = costs.transfers(d, state, "all_gather", 2)
    reduce = costs.transfers(d, state, "reduce_scatter", 4)
    share, up, down = costs.engine.fsdp_interference, 4 * n / pool, 4 * n / LINK
    for found, both, kernels in ((row.forward, gather + up, point.kernels_s[0]),
                                 (row.backward, gather + reduce + up + down, point.kernels_s[1])):
        expected = max(share * both, both - kernels) * 1e12
        assert found[-2] + found[-1] == pytest.approx(expected, abs=2)
    assert {use.name for use in e.tiers} == {"cpu", "cxl"}


def test_nothing_offloaded_costs_nothing():
    _, step, e = stepped(BASE)
    assert dict(e.breakdown_ps)["offload"] == 0
    assert all(r.moved == ((0, 0),) * 3 and r.forward[-2] == r.backward[-2] == 0 for r in step.rows)
