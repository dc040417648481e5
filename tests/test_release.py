"""What is released: the wheel and the sdist, what they hold, and that the wheel alone is enough."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import mergesearch

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def project() -> dict[str, object]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_version_is_one(project: dict[str, str]) -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    first = re.search(r"^## (\S+)", changes, re.MULTILINE)
    assert first is not None
    assert {mergesearch.__version__, project["version"], str(citation["version"]), first[1]} == {project["version"]}


def test_the_citation_is_whole(project: dict[str, str]) -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "license", "version"} <= set(citation)
    assert citation["license"] == project["license"] and citation["title"].startswith(project["name"])
    assert citation["repository-code"] == project["urls"]["Repository"]  # type: ignore[index]


def test_every_extra_that_users_are_told_of_is_there(project: dict[str, dict[str, list[str]]]) -> None:
    told = set()
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "mergesearch").rglob("*.py")]:
        told |= set(re.findall(r"mergesearch\[(\w+)\]", page.read_text(encoding="utf-8")))
    assert told and told <= set(project["optional-dependencies"])


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built from a clean copy of what git knows."""
    pytest.importorskip("build", reason="pip install 'mergesearch[release]'")
    out, source = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("source")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(out), str(source)], check=True, capture_output=True)
    return out


@pytest.mark.slow
def test_wheel_and_sdist_are_whole_and_checked(built: Path) -> None:
    pytest.importorskip("twine", reason="pip install 'mergesearch[release]'")
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", wheel, sdist], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    inside = set(zipfile.ZipFile(wheel).namelist())
    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "mergesearch").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert package <= inside
    assert not [name for name in inside if name.split("/")[0] not in ("mergesearch",) and ".dist-info/" not in name]
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"pyproject.toml", "README.md", "LICENSE"} <= names and package <= names


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_wheel_alone_runs_the_quickstart(built: Path, tmp_path: Path) -> None:
    """In an environment that has nothing else, in a folder that is no clone. Fetches what the package needs."""
    (wheel,) = built.glob("*.whl")
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    there = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    constraints = ROOT / "constraints.txt"
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", constraints, wheel], check=True, env=there)
    (tmp_path / "quickstart.yaml").write_bytes((ROOT / "configs" / "quickstart.yaml").read_bytes())
    command = python.with_name("mergesearch")
    done = subprocess.run([command, "run", "quickstart.yaml"], cwd=tmp_path, env=there, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results" / "quickstart" / "best" / "model.safetensors").is_file()
