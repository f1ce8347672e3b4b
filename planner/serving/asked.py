"""What `plan trace --task serve` is asked: the load, its limits, what may be lossy, pins."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

from cost_models.serving_decisions import KV_PLANNED, WEIGHTS_PLANNED, policy_of
from cost_models.serving_engines import NATIVE, load_serving_engine
from cost_models.serving_shapes import BLOCKS
from ir.errors import UsageError

OBJECTIVES = ("latency", "throughput", "cost")
BITS = {"fp32": 32, "bf16": 16, "fp16": 16, "fp8": 8, "fp8_block": 8, "int8": 8, "int4": 4,
        "fp4": 4}  # fmt: skip
WIDE = 16  # bits of what is not packed
ENGINE = NATIVE
KV_TIERS = ("gpu", "cpu")
_WORDS = {"weights": WEIGHTS_PLANNED, "kv": KV_PLANNED, "kv_tier": KV_TIERS}
FORCED = (0, 0)  # of `ServePins.pools`: pools of any sizes
OWN_FORMAT = ("router", "embeddings")  # blocks that stay in the model's own
MOST = 100_000_000  # tokens, requests: beyond that a number is a slip
MOST_STEPS = 20_000  # that read one prompt: each is costed


@dataclass(frozen=True, slots=True, kw_only=True)
class ServePins:
    """What the user decided; None is left to the search. weights: of every block that is not kept
    in another format. offload: (block, tier) pairs; "none" is pinned by (). pools: GPUs that read
    prompts and GPUs that decode, FORCED for any of each, () for none; degrees hold in both.
    kv_tier: where the cache lies, one of KV_TIERS."""

    tp: int | None = None
    pp: int | None = None
    ep: int | None = None
    etp: int | None = None
    attention_dp: int | None = None
    replicas: int | None = None
    prefill_chunk: int | None = None
    weights: str | None = None
    kv: str | None = None
    offload: tuple[tuple[str, str], ...] | None = None
    pools: tuple[()] | tuple[int, int] | None = None
    kv_tier: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeAsked:
    """prompt, output: tokens of a request. batch: requests at once, 0 leaves it to the search.

    precision: the model's own format. allow: lossy formats of weights that may be used; allow_kv:
    of the cache. keep: (block, format), which nothing changes. max_bits: no other weight in more.
    kv_window: tokens that the cache keeps, 0 is all: what is older is forgotten, or as kv_policy
    says (`policy_of`). max_ttft_s, max_tpot_s: limits.
    """

    prompt: int = 1024
    output: int = 1024
    batch: int = 0
    engine: str = ENGINE
    objective: str = "latency"
    precision: str = "bf16"
    allow: tuple[str, ...] = ()
    allow_kv: tuple[str, ...] = ()
    keep: tuple[tuple[str, str], ...] = ()
    max_bits: int = 0
    kv_window: int = 0
    kv_policy: str = ""
    max_ttft_s: float | None = None
    max_tpot_s: float | None = None

    def __post_init__(self) -> None:
        for flag, value in (("--prompt", self.prompt), ("--output", self.output)):
            if not 1 <= value <= MOST:
                raise UsageError(f"{flag} {value:.6g} is no number of tokens",
                                 why=f"expected 1 to {MOST:,}")  # fmt: skip
        for flag, value in (("--batch", self.batch), ("--kv-window", self.kv_window)):
            if not 0 <= value <= MOST:
                amount = "too many" if value > MOST else "less than none"
                raise UsageError(f"{flag} {value:.6g} is {amount}", why=f"expected 0 to {MOST:,}")
        if policy_of(self.kv_policy)[0] and not self.kv_window:
            raise UsageError(f"--kv-policy {self.kv_policy} needs --kv-window",
                             why="which tokens are kept as they are",
                             hints=(f"--kv-window 2048 --kv-policy {self.kv_policy}",))
        if self.objective not in OBJECTIVES:
            raise UsageError(f"--objective {self.objective} is not one of serving",
                             why=f"known: {', '.join(OBJECTIVES)}")  # fmt: skip
        load_serving_engine(self.engine)
        for word in (*self.allow, *(word for _, word in self.keep)):
            if word not in WEIGHTS_PLANNED:
                raise UsageError(f"unknown format {word!r} of weights",
                                 why=f"known: {', '.join(WEIGHTS_PLANNED)}")  # fmt: skip
            self.check_format(word)
        for word in self.allow_kv:
            if word not in KV_PLANNED:
                raise UsageError(f"unknown format {word!r} of the cache",
                                 why=f"known: {', '.join(KV_PLANNED)}")  # fmt: skip
        for block, _ in self.keep:
            if block not in BLOCKS:
                raise UsageError(f"--keep {block}: there is no such block",
                                 why=f"known: {', '.join(BLOCKS)}")  # fmt: skip
        for block, word in self.keep:
            if block in OWN_FORMAT and word != self.precision:
                raise UsageError(f"--keep {block}={word}: it stays in {self.precision}",
                                 why="formats are planned for the matrices that tokens multiply",
                                 hints=(f"leave --keep {block} out",))  # fmt: skip
        if self.max_bits and self.max_bits < min(BITS.values()):
            raise UsageError(f"--max-bits {self.max_bits}: no format has so few",
                             hints=("--max-bits 4, 8 or 16",))  # fmt: skip
        if self.max_bits and self.allow and min(BITS[w] for w in self.allow) > self.max_bits:
            raise UsageError(f"--max-bits {self.max_bits}: none of --allow"
                             f" {','.join(self.allow)} has so few",
                             hints=("allow one that has, or leave --allow out",))  # fmt: skip

    def check_format(self, word: str) -> None:
        """Raise UsageError for a format that is neither the model's own nor one of fewer bits."""
        if word != self.precision and BITS[word] >= WIDE:
            raise UsageError(f"weights in {word}: what is not packed stays in {self.precision}",
                             hints=(f"--precision {word} is of the whole model",))  # fmt: skip

    @property
    def formats(self) -> tuple[str, ...]:
        """What a block that is not kept may be in, the model's own first."""
        if not self.max_bits:
            return tuple(dict.fromkeys((self.precision, *self.allow)))
        few = [word for word, bits in BITS.items()
               if bits <= self.max_bits and (bits < WIDE or word == self.precision)]  # fmt: skip
        named = [word for word in self.allow if word in few]
        return tuple(named or [w for w in few if BITS[w] == BITS[few[0]] and w != "fp8_block"])


