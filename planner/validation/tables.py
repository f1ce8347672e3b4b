"""The accuracy tables of the documents, from the files that the fits write.

    python -m planner.validation.tables [--check]

A document marks a place with `<!-- figures: NAME -->` and `<!-- /figures -->`, and has its table
between them. Sources: `cost_models/validation/accuracy.toml` (rows left out of the fits) and the
held-out errors beside the kernels' constants. --check rewrites nothing and exits with 1
where a document differs.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cost_models
from cost_models.engines import engine_names
from cost_models.validation.accuracy import ACCURACY
from cost_models.validation.metrics import Scores
from ir.errors import PlanError
from planner.validation import targets
from planner.validation.shipped import cross_validated

CONSTANTS = Path(str(cost_models.__file__)).parent / "constants"
ROOT = CONSTANTS.parents[1]
DOCUMENTS = ("README.md", "docs/accuracy.md", "docs/serving.md")

# Before a class's name:
BY_GROUP, SOURCE_OUT, GENERATION_OUT = "", "source out, ", "GPU generation out, "
KINDS = {  # of models, as the fit names them
    "all": "all", "dense": "dense", "moe": "mixture of experts", "hybrid": "Mamba hybrid",
}  # fmt: skip
PRECISIONS = ("bf16", "fp16", "fp8", "nvfp4")
NONE_YET = (
    "None are shipped yet: `python -m planner.validation.fit --data DIR --write` writes them,\n"
    "then `python -m planner.validation.tables` makes this table."
)
_BLOCK = re.compile(r"(<!-- figures: ([a-z-]+) -->\n)(.*?)(<!-- /figures -->)", re.DOTALL)

Classes = Mapping[str, Scores]


def _percent(value: float, sign: str = "") -> str:
    return f"{value:{sign}.1%}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, a cell after another."""
    lines = [f"| {' | '.join(cells)} |\n" for cells in (head, *rows)]
    return "".join((lines[0], "|---" * len(head) + "|\n", *lines[1:]))


# --- steps ----------------------------------------------------------------------------------------


def _named(classes: Classes) -> Iterator[tuple[str, str]]:
    """(what to call it, name) of each class: kinds of model, devices, engines, precisions."""
    engines = engine_names()
    rest = sorted(name for name in classes if ", " not in name and name not in KINDS)
    for name, words in KINDS.items():
        if name in classes:
            yield words, name
    for known in (
        [n for n in rest if n not in engines and n not in PRECISIONS],
        [n for n in rest if n in engines], [n for n in rest if n in PRECISIONS],
    ):  # fmt: skip
        yield from ((f"`{name}`" if name in engines else name, name) for name in known)


def by_group(classes: Classes) -> str:
    """Every class, cross-validated by group."""
    rows = [
        (words, str(s.n), _percent(s.mape), _percent(s.median), _percent(s.bias, "+"),
         _percent(s.p90))
        for words, name in _named(classes) for s in (classes[BY_GROUP + name],)
    ]  # fmt: skip
    return _table(("class", "runs", "MAPE", "median", "bias", "p90"), rows)


def left_out(classes: Classes) -> str:
    """Every class without its source, and without its generation of GPUs."""
    rows = []
    for words, name in _named(classes):
        ways = [classes[w + name] for w in (SOURCE_OUT, GENERATION_OUT) if w + name in classes]
        if len(ways) < 2:
            continue
        cells = [(_percent(s.mape), _percent(s.median), _percent(s.bias, "+")) for s in ways]
        rows.append((words, str(ways[0].n), *cells[0], *cells[1]))
    return _table(
        ("class", "runs", "source out: MAPE", "median", "bias", "GPU generation out: MAPE",
         "median", "bias"), rows,
    )  # fmt: skip


def summary(classes: Classes) -> str:
    """What a README says: kinds of model cross-validated, all runs left out whole, kernels."""
    asked = [(f"step: {words}, by group", BY_GROUP + name) for name, words in KINDS.items()]
    asked += [("step: all, one source left out", SOURCE_OUT + "all"),
              ("step: all, one GPU generation left out", GENERATION_OUT + "all")]  # fmt: skip
    rows = [
        (words, str(s.n), _percent(s.mape), _percent(s.median), _percent(s.bias, "+"))
        for words, name in asked if name in classes for s in (classes[name],)
    ]  # fmt: skip
    return _table(("figure", "runs", "MAPE", "median", "bias"), rows)


