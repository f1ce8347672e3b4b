"""Fold module and parameter names into brace ranges, and back.

`layers.0.self_attn.q_proj.weight`, ... fold to `layers.{0..79}.self_attn.{q,k,v}_proj.weight`.
A pattern is a product: each dot-separated segment lists its alternatives, so that patterns made
by `fold` are disjoint and together name exactly what went in. Characters that the notation uses
are written %XX inside a name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import product
from math import prod

from ir.errors import PlanError

_NUMBER = re.compile(r"0|[1-9][0-9]*")
MOST_NUMBERS = 100_000  # of a range, or words of a segment: another's pattern is written out
MOST_NAMES = 1_000_000  # of a line of patterns: 384 experts in 61 layers have 70,272 matrices
_LONGEST = 60  # characters of a pattern in a message
_RANGE = re.compile(r"([0-9]+)\.\.([0-9]+)(?:\.\.([0-9]+))?")
_BRACES = re.compile(r"\{([^{}]*)\}")
_SPECIAL = re.compile(r"[{},%*\s]")
_ESCAPE = re.compile(r"%([0-9A-F]{2,6});")
_CUT = re.compile(r"(\.)|\{[^{}]*\}")  # a dot; not inside braces, where `..` is a range

Segments = tuple[tuple[str, ...], ...]  # the alternatives of each dot-separated segment


def fold(names: Sequence[str]) -> tuple[str, ...]:
    """Return disjoint patterns that cover exactly `names`, by first appearance.

    Numbers fold first (layers, experts), then words below the top level.
    """
    rows: list[Segments] = [tuple((s,) for s in name.split(".")) for name in dict.fromkeys(names)]
    depth = max((len(row) for row in rows), default=0)
    for place in reversed(range(depth)):
        rows = _merge(rows, place, numbers=True)
    for place in range(1, depth):
        rows = _merge(rows, place, numbers=False)
    return tuple(".".join(_render(words) for words in row) for row in rows)


def fold_text(names: Sequence[str]) -> str:
    """Return one line: `embed_tokens, layers.{0..39}`."""
    return ", ".join(fold(names))


def expand(pattern: str) -> tuple[str, ...]:
    """Return the names a pattern stands for, in its own order.

    Raises PlanError for `*`, which has no end, for braces that do not close, and for more than
    MOST_NAMES names, which are counted before any is made.
    """
    segments = _parse(pattern)
    if any("*" in words for words in segments):
        raise PlanError(f"{_short(pattern)} has a '*', which stands for no list of names")
    _require(prod(map(len, segments)), MOST_NAMES, pattern)
    return tuple(_unquote(".".join(words)) for words in product(*segments))


def expand_text(text: str) -> tuple[str, ...]:
    """Return the names of a line of patterns separated by a comma and a space.

    Raises PlanError as `expand` does, and where all together are more than MOST_NAMES.
    """
    patterns, count = [pattern for pattern in text.split(", ") if pattern], 0
    for pattern in patterns:
        count += prod(map(len, _parse(pattern)))
        _require(count, MOST_NAMES, text)
    return tuple(name for pattern in patterns for name in expand(pattern))


def matches(pattern: str, name: str) -> bool:
    """Say whether `pattern` names `name`; a segment `*` stands for any one segment."""
    segments, parts = _parse(pattern), name.split(".")
    return len(segments) == len(parts) and all(
        "*" in words or _quote(part) in words for words, part in zip(segments, parts)
    )


def may_end(pattern: str, name: str) -> bool:
    """Whether `pattern` names something that ends with `name`, a dot before it or nothing."""
    segments, parts = _parse(pattern), name.split(".")
    return all(
        "*" in words or _quote(part) in words
        for words, part in zip(reversed(segments), reversed(parts))
    )


def _merge(rows: list[Segments], place: int, *, numbers: bool) -> list[Segments]:
    """Unite the rows that differ in `place` alone, and there in numbers (or words) only."""
    groups: dict[object, list[Segments]] = {}
    for index, row in enumerate(rows):
        foldable = place < len(row) and numbers == all(_NUMBER.fullmatch(w) for w in row[place])
        key = (row[:place], row[place + 1 :]) if foldable else index
        groups.setdefault(key, []).append(row)
    return [_unite(group, place, numbers) for group in groups.values()]


def _unite(group: list[Segments], place: int, numbers: bool) -> Segments:
    """One row with the alternatives in `place` of all rows of the group."""
    if len(group) == 1:
        return group[0]
    words = dict.fromkeys(word for row in group for word in row[place])
    united = tuple(sorted(words, key=int) if numbers else words)
    return (*group[0][:place], united, *group[0][place + 1 :])


def _render(words: Sequence[str]) -> str:
    """One segment: a word, `{0..79}`, or alternatives around what they share: `{q,k}_proj`."""
    if len(words) == 1:
        return _quote(words[0])
    if all(_NUMBER.fullmatch(word) for word in words):
        return "{" + ",".join(_ranges([int(word) for word in words])) + "}"
    head, tail = _shared(words)
    middles = [word[len(head) : len(word) - len(tail)] for word in words]
    if all(_NUMBER.fullmatch(middle) for middle in middles):
        inside: Iterable[str] = _ranges(sorted(int(middle) for middle in middles))
    else:
        inside = map(_quote, middles)
    return _quote(head) + "{" + ",".join(inside) + "}" + _quote(tail)


def _shared(words: Sequence[str]) -> tuple[str, str]:
    """The prefix and suffix that all words share, cut at `_` or `:`; or a prefix of numbers."""
    stems = [re.sub(r"(0|[1-9][0-9]*)$", "", word) for word in words]
    if stems[0] and len(set(stems)) == 1 and all(len(w) > len(stems[0]) for w in words):
        return stems[0], ""
    tail = next((t for t in _suffixes(words[0]) if all(w.endswith(t) for w in words)), "")
    rest = [word[: len(word) - len(tail)] for word in words]
    head = next((h for h in _prefixes(rest[0]) if all(r.startswith(h) for r in rest)), "")
    return head, tail


def _suffixes(word: str) -> list[str]:
    """Every ending that starts at `_` or `:`, longest first."""
    return [word[i:] for i, letter in enumerate(word) if letter in "_:" and i > 0]


def _prefixes(word: str) -> list[str]:
    """Every proper beginning that ends at `_`, longest first."""
    return [word[: i + 1] for i in reversed(range(len(word) - 1)) if word[i] == "_"]


def _ranges(numbers: Sequence[int]) -> list[str]:
    """Ascending numbers as `0..79`, `1..79..2` (a step) and single ones; runs of three or more."""
    texts, start = [], 0
    while start < len(numbers):
        end, step = start + 1, numbers[min(start + 1, len(numbers) - 1)] - numbers[start]
        while end < len(numbers) and numbers[end] - numbers[end - 1] == step:
            end += 1
        if end - start < 3:
            texts.append(str(numbers[start]))
            start += 1
            continue
        texts.append(f"{numbers[start]}..{numbers[end - 1]}" + (f"..{step}" if step > 1 else ""))
        start = end
    return texts


@cache
def _parse(pattern: str) -> Segments:
    """The alternatives of each segment of a pattern."""
    bare = _BRACES.sub("", pattern)
    if "{" in bare or "}" in bare:
        raise PlanError(f"pattern {_short(pattern)} has braces that do not pair")
    dots = [found.start() for found in _CUT.finditer(pattern) if found[1]]
    return tuple(
        _alternatives(pattern[start + 1 : end]) for start, end in zip([-1, *dots], [*dots, None])
    )


def _alternatives(segment: str) -> tuple[str, ...]:
    """The words of one segment: the product of its braces and the text around them."""
    pieces = re.split(r"(\{[^{}]*\})", segment)
    options = [_inside(piece[1:-1]) if piece[:1] == "{" else (piece,) for piece in pieces]
    _require(prod(map(len, options)), MOST_NUMBERS, segment)
    return tuple("".join(words) for words in product(*options))


def _inside(text: str) -> tuple[str, ...]:
    """What a brace lists: words, and ranges with or without a step."""
    words: list[str] = []
    for item in text.split(","):
        found = _RANGE.fullmatch(item)
        if found is None:
            words.append(item)
            continue
        if len(item) > _LONGEST:
            raise PlanError(f"range {_short(item)} has more numbers than any model has layers")
        first, last, step = int(found[1]), int(found[2]), int(found[3] or 1)
        if step < 1 or last < first:
            raise PlanError(f"range {item!r} is empty")
        if last - first > MOST_NUMBERS * step:
            raise PlanError(f"range {item!r} has more numbers than any model has layers")
        words += map(str, range(first, last + 1, step))
        _require(len(words), MOST_NUMBERS, "{" + text + "}")
    return tuple(words)


def _require(count: int, most: int, pattern: str) -> None:
    """Raise PlanError where a pattern stands for more names than any model has."""
    if count > most:
        raise PlanError(f"pattern {_short(pattern)} stands for more than {most:,} names",
                        why="no model has so many")  # fmt: skip


def _short(pattern: str) -> str:
    return repr(pattern if len(pattern) <= _LONGEST else pattern[:_LONGEST] + "...")


def _quote(text: str) -> str:
    return _SPECIAL.sub(lambda found: f"%{ord(found[0]):02X};", text)


def _unquote(text: str) -> str:
    return _ESCAPE.sub(lambda found: chr(int(found[1], 16)), text)


def gpus_hold(some: int, all_: int) -> str:
    """That some of the GPUs are enough: `1 of 64 GPUs holds it`."""
    return f"{some} of {all_} GPUs {'holds' if some == 1 else 'hold'} it"


def many(count: int, what: str) -> str:
    """A number of things: `1 mesh`, `2 meshes`."""
    return f"{count} {what}" + ("" if count == 1 else "es" if what.endswith(("sh", "ch")) else "s")
