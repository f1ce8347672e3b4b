"""The command line: read arguments, call one function, print its value, return a code.

stdout has the result and nothing else. Everything heavy is imported by the command that needs it,
so that show, diff and check answer at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ir.errors import UsageError
from planner.console import INTERRUPTED, progress, run, say
from planner.exporting import export

if TYPE_CHECKING:
    from planner.check import Checked
    from planner.options import TraceResult

DIFFERENT = 2  # with --detailed-exitcode

Plan_ = Annotated[str, typer.Argument(metavar="PLAN", help="a path, '-' (stdin), or REV:path")]
Json = Annotated[bool, typer.Option("--json", help="one JSON document, base units")]
Verbose = Annotated[
    int, typer.Option("-v", "--verbose", count=True, help="-v: timing; -vv: also tracebacks")
]
Args = Annotated[
    list[str], typer.Option("--arg", metavar="K=V", help="argument of the model's factory")
]
Cache = Annotated[
    bool, typer.Option("--cache/--no-cache", help="use the traced graph if nothing changed")
]


def trace(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="model.py, model.py:factory, config.json or its folder",
            show_default=False,
        ),
    ] = "",
    hardware: Annotated[
        str, typer.Option("--hardware", metavar="HW", help="NAMExCOUNT, or a .toml file")
    ] = "",
    fix: Annotated[
        list[str],
        typer.Option("--fix", metavar="K=V", help="pin a decision: tp=8, recompute=full:12"),
    ] = [],  # noqa: B006
    seq_len: Annotated[
        int | None,
        typer.Option(help="tokens a sample (default: the model's maximum, at most 8192)"),
    ] = None,
    global_batch: Annotated[
        int | None,
        typer.Option(help="samples a step (default: about 4M tokens, or 32 images a GPU)"),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="fp32, bf16, fp16, fp8, nvfp4 (default: bf16 where the device has it)"),
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="adamw (default), sgd, adafactor, adamw8bit, muon")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="native, native-compiled (default), torchtitan, megatron, deepspeed"),
    ] = None,
    base: Annotated[
        str,
        typer.Option(
            metavar="PLAN", show_default=False,
            help="plan again for other hardware: its workload, and its model where none is named",
        ),
    ] = "",
    expert_imbalance: Annotated[
        float,
        typer.Option(
            metavar="X", show_default=False,
            help="load of the busiest expert rank over the mean, as training measured it",
        ),
    ] = 1.0,
    task: Annotated[str, typer.Option(help="train")] = "train",
    effort: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, show_default=False, help="programs searched (default: 2500)"
        ),
    ] = 0,
    arg: Args = [],  # noqa: B006
    output: Annotated[
        str, typer.Option("-o", "--output", metavar="PATH", help="the plan; '-' is stdout")
    ] = "plan.json",
    embed: Annotated[
        bool, typer.Option("--embed", help="put the graph inside the plan, not beside it")
    ] = False,
    as_json: Json = False,
    cache: Cache = True,
    fold: Annotated[
        bool, typer.Option("--fold/--no-fold", help="trace one unit of each class, not all")
    ] = True,
    verbose: Verbose = 0,
) -> int:
    """\b
    plan trace examples/llama.py --hardware h100x64
    plan trace config.json --hardware h100x2048 --seq-len 4096 --fix ep=64
    plan trace model.py:tiny --hardware cluster.toml --arg layers=4 -o - | plan show -

    Trace a model, cost and search its layouts on the hardware, and write the plan.
    """
    from cost_models.hardware import load_hardware
    from planner.decisions import parse_pins
    from planner.options import TraceOptions
    from planner.workload import Asked

    if as_json and output == "-":
        raise UsageError("--json and -o - both want stdout", hints=("-o plan.json --json",))
    if output != "-" and Path(output).is_dir():
        raise UsageError(f"-o {output} is a folder", hints=(f"-o {output}/plan.json",))
    if not Path(output).parent.is_dir():
        raise UsageError(f"-o {output}: there is no folder {Path(output).parent}")
    if not model and not base:
        raise UsageError(
            "plan trace needs a MODEL",
            hints=("plan trace model.py --hardware HW", "--base plan.json: that plan's"),
        )
    if not hardware:
        raise UsageError("plan trace needs the hardware", hints=("--hardware h100x64",))
    load_hardware(hardware)
    options = TraceOptions(
        model=model,
        hardware=hardware,
        args=parse_args(arg),
        pins=parse_pins(fix),
        asked=Asked(
            task=task,
            engine=engine,
            seq_len=seq_len,
            global_batch=global_batch,
            precision=precision,
            optimizer=optimizer,
            expert_imbalance=expert_imbalance,
        ),
        base=base,
        cache=cache,
        fold=fold,
        effort=effort,
    )
    from planner.tracing import run as search

    with progress() as report:
        result: TraceResult = search(options, progress=report)
    result.plan.save(output, embed=embed)
    _print_trace(result, output, as_json=as_json)
    if verbose:
        say(", ".join(f"{key} {value:.2f}" for key, value in asdict(result.timing).items()))
    return INTERRUPTED if result.interrupted else 0


def show(
    plan: Plan_ = "plan.json",
    layers: Annotated[
        bool, typer.Option("--layers", help="every stage and parameter placement")
    ] = False,
    stage: Annotated[
        int | None, typer.Option(metavar="N", help="one global stage: memory, collectives")
    ] = None,
    as_json: Json = False,
    verbose: Verbose = 0,
) -> int:
    """\b
    plan show
    plan show HEAD~1:plan.json --stage 3

    Say what a plan decides, what it will cost, and how sure that is.
    """
    from planner import show as view

    checked = _examine(plan)
    found, estimate = checked.plan, checked.estimate
    if as_json:
        _print_json(view.document(found, estimate))
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
    form: Annotated[str, typer.Option("--format", help="text or json")] = "text",
    as_json: Json = False,
    detailed: Annotated[
        bool, typer.Option("--detailed-exitcode", help="exit 2 if the plans differ, 0 if not")
    ] = False,
    fail_on: Annotated[
        str | None,
        typer.Option(metavar="LIMITS", help="exit 4 if worse: step-time=+3%,memory=+5%"),
    ] = None,
    verbose: Verbose = 0,
) -> int:
    """\b
    plan diff HEAD:plan.json
    plan diff old.json plan.json --fail-on step-time=+3%

    Say what changed between two plans, and what that does. Both are costed with today's constants.
    """
    from planner import differ

    if form not in ("text", "json"):
        raise UsageError(f"--format {form} is not known", why="this version has text and json")
    if old == new == "-":
        raise UsageError("both plans cannot come from stdin")
    found = differ.diff(_examine(old), _examine(new))
    if as_json or form == "json":
        _print_json(differ.diff_json(found))
    else:
        print(differ.diff_text(found))
    if fail_on is not None:
        differ.gate(found, fail_on)
    return DIFFERENT if detailed and found.differs else 0


def check(
    plan: Plan_ = "plan.json",
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="trace it anew and compare; runs its file")
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
    from planner.plan import load_cluster, read
    from planner.plan_text import parse_header
    from planner.workload import Asked

    checked = _examine(plan)
    if model is not None:
        from planner.tracing import capture

        found = checked.plan
        options = TraceOptions(
            model=model, hardware=found.hardware, args=parse_args(arg), cache=cache,
            asked=Asked(precision=found.workload.precision),
        )  # fmt: skip
        traced = capture(options, load_cluster(found, _folder_of(plan)))
        checks.require_model(checked.plan, traced, model)
    checks.require_fit(checked)
    if update and checked.moved:
        if plan == "-" or not Path(plan).exists():
            raise UsageError(f"--update cannot rewrite {plan}", why="expected the path of a file")
        embedded = parse_header(read(plan), plan).graph is not None
        checks.updated(checked).save(plan, embed=embedded)
        for line in checked.moved:
            say(line)
        say(f"wrote {plan}")
        checked = _examine(plan)
    if as_json:
        _print_json({"schema": "check/1", "plan": plan, "valid": True, "fits": True,
                     "stale": bool(checked.moved), "moved": list(checked.moved)})  # fmt: skip
    checks.require_fresh(checked, plan)
    if not as_json:
        print(f"{plan}: valid, fits {checked.plan.hardware}, not stale")
    return 0


def verify(
    plan: Plan_ = "plan.json",
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="as plan trace took it; runs its file")
    ] = "",
    arg: Args = [],  # noqa: B006
    twin: Annotated[
        list[str],
        typer.Option(metavar="K=V", help="cut the model: argument of its factory, or config key"),
    ] = [],  # noqa: B006
    processes: Annotated[
        int, typer.Option(metavar="N", min=2, help="most local processes; else one pair of axes"
                          " at a time")
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

    Run a small twin of the plan on local processes: does it compute what the model does?
    """
    from planner import verifying
    from planner.plan import load

    if not model:
        raise UsageError("plan verify needs the model", hints=("--model model.py",))
    found = verifying.run_command(
        load(plan), verifying.VerifyOptions(
            model=model, args=dict(parse_args(arg)), changes=dict(parse_args(twin, "--twin")),
            folder=_folder_of(plan), processes=processes, ledger=ledger, cache=cache,
        ),
    )  # fmt: skip
    if as_json:
        _print_json(verifying.document(found, plan, model))
    else:
        print(verifying.text(found))
    verifying.require_holds(found, plan)
    return 0


