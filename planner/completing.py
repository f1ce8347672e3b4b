"""What a shell completes: each word from the table that commands refuse others by.

The completers are given to typer (`autocompletion=`), which has the scripts of bash, zsh and fish.
Paths are the shell's own: where nothing is offered here, it offers files.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import typer

from ir.errors import PlanError

ASKED = "_PLAN_COMPLETE"  # the variable by which typer's scripts ask
COUNTS = tuple(str(1 << k) for k in range(15))  # offered where any whole number is taken
BREAKS = ("=", ":")  # bash takes these for words of their own
MOST_BYTES = 1 << 20  # of a model's file or a plan whose names are offered
PLACE, PLACEMENTS = "place:", ("S(0)", "S(1)", "R")


def hardware(incomplete: str) -> list[str]:
    """`h100x64`: the catalogue's names, then counts; after a `+` once more."""
    from cost_models.hardware import catalogue

    head, plus, last = incomplete.rpartition("+")
    names = [name for name in catalogue() if name.startswith(last)]
    counted = [name for name in catalogue() if last.startswith(f"{name}x")] or names
    if len(counted) == 1:
        return [f"{head}{plus}{counted[0]}x{count}" for count in COUNTS]
    return [f"{head}{plus}{name}" for name in names]


def devices(incomplete: str) -> list[str]:
    """Names of the catalogue, by commas."""
    from cost_models.hardware import catalogue

    head, comma, _ = incomplete.rpartition(",")
    return [f"{head}{comma}{name}" for name in catalogue()]


def pins(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """`tp=`, with its meaning; then the values. A key that stands alone is offered with those, so
    that the shell writes no space behind its `=`."""
    serving = ctx.params.get("task") == "serve"
    keys = _serving_keys() if serving else _training_keys()
    if incomplete and not serving and PLACE.startswith(incomplete[: len(PLACE)]):
        given = ctx.params.get("plan") or ctx.params.get("base") or "plan.json"
        keys |= {PLACE + name: ("placement on tp", [*PLACEMENTS]) for name in _patterns(given)}
    near = [key for key in keys if f"{key}=".startswith(incomplete.partition("=")[0])]
    if "=" in incomplete:
        near = [key for key in near if key == incomplete.partition("=")[0]]
    if len(near) != 1:
        return [(f"{key}=", keys[key][0]) for key in near if keys[key][1]]
    meaning, values = keys[near[0]]
    return [(f"{near[0]}={value}", meaning) for value in values]


def model(incomplete: str) -> list[str]:
    """`model.py:build`: the functions of a file that is named; it is parsed and never run."""
    path, colon, _ = incomplete.rpartition(":")
    if not colon:
        return []
    try:
        body = ast.parse(_text(path)).body
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return []
    names = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    beside = ("inputs", "loss")  # what a factory's file has with it
    return [f"{path}:{name}" for name in names if name not in beside and name[0] != "_"]


def targets(incomplete: str) -> list[tuple[str, str]]:
    """Of `plan export`."""
    from planner.export import TARGETS

    return [(name, target.made) for name, target in TARGETS.items()]


def sources(incomplete: str) -> list[str]:
    """Of `plan import`."""
    from planner.importing import SOURCES

    return [*SOURCES]


def engines(ctx: typer.Context, incomplete: str) -> list[str]:
    """Of training, or of serving."""
    if ctx.params.get("task") == "serve":
        from cost_models.serving_engines import serving_engines

        return [*serving_engines()]
    from cost_models.engines import engine_names

    return [*engine_names()]


def optimizers(incomplete: str) -> list[str]:
    """Of training."""
    from planner.workload import OPTIMIZERS

    return [*OPTIMIZERS]


def precisions(incomplete: str) -> list[str]:
    """Of the model; which of them a device has is said by planning."""
    from planner.workload import PRECISIONS

    return [*PRECISIONS]


def objectives(ctx: typer.Context, incomplete: str) -> list[str]:
    """Of training, or of serving."""
    if ctx.params.get("task") == "serve":
        from planner.serving.asked import OBJECTIVES as SERVING

        return [*SERVING]
    from planner.limits import OBJECTIVES

    return [*OBJECTIVES]


def tasks(incomplete: str) -> list[str]:
    """What is planned."""
    return ["train", "serve"]


def forms(incomplete: str) -> list[str]:
    """Of `plan diff`."""
    return ["text", "md", "json"]


def in_bash(run: Callable[[list[str]], Any]) -> None:
    """Answer bash, which splits `--fix tp=4` and `model.py:build` at the sign: put words together,
    ask, and give back what follows the sign, as bash has to have it: what is special to it behind
    a backslash. run: the command line, which answers and exits."""
    words = os.environ.get("COMP_WORDS", "").split("\n")
    at = min(int(os.environ.get("COMP_CWORD", "0")), len(words) - 1)
    whole: list[str] = []
    for index, word in enumerate(words[: at + 1]):
        glued = index > 1 and word and (word in BREAKS or words[index - 1] in BREAKS)
        whole[-1:] = [whole[-1] + word] if glued else [*whole[-1:], word]
    last = whole[-1]
    typed = "" if words[at] in BREAKS else words[at]  # what bash will write over
    head = last[: len(last) - len(typed)]
    if head.startswith("--"):
        head = head.partition("=")[2]
    os.environ["COMP_WORDS"], os.environ["COMP_CWORD"] = "\n".join(whole), str(len(whole) - 1)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        run([])
    for line in filter(None, said.getvalue().splitlines()):
        print(re.sub(r"[^\w@%+=:,./~-]", r"\\\g<0>", line).removeprefix(head))


def _text(path: str) -> str:
    """Of a file; empty where there is none to read."""
    try:
        small = Path(path).is_file() and Path(path).stat().st_size <= MOST_BYTES
        return Path(path).read_text(encoding="utf-8") if small else ""
    except (OSError, ValueError):
        return ""


def _patterns(path: str) -> list[str]:
    """The patterns of parameters that a plan places. A plan may be anybody's, and zsh evaluates
    what it is offered: a name with more in it than names have is left out."""
    try:
        found = [str(row["match"]) for row in json.loads(_text(path))["parameters"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return []
    return [name for name in found if re.fullmatch(r"[\w.{},*-]+", name, re.ASCII)]


def _training_keys() -> dict[str, tuple[str, list[str]]]:
    """Key -> its meaning, and values that it takes."""
    from planner.decisions import VOCABULARY, parse_pins

    return {key.name: (key.meaning, _taken(key.name, key.words.split(), parse_pins))
            for key in VOCABULARY}  # fmt: skip


def _serving_keys() -> dict[str, tuple[str, list[str]]]:
    from dataclasses import fields

    from cost_models.serving_decisions import KV_PLANNED, WEIGHTS_PLANNED
    from planner.serving.asked import KV_TIERS, ServePins, parse_serve_pins

    words = (*WEIGHTS_PLANNED, *KV_PLANNED, *KV_TIERS, "none", "any")
    return {f.name: ("", _taken(f.name, words, parse_serve_pins)) for f in fields(ServePins)}


def _taken(key: str, words: Iterable[str], parse: Callable[[list[str]], object]) -> list[str]:
    """Of the words and of counts, those that are values of the pin."""

    def takes(word: str) -> bool:
        try:
            parse([f"{key}={word}"])
        except PlanError:
            return False
        return True

    return [word for word in dict.fromkeys((*words, *COUNTS)) if takes(word)]
