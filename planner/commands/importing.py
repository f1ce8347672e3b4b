"""`plan import`: another engine's configuration as a plan."""

from __future__ import annotations

from typing import Annotated

import typer

from ir.errors import UsageError
from planner import completing
from planner.commands.shared import (
    Args,
    Cache,
    Embed,
    Json,
    Optimizer,
    Verbose,
    Written,
    parse_args,
    print_json,
)
from planner.console import progress, say
from planner.targets import require_target


def import_(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="script or arguments, JSON, TOML, YAML, Python")
    ] = "",
    engine: Annotated[
        str,
        typer.Option(
            "--from", metavar="ENGINE", help="megatron, deepspeed, torchtitan, accelerate",
            autocompletion=completing.sources,
        ),
    ] = "",
    model: Annotated[
        str,
        typer.Option(
            "--model", metavar="MODEL", help="as plan trace takes it",
            autocompletion=completing.model,
        ),
    ] = "",
    hardware: Annotated[
        str,
        typer.Option(
            "--hardware", metavar="HW", help="NAMExCOUNT or a .toml file",
            autocompletion=completing.hardware,
        ),
    ] = "",
    fix: Annotated[
        list[str],
        typer.Option(
            "--fix", metavar="K=V", help="what the file leaves to code: micro_batch=2",
            autocompletion=completing.pins,
        ),
    ] = [],  # noqa: B006
    seq_len: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="where the file does not say it")
    ] = None,
    global_batch: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="where the file does not say it")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            autocompletion=completing.precisions, help="where the file leaves it open (auto)"
        ),
    ] = None,
    optimizer: Optimizer = None,
    arg: Args = [],  # noqa: B006
    path: Written = "imported.json",
    embed: Embed = False,
    as_json: Json = False,
    cache: Cache = True,
    verbose: Verbose = 0,
) -> int:
    """\b
    plan import pretrain.sh --from megatron --model config.json --hardware h100x64
    plan import ds.json --from deepspeed --model model.py --hardware a100x8 --fix recompute=full
    plan diff imported.json best.json

    Read an existing configuration as a fully pinned plan: what it costs, and whether it fits.
    """
    from dataclasses import asdict

    from planner.decisions import parse_pins
    from planner.importing import run, source_of
    from planner.options import TraceOptions
    from planner.show import document, summary
    from planner.workload import Asked

    needed = {"FILE": file, "--from ENGINE": engine, "--model MODEL": model,
              "--hardware HW": hardware}  # fmt: skip
    missing = [name for name, value in needed.items() if not value]
    if missing:
        raise UsageError(f"plan import needs {' and '.join(missing)}")
    if as_json and path == "-":
        raise UsageError("--json and -o - both want stdout", hints=("-o plan.json --json",))
    require_target(path, embed=embed)
    source_of(engine)
    options = TraceOptions(
        model=model, hardware=hardware, args=parse_args(arg), pins=parse_pins(fix), cache=cache,
        asked=Asked(seq_len=seq_len, global_batch=global_batch, precision=precision,
                    optimizer=optimizer),
    )  # fmt: skip
    with progress() as report:
        made = run(engine, file, options, report)
    result = made.result
    result.plan.save(path, embed=embed)
    if as_json:
        found = document(
            result.plan, result.estimate, timing=result.timing, baselines=result.baselines
        )
        found["import"] = {"from": engine, "not_understood": list(made.unknown),
                           "left_aside": list(made.aside), "notes": list(made.notes)}  # fmt: skip
        print_json(found)
    else:
        text = summary(result.plan, result.estimate, notes=result.echo, baselines=result.baselines)
        lines = [f"not understood: {row}" for row in made.unknown]
        lines += [f"note: {row}" for row in made.notes]
        if made.aside:
            lines.append(f"left aside, not of the layout: {len(made.aside)} settings"
                         + (f": {', '.join(made.aside)}" if verbose else " (-v names them)"))
        whole = "\n".join([text, *lines])
        say(whole) if path == "-" else print(whole)
    if verbose:
        say(", ".join(f"{key} {value:.2f}" for key, value in asdict(result.timing).items()))
    if path != "-":
        say(f"wrote {path}; plan trace finds what would be better, plan diff {path} PLAN compares")
    return 0
