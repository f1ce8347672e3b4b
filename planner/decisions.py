"""The one vocabulary of decisions: every key, its words and its meaning, in one table.

Pins (`--fix key=value`), the plan file, JSON and help are all read from `VOCABULARY`; the typed
record that costs are a function of is `cost_models.decisions.Decisions`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NoReturn

from cost_models.decisions import Decisions, Keep
from cost_models.formats import GROUPS
from cost_models.schedule import SCHEDULES
from ir.errors import UsageError
from planner.keep_words import keep_words, read_keep
from planner.share_words import read_shares

GRAD_DTYPES = ("bf16", "fp32")
ANY = "any"  # of a format that loses bits: chosen by the search, as it is allowed to
CP_KINDS = ("ring", "allgather", "ulysses")
OFFLOADED = ("optimizer", "params", "activations")
FORMATS = ("bf16", "fp16", "fp8", "nvfp4")
WHOLE = "layers"  # every group of formats
RECOMPUTE_KINDS = ("none", "selective", "full")
ALL_LAYERS = -1  # a recompute count that means every layer of the stage
COUNTED = ("optimizer", "activations")  # of what may be offloaded, by layers a stage
COUNTED_TIER = re.compile(r"([^:]+):([0-9]{1,9}(?:/[0-9]{1,9})*)")  # layers a stage
_PLACEMENT = re.compile(r"R|S\((0|[1-9][0-9]*)\)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recompute:
    """Layers per stage computed again: the first `full` whole, the next `selective` in part.

    One count for every stage, or one count a global stage; ALL_LAYERS is all of them.
    """

    full: tuple[int, ...] = (0,)
    selective: tuple[int, ...] = (0,)

    def counts(self, stages: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """(full, selective) of each stage, `stages` being its number of layers."""
        rows = []
        for index, layers in enumerate(stages):
            full = _at(self.full, index, layers)
            rows.append((full, min(_at(self.selective, index, layers), layers - full)))
        return tuple(rows)

    def __str__(self) -> str:
        parts = [
            kind + ("" if counts == (ALL_LAYERS,) else ":" + "/".join(map(str, counts)))
            for kind, counts in (("full", self.full), ("selective", self.selective))
            if any(counts)
        ]
        return "+".join(parts) or "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pins:
    """What the user decided; None is left to the search. `place`: (pattern, placement) pairs."""

    pp: int | None = None
    dp: int | None = None
    cp: int | None = None
    tp: int | None = None
    ep: int | None = None
    etp: int | None = None
    dp_outer: int | None = None
    zero: int | None = None
    shard: int | None = None
    reshard: bool | None = None
    micro_batch: int | None = None
    microbatches: int | None = None
    schedule: str | None = None
    virtual_stages: int | None = None
    stages: tuple[int, ...] | None = None
    recompute: Recompute | None = None
    keep: Keep | None = None
    offload: tuple[tuple[str, str], ...] | None = None
    formats: tuple[tuple[str, str], ...] | None = None
    sequence_parallel: bool | None = None
    compile: bool | None = None
    cp_kind: str | None = None
    grad_dtype: str | None = None
    weights: str | None = None
    shares: tuple[tuple[str, int], ...] | None = None
    tp_by_part: tuple[tuple[str, int], ...] | None = None
    place: tuple[tuple[str, str], ...] = ()

    def items(self) -> tuple[tuple[str, Any], ...]:
        """(key, value) of what is pinned, in the vocabulary's order; placements apart."""
        pairs = ((f.name, getattr(self, f.name)) for f in fields(self) if f.name != "place")
        return tuple((key, value) for key, value in pairs if value is not None)

    def said(self, key: str) -> str:
        """A pin as the user writes it: `tp=8`."""
        value = getattr(self, key)
        return f"{key}={keep_words(value) if key == 'keep' else _word(value)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One decision: its name, the words it takes, how they are read, what it means."""

    name: str
    words: str
    parse: Callable[[str, str], Any]
    meaning: str
    default: str = "searched"


