"""Published points of serving on small machines: `plan validate --points`."""

import json

import pytest

from cost_models.checked_toml import read_toml
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
    for one in points:
        step_s = sum(seconds for _, seconds in one.parts)
        assert one.predicted == pytest.approx(1 / step_s)


def test_what_streams_from_host_and_disk_is_met(table):
    """FlexGen's OPT-30B from host memory, weights and cache, on a T4; nothing fitted."""
    raw = next(raw for raw in table["points"] if raw["id"] == "opt-30b fp16 streamed")
    model = view.model_of(table["models"]["opt-30b"])
    found = view.predicted(raw, model, "")
    assert abs(found.error) < 0.15
    link = 1.2e10  # T4's
    layer, cached = 12 * 7168**2 * 2, 2 * 7168 * 2  # bytes of a layer, and of a token there
    moved = 38 * layer + 48 * 144 * (512 + 16) * cached  # 10 layers stay on the GPU
    parts = dict(found.parts)
    step_s = sum(parts.values())
    assert step_s == pytest.approx(moved / link, rel=0.02)  # the link is busy throughout


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
