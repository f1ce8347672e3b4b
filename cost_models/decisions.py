"""What is decided and what for: the values that costs are a function of.

`planner.decisions` has the vocabulary (keys, legal words, help); here are the typed records.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is to be run. `global_batch` in samples a step, `seq_len` in tokens.

    expert_imbalance: load of the busiest ep rank over the mean, as training measured it.
    allowed_formats: what layers' matmuls may be in beside the precision, if that is quicker.
    """

    task: str = "train"
    engine: str = "native-compiled"
    global_batch: int = 1
    seq_len: int = 1
    precision: str = "bf16"
    optimizer: str = "adamw"
    expert_imbalance: float = 1.0
    allowed_formats: tuple[str, ...] = ()

STATE_BELOW = ("optimizer", "params")  # of what may be offloaded, the state of a unit
Keep = tuple[tuple[str, tuple[str, ...]], ...]  # (unit class, words of the operations it keeps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one part of the hardware does of a step, where every part has replicas of its own.

    dp: its data ranks, one behind the other. microbatches: of each of them. recompute: as
    `Decisions.recompute`, where it is not that.
    """

    part: str
    dp: int
    microbatches: int
    recompute: tuple[tuple[int, int], ...] = ()



@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """A training configuration, whole. pp * dp * cp * tp = GPUs; dp * cp * tp = edp * ep * etp.

    Ranks lie inside out: tp, cp, dp, pp. dp_outer of the dp lie outside the pipeline, each with
    a pipeline of its own ranks in a row: 1 is none, dp is all.
    stages: layers per global stage (pp * virtual_stages of them; stage k on rank k % pp, or folded
    in a V). recompute: per global stage (full, selective): the first `full` layers are computed
    again whole, the next `selective` all but their matmuls and attention, the rest nothing.
    keep: of unit classes, by name, the operations whose results are kept where they are computed
    again in part, by their words in `ir.keep`; classes that are not named keep all of them.
    offload: pairs (what, tier); of activations the tier may be "cpu:4/3": of each global stage so
    many layers, behind those computed again whole, and "cpu:" where the stages are not cut yet;
    without counts it is all layers. The optimizer's "cpu:4/3" is of so many layers of each global
    stage, its first, with their parameters where "params" is there too; without counts it is that
    of all units. formats: pairs (group of layers' matmuls, format), in the order
    of `formats.GROUPS`, where not the workload's precision. sharding: per unit class, the
    placements on tp that the per-op program chose, as (parameter or edge, words) pairs; empty
    where tp = 1. parts: where the hardware has parts, (name, its pp ranks) of those that are used,
    in the order of ranks; empty where it is of one kind. shares: where parts have replicas of the
    model instead, what each does, in the order of ranks; dp is of all of them, and microbatches of
    the one that runs the most. tp_by_part: where the parts of a pipeline have another tp each,
    (name, its tp) in the order of `parts`; tp is the largest of them.
    """

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    etp: int = 1
    dp_outer: int = 1
    zero: int = 0
    shard: int = 1
    reshard: bool = False
    micro_batch: int = 1
    microbatches: int = 1
    schedule: str = "1f1b"
    virtual_stages: int = 1
    sequence_parallel: bool = False
    compile: bool = True
    cp_kind: str = "ring"
    grad_dtype: str = "fp32"
    offload: tuple[tuple[str, str], ...] = ()
    formats: tuple[tuple[str, str], ...] = ()
    stages: tuple[int, ...] = ()
    recompute: tuple[tuple[int, int], ...] = ()
    keep: Keep = ()
    parts: tuple[tuple[str, int], ...] = ()
    shares: tuple[Share, ...] = ()
    tp_by_part: tuple[tuple[str, int], ...] = ()

    @property
    def part_of_rank(self) -> tuple[str, ...]:
        """The part that each pp rank lies on; empty where the hardware is of one kind."""
        return tuple(name for name, ranks in self.parts for _ in range(ranks))

    @property
    def tp_of_rank(self) -> tuple[int, ...]:
        """The tp of each pp rank."""
        own = dict(self.tp_by_part)
        if not own:
            return (self.tp,) * self.pp
        return tuple(own.get(name, self.tp) for name in self.part_of_rank)

    def at_pp_rank(self, rank: int) -> Decisions:
        """The same as the ranks of one stage have it: its part's tp."""
        return self.with_tp(self.tp_of_rank[rank]) if self.tp_by_part else self

    def with_tp(self, tp: int) -> Decisions:
        """The same with another tp; one rank alone splits no sequence."""
        return replace(self, tp=tp, sequence_parallel=self.sequence_parallel and tp > 1)

    def alone(self, part: str) -> Decisions:
        """The mesh as far as one part has it, where parts have another tp each: its own stages."""
        own = self.with_tp(dict(self.tp_by_part)[part])
        return replace(own, pp=dict(self.parts)[part], parts=(), tp_by_part=())

    def on_part(self, share: Share) -> Decisions:
        """These decisions as the ranks of one part run them: its micro-batches, what it computes
        again. dp stays that of all parts."""
        return replace(
            self, microbatches=share.microbatches, recompute=share.recompute or self.recompute
        )

    def at_data_rank(self, rank: int) -> Decisions:
        """The same of the part that a data rank of all of them lies on."""
        for share in self.shares:
            if rank < share.dp:
                return self.on_part(share)
            rank -= share.dp
        return self

    @property
    def microbatches_by_data_rank(self) -> tuple[int, ...]:
        """What each data rank of all parts runs."""
        shares = self.shares or (Share(part="", dp=self.dp, microbatches=self.microbatches),)
        return tuple(share.microbatches for share in shares for _ in range(share.dp))

    @property
    def gpus(self) -> int:
        if self.tp_by_part:
            return self.dp * self.cp * sum(self.tp_of_rank)
        return self.pp * self.dp * self.cp * self.tp

    @property
    def pipeline(self) -> int:
        """Ranks of one pipeline, in a row: all GPUs, or those of one of dp_outer parts."""
        return self.gpus // self.dp_outer

    @property
    def tiers(self) -> dict[str, str]:
        """The tier of what is offloaded, without counts."""
        return {what: tier.partition(":")[0] for what, tier in self.offload}

    @property
    def moved(self) -> tuple[int, ...] | None:
        """Of each stage, the layers whose activations lie below; None: not counted, it is all or
        none; () where the stages are not cut yet."""
        _, counted, counts = dict(self.offload).get("activations", "").partition(":")
        return tuple(map(int, counts.split("/") if counts else ())) if counted else None

    @property
    def below(self) -> tuple[int, ...] | None:
        """Of each stage, the layers whose optimizer lies below, its first; None: not counted, it is
        that of all units or of none. One count may stand for all stages until they are cut."""
        _, counted, counts = dict(self.offload).get("optimizer", "").partition(":")
        return tuple(map(int, counts.split("/"))) if counted else None

    def below_of(self, stages: tuple[int, ...]) -> tuple[int, ...]:
        """`below` of these stages: no more layers than they have."""
        counts = self.below or (0,)
        return tuple(min(counts[k % len(counts)], n) for k, n in enumerate(stages))

    def with_state(self, below: bool) -> Decisions:
        """These decisions as a unit has them whose state is below, or not, where that is counted.
        """
        rows = (row for row in self.offload if below or row[0] not in STATE_BELOW)
        whole = ((w, self.tiers[w] if w in STATE_BELOW else t) for w, t in rows)
        return replace(self, offload=tuple(whole))

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Of each stage (computed again whole, the next treated by half): `StageProblem`'s. Half is
        selective recomputation, or offload where layers are offloaded by count."""
        none = self.recompute or ((0, 0),) * len(self.stages)
        if self.moved is None:
            return none
        return tuple((full, n) for (full, _), n in zip(none, self.moved))

    def on(self, tier: str, what: str = "optimizer") -> Decisions:
        """The same with the optimizer, or other things, on another tier."""
        below = ((w, tier if w == what else t) for w, t in self.offload)
        return replace(self, offload=tuple(below))

    def cut(self, stages: tuple[int, ...], pairs: tuple[tuple[int, int], ...]) -> Decisions:
        """These decisions with their stages and `pairs` decided."""
        offload = self._lowered(stages).offload
        if self.moved is None:
            return replace(self, stages=stages, recompute=pairs, offload=offload)
        others = tuple(row for row in offload if row[0] != "activations")
        word = f"{self.tiers['activations']}:" + "/".join(str(n) for _, n in pairs)
        below = (("activations", word),) if any(n for _, n in pairs) else ()
        return replace(
            self, stages=stages, recompute=tuple((full, 0) for full, _ in pairs),
            offload=(*others, *below),
        )

    def _lowered(self, stages: tuple[int, ...]) -> Decisions:
        """The same with the optimizer's count said of each stage."""
        if self.below is None:
            return self
        counts = self.below_of(stages)
        if not any(counts):
            return self.with_state(False)
        return self.on(f"{self.tiers['optimizer']}:" + "/".join(map(str, counts)))

    @property
    def edp(self) -> int:
        return self.dp * self.cp * self.tp // (self.ep * self.etp)
