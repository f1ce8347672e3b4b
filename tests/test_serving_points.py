"""Published points of serving on small machines: `plan validate --points`."""

import functools
import json

import pytest

from cost_models.checked_toml import read_toml
from cost_models.compute import load_kernels
from cost_models.hardware import describe
from cost_models.serving_engines import load_serving_engine
from cost_models.serving_handling import Handling, told
from ir.errors import UsageError
from planner import cli
from planner.validation import serving_points as view


@pytest.fixture(scope="module")
def table():
    return read_toml(view.POINTS, "points")


def test_points_of_a_small_model_are_met(table):
    """gpt-fast's Llama-2-7B in three formats and on 1 to 8 GPUs, nothing fitted."""
    name = "llama-2-7b"
    model = view.model_of(table["models"][name])
    points = tuple(
        view.predicted(raw, model, table["sources"][raw["source"]]) for raw in table["points"]
        if raw["model"] == name
    )  # fmt: skip
    assert len(points) == 6 and max(abs(one.error) for one in points) < 0.1
    assert "6 published points of serving: 6 within 25%" in view.text(points)
    for one in points:  # 200 tokens, and a prompt of 5 that takes one step more
        step_s = sum(seconds for _, seconds in one.parts)
        assert one.predicted == pytest.approx(200 / (201 * step_s), rel=0.01)


def predicted(table, name):
    raw = next(raw for raw in table["points"] if raw["id"] == name)
    return view.predicted(raw, model_of(raw["model"]), "")


@functools.cache
def model_of(name):
    return view.model_of(read_toml(view.POINTS, "points")["models"][name])


T4_BYTES_PER_S = load_kernels(describe("t4").device).memory_bound_s(1.0, 0) ** -1


def test_what_no_kernel_multiplies_is_written_out_first(table):
    """FlexGen's OPT-6.7B in 4 bits, all on a T4: each op of its unpacking passes over memory."""
    shift = mask = 0.5 + 0.5  # bytes a weight: packed bytes are read and written
    halves = 2 * (0.5 + 0.5 * 2)  # each to every second of 16 bits
    divided = added = 2 + 2
    unpack = shift + mask + halves + divided + added
    weights = 32 * 12 * 4096**2 + 50272 * 4096
    parts = dict(predicted(table, "opt-6.7b 4-bit resident, 512").parts)
    least = weights * (unpack + 2) / T4_BYTES_PER_S  # 16 bits are read at last
    assert unpack == 13
    assert least < parts["gemm"] < 1.15 * least
    # Of the cache every second element is written, by whole sectors that are read first (+2 +4);
    # it is permuted (2 + 2), and read.
    cached = 72 * (512 + 16) * 32 * 2 * 4096
    least = cached * (unpack + 6 + 4 + 2) / T4_BYTES_PER_S
    assert 0.95 * least < parts["attention"] < 1.15 * least


def test_a_batch_in_parts_unpacks_weights_for_each_and_fetches_them_once(table):
    """FlexGen's OPT-175B with 4 bits, three parts: nothing is pinned, so the host copies all."""
    parts = dict(predicted(table, "opt-175b 4-bit streamed, 512").parts)
    each = 0.5625  # bytes: groups of 64 with a scale and a zero point of 16 bits
    weights, cached = 96 * 12 * 12288**2, 144 * (512 + 16) * 96 * 2 * 12288
    host = load_serving_engine("flexgen").handling.pageable_bytes_per_s
    assert parts["stream"] == pytest.approx((weights + cached) * each / host, rel=0.01)
    assert parts["gemm"] > 3 * weights * (13 + 2) / T4_BYTES_PER_S  # the link is quicker than that


