"""For the documentation site: docstrings as Markdown, read by griffe when mkdocs builds.

In the source a formula follows a line that ends in "::", and a section that Google's style does
not have ("Call `lstm(input)`:", "Returns (output, h_n):", "Parameters, layer k:") is a line with an
indented list of "name: text" below. Both are plain text there; here they become code and a list.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Docstring, Extension, Object

_KNOWN = re.compile(r"(Args|Attributes|Example|Examples|Raises|Returns|Warns|Yields):$")
_ENTRY = re.compile(r"([\w*][\w*, .{}]*?): (.*)$")


def markdown(text: str) -> str:
    """A docstring with its formulas and own sections in Markdown."""
    lines: list[str] = []
    section = False
    # "[, bias][, w_hr]" would be a link.
    for line in text.replace("][", "]\\[").splitlines():
        indented = line.startswith("    ")
        if not indented and line.strip():
            section = False
        if line.endswith("::"):
            lines.append(line[:-1])
        elif not indented and line.endswith(":") and not _KNOWN.match(line):
            lines += [line, ""]
            section = True
        elif section and indented:
            body = line[4:]
            found = _ENTRY.match(body)
            if found and not body.startswith(" "):
                lines.append(f"- `{found[1]}`: {found[2]}")
            else:
                lines.append(f"  {body.strip()}" if lines[-1:] != [""] else body.strip())
        else:
            lines.append(line)
    return "\n".join(lines)


class Docstrings(Extension):
    """Rewrites every docstring as it is loaded."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if isinstance(obj.docstring, Docstring):
            obj.docstring.value = markdown(obj.docstring.value)
