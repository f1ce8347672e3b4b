"""`plan trace`: read the arguments, plan, write the plan, print what it is."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ir.errors import UsageError
from planner import completing
from planner.commands.serving import (
    Allow,
    Batch,
    Keep,
    KvPolicy,
    KvWindow,
    MaxBits,
    MaxTpot,
    MaxTtft,
    Prompt,
    ServeFlags,
    Tokens,
    refuse_serving,
    trace_serving,
)
from planner.commands.shared import (
    Args,
    Assume,
    Cache,
    Embed,
    Engine,
    Json,
    MaxCost,
    MaxMemory,
    Model,
    Optimizer,
    Prices,
    Task,
    Verbose,
    Written,
    check_objective,
    parse_args,
    prices_of,
    print_json,
)
from planner.console import INTERRUPTED, progress, say
from planner.targets import require_target

if TYPE_CHECKING:
    from planner.options import TraceResult

SLACK = "5%"  # of a step, that memory may cost where nothing is said


def trace(
    model: Model = "",
    hardware: Annotated[
        str,
        typer.Option(
            "--hardware", metavar="HW", help="NAMExCOUNT, a .toml file, or a sum",
            autocompletion=completing.hardware,
        ),
    ] = "",
    fix: Annotated[
        list[str],
        typer.Option(
            "--fix", metavar="K=V", help="pin a decision: tp=8, recompute=full:12",
            autocompletion=completing.pins,
        ),
    ] = [],  # noqa: B006
    seq_len: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            show_default=False,
            help="tokens a sample (default: the model's maximum, at most 8192); or N..M",
        ),
    ] = None,
    global_batch: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            show_default=False,
            help="samples a step (default: about 4M tokens, or 32 images a GPU); or N..M",
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            autocompletion=completing.precisions,
            help="fp32, bf16, fp16, fp8, nvfp4 (default: bf16 where the device has it); bf16,fp8: "
            "matmuls of layers in fp8 where that is quicker"
        ),
    ] = None,
    optimizer: Optimizer = None,
    engine: Engine = None,
    base: Annotated[
        str,
        typer.Option(
            metavar="PLAN",
            show_default=False,
            help="plan again for other hardware: its workload, and its model where none is named",
        ),
    ] = "",
    stability: Annotated[
        str,
        typer.Option(
            metavar="P%",
            show_default=False,
            help="with --base: of plans within P% of the best, the one that changes least",
        ),
    ] = "",
    expert_imbalance: Annotated[
        float,
        typer.Option(
            metavar="X",
            show_default=False,
            help="load of the busiest expert rank over the mean, as training measured it",
        ),
    ] = 1.0,
    task: Task = "train",
    objective: Annotated[
        str,
        typer.Option(
            autocompletion=completing.objectives,
            help="time, cost, energy, memory (most free), gpus (fewest that fit)",
        ),
    ] = "time",
    slack: Annotated[
        str,
        typer.Option(
            metavar="X%", show_default=False,
            help="how much longer a step may be with --objective memory (default: 5%)",
        ),
    ] = "",
    max_memory: MaxMemory = "",
    max_cost: MaxCost = None,
    max_gpus: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="of --hardware's at most: the count is then open"),
    ] = None,
    prices: Prices = "",
    assume: Assume = [],  # noqa: B006
    axis_gain: Annotated[
        str,
        typer.Option(
            metavar="P%", help="of the step that each of pp, tp, cp and experts must earn: 0%: none"
        ),
    ] = "2%",
    effort: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, show_default=False, help="programs searched (default: 1600)"
        ),
    ] = 0,
    prompt: Prompt = None,
    output: Tokens = None,
    batch: Batch = None,
    max_ttft: MaxTtft = "",
    max_tpot: MaxTpot = "",
    allow: Allow = [],  # noqa: B006
    keep: Keep = [],  # noqa: B006
    max_bits: MaxBits = None,
    kv_window: KvWindow = None,
    kv_policy: KvPolicy = "",
    arg: Args = [],  # noqa: B006
    path: Written = "plan.json",
    embed: Embed = False,
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
    plan trace config.json --task serve --hardware a6000x1 --batch 1 --allow int4

    Trace a model, cost and search its layouts on the hardware, and write the plan.
    """
    from cost_models.fleet import load_any, parts_of
    from cost_models.operations import parse_operations
    from planner.capturing import begun
    from planner.decisions import parse_pins
    from planner.limits import Limits, parse_memory, parse_share, parse_sizes
    from planner.options import TraceOptions
    from planner.score import AXIS_GAIN_PPM, PPM
    from planner.workload import Asked

    if as_json and path == "-":
        raise UsageError("--json and -o - both want stdout", hints=("-o plan.json --json",))
    require_target(path, embed=embed)
    if not model and not base:
        raise UsageError(
            "plan trace needs a MODEL",
            hints=("plan trace model.py --hardware HW", "--base plan.json: that plan's"),
        )
    if not hardware:
        raise UsageError("plan trace needs the hardware", hints=("--hardware h100x64",))
    flags = ServeFlags(
        prompt=prompt, output=output, batch=batch, max_ttft=max_ttft, max_tpot=max_tpot,
        allow=tuple(allow), keep=tuple(keep), max_bits=max_bits, kv_window=kv_window,
        kv_policy=kv_policy,
    )  # fmt: skip
    if task == "serve":
        return trace_serving(
            flags,
            TraceOptions(
                model=model, hardware=hardware, args=parse_args(arg), cache=cache, fold=fold,
                asked=Asked(task=task, engine=engine, precision=precision), objective=objective,
            ),
            path, embed=embed, as_json=as_json, verbose=verbose, fix=fix,
            training={"seq_len": seq_len, "global_batch": global_batch, "optimizer": optimizer,
                      "base": base, "stability": stability, "prices": prices, "assume": assume,
                      "max_gpus": max_gpus, "max_cost": max_cost, "max_memory": max_memory,
                      "effort": effort},
        )  # fmt: skip
    refuse_serving(flags)
    check_objective(objective, prices, max_cost)
    if stability and not base:
        raise UsageError("--stability has nothing to stay with", hints=("--base old.json",))
    if stability and objective in ("memory", "gpus"):
        raise UsageError(f"--stability is of the step time, --objective {objective} is not")
    if slack and objective != "memory":
        raise UsageError(f"--slack {slack} is of --objective memory, not {objective}")
    if assume and not prices:
        raise UsageError("--assume is of what --prices cost", hints=("--prices FILE",))
    if stability and parse_share(axis_gain, "--axis-gain") != AXIS_GAIN_PPM / PPM:
        raise UsageError("--stability and --axis-gain are two ways to choose among like plans")
    batches = parse_sizes(global_batch, "--global-batch")
    seq_lens = parse_sizes(seq_len, "--seq-len")
    found = load_any(hardware)
    options = TraceOptions(
        model=model,
        hardware=hardware,
        args=parse_args(arg),
        pins=parse_pins(fix),
        asked=Asked(
            task=task,
            engine=engine,
            seq_len=seq_lens[0] if len(seq_lens) == 1 else None,
            global_batch=batches[0] if len(batches) == 1 else None,
            precision=precision,
            optimizer=optimizer,
            expert_imbalance=expert_imbalance,
        ),
        base=base,
        stability=parse_share(stability, "--stability") if stability else None,
        cache=cache,
        fold=fold,
        gain_ppm=round(parse_share(axis_gain, "--axis-gain") * 1e6),
        effort=effort,
        objective=objective,
        limits=Limits(
            memory_bytes=parse_memory(max_memory),
            usd_per_million_tokens=max_cost,
            gpus=max_gpus,
        ),
        prices=prices_of(prices, parts_of(found)),
        operations=parse_operations(assume),
        slack=parse_share(slack or SLACK, "--slack"),
        batches=batches if len(batches) > 1 else (),
        seq_lens=seq_lens if len(seq_lens) > 1 else (),
    )
    with begun(options, found) as ahead:  # before what plans is loaded
        from planner.objectives import run as search

        with progress() as report:
            result: TraceResult = search(options, progress=report, ahead=ahead)
    result.plan.save(path, embed=embed)
    _print(result, path, as_json=as_json)
    if verbose:
        say(", ".join(f"{key} {value:.2f}" for key, value in asdict(result.timing).items()))
    return INTERRUPTED if result.interrupted else 0


def _print(result: TraceResult, path: str, *, as_json: bool) -> None:
    """The summary, or the document; on stderr what is not the result."""
    from planner.show import document, summary

    plan, estimate = result.plan, result.estimate
    if as_json:
        for line in result.echo:
            say(line)
        print_json(
            document(
                plan, estimate, timing=result.timing, baselines=result.baselines,
                charges=result.charges,
            )
        )  # fmt: skip
    else:
        text = summary(plan, estimate, notes=result.echo, baselines=result.baselines)
        say(text) if path == "-" else print(text)
    if result.interrupted:
        say("interrupted: the best plan so far is kept, marked FEASIBLE")
    if path != "-":
        say(f"wrote {path}")
