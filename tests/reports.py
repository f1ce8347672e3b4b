"""What tests of `plan report` share: a small plan of every kind, and a page as a tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path

from tiny_models import graph_of

from cost_models.decisions import Decisions, Workload
from cost_models.estimate import estimate
from cost_models.hardware import load_hardware
from planner.check import Checked, examine
from planner.plan import Solver, make_plan
from planner.report.markup import VOID
from planner.serving.asked import ServeAsked, parse_serve_pins
from planner.serving.check import CheckedServing, examine_serving
from planner.serving.tracing import plan_serving

PIPELINE = Decisions(pp=2, dp=4, shard=4, zero=1, micro_batch=1, microbatches=6,
                     stages=(1, 1), recompute=((1, 0), (0, 0)))  # fmt: skip


def small(hardware: str = "h100x8", decisions: Decisions = PIPELINE, **changes: object) -> Checked:
    """Two layers in a pipeline of two, costed. changes: of the graph."""
    graph = replace(graph_of("llama"), **changes)
    cluster = load_hardware(hardware)
    batch = decisions.dp * decisions.micro_batch * decisions.microbatches
    workload = Workload(global_batch=batch, seq_len=512)
    made = estimate(graph, cluster, workload, decisions, {})
    plan = make_plan(graph, hardware, cluster, workload, decisions, {}, made, Solver())
    return examine(plan, Path())


def served(
    hardware: str = "h100x2", pins: Sequence[str] = (), **asked: object
) -> CheckedServing:
    """The same two layers, served."""
    plan, _, _ = plan_serving(
        graph_of("llama"), hardware, load_hardware(hardware),
        ServeAsked(prompt=128, output=32, batch=8, **asked), parse_serve_pins(pins),
    )  # fmt: skip
    return examine_serving(plan, Path())


@dataclass
class Element:
    """An element of a page: its children, and its own text."""

    tag: str
    attributes: dict[str, str]
    parent: Element | None = None
    children: list[Element] = field(default_factory=list)
    text: str = ""

    def all(self, tag: str = "", **attributes: str) -> list[Element]:
        """What is inside, itself with it, in order. class_ is one class of several."""
        wanted = attributes.pop("class_", "")
        here = (not tag or self.tag == tag) and all(
            self.attributes.get(k.replace("_", "-")) == v for k, v in attributes.items()
        ) and (not wanted or wanted in self.attributes.get("class", "").split())
        words = {**attributes, "class_": wanted}
        return [self] * here + [e for c in self.children for e in c.all(tag, **words)]

    def words(self) -> str:
        return self.text + "".join(c.words() for c in self.children)


class _Tree(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.at = self.root = Element("page", {})

    def handle_starttag(self, tag, attrs):
        made = Element(tag, dict(attrs), self.at)
        self.at.children.append(made)
        if tag not in VOID:
            self.at = made

    def handle_startendtag(self, tag, attrs):
        self.at.children.append(Element(tag, dict(attrs), self.at))

    def handle_endtag(self, tag):
        assert self.at.tag == tag, f"</{tag}> closes <{self.at.tag}>"
        self.at = self.at.parent

    def handle_data(self, data):
        self.at.text += data


def tree(text: str) -> Element:
    """A page as a tree; fails where its tags do not nest."""
    parser = _Tree()
    parser.feed(text)
    parser.close()
    assert parser.at is parser.root
    return parser.root
