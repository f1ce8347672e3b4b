"""What no model's configuration says: refused as it is read, before anything of that size is made.

A configuration may be anybody's, and transformers makes a module for each layer that it asks for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ir.errors import PlanError

if TYPE_CHECKING:
    from torch import nn

MOST_CHARACTERS = 1 << 20  # of a file; published ones with maps of labels have 0.1 MiB
MOST_DEPTH = 32  # of objects in objects; published ones have four
MOST_MODULES = 10_000  # layers, blocks, experts or heads: each is a module, or a row of a list
MOST_LABELS = 1_000_000  # of a classifier: transformers makes a name for each
MOST_PARAMETERS = 10**14  # ten times the largest model told of; costs are whole ps in 64 bits
_MODULES = re.compile(r"(layers?|blocks|experts|heads|depths?)$")


def require_sane(config: Mapping[str, Any], where: str) -> None:
    """Raise PlanError for a configuration nested too deeply, or with counts beyond any model's."""
    rows: list[tuple[object, Any]] = list(config.items())
    for _ in range(MOST_DEPTH):
        inner: list[tuple[object, Any]] = []
        for key, value in rows:
            if isinstance(value, dict):
                inner += value.items()
            elif isinstance(value, list):
                inner += ((key, row) for row in value)
            else:
                _require_few(str(key), value, where)  # a map of labels has numbers
        rows = inner
    if rows:
        raise PlanError("the configuration is nested too deeply", where=where,
                        why=f"expected at most {MOST_DEPTH} levels")  # fmt: skip


def _require_few(key: str, value: object, where: str) -> None:
    most = MOST_MODULES if _MODULES.search(key) else MOST_LABELS if key == "num_labels" else None
    if most is not None and isinstance(value, int) and value > most:
        raise PlanError(f"{key} is {value if value < 10**30 else 'too large'}", where=where,
                        why=f"expected at most {most:,}")  # fmt: skip


def require_parameters(model: nn.Module, where: str) -> None:
    """Raise PlanError for a model whose parameters are more than MOST_PARAMETERS."""
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > MOST_PARAMETERS:
        raise PlanError(f"the model has {count:.1e} parameters", where=where,
                        why=f"expected at most {MOST_PARAMETERS:.0e}")  # fmt: skip