def parse_pins(texts: Sequence[str]) -> Pins:
    """Read `key=value` pins. Raises UsageError naming the pin, what it takes, and the nearest.

    A key given twice with different values contradicts itself.
    """
    found: dict[str, Any] = {}
    said: dict[str, str] = {}
    place: dict[str, str] = {}
    for text in texts:
        if text.startswith("place:"):
            pattern, _, value = text.removeprefix("place:").rpartition("=")
            name = f"place:{pattern}"
            _placement(text, pattern, value)
            place[pattern] = value
        else:
            name, _, value = text.partition("=")
            found[name] = _key(name, text).parse(text, value)
        if said.setdefault(name, text) != text:
            raise UsageError(f"--fix {said[name]} and --fix {text} contradict each other",
                             hints=("give it once",))  # fmt: skip
    return Pins(place=tuple(place.items()), **found)


def _key(name: str, text: str) -> Key:
    for key in VOCABULARY:
        if key.name == name and "=" in text:
            return key
    names = [key.name for key in VOCABULARY]
    if name in names:
        raise UsageError(f"--fix {text} has no value", hints=(f"--fix {name}=VALUE",))
    from difflib import get_close_matches

    near = get_close_matches(name, names, n=3)
    raise UsageError(
        f"unknown pin {name!r} in --fix {text}",
        why=f"known: {' '.join(names)} place:PATTERN",
        hints=tuple(f"did you mean {key}?" for key in near),
    )


def _refuse(text: str, expected: str) -> NoReturn:
    raise UsageError(f"--fix {text[:80]} is no value of that pin", why=f"expected {expected}")


def _degree(text: str, value: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,8}", value):
        _refuse(text, "a whole number, 1 to 999,999,999")
    return int(value)


def _words(*words: str) -> Callable[[str, str], str]:
    def parse(text: str, value: str) -> str:
        return value if value in words else _refuse(text, "one of " + " ".join(words))

    return parse


def _zero(text: str, value: str) -> int:
    return int(_words("0", "1", "2", "3")(text, value))


def _switch(text: str, value: str) -> bool:
    value = {"true": "on", "false": "off"}.get(value, value)  # as the plan's file has it
    return _words("on", "off")(text, value) == "on"