# --- kernels --------------------------------------------------------------------------------------


def _fitted(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Tables with a held-out error by op class, then by device ("common": all of them)."""
    found: dict[str, dict[str, dict[str, Any]]] = {}

    def collect(device: str, name: str, table: Mapping[str, Any]) -> None:
        if "held_out_median_error" in table:
            of = found.setdefault(name.removesuffix(".device"), {})
            of[device] = dict(table)
        for key, value in table.items():
            if isinstance(value, dict):
                collect(device, f"{name}.{key}".lstrip("."), value)

    for path in sorted(folder.glob("*.toml")):
        collect(path.stem, "", tomllib.loads(path.read_text(encoding="utf-8")))
    return found


def kernels(folder: Path = CONSTANTS) -> str:
    """Each op class: its own fit, rows left out of it, and the best and worst device of those."""
    rows = []
    for name, tables in sorted(_fitted(folder).items()):
        whole = tables.pop("common", None)
        held = sorted((float(t["held_out_median_error"]), d) for d, t in tables.items())
        n = whole["samples"] if whole else sum(t["samples"] for t in tables.values())
        own = ("median_error", "p90_error", "held_out_median_error")
        cells = [_percent(whole[key]) if whole else "" for key in own]
        ends = held if len(held) == 1 else (held[0], held[-1])
        spread = " - ".join(f"{_percent(error)} {device}" for error, device in ends)
        rows.append((f"`{name}`", str(n), *cells, spread))
    return _table(
        ("op class", "kernels", "median, fitted", "p90, fitted", "median, held out",
         "held out, by device"), rows,
    )  # fmt: skip


def by_kind(figures: targets.Figures) -> str:
    """Kernels of all op classes of a kind together."""
    rows = []
    for name, one in figures["kernels"].items():
        other, n = _percent(one["device_out_median"]), one["device_out_n"]
        some = f" of {n}" if n < one["n"] else ""
        rows.append((name, str(one["n"]), _percent(one["median"]), _percent(one["p90"]),
                     other + some))  # fmt: skip
    return _table(
        ("kernels", "n", "median, held out", "p90, held out", "median, device out"), rows
    )


# --- memory, ranking, targets ---------------------------------------------------------------------


def memory(figures: targets.Figures) -> str:
    """Peaks by engine, left out by model or group where an engine's allocator was fitted."""
    rows = [
        (name if name == "all" else f"`{name}`", str(one["n"]), _percent(one["mape"]),
         _percent(one["median"]), _percent(one["bias"], "+"), _percent(one["p90"]))
        for name, one in figures["memory"].items()
    ]  # fmt: skip
    return _table(("runs that print a peak", "n", "MAPE", "median", "bias", "p90"), rows)


def verdicts(figures: targets.Figures) -> str:
    """Runs on the side of the capacity that they were on, and those on the other by id."""
    oom, ran = figures["verdicts"]["out of memory"], figures["verdicts"]["ran"]
    return _table(("runs", "n", "predicted beyond capacity", "wrong"), [
        ("out of memory", str(oom["n"]), str(oom["beyond"]),
         f"{len(oom['missed'])}: {', '.join(oom['missed'])}" if oom["missed"] else "0"),
        ("ran", str(ran["n"]), str(ran["beyond"]),
         f"{len(ran['wrong'])} by over 2%: {', '.join(ran['wrong'])}" if ran["wrong"] else "0"),
    ])  # fmt: skip


def ranking(figures: targets.Figures) -> str:
    """Kendall's tau of runs left out by group, and in-sample."""
    rows = [
        (name, str(one["pairs"]), str(one["groups"]), f"{one['tau']:.2f}",
         f"{one['in_sample_tau']:.2f}")
        for name, one in figures["ranking"].items()
    ]  # fmt: skip
    return _table(("pairs of", "pairs", "groups", "tau, left out", "tau, in-sample"), rows)


_KINDS_SERVED = {"kind dense tp1-4": "dense, tp 1-4", "kind dense tp8": "dense, tp 8",
                 "kind moe": "routed experts"}  # fmt: skip
_KEYS_SERVED = ("tpot_mape", "tpot_median", "ttft_mape", "ttft_median")
_ENGINES_SERVED = {"vllm-2025": "vLLM of 2025", "vllm": "vLLM 0.11-0.19",
                   "trtllm-2025": "TensorRT-LLM of 2025", "trtllm": "TensorRT-LLM 1.0-1.3",
                   "sglang": "SGLang"}  # fmt: skip


def served(figures: targets.Figures) -> str:
    """Runs of real engines, in sample: kinds of model, engines, all."""
    called = {
        **_KINDS_SERVED, **{f"engine {key}": words for key, words in _ENGINES_SERVED.items()},
        "all": "all that is scored", "set aside too": "with what is set aside",
    }  # fmt: skip
    found = figures["serving"]
    rows = [
        (words, str(found[key]["n"]), *(_percent(found[key][k]) for k in _KEYS_SERVED))
        for key, words in called.items() if key in found
    ]  # fmt: skip
    return _table(("", "n", "TPOT MAPE", "median", "TTFT MAPE", "median"), rows)


def served_left_out(figures: targets.Figures) -> str:
    """The same, each (model, device) by constants fitted without it, each configuration once."""
    found = figures["serving-left-out"]
    rows = [
        (words, str(found[key]["n"]), *(_percent(found[key][k]) for k in _KEYS_SERVED))
        for key, words in {**_ENGINES_SERVED, "all": "all"}.items() if key in found
    ]  # fmt: skip
    return _table(("left out", "n", "TPOT MAPE", "median", "TTFT MAPE", "median"), rows)


def all_targets(figures: targets.Figures) -> str:
    """What we set out to reach, and what was reached."""
    return _table(("", "target", "reached", ""), targets.lines(figures))


# --- documents ------------------------------------------------------------------------------------


def _steps(make: Callable[[Classes], str]) -> Callable[[Path], str]:
    def made(accuracy: Path) -> str:
        found = cross_validated(accuracy)
        return make(dict(found.classes)) if found else NONE_YET + "\n"

    return made


def _figures(
    make: Callable[[targets.Figures], str], *needed: str
) -> Callable[[Path], str]:
    def made(accuracy: Path) -> str:
        found = tomllib.loads(accuracy.read_text(encoding="utf-8")) if accuracy.exists() else {}
        return make(found) if all(part in found for part in needed) else NONE_YET + "\n"

    return made


BLOCKS: dict[str, Callable[[Path], str]] = {
    "summary": _steps(summary), "classes": _steps(by_group), "left-out": _steps(left_out),
    "kernels": lambda _: kernels(), "kernel-kinds": _figures(by_kind, "kernels"),
    "memory": _figures(memory, "memory"), "verdicts": _figures(verdicts, "verdicts"),
    "serving": _figures(served, "serving"),
    "serving-left-out": _figures(served_left_out, "serving-left-out"),
    "ranking": _figures(ranking, "ranking"), "targets": _figures(all_targets, *targets.NEEDED),
}  # fmt: skip


def rewritten(text: str, where: str, accuracy: Path = ACCURACY) -> str:
    """A document with its tables made anew. Raises PlanError for a block that cannot be made."""
    marks = len(re.findall(r"<!-- /?figures", text))
    blocks = _BLOCK.findall(text)
    unknown = sorted({name for _, name, _, _ in blocks} - set(BLOCKS))
    if not blocks or unknown or marks != 2 * len(blocks):
        raise PlanError(
            f"{where}: {', '.join(unknown) or 'a mark'} is no block of figures",
            why=f"expected `<!-- figures: NAME -->` ... `<!-- /figures -->`, {', '.join(BLOCKS)}",
        )
    return _BLOCK.sub(lambda m: f"{m[1]}{BLOCKS[m[2]](accuracy)}{m[4]}", text)


def main(arguments: list[str] | None = None) -> int:
    """Rewrite the documents of a checkout, or say which of them differ."""
    parser = argparse.ArgumentParser(
        prog="python -m planner.validation.tables", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="only say which documents differ")
    options = parser.parse_args(arguments)
    differ = []
    try:
        for name in DOCUMENTS:
            path = ROOT / name
            if not path.exists():
                raise PlanError(f"no {path}", why="the documents lie beside the packages' folders")
            text = path.read_text(encoding="utf-8")
            made = rewritten(text, name)
            if made != text:
                differ.append(name)
                if not options.check:
                    path.write_text(made, encoding="utf-8")
    except PlanError as fault:
        print("\n".join(fault.lines()), file=sys.stderr)
        return fault.exit_code
    words = "differs from the figures" if options.check else "is rewritten"
    print("\n".join(f"{name} {words}" for name in differ) or "the documents have these figures")
    return int(bool(differ) and options.check)


if __name__ == "__main__":
    sys.exit(main())
