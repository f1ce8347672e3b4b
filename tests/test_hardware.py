"""The catalogue, the names, the user's own files."""

import tomllib
from pathlib import Path

import pytest

from cost_models import hardware as hw
from cost_models.constants_table import load_constants
from cost_models.engines import engine_names, load_engine
from ir.errors import UsageError

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
    words = {"name", "title", "fused", "saves", "zero_modes", "sources", "sp_regather_backward"}
    for field in set(engine.__slots__) - words:
        assert sources.get(field), field


def test_the_catalogue_is_what_was_asked_for() -> None:
    assert set(hw.catalogue()) == {
        "t4", "v100-16gb", "v100-32gb", "a10g", "l4", "l40s", "a6000", "a100-40gb", "a100",
        "h100", "h100-pcie", "h100-96gb", "h200", "b200", "gb200", "mi300x",
    }  # fmt: skip
    for alias, name in hw.aliases():
        assert name in hw.catalogue() and alias not in hw.catalogue()
        assert hw.load_hardware(f"{alias}x1").name == name


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
        ("h100x32+a100x64", ["not planned yet", "--hardware h100x32", "--hardware a100x64"]),
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
        ("efficiency = 0.87", "efficiency = 1.2", ["cluster.inter.efficiency", "1 at most"]),
        ('kind = "network"', 'kind = "string"', ["link kind 'string'"]),
        ("count = 8", "", ["missing key count"]),
        ("node_size = 8", "node_size = 8.5", ["cluster.node_size"]),
        ('name = "nvme"', "name = 3", ["cluster.tiers[1].name"]),
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


def test_digests_tell_clusters_apart() -> None:
    digests = {hw.describe(name).digest for name in hw.catalogue()}
    assert len(digests) == len(hw.catalogue())
    assert hw.load_hardware("h100x64").digest != hw.load_hardware("h100x128").digest
    assert hw.load_hardware("H100x64").digest == hw.load_hardware("h100-sxmx64").digest


def test_tiers_are_known_by_name() -> None:
    cluster = hw.load_hardware("h100x8")
    assert cluster.tier("cpu").bytes == 2048 * 2**30
    with pytest.raises(UsageError, match="no tier"):
        cluster.tier("tape")
