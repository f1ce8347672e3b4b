"""`plan calibrate`: measure this machine, and write a hardware file that `--hardware` takes."""

from __future__ import annotations

import datetime
import os
import shutil
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ir.errors import GateError, PlanError, UsageError
from ir.files import is_stream
from planner.console import progress, say

if TYPE_CHECKING:
    from cost_models.calibrate_checks import Fault
    from cost_models.calibrate_error import StepError
    from cost_models.calibrate_file import Calibration, Moved
    from planner.runtime.probe_steps import StepTried

DEFAULT = "host.toml"
COLUMNS = (30, 12, 13, 7, 16)  # of the table: 80 together with two spaces


def calibrate(
    output: Annotated[
        str,
        typer.Option(
            "-o", "--output", metavar="PATH", show_default=DEFAULT, help="the hardware file"
        ),
    ] = "",
    quick: Annotated[
        bool, typer.Option("--quick", help="a try in seconds: fewer repeats, smaller copies")
    ] = False,
    disk: Annotated[
        str,
        typer.Option(
            metavar="DIR", show_default=False, help="where a file is written and read (default:"
            " the output's folder)",
        ),
    ] = "",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace the file where there is one")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="save what is not believed, with the warning inside")
    ] = False,
    validate: Annotated[
        bool,
        typer.Option(
            "--validate", help="then predict and measure training steps on one device, and put"
            " their error into the file",
        ),
    ] = False,
    hardware: Annotated[
        str,
        typer.Option(
            "--hardware", metavar="FILE", show_default=False,
            help="with --validate: a file measured before, nothing is measured for it again",
        ),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document, base units")] = False,
    verbose: Annotated[
        int, typer.Option("-v", "--verbose", count=True, help="-vv: tracebacks")
    ] = 0,
) -> int:  # fmt: skip
    """\b
    plan calibrate -o host.toml
    plan calibrate --quick && plan trace model.py --hardware host.toml
    torchrun --nproc-per-node 8 -m planner.cli calibrate -o node.toml
    plan calibrate --validate --hardware host.toml

    Measure this machine in under five minutes: matmuls, attention, memory, copies, disk, and, under
    torchrun, collectives. Fit the cost model's constants to it, and write them as a hardware file.
    """
    if hardware and not validate:
        raise UsageError("--hardware goes with --validate", hints=("--validate",))
    if hardware:
        unused = {"-o": output, "--disk": disk, "--overwrite": overwrite, "--force": force}
        for flag in (flag for flag, given in unused.items() if given):
            raise UsageError(
                f"{flag} does not go with --hardware {hardware}",
                why="with it nothing is measured for a file anew",
            )
        return 0 if _further_rank() else _validated(hardware, quick, as_json)
    output = output or DEFAULT
    target = Path(output)
    _require_writable(target, overwrite, Path(disk) if disk else target.parent)
    from planner.runtime.probe import measure

    with progress() as report:
        run = measure(Path(disk) if disk else target.parent, quick=quick, report=report)
    if run is None:  # a rank but the first
        return 0
    from cost_models.calibrate_checks import faults
    from cost_models.calibrate_file import calibration, known_cluster, to_toml

    found = faults(run, known_cluster(run))
    if any("a time of nothing" in fault.found for fault in found):
        raise refusal(found)
    made = calibration(run)
    goes_on = validate and not (found and not force)
    if not as_json:
        print(table(made))
    elif not goes_on:
        _print_json(document(made, found))
    if found and not force:
        raise refusal(found)
    today = datetime.date.today().isoformat()
    text = to_toml(made, target.stem, today, found)
    _write(target, text, overwrite)
    for fault in found:
        say(f"warning: {fault.line}")
    say(f"wrote {output}: --hardware {output}")
    return _validated(output, quick, as_json, document(made, found)) if validate else 0


def _further_rank() -> bool:
    """Whether torchrun started this process, and not as the first."""
    return os.environ.get("RANK", "0") != "0"


def _print_json(value: Any) -> None:
    from planner.commands.shared import print_json

    print_json(value)


def _require_writable(target: Path, overwrite: bool, folder: Path) -> None:
    """Refuse before minutes are spent, not after."""
    if target.suffix != ".toml":
        raise UsageError(
            f"-o {target} is no hardware file", why="--hardware takes files that end in .toml",
            hints=(f"-o {target.with_suffix('.toml') if target.name else DEFAULT}",),
        )  # fmt: skip
    if target.is_dir() or not target.parent.is_dir():
        raise UsageError(f"-o {target}: there is no folder {target.parent}, or it is one itself")
    if is_stream(target):
        raise UsageError(f"-o {target} is no file", hints=("-o another.toml",))
    if target.exists() and not overwrite:
        raise UsageError(
            f"{target} exists, and is left as it is",
            hints=("-o another.toml", "--overwrite replaces it"),
        )
    if not folder.is_dir():
        raise UsageError(f"--disk {folder} is no folder")
    for flag, place in (("-o", Path(os.path.realpath(target)).parent), ("--disk", folder)):
        if not os.access(place, os.W_OK | os.X_OK):
            raise UsageError(
                f"{flag}: nothing can be written in {place}", why="no permission",
                hints=(f"{flag} another place",),
            )  # fmt: skip


