"""Which mesh is tried next, on meshes whose steps are known."""

from types import SimpleNamespace

from planner.turns import in_turn


def tried(guess, lower, kinds, steps, effort=1_000, sharpen=lambda rest: None):
    """The order in which meshes of these steps are tried, two at once, each at an effort of one."""
    out, order = SimpleNamespace(best=None, spent=0), []
    for some in in_turn(guess, lower, kinds, out, effort, sharpen):
        assert 1 <= len(some) <= 2
        order += some
        out.spent += len(some)
        for i in some:
            if out.best is None or steps[i] < out.best.score:
                out.best = SimpleNamespace(score=steps[i])
    return order


def test_a_kind_that_keeps_less_than_it_promises_waits():
    """Guesses of kind a are half of what its meshes come to: after one of them, b is looked at."""
    guess, kinds = [10, 11, 12, 13, 15], ["a", "a", "a", "a", "b"]
    assert tried(guess, [1] * 5, kinds, [20, 22, 24, 26, 16])[:2] == [0, 4]
    assert tried(guess, [1] * 5, ["a"] * 5, [20, 22, 24, 26, 16]) == [0, 1, 2, 3, 4]


def test_what_promises_as_much_as_the_best_is_tried_two_at_once():
    """A first plan is waited for, and so is one far better than the best; then two at once."""
    out, seen = SimpleNamespace(best=None, spent=0), []
    for some in in_turn([10, 11, 12, 13], [1] * 4, "aaaa", out, 99, lambda rest: None):
        seen.append(some)
        out.best = SimpleNamespace(score=20 if len(seen) == 1 else 11)
    assert seen == [(0,), (1,), (2, 3)]


def test_what_promises_a_little_more_than_the_best_is_waited_for():
    """It cuts others short, which take many times as long against the best before."""
    out, seen = SimpleNamespace(best=SimpleNamespace(score=104), spent=0), []
    for some in in_turn([100, 101, 102], [1] * 3, "aaa", out, 99, lambda rest: None):
        seen.append(some)
        out.best = SimpleNamespace(score=101)
    assert seen == [(0,), (1, 2)]


def test_every_mesh_that_may_be_better_is_tried_once():
    guess, lower = [4, 3, 9, 7, 8], [4, 3, 2, 6, 1]
    assert sorted(tried(guess, lower, "abcab", [9, 5, 8, 8, 5])) == [0, 1, 2, 4]  # 3: 6 > 5


def test_what_holds_the_bound_down_comes_once_so_much_effort_is_spent():
    guess, lower = [1, 2, 3, 4, 5], [1, 2, 3, 2, 1]
    assert tried(guess, lower, "aaaaa", [10] * 5, effort=2) == [0, 1, 4, 3, 2]


def test_bounds_are_sharpened_before_the_least_comes_first():
    guess, lower = [1, 2, 3, 4, 5], [1, 2, 3, 2, 1]

    def sharpen(rest):
        assert sorted(rest) == [2, 3, 4]
        lower[4], lower[3] = 9, 4

    assert tried(guess, lower, "aaaaa", [10] * 5, effort=2, sharpen=sharpen) == [0, 1, 2, 3, 4]
