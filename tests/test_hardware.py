"""The catalogue, the names, the user's own files."""

import json
import os
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from cost_models import hardware as hw
from cost_models.checked_toml import parse_toml
from cost_models.compute import load_kernels
from cost_models.constants_table import load_constants
from cost_models.engines import engine_names, load_engine
from cost_models.units import format_bytes
from ir.errors import UsageError
from planner.show_hardware import catalogue_text, cluster_text

FOLDER = Path(hw.__file__).with_name("hardware")


def numbers(table, path=""):
    """Dotted paths of all numbers and sizes in a TOML table."""
    for key, value in table.items():
        name = f"{path}{key}"
        if isinstance(value, dict):
            yield from numbers(value, name + ".")
        elif isinstance(value, list):
            for row in value:
                yield from numbers(row, name + ".")
        elif not isinstance(value, str) or "bytes" in key:
            yield name


@pytest.mark.parametrize("name", hw.catalogue())
def test_every_number_of_the_catalogue_has_a_source(name) -> None:
    table = tomllib.loads((FOLDER / f"{name}.toml").read_text())
    sources = table.pop("sources")
    for path in numbers(table):
        assert any(path == key or path.startswith(key + ".") for key in sources), path


@pytest.mark.parametrize("name", hw.catalogue())
def test_every_constant_of_a_device_has_a_source(name) -> None:
    for item in load_constants(hw.describe(name).device.constants).items:
        assert item.source, item.name


@pytest.mark.parametrize("name", engine_names())
def test_every_number_of_an_engine_has_a_source(name) -> None:
    engine = load_engine(name)
    sources = dict(engine.sources)
    words = {"name", "title", "fused", "saves", "zero_modes", "sources", "sp_regather_backward",
             "switches"}
    for field in set(engine.__slots__) - words:
        assert sources.get(field), field


def test_the_catalogue_is_what_was_asked_for() -> None:
    assert set(hw.catalogue()) == {
        "t4", "v100-16gb", "v100-32gb", "a10g", "l4", "l40s", "a6000", "a100-40gb", "a100",
        "h100", "h100-pcie", "h100-96gb", "h200", "h800", "b200", "gb200", "b300", "gb300",
        "mi300x", "mi355x", "rtx-3090", "rtx-4090", "rtx-4090-48gb", "rtx-pro-6000", "tpu-v5p",
    }  # fmt: skip
    for alias, name in hw.aliases():
        assert name in hw.catalogue() and alias not in hw.catalogue()
        assert hw.load_hardware(f"{alias}x1").name == name


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("a100-40gb-sxm", "a100-40gb"), ("a100-80gb-sxm", "a100"), ("h100-sxm", "h100"),
        ("h100-hbm2e-96gb", "h100-96gb"), ("b200_sxm", "b200"), ("h200_sxm", "h200"),
        ("H100-SXM5-80GB", "h100"), ("L40S-48GB", "l40s"), ("RTX PRO 6000", "rtx-pro-6000"),
        ("GB300 NVL72", "gb300"), ("h800", "h800"), ("v5p", "tpu-v5p"),
    ],
)  # fmt: skip
def test_names_of_tables_and_vendors_are_understood(said, name) -> None:
    assert hw.canonical(said) == name


@pytest.mark.parametrize(
    ("driver", "memory_bytes", "name"),
    [
        ("NVIDIA H100 80GB HBM3", 85e9, "h100"),
        ("NVIDIA H100 PCIe", 85e9, "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", 42e9, "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", 85e9, "a100"),
        ("NVIDIA GeForce RTX 4090", 25e9, "rtx-4090"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 102e9, "rtx-pro-6000"),
        ("NVIDIA B300 SXM6 AC", 287e9, "b300"),
        ("NVIDIA GB300", 297e9, "gb300"),
        ("Tesla V100-SXM2-32GB", 34e9, "v100-32gb"),
        ("AMD Instinct MI355X", 309e9, "mi355x"),
        ("Quadro P400", 2e9, None),
    ],
)
def test_drivers_names_are_recognised(driver, memory_bytes, name) -> None:
    assert hw.recognise(driver, int(memory_bytes)) == name


