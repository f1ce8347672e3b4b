"""What `plan trace` is asked to do, and what it gives back: the seam of command and search."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cost_models.ledger import Estimate
from cost_models.operations import Operations
from cost_models.prices import Price
from planner.charges import Charges
from planner.decisions import Pins
from planner.limits import Limits
from planner.plan import Plan
from planner.score import AXIS_GAIN_PPM
from planner.workload import Asked

Progress = Callable[[str], None]  # takes one line: what is going on, best, bound, gap


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceOptions:
    """The arguments of `plan trace`.

    model: file, file:factory, config.json or its folder. args: factory arguments as written.
    base: another plan, whose workload is taken where none is asked for, and whose graph where no
    model is named; old: what it says, once read. stability: how much slower than the best a plan
    may be that changes less of it, as a share of the step; None: the best is taken.
    cache: use the traced graph if nothing it depends on changed. fold: trace one unit a class.
    objective: a word of `planner.objectives`. slack: with "memory", the share that a step may be
    longer than the fastest. prices: of the hardware's devices by name, none or all;
    operations: what the rate is expected under. batches, seq_lens: what the workload may have,
    where that is open.
    """

    model: str
    hardware: str = ""
    args: tuple[tuple[str, str], ...] = ()
    pins: Pins = field(default_factory=Pins)
    asked: Asked = field(default_factory=Asked)
    base: str = ""
    old: Plan | None = None
    stability: float | None = None
    cache: bool = True
    fold: bool = True
    gain_ppm: int = AXIS_GAIN_PPM  # of the step that each axis beside dp must earn
    effort: int = 0  # how much is searched at most; 0 is the search's own default
    objective: str = "time"
    limits: Limits = field(default_factory=Limits)
    slack: float = 0.05
    prices: Mapping[str, Price] = field(default_factory=dict)
    operations: Operations = field(default_factory=Operations)
    batches: tuple[int, ...] = ()
    seq_lens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """A classic recipe on the same model and hardware, beside the plan."""

    name: str
    step_time_s: float
    fits: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Wall seconds of the command's parts; never written to a plan."""

    import_s: float = 0.0
    trace_s: float = 0.0
    cost_s: float = 0.0
    solve_s: float = 0.0
    total_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceResult:
    """A plan with its estimate. echo: a line a default used. interrupted: Ctrl-C ended it.
    charges: what it comes to, where a price is known."""

    plan: Plan
    estimate: Estimate
    baselines: tuple[Baseline, ...] = ()
    timing: Timing = field(default_factory=Timing)
    echo: tuple[str, ...] = ()
    interrupted: bool = False
    charges: Charges | None = None
