"""Networks of several levels: the file, groups over them, and costs against simulated links."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flows import Network, exchange, groups_of, ring, sends
from hypothesis import given
from hypothesis import strategies as st

from cost_models.collectives import KINDS, collective_s, driven, explain, quickest, send_form
from cost_models.crossing import boundary_levels, leaving, ring_bytes_per_s, send_bytes_per_s
from cost_models.hardware import load_hardware
from cost_models.levels import Level
from ir.errors import UsageError
from planner.show_hardware import cluster_text

HARDWARE = Path(__file__).parents[1] / "examples" / "hardware"
H100 = load_hardware("h100x64")
PORT = 50e9


def level(kind="tree", ranks=0, rate=PORT, latency_s=4e-6, over=1.0, efficiency=1.0, name=""):
    return Level(name=name or f"{kind} {ranks}", kind=kind, ranks=ranks, bytes_per_s=rate,
                 latency_s=latency_s, efficiency=efficiency, oversubscription=over)  # fmt: skip


def cluster(domain: int, count: int, *levels: Level):
    """H100s in such domains under such levels."""
    inner = levels[0]
    inter = replace(H100.inter, name=inner.name, bytes_per_s=inner.bytes_per_s,
                    latency_s=inner.latency_s, efficiency=inner.efficiency)  # fmt: skip
    return replace(H100, count=count, node_size=domain, domain_size=domain, inter=inter,
                   levels=levels)  # fmt: skip


# (domain, count, levels): two, three and four levels; with ports to spare and without
NETWORKS = {
    "leaf and spine": (2, 16, (level(ranks=4), level(over=2))),
    "4:1 at the pod": (4, 64, (level(ranks=16), level(over=4))),
    "pods": (2, 48, (level(ranks=4), level(ranks=12, over=3), level(over=6))),
    "rails": (4, 64, (level("rail", 16), level(ranks=32), level(over=2))),
    "datacentres": (2, 32, (level(ranks=8), level(ranks=16, over=2), level("wan", 0, 1e9))),
    "dragonfly": (2, 40, (level(ranks=8), level("dragonfly", 0, 25e9))),
    "four": (2, 64, (level(ranks=4), level(ranks=16, over=2), level(ranks=32, over=4),
                     level("wan", 0, 2e9))),
}  # fmt: skip


def made(name):
    domain, count, levels = NETWORKS[name]
    return cluster(domain, count, *levels)


def simulated(c) -> Network:
    rates = [c.inter.useful_bytes_per_s, *(x.useful_bytes_per_s for x in c.levels[1:])]
    far = [k for k, x in enumerate(c.levels) if x.kind == "dragonfly"]
    return Network(c.spans, rates, far)


def tiling(c):
    """(size, stride) of groups that fill the cluster and lie alike in every unit."""
    n = c.count
    for size, stride in itertools.product(range(2, n + 1), range(1, n)):
        if n % (size * stride) == 0 and all(
            span % stride == 0 or stride % span == 0 for span in c.spans
        ) and all(span % (size * stride) == 0 or size * stride % span == 0 for span in c.spans):
            yield size, stride


# --- rates against simulated links -------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_rings_take_what_the_fullest_link_takes(name) -> None:
    c, size, seen = made(name), 1e9, 0
    for n, stride in tiling(c):
        shape = c.shape(n, stride)
        if shape[0] == n:
            continue
        expected = ring(simulated(c), groups_of(c.count, n, stride), size, 2.0)
        found = size * 2 * (n - 1) / n / ring_bytes_per_s(c, shape)
        detour = any(x.kind == "dragonfly" for x in c.levels) and shape[-1] > shape[-2]
        if detour:  # half of the rate by routing over a third unit, where that is quicker
            assert found <= expected * (1 + 1e-9)
        else:
            assert found == pytest.approx(expected), (n, stride)
        seen += 1
    assert seen > 5


@pytest.mark.parametrize("name", NETWORKS)
def test_exchanges_take_what_the_fullest_link_takes(name) -> None:
    c, size = made(name), 1e9
    for n, stride in tiling(c):
        shape = c.shape(n, stride)
        if shape[0] == n:
            continue
        expected = exchange(simulated(c), groups_of(c.count, n, stride), size)
        found = max((n - m) / n * size / rate for m, rate, _ in leaving(c, shape))
        if any(x.kind == "dragonfly" for x in c.levels):
            assert found <= expected * (1 + 1e-9)
        else:
            assert found == pytest.approx(expected), (n, stride)


@pytest.mark.parametrize("name", NETWORKS)
def test_groups_that_lie_unevenly_are_never_taken_for_quicker(name) -> None:
    c, size = made(name), 1e9
    for n, stride in itertools.product(range(2, c.count), range(1, c.count)):
        if c.count % (n * stride) or any(x.kind == "dragonfly" for x in c.levels):
            continue
        shape, groups = c.shape(n, stride), groups_of(c.count, n, stride)
        if shape[0] < n:
            expected = ring(simulated(c), groups, size, 1.0)
            found = size * (n - 1) / n / ring_bytes_per_s(c, shape)
            assert found >= expected * (1 - 1e-9), (n, stride)


@pytest.mark.parametrize("name", NETWORKS)
def test_sends_share_the_links_of_the_units_that_they_leave(name) -> None:
    c, size = made(name), 1e9
    if "dragonfly" in name:
        return
    for stages in (2, 4, 8):
        stride = c.count // stages
        if any(span % stride and stride % span for span in c.spans):
            continue
        crossed = boundary_levels(c, stages, stride)
        for boundary in range(stages - 1):
            k = crossed[boundary]
            if not k:
                continue
            expected = sends(simulated(c), stages, stride, size, boundary)
            rate = c.inter.useful_bytes_per_s
            rate = min(rate, send_bytes_per_s(c, k, stride)) if k > 1 else rate
            assert size / rate == pytest.approx(expected), (stages, boundary)


def test_a_dragonflys_neighbours_use_their_own_link_or_detour() -> None:
    """Nine groups of eight GPUs: a ring over groups fills 1 of 8 links; routed over others, half
    of all; an exchange fills every link."""
    flat = cluster(2, 72, level(ranks=8), level(rate=25e9))
    fly = cluster(2, 72, level(ranks=8), level("dragonfly", rate=25e9))
    whole = fly.shape(72)
    minimal = ring(simulated(fly), groups_of(72, 72, 1), 1e9, 1.0)
    found = 1e9 * 71 / 72 / ring_bytes_per_s(fly, whole)
    assert minimal == pytest.approx(1e9 * 71 / 72 / (8 * 25e9 / 8))
    assert found == pytest.approx(minimal / 4)  # 1/2 of the links instead of 1/8
    assert leaving(fly, whole) == leaving(flat, whole)
    three = cluster(2, 24, level(ranks=8), level("dragonfly", rate=25e9))
    assert ring_bytes_per_s(three, three.shape(24)) == 8 * 25e9 / 2  # 1 of 2 links, no detour


def test_a_boundary_crosses_what_any_of_its_ranks_does() -> None:
    for (domain, count, levels), copies in itertools.product(NETWORKS.values(), (1, 2)):
        c = cluster(domain, count, *levels)
        for stages in (2, 4, 8):
            if count % (stages * copies):
                continue
            stride, part = count // stages // copies, count // copies
            for boundary, found in enumerate(boundary_levels(c, stages, stride, copies)):
                after = (boundary + 1) % stages
                pairs = [
                    (p * part + boundary * stride + i, p * part + after * stride + i)
                    for p in range(copies) for i in range(stride)
                ]
                most = max(
                    sum(a // span != b // span for span in c.spans[:-1]) for a, b in pairs
                )
                assert found == most, (stages, copies, boundary)


# --- shapes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_a_shape_counts_the_worst_placed_group(name) -> None:
    c = made(name)
    for n, stride in tiling(c):
        groups = groups_of(c.count, n, stride)
        least = tuple(
            min(sum(r // span == group[0] // span for r in group) for group in groups)
            for span in c.spans
        )
        assert c.shape(n, stride) == least, (n, stride)


def test_a_group_may_lie_in_parts() -> None:
    """Four ranks in a row in each of two halves of a pod of datacentres."""
    c = made("datacentres")  # domains of 2, fabrics of 8 and 16, 32 in all
    assert c.shape(4, 1, (2, 16)) == (2, 4, 4, 8)
    assert c.shape(4, 1, (2, 8)) == (2, 4, 8, 8)
    assert c.shape(1, 1, (2, 16)) == c.shape(2, 16) == (1, 1, 1, 2)
    with pytest.raises(UsageError):
        c.shape(4, 1, (4, 16))


def test_rails_join_ranks_of_one_place_alone() -> None:
    c = made("rails")  # domains of 4, rails of 16 ranks, pods of 32
    assert c.shape(4, 4) == (1, 4, 4, 4)  # one rank a node: its own rail
    assert c.shape(16, 1) == (4, 16, 16, 16)  # whole nodes: a ring on each rail
    assert c.shape(3, 1)[:2] == (1, 1)  # ranks 3, 4, 5: no rail joins these
    # six ranks in a row lie in places 0-3 and 0-1 of one node each, or 2-3 and 0-3
    for kind, members in (("tree", (2, 6, 6, 6)), ("rail", (2, 2, 6, 6))):
        wide = cluster(4, 384, level(kind, 48), level(ranks=96), level(over=2))
        assert wide.shape(6, 1) == members


def test_units_are_equal_parts_of_fewer_gpus() -> None:
    c = cluster(8, 1536, level(ranks=256), level(ranks=1024), level())
    assert c.spans == (8, 256, 768, 1536)
    assert replace(c, count=64).spans == (8, 64, 64, 64)
    assert load_hardware("gb200x128").spans == (64, 128)


# --- costs ---------------------------------------------------------------------------------------


def test_one_level_costs_what_its_link_does() -> None:
    """A listed level is another way to say [cluster.inter]."""
    same = Level(name="port", kind="tree", ranks=0, bytes_per_s=H100.inter.bytes_per_s,
                 latency_s=H100.inter.latency_s, efficiency=H100.inter.efficiency)  # fmt: skip
    listed = replace(H100, levels=(same,))
    sizes = np.array([8.0, 1e4, 1e7, 1e10])
    for kind, (n, stride) in itertools.product(KINDS, [(2, 1), (8, 1), (16, 1), (8, 8), (64, 1)]):
        assert np.array_equal(
            collective_s(listed, kind, sizes, n, stride), collective_s(H100, kind, sizes, n, stride)
        )


def test_levels_alike_cost_what_one_does_but_for_hierarchies() -> None:
    """Cut a level in two of the same rate and latency: rings and exchanges stay, and no
    collective takes longer."""
    one = cluster(8, 256, level())
    two = cluster(8, 256, level(ranks=64), level())
    for kind, n, stride in (("all_reduce", 32, 8), ("all_gather", 256, 1), ("all_to_all", 64, 4)):
        a, b = explain(one, kind, n, stride), explain(two, kind, n, stride)
        assert a.forms[0] == b.forms[0]
        sizes = np.array([1e3, 1e6, 1e9])
        assert np.all(collective_s(two, kind, sizes, n, stride)
                      <= collective_s(one, kind, sizes, n, stride))  # fmt: skip


def test_a_hierarchy_halves_what_crosses_two_datacentres() -> None:
    """Large all-reduce of 512 GPUs: a ring sends 2 (n-1)/n S over n/2 GPUs' shares of the wide
    link, a hierarchy S; the rest is two passes inside."""
    c = load_hardware(str(HARDWARE / "two-datacentres.toml"))
    wide, size = c.levels[1].useful_bytes_per_s, 1e12
    flat, _, *hierarchies = explain(c, "all_reduce", 128, 8).forms
    assert flat.s_per_byte == pytest.approx(2 * 127 / 128 / (64 * wide))
    best = min(hierarchies, key=lambda f: f.s_per_byte)
    port = c.inter.useful_bytes_per_s
    assert best.algorithm == "hierarchy at wan"
    assert best.s_per_byte == pytest.approx(2 * 63 / 64 / port + 1 / (64 * wide))
    quick = min(flat.s_per_byte, best.s_per_byte)
    found = float(collective_s(c, "all_reduce", size, 128, 8))
    assert found == pytest.approx(size * quick, rel=0.01)
    narrow = replace(c, levels=(c.levels[0], replace(c.levels[1], bytes_per_s=1e8)))
    assert quickest(narrow, "all_reduce", size, 128, 8) == "hierarchy at wan"


def test_the_algorithm_goes_by_size() -> None:
    c = load_hardware(str(HARDWARE / "fat-tree-4to1.toml"))
    small, large = (quickest(c, "all_reduce", size, 2048) for size in (8.0, 1e11))
    assert small != large and small != "ring" and large == "ring"
    assert quickest(c, "all_reduce", 1e6, 8) == "inside"
    assert quickest(c, "all_to_all", 1e6, 2048) == "pairs"
    assert quickest(c, "all_reduce", 1e6, 1) == ""


def test_oversubscription_is_of_what_leaves_the_pod() -> None:
    """4:1 above pods: inside a pod nothing changes; an exchange over all takes four times what
    leaves; a ring of whole pods has ports enough."""
    free = cluster(8, 512, level(ranks=128), level())
    tight = cluster(8, 512, level(ranks=128), level(over=4))
    size = 1e12
    for kind in ("all_reduce", "all_to_all", "p2p"):
        assert collective_s(free, kind, size, 16, 8) == collective_s(tight, kind, size, 16, 8)
    all_in, out = [float(collective_s(c, "all_to_all", size, 512)) for c in (free, tight)]
    assert out / all_in == pytest.approx(4 * (384 / 512) / (504 / 512), rel=0.01)
    whole = [float(collective_s(c, "all_gather", size, 512)) for c in (free, tight)]
    assert whole[0] == pytest.approx(whole[1], rel=1e-3)
    alone = [float(collective_s(c, "all_gather", size, 4, 128)) for c in (free, tight)]
    assert alone[1] == pytest.approx(4 * alone[0], rel=0.01)


def test_an_engine_that_drives_few_ports_has_them_at_every_level() -> None:
    c = made("4:1 at the pod")
    few = driven(c, 1 / 8)
    assert ring_bytes_per_s(few, c.shape(16, 4)) == c.inter.useful_bytes_per_s / 8
    assert ring_bytes_per_s(c, c.shape(16, 4)) == c.inter.useful_bytes_per_s  # 4 x 1/4


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", KINDS)
def test_more_bytes_never_take_less(name, kind) -> None:
    c = made(name)
    sizes = np.geomspace(1, 1e11, 120)
    for n, stride in tiling(c):
        times = collective_s(c, kind, sizes, n, stride)
        assert np.all(np.diff(times) >= 0) and times[0] > 0, (n, stride)


@pytest.mark.parametrize("name", [n for n in NETWORKS if n != "dragonfly"])
@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "reduce_scatter", "all_to_all"])
def test_more_ranks_never_take_less_where_they_lie_further_out(name, kind) -> None:
    """One rank a domain, the group grown from its first rank outward."""
    c = made(name)
    domain = c.spans[0]
    sizes = np.geomspace(8, 1e11, 40)
    widths = [n for n in range(2, c.count // domain + 1)
              if all(span // domain % n == 0 or n % (span // domain) == 0 for span in c.spans[1:])
              and c.count % (n * domain) == 0]  # fmt: skip
    times = [collective_s(c, kind, sizes, n, domain) for n in widths]
    assert len(times) > 1
    for before, after in itertools.pairwise(times):
        assert np.all(after >= before * (1 - 1e-12)), widths


@given(st.sampled_from(sorted(NETWORKS)), st.sampled_from(["all_reduce", "all_gather"]),
       st.floats(1, 1e11))  # fmt: skip
def test_the_least_of_the_forms_counts(name, kind, size) -> None:
    c = made(name)
    forms = explain(c, kind, c.count).forms
    each = [float(form.at(np.asarray(size))) for form in forms]
    assert float(collective_s(c, kind, size, c.count)) == min(each)
    assert min(each) >= size * min(form.s_per_byte for form in forms) * (1 - 1e-9)
    assert len(forms) > 2


def test_a_send_across_an_ocean_takes_its_latency() -> None:
    c = load_hardware(str(HARDWARE / "two-datacentres.toml"))
    near, far = send_form(c, 1, 64), send_form(c, 2, 64)
    assert far.overhead_s - near.overhead_s == pytest.approx(6e-4 - 5e-6)
    # a stage of 64 of 512 GPUs has the whole link: eight times a GPU's share
    assert 1 / far.s_per_byte == pytest.approx(8 * c.levels[1].useful_bytes_per_s)
    assert 1 / send_form(c, 2, 512).s_per_byte == pytest.approx(c.levels[1].useful_bytes_per_s)


def test_latency_is_of_the_levels_crossed() -> None:
    """A ring of 16 domains in 4 leaves: 12 hops inside them, 3 between; a tree 2 and 2."""
    c = cluster(4, 64, level(ranks=16, latency_s=1e-6), level(latency_s=1e-4))
    base = explain(cluster(4, 64, level(latency_s=1e-15)), "all_reduce", 16, 4).forms
    ring_form, tree_form, *_ = explain(c, "all_reduce", 16, 4).forms
    assert ring_form.overhead_s - base[0].overhead_s == pytest.approx(2 * (12e-6 + 3e-4), rel=1e-6)
    assert tree_form.overhead_s - base[1].overhead_s == pytest.approx(2 * (2e-6 + 2e-4), rel=1e-6)


# --- the file ------------------------------------------------------------------------------------


LEVELLED = [p for p in sorted(HARDWARE.glob("*.toml")) if "[[cluster.levels]]" in p.read_text()]


@pytest.mark.parametrize("path", LEVELLED, ids=lambda p: p.stem)
def test_examples_are_read_and_shown(path) -> None:
    c = load_hardware(str(path))
    assert all(x.source for x in c.levels)
    text = cluster_text(c)
    for x in c.levels:
        assert x.name in text and f"cluster.levels.{x.name}" in text
    assert "cluster.inter" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_prose_is_not_in_the_digest_and_numbers_are() -> None:
    c = load_hardware(str(HARDWARE / "two-datacentres.toml"))
    said = replace(c, levels=(c.levels[0], replace(c.levels[1], source="elsewhere")))
    assert said.digest == c.digest
    slower = replace(c, levels=(c.levels[0], replace(c.levels[1], latency_s=1e-2)))
    assert slower.digest != c.digest
    assert replace(H100, levels=()).digest == H100.digest


BASE = """base = "h100"
count = 64
[[cluster.levels]]
name = "leaf"
kind = "tree"
ranks = 16
bytes_per_s = 5e10
latency_s = 4e-6
efficiency = 0.9
[[cluster.levels]]
name = "spine"
kind = "tree"
bytes_per_s = 5e10
latency_s = 5e-6
efficiency = 0.9
oversubscription = 2
"""


def test_a_file_lists_levels_in_place_of_its_link(tmp_path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(BASE)
    c = load_hardware(str(path))
    assert c.spans == (8, 16, 64) and c.levels[1].oversubscription == 2
    assert (c.inter.name, c.inter.bytes_per_s, c.inter.kind) == ("leaf", 5e10, "network")
    assert math.isclose(c.levels[1].useful_bytes_per_s, 5e10 * 0.9 / 2)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('kind = "tree"\nranks', 'kind = "torus"\nranks', ["unknown kind 'torus'", "dragonfly"]),
        ("ranks = 16\n", "", ["missing key cluster.levels[0].ranks"]),
        ("ranks = 16", "ranks = 12", ["cluster.levels[0].ranks is 12", "units of 8"]),
        ("ranks = 16", "ranks = 8", ["cluster.levels[0].ranks is 8"]),
        ("oversubscription = 2", "oversubscription = 0.5", ["cluster.levels[1].oversubscription"]),
        ("oversubscription = 2", "ranks = 32", ["the cluster has 64 GPUs", "one more level"]),
        ("oversubscription = 2", "over = 2", ["unknown key cluster.levels[1].over", "ranks"]),
        ('"spine"', '"leaf"', ["cluster.levels[1].name is 'leaf' again"]),
        ("efficiency = 0.9\n[[", "efficiency = 1.9\n[[", ["cluster.levels[0].efficiency"]),
        ("latency_s = 4e-6", "latency_s = true", ["cluster.levels[0].latency_s"]),
        ("[[cluster.levels]]\nname = \"leaf\"", "[cluster.inter]\nbytes_per_s = 1e9\n"
         "[[cluster.levels]]\nname = \"leaf\"", ["both say the network", "[cluster.inter]"]),
        ("count = 64", "count = 64\ncluster = 3", ["not a TOML file"]),
    ],
)  # fmt: skip
def test_a_bad_level_is_told_by_its_key(tmp_path, old, new, words) -> None:
    assert old in BASE
    path = tmp_path / "bad.toml"
    path.write_text(BASE.replace(old, new, 1))
    with pytest.raises(UsageError) as caught:
        load_hardware(str(path))
    found = "\n".join(caught.value.lines())
    assert all(word in found for word in words), found
