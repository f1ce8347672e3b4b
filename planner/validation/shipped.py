"""What the project ships of its own accuracy: cited runs, and errors of runs left out of fits."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

import cost_models.validation
from cost_models.validation.accuracy import ACCURACY
from cost_models.validation.metrics import Scores
from ir.errors import PlanError

FOLDER = Path(str(cost_models.validation.__file__)).parent
PUBLISHED = FOLDER / "published.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossValidated:
    """Errors of runs that the constants they were predicted with were not fitted to.

    note: how that was done, in a line. classes: by name, as those of a report.
    """

    note: str
    classes: tuple[tuple[str, Scores], ...]


def cross_validated(path: Path = ACCURACY) -> CrossValidated | None:
    """The shipped figures, which the fit writes; None where there are none.

    The file: `note = "..."`, and for each class a table `[classes."NAME"]` of n, mape, median,
    bias, p90, relative. Its other parts are the tables' of the documents.
    """
    if not path.exists():
        return None
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
        rows = tuple(
            (str(name), Scores(
                n=int(row["n"]), mape=float(row["mape"]), median=float(row["median"]),
                bias=float(row["bias"]), p90=float(row["p90"]),
            ))
            for name, row in raw["classes"].items()
        )  # fmt: skip
        return CrossValidated(note=str(raw["note"]), classes=rows)
    except (ValueError, KeyError, TypeError, AttributeError) as fault:
        raise PlanError(
            f"{path} has no cross-validated figures: {fault!r}",
            why='expected note = "...", and [classes.NAME] with n, mape, median, bias, p90',
        ) from None
