"""Sensitivity as a section: a bar an input, and in words where the decision flips."""

from __future__ import annotations

from cost_models.decisions import Decisions
from cost_models.schedule import SCHEDULES
from cost_models.units import format_bytes
from planner.report.charts import Mark, Section, bar, figure, row, sentences, table
from planner.report.markup import Children, Html, el
from planner.report.sensitivity import FACTORS, Batch, Effect, Flip, Room, Sensitivity
from planner.why_text import decided

LEAST_SCALE = 0.02  # of the step


def section(s: Sensitivity, d: Decisions, price: str) -> Section:
    """price: what hangs on prices, as a sentence."""
    flipping = [e.name for e in s.effects if e.flips]
    lede = sentences(
        f"The plan and {_rivals(s.rivals)} (the best plans without each of its decisions) are"
        " costed again with one input scaled.",
        f"Of these another comes first with {_listed(flipping)}." if flipping
        else f"Between {FACTORS[0]:g} and {FACTORS[-1]:g} times what it is no input puts another of"
        " these first."
        if s.rivals else None,
        f"{_rivals(s.ahead)} {'come' if s.ahead > 1 else 'comes'} before it as it is: the plan was"
        " pinned, or made with other inputs." if s.ahead else None,
        price,
    )
    sizes = [abs(c) for e in s.effects for _, c in e.changes]
    sizes += [abs(b.change) for b in s.batches if not b.reason]
    scale = max([LEAST_SCALE, *sizes])
    rows = [_effect_row(e, scale, d) for e in s.effects]
    rows += [_batch_row(b, scale, d) for b in s.batches]
    rows += [_room_row(room, scale, d) for room in s.rooms]
    behind = table(
        "What each input does", ["input", "value", "step", "decision"],
        [*(line for e in s.effects for line in _effect_lines(e, d)),
         *([f"micro-batch {b.micro_batch}", f"instead of {d.micro_batch}",
            "" if b.reason else f"{b.change:+.1%}", _batch_words(b)] for b in s.batches),
         *(line for room in s.rooms for line in _room_lines(room, d))], words=2, last_words=1,
    )  # fmt: skip
    return Section(
        key="sensitivity", title="What would change the decision", lede=lede,
        body=figure(
            "The step with each input scaled, and where the decision flips.",
            el("div", rows, class_="rows"), behind,
            note="Bars: the step with half and with twice the input, all decisions kept. A flip is"
            " of the plan and its rivals; a search of the whole space with that input may find one"
            " nearer.",
        ),
    )  # fmt: skip


def _rivals(count: int) -> str:
    return f"{count or 'no'} rival{'' if count == 1 else 's'}"


def differing(old: Decisions, new: Decisions) -> str:
    """What a plan decides that another does not, in the words of a line that decides."""
    before, after = decided(old).split(", "), decided(new).split(", ")
    more = [word for word in after if word not in before]
    less = [word for word in before if word not in after and not _replaced(word, more)]
    return ", ".join([*more, *(f"no {word}" for word in less)]) or "other stages"


def _replaced(word: str, others: list[str]) -> bool:
    """Whether another word says the same key: tp 2 for tp 4, ZeRO-3 for ZeRO-1."""
    return any(_key(other) == _key(word) for other in others)


def _key(word: str) -> str:
    first = word.replace("-", " ").split(" ")[0]
    return "schedule" if first in SCHEDULES else first


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _reasoned(name: Children, chart: Html, amount: str, words: list[str]) -> Html:
    return el("div", row(name, chart, amount), [el("p", text, class_="because") for text in words],
              class_="reasoned")  # fmt: skip


def _marks(name: str, changes: tuple[tuple[float, float], ...], scale: float) -> list[Mark]:
    """Bars from the middle: the larger behind the smaller where both go one way."""
    found = []
    for factor, change in sorted(changes, key=lambda c: -abs(c[1])):
        share = 0.5 * change / scale
        found.append(Mark(start=min(0.5, 0.5 + share), end=max(0.5, 0.5 + share),
                          kind="worse" if share > 0 else "better",
                          tip=f"{name} x{factor:g}: step {change:+.1%}"))  # fmt: skip
    return found


def _effect_row(e: Effect, scale: float, d: Decisions) -> Html:
    amount = " / ".join(f"{change:+.1%}" for _, change in e.changes[:2])
    words = [_flip_words(flip, d) for flip in e.flips] or ["none of the rivals comes first"]
    chart = bar(_marks(e.name, e.changes, scale), lines=[(0.5, "as it is")])
    return _reasoned(e.name, chart, amount, words)


def _flip_words(flip: Flip, d: Decisions) -> str:
    return f"flips at x{flip.times:.2g}: {differing(d, flip.decisions)} ({flip.change:+.1%} there)"


def _first_words(first: Flip | None, d: Decisions) -> str:
    """Which plan comes first at a value."""
    if first is None:
        return "the same"
    return f"{differing(d, first.decisions)} ({first.change:+.1%} there)"


def _effect_lines(e: Effect, d: Decisions) -> list[list[Children]]:
    lines: list[list[Children]] = [
        [e.name, f"x{factor:g}", f"{change:+.2%}", _first_words(first, d)]
        for (factor, change), first in zip(e.changes, e.firsts, strict=True)
    ]
    lines += [[e.name, f"x{f.times:.2g}", "", _flip_words(f, d)] for f in e.flips]
    return lines


def _batch_row(b: Batch, scale: float, d: Decisions) -> Html:
    name = f"micro-batch {b.micro_batch}, not {d.micro_batch}"
    if b.reason:
        return _reasoned(name, bar([], lines=[(0.5, "as it is")]), "", [_batch_words(b)])
    share = 0.5 * b.change / scale
    mark = Mark(start=min(0.5, 0.5 + share), end=max(0.5, 0.5 + share),
                kind="worse" if share > 0 else "better", tip=f"{name}: step {b.change:+.1%}")
    return _reasoned(name, bar([mark], lines=[(0.5, "as it is")]), f"{b.change:+.1%}",
                     [_batch_words(b)])  # fmt: skip


def _batch_words(b: Batch) -> str:
    if b.reason:
        return f"not legal: {b.reason}"
    return f"does not fit: {format_bytes(b.over_bytes)} too much" if b.over_bytes else "fits"


def _memory_of(room: Room) -> str:
    return f"memory of a GPU{f' of {room.part}' * bool(room.part)}"


def _room_lines(room: Room, d: Decisions) -> list[list[Children]]:
    name = _memory_of(room)
    lines: list[list[Children]] = [
        [name, format_bytes(room.needs_bytes), "", _too_small(room, d)]
    ]
    if room.more:
        change = f"{room.more_change:+.1%}"
        lines.append([name, format_bytes(room.more_bytes), change, _more(room, d)])
    return lines


def _room_row(room: Room, scale: float, d: Decisions) -> Html:
    words = [_too_small(room, d)]
    if room.more:
        words.append(f"from {format_bytes(room.more_bytes)}: {_more(room, d)}")
    return _reasoned(_memory_of(room), bar([], lines=[(0.5, "as it is")]), "", words)


def _too_small(room: Room, d: Decisions) -> str:
    below = f"below {format_bytes(room.needs_bytes)} it does not fit"
    if room.instead is None:
        return f"{below}; no rival holds less"
    then = f"{differing(d, room.instead)} ({room.instead_change:+.1%})"
    return f"{below}; of the rivals then {then}, and a search with less memory may find one nearer"


def _more(room: Room, d: Decisions) -> str:
    assert room.more is not None
    return f"{differing(d, room.more)} ({room.more_change:+.1%})"