def hardware_list(as_json: Json = False, verbose: Verbose = 0) -> int:
    """\b
    plan hardware list

    List the devices that --hardware knows.
    """
    from cost_models.hardware import catalogue, describe
    from planner.show_hardware import catalogue_text, cluster_json

    if as_json:
        _print_json([cluster_json(describe(name)) for name in catalogue()])
    else:
        print(catalogue_text())
    return 0


def hardware_show(
    hardware: Annotated[str, typer.Argument(metavar="HW", help="NAME, NAMExCOUNT or a .toml file")],
    as_json: Json = False,
    verbose: Verbose = 0,
) -> int:
    """\b
    plan hardware show h100x64

    Show what a hardware name means, every number with its source.
    """
    from cost_models.hardware import catalogue, describe, load_hardware
    from planner.show_hardware import cluster_json, cluster_text

    cluster = describe(hardware) if hardware in catalogue() else load_hardware(hardware)
    if as_json:
        _print_json(cluster_json(cluster))
    else:
        print(cluster_text(cluster))
    return 0


COMMANDS: tuple[tuple[str, Callable[..., int], str], ...] = (
    ("trace", trace, "trace, cost, solve, write the plan"),
    ("show", show, "what a plan says, in a screenful"),
    ("diff", diff, "what changed between two plans"),
    ("check", check, "is a plan valid, fresh, and does it fit; for CI"),
    ("verify", verify, "does a small twin compute what the model does"),
    ("export", export, "another engine's own configuration"),
)


