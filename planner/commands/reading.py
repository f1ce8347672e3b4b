"""The commands that read plans: show, diff, check. Without --model they never import torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ir.errors import UsageError
from planner import completing
from planner.commands.serving import check_serving, show_serving
from planner.commands.shared import (
    Args,
    Assume,
    Cache,
    Json,
    Plan_,
    Prices,
    Verbose,
    examine,
    folder_of,
    parse_args,
    prices_of,
    print_json,
)
from planner.console import say

if TYPE_CHECKING:
    from planner.differ import Diff

DIFFERENT = 2  # with --detailed-exitcode


def show(
    plan: Plan_ = "plan.json",
    layers: Annotated[
        bool, typer.Option("--layers", help="every stage and parameter placement")
    ] = False,
    stage: Annotated[
        int | None, typer.Option(metavar="N", help="one global stage: memory, collectives")
    ] = None,
    goodput: Annotated[
        bool, typer.Option("--goodput", help="what checkpoints and failures leave; input rates")
    ] = False,
    assume: Assume = [],  # noqa: B006
    prices: Prices = "",
    as_json: Json = False,
    verbose: Verbose = 0,
) -> int:
    """\b
    plan show
    plan show HEAD~1:plan.json --stage 3
    plan show --goodput --assume restart_s=300 --prices prices.toml

    Say what a plan decides, what it will cost, and how sure that is.
    """
    from cost_models.fleet import used_parts
    from cost_models.operations import parse_operations
    from planner import show as view
    from planner.check import examine as examine_plan
    from planner.plan import Plan, load_plan
    from planner.show_goodput import goodput_json, goodput_text

    operations = parse_operations(assume)
    if (assume or prices) and not goodput:
        flag = "--assume" if assume else "--prices"
        raise UsageError(f"{flag} is of --goodput", hints=("plan show --goodput ...",))
    read = load_plan(plan)
    if not isinstance(read, Plan):
        used = [flag for flag, on in (("--layers", layers), ("--stage", stage is not None),
                                      ("--goodput", goodput)) if on]  # fmt: skip
        return show_serving(read, folder_of(plan), as_json=as_json, used=used)
    checked = examine_plan(read, folder_of(plan))
    found, estimate = checked.plan, checked.estimate
    if goodput:
        priced = prices_of(prices, used_parts(checked.hardware, found.decisions))
        if as_json:
            print_json(goodput_json(checked, operations, priced))
        else:
            print(goodput_text(checked, operations, priced))
    elif as_json:
        print_json(view.document(found, estimate))
    elif layers:
        print(view.layers_text(found))
    elif stage is not None:
        print(view.stage_text(found, estimate, stage))
    else:
        stale = ("stale (plan check --update re-costs it):",) if checked.moved else ()
        print(view.summary(found, estimate, notes=(*stale, *checked.moved)))
    return 0


def diff(
    old: Annotated[str, typer.Argument(metavar="OLD", help="a path, '-' (stdin), or REV:path")],
    new: Annotated[str, typer.Argument(metavar="[NEW]", help="as OLD")] = "plan.json",
    form: Annotated[str, typer.Option(
        "--format", help="text, md (a comment), json", autocompletion=completing.forms)] = "text",
    as_json: Json = False,
    detailed: Annotated[
        bool, typer.Option("--detailed-exitcode", help="exit 2 if the plans differ, 0 if not")
    ] = False,
    fail_on: Annotated[
        str | None,
        typer.Option(metavar="LIMITS", help="exit 4 if worse: step-time=+3%,memory=+5%,ttft=+5%"),
    ] = None,
    verbose: Verbose = 0,
) -> int:
    """\b
    plan diff HEAD:plan.json
    plan diff old.json plan.json --fail-on step-time=+3%
    plan diff main:plan.json --format md

    Say what changed between two plans, and what that does. Both are costed with today's constants.
    """
    from planner import differ, differ_text

    if form not in ("text", "md", "json"):
        raise UsageError(f"--format {form} is not known", why="known: text md json")
    if as_json and form == "md":
        raise UsageError("--json and --format md ask for two forms", hints=("leave one out",))
    if old == new == "-":
        raise UsageError("both plans cannot come from stdin")
    found = difference(old, new)
    if fail_on is not None:
        differ.limits_of(found, fail_on)  # what is no limit is refused before anything is said
    if as_json or form == "json":
        print_json(differ_text.diff_json(found))
    elif form == "md":
        print(differ_text.diff_markdown(found, new))
    else:
        print(differ_text.diff_text(found))
    if fail_on is not None:
        differ.gate(found, fail_on)
    return DIFFERENT if detailed and found.differs else 0


def difference(old: str, new: str) -> Diff:
    """Two plans of a kind compared, each from where it lies."""
    from planner import check as checks
    from planner import differ
    from planner.plan import Plan, load_plan, require_alike

    a, b = load_plan(old), load_plan(new)
    require_alike(a, b)
    if isinstance(a, Plan) and isinstance(b, Plan):
        return differ.diff(checks.examine(a, folder_of(old)), checks.examine(b, folder_of(new)))
    assert not isinstance(a, Plan) and not isinstance(b, Plan)
    from planner.serving.check import examine_serving
    from planner.serving.differ import diff_serving

    return diff_serving(examine_serving(a, folder_of(old)), examine_serving(b, folder_of(new)))


def check(
    plan: Plan_ = "plan.json",
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="trace it anew and compare; runs its file",
            autocompletion=completing.model,
        ),
    ] = None,
    update: Annotated[
        bool, typer.Option("--update", help="re-cost a stale plan and rewrite it")
    ] = False,
    arg: Args = [],  # noqa: B006
    as_json: Json = False,
    cache: Cache = True,
    verbose: Verbose = 0,
) -> int:
    """\b
    plan check
    plan check --model examples/llama.py
    plan check --update

    Is the plan valid, not stale, and does it still fit? No solving; made for CI.
    """
    from planner import check as checks
    from planner.options import TraceOptions
    from planner.plan import Plan, load_cluster, load_plan, read
    from planner.plan_text import parse_header
    from planner.tightness import tight, tight_words
    from planner.workload import Asked

    given = load_plan(plan)
    if not isinstance(given, Plan):
        return check_serving(given, plan, model=model, update=update, as_json=as_json)
    checked = checks.examine(given, folder_of(plan))
    if model is not None:
        from planner.capturing import capture

        found = checked.plan
        options = TraceOptions(
            model=model, hardware=found.hardware, args=parse_args(arg), cache=cache,
            asked=Asked(precision=found.workload.precision),
        )  # fmt: skip
        traced = capture(options, load_cluster(found, folder_of(plan)))
        checks.require_model(checked.plan, traced, model)
    checks.require_fit(checked)
    if update and checked.moved:
        if plan == "-" or not Path(plan).is_file():
            raise UsageError(f"--update cannot rewrite {plan}", why="expected the path of a file")
        embedded = parse_header(read(plan), plan).graph is not None
        checks.updated(checked).save(plan, embed=embedded)
        for line in checked.moved:
            say(line)
        say(f"wrote {plan}")
        checked = examine(plan)
    if as_json:
        print_json({"schema": "check/1", "plan": plan, "valid": True, "fits": True,
                     "stale": bool(checked.moved), "moved": list(checked.moved)})  # fmt: skip
    checks.require_fresh(checked, plan)
    if not as_json:
        fits = f"fits {checked.plan.hardware}"
        if tight(checked.estimate):
            fits = f"{tight_words()}: {checked.plan.hardware}"
        print(f"{plan}: valid, {fits}, not stale")
    return 0