def check_steps(asked: ServeAsked, prefill_chunk: int) -> None:
    """Raise UsageError for a prompt that is read in more steps than are costed. prefill_chunk:
    tokens a step; 0 leaves them to the engine."""
    chunk = prefill_chunk or load_serving_engine(asked.engine).chunk_tokens
    steps = -(-asked.prompt // chunk)
    if steps > MOST_STEPS:
        raise UsageError(
            f"--prompt {asked.prompt}: {steps:,} steps of {chunk:,} tokens read it",
            why=f"expected {MOST_STEPS:,} at most", hints=("a larger --fix prefill_chunk",),
        )  # fmt: skip


def parse_allowed(texts: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """`--allow int8,int4,kv:fp8`: formats of weights, and of the cache."""
    words = [word for text in texts for word in text.split(",") if word]
    kv = tuple(word.removeprefix("kv:") for word in words if word.startswith("kv:"))
    return tuple(word for word in words if not word.startswith("kv:")), kv


def parse_keep(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """`--keep attention=fp8`. Raises UsageError for what is no pair."""
    found = []
    for text in texts:
        block, equals, word = text.partition("=")
        if not equals or not word:
            raise UsageError(f"--keep {text} is no BLOCK=FORMAT", hints=("--keep attention=bf16",))
        found.append((block, word))
    return tuple(found)


def parse_seconds(text: str, flag: str) -> float | None:
    """`50ms`, `0.5s` or `0.5`: seconds; None where nothing is asked."""
    if not text:
        return None
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)(ms|s)?", text)
    if not found or not float(found[1]) > 0:
        raise UsageError(f"{flag} {text} is no time", hints=(f"{flag} 50ms", f"{flag} 2s"))
    return float(found[1]) / (1000 if found[2] == "ms" else 1)


def parse_serve_pins(texts: Sequence[str]) -> ServePins:
    """Read `key=value` pins of serving. Raises UsageError naming what there is."""
    known = [f.name for f in fields(ServePins)]
    found: dict[str, object] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if name not in known or not equals:
            raise UsageError(f"--fix {text} is no pin of serving", why=f"known: {' '.join(known)}")
        if name in found:
            raise UsageError(f"--fix {name} is given twice", hints=("give it once",))
        if name == "offload":
            found[name] = _offload(text, value)
        elif name == "pools":
            found[name] = _pools(text, value)
        elif name in _WORDS:
            words = _WORDS[name]
            if value not in words:
                raise UsageError(f"--fix {text} is no value of that pin",
                                 why=f"expected one of {' '.join(words)}")  # fmt: skip
            found[name] = value
        else:
            if not re.fullmatch(r"[1-9][0-9]{0,8}", value):
                raise UsageError(f"--fix {text} is no value of that pin",
                                 why="expected a whole number, 1 to 999,999,999")  # fmt: skip
            found[name] = int(value)
    return ServePins(**found)  # type: ignore[arg-type]


def serve_pins_said(pins: ServePins) -> tuple[str, ...]:
    """Pins as the user writes them, for the plan's file."""
    found = []
    for f in fields(pins):
        value = getattr(pins, f.name)
        if value is None:
            continue
        if f.name == "offload":
            value = ",".join(f"{block}:{tier}" for block, tier in value) or "none"
        elif f.name == "pools":
            value = "none" if not value else "any" if value == FORCED else "+".join(map(str, value))
        found.append(f"{f.name}={value}")
    return tuple(found)


def _offload(text: str, value: str) -> tuple[tuple[str, str], ...]:
    found = []
    for item in value.split(","):
        block, _, tier = item.partition(":")
        if item == "none":
            continue
        if block not in BLOCKS or not tier:
            raise UsageError(f"--fix {text} is no value of that pin",
                             why=f"expected BLOCK:TIER, a block of {' '.join(BLOCKS)}, or none")
        found.append((block, tier))
    return tuple(found)


def _pools(text: str, value: str) -> tuple[()] | tuple[int, int]:
    sizes = re.fullmatch(r"([1-9][0-9]{0,8})\+([1-9][0-9]{0,8})", value)
    if value not in ("none", "any") and not sizes:
        raise UsageError(f"--fix {text} is no value of that pin",
                         why="expected GPUs that read prompts and GPUs that decode (2+6), any, or"
                         " none")  # fmt: skip
    if value == "none":
        return ()
    return (int(sizes[1]), int(sizes[2])) if sizes else FORCED