def app() -> typer.Typer:
    """The commands and their help."""
    plain: dict[str, Any] = {
        "no_args_is_help": True, "add_completion": False, "rich_markup_mode": None,
    }  # fmt: skip
    top = typer.Typer(help="Plan how a PyTorch model is spread over hardware.", **plain)
    for name, function, words in COMMANDS:
        top.command(name, short_help=words)(function)
    names = typer.Typer(help="What the hardware names mean.", **plain)
    names.command("list", short_help="the devices there are")(hardware_list)
    names.command("show", short_help="one of them, with sources")(hardware_show)
    top.add_typer(names, name="hardware")
    return top


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit with its code; quiet where the reader of stdout has gone."""
    try:
        code = run(app(), list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1  # as the library has it, where it meets the closed pipe first
    sys.exit(code)


def parse_args(texts: Sequence[str], flag: str = "--arg") -> tuple[tuple[str, str], ...]:
    """Read `--arg k=v`. Raises UsageError for one without a name or given twice."""
    pairs = tuple(text.partition("=")[::2] for text in texts)
    for text, (name, _) in zip(texts, pairs):
        if not name.isidentifier() or "=" not in text:
            raise UsageError(f"{flag} {text} is no argument", why="expected NAME=VALUE")
        if [n for n, _ in pairs].count(name) > 1:
            raise UsageError(f"{flag} {name} is given twice")
    return pairs


def _print_trace(result: TraceResult, output: str, *, as_json: bool) -> None:
    """The summary, or the document; on stderr what is not the result."""
    from planner.show import document, summary

    plan, estimate = result.plan, result.estimate
    if as_json:
        for line in result.echo:
            say(line)
        _print_json(document(plan, estimate, timing=result.timing, baselines=result.baselines))
    else:
        text = summary(plan, estimate, notes=result.echo, baselines=result.baselines)
        print(text, file=sys.stderr if output == "-" else sys.stdout)
    if result.interrupted:
        say("interrupted: the best plan so far is kept, marked FEASIBLE")
    if output != "-":
        say(f"wrote {output}")


def _examine(source: str) -> Checked:
    from planner.check import examine
    from planner.plan import load

    return examine(load(source), _folder_of(source))


def _folder_of(source: str) -> Path:
    """Where a plan's own hardware file may lie beside it."""
    inside = Path(source).exists() or source == "-" or ":" not in source
    return Path(source).parent if inside and source != "-" else Path()


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


if __name__ == "__main__":
    main()
