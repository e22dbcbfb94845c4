"""A hook of MkDocs: links that leave ``docs/`` work in the site as on the code host.

``../benchmarks/results/cpu.png`` on a page names a file of the repository. The file is brought into
the site under that path, and the link follows it. A Markdown file becomes a page, whose links to
``docs/`` are followed the other way. The README is what the landing page says at greater length,
so that a link to it leads there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)")
FROM_ROOT = re.compile(r"\]\(docs/([^)\s]+)")
LISTED = ["CHANGELOG.md", "CONTRIBUTING.md"]  # in the nav, whether or not a page links there


def on_files(files: Any, config: Any) -> Any:
    """Add what pages name outside of ``docs/``."""
    pages = [Path(f.abs_src_path).read_text() for f in files.documentation_pages()]
    named = {name for page in pages for name in OUTSIDE.findall(page)}
    for name in sorted({*named, *LISTED} - {"README.md"}):
        if (ROOT / name).is_file():  # else MkDocs says that the link leads nowhere
            files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links follow."""
    if page.file.src_uri in LISTED:
        return FROM_ROOT.sub(r"](\1", markdown)
    markdown = markdown.replace("](../README.md", "](index.md")
    return OUTSIDE.sub(r"](\1", markdown)
