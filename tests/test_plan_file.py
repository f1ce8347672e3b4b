"""The plan file: the same bytes back, every fault told, never half-written."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from toy_plan import DECISIONS, SHARDED, toy_graph, toy_plan

from ir.errors import GateError, PlanError
from planner.chain import layer_paths, stage_units
from planner.plan import hardware_name, load, write_whole
from planner.plan_text import parse_text, to_text

GOLDEN = Path(__file__).parent / "golden"


def test_text_is_the_golden_file(update_golden):
    update_golden(GOLDEN / "plan.json", to_text(toy_plan()))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "decisions",
    [
        DECISIONS,
        replace(DECISIONS, stages=(8,), recompute=((8, 0),), pp=1, dp=4, shard=4, reshard=True,
                microbatches=4),
        replace(DECISIONS, stages=(2, 2, 2, 2), recompute=((1, 1), (0, 0), (2, 0), (0, 2)),
                schedule="interleaved", virtual_stages=2),
        replace(DECISIONS, stages=(2, 2, 2, 2), recompute=((0, 0),) * 4, schedule="zbv",
                virtual_stages=2, compile=False, offload=(("optimizer", "cpu"),)),
    ],
)  # fmt: skip
def test_round_trip_is_identity(decisions, tied):
    plan = toy_plan(toy_graph(tied=tied), decisions=decisions)
    again = parse_text(to_text(plan), plan.graph)
    assert to_text(again) == to_text(plan)
    assert again.decisions == decisions
    assert again.sharding_by_unit["Layer"] == SHARDED
    assert parse_text(to_text(again), plan.graph) == again


def test_tp_1_is_all_replicated():
    plan = toy_plan(decisions=replace(DECISIONS, tp=1, dp=4, shard=4, microbatches=4,
                                      sequence_parallel=False), shardings=())  # fmt: skip
    assert parse_text(to_text(plan), plan.graph) == plan
    assert {rule["tp"] for rule in json.loads(to_text(plan))["parameters"]} == {"R"}


def test_moving_one_layer_is_a_diff_of_two_lines():
    before = to_text(toy_plan()).splitlines()
    decisions = replace(DECISIONS, stages=(4, 4))
    after = to_text(toy_plan(decisions=decisions)).splitlines()
    changed = [b for a, b in zip(before, after) if a != b]
    assert len(before) == len(after)
    assert len([line for line in changed if '"stage"' in line]) == 2
    assert len(changed) == 2


def edited(change):
    """The plan's JSON after `change(raw)`."""
    raw = json.loads(to_text(toy_plan()))
    change(raw)
    return json.dumps(raw)


def rule(raw, needle):
    return next(r for r in raw["parameters"] if needle in r["match"])


