"""How plans, costs and differences look in a notebook; the notebook of the examples, run."""

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

import planner

NOTEBOOK = Path(__file__).parent.parent / "examples" / "three_minutes.ipynb"


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    """The file's document, the names that its code made, run in order in one namespace, and by the
    place of a cell its value and what it printed."""
    document = json.loads(NOTEBOOK.read_text())
    names, found = {}, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("notebook"))
        for place, cell in enumerate(document["cells"]):
            if cell["cell_type"] == "code":
                *body, last = "".join(cell["source"]).rsplit("\n", 1)
                try:
                    value = compile(last, "cell", "eval")
                except SyntaxError:  # the last line is no expression: an end of a statement
                    body, value = [*body, last], None
                with contextlib.redirect_stdout(io.StringIO()) as printed:
                    exec("\n".join(body), names)
                    shown = eval(value, names) if value else None
                found[place] = shown, printed.getvalue()
    return document, names, found


def test_the_notebook_shows_what_it_computes(notebook, update_golden):
    document, _, found = notebook
    shown = printed = 0
    for place, (value, text) in found.items():
        for output in document["cells"][place]["outputs"]:
            if output["output_type"] == "stream":
                output["text"] = text.splitlines(keepends=True)
                printed += 1
            data = output.get("data", {})
            if "text/html" in data:
                data["text/html"] = value._repr_html_().splitlines(keepends=True)
                shown += 1
            if "text/plain" in data:
                data["text/plain"] = repr(value).splitlines(keepends=True)
    assert (shown, printed) == (2, 2)
    update_golden(NOTEBOOK, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def test_figures_of_a_plan_are_those_of_its_estimate(notebook):
    _, names, _ = notebook
    plan = names["plan"]
    costed = planner.cost(plan)
    assert costed.estimate.step_time_s == pytest.approx(plan.step_time_us / 1e6, abs=1e-6)
    assert str(plan) == repr(costed)
    assert costed._repr_html_() == plan._repr_html_()


def test_names_of_a_plan_are_no_markup(notebook):
    plan = notebook[1]["plan"]
    hostile = replace(plan.graph, name="<script>alert(1)</script>")
    html = replace(plan, graph=hostile)._repr_html_()
    assert "<script" not in html and "&lt;script&gt;" in html
    gone = replace(plan, hardware="<b>x</b>.toml")
    assert "cannot be read" in gone._repr_html_() and "<b>x" not in gone._repr_html_()
    assert "cannot be read" in str(gone) and repr(gone) in str(gone)
