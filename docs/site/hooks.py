"""What MkDocs asks while it builds the site: pages made of the code, and links out of `docs/`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from mkdocs.structure.files import File, Files
from reference import pages

OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./((?!schemas)[^)]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the reference."""
    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A link to a file of the repository becomes the file's name: the site has docs/ alone."""
    root = Path(page.file.abs_src_path).parent if page.file.abs_src_path else None
    if root is None:
        return markdown

    def told(found: re.Match[str]) -> str:
        if not (root / ".." / found[2].partition("#")[0]).exists():
            raise ValueError(f"{page.file.src_uri}: no file {found[2]}")
        return f"`{found[2]}`" if found[1].strip("`") in found[2] else f"{found[1]} (`{found[2]}`)"

    return OUTSIDE.sub(told, markdown)
