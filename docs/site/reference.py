"""The reference pages of the site, made of the code: commands, Python, plan and hardware files."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Mapping
from typing import Any

import typer

import planner
from planner import cli
from planner.decisions import VOCABULARY
from planner.schemas import hardware_schema, plan_schema

GENERATED = "<!-- made of the code by docs/site/reference.py -->\n\n"


def pages() -> dict[str, str]:
    """Path in the site -> markdown."""
    made = {"cli": commands(), "python": functions(), "plan": plan_file(),
            "hardware": hardware_file()}  # fmt: skip
    return {f"reference/{name}.md": GENERATED + text for name, text in made.items()}


def commands() -> str:
    """Every command with its arguments, options and examples."""
    group = typing.cast(Any, typer.main.get_command(cli.app()))
    lines = ["# Command line", "", "Exit codes: 0 done; 1 a fault of the input; 2 the plans differ"
             " (with `--detailed-exitcode`); 3 infeasible; 4 a gate failed, the plan is stale, or"
             " verify found a difference; 64 usage; 130 interrupted.", ""]  # fmt: skip
    for name, command in group.commands.items():
        nested = getattr(command, "commands", None)
        inside = {f"{name} {sub}": child for sub, child in (nested or {}).items()}
        for path, one in (inside or {name: command}).items():
            lines += _command(path, one)
    return "\n".join(lines)


def _command(name: str, command: Any) -> list[str]:
    """One command: its examples, what it does, a row an option."""
    usage, _, rest = (command.help or "").partition("\n\n")
    examples = [line.strip() for line in usage.replace("\b", "").splitlines() if line.strip()]
    lines = [f"## plan {name}", "", " ".join(rest.split()), "", "```", *examples, "```", "",
             "| | | |", "|---|---|---|"]  # fmt: skip
    for given in command.params:
        if given.name == "help":
            continue
        names = ", ".join(f"`{opt}`" for opt in (*given.opts, *given.secondary_opts))
        if given.param_type_name == "argument":
            names = f"`{given.metavar or given.name.upper()}`"
        word = given.metavar or ""
        default = given.default if isinstance(given.default, str | int | float) else None
        said = f" (default {default})" if default not in (None, "", False, True, 0) else ""
        lines.append(f"| {names} | {_cell(word)} | {_cell((given.help or '') + said)} |")
    return [*lines, ""]


def functions() -> str:
    """The public functions of `planner`."""
    lines = ["# Python", "", "```python", "import planner", "```", "",
             "What a plan, `planner.cost` and `planner.diff` return shows itself in a notebook.",
             ""]  # fmt: skip
    for name in planner.__all__:
        function = getattr(planner, name)
        lines += [f"## planner.{name}", "", "```python", f"{name}{inspect.signature(function)}",
                  "```", "", inspect.cleandoc(function.__doc__ or ""), ""]  # fmt: skip
    return "\n".join(lines)


def plan_file() -> str:
    """The keys of plan.json, and the vocabulary of decisions."""
    lines = ["# Plan file", "", "`plan.json` and the graph beside it, `plan.graph`, are written by"
             " `plan trace`. [plan.schema.json](../schemas/plan.schema.json) is the JSON Schema,"
             " for editors.", "", "## Decisions", "", "The one vocabulary of pins (`--fix"
             " key=value`), of the file and of exports:", "", "| key | words | meaning | where it"
             " is left out |", "|---|---|---|---|"]  # fmt: skip
    lines += [f"| `{key.name}` | {_cell(key.words)} | {_cell(key.meaning)} | {_cell(key.default)} |"
              for key in VOCABULARY]  # fmt: skip
    schema = plan_schema()
    for title, branch in (("training", "else"), ("serving", "then")):
        lines += ["", f"## Sections of a plan of {title}", "", *_keys(schema[branch])]
    return "\n".join(lines) + "\n"


def hardware_file() -> str:
    """The keys of a hardware file."""
    schema = hardware_schema()
    lines = ["# Hardware file", "", "What `--hardware FILE.toml` reads; [add a"
             " device](../add-a-device.md) explains it."
             " [hardware.schema.json](../schemas/hardware.schema.json) is the JSON Schema, for"
             " editors.", "", "## Hardware of one kind", "", *_keys(schema["else"]), "",
             "## Several kinds", "", *_keys(schema["then"])]  # fmt: skip
    return "\n".join(lines) + "\n"


def _keys(schema: Mapping[str, Any]) -> list[str]:
    """A row a key, tables inside tables by their path."""
    rows = ["| key | what | must be there |", "|---|---|---|"]

    def walk(at: Mapping[str, Any], path: str) -> None:
        for name, kind in at.get("properties", {}).items():
            inner = kind.get("items", kind) if kind.get("type") == "array" else kind
            needed = "yes" if name in at.get("required", ()) else ""
            rows.append(f"| `{path}{name}` | {_cell(_what(kind))} | {needed} |")
            walk(inner, f"{path}{name}{'[]' if inner is not kind else ''}.")

    walk(schema, "")
    return rows


def _what(kind: Mapping[str, Any]) -> str:
    if "enum" in kind or "const" in kind:
        return " ".join(map(str, kind.get("enum", [kind.get("const")])))
    said = kind.get("description", "")
    word = kind.get("type", "") if "anyOf" not in kind else ""
    return ": ".join(part for part in (word, said) if part)


def _cell(text: str) -> str:
    return re.sub(r"([|<>*])", r"\\\1", text)