def _write(target: Path, text: str, overwrite: bool) -> None:
    """Whole or not at all: read back under another name first, then renamed. A link stays one, and
    what it leads to is replaced."""
    from cost_models.compute import load_kernels
    from cost_models.hardware import load_hardware
    from planner.plan import write_whole

    target = Path(os.path.realpath(target))
    beside = target.with_name(f".{target.stem}.{os.getpid()}.toml")
    try:
        write_whole(beside, text)
        load_kernels(load_hardware(str(beside)).device)
        if target.exists() and not overwrite:
            raise UsageError(f"{target} exists by now, and is left as it is")
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def refusal(found: tuple[Fault, ...]) -> PlanError:
    """Why nothing was saved."""
    lines = "\n".join(fault.line for fault in found)
    hints = dict.fromkeys(fault.hint for fault in found)
    return GateError(
        "this measurement is not believed, and was not saved", why=lines,
        hints=(*hints, "--force saves it with the warning inside"),
    )  # fmt: skip


def table(made: Calibration) -> str:
    """What was measured beside what the catalogue has, in 80 columns."""
    run = made.run
    against = f"the catalogue's {made.base}" if made.base else "what is assumed of a device like it"
    lines = [f"{run.machine.name}, against {against}", "", _line("", "before", "measured", "ratio",
                                                                "from")]  # fmt: skip
    lines += [_moved_line(row) for row in made.moved]
    launch = run.of("launch")
    if launch and run.machine.kind == "cuda":
        lines.append(_line("launch of an op, host", "", _said(launch[0].median_s, "s"), "", "info"))
    noisy = [p for p in run.probes if p.noisy]
    lines += ["", f"{len(run.probes)} probes, {len(noisy)} of them noisy and left out of fits; "
              f"clock under load {_clock(made):.0%} of bursts"]  # fmt: skip
    lines += [f"not measured: {reason}" for reason in run.left_out]
    lines += [f"refused: {fitted.line}" for fitted in made.refused]
    return "\n".join(
        textwrap.fill(line, 80, subsequent_indent="  ") if len(line) > 80 else line.rstrip()
        for line in lines
    )


def _clock(made: Calibration) -> float:
    value = next(dict(t.values)["derate"] for t in made.tables if t.name == "clock")
    assert isinstance(value, float)
    return value


def _moved_line(row: Moved) -> str:
    before = "" if row.before is None else _said(row.before, row.unit)
    ratio = f"{row.now / row.before:.2f}" if row.before else ""
    return _line(row.name, before, _said(row.now, row.unit), ratio, row.basis)


def _line(*cells: str) -> str:
    name, *rest = (cell[:width] for cell, width in zip(cells, COLUMNS))
    numbers = "".join(f"{cell:>{width}}" for cell, width in zip(rest[:-1], COLUMNS[1:]))
    return f"{name:{COLUMNS[0]}}{numbers}  {rest[-1]}"


def _said(value: float, unit: str) -> str:
    from cost_models import units

    words = {"B": units.format_bytes, "B/s": units.format_bytes_per_s,
             "FLOP/s": units.format_flop_per_s, "s": units.format_seconds}  # fmt: skip
    return words[unit](value) if unit else f"{value:.3g}"


def document(made: Calibration, found: tuple[Fault, ...]) -> dict[str, Any]:
    """The calibration as JSON: every probe, every constant, every fault."""
    from dataclasses import asdict

    run = made.run
    return {
        "schema": "calibration/1", "machine": asdict(run.machine), "base": made.base,
        "probes": [
            {"name": p.name, "median_s": p.median_s, "spread": p.spread, "repeats": len(p.seconds),
             "noisy": p.noisy} for p in run.probes
        ],
        "steady_flop_per_s": list(run.steady_flop_per_s),
        "moved": [asdict(row) for row in made.moved],
        "not_measured": list(run.left_out),
        "refused": [
            {"name": t.name, "kept": list(t.refused), "samples": t.samples,
             "median_error": t.median_error, "base_error": t.base_error} for t in made.refused
        ],
        "faults": [asdict(fault) for fault in found],
    }  # fmt: skip


# --- validation -------------------------------------------------------------------------------


