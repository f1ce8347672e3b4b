"""Complete the workload that the user left open, and say what was assumed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd, prod
from typing import Any

from cost_models.decisions import Workload
from cost_models.engines import engine_names, load_engine
from cost_models.fleet import Hardware, parts_of
from cost_models.formats import NARROW
from ir.errors import UsageError
from ir.graph import Graph
from planner.decisions import Pins
from planner.limits import MOST_COUNT

PRECISIONS = ("fp32", "bf16", "fp16", "fp8", "nvfp4")
ENGINE = "native-compiled"  # cli.md: the default
OPTIMIZERS = ("adamw", "sgd", "adafactor", "adamw8bit", "muon")
LONGEST_DEFAULT_TOKENS = 8192  # cli.md: the model's maximum, at most this
BATCH_TOKENS = 4 << 20  # cli.md: about 4M tokens a step
BATCH_SAMPLES_PER_GPU = 32  # models without a sequence: a common batch for images


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The workload flags as given; None is left to a default."""

    task: str = "train"
    engine: str | None = None
    seq_len: int | None = None
    global_batch: int | None = None
    precision: str | None = None  # bf16,fp8: what may be used beside it after it
    optimizer: str | None = None
    expert_imbalance: float = 1.0


def resolve(
    graph: Graph, hardware: Hardware, asked: Asked, pins: Pins
) -> tuple[Workload, tuple[str, ...]]:
    """Return the whole workload and a line for each default that was used.

    Raises UsageError for a word that is none, a precision the device lacks, and a batch that no
    legal number of data-parallel ranks divides, with the nearest batches that would do. Where the
    hardware has parts, data-parallel ranks are those of the largest.
    """
    if asked.task != "train":
        raise UsageError(f"--task {asked.task} is not planned by this version",
                         why="it plans --task train and --task serve")  # fmt: skip
    engine = load_engine(asked.engine or ENGINE)
    optimizer = asked.optimizer or OPTIMIZERS[0]
    _one_of("--optimizer", optimizer, OPTIMIZERS)
    precision, precision_note = precision_of(asked, hardware)
    allowed = allowed_formats(asked, hardware)
    if precision not in engine.precisions:
        others = [e for e in engine_names() if precision in load_engine(e).precisions]
        beside = (f"--precision bf16,{precision}",) * (precision in engine.formats)
        raise UsageError(f"--engine {engine.name} does not compute in {precision}",
                         why=f"it has {', '.join(engine.precisions)}",
                         hints=(f"--engine {' or '.join(others)}", *beside))  # fmt: skip
    if pins.grad_dtype == "bf16":
        for part in parts_of(hardware):
            if not part.device.has("bf16"):
                raise UsageError(f"--fix {pins.said('grad_dtype')}: {part.device.name} has no bf16",
                                 hints=("--fix grad_dtype=fp32",))  # fmt: skip
    seq_len, seq_notes = _seq_len(graph, asked)
    widest = max(part.count for part in parts_of(hardware))
    batch, batch_notes = _batch(graph, widest, asked, pins, seq_len)
    for flag, size in (("--seq-len", seq_len), ("--global-batch", batch)):
        if size > MOST_COUNT:
            raise UsageError(
                f"{flag} {size:,} is no size", hints=(f"{flag} {MOST_COUNT} at most",),
                why=f"a plan has at most {MOST_COUNT:,} samples or tokens",
            )
    if not asked.expert_imbalance >= 1:
        raise UsageError(
            f"--expert-imbalance {asked.expert_imbalance:g} is no imbalance",
            why="it is the load of the busiest expert rank over the mean: 1 or more",
        )
    workload = Workload(
        task=asked.task, engine=engine.name, global_batch=batch, seq_len=seq_len,
        precision=precision, optimizer=optimizer, expert_imbalance=asked.expert_imbalance,
        allowed_formats=allowed,
    )  # fmt: skip
    return workload, (*seq_notes, *batch_notes, *precision_note)


def inherit(asked: Asked, base: Workload, source: str) -> tuple[Asked, tuple[str, ...]]:
    """What was asked, the rest as in another plan's workload, and a line for each of those."""
    known = {
        "engine": base.engine, "seq_len": base.seq_len, "global_batch": base.global_batch,
        "precision": ",".join((base.precision, *base.allowed_formats)),
        "optimizer": base.optimizer,
    }  # fmt: skip
    taken: dict[str, Any] = {k: v for k, v in known.items() if getattr(asked, k) is None}
    lines = (f"--{key.replace('_', '-')} {value} (of {source})" for key, value in taken.items())
    return replace(asked, **taken), tuple(lines)


def _one_of(flag: str, value: str, words: tuple[str, ...]) -> None:
    if value in words:
        return
    from difflib import get_close_matches

    near = get_close_matches(value, words, n=1)
    raise UsageError(f"{flag} {value} is not known", why=f"known: {' '.join(words)}",
                     hints=tuple(f"{flag} {word}" for word in near))  # fmt: skip


