"""A CPU that stands for a device, and the host beside a GPU: what was measured of it, and used."""

from dataclasses import replace

import numpy as np
import pytest

from cost_models.calibrate import Machine, Measured, Probe
from cost_models.calibrate_file import calibration, to_toml
from cost_models.constants_table import Constant, OwnConstants
from cost_models.hardware import load_hardware
from cost_models.serving import memory_of, step_parts
from cost_models.serving_decisions import WEIGHT_BYTES, Held, ServeLoad, Serving
from cost_models.serving_engines import load_serving_engine
from cost_models.serving_host import Products, host_of
from cost_models.serving_ops import Costs, step_of
from cost_models.serving_shapes import Attend, Experts, LayerShape, Light, Matrix, ServedModel
from cost_models.serving_tiers import rows_on_host
from ir.errors import UsageError
from planner.runtime.probe_host import PRODUCTS
from planner.runtime.probe_timer import undisturbed

FLOP_PER_S, BYTES_PER_S = 1e11, 2e10


def costs(**decisions):
    cluster = load_hardware("t4x1")
    device = replace(
        cluster.device, family="cpu", constants="cpu", sm_count=1, power_w=200,
        peak_flop_per_s=(("fp32", FLOP_PER_S), ("bf16", 4 * FLOP_PER_S)),
        memory_bandwidth_bytes_per_s=BYTES_PER_S,
    )  # fmt: skip
    return Costs(cluster=replace(cluster, device=device), engine=load_serving_engine("native"),
                 serving=Serving(**decisions))  # fmt: skip


@pytest.mark.parametrize("word", ["fp32", "bf16", "int8"])
def test_a_product_takes_its_bytes_then_its_arithmetic(word):
    wide = "fp32" if word == "fp32" else "bf16"
    found = costs(default=wide, weights=(("mlp", word),))
    one = Matrix(block="mlp", k=4096, parts=((4096, 0),), split="column")
    few, many = (float(found.matrix_s(one, np.asarray(x))) for x in (1.0, 4096.0))
    weights = 4096 * 4096
    rate = FLOP_PER_S * (1 if wide == "fp32" else 4)
    read_s = weights * WEIGHT_BYTES[word] / BYTES_PER_S
    multiply_s = 2 * 4096 * weights / rate
    assert read_s < few < 2.5 * read_s  # no tile of 64 rows to fill
    assert multiply_s < many < 2 * multiply_s


def test_weights_without_a_kernel_are_written_out():
    one = Matrix(block="mlp", k=4096, parts=((4096, 0),), split="column")
    int8, int4 = (
        float(costs(weights=(("mlp", word),)).matrix_s(one, np.asarray(1.0)))
        for word in ("int8", "int4")
    )
    assert int4 > 3 * int8


ROW, READ, COLUMN_S, MULTIPLY, SMOOTH = 20e9, 16e9, 8e-8, 9e10, 1.3
CACHED, MEMORY, COPIED, DISK, APART = 5e10, 3e10, 1.5e10, 2e9, 8e8
HOST = {"fetch_s": 2e-6, "piece_s": 1e-4, "op_s": 6e-6, "token_s": 2e-4, "request_s": 1e-3}