def test_every_gpu_of_the_published_runs_is_in_the_catalogue() -> None:
    folder = os.environ.get("MESHWRIGHT_DATA")
    if not folder:
        pytest.skip("MESHWRIGHT_DATA is not set")
    rows = Path(folder, "training_runs.yaml").read_text().splitlines()
    named = {json.loads(row[2:])["hardware"]["gpu"] for row in rows if row.startswith("- {")}
    assert {hw.canonical(gpu) for gpu in named} == {
        "a100-40gb", "a100", "b200", "gb200", "gb300", "h100", "h100-96gb",
    }  # fmt: skip


def test_racks_of_72_give_64_where_the_count_is_a_power_of_two() -> None:
    for name in ("gb200", "gb300"):
        assert hw.load_hardware(f"{name}x256").domain_ranks == 64
        assert hw.describe(name).node_size == 4
        assert hw.load_hardware(f"{name}x72").domain_ranks == 72


@pytest.mark.parametrize(("domain", "node", "count", "ranks"), [
    (4, 8, 8, 4), (1, 8, 16, 1), (2, 8, 16, 2), (72, 4, 128, 64), (3, 8, 8, 2), (16, 4, 8, 8),
    (8, 8, 6, 6),
])  # fmt: skip
def test_domains_are_equal_parts_of_nodes_or_whole_ones(domain, node, count, ranks) -> None:
    c = replace(hw.load_hardware("h100x8"), domain_size=domain, node_size=node, count=count)
    assert c.domain_ranks == ranks


