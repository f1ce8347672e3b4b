"""`python -m cost_models.fit`: refit the constants of kernels on the data directory.

Whole training runs are fitted after these, by `python -m planner.validation.fit`: a run is
predicted through the planner's own estimate.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ir.errors import PlanError, UsageError


def main(arguments: list[str] | None = None) -> int:
    """Run the fits that are asked for; print how well, and write the constants if told to."""
    parser = argparse.ArgumentParser(prog="python -m cost_models.fit", description=__doc__)
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("MESHWRIGHT_DATA"), metavar="DIR",
        help="the data directory; MESHWRIGHT_DATA by default",
    )  # fmt: skip
    parser.add_argument("--write", action="store_true", help="rewrite constants/*.toml in place")
    parser.add_argument("--kind", default="", help="op classes whose name begins with this")
    parser.add_argument(
        "--quick", action="store_true", help="no cross-validation: errors are those of the fit"
    )
    options = parser.parse_args(arguments)
    try:
        if options.data is None:
            raise UsageError("no data directory", hints=("--data DIR, or MESHWRIGHT_DATA",))
        if options.quick and options.write:
            raise UsageError("--quick leaves no held-out errors to write", hints=("without it",))
        from cost_models.fit.ops import fit_ops, report_text

        reports = fit_ops(
            Path(options.data) / "measured_ops.csv", only=options.kind,
            cross=not options.quick, write=options.write,
        )  # fmt: skip
        print(report_text(reports))
    except PlanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