def _stages(text: str, value: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", value):
        _refuse(text, "layers per stage, as in 16,16,15")
    return tuple(map(int, value.split(",")))


def _recompute(text: str, value: str) -> Recompute:
    """`none`, `full`, `full:12`, `full:2+selective:4`, `full:4/3/2/1` (one count a stage)."""
    expected = "none, selective, full, or layers per stage: full:12, full:2+selective:4"
    counts: dict[str, tuple[int, ...]] = {}
    for part in value.split("+"):
        found = re.fullmatch(r"(full|selective)(?::([0-9]{1,9}(?:/[0-9]{1,9})*))?|none", part)
        if not found or found[1] in counts or (part == "none" and value != "none"):
            _refuse(text, expected)
        if found[1]:
            counts[found[1]] = tuple(map(int, (found[2] or str(ALL_LAYERS)).split("/")))
    return Recompute(**counts)


def _keep(text: str, value: str) -> Keep:
    found = read_keep(value)
    return found if found is not None else _refuse(
        text, "default, none, OP+OP, or CLASS:OP+OP,CLASS:none"
    )  # fmt: skip


def _shares(text: str, value: str) -> tuple[tuple[str, int], ...]:
    found = read_shares(value)
    return found if found is not None else _refuse(
        text, "micro-batches a step by part, as in h100:11,a100:5, or none"
    )  # fmt: skip


def _tp_by_part(text: str, value: str) -> tuple[tuple[str, int], ...]:
    found = read_shares(value)
    return found if found is not None else _refuse(
        text, "the tp of each part's stages, as in h100:4,a100:8, or none"
    )  # fmt: skip


def _offload(text: str, value: str) -> tuple[tuple[str, str], ...]:
    """Pairs (what, tier) in the vocabulary's order; of activations and of the optimizer with layers
    a stage, one count for all or one each: `activations:cpu:4/3`. Parameters that lie below are
    updated there, so the optimizer does too: in the host's memory, where nothing is said of it."""
    found = dict(read_offload(text, value))
    if "params" in found:
        found.setdefault("optimizer", "cpu")
    return tuple((what, found[what]) for what in OFFLOADED if what in found)


def read_offload(text: str, value: str) -> tuple[tuple[str, str], ...]:
    """The same as it is written, with nothing that goes with it."""
    found: dict[str, str] = {}
    for what, tier in (item.partition(":")[::2] for item in value.split(",") if item != "none"):
        counted = what in COUNTED and COUNTED_TIER.fullmatch(tier)
        if (
            what not in OFFLOADED or not tier or found.get(what, tier) != tier
            or (":" in tier and not counted)
        ):
            _refuse(text, "optimizer:TIER, params:TIER, activations:TIER, optimizer:TIER:12 or"
                          " activations:TIER:12 (layers per stage), or none")  # fmt: skip
        found[what] = tier
    return tuple((what, found[what]) for what in OFFLOADED if what in found)


def _formats(text: str, value: str) -> tuple[tuple[str, str], ...]:
    """Pairs (group, format) in the vocabulary's order; `layers` is every group."""
    said = [] if value == "none" else [item.partition(":") for item in value.split(",")]
    found = read_formats([(group, word) for group, _, word in said])
    if found is None or any(word not in FORMATS for _, word in found):
        _refuse(text, f"GROUP:FORMAT, of {' '.join((*GROUPS, WHOLE))} and {' '.join(FORMATS)},"
                      " or none")  # fmt: skip
    return found


def read_formats(words: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...] | None:
    """Pairs (group, format), `layers` every group that is not named; None where one is no group,
    or said twice."""
    said: dict[str, str] = {}
    for group, word in words:
        if group not in (*GROUPS, WHOLE) or group in said:
            return None
        said[group] = word
    rest = dict.fromkeys(GROUPS, said[WHOLE]) if WHOLE in said else {}
    found = rest | {group: word for group, word in said.items() if group != WHOLE}
    return tuple((group, found[group]) for group in GROUPS if group in found)


def _serving(text: str, value: str) -> NoReturn:
    raise UsageError(f"--fix {text} is a serving pin", why="this version plans training alone")


def _placement(text: str, pattern: str, value: str) -> None:
    if not pattern or not _PLACEMENT.fullmatch(value):
        _refuse(text, "place:PATTERN=S(0), S(1) or R")


VOCABULARY = (
    Key(name="pp", words="n", parse=_degree, meaning="pipeline ranks; pp*dp*cp*tp = GPUs"),
    Key(name="dp", words="n", parse=_degree, meaning="data-parallel ranks, sharded or not"),
    Key(name="cp", words="n", parse=_degree, meaning="ranks that share a sequence"),
    Key(name="tp", words="n", parse=_degree, meaning="ranks that split a layer's tensors"),
    Key(name="ep", words="n", parse=_degree, meaning="ranks that share experts"),
    Key(name="etp", words="n", parse=_degree, meaning="ranks that split an expert's tensors",
        default="1"),
    Key(name="dp_outer", words="n", parse=_degree,
        meaning="of the dp, those outside the pipeline: each has a pipeline in a part of its own",
        default="searched where the hardware lists levels, else 1"),
    Key(name="zero", words="0 1 2 3", parse=_zero,
        meaning="sharded over data ranks: nothing, optimizer, + gradients, + parameters"),
    Key(name="shard", words="n", parse=_degree,
        meaning="ranks that share a shard; HSDP replicates across them", default="dp*cp"),
    Key(name="reshard", words="on off", parse=_switch,
        meaning="parameters gathered again in backward; off under pp"),
    Key(name="micro_batch", words="n", parse=_degree, meaning="samples a rank runs at once"),
    Key(name="microbatches", words="n", parse=_degree, meaning="micro-batches a step",
        default="global batch / (dp*micro_batch)"),
    Key(name="schedule", words=" ".join(SCHEDULES), parse=_words(*SCHEDULES),
        meaning="order of the pipeline's work"),
    Key(name="virtual_stages", words="n", parse=_degree, meaning="stages on one pipeline rank"),
    Key(name="stages", words="16,16,15,..", parse=_stages, meaning="layers per stage"),
    Key(name="recompute", words="none selective full full:12", parse=_recompute,
        meaning="layers per stage computed again in backward"),
    Key(name="keep", words="default none OP+OP u1:OP", parse=_keep,
        meaning="operations whose results are kept where layers are computed again in part"),
    Key(name="offload", words="optimizer:cpu optimizer:nvme params:cpu activations:cpu none",
        parse=_offload,
        meaning="what lies on which of the hardware's tiers; params needs zero=3"
                " and has optimizer:cpu beside it unless that is said;"
                " activations:cpu:12 or optimizer:TIER:12 is of 12 layers a stage"),
    Key(name="formats", words="layers:fp8 attention:fp8,mlp:fp8 experts:fp8 none", parse=_formats,
        meaning="of layers' matmuls by group, where not the precision",
        default="searched among those that --precision bf16,fp8 allows, else none"),
    Key(name="sequence_parallel", words="on off", parse=_switch,
        meaning="the residual stream split by sequence over tp"),
    Key(name="compile", words="on off", parse=_switch, meaning="units run compiled",
        default="the engine's"),
    Key(name="cp_kind", words=" ".join(CP_KINDS), parse=_words(*CP_KINDS),
        meaning="how attention crosses cp", default="ring"),
    Key(name="grad_dtype", words="bf16 fp32 any", parse=_words(*GRAD_DTYPES, ANY),
        meaning="format gradients are accumulated and reduced in; any: the search may lose bits",
        default="fp32"),
    Key(name="weights", words="bf16 fp8 int8 int4 fp4",
        parse=_words("bf16", "fp8", "int8", "int4", "fp4"),
        meaning="format of the weights", default="the workload's precision"),
    Key(name="shares", words="h100:11,a100:5 none", parse=_shares,
        meaning="micro-batches a step of each data rank, where parts of the hardware have replicas"
                " of their own",
        default="searched where the hardware has parts, else none"),
    Key(name="tp_by_part", words="h100:4,a100:8 none", parse=_tp_by_part,
        meaning="tp of the stages on each part of the hardware, where parts have another each",
        default="searched where the hardware has parts, else none"),
    Key(name="kv", words="bf16 fp8 int8", parse=_serving, meaning="format of the KV cache"),
)  # fmt: skip


def summarise_recompute(decisions: Decisions) -> Recompute:
    """The shortest `Recompute` that stands for the decisions: `full`, `full:12`, `full:4/3/2`."""
    rows, stages = decisions.recompute, decisions.stages
    for full in (0, ALL_LAYERS, max((f for f, _ in rows), default=0)):
        for selective in (0, ALL_LAYERS, max((s for _, s in rows), default=0)):
            short = Recompute(full=(full,), selective=(selective,))
            if short.counts(stages) == (rows or ((0, 0),) * len(stages)):
                return short
    fulls, selectives = tuple(f for f, _ in rows), tuple(s for _, s in rows)
    return Recompute(
        full=fulls if any(fulls) else (0,), selective=selectives if any(selectives) else (0,)
    )


def recompute_words(decisions: Decisions) -> str:
    """As a pin says it; of parts with shares of their own, each that has another."""
    others = [
        f", {share.part} {summarise_recompute(decisions.on_part(share))}"
        for share in decisions.shares if share.recompute
    ]
    return str(summarise_recompute(decisions)) + "".join(others)


def pins_of(decisions: Decisions) -> Pins:
    """Pins that leave nothing to decide: the plan as an estimator's input."""
    keys = {key.name for key in VOCABULARY} & {f.name for f in fields(Decisions)}
    values = {key: getattr(decisions, key) for key in keys} | {
        "recompute": summarise_recompute(decisions),
        "shares": tuple((share.part, share.microbatches) for share in decisions.shares),
        "tp": None if decisions.tp_by_part else decisions.tp,
    }
    return Pins(**values)


def _at(counts: tuple[int, ...], index: int, layers: int) -> int:
    count = counts[index % len(counts)]
    return layers if count == ALL_LAYERS else min(count, layers)


def _word(value: object) -> str:
    """A value as a pin writes it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if value == ():
        return "none"
    if isinstance(value, tuple):
        return ",".join(":".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in value)
    return str(value)
