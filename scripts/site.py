"""What mkdocs asks while it builds the site (mkdocs.yml names this file): links out of docs/ lead to the repository.

On a disk and where the repository is read, `../results/engine.md` is a file beside docs/. The site has none.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
_LEAVING = re.compile(r"\]\((\.\./[^)\s#]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, config: Any, **_: Any) -> str:
    """A page's text with links to files of the repository in the place of those that leave docs/."""
    return leading_out(markdown, config["repo_url"])


def leading_out(markdown: str, repository: str) -> str:
    """`markdown` with each link out of docs/ as one to the repository; what is not there stays, and mkdocs names it."""

    def there(found: re.Match[str]) -> str:
        file = (ROOT / "docs" / found[1]).resolve()
        if not file.exists() or not file.is_relative_to(ROOT):
            return found[0]
        kind = "tree" if file.is_dir() else "blob"
        return f"]({repository}/{kind}/main/{file.relative_to(ROOT)}{found[2] or ''})"

    return _LEAVING.sub(there, markdown)
