"""The tables of README.md and docs/accuracy.md are those of the files that the fits write."""

import pytest

from ir.errors import PlanError
from planner.validation import tables


def test_the_documents_have_the_figures_that_the_fits_wrote():
    """After a fit: `python -m planner.validation.tables`."""
    for name in tables.DOCUMENTS:
        text = (tables.ROOT / name).read_text()
        assert tables.rewritten(text, name) == text, name


def test_a_block_is_made_of_the_fits_file_and_the_rest_stays(tmp_path):
    one = "n = 3\nmape = 0.1\nmedian = 0.08\nbias = -0.02\np90 = 0.2\n"
    ways = (tables.BY_GROUP, tables.SOURCE_OUT, tables.FAMILY_OUT)
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