def test_weights_stream_beside_the_first_part_alone(table):
    """FlexGen's OPT-30B: its cache in 4 bits hides beside each of 8 parts, its weights not."""
    parts = dict(predicted(table, "opt-30b 4-bit cache, 512").parts)
    link, host = 1.2e10, load_serving_engine("flexgen").handling.pageable_bytes_per_s
    weights, cached = 48 * 12 * 7168**2 * 2, 512 * (512 + 16) * 48 * 2 * 7168 * 0.5625
    beside = parts["gemm"] + parts["attention"] + parts["elementwise"]
    assert cached / link < beside
    exposed = (weights + cached / 8) / link - beside / 8
    assert parts["stream"] == pytest.approx(cached / host + exposed, rel=0.01)


def test_attention_of_what_is_below_may_be_the_hosts(table):
    """FlexGen's OPT-30B in 16 bits: the cache stays in host memory."""
    parts = dict(predicted(table, "opt-30b fp16 streamed, 512").parts)
    cached = 144 * (512 + 16) * 48 * 2 * 7168 * 2
    assert parts["cpu"] == pytest.approx(cached / 1.23e10, rel=0.01) and "attention" in parts
    assert parts["attention"] == 0
    weights, link = 38 * 12 * 7168**2 * 2, 1.2e10  # 10 layers stay on the GPU
    beside = (parts["gemm"] + parts["cpu"] + parts["elementwise"]) / 3
    assert parts["stream"] == pytest.approx(max(weights / link - beside, 0), rel=0.02)


@pytest.mark.parametrize("name", ["opt-6.7b", "opt-30b", "opt-175b"])
def test_every_point_of_flexgen_is_met(table, name):
    raws = [r for r in table["points"] if r["engine"] == "flexgen" and r["model"] == name]
    errors = {r["id"]: view.predicted(r, model_of(name), "").error for r in raws}
    assert len(errors) == 4 and max(map(abs, errors.values())) < 0.25, errors


def test_an_engine_may_leave_short_prompts_to_the_cpu(table):
    """KTransformers copies experts for prompts of more than 4096 tokens, quicker or not."""
    short = predicted(table, "minimax-m2 prompt 2048")
    experts = 62 * 2048 * 8 * 3 * 3072 * 1536 * 2  # FLOP of 8 experts a token
    cpu_s = experts / (3 * 6.14e11)  # host.flop_per_byte
    assert short.measure == "prefill_tokens_per_s"
    assert 2048 / short.predicted == pytest.approx(cpu_s, rel=0.15)
    assert 2048 / short.predicted > 8192 / predicted(table, "minimax-m2 prompt 8192").predicted
    assert short.fitted == "host.flop_per_byte"


@pytest.mark.parametrize(("raw", "word"), [
    ({"unpack_bytes": {"int3": 1.0}}, "int3"), ({"pageable": ["disks"]}, "disks"),
    ({"separate": ["norms"]}, "norms"), ({"speed": 2}, "speed"), ({"splits": 0}, "0 parts"),
    ({"pageable": ["cache"]}, "rate"), ({"attends": True}, "rate"),
])  # fmt: skip
def test_handling_that_cannot_be_is_refused(raw, word):
    with pytest.raises(UsageError, match=word):
        told(Handling(), raw)


def test_every_point_says_where_it_is_from(table):
    points = table["points"]
    assert {raw["source"] for raw in points} == set(table["sources"])
    assert {raw["model"] for raw in points} == set(table["models"])
    assert len({(raw["id"], raw["measure"]) for raw in points}) == len(points)


def test_the_command(tmp_path, monkeypatch, capsys):
    text = view.POINTS.read_text(encoding="utf-8")
    first = text.index("[[points]]")
    small = tmp_path / "points.toml"
    small.write_text(text[: text.index("[[points]]", first + 1)])
    found = view.validate_points(small)
    monkeypatch.setattr(view, "validate_points", lambda: found)
    with pytest.raises(SystemExit) as ended:
        cli.main(["validate", "--points", "--json"])
    body = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0 and body["schema"] == "validation-points/1"
    assert body["rows"] == 1 and body["points"][0]["measured"] == 104.9
