"""Golden files: compared, and rewritten only by `pytest --update-golden`."""

from pathlib import Path

import pytest


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
