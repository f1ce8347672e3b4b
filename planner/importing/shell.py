"""Flags of a shell script or a file of arguments, read without running anything.

Words are split as a shell splits them, variables that the file itself sets are put in; what
follows from running it (conditions, commands, the environment) is not known, and said so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from ir.errors import PlanError
from planner.importing.settings import Setting, Settings

_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
_ASSIGN = re.compile(rf"(?s)({_NAME})(\+?)=(.*)")
_USE = re.compile(rf"\$(?:({_NAME})|\{{({_NAME})(?:\[[@*]\])?(?:(:?-)([^}}]*))?\}})")
_FLOW = ("if", "for", "while", "case", "source", ".", "eval", "function", "until")
_BEFORE = ("export", "then", "do", "else", "local", "declare", "readonly", "exec", "sudo")
_INSIDE = {"${": "}", "$(": ")"}  # of a word, up to what closes it: what it stands for is not run
_OPERATORS = ("\n", ";", "&", "|", "(", ")")
_MOST_WORDS = 20_000  # of one file, variables put in
_MOST_VALUE = 10_000  # characters of one word, variables put in
Word = tuple[str, int]  # its text and its line


def parse(text: str, source: str, kinds: Mapping[str, str]) -> Settings:
    """The flags that a file's commands have, or, where none have any, its variables.

    kinds: of the flags that matter, what they take: "" nothing, "n" one word, "words" several.
    Raises PlanError where one of these is given twice with different values.
    """
    values: dict[str, list[Word]] = {}
    commands: list[Word] = []
    defined: list[Word] = []
    doubts: dict[str, str] = {}
    start, rows = True, iter(split(text, source))
    for word, line in rows:
        found = _ASSIGN.fullmatch(word) if start else None
        if word in _OPERATORS or word in _BEFORE:
            start = True
        elif found:
            inside = _array(rows) if found[3] == "(" else [(found[3], line)]
            made = [part for item in inside for part in _expand(*item, values)]
            old = values.get(found[1], []) if found[2] else []
            values[found[1]] = [*old, *made]
            defined += [(part, at) for whole, at in made for part in whole.split()]
        else:
            if start and word in _FLOW:
                doubts.setdefault(word, f"{word} (line {line}): nothing of the script is run")
            start = False
            commands += _expand(word, line, values)
        if len(commands) + len(defined) > _MOST_WORDS:
            raise PlanError(f"{source} has more than {_MOST_WORDS:,} words")
    flags = _flags(commands)
    if not any(name in kinds for name, _, _ in flags):
        flags = _flags(defined)
    return Settings(
        source=source, values=_by_name(flags, source, kinds), doubts=list(doubts.values())
    )


def _array(rows: Iterator[Word]) -> list[Word]:
    """The words up to the bracket that closes an array."""
    found: list[Word] = []
    for word, line in rows:
        if word == ")":
            break
        if word not in _OPERATORS:
            found.append((word, line))
    return found


def split(text: str, source: str) -> list[Word]:
    """Words and operators with their lines; a `$` that is not to be replaced becomes \\0."""
    found: list[Word] = []
    at, line, depth = 0, 1, 0
    while at < len(text):
        c = text[at]
        if c in " \t\r":
            at += 1
        elif text.startswith("\\\n", at):
            at, line = at + 2, line + 1
        elif c == "\n":
            if not depth:
                found.append(("\n", line))
            at, line = at + 1, line + 1
        elif c == "#":
            end = text.find("\n", at)
            at = len(text) if end < 0 else end
        elif c in ";&|()":
            depth = max(0, depth + (c == "(") - (c == ")"))
            found.append((c, line))
            at += 1
        else:
            began = line
            word, at, line = _word(text, at, line, source)
            depth += word.endswith("=(") and _ASSIGN.fullmatch(word) is not None
            found.append((word, began))
        if len(found) > _MOST_WORDS:
            raise PlanError(f"{source} has more than {_MOST_WORDS:,} words")
    return found


def _word(text: str, at: int, line: int, source: str) -> tuple[str, int, int]:
    """One word from `at`: its text, where it ends, the line there."""
    parts: list[str] = []
    quote, began = "", line
    while at < len(text):
        c = text[at]
        line += c == "\n"
        if quote:
            if c == quote:
                quote = ""
            elif c == "\\" and quote == '"' and text[at + 1 : at + 2] in ('"', "\\", "$", "\n"):
                at += 1
                line += text[at] == "\n"
                parts.append({"$": "\0", "\n": ""}.get(text[at], text[at]))
            else:
                parts.append("\0" if c == "$" and quote == "'" else c)
        elif c in "'\"":
            quote = c
        elif c == "\\":
            at += 1
            following = text[at : at + 1]
            line += following == "\n"
            parts.append({"$": "\0", "\n": ""}.get(following, following))
        elif text[at : at + 2] in _INSIDE and _INSIDE[text[at : at + 2]] in text[at : at + 200]:
            end = text.index(_INSIDE[text[at : at + 2]], at)
            parts.append(text[at : end + 1])
            at = end
        elif c == "(" and parts and parts[-1] == "=" and _ASSIGN.fullmatch("".join(parts)):
            return "".join(parts) + c, at + 1, line  # an array opens
        elif c in " \t\r\n;&|()":
            line -= c == "\n"
            break
        else:
            parts.append(c)
        at += 1
    if quote:
        raise PlanError(f"a quote {quote} is not closed", where=f"{source}:{began}")
    return "".join(parts), at, line


def _expand(word: str, line: int, values: dict[str, list[Word]]) -> list[Word]:
    """A word with the file's own variables put in: several words where it stands for several,
    each with the line that it was written on."""
    whole = _USE.fullmatch(word)
    if whole:
        inside = values.get(whole[1] or whole[2])
        if inside is not None:
            return [(part, at) for item, at in inside for part in item.split()]
        return [(whole[4] if whole[3] else word, line)]

    def put(match: re.Match[str]) -> str:
        inside = values.get(match[1] or match[2])
        if inside is not None and len(inside) == 1:
            return inside[0][0][:_MOST_VALUE]
        return match[4] if inside is None and match[3] else match[0]

    return [(_USE.sub(put, word)[:_MOST_VALUE], line)]


def _flags(words: list[Word]) -> list[tuple[str, int, list[str]]]:
    """(flag, line, the words behind it) of a row of words."""
    flags: list[tuple[str, int, list[str]]] = []
    for word, line in words:
        if word.startswith("--") and len(word) > 2:
            name, given, value = word.partition("=")
            flags.append((name, line, [value] if given else []))
        elif flags:
            flags[-1][2].append(word)
    return flags


def _by_name(
    flags: list[tuple[str, int, list[str]]], source: str, kinds: Mapping[str, str]
) -> dict[str, Setting]:
    found: dict[str, Setting] = {}
    for name, line, words in flags:
        kind = kinds.get(name, "n" if words else "")
        value = " ".join(words[: {"": 0, "n": 1}.get(kind, len(words))]).replace("\0", "$")
        known = found.setdefault(name, Setting(value=value, line=line))
        if known.value != value and name in kinds:
            raise PlanError(
                f"{name} is {str(known.value)[:40]!r} and {value[:40]!r}",
                where=f"{source}:{known.line} and {line}",
                why="what a script does is not followed: which one holds is not known",
                hints=("leave the flags of one run in the file",),
            )
    return found
