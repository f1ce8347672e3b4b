"""`plan validate`: the cost models against measurements, the shipped ones or the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ir.errors import PlanError, UsageError
from planner.commands.shared import Json, print_json
from planner.console import progress, say

if TYPE_CHECKING:
    from cost_models.validation.ops import OpsReport
    from planner.validation.scoring import Report


def validate(
    runs: Annotated[
        str,
        typer.Option(
            metavar="FILE", show_default=False,
            help="training runs, one JSON object a line (default: the published ones shipped)",
        ),
    ] = "",
    ops: Annotated[
        str, typer.Option(metavar="FILE", show_default=False, help="single kernels, a .csv")
    ] = "",
    as_json: Json = False,
    verbose: Annotated[
        int,
        typer.Option(
            "-v", "--verbose", count=True, help="-v: every run, on stderr; -vv: also tracebacks"
        ),
    ] = 0,
) -> int:
    """\b
    plan validate
    plan validate --runs my_runs.yaml
    plan validate --ops my_kernels.csv --json

    Compare what the cost models predict with what was measured: error by class, worst rows.
    """
    documents: list[dict[str, Any]] = []
    if runs or not ops:
        from planner.validation import report as view
        from planner.validation.shipped import PUBLISHED, cross_validated

        path = Path(runs) if runs else PUBLISHED
        left_out = cross_validated()
        found = _report(path)
        if as_json:
            documents.append(view.document(found, left_out))
        else:
            print(view.text(found, path.name, left_out))
        if verbose:
            say("\n".join(view.verbose_lines(found.used)))
    if ops:
        from planner.validation import kernels

        measured = _kernels(Path(ops))
        if as_json:
            documents.append(kernels.document(measured))
        else:
            print(("\n" if runs else "") + kernels.text(measured, Path(ops).name))
    if as_json:
        first, *rest = documents
        print_json({**first, **({"ops": rest[0]} if rest else {})})
    return 0


def _report(path: Path) -> Report:
    """Every run of a file, predicted and scored, saying how far it is on a terminal."""
    from planner.validation.rows import read_runs
    from planner.validation.running import predict_runs
    from planner.validation.scoring import report_of

    try:
        rows = read_runs(path)
    except UnicodeDecodeError:
        why = "expected UTF-8, one JSON object a line"
        raise PlanError(f"{path} is no text", why=why) from None
    with progress() as report:
        return report_of(predict_runs(rows, report))


def _kernels(path: Path) -> OpsReport:
    """Every kernel of a table, predicted and scored."""
    from cost_models.validation.ops import validate_ops

    try:
        return validate_ops(path)
    except UsageError as fault:  # of a file's content, not of the command line
        raise PlanError(fault.what, why=fault.why, hints=fault.hints) from None
    except (TypeError, ValueError) as fault:
        why = "expected UTF-8, comma-separated, a header line, each row as long as it"
        raise PlanError(f"{path} is no table of measured kernels: {fault}", why=why) from None