def probes():
    """What a host of those numbers would be timed at; 36 ops a layer."""
    true = Products(row_bytes_per_s=ROW, read_bytes_per_s=READ, column_s=COLUMN_S,
                    flop_per_s=MULTIPLY, smoothness=SMOOTH)  # fmt: skip
    made = [Probe(op="cached", dtype="fp32", moved_bytes=1e6, seconds=(1e6 / CACHED,) * 3)]
    for rows, columns, inner in PRODUCTS:
        moved = 4 * (columns * inner + rows * (columns + inner))
        flop = 2.0 * rows * columns * inner
        one = float(true.seconds(moved, flop, rows, columns))
        made.append(Probe(op="product", dtype="fp32", shape=(rows, columns, inner), flop=flop,
                          moved_bytes=moved, seconds=(one,) * 3))  # fmt: skip
    for layers in (4, 8):
        moved = 1e7 * layers
        token = HOST["token_s"] + 36 * layers * HOST["op_s"]
        columns = 4000 * layers
        token += float(true.seconds(moved, moved / 2, 1, columns))
        shape = (layers, 36 * layers)
        made.append(Probe(op="token", shape=(*shape, columns), moved_bytes=moved, flop=moved / 2,
                          seconds=(token,) * 3))  # fmt: skip
        made.append(Probe(op="request", shape=shape, seconds=(HOST["request_s"],) * 3))
    made += [Probe(op=op, seconds=(HOST[f"{op}_s"],) * 3) for op in ("fetch", "piece")]
    gemm = Probe(op="gemm", dtype="fp32", shape=(768,) * 3, flop=9e8, moved_bytes=7e6,
                 seconds=(0.01,) * 3)  # fmt: skip
    copies = [Probe(op=op, moved_bytes=1e8, seconds=(1e8 / rate,) * 3)
              for op, rate in (("copy", MEMORY), ("host_copy", COPIED), ("disk_read", DISK),
                               ("disk_write", DISK), ("disk_fetch", APART))]  # fmt: skip
    machine = Machine(name="a CPU", kind="cpu", count=1, memory_bytes=8 << 30, sm_count=1,
                      host_ram_bytes=8 << 30, disk_bytes=1 << 40, cache_bytes=32 << 20)  # fmt: skip
    return Measured(machine=machine, probes=(gemm, *copies, *made), steady_flop_per_s=(9e10,) * 8,
                    first=gemm, last=gemm)  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The cluster of the file that those probes come to."""
    path = tmp_path_factory.mktemp("host") / "mine.toml"
    path.write_text(to_toml(calibration(probes()), "mine", "2026-01-01"))
    return load_hardware(str(path))


def test_a_calibrated_host_has_the_numbers_that_it_was_timed_with(measured):
    host = host_of(measured.device)
    found = host.measured("fp32")
    assert found.row_bytes_per_s == pytest.approx(ROW, rel=0.1)
    assert found.read_bytes_per_s == pytest.approx(READ, rel=0.1)
    assert found.column_s == pytest.approx(COLUMN_S, rel=0.1)
    assert found.flop_per_s == pytest.approx(MULTIPLY, rel=0.1)
    assert found.cached_bytes_per_s == pytest.approx(CACHED)
    assert host.disk_bytes_per_s == pytest.approx(APART)
    for key, value in HOST.items():
        assert getattr(host, key) == pytest.approx(value, rel=0.05), key
    assert host.assumed == () and host.measured("bf16") is None


def test_on_a_cpu_the_fastest_third_of_repeats_counts():
    quiet, disturbed = [1.0, 1.1, 1.2, 1.05], [9.0, 3.0, 2.0, 5.0, 7.0, 4.0, 8.0, 6.0]
    assert undisturbed([*disturbed, *quiet]) == (1.0, 1.05, 1.1, 1.2)
    assert undisturbed([2.0, 1.0]) == (1.0, 2.0)


def test_what_was_not_measured_is_assumed_by_name():
    host = host_of(load_hardware("a6000x1").device)
    assert [item.name.split(".")[1] for item in host.assumed] == [
        "read_share", "read_share_desktop", "flop_per_byte", "fetch_s"]  # fmt: skip
    assert all(item.source for item in host.assumed) and host.products == ()
    found = host.products_of("bf16", 2e11)
    assert (found.read_bytes_per_s, found.flop_per_s) == (5e10, 6e11)
    assert float(found.seconds(1e11, 6e11)) == 2.0  # the longer of the two
    assert host.products_of("bf16", 8e10).read_bytes_per_s == 0.56 * 8e10  # two channels


def one_layer(ops=36):
    """A layer of one matrix of 4 MB in fp32, one attention and a head."""
    matrix = Matrix(block="mlp", k=1024, parts=((1024, 0),), split="column")
    layer = LayerShape(
        count=8, matrices=(matrix,), experts=(), recurrences=(), reductions=(), norm_reductions=0,
        attention=(Attend(heads=8, kv_heads=8, dim_qk=64, dim_v=64),),
        light=Light(kernels=4, whole_bytes=0.0, split_bytes=0.0, ops=ops),
    )  # fmt: skip
    head = Matrix(block="head", k=1024, parts=((256, 0),), split="column")
    return ServedModel(name="small", hidden=1024, vocab=256, tied=False, layers=(layer,),
                       head=(head,), embedding_elements=256 << 10, other_elements=0)  # fmt: skip


def parts(cluster, **decisions):
    made = Costs(cluster=cluster, engine=load_serving_engine("native"),
                 serving=Serving(default="fp32", **decisions))  # fmt: skip
    found = step_parts(made, one_layer(), step_of(1.0, 0.0))
    return {name: float(np.ravel(value)[0]) for name, value in found.items()}


def test_a_step_on_a_cpu_is_its_bytes_and_its_calls(measured):
    found = parts(measured)
    weights, columns = 8 * 4 * (1 << 20) + 4 * (1 << 18), 8 * 1024 + 256
    assert found["gemm"] == pytest.approx(weights / ROW + columns * COLUMN_S, rel=0.2)
    # the cache is added to twice an attention, keys and values
    assert found["host"] == pytest.approx(HOST["token_s"] + 8 * 38 * HOST["op_s"], rel=0.05)
    ring = parts(measured, tiers=(Held(block="mlp", tier="cpu", place="stream", resident=3),))
    assert ring["host"] - found["host"] == pytest.approx(5 * HOST["piece_s"], rel=0.05)


def test_the_cpu_multiplies_at_the_rate_that_was_measured(measured):
    held = (Held(block="mlp", tier="cpu", place="compute"),)
    found = parts(measured, tiers=held)
    size = 8 * 4 * (1 << 20)
    assert found["cpu"] == pytest.approx(size / ROW + 8 * 1024 * COLUMN_S, rel=0.2)
    rows = rows_on_host(measured, Serving(default="fp32", tiers=held), 4.0)
    assert rows == pytest.approx(4 / 1.5e10 * MULTIPLY / 2, rel=0.1)


def test_columns_that_lie_apart_cost_each_their_first_bytes(measured):
    """As many weights in four times as many columns."""
    made = Costs(cluster=measured, engine=load_serving_engine("native"),
                 serving=Serving(default="fp32"))  # fmt: skip
    few, many = (
        float(made.matrix_s(
            Matrix(block="mlp", k=k, parts=(((1 << 20) // k, 0),), split="column"), np.asarray(1.0)
        )) for k in (1024, 256)
    )  # fmt: skip
    assert many - few == pytest.approx(3 * 1024 * COLUMN_S, rel=0.15)


def test_streams_take_of_the_memory_that_kernels_read(measured):
    """Read once, written once; the stream itself is the shorter of the two here."""
    held = (Held(block="mlp", tier="cpu", place="stream"),)
    found, plain = parts(measured, tiers=held), parts(measured)
    assert found["stream"] == pytest.approx(2 * 8 * 4 * (1 << 20) / MEMORY, rel=0.05)
    assert found["gemm"] == plain["gemm"]


def routed():
    """Four layers of eight experts, a token picking two."""
    one = Experts(experts=8, topk=2, hidden=512, inter=512.0)
    layer = replace(one_layer().layers[0], count=4, matrices=(), experts=(one,))
    return replace(one_layer(), layers=(layer,))


@pytest.mark.parametrize("tier", ["cpu", "nvme"])
@pytest.mark.parametrize("tokens", [1.0, 512.0])
def test_experts_that_are_fetched_are_read_one_by_one_or_in_a_row(measured, tier, tokens):
    """From the disk at its rate where the neighbour is wanted too, else without reading ahead; and
    products of what was just copied read it in the cache."""
    made = Costs(cluster=measured, engine=load_serving_engine("native"), serving=Serving(
        default="fp32", tiers=(Held(block="routed_experts", tier=tier, place="stream"),)))
    plain = Costs(cluster=measured, engine=made.engine, serving=Serving(default="fp32"))
    step = step_of(tokens, 0.0)
    found, held = (
        {name: float(np.ravel(value)[0]) for name, value in step_parts(c, routed(), step).items()}
        for c in (made, plain)
    )
    size, share = 3 * 512 * 512 * 4, 1 - 0.75**tokens
    hit = 4 * 8 * share
    ahead = COPIED if tier == "cpu" else DISK
    apart = COPIED if tier == "cpu" else APART
    each_s = size * (share / ahead + (1 - share) / apart) + HOST["fetch_s"]
    assert found["stream"] == pytest.approx(hit * each_s, rel=0.05)
    spared = size / ROW + 3 * 512 * COLUMN_S - size / CACHED
    assert held["moe"] - found["moe"] == pytest.approx(hit * spared, rel=0.1)


def test_a_cpu_is_not_charged_a_gpu_s_context(measured):
    model, load = one_layer(), ServeLoad(prompt=64, output=8)
    serving, engine = Serving(default="fp32", batch=2), load_serving_engine("native")
    found = memory_of(model, measured, engine, serving, load)
    assert found.context_bytes == 0
    # of the pass of prompts, logits, and the mask that tells their lengths apart
    values = 2 * 64 * (2 * 1024 + 2048) * 4 + 2 * 256 * 4 + 2 * 64 * 64 * 3
    assert found.workspace_bytes == values
    assert memory_of(model, load_hardware("t4x1"), engine, serving, load).context_bytes == 1.5e9


def test_a_rate_of_nothing_in_a_file_is_refused(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text('base = "a6000"\ncount = 1\n[constants.host]\nop_s = 0\n')
    with pytest.raises(UsageError, match=r"constants\.host\.op_s is 0"):
        load_hardware(str(path))
    assert host_of(replace(load_hardware("a6000x1").device, constants=OwnConstants(
        base="a6000", items=(Constant(name="host.op_s", value=1e-5, source="mine"),),
    ))).op_s == 1e-5  # fmt: skip
