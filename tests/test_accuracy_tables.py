"""The tables of README.md and docs/accuracy.md are those of the files that the fits write."""

import tomllib

import pytest

from cost_models.validation.accuracy import ACCURACY, write_accuracy
from ir.errors import PlanError
from planner.validation import tables, targets


def test_the_documents_have_the_figures_that_the_fits_wrote():
    """After a fit: `python -m planner.validation.tables`."""
    for name in tables.DOCUMENTS:
        text = (tables.ROOT / name).read_text()
        assert tables.rewritten(text, name) == text, name


def test_a_block_is_made_of_the_fits_file_and_the_rest_stays(tmp_path):
    one = "n = 3\nmape = 0.1\nmedian = 0.08\nbias = -0.02\np90 = 0.2\n"
    ways = (tables.BY_GROUP, tables.SOURCE_OUT, tables.GENERATION_OUT)
    names = [way + name for way in ways for name in ("fp8", "h100", "all")]
    path = tmp_path / "accuracy.toml"
    path.write_text('note = "by group"\n' + "".join(f'[classes."{n}"]\n{one}' for n in names))
    made = tables.rewritten("a\n<!-- figures: classes -->\nold\n<!-- /figures -->\nb", "x", path)
    head, *lines = made.splitlines()
    assert (head, lines[-1]) == ("a", "b") and "old" not in made
    assert [line.split(" | ")[0] for line in lines[3:6]] == ["| all", "| h100", "| fp8"]
    assert lines[3] == "| all | 3 | 10.0% | 8.0% | -2.0% | 20.0% |"
    text = "<!-- figures: left-out -->\n<!-- /figures -->\n"
    assert tables.rewritten(text, "x", path).count("| 10.0% | 8.0% | -2.0% ") == 6
    assert "None are shipped" in tables.rewritten(text, "x", tmp_path / "none.toml")


@pytest.mark.parametrize("text", [
    "no block", "<!-- figures: ours -->\n<!-- /figures -->", "<!-- figures: classes -->\n",
])  # fmt: skip
def test_a_block_that_cannot_be_made_is_named(text):
    with pytest.raises(PlanError, match=r"x: .* is no block of figures"):
        tables.rewritten(text, "x")


FIGURES = {
    "classes": {
        name: {"n": n, "groups": 3, "mape": mape, "median": 0.05, "bias": -0.031, "p90": 0.2}
        for name, n, mape in (
            ("all", 40, 0.08), ("dense", 20, 0.0704), ("moe", 10, 0.2), ("hybrid", 10, 0.1),
            ("h100", 12, 0.149), ("a100", 28, 0.151), ("megatron", 9, 0.5),
            ("source out, all", 40, 0.2), ("GPU generation out, all", 40, 0.05),
        )
    },
    "ranking": {"any": {"pairs": 9, "groups": 2, "tau": 0.797, "in_sample_tau": 0.9}},
    "memory": {"all": {"n": 5, "mape": 0.09, "median": 0.1, "bias": 0.0, "p90": 0.2}},
    "verdicts": {"out of memory": {"n": 2, "beyond": 1, "near": 2, "missed": ()},
                 "ran": {"n": 40, "beyond": 1, "wrong": ("a",)}},
    "kernels": {kind: {"n": 9, "median": 0.0501, "p90": 0.21 if kind == "moe" else 0.1,
                       "device_out_n": 9, "device_out_median": 0.1}
                for kind, _ in targets._KERNELS},
}  # fmt: skip


def test_targets_are_compared_unrounded_and_printed_so_that_it_shows():
    found = {words: (reached, met) for words, _, reached, met in targets.lines(FIGURES)}
    assert found["step, dense, MAPE"] == ("7.04%", "missed")
    assert found["step, bias"] == ("-3.1%", "missed")
    assert found["step, mixtures of experts and hybrids, MAPE"] == (
        "15.0%; without hybrids 20.0%", "missed"
    )  # fmt: skip
    (each,) = (v for k, v in found.items() if k.startswith("step, each device"))
    assert each == ("15.1% at most, `a100`", "missed")  # 9 rows of megatron say nothing
    assert found["ranking, any, Kendall tau"] == ("0.7970; in-sample 0.90", "missed")
    assert found["peak memory, MAPE"] == ("9.0%", "missed")
    assert found["out of memory: predicted not to fit, or within 5% of capacity"][1] == "met"
    assert found["ran: predicted beyond capacity by over 2%"] == ("1 of 40", "missed")
    assert found["kernels, gemm bf16, median"] == ("5.01%", "missed")
    assert found["kernels, p90 of each kind"] == ("10.0% to 21.0%: above in moe", "missed")


def test_each_fit_writes_its_part_of_the_file(tmp_path):
    path = tmp_path / "accuracy.toml"
    write_accuracy({"note": "a note", "classes": {"all, \"x\"": {"n": 3, "mape": 0.12345}}}, path)
    write_accuracy({"verdicts": {"ran": {"n": 2, "wrong": ("a", "b")}}}, path)
    write_accuracy({"classes": {"all": {"n": 4, "mape": 0.5}}}, path)
    assert tomllib.loads(path.read_text()) == {
        "note": "a note", "classes": {"all": {"n": 4, "mape": 0.5}},
        "verdicts": {"ran": {"n": 2, "wrong": ["a", "b"]}},
    }  # fmt: skip
    text = path.read_text()
    write_accuracy({}, path)
    assert path.read_text() == text


def test_every_part_of_the_shipped_file_is_there():
    found = tomllib.loads(ACCURACY.read_text())
    assert all(part in found for part in targets.NEEDED)
    for block in ("targets", "memory", "verdicts", "ranking", "kernel-kinds"):
        mark = f"<!-- figures: {block} -->\n<!-- /figures -->\n"
        assert "None are shipped" not in tables.rewritten(mark, "x")