def precision_of(asked: Asked, hardware: Hardware) -> tuple[str, tuple[str, ...]]:
    """The precision asked for; or bf16, and where a device has none, fp16."""
    devices = [part.device for part in parts_of(hardware)]
    if asked.precision is not None:
        precision = asked.precision.partition(",")[0]
        _one_of("--precision", precision, PRECISIONS)
        for device in devices:
            device.peak(precision)
        return precision, ()
    choice = next(
        (p for p in ("bf16", "fp16", "fp32") if all(d.has(p) for d in devices)), "fp32"
    )
    if choice == "bf16":
        return choice, ()
    lacks = next(device.name for device in devices if not device.has("bf16"))
    return choice, (f"--precision {choice} (default here: {lacks} has no bf16)",)


def allowed_formats(asked: Asked, hardware: Hardware) -> tuple[str, ...]:
    """What `--precision bf16,fp8` allows beside the precision, which is named first."""
    words = (asked.precision or "").split(",")[1:]
    for word in words:
        if word not in NARROW or words.count(word) > 1:
            raise UsageError(
                f"--precision {asked.precision}: {word} cannot be allowed",
                why=f"beside the first, matmuls of layers may be in {' or '.join(NARROW)}",
            )
        for part in parts_of(hardware):
            part.device.peak(word)
    return tuple(word for word in NARROW if word in words)


def _seq_len(graph: Graph, asked: Asked) -> tuple[int, tuple[str, ...]]:
    if not graph.seq_in_input:
        if asked.seq_len not in (None, 1):
            raise UsageError(
                f"--seq-len {asked.seq_len}, but the inputs of {graph.name} have no sequence",
                hints=("leave --seq-len out",),
            )
        return 1, ()
    longest = graph.max_seq_len
    if asked.seq_len is None:
        seq_len = min(longest or LONGEST_DEFAULT_TOKENS, LONGEST_DEFAULT_TOKENS)
        why = "the model's maximum" if seq_len == longest else f"the model's maximum is {longest}"
        return seq_len, (f"--seq-len {seq_len} (default; {why if longest else 'none is known'})",)
    if asked.seq_len < 1:
        raise UsageError(f"--seq-len {asked.seq_len} is no length", why="expected 1 or more")
    if longest is not None and asked.seq_len > longest:
        return asked.seq_len, (f"--seq-len {asked.seq_len} is beyond the model's {longest}",)
    return asked.seq_len, ()


def _batch(
    graph: Graph, gpus: int, asked: Asked, pins: Pins, seq_len: int
) -> tuple[int, tuple[str, ...]]:
    """The global batch in samples: as asked if some dp divides it, else the default."""
    step = _fixed_samples(pins)
    widest = _widest_dp(gpus, pins)
    if asked.global_batch is None:
        if graph.seq_in_input:
            batch = _legal_near(max(1, round(BATCH_TOKENS / seq_len)), widest, step)
            return batch, (f"--global-batch {batch} (default; {batch * seq_len:,} tokens)",)
        batch = _legal_near(BATCH_SAMPLES_PER_GPU * gpus, widest, step)
        return batch, (f"--global-batch {batch} (default; {BATCH_SAMPLES_PER_GPU} a GPU)",)
    batch = asked.global_batch
    if batch < 1:
        raise UsageError(f"--global-batch {batch} is no batch", why="expected 1 or more samples")
    if batch % step:
        raise _does_not_divide(batch, step, "the pinned dp*micro_batch")
    dp = gcd(batch // step, widest)
    if dp == min(widest, batch // step) or pins.dp is not None:
        return batch, ()
    note = f"--global-batch {batch} lets dp be {dp} at most, of {widest}"
    if dp == 1:  # all GPUs are tp, pp and cp: a batch beside it may be far quicker
        unit = step * next(n for n in range(2, widest + 1) if widest % n == 0)
        near = [n for n in _beside(batch, unit) if n]
        note += "; " + ", ".join(f"{n} lets it be {gcd(n // step, widest)}" for n in near)
    return batch, (note,)


def _fixed_samples(pins: Pins) -> int:
    """Samples that the batch must be a multiple of, whatever the search decides."""
    return prod(n or 1 for n in (pins.dp, pins.micro_batch, pins.microbatches))


def _widest_dp(gpus: int, pins: Pins) -> int:
    """The most data-parallel ranks beyond those pinned that the pins leave room for."""
    taken = prod(n or 1 for n in (pins.tp, pins.pp, pins.cp))
    return 1 if pins.dp is not None or gpus % taken else gpus // taken


def _legal_near(samples: int, widest: int, step: int) -> int:
    """A multiple of `step` near `samples` that the largest useful dp divides.

    The factor left is 2**a * 3**b, so that micro-batches divide in many ways.
    """
    dp = max(n for n in range(1, widest + 1) if widest % n == 0 and n * step <= max(samples, step))
    unit = dp * step
    smooth = ((1 << a) * (1, 3, 9)[b] for a in range(32) for b in range(3))
    return unit * min(smooth, key=lambda n: (abs(n * unit - samples), n))


def _beside(batch: int, unit: int) -> tuple[int, int]:
    """The multiples of a unit below and above a batch that is none."""
    return batch // unit * unit, -(-batch // unit) * unit


def _does_not_divide(batch: int, unit: int, by: str) -> UsageError:
    near = [n for n in _beside(batch, unit) if 0 < n <= MOST_COUNT]
    return UsageError(
        f"a global batch of {batch} does not divide by {by}",
        why=f"dp*micro_batch*microbatches = global batch; multiples of {unit} do",
        hints=(f"--global-batch {' or '.join(map(str, near))}",),
    )
