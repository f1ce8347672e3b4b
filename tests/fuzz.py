"""Mutated files of plans, graphs, hardware and engines through what reads them: no traceback.

    python tests/fuzz.py 10000 [SEED]

Each file is a whole one with a few things wrong: a value of another kind or size, a key gone, twice
or moved, text cut or overwritten. A graph's hash is put right again, so that its parser is reached.
A run fails where a command says an internal error or a warning of Python, prints what a terminal
would obey, returns a code that it does not have, or takes more than MOST_S.
`tests/test_fuzz.py` runs some of them, of fewer plans.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
_WRONG = ("Traceback|Warning:"
          "|[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u202a-\\u202e\\u2066-\\u2069]")  # fmt: skip
CODES = {0, 1, 3, 4, 64}
MOST_S = 30
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 10**30, 2**31, 2**53, 2**63, 999_999_999, 1.5,
    float("nan"), float("inf"), "", "x", "../../etc/passwd",
    "<script>alert(1)</script>", "\u202e\x00\x1b[2J", "layers.{0..999999999}", "{" * 200, [], {},
    "m" + ".{a,b,c,d,e,f,g,h}" * 30,
    [[]], {"a": 1}, "S(0)", "S(99999999999999999999)", "cpu:1/2/3", "9" * 5000, "h100x64", "fp8",
)  # fmt: skip
TEXT = ("", "\n", '"', "{", "}", "[", "]", ",", "\\", "\x00", "\ufeff", "-", "9" * 400, "1e999",
        "nan", "a." * 300, "batch", "%", "\u0663", " @", "[[", "=", "#", "unit", "..",
        "é")  # fmt: skip

# Configurations that `plan import` reads: (engine, suffix, text).
ENGINES = {
    "megatron": ("megatron", "sh", "torchrun --nproc-per-node = 8 pretrain_gpt.py \\\n"
                 " --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 \\\n"
                 " --num-layers 2 --micro-batch-size 1 --global-batch-size 16 --seq-length 64 \\\n"
                 " --bf16 --use-distributed-optimizer --sequence-parallel \\\n"
                 " --recompute-granularity full --recompute-method block \\\n"
                 " --recompute-num-layers 1 --pipeline-model-parallel-layout 'Et|tL'\n"),
    "deepspeed": ("deepspeed", "json", json.dumps({
        "train_batch_size": 16, "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, indent=1)),
    "torchtitan": ("torchtitan", "toml", "[training]\nlocal_batch_size = 2\nseq_len = 64\n"
                   "[parallelism]\ntensor_parallel_degree = 2\npipeline_parallel_degree = 2\n"
                   "pipeline_parallel_schedule = \"1F1B\"\n[activation_checkpoint]\n"
                   "mode = \"selective\"\nselective_ac_option = \"1\"\n"),
    "titan-python": ("torchtitan", "py", "def f():\n    c = base()\n"
                     "    c.parallelism.tensor_parallel_degree = 2\n"
                     "    c.training = TrainingConfig(local_batch_size = 2, seq_len = 64)\n"
                     "    return c\n"),
    "accelerate": ("accelerate", "yaml", "distributed_type: FSDP\nmixed_precision: bf16\n"
                   "num_processes: 8\nfsdp_config:\n  fsdp_version: 2\n"
                   "  fsdp_activation_checkpointing: true\n"),
}  # fmt: skip
# What stands in for a size, a name or an attribute of a graph, in one line or in all of them.
SIZES = ("0", "1", "-1", "-64", "3", "2147483648", "9" * 15, "9" * 20, "9" * 400, "b", "s", "b*s",
         "b/0", "2*b*s/64", "s-9", "s+9", "1.5", "\u0663", "")  # fmt: skip
NAMES = ("", "1.5", "null", "{}", '""', "x", "root", "u0", "_", "a b", "a.b", "<b>", "u1:1", "f99",
         "call", "view", "matmul", "attention", "parameter", "input")  # fmt: skip
ATTRS = ("[", "[" * 50_000, "[]", "{}", "[[0]]", "[0, 0]", "[9]", "[null]", "null", "0", "-1",
         "1.5", "true", '""', '"x"', '"a b;c"', "NaN", "1e999", "9" * 30, "")  # fmt: skip

PLANS = ("train", "serve", "mixed", "levels-plan", "dense", "pools")
JSON_KINDS = (*PLANS, "deepspeed")
VALUES = ('"x"', "-1", "0", "nan", "inf", "1e400", "true", "[]", "{}", '""', "9" * 400,
          '"../../x.toml"', '"1e9GiB"', "2024-01-01")  # fmt: skip


def run(words: list[str]) -> tuple[int, str]:
    """A command's exit code and what it said; of "notebook", what a notebook shows of a plan."""
    from planner import cli, console

    out = io.StringIO()
    with (
        contextlib.redirect_stdout(out), contextlib.redirect_stderr(out),
        warnings.catch_warnings(),
    ):  # fmt: skip
        warnings.simplefilter("always")
        code = _notebook(words[1]) if words[0] == "notebook" else console.run(cli.app(), words)
    return code, out.getvalue()