def test_what_is_shown_fits_80_columns(tmp_path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(
        'base = "h100"\ncount = 16\n[constants]\nmeasured = 1\n'
        '[constants.gemm.bf16]\ncompute_efficiency = 0.5\nsource = "measured on this machine"\n'
    )
    shown = [catalogue_text(), cluster_text(hw.load_hardware(str(path)))]
    shown += [cluster_text(hw.describe(name)) for name in hw.catalogue()]
    for line in "\n".join(shown).splitlines():
        assert len(line) <= 80, line
    assert "constants of its own" in shown[1] and "compute_efficiency 0.5" in shown[1]
    assert "calibrated" not in shown[0] and "assumed" in shown[0]


def test_a_file_brings_constants_over_those_of_its_device(tmp_path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(
        'base = "h100"\ncount = 8\n[constants.clock]\nderate = 0.5\nsource = "mine"\n'
    )
    device = hw.load_hardware(str(path)).device
    table, base = load_constants(device.constants), load_constants("h100")
    assert table.number("clock.derate") == 0.5 and table.find("clock.derate").source == "mine"
    assert table.number("attention.forward_efficiency") == base.number(
        "attention.forward_efficiency"
    )
    assert (table.measured, table.runs) == (base.measured, base.runs)
    assert load_kernels(device).clock == pytest.approx(
        load_kernels(hw.describe("h100").device).clock * 0.5 / base.number("clock.derate")
    )


@pytest.mark.parametrize("name", ["b300", "gb300", "h800", "mi355x", "rtx-4090", "rtx-pro-6000",
                                  "tpu-v5p"])  # fmt: skip
def test_devices_that_nobody_measured_say_so(name) -> None:
    device = hw.describe(name).device
    table = load_constants(device.constants)
    assert not table.measured
    assert any("transferred from" in item.source for item in table.items)
    for dtype, peak in device.peak_flop_per_s:
        rate = 2 * 8192**3 / float(load_kernels(device).gemm_s(dtype, 8192, 8192, 8192))
        assert 0.2 * peak < rate < peak, dtype


def test_old_devices_lack_new_types() -> None:
    t4, v100 = hw.describe("t4").device, hw.describe("v100").device
    assert t4.peak("fp16") == 65e12 and v100.peak("fp16") == 125e12
    for device, dtype in ((t4, "bf16"), (v100, "bf16"), (v100, "tf32"), (t4, "fp8")):
        assert not device.has(dtype)
        with pytest.raises(UsageError) as caught:
            device.peak(dtype)
        assert "fp16" in caught.value.why and "--precision fp16" in caught.value.hints


def test_published_figures() -> None:
    h100 = hw.load_hardware("h100x64")
    assert h100.device.peak("bf16") == 989.4e12 and h100.device.peak("fp8") == 1978.9e12
    assert round(h100.device.memory_bytes / 1e9, 1) == 85.0
    assert (h100.nodes, h100.node_size, h100.domain_size) == (8, 8, 8)
    assert hw.describe("gb200").domain_size == 72 and hw.describe("gb200").node_size == 4
    assert hw.describe("h100-96gb").device.power_w == 500


@pytest.mark.parametrize(
    ("spec", "size", "stride", "members", "domains"),
    [
        ("h100x64", 8, 1, 8, 1),
        ("h100x64", 8, 8, 1, 8),
        ("h100x64", 4, 4, 2, 2),
        ("h100x64", 64, 1, 8, 8),
        ("h100x64", 16, 2, 4, 4),
        ("h100x48", 3, 1, 1, 3),  # ranks 6, 7, 8: two nodes
        ("h100x48", 6, 1, 2, 3),
        ("h100x6", 6, 1, 6, 1),
        ("gb200x128", 64, 1, 64, 1),  # two racks hold 64 each
        ("gb200x144", 72, 1, 72, 1),
    ],
)
def test_groups_are_laid_over_domains(spec, size, stride, members, domains) -> None:
    group = hw.load_hardware(spec).group(size, stride)
    assert (group.members, group.domains) == (members, domains)


def test_a_group_is_placed_as_its_worst_ranks_are() -> None:
    """By counting: no group of the same size and stride has a domain with fewer members."""
    cluster = hw.load_hardware("h100x64")
    for size in (2, 4, 8, 16, 32):
        for stride in (1, 2, 4, 8):
            if size * stride > 64:
                continue
            least = size
            for block in range(64 // (size * stride)):
                for lane in range(stride):
                    ranks = [block * size * stride + lane + i * stride for i in range(size)]
                    nodes = [rank // 8 for rank in ranks]
                    least = min(least, *(nodes.count(node) for node in nodes))
            assert cluster.group(size, stride).members == least


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("h10x8", ["h10", "h100"]),
        ("a100-90gbx8", ["a100-80gb"]),
        ("h100", ["no count", "h100x8"]),
        ("h100x12", ["whole nodes", "h100x8", "h100x16"]),
        ("h100x0", ["no device"]),
        ("h100x32+a100x64", ["one kind", "--hardware h100x32", "--hardware a100x64"]),
        ("local", ["plan calibrate"]),
        ("missing.toml", ["cannot read", "missing.toml"]),
        ("", ["unknown device"]),
    ],
)
def test_names_that_cannot_be_meant(spec, words) -> None:
    with pytest.raises(UsageError) as caught:
        hw.load_hardware(spec)
    assert caught.value.exit_code == 64
    text = "\n".join(caught.value.lines())
    assert all(word in text for word in words), text


def test_a_file_may_change_a_catalogue_device(tmp_path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('base = "h100"\ncount = 16\n[cluster.inter]\nbytes_per_s = 25e9\n')
    mine = hw.load_hardware(str(path))
    assert (mine.name, mine.count, mine.inter.bytes_per_s) == ("mine", 16, 25e9)
    assert mine.device.peak("bf16") == 989.4e12 and mine.intra == hw.describe("h100").intra
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (moved / "mine.toml").write_text(path.read_text())
    assert hw.load_hardware(str(moved / "mine.toml")).digest == mine.digest
    path.write_text(path.read_text().replace("25e9", "24e9"))
    assert hw.load_hardware(str(path)).digest != mine.digest


def test_a_file_may_say_everything(tmp_path) -> None:
    path = tmp_path / "all.toml"
    path.write_text("count = 8\n" + (FOLDER / "h100.toml").read_text())
    assert hw.load_hardware(str(path)).digest == hw.load_hardware("h100x8").digest


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("power_w = 700", "power = 700", ["unknown key device.power", "device.power_w"]),
        ("power_w = 700", 'power_w = "700"', ["device.power_w", "str"]),
        ("power_w = 700", "power_w = -1", ["device.power_w is -1", "positive"]),
        ("power_w = 700\n", "", ["missing key device.power_w"]),
        ("power_w = 700", "power_w = ", ["not a TOML file"]),
        ("bf16 = ", "bf17 = ", ["device.peak_flop_per_s.bf17"]),
        ("latency_s = 4e-6\nefficiency = 0.", "latency_s = 4e-6\nefficiency = 1.",
         ["cluster.inter.efficiency", "1 at most"]),
        ('kind = "network"', 'kind = "string"', ["link kind 'string'"]),
        ("count = 8", "", ["missing key count"]),
        ("node_size = 8", "node_size = 8.5", ["cluster.node_size"]),
        ('name = "nvme"', "name = 3", ["cluster.tiers[1].name"]),
        ('name = "nvme"', 'name = "a:b"', ["cluster.tiers[1].name is 'a:b'", "a word"]),
        ('name = "nvme"', 'name = "cpu"', ["two cluster.tiers are named 'cpu'"]),
    ],
)
def test_a_bad_file_is_told_by_its_key(tmp_path, old, new, words) -> None:
    text = "count = 8\n" + (FOLDER / "h100.toml").read_text()
    assert old in text
    path = tmp_path / "bad.toml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(UsageError) as caught:
        hw.load_hardware(str(path))
    found = "\n".join(caught.value.lines())
    assert all(word in found for word in words), found


@pytest.mark.parametrize(
    "text",
    [
        "a." * 20_000 + "b = 1",
        "[" + '"a".' * 20_000 + "b]",
        "[[" + "a . " * 20_000 + "b]]",
        'x = { y = "\\"", z = """"q".""", ' + "a." * 20_000 + 'b = ".x" }',
        ("a." * 60 + '"\x85".') * 400 + "b = 1",
        "a = " + "[" * 20_000,
        "a = " + "{a = " * 90 + "1" + "}" * 90,
        "[" + "a." * 60 + "a]\n" + "b." * 60 + "b = 1",
    ],
)
def test_keys_are_counted_before_they_are_read(text) -> None:
    with pytest.raises(ValueError, match=r"nested too deeply|a key has more than 64 parts"):
        parse_toml(text)


def test_dots_of_strings_comments_and_numbers_are_no_keys() -> None:
    dots = "a." * 100
    text = (
        f"n = [{'1.5, ' * 100}]\nt = '{dots}' # {dots}\nu = \"\\\"{dots}\"\n"
        f"v = \"\"\"\n\"\"{dots}\\\"\"\"\"\"\nw = '''{dots}'''\n{'a.' * 60}a = 1\n"
    )
    assert parse_toml(text) == tomllib.loads(text)


def test_digests_tell_clusters_apart() -> None:
    digests = {hw.describe(name).digest for name in hw.catalogue()}
    assert len(digests) == len(hw.catalogue())
    assert hw.load_hardware("h100x64").digest != hw.load_hardware("h100x128").digest
    assert hw.load_hardware("H100x64").digest == hw.load_hardware("h100-sxmx64").digest


def test_a_files_own_tier_says_what_its_host_has(tmp_path) -> None:
    """The base's host memory is another machine's; what a file says of it stays."""
    tier = ('[[cluster.tiers]]\nname = "cpu"\nbytes = "512GiB"\nread_bytes_per_s = 2e10\n'
            "write_bytes_per_s = 2e10\n")  # fmt: skip
    path = tmp_path / "mine.toml"
    cases = (
        (tier, 512), (tier + "gpus = 4\n", 1024),  # two such in a node of 8
        ("[cluster]\nuplink_gpus = 1\n", 2048),
        ('[cluster]\nhost_ram_bytes = "768GiB"\n' + tier, 768),
        (tier.replace('"cpu"', '"pool"'), 2048),
    )  # fmt: skip
    for text, gib in cases:
        path.write_text(f'base = "h100"\ncount = 8\n{text}')
        found = hw.load_hardware(str(path))
        assert found.host_ram_bytes == gib * 2**30, text
        host = next(line for line in cluster_text(found).split("\n") if " host " in line)
        assert format_bytes(gib * 2**30) in host


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("conut = 8\n", "known: count, "),
        ("[device]\nmemory_byte = 3\n", "known: memory_bytes, memory_bandwidth_bytes_per_s, "),
        ("[cluster]\nlevel = []\n", "known: levels, "),
        ('[[cluster.tiers]]\nname = "cpu"\ngpu = 8\n', "known: gpus, "),
        ("[constants]\ngemm.bf16.overhead = 1e-6\n", "known: gemm.bf16.overhead_s, "),
    ],
)
def test_an_unknown_key_is_told_which_there_are_the_nearest_first(tmp_path, text, words) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'base = "h100"\ncount = 8\n{text}')
    with pytest.raises(UsageError, match="unknown key") as caught:
        hw.load_hardware(str(path))
    assert caught.value.why.startswith(words), caught.value.why
    assert len(caught.value.why) < 500


def test_tiers_are_known_by_name() -> None:
    cluster = hw.load_hardware("h100x8")
    assert cluster.tier("cpu").bytes == 2048 * 2**30
    with pytest.raises(UsageError, match="no tier"):
        cluster.tier("tape")
