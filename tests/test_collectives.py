"""Collectives: closed forms, monotony, and the measured rows where they are at hand."""

import csv
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import graph_of

from cost_models.collectives import KINDS, bottleneck, collective_s, driven, explain
from cost_models.constants_table import load_constants
from cost_models.decisions import Decisions, Workload
from cost_models.engines import load_engine
from cost_models.hardware import catalogue, describe, load_hardware
from cost_models.state import Held, state_of
from cost_models.step import Costs
from cost_models.work import Axes
from ir.errors import PlanError

H100 = load_hardware("h100x1024")


def test_inside_a_domain_the_fitted_form_holds() -> None:
    table = load_constants("h100")
    for kind, passes in (("all_reduce", 2), ("all_gather", 1), ("reduce_scatter", 1)):
        for place, n in enumerate((2, 4, 8)):
            a, low, start, c, beta, switch = (
                table.numbers(f"collective.{kind}.{key}")[place]
                for key in (
                    "overhead_s", "low_sqrt_s", "start_s", "sqrt_s", "bytes_per_s", "switch_bytes",
                )
            )  # fmt: skip
            size = 1e9  # far above the switch: the wire, and what starts it
            expected = a + start + c * math.sqrt(size) + size * passes * (n - 1) / n / beta
            assert collective_s(H100, kind, size, n) == pytest.approx(expected, rel=1e-6)
            size = switch / 100  # far below: flags and a few channels
            expected = a + low * math.sqrt(size)
            assert collective_s(H100, kind, size, n) == pytest.approx(expected, rel=1e-4)


def test_between_nodes_each_rank_drives_its_own_port() -> None:
    """Large all-gathers over 8 nodes: 8 ports a node, at most .9 of NVLink and the fitted rate."""
    size = 1e12
    port = 50e9 * H100.inter.efficiency
    wide = float(collective_s(H100, "all_gather", size, 64, 1))
    fitted = load_constants("h100").numbers("collective.all_gather.bytes_per_s")[-1]
    rate = min(8 * port, 0.9 * H100.intra.bytes_per_s, fitted)
    assert wide == pytest.approx(size * 63 / 64 / rate, rel=0.02)
    narrow = float(collective_s(H100, "all_gather", size, 8, 8))
    assert narrow == pytest.approx(size * 7 / 8 / port, rel=0.02)
    assert bottleneck(H100, 64, 1) == bottleneck(H100, 8, 8) == "network"
    assert bottleneck(H100, 8, 1) == "nvlink"
    assert bottleneck(load_hardware("t4x8"), 8) == "pcie"


def test_an_engine_may_drive_a_share_of_the_network() -> None:
    """One port of eight: bytes between nodes take eight times as long, those inside as long."""
    eighth = driven(H100, 1 / 8)
    size = 1e12
    for kind in ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "p2p"):
        far = [float(collective_s(c, kind, size, 8, 8)) for c in (eighth, H100)]
        assert far[0] == pytest.approx(8 * far[1], rel=0.01), kind
        assert collective_s(eighth, kind, size, 8) == collective_s(H100, kind, size, 8)
    assert driven(H100, 1.0) is H100


def test_a_plan_is_costed_over_what_its_engine_drives() -> None:
    """Every transfer of a rank beyond its node, once: not again where costs are made of costs."""
    d = Decisions(dp=16, zero=3, shard=16)
    state = state_of((Held(name="w", rows=4096, row_elements=4096, expert=False),), d,
                     Workload(precision="bf16"), load_engine("deepspeed-2021"))  # fmt: skip
    engine = load_engine("deepspeed-2021")
    assert engine.network_share == 1 / 8

    def costs(share: float) -> Costs:
        return Costs(
            graph=graph_of("llama"), cluster=load_hardware("h100x16"),
            workload=Workload(engine="deepspeed-2021", seq_len=256),
            variant=replace(engine, network_share=share),
        )  # fmt: skip

    whole, eighth = costs(1.0), costs(1 / 8)
    assert eighth.cluster == whole.cluster  # what is planned again starts from this one
    assert eighth.network.inter.efficiency == whole.cluster.inter.efficiency / 8
    assert eighth.network.intra == whole.network.intra
    for kind in ("all_gather", "reduce_scatter", "all_reduce"):
        expected = collective_s(driven(whole.cluster, 1 / 8), kind, state.dense * 2, 16)
        assert eighth.transfers(d, state, kind, 2) == expected > whole.transfers(d, state, kind, 2)
    staged = Decisions(pp=2, dp=8)  # a stage a node
    assert eighth.send_s(staged, 1 << 30) > 7 * whole.send_s(staged, 1 << 30)
    assert eighth.work(Axes(), True).cluster == eighth.network  # traffic of tp, cp and ep