def _notebook(path: str) -> int:
    import planner
    from ir.errors import PlanError

    try:
        planner.load(path)._repr_html_()
    except PlanError as fault:
        return fault.exit_code
    except Exception as fault:
        print(f"error: internal: {type(fault).__name__}: {fault}")
        return 1
    return 0


def originals(folder: Path, *, wide: bool = False) -> dict[str, str]:
    """Texts that are right: two plans with the graph inside, one of serving, hardware files.

    wide: plans of several kinds of GPUs, of levels, of another model, and of two pools as well.
    """
    tiny = [str(ROOT / "examples/moe.py"), "--arg", "size=tiny"]
    made = {
        "train": ["trace", *tiny, "--hardware", "h100x8", "--seq-len", "64", "--global-batch", "16",
                  "--fix", "tp=2", "--fix", "pp=2", "--fix", "recompute=selective:1",
                  "--effort", "5"],
        "serve": ["trace", *tiny, "--hardware", "h100x2", "--task", "serve", "--batch", "2",
                  "--prompt", "32", "--output", "32", "--fix", "tp=2"],
    }  # fmt: skip
    dense = ["trace", str(ROOT / "examples/gpt.py"), "--arg", "size=tiny", "--seq-len", "64",
             "--global-batch", "192", "--effort", "5", "--hardware"]  # fmt: skip
    more = {
        "mixed": [*dense, "h100x2+a100x4", "--fix", "pp=1", "--fix", "dp=6"],
        "levels-plan": [*dense, str(ROOT / "examples/hardware/two-datacentres.toml")],
        "dense": [*dense, "h100x4", "--fix", "pp=2", "--fix", "schedule=1f1b",
                  "--fix", "offload=optimizer:cpu"],
        "pools": ["trace", *tiny, "--hardware", "h100x4", "--task", "serve", "--batch", "2",
                  "--prompt", "32", "--output", "32", "--objective", "throughput"],
    }  # fmt: skip
    texts = {}
    for name, words in (made | (more if wide else {})).items():
        path = folder / f"{name}.json"
        code, said = run([*words, "--embed", "-o", str(path)])
        assert code == 0, said
        texts[name] = path.read_text()
    texts["hardware"] = (ROOT / "cost_models/hardware/h100.toml").read_text() + "\n"
    texts["hardware"] = "count = 8\n" + texts["hardware"]
    levels = ROOT / "examples/hardware/two-datacentres.toml"
    texts["levels"] = levels.read_text()
    texts["parts"] = (ROOT / "examples/hardware/two-generations.toml").read_text()
    return texts | {name: text for name, (_, _, text) in ENGINES.items()}


