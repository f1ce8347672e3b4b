"""What the numbers rest on: assumptions first, then every constant and datum with its source."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cost_models.constants_table import load_constants
from cost_models.fleet import Hardware, parts_of
from planner.plan import Plan
from planner.report.charts import Section, sentences, table
from planner.report.markup import Children, el, join


def section(
    plan: Plan, hardware: Hardware, assumptions: Sequence[str], error: float
) -> Section:
    """error: the model's expected relative error of the step."""
    from cost_models.engines import load_engine

    engine = load_engine(plan.workload.engine)
    return made(
        hardware, assumptions, [(engine.title, engine.sources)],
        f"The step is expected to be within {error:.0%} of what is measured: the error of runs"
        " that the constants were not fitted on.",
    )  # fmt: skip


def made(
    hardware: Hardware, assumptions: Sequence[str],
    engines: Iterable[tuple[str, Iterable[tuple[str, str]]]], lede: str,
) -> Section:  # fmt: skip
    """The section from what is assumed, and the engines' constants with their sources."""
    behind = [
        _sources(f"{title}: what runs the plan", sources) for title, sources in engines
    ]  # fmt: skip
    for part in parts_of(hardware):
        constants = load_constants(part.device.constants)
        rows = [(c.name, c.source) for c in constants.items]
        behind += [
            _sources(f"{part.device.title}: cost constants in use", rows),
            _sources(f"{part.spec}: hardware data", part.sources),
        ]
    words = [text.partition(": ") for text in assumptions]
    listed = el("dl", [
        el("div", el("dt", name), el("dd", source or None)) for name, _, source in words
    ], class_="assumed")  # fmt: skip
    count = len(words)
    return Section(
        key="assumptions", title="What it rests on",
        lede=sentences(lede, f"{count} {'things are' if count != 1 else 'thing is'} assumed, not"
                       " measured on this hardware." if count else "Nothing is merely assumed."),
        body=join([listed, *behind]),
    )  # fmt: skip


def _sources(title: str, sources: Iterable[tuple[str, str]]) -> Children:
    rows = list(sources)
    if not rows:
        return None
    return el("details", el("summary", title, el("span", f"{len(rows)}", class_="count")),
              table(title, ["what", "source"], rows, words=2))  # fmt: skip
