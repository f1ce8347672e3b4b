"""How a job is operated: what fails, what restarting takes, what the building draws.

The hardware file says what machines are; these are about where and how they run. Every default
has its published source, and each may be set: `--assume restart_s=300`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from ir.errors import UsageError

# 419 unexpected interruptions of Llama 3 405B in 54 days on 16,384 H100 (Llama 3 Herd of Models,
# 2024, section 3.3.4): one in 50,700 GPU hours
LLAMA3_FAILURES_PER_GPU_HOUR = 419 / (54 * 24 * 16_384)
# detecting a failure and diagnosing it took under 10 minutes on average on 12,288 GPUs (Jiang et
# al., MegaScale, NSDI 2024); reading the checkpoint is counted apart
MEGASCALE_RESTART_S = 600.0
# average of data centres (Uptime Institute, Global Data Center Survey 2023)
UPTIME_PUE = 1.58

SOURCES = {
    "failures_per_gpu_hour": "419 interruptions in 54 days on 16,384 GPUs, Llama 3 405B",
    "preemptions_per_gpu_hour": "none, unless a price file says so of spot machines",
    "restart_s": "failures found and diagnosed within 10 minutes, MegaScale, NSDI 2024",
    "pue": "average data centre, Uptime Institute 2023",
    "tier": "the last of the hardware file; what it holds outlives a failure",
    "sample_bytes": "the model's inputs as it takes them",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Operations:
    """What goodput, energy and input rates rest on beside the plan.

    restart_s: from a failure until the job reads its checkpoint. pue: power of the building over
    that of its computers. tier: where checkpoints go, a name of the hardware file; empty, the
    last. sample_bytes: what one sample is in storage; 0, as the model takes it.
    """

    failures_per_gpu_hour: float = LLAMA3_FAILURES_PER_GPU_HOUR
    preemptions_per_gpu_hour: float = 0.0
    restart_s: float = MEGASCALE_RESTART_S
    pue: float = UPTIME_PUE
    tier: str = ""
    sample_bytes: float = 0.0

    def interruptions_per_s(self, gpus: int) -> float:
        """Failures and preemptions of a job on that many GPUs; any GPU's stops them all."""
        return (self.failures_per_gpu_hour + self.preemptions_per_gpu_hour) * gpus / 3600


def parse_operations(texts: Sequence[str]) -> Operations:
    """Read `--assume k=v`. Raises UsageError for a key that is none and a value out of range."""
    known = [f.name for f in fields(Operations)]
    given: dict[str, Any] = {}
    for text in texts:
        key, _, value = text.partition("=")
        if key not in known or not value:
            near = difflib.get_close_matches(key, known, n=1)
            raise UsageError(f"--assume {text} is no assumption",
                             why=f"known: {', '.join(f'{k}=' for k in known)}",
                             hints=tuple(f"--assume {name}=..." for name in near))  # fmt: skip
        if key in given:
            raise UsageError(f"--assume {key} is given twice")
        given[key] = value if key == "tier" else _number(key, value)
    return Operations(**given)


def _number(key: str, text: str) -> float:
    least = 1.0 if key == "pue" else 0.0
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not least <= number < math.inf:
        raise UsageError(f"--assume {key}={text} cannot be",
                         why=f"expected a number, {least:g} or more")  # fmt: skip
    return number
