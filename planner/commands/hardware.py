"""`plan hardware`: what the names mean."""

from __future__ import annotations

from typing import Annotated

import typer

from planner import completing
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
    hardware: Annotated[
        str,
        typer.Argument(
            metavar="HW", help="NAME, or as --hardware", autocompletion=completing.hardware
        ),
    ],
    as_json: Json = False,
    verbose: Verbose = 0,
) -> int:
    """\b
    plan hardware show h100x64

    Show what a hardware name means, every number with its source.
    """
    from cost_models.fleet import load_any
    from cost_models.hardware import catalogue, describe
    from planner.show_hardware import hardware_json, hardware_text

    found = describe(hardware) if hardware in catalogue() else load_any(hardware)
    if as_json:
        print_json(hardware_json(found))
    else:
        print(hardware_text(found))
    return 0
