"""A checkpoint's folder: written beside and renamed, so that a reader sees the old or the new."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ir.errors import PlanError

ABOUT = "meshwright.json"  # what the checkpoint is of; its presence says that the folder is one
GRAPH = "model.graph"
FORMAT = 1
SAVING, EARLIER = "saving", "earlier"


def beside(folder: Path, word: str) -> Path:
    return folder.with_name(f".{folder.name}.{word}")


def begin(folder: Path, mark: str) -> Path:
    """An empty folder to write to. Raises PlanError where there is anything but what it will
    replace: a folder in which there is a file `mark`."""
    settle(folder)
    if folder.exists() and not folder.is_dir():
        raise PlanError(f"{folder} is a file", hints=("name a folder",))
    if folder.is_dir() and any(folder.iterdir()) and not (folder / mark).exists():
        raise PlanError(
            f"{folder} holds other files, and no {mark}",
            why="the whole folder would be replaced", hints=("name another folder",),
        )  # fmt: skip
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = beside(folder, SAVING)
    shutil.rmtree(fresh, ignore_errors=True)  # of a job that was killed
    fresh.mkdir()
    return fresh


def write_about(folder: Path, about: Mapping[str, Any], graph: str) -> None:
    """Write what the checkpoint is of."""
    for name, text in ((GRAPH, graph), (ABOUT, json.dumps(about, indent=1) + "\n")):
        with open(folder / name, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def commit(fresh: Path, folder: Path) -> None:
    """Put the new checkpoint in the place of the old one."""
    _sync(fresh)
    earlier = beside(folder, EARLIER)
    shutil.rmtree(earlier, ignore_errors=True)
    if folder.exists():
        folder.rename(earlier)
    try:
        fresh.rename(folder)
    except OSError:
        settle(folder)
        raise
    _sync(folder.parent)
    shutil.rmtree(earlier, ignore_errors=True)


def abandon(fresh: Path) -> None:
    shutil.rmtree(fresh, ignore_errors=True)


def settle(folder: Path) -> None:
    """Undo half a replacement: its writer ended between the two renames."""
    earlier = beside(folder, EARLIER)
    if earlier.is_dir() and not folder.exists():
        earlier.rename(folder)


def opened(folder: Path) -> Path:
    """The folder to read: the earlier checkpoint where a replacement was left half done."""
    earlier = beside(folder, EARLIER)
    return earlier if not folder.exists() and earlier.is_dir() else folder


def read_about(folder: Path) -> tuple[dict[str, Any], str]:
    """(what the checkpoint is of, its graph's text). Raises PlanError for what is no checkpoint."""
    if not folder.is_dir():
        raise PlanError(f"there is no checkpoint at {folder}",
                        hints=("parallel.save(folder, optimizer) writes one",))  # fmt: skip
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        graph = (folder / GRAPH).read_text(encoding="utf-8")
    except OSError as fault:
        raise PlanError(
            f"{folder} is no checkpoint of ours", why=f"{ABOUT} or {GRAPH} is missing",
            hints=("parallel.load(path) reads safetensors files",),
        ) from fault  # fmt: skip
    except ValueError as fault:
        raise PlanError(f"{folder / ABOUT} cannot be read", why=str(fault)) from fault
    if about.get("format") != FORMAT:
        raise PlanError(f"{folder} is of format {about.get('format')}, this program's is {FORMAT}")
    return about, graph


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