def test_an_exchange_between_nodes_sends_what_leaves_the_node() -> None:
    size = 1e11
    expected = size * (64 - 8) / 64 / (50e9 * H100.inter.efficiency)
    assert float(collective_s(H100, "all_to_all", size, 64)) == pytest.approx(expected, rel=0.02)


def test_latency_grows_with_domains_and_trees_help_small_sizes() -> None:
    small = [float(collective_s(H100, "all_reduce", 8.0, 8 * n, 1)) for n in (2, 8, 32, 128)]
    rings = [float(collective_s(H100, "all_gather", 8.0, 8 * n, 1)) for n in (2, 8, 32, 128)]
    assert small == sorted(small) and rings == sorted(rings)
    hop = H100.inter.latency_s
    assert small[3] - small[2] == pytest.approx(2 * 2 * hop)  # log2 128 - log2 32, both ways
    assert rings[3] - rings[2] > 96 * hop


def test_a_wide_nvlink_domain_stays_off_the_network() -> None:
    rack = load_hardware("gb200x144")
    assert bottleneck(rack, 72) == "nvlink" and bottleneck(rack, 144) == "network"
    inside = float(collective_s(rack, "all_reduce", 1e9, 72))
    assert inside < float(collective_s(rack, "all_reduce", 1e9, 144))


def test_one_rank_or_no_byte_costs_nothing_and_unknown_kinds_are_refused() -> None:
    for kind in KINDS:
        assert collective_s(H100, kind, 1e9, 1) == 0
        assert collective_s(H100, kind, 0, 8) == 0
    for size in (1, 8):
        with pytest.raises(PlanError, match="all_scatter"):
            collective_s(H100, "all_scatter", 1e9, size)


@pytest.mark.parametrize("name", catalogue())
def test_every_device_has_every_collective(name) -> None:
    node = describe(name)
    two = load_hardware(f"{name}x{2 * node.count}")
    for kind in KINDS:
        times = [float(collective_s(c, kind, 1e8, c.count)) for c in (node, two)]
        assert 0 < times[0] < 10 and 0 < times[1] < 10
        # half of an exchange leaves a slow node's own links alone; a rack is one domain
        assert times[0] <= times[1] or kind == "all_to_all"
        assert explain(node, kind, node.count).source
        assert explain(two, kind, two.count).source


@given(
    st.sampled_from(KINDS),
    st.sampled_from([(2, 1), (3, 1), (6, 1), (8, 1), (16, 1), (8, 8), (128, 8), (1024, 1)]),
    st.floats(1, 1e11),
    st.floats(1, 1e11),
)
def test_more_bytes_never_take_less(kind, group, one, other) -> None:
    small, large = sorted((one, other))
    times = collective_s(H100, kind, np.array([small, large]), *group)
    assert 0 < times[0] <= times[1]
    assert times[1] == collective_s(H100, kind, large, *group)


def test_transferred_constants_say_so() -> None:
    assert explain(describe("v100"), "all_reduce", 8).source.startswith("transferred")
    assert explain(describe("a6000"), "all_gather", 8).source.startswith("transferred")
    assert explain(describe("h100"), "all_reduce", 8).source.startswith("fitted")
    # a link half as fast takes twice as long
    v100, a100 = describe("v100"), describe("a100")
    times = [float(collective_s(c, "all_gather", 1e12, 8)) for c in (v100, a100)]
    assert times[0] == pytest.approx(2 * times[1], rel=0.01)


DEVICES = {
    "A100-SXM4-80GB": "a100", "H100-SXM5-80GB": "h100", "H200-SXM-141GB": "h200",
    "B200-SXM-180GB": "b200", "L40S-48GB": "l40s",
}  # fmt: skip


@pytest.mark.skipif("MESHWRIGHT_DATA" not in os.environ, reason="needs MESHWRIGHT_DATA")
def test_measured_collectives_are_met() -> None:
    errors: dict[str, list[float]] = {}
    with (Path(os.environ["MESHWRIGHT_DATA"]) / "measured_ops.csv").open() as file:
        for row in csv.DictReader(file):
            if row["op"].startswith("nccl_"):
                node = describe(DEVICES[row["device"]])
                kind, count = row["op"].removeprefix("nccl_"), int(row["num_gpus"])
                found = float(collective_s(node, kind, float(row["bytes"]), count)) * 1e6
                errors.setdefault(node.name, []).append(abs(found / float(row["latency_us"]) - 1))
    assert set(errors) == set(DEVICES.values())
    for name, found in errors.items():
        assert np.median(found) < 0.07, name