def _validated(
    hardware: str, quick: bool, as_json: bool, before: dict[str, Any] | None = None
) -> int:
    """Predict steps with the file, run them, print both, and put the error into the file.

    before: what a JSON document begins with.
    """
    from cost_models.hardware import load_hardware
    from planner.runtime.probe_steps import try_steps

    load_hardware(hardware)
    path = Path(hardware).resolve() if hardware.endswith(".toml") else None
    old = _require_own(path) if path else ""
    left_out: list[str] = []
    with progress() as report:
        tried = try_steps(hardware, left_out, quick=quick, report=report)
    error = None
    fault: PlanError | None = None
    if path:
        try:
            error = _error_of(tried, hardware)
            _put_error(path, old, error)
        except PlanError as found:
            fault = found
    if as_json:
        from dataclasses import asdict

        steps = {
            "schema": "calibration-steps/1", "steps": [asdict(one) for one in tried],
            "left_out": left_out, "step_error": error and asdict(error),
            "written": path is not None and fault is None,
        }  # fmt: skip
        _print_json(steps if before is None else {**before, "validation": steps})
    else:
        print(steps_table(tried))
        for line in left_out:
            print(line)
    if fault:
        raise fault
    if error is None:
        say(f"{hardware} is the catalogue's: the error is written to files of your own alone")
    else:
        say(f"wrote {hardware}: estimates with it say +-{error.dense:.0%}, +-{error.moe:.0%} for"
            " mixtures of experts")  # fmt: skip
    return 0


def _require_own(path: Path) -> str:
    """The text of a file that may be written. Refuse before minutes are spent, not after."""
    if not path.stat().st_mode & 0o222 or not os.access(path, os.W_OK):
        reason = "the file is read-only"
    elif not os.access(path.parent, os.W_OK | os.X_OK):
        reason = f"nothing can be written in {path.parent}"
    else:
        return path.read_bytes().decode("utf-8")  # load_hardware has read it: it is text
    raise PlanError(
        f"the measured error cannot be written to {path.name}", why=reason,
        hints=("copy it to a place of yours, and validate the copy",),
    )  # fmt: skip


def _error_of(tried: tuple[StepTried, ...], hardware: str) -> StepError:
    from cost_models.calibrate_error import step_error
    from cost_models.hardware import load_hardware

    cluster = load_hardware(hardware)
    ran_on_cpu = all(one.peak_bytes is None for one in tried)
    if tried and ran_on_cpu != (cluster.device.family == "cpu"):
        ran = "a CPU" if ran_on_cpu else "a GPU"
        raise GateError(
            f"the steps ran on {ran}: their error is not written to {hardware}",
            why=f"the file describes {cluster.device.title}",
        )
    today = datetime.date.today().isoformat()
    return step_error([(one.predicted_s, one.step_s) for one in tried], cluster, today)


def _put_error(path: Path, old: str, error: StepError) -> None:
    """Whole or not at all, and only if the file is still what was validated."""
    from cost_models.calibrate_error import with_error
    from cost_models.compute import load_kernels
    from cost_models.hardware import load_hardware
    from planner.plan import write_whole

    text = with_error(old, error, str(path))
    beside = path.with_name(f".{path.stem}.{os.getpid()}.toml")
    try:
        write_whole(beside, text)
        shutil.copymode(path, beside)
        load_kernels(load_hardware(str(beside)).device)
        if path.read_bytes() != old.encode("utf-8"):
            raise GateError(
                f"{path.name} was changed while the steps ran, and is left as it is",
                hints=("validate it again",),
            )
        os.replace(beside, path)
    except OSError as fault:
        reason = fault.strerror or type(fault).__name__
        raise PlanError(f"cannot write {path.name}", why=reason) from None
    finally:
        beside.unlink(missing_ok=True)


def steps_table(tried: tuple[StepTried, ...]) -> str:
    """Predicted against measured, a line a step, and the errors in short."""
    import statistics

    def percent(found: float, predicted: float) -> str:
        return f"{predicted / found - 1:+.0%}"

    lines = ["", f"{'training step':34}{'predicted':>11}{'measured':>11}{'error':>7}"
             f"{'peak':>10}{'error':>7}"]  # fmt: skip
    for one in tried:
        memory = ("-", "") if one.peak_bytes is None else (
            _said(one.peak_bytes, "B"), percent(one.peak_bytes, one.predicted_bytes))  # fmt: skip
        lines.append(
            f"{one.name:34}{_said(one.predicted_s, 's'):>11}{_said(one.step_s, 's'):>11}"
            f"{percent(one.step_s, one.predicted_s):>7}{memory[0]:>10}{memory[1]:>7}"
        )
    if not tried:
        return "no step was run"
    off = [abs(one.predicted_s / one.step_s - 1) for one in tried]
    lines += ["", f"step time: median error {statistics.median(off):.0%}, "
              f"mean {statistics.fmean(off):.0%}"]  # fmt: skip
    peaks = [abs(o.predicted_bytes / o.peak_bytes - 1) for o in tried if o.peak_bytes]
    lines.append(
        f"peak memory: median error {statistics.median(peaks):.0%}" if peaks
        else "peak memory: a CPU does not count it"
    )  # fmt: skip
    return "\n".join(lines)
