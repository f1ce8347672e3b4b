"""`plan validate`: the cost models against measurements, the shipped ones or the user's own."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ir.errors import PlanError, UsageError
from planner.commands.shared import Json, print_json
from planner.console import progress, say

if TYPE_CHECKING:
    from cost_models.validation.ops import OpsReport
    from planner.validation.scoring import Report
    from planner.validation.serving import ServingReport


def validate(
    runs: Annotated[
        list[str],
        typer.Option(
            metavar="FILE", show_default=False,
            help="training runs, one JSON object a line (default: the published ones shipped)",
        ),
    ] = [],  # noqa: B006
    ops: Annotated[
        list[str], typer.Option(metavar="FILE", show_default=False, help="single kernels, a .csv")
    ] = [],  # noqa: B006
    serving: Annotated[
        list[str],
        typer.Option(
            metavar="FILE", show_default=False, help="serving runs, a .csv; needs --configs"
        ),
    ] = [],  # noqa: B006
    configs: Annotated[
        list[str],
        typer.Option(
            metavar="DIR", show_default=False, help="model configurations that --serving names"
        ),
    ] = [],  # noqa: B006
    points: Annotated[
        bool,
        typer.Option("--points", help="published points of serving on small machines, shipped"),
    ] = False,
    as_json: Json = False,
    verbose: Annotated[
        int,
        typer.Option(
            "-v", "--verbose", count=True,
            help="-v: every run or kernel, on stderr; -vv: also tracebacks",
        ),
    ] = 0,
) -> int:
    """\b
    plan validate
    plan validate --runs my_runs.yaml
    plan validate --ops my_kernels.csv --json
    plan validate --serving my_serving.csv --configs my_configs/
    plan validate --points
    plan validate --runs my_runs.yaml --ops my_kernels.csv

    Compare what the cost models predict with what was measured: error by class, worst rows.
    """
    runs_file, ops_file = _one("--runs", runs), _one("--ops", ops)
    serving_file, configs_folder = _one("--serving", serving), _one("--configs", configs)
    if bool(serving_file) != bool(configs_folder):
        raise UsageError(
            "--serving and --configs go together",
            why="a run names a model, whose configuration says what it is",
        )
    # Kernels take seconds, and a file that is none is refused before runs take minutes.
    measured = _kernels(Path(ops_file)) if ops_file else None
    documents: dict[str, dict[str, Any]] = {}
    texts: list[str] = []
    lines: list[str] = []
    if runs_file or not (ops_file or serving_file or points):
        from planner.validation import report as view
        from planner.validation.shipped import PUBLISHED, cross_validated

        path = Path(runs_file) if runs_file else PUBLISHED
        left_out = cross_validated()
        found = _report(path)
        documents["runs"] = view.document(found, left_out)
        texts.append(view.text(found, path.name, left_out))
        lines += view.verbose_lines(found.used)
    if measured:
        from planner.validation import kernels

        documents["ops"] = kernels.document(measured)
        texts.append(kernels.text(measured, Path(ops_file).name))
        lines += kernels.verbose_lines(measured)
    if serving_file:
        from planner.validation import serving_report

        served = _serving(Path(serving_file), Path(configs_folder))
        documents["serving"] = serving_report.document(served)
        texts.append(serving_report.text(served, Path(serving_file).name))
        lines += serving_report.verbose_lines(served)
    if points:
        from planner.validation import serving_points

        published = serving_points.validate_points()
        documents["points"] = serving_points.document(published)
        texts.append(serving_points.text(published))
    if as_json:
        # One file's report, or the first's with those of the others under their names.
        first = documents.pop(next(iter(documents)))
        print_json({**first, **documents})
    else:
        print("\n\n".join(texts))
    if verbose and lines:
        say("\n".join(lines))
    return 0


def _one(flag: str, given: list[str]) -> str:
    """The one file of a flag, or "" where it was not given."""
    if len(given) > 1:
        raise UsageError(
            f"{flag} is given {len(given)} times", why="one file at a time",
            hints=(f"put them into one file, or run plan validate {flag} for each",),
        )  # fmt: skip
    if given == [""]:
        raise UsageError(f"{flag} names no file")
    return given[0] if given else ""


def _report(path: Path) -> Report:
    """Every run of a file, predicted and scored, saying how far it is on a terminal."""
    from planner.validation.rows import read_runs
    from planner.validation.run_checks import outcomes_of
    from planner.validation.scoring import report_of

    try:
        rows = read_runs(path)
    except UnicodeDecodeError:
        why = "expected UTF-8, one JSON object a line"
        raise PlanError(f"{path} is no text", why=why) from None
    with progress() as report:
        return report_of(outcomes_of(rows, report))


def _kernels(path: Path) -> OpsReport:
    """Every kernel of a table, predicted and scored."""
    from cost_models.validation.ops import validate_ops

    try:
        return validate_ops(path)
    except UsageError as fault:  # of a file's content, not of the command line
        raise PlanError(fault.what, why=fault.why, hints=fault.hints) from None
    except (TypeError, ValueError, csv.Error) as fault:
        why = "expected UTF-8, comma-separated, a header line, each row as long as it"
        raise PlanError(f"{path} is no table of measured kernels: {fault}", why=why) from None


def _serving(path: Path, configs: Path) -> ServingReport:
    """Every serving run of a table."""
    from planner.validation.serving import validate_serving

    try:
        with progress() as report:
            return validate_serving(path, configs, report)
    except UsageError as fault:  # of a file's content, not of the command line
        raise PlanError(fault.what, why=fault.why, hints=fault.hints) from None
