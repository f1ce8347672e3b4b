"""`plan report`: a plan as a page to look at, and its step as a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ir.errors import UsageError
from planner.commands.shared import Verbose, folder_of
from planner.console import progress, say
from planner.targets import require_shown


def report(
    plans: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[OLD] PLAN", show_default=False,
            help="a path, '-' (stdin), or REV:path; two are put side by side (plan.json)",
        ),
    ] = None,
    path: Annotated[
        str, typer.Option("-o", metavar="PATH", help="the page; '-' is stdout")
    ] = "report.html",
    trace: Annotated[
        str,
        typer.Option(
            metavar="PATH", show_default=False,
            help="also the simulated step as Chrome trace events, for Perfetto",
        ),
    ] = "",
    why: Annotated[
        bool,
        typer.Option("--why/--no-why", help="search for what else there is: seconds"),
    ] = True,
    effort: Annotated[
        int,
        typer.Option(metavar="N", min=0, show_default=False, help="of each search (default: 100)"),
    ] = 0,
    verbose: Verbose = 0,
) -> int:
    """\b
    plan report
    plan report plan.json -o report.html --trace step.json
    plan report HEAD~1:plan.json plan.json

    Write a plan as one static HTML page: the verdict, memory by rank, the simulated timeline, where
    the time goes, where everything lies, why not otherwise, what would change the decision, and
    what all that rests on. Two plans are put side by side. It loads nothing.
    """
    sources = plans or ["plan.json"]
    if len(sources) > 2:
        raise UsageError(f"plan report takes one plan or two, not {len(sources)}")
    if sources.count("-") > 1:
        raise UsageError("both plans cannot come from stdin")
    if trace and trace == path:
        raise UsageError(f"the page and the trace are both {path}", hints=("--trace step.json",))
    require_shown(path, flag="-o ", name="report.html")
    if trace:
        require_shown(trace, flag="--trace ", name="step.json")
    _write(path, trace, sources, ask=why, effort=effort)
    return 0


def _write(path: str, trace: str, sources: list[str], *, ask: bool, effort: int) -> None:
    """The page, and the trace of the (new) plan's step where one is asked for."""
    from planner.plan import Plan, load_plan, require_alike

    found = [load_plan(source) for source in sources]
    folders = [folder_of(source) for source in sources]
    training = [(p, f) for p, f in zip(found, folders) if isinstance(p, Plan)]
    serving = [(p, f) for p, f in zip(found, folders) if not isinstance(p, Plan)]
    require_alike(found[0], found[-1])
    if serving and trace:
        raise UsageError(
            "--trace is of plans of training",
            why="a server is predicted as a closed loop: no schedule of a pipeline is simulated",
        )
    if serving:
        from planner.report.serving_page import page
        from planner.serving.check import examine_serving

        _save(path, page([examine_serving(p, f) for p, f in serving], ask=ask))
        return
    from planner.check import examine
    from planner.report import training as report_of
    from planner.why import ROW_EFFORT

    checked = [examine(p, f) for p, f in training]
    with progress() as show:
        made = report_of.page(checked, ask=ask, effort=effort or ROW_EFFORT, progress=show)
    _save(path, made)
    if trace:
        from planner.report.trace_events import trace_text

        plan = checked[-1].plan
        title = f"{plan.graph.name} on {plan.hardware}"
        _save(trace, trace_text(report_of.simulate(checked[-1]), plan.decisions, title))


def _save(target: str, text: str) -> None:
    from planner.plan import write_whole

    if target == "-":
        print(text, end="")
        return
    write_whole(Path(target), text)
    say(f"wrote {target}")
