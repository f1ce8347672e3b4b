"""Text as a terminal may have it: what would steer it, or show letters in another order, is spelt.

Names in a plan, a model or a hardware file may be anybody's.
"""

from __future__ import annotations

import re
from typing import Any, TextIO

# Controls but tab and new line (C0, DEL, C1), and what overrides or isolates writing directions.
STEERING = "\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069"
_STEERING = re.compile(f"[{STEERING}]")


def plain(text: str) -> str:
    """`text` with such characters as their escapes: ESC is \\x1b. JSON never has the first 32 bare,
    and reads the others back from \\uXXXX."""
    return _STEERING.sub(_spelt, text)


def _spelt(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x20 else f"\\u{code:04x}"


class Plain:
    """A text stream that writes `plain` text, with escapes for what its encoding has not."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write it; how many characters were given."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(plain(text).encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
