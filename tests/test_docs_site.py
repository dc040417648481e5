"""The documentation as a site: it builds without a warning, nothing leads nowhere, and all of it is in its menu."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import mergesearch
from scripts.site import leading_out
from scripts.site_examples import fenced

ROOT = Path(__file__).parent.parent
REPOSITORY = "https://example.org/house"


def build(config: Path, out: Path) -> None:
    """Builds a site, strictly."""
    from mkdocs.commands import build
    from mkdocs.config import load_config

    loaded = load_config(str(config), site_dir=str(out), strict=True)
    loaded.plugins.on_startup(command="build", dirty=False)
    try:
        build.build(loaded)
    finally:
        loaded.plugins.on_shutdown()


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """mkdocs is needed; its theme says something about another version of it, which is no warning of ours."""
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    for name in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(name, reason="pip install 'mergesearch[docs]'")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    build(ROOT / "mkdocs.yml", out)
    return out


def test_every_page_is_built_and_asks_nothing_of_elsewhere(site: Path) -> None:
    pages = {file.stem for file in (ROOT / "docs").glob("*.md")} - {"README"}
    assert pages <= {file.name for file in site.iterdir()}
    index = (site / "index.html").read_text(encoding="utf-8")
    assert re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?://[^"]+"', index) == []


def test_the_python_reference_has_every_public_name(site: Path) -> None:
    text = (site / "api" / "index.html").read_text(encoding="utf-8")
    for name in set(mergesearch.__all__) - {"__version__"}:
        assert re.search(rf'id="mergesearch\.[\w.]+\.{name}"|id="mergesearch\.{name}"', text), name


def test_links_out_of_the_pages_lead_to_the_repository(site: Path) -> None:
    assert leading_out("[a](../results/engine.md#x)", REPOSITORY) == f"[a]({REPOSITORY}/blob/main/results/engine.md#x)"
    assert leading_out("[a](../configs)", REPOSITORY) == f"[a]({REPOSITORY}/tree/main/configs)"
    assert leading_out("[a](../gone.md)", REPOSITORY) == "[a](../gone.md)"
    assert "/blob/main/ARCHITECTURE.md" in (site / "how" / "index.html").read_text(encoding="utf-8")


def test_examples_of_docstrings_are_code() -> None:
    text = "What it does.\n\n>>> f(1)\n2\n>>> g[0][1]\n3\n\nArgs:\n    x: a number"
    assert fenced(text) == ("What it does.\n\n```pycon\n>>> f(1)\n2\n>>> g[0][1]\n3\n```\n\nArgs:\n    x: a number")


def test_a_link_that_leads_nowhere_fails_the_build(tmp_path: Path) -> None:
    from mkdocs.exceptions import Abort

    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[gone](gone.md)\n", encoding="utf-8")
    config = tmp_path / "mkdocs.yml"
    config.write_text("site_name: small\nvalidation: {links: {not_found: warn}}\n", encoding="utf-8")
    with pytest.raises(Abort):
        build(config, tmp_path / "site")