FAULTS = {
    "no rule": (lambda r: r["parameters"].pop(), "matched by no rule"),
    "two rules": (lambda r: r["parameters"].append(r["parameters"][0]), "matched by two rules"),
    "no such parameter": (
        lambda r: rule(r, "up_proj").update(match="layers.{0..9}.mlp.up_proj.weight"),
        "names layers.8.mlp.up_proj.weight, no parameter",
    ),
    "no such dim": (lambda r: rule(r, "up_proj").update(tp="S(2)"), "is placed S(2)"),
    "bad placement": (lambda r: rule(r, "up_proj").update(tp="X"), "is placed 'X'"),
    "one layer apart": (
        lambda r: (
            rule(r, "up_proj").update(match="layers.{0..6}.mlp.up_proj.weight"),
            r["parameters"].append({"match": "layers.7.mlp.up_proj.weight", "tp": "R"}),
        ),
        "layers.7 and layers.0 are one class",
    ),
    "unit on no stage": (lambda r: r["stages"][1].update(units="layers.{5..7}, norm"),
                         "lm_head is on no stage"),
    "unit on two stages": (lambda r: r["stages"][1].update(
        units="layers.{4..7}, norm, lm_head"), "layers.4 is on 2 stages"),
    "unknown unit": (lambda r: r["stages"][1].update(
        units="layers.{5..8}, norm, lm_head"), "layers.8', which is no unit"),
    "stages out of order": (lambda r: (
        r["stages"][0].update(units="embed_tokens, layers.{1..5}"),
        r["stages"][1].update(units="layers.{0,6,7}, norm, lm_head")), "stages[0] holds"),
    "stage of no layer": (lambda r: (
        r["stages"][0].update(units="embed_tokens, layers.{0..7}"),
        r["stages"][1].update(units="norm, lm_head")), "stages[1] holds norm, lm_head, and no"),
    "wrong rank": (lambda r: r["stages"][1].update(pp_rank=0), "expected stage 1 on pp_rank 1"),
    "back and forth": (lambda r: (r["units"][0].update(units="layers.{1..4}"),
                                  r["units"][1].update(units="layers.{0,5..7}")),
                       "changes back and forth"),
    "layer in no mode": (lambda r: r["units"].pop(), "is in no rule of units"),
    "bad mode": (lambda r: r["units"][0].update(recompute="some"), "units[0].recompute is 'some'"),
    "unknown key": (lambda r: r.update(extra=1), "unknown key extra"),
    "missing key": (lambda r: r.pop("stages"), "missing key stages"),
    "unknown decision": (lambda r: r["decisions"].update(pq=1), "unknown key decisions.pq"),
    "missing decision": (lambda r: r["decisions"].pop("tp"), "missing key decisions.tp"),
    "wrong type": (lambda r: r["decisions"].update(tp="2"), "decisions.tp is '2'"),
    "boolean number": (lambda r: r["decisions"].update(tp=True), "decisions.tp is True"),
    "beyond counts": (lambda r: r["decisions"].update(pp=99999999999999999999),
                      "decisions.pp is 99999999999999999999"),
    "no such stages": (lambda r: r["decisions"].update(pp=999_999_999), "2 stages, but pp"),
    "beyond integers": (lambda r: r["estimate"].update(step_time_us=2**53),
                        "estimate.step_time_us is"),
    "no number": (lambda r: r["workload"].update(expert_imbalance=float("inf")),
                  "workload.expert_imbalance is Infinity"),
    "bad word": (lambda r: r["decisions"].update(schedule="2f2b"), "decisions.schedule is '2f2b'"),
    "unknown engine": (lambda r: r["workload"].update(engine="x"), "workload.engine is 'x'"),
    "batch": (lambda r: r["workload"].update(global_batch=17), "global_batch 17"),
    "experts": (lambda r: r["decisions"].update(ep=3), "ep*etp = 3 does not divide"),
    "illegal": (lambda r: r["decisions"].update(reshard=True), "gathers its parameters once"),
    "estimate": (lambda r: r["estimate"].update(step_time_us=1.5), "estimate.step_time_us is 1.5"),
    "newer": (lambda r: r.update(schema="plan/2"), "schema 'plan/2' is not known"),
    "not a plan": (lambda r: r.update(schema=3), "not a plan"),
    "edge": (lambda r: r["edges"][0].update(forward="S(1)"), "forward is 'S(1)'"),
    "edge nowhere": (lambda r: r["edges"][0].update(at="nowhere.x:in"), "is in no unit"),
}  # fmt: skip


def test_an_unknown_key_is_told_which_there_are_the_nearest_first():
    raw = json.loads(to_text(toy_plan()))
    cases = (
        (raw, "unit", "known: units, "),
        (raw["decisions"], "microbatch", "known: micro_batch, microbatches, "),
        (raw["workload"], "seq_length", "known: seq_len, "),
        (raw["inputs"], "hardwares", "known: hardware, "),
    )  # fmt: skip
    for table, key, words in cases:
        table[key] = 1
        with pytest.raises(PlanError, match="unknown key") as caught:
            parse_text(json.dumps(raw), toy_graph())
        assert caught.value.why.startswith(words), caught.value.why
        del table[key]


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(fault):
    change, words = FAULTS[fault]
    with pytest.raises(PlanError) as found:
        parse_text(edited(change), toy_graph(), "plan.json")
    assert words in "\n".join(found.value.lines())
    assert found.value.exit_code == 1
    assert "plan.json" in found.value.where


