"""What is decided about serving a model, and the load that it is to bear."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace

from cost_models.serving_shapes import BLOCKS, PARTS_OF
from ir.errors import UsageError

# Bytes a weight, scales included: int4 in groups of 128 with two-byte scales, fp4 in groups of 16
# with one-byte scales (NVFP4), mxfp4 in groups of 32. fp8_block has a scale for each 128 x 128
# weights and 128 activations, as DeepSeek's checkpoints have; fp8 one a matrix. int4_64, int4_32:
# groups of 64 or 32 with a scale and a zero point of two bytes each.
WEIGHT_BYTES = {
    "fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "fp8_block": 1.0, "int8": 1.0,
    "int4": 0.53, "int4_64": 0.5625, "int4_32": 0.625, "fp4": 0.5625, "mxfp4": 0.53125,
}  # fmt: skip
# what plans are made in; the others are what engines ran that were measured
WEIGHTS_PLANNED = ("fp32", "bf16", "fp16", "fp8", "fp8_block", "int8", "int4", "fp4")
PLACES = ("stream", "compute")
KV_BYTES = {"bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "int4_64": 0.5625}
KV_PLANNED = ("bf16", "fp16", "fp8", "int8")  # what engines that plans are made for can keep


def policy_of(word: str) -> tuple[int, int]:
    """(tokens of a block, blocks that are retrieved; 0 where each is one entry) of a policy of the
    cache: `summary:64`, `retrieve:16x64`; none is "". Raises UsageError for what is none."""
    if not word:
        return 0, 0
    if found := re.fullmatch(r"summary:([1-9][0-9]{0,6})", word):
        return int(found[1]), 0
    if found := re.fullmatch(r"retrieve:([1-9][0-9]{0,6})x([1-9][0-9]{0,6})", word):
        return int(found[2]), int(found[1])
    raise UsageError(f"unknown policy {word!r} of the cache",
                     why="known: summary:BLOCK, one entry for each block of so many tokens;"
                     " retrieve:TOPxBLOCK, so many blocks read of all",
                     hints=("--kv-window 2048 --kv-policy summary:64",))  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A block class below the GPU. place: "stream" (copied to the GPU for its use) or "compute"
    (multiplied where it lies, by the CPU). resident: how many of its layers stay on the GPU; of
    routed experts, how many of each layer's on each rank, the most wanted."""

    block: str
    tier: str
    place: str
    resident: int = 0

    def __post_init__(self) -> None:
        if self.block not in BLOCKS:
            raise UsageError(f"unknown block {self.block!r}", why=f"one of {', '.join(BLOCKS)}")
        if self.place not in PLACES:
            raise UsageError(f"{self.block} on {self.tier}: unknown place {self.place!r}",
                             why=f"one of {', '.join(PLACES)}")  # fmt: skip
        if self.place == "compute" and self.tier != "cpu":
            raise UsageError(f"{self.block} cannot be multiplied on {self.tier}",
                             hints=(f"{self.block} on cpu, or streamed",))  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """A division of GPUs that read prompts alone; degrees as in `Serving`."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 0
    attention_dp: int = 1
    replicas: int = 1

    @property
    def devices(self) -> int:
        return self.tp * self.attention_dp * self.pp * self.replicas


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """Decisions.

    tp, pp: of every layer; ep x etp: ranks of the routed experts, tp * attention_dp by default
    (ep = 1, etp = all). attention_dp: replicas of attention inside one group of experts, each with
    its own sequences. replicas: whole copies. batch: sequences in flight, of all replicas.
    prefill_chunk: tokens of prompts a step, 0 is the engine's own. weights: formats by block class,
    `default` of those not named; kv: format of the cache. tiers: blocks that lie below the GPU, in
    whole or in part; kv_tier: where the cache lies. kv_window: tokens that it keeps, 0 is all.
    kv_policy: what is kept, or read, of what is older than kv_window (`policy_of`), "" is nothing.
    prefill: GPUs beside those that read prompts and hand their caches over; the degrees above are
    then of the GPUs that decode. None where all do both.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 0
    attention_dp: int = 1
    replicas: int = 1
    batch: int = 1
    prefill_chunk: int = 0
    default: str = "bf16"
    weights: tuple[tuple[str, str], ...] = ()
    kv: str = "bf16"
    tiers: tuple[Held, ...] = ()
    kv_tier: str = "gpu"
    kv_window: int = 0
    kv_policy: str = ""
    prefill: Pool | None = None

    def __post_init__(self) -> None:
        sizes = (self.tp, self.pp, self.ep, self.attention_dp, self.replicas, self.batch)
        if min(sizes) < 1 or min(self.prefill_chunk, self.etp) < 0:
            raise UsageError("a degree or a batch of less than one", why=str(self))
        if self.etp and self.ep * self.etp != self.ranks:
            raise UsageError(
                f"ep={self.ep} x etp={self.etp} is not tp={self.tp} x"
                f" attention_dp={self.attention_dp}",
                why="experts lie on the ranks that attention lies on",
            )
        if self.ranks % self.ep:
            raise UsageError(f"ep={self.ep} does not divide {self.ranks} ranks of a stage")
        for block, _ in self.weights:
            if block not in BLOCKS and block not in PARTS_OF:
                raise UsageError(f"unknown block {block!r}", why=f"one of {', '.join(BLOCKS)}")
        for block, name in (*self.weights, ("default", self.default)):
            if name not in WEIGHT_BYTES:
                known = ", ".join(WEIGHT_BYTES)
                raise UsageError(f"unknown format {name!r} of {block}", why=f"one of {known}")
        if self.kv not in KV_BYTES:
            raise UsageError(f"unknown KV format {self.kv!r}", why=f"one of {', '.join(KV_BYTES)}")
        if policy_of(self.kv_policy)[0] and not self.kv_window:
            raise UsageError(f"policy {self.kv_policy} of the cache without a window",
                             hints=("--kv-window 2048: the tokens that are kept as they are",))
        if self.prefill is not None and (self.tiers or self.kv_tier != "gpu"):
            raise UsageError("pools of prefill and decode with weights or caches below the GPU",
                             why="each pool keeps all of the model on its GPUs")  # fmt: skip
        _ = self.reading

    @property
    def reading(self) -> Serving | None:
        """What the GPUs that read prompts alone are told; None where there are none."""
        if self.prefill is None:
            return None
        sizes = {f.name: getattr(self.prefill, f.name) for f in fields(Pool)}
        return replace(self, prefill=None, **sizes)

    @property
    def decoding(self) -> Serving:
        """What the other GPUs are told."""
        return replace(self, prefill=None) if self.prefill else self

    @property
    def ranks(self) -> int:
        """Ranks of a stage: those that attention, and the experts, lie on."""
        return self.tp * self.attention_dp

    @property
    def devices(self) -> int:
        mine = self.ranks * self.pp * self.replicas
        return mine + (self.prefill.devices if self.prefill else 0)

    @property
    def expert_tp(self) -> int:
        return self.etp or self.ranks // self.ep

    def format_of(self, block: str) -> str:
        """Of a block class, or of a part of one (`PARTS_OF`)."""
        given = dict(self.weights)
        return given.get(block) or given.get(PARTS_OF.get(block, ""), self.default)

    def held(self, block: str) -> Held | None:
        """How a block lies below the GPU, None where all of it is on it."""
        return next((h for h in self.tiers if h.block == block), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeLoad:
    """Requests of `prompt` tokens that are answered with `output` tokens; means where they vary."""

    prompt: float
    output: float
