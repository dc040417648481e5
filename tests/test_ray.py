"""Workers on a Ray cluster: placed, told of, kept there when a node is gone, ended in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.chaos import check
from support.commands import mergesearch
from support.searches import settings

from mergesearch.commands import on_ray
from mergesearch.commands.on_ray import Places, order_for, places_in
from mergesearch.config.storage import PASSWORD
from mergesearch.errors import UserError

CPU, TWO, FOUR = {"CPU": 8.0}, {"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 4.0}


def test_one_for_each_gpu_of_the_cluster() -> None:
    assert places_in([CPU, TWO, FOUR], "auto", "auto") == Places(6, 1)
    assert places_in([CPU, TWO, FOUR], "3", "auto") == Places(3, 2)
    assert places_in([TWO, TWO, TWO], "2", "auto") == Places(2, 2)  # of three GPUs each no node has enough
    assert places_in([CPU, CPU], "auto", "auto") == Places(2, 0) == places_in([TWO, FOUR], "auto", "cpu")
    assert places_in([CPU], "5", "cpu") == Places(5, 0)
    with pytest.raises(UserError, match="6 GPUs"):
        places_in([TWO, FOUR], "7", "auto")
    with pytest.raises(UserError, match="2 CPUs"):
        places_in([{"CPU": 2.0}], "3", "cpu")
    with pytest.raises(UserError, match="without GPUs"):
        places_in([CPU], "auto", "cuda")


def test_what_a_worker_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHO", "me")
    config = settings(tmp_path / "run", storage="postgresql://${WHO}:pass@host/runs")
    order = order_for(config, Places(2, 2), allow_changed=True)
    assert order.environment == {"WHO": "me", PASSWORD: "pass"} and "pass@" not in order.config
    assert "pass" not in repr(order).replace("passwo", "")
    asked = settings(tmp_path / "run", storage="postgresql://host/runs?user=me&password=secret")
    assert order_for(asked, Places(2, 0), False).environment == {PASSWORD: "secret"}
    monkeypatch.chdir(tmp_path)
    here = order_for(settings(Path("here")), Places(2, 0), False)
    assert here.folder == tmp_path / "here" and f"output: {tmp_path / 'here'}" in here.config
    assert (order.device, order.allow_changed) == ("auto", True)
    assert [order_for(config, Places(2, gpus), False).device for gpus in (0, 1)] == ["auto", "cuda"]


def test_one_file_is_not_for_several_hosts(tmp_path: Path) -> None:
    there = settings(tmp_path / "run")
    on_ray._check_storage(there, {"one"})
    on_ray._check_storage(settings(tmp_path / "run", storage="postgresql://me@host/runs"), {"one", "two"})
    for storage in (None, "sqlite:////shared/study.db"):
        with pytest.raises(UserError, match=r"2 hosts.*set storage to a database that all reach"):
            on_ray._check_storage(settings(tmp_path / "run", storage=storage), {"one", "two"})


# --- a cluster of several nodes on this host ------------------------------------------------------------------------

# a node that is gone is noticed within two seconds, not half a minute
SOON = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
SMALL = {"object_store_memory": 100 * 2**20, "include_dashboard": False}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster whose head has no place for a worker; the tests add nodes that have."""
    pytest.importorskip("ray", reason="ray is not installed: pip install 'mergesearch[ray]'")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patched.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        patched.chdir(Path(__file__).parent)
        there = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": SOON, **SMALL})
        yield there
        there.shutdown()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers without models, that note what they do."""
    made = on_ray.order_for
    monkeypatch.setattr(on_ray, "order_for", lambda *given: replace(made(*given), module="support.chaos"))


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("trials", [30, pytest.param(200, marks=pytest.mark.chaos)])
def test_a_node_that_is_gone_loses_nothing(tmp_path: Path, cluster: Any, stand_in: None, trials: int) -> None:
    config = settings(tmp_path / "run", search={"trials": trials}, storage=f"sqlite:///{tmp_path}/study.db")
    stays, goes = (cluster.add_node(num_cpus=3, **SMALL) for _ in range(2))
    cluster.wait_for_nodes()
    said: list[str] = []
    log = tmp_path / "log"

    def kill() -> None:
        while not log.is_file() or len(log.read_text().splitlines()) < trials // 4:
            time.sleep(0.05)
        cluster.remove_node(goes, allow_graceful=False)
        said.append("a node is gone")

    killing = threading.Thread(target=kill, daemon=True)
    killing.start()
    on_ray.run(cluster.address, "3", config, said.append)
    killing.join()
    cluster.remove_node(stays)
    assert "3 workers on 3 nodes of Ray" in said
    begun = [n for n, line in enumerate(said) if line.endswith(": begins")]
    assert len(begun) > 3 and begun[-1] > said.index("a node is gone")  # elsewhere
    check(tmp_path / "run", log, trials, config.storage)


@pytest.mark.slow
def test_an_interruption_leaves_no_process(tmp_path: Path, cluster: Any, stand_in: None) -> None:
    config = settings(tmp_path / "run", search={"trials": 10_000}, storage=f"sqlite:///{tmp_path}/study.db")
    node = cluster.add_node(num_cpus=2, **SMALL)
    cluster.wait_for_nodes()
    log = tmp_path / "log"

    def interrupt() -> None:
        while not log.is_file() or len(log.read_text().splitlines()) < 8:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        on_ray.run(cluster.address, "2", config, print)
    there = subprocess.run(["pgrep", "-f", "support.chaos"], capture_output=True, text=True).stdout.split()
    cluster.remove_node(node)
    assert there == []


@pytest.mark.slow
def test_wrong_input_is_one_sentence(tmp_path: Path, cluster: Any) -> None:
    config = settings(tmp_path / "run", base_model=str(tmp_path / "nowhere"))
    node = cluster.add_node(num_cpus=1, **SMALL)
    cluster.wait_for_nodes()
    with pytest.raises(UserError, match="nowhere") as caught:
        on_ray.run(cluster.address, "auto", config, print)
    cluster.remove_node(node)
    assert "\n" not in str(caught.value)


def test_the_command_says_it_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "search.yaml"
    file.write_text(settings(tmp_path / "run").to_yaml())
    given: list[Any] = []

    def run(*arguments: Any) -> None:
        given.extend(arguments[:2])
        raise UserError("no cluster")

    monkeypatch.setattr(on_ray, "run", run)
    done = mergesearch("run", file, "--ray", "auto", "--workers", "3")
    assert (done.status, given) == (2, ["auto", "3"]) and done.err.strip().endswith("error: no cluster")
    assert not (tmp_path / "run").exists()


def test_where_no_cluster_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="ray is not installed: pip install 'mergesearch[ray]'")
    with pytest.raises(
        UserError, match=r"--ray 127.0.0.1:1: no Ray cluster can be reached \(.*start one with `ray start --head`"
    ):
        on_ray.run("127.0.0.1:1", "auto", settings(tmp_path / "run"), print)
    with pytest.raises(UserError, match=r"--ray 'here': give auto, HOST:PORT or ray://HOST:PORT"):
        on_ray.run("here", "auto", settings(tmp_path / "run"), print)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'mergesearch\[ray\]'"):
        on_ray.run("auto", "auto", settings(tmp_path / "run"), print)
