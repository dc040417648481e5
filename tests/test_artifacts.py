"""The files that trials leave, kept for hosts that share no run folder: in a folder, and in S3 by a local server."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from support.races import Live, settings, start
from support.searches import Engine

from mergesearch.errors import UserError
from mergesearch.evaluate.scores import load_documents
from mergesearch.results.loading import load_run
from mergesearch.search import artifacts
from mergesearch.search.artifacts import WAITS, Artifacts, Folder, store_of
from mergesearch.search.keeping import KEPT_EVERY, LearningFiles
from mergesearch.search.store import RunFolder
from mergesearch.search.trials import State


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket of a server of this process."""
    server_of = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    server = server_of.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    patch = pytest.MonkeyPatch()
    given = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "secret"}
    for name, value in {**given, "AWS_DEFAULT_REGION": "us-east-1"}.items():
        patch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="runs")
    store_of.cache_clear()
    yield "s3://runs/of/mine"
    store_of.cache_clear()
    patch.undo()
    server.stop()


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return request.getfixturevalue("bucket") if request.param == "s3" else str(tmp_path / "shared")


def test_what_is_put_is_got_and_what_is_not_there_is_not(place: str, tmp_path: Path) -> None:
    kept, other = Artifacts(store_of(place), "one"), Artifacts(store_of(place), "other")
    file, back = tmp_path / "file", tmp_path / "somewhere" / "back"
    for text in ("first", "second, longer"):
        file.write_text(text)
        kept.put("scores/00001.npz", file)
        assert kept.get("scores/00001.npz", back) and back.read_text() == text
    assert not kept.get("scores/00002.npz", tmp_path / "none") and not (tmp_path / "none").exists()
    assert not other.get("scores/00001.npz", tmp_path / "none")
    kept.remove("scores/00001.npz")
    kept.remove("scores/00001.npz")
    assert not kept.get("scores/00001.npz", back)


def test_hosts_that_share_no_folder_go_on_with_each_others_trials(place: str, tmp_path: Path) -> None:
    """Two run folders, one database between them: what one host scored, the other reads."""
    shared: dict[str, Any] = {
        "artifacts": place,
        "storage": f"sqlite:///{tmp_path / 'study.db'}",
        "name": f"run{len(place)}",
    }
    shared["racing"] = None
    live = Live(Engine())
    first = start(tmp_path / "a", live, search=SEARCH | {"trials": 2}, **shared)
    first.run()
    scored = {t.number for t in first.history().trials if t.state is State.COMPLETE and t.same_as is None}
    second = start(tmp_path / "b", search=SEARCH | {"trials": 4}, **shared)
    assert second.folder.scored == 0
    second.run()
    for number in scored:
        mine, theirs = (load_documents(folder.documents(number)) for folder in (first.folder, second.folder))
        assert np.array_equal(mine["quiz"].values, theirs["quiz"].values)
    # and back: the first host's table has margins and expectations of what the second one scored
    run = load_run(tmp_path / "a")
    late = [record for record in run.records if record.objective is not None and record.number not in scored]
    assert late and all(record.expected is not None for record in late)


SEARCH: dict[str, Any] = {"seed": 3, "strategy": "random", "defaults": False}


def test_a_raced_candidate_is_gone_on_with_block_by_block_elsewhere(tmp_path: Path) -> None:
    shared = {"artifacts": str(tmp_path / "kept"), "storage": f"sqlite:///{tmp_path / 'study.db'}"}
    live = Live(Engine())
    start(tmp_path / "a", live, search=SEARCH | {"trials": 1}, **shared).run()
    live.stop_at = len(live.asked) + 1  # after the first block of the next candidate
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "a", live, search=SEARCH | {"trials": 2}, **shared).run()
    recipe = live.asked[-1][0]
    first = {document for asked, document in live.asked if asked == recipe}
    (block,) = (tmp_path / "kept" / "test" / "scores" / "blocks" / recipe).iterdir()
    assert len(json.loads(block.read_text())) == len(first)
    other = Live(Engine())
    second = start(tmp_path / "b", other, search=SEARCH | {"trials": 2}, **shared)
    second.run()
    again = {document for asked, document in other.asked if asked == recipe}
    assert again and not again & first
    # whose scores are recorded needs no blocks any more; one that was stopped may be proposed again
    (trial,) = [trial for trial in second.history().trials if trial.recipe_id == recipe]
    assert block.exists() == (trial.state is State.PRUNED)


def test_how_far_a_soup_is_goes_from_host_to_host(tmp_path: Path) -> None:
    here, there = (RunFolder.prepare(settings(tmp_path / name, artifacts=str(tmp_path / "kept"))) for name in "ab")
    times = [0.0]
    mine = LearningFiles(here, 7, lambda: times[0])
    mine.path.parent.mkdir(parents=True)
    mine.path.write_text("step 1")
    mine.path.with_suffix(".fold0").write_text("fold, step 1")
    mine.keep()  # not at every step
    theirs = LearningFiles(there, 7)
    theirs.fetch()
    assert not theirs.path.exists()
    times[0] = KEPT_EVERY
    mine.keep()
    theirs.path.parent.mkdir(parents=True, exist_ok=True)
    theirs.path.write_text("step 0")  # of before it was taken away
    theirs.fetch()
    assert theirs.path.read_text() == "step 1" and theirs.path.with_suffix(".fold0").read_text() == "fold, step 1"
    mine.path.write_text("step 2")
    mine.keep(at_once=True)  # interrupted
    theirs.fetch()
    assert theirs.path.read_text() == "step 2"


class Failing:
    """A store that fails so often, and then works."""

    def __init__(self, times: int):
        self.times, self.kept = times, {}

    def _try(self) -> None:
        self.times -= 1
        if self.times >= 0:
            raise ConnectionError("the store is away")

    def open_reader(self, artifact_id: str) -> BinaryIO:
        self._try()
        return io.BytesIO(self.kept[artifact_id])

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        self._try()
        self.kept[artifact_id] = content_body.read()

    def remove(self, artifact_id: str) -> None:
        self._try()


def test_a_store_that_fails_is_asked_again_and_then_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    waited: list[float] = []
    store = Failing(len(WAITS))
    Artifacts(store, "run", waited.append).put("name", tmp_path / "file")
    assert waited == list(WAITS) and store.kept == {"run/name": b"text"}
    with pytest.raises(OSError, match="the store is away"):
        Artifacts(Failing(9), "run", waited.append).put("name", tmp_path / "file")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    class Cut(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(5, "cut")

    store = Folder(tmp_path)
    store.write("run/name", io.BytesIO(b"old"))
    with pytest.raises(OSError, match="cut"):
        store.write("run/name", Cut())
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["name"]
    assert store.open_reader("run/name").read() == b"old"


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("ftp://host/x", "s3://", "gs:///"):
        with pytest.raises(UserError, match="give s3://BUCKET/PREFIX"):
            settings(tmp_path, artifacts=wrong)
    monkeypatch.chdir(tmp_path)
    assert settings(tmp_path, artifacts="shared").artifacts == str(tmp_path / "shared")
    assert RunFolder.prepare(settings(tmp_path / "run")).artifacts is None
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"artifacts .*file does not answer \(Not a directory\)"):
        artifacts.check(str(tmp_path / "file"), "run")
    artifacts.check(str(tmp_path / "not yet"), "run")

    def missing(*_: Any) -> None:
        raise ImportError

    monkeypatch.setattr(artifacts, "GCSArtifactStore", missing)
    with pytest.raises(UserError, match=r"pip install 'mergesearch\[gcs\]'"):
        store_of("gs://bucket/that-nobody-has")
