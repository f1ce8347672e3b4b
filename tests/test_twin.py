"""A search on two processes: what each answers, and that it is the same on one."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import EXAMPLES, costs_of, graph_of

import planner.search
from planner import sides
from planner.decisions import Pins
from planner.objectives import run
from planner.options import TraceOptions
from planner.search import Searcher
from planner.twin import Pair
from planner.workload import Asked

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is forked")


class Adder:
    """Remembers what it was given, and answers with the sum and where it is."""

    def __init__(self) -> None:
        self.sum = 0

    def add(self, number: int) -> tuple[int, int]:
        self.sum += number
        return self.sum, os.getpid()

    def fail(self, number: int) -> int:
        if number > 1:
            raise ValueError(f"{number} of {self.sum}")
        return number

    def die(self, parent: int) -> str:
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return "here"


def test_each_of_two_learns_by_itself():
    with Pair(Adder(), Adder(), apart=True) as pair:
        (own, here), (other, there) = pair.both("add", [(1,), (10,)])
        assert (own, other) == (1, 10) and here == os.getpid() != there
        assert [a for a, _ in pair.both("add", [(2,), (20,)])] == [3, 30]
        assert [a for a, _ in pair.both("add", [(4,)])] == [7]
        assert pair.both("add", []) == []
    with pytest.raises(ProcessLookupError):
        os.kill(there, 0)


def test_in_one_process_the_answers_are_the_same():
    with Pair(Adder(), Adder(), apart=False) as pair:
        answers = pair.both("add", [(1,), (10,)]) + pair.both("add", [(2,), (20,)])
        assert answers == [(n, os.getpid()) for n in (1, 10, 3, 30)]


def test_a_fault_of_the_second_process_is_met_in_the_first():
    with Pair(Adder(), Adder(), apart=True) as pair, pytest.raises(ValueError, match="2 of 0"):
        pair.both("fail", [(1,), (2,)])


def test_what_a_process_that_was_killed_had_to_do_is_done_here():
    with Pair(Adder(), Adder(), apart=True) as pair:
        assert pair.both("die", [(os.getpid(),)] * 2) == ["here", "here"]
        assert [a for a, _ in pair.both("add", [(1,), (10,)])] == [1, 10]


def test_no_process_is_left_where_a_search_is_given_up():
    class Given(Exception):
        pass

    with pytest.raises(Given), Pair(Adder(), Adder(), apart=True) as pair:
        there = pair.both("add", [(1,), (2,)])[1][1]
        raise Given
    for _ in range(100):
        if not Path(f"/proc/{there}").exists():
            break
        time.sleep(0.01)
    with pytest.raises(ProcessLookupError):
        os.kill(there, 0)


@pytest.mark.parametrize("args, workload", [
    ((("size", "tiny"), ("n_layers", "8")), {"global_batch": 32, "seq_len": 512}),
    ((("size", "8b"), ("n_layers", "16")), {"global_batch": 32, "seq_len": 2048}),
])  # fmt: skip
def test_a_plan_is_the_same_on_one_process_and_on_two(args, workload, monkeypatch, tmp_path):
    started = []

    def pair(own, other, *, apart):
        started.append(apart)
        return Pair(own, other, apart=apart)

    monkeypatch.setattr(planner.search, "APART", 1)
    monkeypatch.setattr(planner.search, "Pair", pair)
    found = []
    for apart in (False, True):
        monkeypatch.setattr(planner.search, "forks", lambda apart=apart: apart)
        options = TraceOptions(model=f"{EXAMPLES}/llama.py", hardware="a100-40gbx16", args=args,
                               asked=Asked(**workload), pins=Pins(pp=8))  # fmt: skip
        run(options).plan.save(str(tmp_path / "plan.json"))
        found.append((tmp_path / "plan.json").read_bytes())
    assert found[0] == found[1] and {*started} == {False, True}


def test_two_sides_bound_half_each_as_one_does_all(monkeypatch):
    graph = graph_of("moe", n_layers=8)
    points = [(b, cp) for b in (1, 2, 4, 8) for cp in (1, 2, 4)]
    searcher = Searcher(costs=costs_of(graph, "a100-40gbx16", points, global_batch=32, seq_len=512))
    meshes = [m for m in searcher.meshes() if (m.micro_batch, m.cp) in points]
    monkeypatch.setattr(sides, "APART", len(meshes))
    halves = sides._halves(meshes)
    assert sorted([*halves[0], *halves[1]]) == [*range(len(meshes))] and len(meshes) > 100
    assert sides._halves(meshes) == halves and min(map(len, halves)) > 0.8 * max(map(len, halves))
    whole = searcher.bounds(meshes)
    for half in halves:
        found = replace(searcher, costs=replace(searcher.costs)).bounds([meshes[i] for i in half])
        assert found.lower_ps.tolist() == whole.lower_ps[half].tolist()
        assert found.guess_ps.tolist() == whole.guess_ps[half].tolist()
