"""`plan size`: read the arguments, compare the catalogue, print the front."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Annotated

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
)
from planner.commands.shared import (
    Args,
    Assume,
    Cache,
    Engine,
    Json,
    MaxCost,
    MaxMemory,
    Model,
    Optimizer,
    Prices,
    Task,
    Verbose,
    check_objective,
    parse_args,
    print_json,
)
from planner.commands.size_serving import size_serving
from planner.console import progress, say


def size(
    model: Model,
    task: Task = "train",
    target: Annotated[
        list[str],
        typer.Option(
            "--target", metavar="K=V", help="tokens_per_s=1e6, days=30 (with --tokens), step_time_s"
        ),
    ] = [],  # noqa: B006
    tokens: Annotated[
        str, typer.Option(metavar="N", show_default=False, help="of the whole training: 15T")
    ] = "",
    hardware: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            show_default=False,
            autocompletion=completing.devices,
            help="devices, by commas, and .toml files (default: the catalogue)",
        ),
    ] = "",
    prices: Prices = "",
    objective: Annotated[
        str,
        typer.Option(
            show_default=False,
            autocompletion=completing.objectives,
            help="what the first row is best by: time, cost (default with prices), energy, memory,"
            " gpus (default without)",
        ),
    ] = "",
    max_gpus: Annotated[
        int | None,
        typer.Option(min=1, show_default=False, help="GPUs at most (default: 16384; serve: 64)"),
    ] = None,
    max_memory: MaxMemory = "",
    max_cost: MaxCost = None,
    assume: Assume = [],  # noqa: B006
    every: Annotated[
        bool, typer.Option("--all", help="search and show also what others beat in everything")
    ] = False,
    seq_len: Annotated[
        int | None,
        typer.Option(help="tokens a sample (default: the model's maximum, at most 8192)"),
    ] = None,
    global_batch: Annotated[
        int | None, typer.Option(help="samples a step, the same for all (default: 4M tokens)")
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            autocompletion=completing.precisions,
            help="fp32, bf16, fp16, fp8, nvfp4, or bf16,fp8; devices without it are left out"
        ),
    ] = "bf16",
    optimizer: Optimizer = None,
    engine: Engine = None,
    effort: Annotated[
        int, typer.Option(metavar="N", min=1, help="programs searched for each candidate")
    ] = 60,
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
    fix: Annotated[
        list[str],
        typer.Option(
            metavar="K=V", help="serve: a decision that is made: weights=int4, tp=8",
            autocompletion=completing.pins,
        ),
    ] = [],  # noqa: B006
    arg: Args = [],  # noqa: B006
    as_json: Json = False,
    cache: Cache = True,
    verbose: Verbose = 0,
) -> int:
    """\b
    plan size examples/llama.py --target tokens_per_s=1e6
    plan size config.json --target days=30 --tokens 15T --prices prices.toml
    plan size model.py --target step_time_s=10 --hardware h100,b200 --max-gpus 512
    plan size config.json --task serve --batch 32 --max-ttft 2s --max-tpot 50ms

    Which hardware, and how much of it: devices and counts compared, and the Pareto front.
    """
    from cost_models.fleet import parts_of
    from cost_models.forward import forward_of
    from cost_models.hardware import catalogue
    from cost_models.operations import parse_operations
    from cost_models.prices import load_prices
    from cost_models.units import parse_count
    from planner.capturing import capture
    from planner.decisions import Pins
    from planner.limits import Limits, parse_memory
    from planner.options import TraceOptions
    from planner.show_size import ordered, size_json, size_text
    from planner.sizing import MOST_GPUS, Sizer
    from planner.sizing_options import Question, parse_devices, parse_target
    from planner.workload import Asked, resolve

    flags = ServeFlags(
        prompt=prompt, output=output, batch=batch, max_ttft=max_ttft, max_tpot=max_tpot,
        allow=tuple(allow), keep=tuple(keep), max_bits=max_bits, kv_window=kv_window,
        kv_policy=kv_policy,
    )  # fmt: skip
    if task == "serve":
        return size_serving(
            flags,
            TraceOptions(model=model, args=parse_args(arg), cache=cache,
                         asked=Asked(task=task, engine=engine, precision=precision)),
            hardware=hardware, prices=prices, objective=objective, fix=fix, most_gpus=max_gpus,
            every=every, as_json=as_json,
            training={"target": target, "tokens": tokens, "seq_len": seq_len,
                      "global_batch": global_batch, "optimizer": optimizer, "assume": assume,
                      "max_memory": max_memory, "max_cost": max_cost is not None},
        )  # fmt: skip
    if task != "train":
        raise UsageError(f"--task {task} is not one of plan size", hints=("--task serve",))
    refuse_serving(flags)
    if fix:
        raise UsageError("--fix is of serving", hints=("--task serve",))
    total = parse_count(tokens, f"--tokens {tokens}") if tokens else 0.0
    goal, operations = parse_target(target, total), parse_operations(assume)
    devices = parse_devices(hardware)
    names = [part.name for c in devices for part in parts_of(c)]
    priced = load_prices(prices, names) if prices else {}
    check_objective(objective, prices, max_cost)
    if objective == "cost" and not prices:
        raise UsageError("--objective cost and --max-cost need prices",
                         hints=("--prices FILE", "docs/size.md has the format"))  # fmt: skip
    able = tuple(
        c for c in devices
        if all(p.device.has(word) for p in parts_of(c) for word in precision.split(","))
    )  # fmt: skip
    if not able:
        raise UsageError(f"none of the devices computes in {precision}")
    with progress() as report:
        asked = Asked(
            engine=engine, seq_len=seq_len, global_batch=global_batch, precision=precision,
            optimizer=optimizer,
        )  # fmt: skip
        options = TraceOptions(model=model, args=parse_args(arg), asked=asked, cache=cache)
        first = replace(parts_of(able[0])[0], count=1)
        graph = capture(options, first, progress=report)
        workload, echo = resolve(graph, first, asked, Pins())
        graph = forward_of(graph, workload.engine)
        question = Question(
            graph=graph, workload=workload, target=goal, tokens=total,
            limits=Limits(
                memory_bytes=parse_memory(max_memory),
                usd_per_million_tokens=max_cost, gpus=max_gpus or MOST_GPUS,
            ),
            operations=operations, prices=priced,
            objective=objective or ("cost" if prices else "gpus"),
            without=((
                f"without {precision}",
                tuple(c.name for c in devices if c not in able),
            ),),
        )  # fmt: skip
        sizer = Sizer(
            graph=graph, workload=workload, target=goal, operations=operations,
            limits=question.limits, prices=priced, axes=question.axes, effort=effort,
            every=every, progress=report,
        )  # fmt: skip
        found = sizer.run(able)
    for line in echo:
        say(line)
    if as_json:
        print_json(size_json(found, question))
        return 0
    print(size_text(found, question, every=every))
    best = next(row for row, on in ordered(found, question.objective) if on).hardware
    if all(part.name in catalogue() for part in parts_of(best)):
        asks = {
            "--hardware": best.spec, "--global-batch": workload.global_batch, "--seq-len": seq_len,
            "--precision": precision if precision != "bf16" else None, "--optimizer": optimizer,
            "--engine": engine, "--max-memory": max_memory or None,
        }  # fmt: skip
        words = ["plan", "trace", model, *(word for text in arg for word in ("--arg", text))]
        words += [str(w) for row in asks.items() if row[1] is not None for w in row]
        say(f"to plan it: {shlex.join(words)}")
    return 0
