"""`plan why`: the best plan without a decision, and what it costs."""

from __future__ import annotations

from typing import Annotated

import typer

from ir.errors import InfeasibleError
from planner import completing
from planner.commands.shared import Json, Plan_, Verbose, examine, print_json

INFEASIBLE = InfeasibleError.exit_code


def why(
    plan: Plan_ = "plan.json",
    refuse: Annotated[
        list[str],
        typer.Option(
            "--not", metavar="K=V", help="refuse a decision: tp=8, recompute=full",
            autocompletion=completing.pins,
        ),
    ] = [],  # noqa: B006
    layer: Annotated[
        str, typer.Option(metavar="NAME", show_default=False, help="one unit: layers.3")
    ] = "",
    effort: Annotated[
        int,
        typer.Option(metavar="N", min=0, show_default=False, help="searched (default: 1600)"),
    ] = 0,
    as_json: Json = False,
    verbose: Verbose = 0,
) -> int:
    """\b
    plan why
    plan why --not tp=8
    plan why plan.json --not recompute=full --not zero=3
    plan why --layer layers.3

    Say what binds: the best plan without a decision (searched anew), how much worse it is and by
    what, and what first stands in its way. Exit code 3 where nothing is left.
    """
    from planner import why_text
    from planner.refused import parse_refused, require_held
    from planner.search import DEFAULT_EFFORT
    from planner.why import Why

    refused = parse_refused(refuse)
    base = examine(plan)
    require_held(refused, base.plan.decisions, base.plan.graph, base.plan.workload)
    if layer:
        from planner import why_layer

        found = why_layer.layers(base, layer)
        text = "\n".join(map(why_layer.text, found))
        print_json(why_layer.document(found)) if as_json else print(text)
        return 0
    asked = Why(base)
    rows = (asked.alternative(refused, effort or DEFAULT_EFFORT),) if refused else asked.rows()
    if as_json:
        print_json(why_text.document(base, rows))
    elif refused:
        print(why_text.alternative_text(base, rows[0]))
    else:
        print(why_text.table_text(base, rows))
    return INFEASIBLE if refused and rows[0].estimate is None else 0
