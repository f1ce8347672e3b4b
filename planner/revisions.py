"""A file as a revision of the repository has it, and what was meant where it has none."""

from __future__ import annotations

import subprocess
from difflib import get_close_matches
from pathlib import PurePosixPath

from ir.errors import PlanError

MOST_NAMES = 2000  # compared with a name that is not there


def read_revision(source: str) -> str:
    """The text of `REV:path`, as git knows it. Raises PlanError naming what there is instead."""
    done = _git("cat-file", "--end-of-options", "blob", source)
    if done.returncode == 0:
        return done.stdout
    rev, _, path = source.partition(":")
    reason = (done.stderr.strip().splitlines() or ["git said nothing"])[0]
    if _git("rev-parse", "--git-dir").returncode:
        raise PlanError(f"cannot read {source}", why="no such file, and no repository here")
    if rev and _git("cat-file", "-e", "--end-of-options", f"{rev}^{{commit}}").returncode:
        raise PlanError(f"cannot read {source}", why=f"{rev!r} is no revision of this repository",
                        hints=_near_revisions(rev, path))  # fmt: skip
    raise PlanError(f"cannot read {source}", why=reason, hints=_near_paths(rev, path))


def _near_revisions(rev: str, path: str) -> tuple[str, ...]:
    """Branches, remote branches and tags with a name like that."""
    found = _git("for-each-ref", "--format=%(refname:short)").stdout.splitlines()
    shorts = [ref for ref in found if ref.rpartition("/")[2] == rev]
    near = shorts or get_close_matches(rev, found[:MOST_NAMES], n=3)
    if not near:
        return ("git fetch, where it is of another clone",)
    return tuple(f"did you mean {ref}:{path}?" for ref in near[:3])


def _near_paths(rev: str, path: str) -> tuple[str, ...]:
    """Files of the revision with the name, else with one like it: paths are from the repository's
    root unless they begin with ./"""
    if rev:
        listed = _git("ls-tree", "-r", "--full-tree", "--name-only", "-z", "--end-of-options", rev)
    else:  # the index
        listed = _git("ls-files", "--full-name", "-z", ":/")
    names = listed.stdout.split("\0")[:-1]
    wanted = PurePosixPath(path)
    near = [name for name in names if PurePosixPath(name).name == wanted.name]
    if not near:
        like = [name for name in names if PurePosixPath(name).suffix == wanted.suffix]
        near = get_close_matches(path, like[:MOST_NAMES], n=3)
    if not near:
        where = f"{rev} is there, and" if rev else "the index"
        return (f"{where} has no {wanted.name}; paths are from the repository's root",)
    return tuple(f"did you mean {rev}:{name}?" for name in near[:3])


def _git(*words: str) -> subprocess.CompletedProcess[str]:
    """Raises PlanError where there is no git."""
    try:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=False,
                              errors="replace")  # fmt: skip
    except OSError as fault:
        raise PlanError("cannot read a revision", why="git is not installed") from fault
