"""`plan verify`: a twin of the plan on local processes."""

from __future__ import annotations

from typing import Annotated

import typer

from ir.errors import UsageError
from planner import completing
from planner.commands.shared import (
    Args,
    Cache,
    Json,
    Plan_,
    Verbose,
    folder_of,
    parse_args,
    print_json,
)


def verify(
    plan: Plan_ = "plan.json",
    model: Annotated[
        str,
        typer.Option(
            metavar="MODEL", help="as plan trace took it; runs its file",
            autocompletion=completing.model,
        ),
    ] = "",
    arg: Args = [],  # noqa: B006
    twin: Annotated[
        list[str],
        typer.Option(metavar="K=V", help="cut the model: argument of its factory, or config key"),
    ] = [],  # noqa: B006
    processes: Annotated[
        int,
        typer.Option(
            metavar="N", min=2, help="most local processes; else one pair of axes at a time"
        ),
    ] = 32,
    ledger: Annotated[
        bool, typer.Option("--ledger/--no-ledger", help="also compare bytes and collectives")
    ] = True,
    as_json: Json = False,
    cache: Cache = True,
    verbose: Verbose = 0,
) -> int:
    """\b
    plan verify --model examples/llama.py
    plan verify plan.json --model model.py --twin n_layers=4 --twin dim=64
    plan verify plan.json --model config.json

    Run a small twin of the plan on local processes: does it compute (of a plan of serving: does
    it answer) what the model does?
    """
    from planner import verifying
    from planner.plan import Plan, load_plan

    if not model:
        raise UsageError("plan verify needs the model", hints=("--model model.py",))
    made = load_plan(plan)
    options = verifying.VerifyOptions(
        model=model, args=dict(parse_args(arg)), changes=dict(parse_args(twin, "--twin")),
        folder=folder_of(plan), processes=processes, ledger=ledger, cache=cache,
    )  # fmt: skip
    if not isinstance(made, Plan):
        from planner.serving import verifying as serving

        served = serving.run_serving(made, options)
        if as_json:
            print_json(serving.document(served, plan, model))
        else:
            print(serving.text(served))
        serving.require_answers(served, plan)
        return 0
    found = verifying.run_command(made, options)
    if as_json:
        print_json(verifying.document(found, plan, model))
    else:
        print(verifying.text(found))
    verifying.require_holds(found, plan)
    return 0
