"""Keyword arguments of a Python configuration, read from its syntax: nothing is run."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Mapping

from ir.errors import PlanError
from planner.importing.settings import Setting, Settings


def parse(text: str, source: str, classes: Mapping[str, str], policies: Mapping[str, str],
          sections: tuple[str, ...]) -> Settings:  # fmt: skip
    """Settings "section.key" of calls `Class(key=literal)`.

    classes: the section that a class's arguments are of. policies: what a class stands for as the
    value of `activation_checkpoint`. sections: those whose attributes may be set one by one, as
    `config.parallelism.key = literal`. What is no literal is a doubt, and refused where it is asked
    for.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of the user's own style
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as fault:
        line = getattr(fault, "lineno", 0) or 0
        raise PlanError(f"{source} is no Python that can be read", where=f"{source}:{line}",
                        why=type(fault).__name__) from fault  # fmt: skip
    made = Settings(source=source, values={})
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            section = classes.get(_name(node.func))
            for word in node.keywords if section else ():
                _put(made, f"{section}.{word.arg}" if word.arg else f"{section}.**", word.value)
            for word in node.keywords:
                if word.arg == "activation_checkpoint":
                    _policy(made, word.value, policies)
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target = node.targets[0]
            if not isinstance(target, ast.Attribute):
                continue
            if target.attr == "activation_checkpoint":
                _policy(made, node.value, policies)
            elif isinstance(target.value, ast.Attribute) and target.value.attr in sections:
                _put(made, f"{target.value.attr}.{target.attr}", node.value)
    return made


def _name(node: ast.expr) -> str:
    """The dotted end of a name: FullAC.Config."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return f"{node.value.id}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _put(made: Settings, name: str, node: ast.expr) -> None:
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        made.doubts.append(f"{name} (line {node.lineno}): not a literal, and nothing is run")
        made.unread[name] = node.lineno
        return
    known = made.values.get(name)
    if known is not None and known.value != value:
        raise PlanError(f"{name} is {str(known.value)[:40]} and {str(value)[:40]}",
                        where=f"{made.source}:{known.line} and {node.lineno}",
                        hints=("leave one configuration in the file",))  # fmt: skip
    made.values[name] = Setting(value=value, line=node.lineno)


def _policy(made: Settings, node: ast.expr, policies: Mapping[str, str]) -> None:
    name = _name(node.func) if isinstance(node, ast.Call) else ""
    if isinstance(node, ast.Constant) and node.value is None:
        name = "None"
    word = policies.get(name)
    if word is None:
        made.doubts.append(f"activation_checkpoint (line {node.lineno}): no policy known here,"
                           " costed as selective where no other is said")
        return
    made.values["activation_checkpoint"] = Setting(value=word, line=node.lineno)
