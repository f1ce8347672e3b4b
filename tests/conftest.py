"""What tests share: golden files, rewritten only by `pytest --update-golden`, and local ranks."""

import gc
import os
import signal
import tempfile
from functools import partial
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: a rank forked from threads hangs


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden/")


def pytest_configure(config):
    """A cache of traced graphs of the session's own, which its workers and commands inherit."""
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(prefix="meshwright-tests-")
        os.environ["XDG_CACHE_HOME"] = folder.name
        config.add_cleanup(folder.cleanup)


def pytest_collection_finish():
    """Modules and tests are there to stay: the collector of cycles need not look through them, and
    a tenth of capturing's time was its looking."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


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
def local_ranks():
    """Local gloo processes, forked from one that has imported what they need."""
    from multiprocessing import forkserver

    from planner.runtime.world import PRELOAD_COMPILED, PRELOAD_HF, local_world

    shared = "tests.shared_shardings"  # beside the working directory, where pytest is started
    with local_world((*PRELOAD_HF, *PRELOAD_COMPILED, shared)) as found:
        forkserver.ensure_running()  # a process has one: that of a later `plan verify` is this
        yield found


@pytest.fixture(scope="module")
def world(local_ranks):
    """The same, warm for a file's tests: `world.run(ranks, function, *args)`."""
    yield local_ranks
    local_ranks.close()  # idle ranks hold memory, as many as the file's largest mesh had


@pytest.fixture(scope="session")
def shared_shardings():
    """What DTensor finds of placements is found once, in this process as on the local ranks."""
    import shared_shardings  # noqa: F401


@pytest.fixture
def no_baselines(monkeypatch):
    """Plans without the recipes that they are compared with: a third of planning what is pinned,
    where no recipe is a plan to start from."""
    monkeypatch.setattr("planner.tracing._baselines", lambda *_: ([], False))


@pytest.fixture(scope="session")
def cache():
    """The folder of traced graphs that all of the session's processes share."""
    return os.environ["XDG_CACHE_HOME"]


@pytest.fixture(scope="session")
def heeds_interrupts():
    """For a child before it runs (`preexec_fn`): a suite that was started in the background hands
    on that SIGINT is ignored."""
    return partial(signal.signal, signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def plan(monkeypatch, capsys, tmp_path, cache):
    """Run a command in this process, in an empty folder."""
    from planner import cli, console

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", cache)

    def run(*arguments):
        code = console.run(cli.app(), [str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
