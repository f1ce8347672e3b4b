"""What tests share: golden files, rewritten only by `pytest --update-golden`, and local ranks."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: a rank forked from threads hangs


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden/")


@pytest.fixture
def update_golden(request):
    """A function that compares a text with a golden file, or rewrites it under the flag."""

    def compare(path: Path, text: str) -> None:
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        assert text == path.read_text(), f"differs from {path.name}; see --update-golden"

    return compare


@pytest.fixture(scope="session")
def world():
    """Local gloo processes, kept warm for the session: `world.run(ranks, function, *args)`."""
    from planner.runtime.world import local_world

    with local_world(["ir.capture.hf"]) as found:
        yield found