def test_every_truncation_is_refused():
    text = to_text(toy_plan())
    for length in [0, 1, *range(50, len(text) - 2, 97), len(text) - 2]:
        with pytest.raises(PlanError):
            parse_text(text[:length], toy_graph())


def test_newer_schema_says_upgrade():
    with pytest.raises(PlanError, match="plan/9") as found:
        parse_text('{"schema": "plan/9"}', toy_graph())
    assert any("upgrade" in hint for hint in found.value.hints)


def test_key_given_twice():
    text = to_text(toy_plan()).replace('"tp": 2', '"tp": 2, "tp": 4', 1)
    with pytest.raises(PlanError, match="key tp is there twice"):
        parse_text(text, toy_graph())


def test_save_and_load(tmp_path):
    plan = toy_plan()
    path = tmp_path / "plan.json"
    plan.save(str(path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.graph", "plan.json"]
    assert to_text(load(str(path)), embed=True) == to_text(plan, embed=True)
    (tmp_path / "plan.graph").unlink()
    with pytest.raises(PlanError, match=r"plan.graph cannot be read") as found:
        load(str(path))
    assert found.value.exit_code == 1
    plan.save(str(path), embed=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json"]
    assert to_text(load(str(path))) == to_text(plan)


def test_graph_of_another_model_is_a_gate(tmp_path):
    toy_plan().save(str(tmp_path / "plan.json"))
    toy_plan(toy_graph(4), decisions=replace(DECISIONS, stages=(2, 2), recompute=((0, 0),) * 2)
             ).save(str(tmp_path / "other.json"))  # fmt: skip
    with pytest.raises(GateError) as found:
        load(str(tmp_path / "plan.json"), str(tmp_path / "other.graph"))
    assert found.value.exit_code == 4


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    path.write_text("old")
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space")))
    with pytest.raises(PlanError, match="cannot write"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_load_from_a_revision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    toy_plan().save("plan.json")
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "plan"],
                    ["update-ref", "refs/remotes/team/trunk", "HEAD"]):  # fmt: skip
        subprocess.run(["git", *command], check=True)
    Path("plan.json").write_text("{}")
    Path("plan.graph").unlink()
    assert to_text(load("HEAD:plan.json")) == to_text(toy_plan())
    for source, why, hint in (
        ("HEAD:old/plan.json", "does not exist", "did you mean HEAD:plan.json?"),
        ("HEAD:pla.json", "does not exist", "did you mean HEAD:plan.json?"),
        ("HEAD:x.toml", "does not exist", "HEAD is there, and has no x.toml"),
        ("trunk:plan.json", "'trunk' is no revision", "did you mean team/trunk:plan.json?"),
        ("v9:plan.json", "'v9' is no revision", "git fetch"),
        ("--all:plan.json", "'--all' is no revision", "git fetch"),
        (":plans.json", "", "did you mean :plan.json?"),
    ):
        with pytest.raises(PlanError) as caught:
            load(source)
        assert why in caught.value.why and any(hint in row for row in caught.value.hints), source
    with pytest.raises(PlanError, match="cannot read NONE:plan"):
        load("NONE:plan.json")


def test_the_same_bytes_under_any_hash_seed():
    script = (
        "from toy_plan import toy_plan; from planner.plan_text import to_text;"
        "print(to_text(toy_plan()))"
    )
    texts = {
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
        ).stdout
        for seed in ("0", "1", "2")
    }  # fmt: skip
    assert texts == {to_text(toy_plan()) + "\n"}


def test_units_follow_the_layers_of_their_stage():
    graph = toy_graph(4)
    assert layer_paths(graph) == tuple(f"layers.{i}" for i in range(4))
    assert stage_units(graph, (1, 3)) == (
        ("embed_tokens", "layers.0"), ("layers.1", "layers.2", "layers.3", "norm", "lm_head"),
    )  # fmt: skip
    assert stage_units(toy_graph(0), (0,)) == (("embed_tokens", "norm", "lm_head"),)


def test_hardware_name_is_never_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hardware_name("H100x64") == "h100x64"
    assert hardware_name(str(tmp_path / "a" / "host.toml")) == "a/host.toml"
    assert hardware_name(str(tmp_path.parent / "host.toml")) == "host.toml"
