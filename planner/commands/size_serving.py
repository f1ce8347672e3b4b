"""`plan size --task serve`: compare the catalogue for a load and its limits, print the front."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any

from ir.errors import UsageError
from planner.commands.serving import ServeFlags, asked_of
from planner.commands.shared import print_json
from planner.console import progress, say

OBJECTIVES = ("cost", "energy", "gpus", "time")


def size_serving(
    flags: ServeFlags, options: Any, *, hardware: str, prices: str, objective: str, fix: list[str],
    most_gpus: int | None, every: bool, as_json: bool, training: dict[str, Any],
) -> int:  # fmt: skip
    """Compare devices and counts. options: TraceOptions of the capture. training: options that only
    training has, as given."""
    from cost_models.fleet import Fleet
    from cost_models.hardware import catalogue
    from cost_models.prices import load_prices
    from cost_models.serving_reading import served_model
    from planner.capturing import capture
    from planner.serving.asked import parse_serve_pins
    from planner.serving.runnable import experts_of
    from planner.serving.show_size import Served, ordered, size_json, size_text
    from planner.serving.sizing import MOST_GPUS, ServeSizer
    from planner.sizing_options import parse_devices

    used = [name for name, value in training.items() if value]
    if used:
        raise UsageError(f"--{used[0].replace('_', '-')} is of training", hints=("--task train",))
    if objective and objective not in OBJECTIVES:
        raise UsageError(f"--objective {objective} is not one of sizes to serve",
                         why=f"known: {', '.join(OBJECTIVES)}")  # fmt: skip
    if objective == "cost" and not prices:
        raise UsageError("--objective cost needs prices",
                         hints=("--prices FILE", "docs/size.md has the format"))  # fmt: skip
    precision = options.asked.precision
    asked, pins = asked_of(flags, options.asked.engine, precision), parse_serve_pins(fix)
    devices = []
    for device in parse_devices(hardware):
        if isinstance(device, Fleet):
            raise UsageError(f"--hardware {device.spec}: sizes to serve are of devices of one kind",
                             hints=("--hardware " + ",".join(p.name for p in device.parts),))
        devices.append(device)
    priced = load_prices(prices, [c.name for c in devices]) if prices else {}
    able = tuple(c for c in devices if c.device.has(precision))
    if not able:
        raise UsageError(f"none of the devices computes in {precision}")
    most = most_gpus or MOST_GPUS
    with progress() as report:
        if not asked.batch:
            raise UsageError("plan size --task serve needs a load: how many requests at once",
                             hints=("--batch 32 --prompt 1024 --output 1024",))  # fmt: skip
        graph = capture(options, replace(able[0], count=1), progress=report)
        sizer = ServeSizer(
            model=served_model(graph, asked.engine), asked=asked, pins=pins,
            experts=experts_of(graph), prices=priced, most_gpus=most, every=every, progress=report,
        )  # fmt: skip
        found = sizer.run(able)
    of = Served(
        model=sizer.model, parameters=graph.parameter_count, asked=asked, most_gpus=most,
        objective=objective or found.axes[0],
        without=((f"without {precision}", tuple(c.name for c in devices if c not in able)),),
    )  # fmt: skip
    if as_json:
        print_json(size_json(found, of))
        return 0
    print(size_text(found, of, every=every))
    best = next(row for row, on in ordered(found, of.objective) if on).cluster
    if best.name in catalogue():
        say(f"to plan it: {_again(flags, options, best.spec, fix)}")
    return 0


def _again(flags: ServeFlags, options: Any, spec: str, fix: list[str]) -> str:
    """The command that plans a row."""
    words = ["plan", "trace", options.model]
    for name, value in options.args:
        words += ["--arg", f"{name}={value}"]
    words += ["--task", "serve", "--hardware", spec]
    if options.asked.engine:
        words += ["--engine", options.asked.engine]
    if options.asked.precision != "bf16":
        words += ["--precision", options.asked.precision]
    for name in flags.__dataclass_fields__:
        value = getattr(flags, name)
        for one in value if isinstance(value, tuple) else (value,):
            if one not in (None, ""):
                words += [f"--{name.replace('_', '-')}", str(one)]
    for pin in fix:
        words += ["--fix", pin]
    return shlex.join(words)