def mutated(text: str, kind: str, dice: random.Random) -> str:
    """A text with one to three things wrong."""
    for _ in range(dice.randint(1, 3)):
        if kind in JSON_KINDS and dice.random() < 0.75:
            with contextlib.suppress(json.JSONDecodeError, RecursionError):
                text = _restructured(text, dice)
                continue
        if kind not in JSON_KINDS and dice.random() < 0.5:
            values = [*re.finditer(r"(?:= |: |-[a-z]+ )(\S+)", text)]
            at = dice.choice(values) if values else None
            if at:
                text = text[: at.start(1)] + dice.choice(VALUES) + text[at.end(1) :]
                continue
        at_char = dice.randrange(len(text) + 1)
        size = dice.choice((0, 1, 1, 5, 40, len(text) // 2))
        text = text[:at_char] + dice.choice(TEXT) + text[at_char + size :]
    return text


def _restructured(text: str, dice: random.Random) -> str:
    """A JSON text with one value, key or line of its graph changed."""
    raw = json.loads(text)
    places = [*_places(raw)]
    if not places:
        return text
    holder, key = dice.choice(places)
    if dice.random() < 0.5 and isinstance(raw, dict) and isinstance(raw.get("graph"), list):
        lines = raw["graph"]
        if lines:
            _mutate_graph(lines, dice)
            _rehash(raw)
            return json.dumps(raw)
    move = dice.random()
    if move < 0.7:
        holder[key] = dice.choice(ODD)
    elif move < 0.85:
        del holder[key]
    elif isinstance(holder, list):
        holder.append(holder[key])
    else:
        holder[f"{key}_"] = holder[key]
    return json.dumps(raw)


def _mutate_graph(lines: list[Any], dice: random.Random) -> None:
    """One line cut, gone or twice, or one size, name or attribute another, there or everywhere."""
    number = dice.choice((dice.randrange(len(lines)), dice.randrange(min(3, len(lines)))))
    was = lines[number] if isinstance(lines[number], str) else ""
    way = dice.random()
    if way < 0.25:
        cut = dice.randrange(len(was) + 1)
        part = dice.choice((*TEXT, was[:cut]))
        lines[number] = was[:cut] + part + was[cut + dice.randint(0, 9) :]
    elif way < 0.3:
        del lines[number]
    elif way < 0.4:
        lines.insert(dice.randrange(len(lines)), was)
    else:
        pattern, puts = dice.choice(
            ((r"(?<=[\[ ])[bs\d*/+-]+(?=[,\]])", SIZES), (r"[\w./:]+", NAMES),
             (r"(?<==)(?:\[[^\]]*\]|[^ ,}]+)", ATTRS), (r" \{.*\}", ("", " {}", " {=}", " {a=1}")))
        )  # fmt: skip
        found = re.findall(pattern, was)
        if not found:
            return
        word, put = dice.choice(found), dice.choice(puts)
        whole = re.compile(rf"(?<![\w.]){re.escape(word)}(?![\w.])")
        everywhere = dice.random() < 0.5
        for at in range(len(lines)) if everywhere else (number,):
            if isinstance(lines[at], str):
                lines[at] = whole.sub(lambda _: put, lines[at], count=0 if everywhere else 1)


def _rehash(raw: dict[str, Any]) -> None:
    from ir.text import graph_hash

    with contextlib.suppress(TypeError, AttributeError, KeyError):
        raw["inputs"]["graph"] = graph_hash("\n".join(raw["graph"]) + "\n")


def _places(raw: Any) -> Iterator[tuple[Any, Any]]:
    """(holder, key) of every value but lines of the graph."""
    items = (
        raw.items() if isinstance(raw, dict) else enumerate(raw) if isinstance(raw, list) else ()
    )
    for key, value in list(items):
        yield raw, key
        if key != "graph":
            yield from _places(value)


def commands(kind: str, path: str, whole: str, dice: random.Random) -> list[str]:
    """A command that reads the file."""
    if kind in PLANS:
        out = str(Path(path).parent / "out")
        choices = [
            ["show", path], ["show", path, "--layers"], ["show", path, "--json"], ["check", path],
            ["notebook", path],
            ["diff", path, whole], ["diff", whole, path, "--format", "md"],
            ["report", path, "-o", f"{out}.html", "--no-why"],
            ["export", path, "--to", dice.choice(("megatron", "torchtitan", "deepspeed", "slurm",
                                                  "pytorch", "vllm")), "--lossy", "-o", out],
        ]  # fmt: skip
        return dice.choice(choices)
    if kind in ENGINES:
        model = ["--model", str(ROOT / "examples/moe.py"), "--arg", "size=tiny"]
        open_to_code = {"deepspeed": ["--seq-len", "64"],
                        "accelerate": ["--seq-len", "64", "--fix", "micro_batch=1"]}  # fmt: skip
        return ["import", path, "--from", ENGINES[kind][0], *model, "--hardware", "h100x8",
                *open_to_code.get(kind, []), "-o", str(Path(path).parent / "out.json")]  # fmt: skip
    return ["hardware", "show", path]


def fuzz(count: int, seed: int, texts: dict[str, str], folder: Path) -> list[str]:
    """What went wrong in `count` mutated files: the command and what it said."""
    wrong = []

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {MOST_S} s")

    signal.signal(signal.SIGALRM, late)
    names = sorted(texts)
    for index in range(count):
        dice = random.Random(f"{seed}/{index}")
        plans = [name for name in PLANS if name in texts]
        kind = dice.choice((*names, *plans, *plans))
        plan = "json" if kind in PLANS else "toml"
        path = folder / f"mutated.{ENGINES[kind][1] if kind in ENGINES else plan}"
        text = mutated(texts[kind], kind, dice)
        path.write_text(text, encoding="utf-8", errors="replace", newline="\n")
        words = commands(kind, str(path), str(folder / f"{kind}.json"), dice)
        signal.alarm(MOST_S)
        code, said = run([*words])
        signal.alarm(0)
        if code not in CODES or "internal" in said or re.search(_WRONG, said):
            kept = folder / f"wrong-{seed}-{index}{path.suffix}"
            kept.write_text(text, encoding="utf-8", errors="replace")
            wrong.append(f"{' '.join(words)} of {kept}: code {code}\n{said[-600:]}")
    return wrong


def main() -> None:
    """Fuzz, and exit 1 where something was wrong."""
    count, seed = (int(word) for word in (sys.argv[1:] + ["0"])[:2])
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    os.chdir(folder)
    wrong = fuzz(count, seed, originals(folder, wide=True), folder)
    print("\n\n".join(wrong[:20]))
    print(f"{count} files, {len(wrong)} wrong; they are in {folder}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
