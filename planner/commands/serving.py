"""`plan trace --task serve`: its options, and what it prints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ir.errors import UsageError
from planner.commands.shared import folder_of, print_json
from planner.console import progress, say

if TYPE_CHECKING:
    from planner.serving.asked import ServeAsked
    from planner.serving.plan import ServingPlan

Prompt = Annotated[
    int | None,
    typer.Option(metavar="N", show_default=False, help="serve: tokens of a prompt (default: 1024)"),
]
Tokens = Annotated[
    int | None,
    typer.Option(
        "--output", metavar="N", show_default=False, help="serve: tokens of a reply (default: 1024)"
    ),
]
Batch = Annotated[
    int | None,
    typer.Option(metavar="N", show_default=False, help="serve: requests at once (or searched)"),
]
MaxTtft = Annotated[
    str, typer.Option(metavar="T", show_default=False, help="serve: to the first token: 500ms, 2s")
]
MaxTpot = Annotated[
    str, typer.Option(metavar="T", show_default=False, help="serve: between tokens at most: 50ms")
]
Allow = Annotated[
    list[str],
    typer.Option(
        metavar="FORMATS", show_default=False,
        help="serve: lossy formats that may be used: int8,int4,fp8,kv:fp8",
    ),
]  # fmt: skip
Keep = Annotated[
    list[str],
    typer.Option(
        metavar="BLOCK=FORMAT", show_default=False, help="serve: a block's format: attention=bf16"
    ),
]
MaxBits = Annotated[
    int | None,
    typer.Option(
        metavar="N", show_default=False, help="serve: every weight that is not kept in so few bits"
    ),
]
KvWindow = Annotated[
    int | None,
    typer.Option(
        metavar="N", show_default=False, help="serve: the cache forgets what is older (lossy)"
    ),
]
KvPolicy = Annotated[
    str,
    typer.Option(
        metavar="POLICY", show_default=False,
        help="serve: of older tokens summary:BLOCK or retrieve:TOPxBLOCK (lossy)",
    ),
]  # fmt: skip
TRAINING = ("seq_len", "global_batch", "optimizer", "base", "stability", "prices", "assume",
            "max_gpus", "max_cost", "max_memory", "effort")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeFlags:
    """The options of serving as given; what is left out is None, "" or empty."""

    prompt: int | None = None
    output: int | None = None
    batch: int | None = None
    max_ttft: str = ""
    max_tpot: str = ""
    allow: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    max_bits: int | None = None
    kv_window: int | None = None
    kv_policy: str = ""

    def given(self) -> list[str]:
        """The flags that were used."""
        return [
            f"--{name.replace('_', '-')}" for name in self.__dataclass_fields__
            if getattr(self, name) not in (None, "", ())
        ]  # fmt: skip


def refuse_serving(flags: ServeFlags) -> None:
    """Raises UsageError where options of serving are used to plan training."""
    if flags.given():
        raise UsageError(f"{flags.given()[0]} is of serving", hints=("--task serve",))


def asked_of(
    flags: ServeFlags, engine: str | None, precision: str, objective: str = "latency"
) -> ServeAsked:
    """What the options ask. Raises UsageError for one that is none."""
    from planner.serving.asked import ServeAsked, parse_allowed, parse_keep, parse_seconds

    allow, allow_kv = parse_allowed(flags.allow)
    given = {k: getattr(flags, k) for k in ("prompt", "output", "batch", "max_bits", "kv_window")
             if getattr(flags, k) is not None}  # fmt: skip
    if flags.batch is not None and flags.batch < 1:
        raise UsageError(f"--batch {flags.batch} is no number of requests")
    return ServeAsked(
        engine=engine or ServeAsked().engine, objective=objective, precision=precision,
        allow=allow, allow_kv=allow_kv, keep=parse_keep(flags.keep),
        kv_policy=flags.kv_policy, max_ttft_s=parse_seconds(flags.max_ttft, "--max-ttft"),
        max_tpot_s=parse_seconds(flags.max_tpot, "--max-tpot"), **given,
    )  # fmt: skip


def trace_serving(
    flags: ServeFlags, options: Any, output: str, *, embed: bool, as_json: bool, verbose: int,
    fix: list[str], training: dict[str, Any],
) -> int:  # fmt: skip
    """Plan serving, write the plan, print what it is. options: TraceOptions of the capture.
    training: options that only training has, as given."""
    from cost_models.hardware import load_hardware
    from planner.capturing import Clock, capture
    from planner.serving.asked import parse_serve_pins
    from planner.serving.show import document, summary
    from planner.serving.tracing import plan_serving
    from planner.workload import precision_of

    used = [name for name in TRAINING if training.get(name)]
    if used:
        raise UsageError(f"--{used[0].replace('_', '-')} is of training", hints=("--task train",))
    if not options.model:
        raise UsageError("plan trace --task serve needs a MODEL")
    pins = parse_serve_pins(fix)
    if "," in (options.asked.precision or ""):
        raise UsageError(f"--precision {options.asked.precision} is of training",
                         hints=("--precision bf16 --allow fp8",))  # fmt: skip
    if flags.max_bits is not None and flags.max_bits < 1:
        raise UsageError(f"--max-bits {flags.max_bits} is no number of bits")
    cluster = load_hardware(options.hardware)
    precision, echo = precision_of(options.asked, cluster)
    objective = "latency" if options.objective == "time" else options.objective
    asked = asked_of(flags, options.asked.engine, precision, objective)
    clock = Clock()
    with progress() as report:
        graph = capture(options, cluster, clock, report)
        longest = graph.max_seq_len
        if longest and asked.prompt + asked.output > longest:
            echo = (*echo, f"{asked.prompt + asked.output} tokens are beyond the model's {longest}")
        plan, found, others = plan_serving(graph, options.hardware, cluster, asked, pins, report)
    clock.mark("solve_s")
    plan.save(output, embed=embed)
    timing = clock.timing()
    if as_json:
        for line in echo:
            say(line)
        print_json(document(plan, found, others=others, timing=timing))
    else:
        text = summary(plan, found, notes=echo, others=others)
        say(text) if output == "-" else print(text)
    if output != "-":
        say(f"wrote {output}")
    if verbose:
        say(f"trace {timing.trace_s:.2f}, solve {timing.solve_s:.2f}, total {timing.total_s:.2f}")
    return 0


def show_serving(plan: ServingPlan, folder: Path, *, as_json: bool, used: list[str]) -> int:
    """`plan show` of a plan of serving. used: options that only plans of training have."""
    if used:
        raise UsageError(f"{used[0]} is of plans of training", hints=("plan show, --json",))
    from planner.serving.check import examine_serving
    from planner.serving.show import document, summary

    checked = examine_serving(plan, folder)
    if as_json:
        print_json(document(plan, checked.found))
    else:
        stale = ("stale (plan check --update re-costs it):",) if checked.moved else ()
        print(summary(plan, checked.found, notes=(*stale, *checked.moved)))
    return 0


def check_serving(
    plan: ServingPlan, source: str, *, model: str | None, update: bool, as_json: bool
) -> int:
    """`plan check` of a plan of serving."""
    from ir.errors import GateError
    from planner.plan import read
    from planner.plan_text import parse_header
    from planner.serving.check import examine_serving, require_fit, updated

    if model is not None:
        raise UsageError("--model is of plans of training",
                         why="a plan of serving is compared with the model when it is served",
                         hints=("plan trace MODEL --task serve plans anew",))  # fmt: skip
    checked = examine_serving(plan, folder_of(source))
    require_fit(checked)
    if update and checked.moved:
        if source == "-" or not Path(source).is_file():
            raise UsageError(f"--update cannot rewrite {source}", why="expected a file's path")
        embedded = parse_header(read(source), source).graph is not None
        updated(checked).save(source, embed=embedded)
        say(f"wrote {source}")
    elif checked.moved:
        raise GateError("the plan is stale", where=source, why="\n".join(checked.moved),
                        hints=("plan check --update re-costs and rewrites it",))  # fmt: skip
    if as_json:
        print_json({"schema": "check/1", "plan": source, "valid": True, "fits": True,
                    "stale": False, "moved": []})  # fmt: skip
    else:
        print(f"{source}: valid, fits {plan.hardware}, not stale")
    return 0
