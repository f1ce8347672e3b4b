"""`plan hardware`: what the names mean."""

from __future__ import annotations

from typing import Annotated

import typer

from planner.commands.shared import Json, Verbose, print_json


def hardware_list(as_json: Json = False, verbose: Verbose = 0) -> int:
    """\b
    plan hardware list

    List the devices that --hardware knows.
    """
    from cost_models.hardware import catalogue, describe
    from planner.show_hardware import catalogue_text, cluster_json

    if as_json:
        print_json([cluster_json(describe(name)) for name in catalogue()])
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
        print_json(cluster_json(cluster))
    else:
        print(cluster_text(cluster))
    return 0
