#!/usr/bin/env python
"""Write README.md from nbs/index.ipynb: prose, code in fences, text outputs. `nbdev_readme` does the same, but needs Quarto.

    python .ci/readme.py            # write README.md
    python .ci/readme.py --check    # fail if README.md is not what would be written
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTICE = "<!-- Generated from nbs/index.ipynb by .ci/readme.py: edit the notebook. -->"
HIDDEN = re.compile(r"^#\|\s*(?:hide|default_exp|export|include:\s*false)\b", re.MULTILINE)
LINK = re.compile(r"(\]\()(?![a-z]+:|#|/)([^)\s]+)")


def from_root(markdown: str) -> str:
    """Markdown of nbs/ whose relative links are rewritten to start at the root of the repository."""
    return LINK.sub(lambda m: m[1] + (m[2][3:] if m[2].startswith("../") else "nbs/" + m[2]), markdown)


def output_text(output: dict) -> str:
    """One output as Markdown; empty for pictures and widgets, which GitHub does not show inline."""
    data = output.get("data", {})
    if "text/markdown" in data:
        return from_root("".join(data["text/markdown"]))
    if any(not kind.startswith("text/plain") for kind in data):
        return ""
    text = "".join(output.get("text", data.get("text/plain", []))).rstrip()
    return f"```text\n{text}\n```" if text and output.get("name") != "stderr" else ""


def cell_text(cell: dict) -> list[str]:
    """One cell as blocks of Markdown: none if it is hidden, only the outputs if it says `echo: false`."""
    source = "".join(cell["source"]).strip()
    if cell["cell_type"] == "markdown":
        return [from_root(source)]
    if cell["cell_type"] != "code" or HIDDEN.search(source):
        return []
    echo = not re.search(r"^#\|\s*echo:\s*false", source, re.MULTILINE)
    code = re.sub(r"^#\|.*\n?", "", source, flags=re.MULTILINE).strip()
    blocks = [f"```python\n{code}\n```"] if code and echo else []
    return blocks + [output_text(output) for output in cell.get("outputs", [])]


def render(notebook: Path) -> str:
    """The text of README.md."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    blocks = [NOTICE] + [block for cell in cells for block in cell_text(cell)]
    return "\n\n".join(filter(None, blocks)) + "\n"


if __name__ == "__main__":
    text, readme = render(ROOT / "nbs/index.ipynb"), ROOT / "README.md"
    if "--check" not in sys.argv:
        readme.write_text(text, encoding="utf-8")
    elif readme.read_text(encoding="utf-8") != text:
        sys.exit("README.md is not what nbs/index.ipynb gives: run `python .ci/readme.py`")
