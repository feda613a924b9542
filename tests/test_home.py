"""Sweeps brought home from a server: all of it, once, and nothing that could do harm."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import urlopen

import pytest
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, FileInfo, InputTag, Metric, Run
from mlflow.exceptions import MlflowException
from servers import free_port
from test_sweep import finish, start, write_yaml
from test_tracking_server import SECRET, head

from brstnet.data.store import Store
from clusters import artifacts, home
from dashboards.leaderboard import leaderboard_info
from sweeps import tracking

pytestmark = pytest.mark.slow  # all of it, together

ROOT = Path(__file__).parents[1]
LOSSES = [(0, 3.0), (1, 2.5), (2, float("nan")), (1, 2.5), (2, 1.0)]
"""Of a fold that was resumed: steps come twice."""


class Bomb:
    """Unpickled, it leaves a trace."""

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.mkdir, ("exploded",)


def make_sweep(out: Path, name: str = "s", trials: int = 2) -> MlflowClient:
    """A sweep on a head, in a database of its own: its runs, its folder, a champion."""
    out.mkdir(exist_ok=True)
    uri = tracking.local_uri(out)
    client = tracking.connect(uri)
    experiment = tracking.experiment(client, out, uri)
    tracking.share_view(client, experiment, name, ["genes"])
    folder = out / name
    folder.mkdir()
    (folder / tracking.ID_FILE).write_text(f"id-{name}")
    tags = {"brstnet.sweep": name, "brstnet.protocol": "{}", "brstnet.protocol_line": "2 folds"}
    key = {"brstnet.key": f"id-{name}/sweep"}
    top = tracking.start_run(client, experiment, "sweep", name, {**tags, **key})
    tracking.write_runs(folder, {"sweep": top})
    for number in range(trials):
        own = {**tags, "brstnet.trial": str(number), "brstnet.state": "COMPLETE"}
        trial = tracking.start_run(client, experiment, "trial", f"trial {number}", own, top)
        tracking.log(client, trial, {"score": 0.1 * number}, step=1, params={"genes": 60 + number})
        fold = tracking.start_run(client, experiment, "fold", "fold 0", tags, trial)
        numbers = [Metric("loss", v, 1000 + n, step) for n, (step, v) in enumerate(LOSSES)]
        client.log_batch(fold, numbers)
        store = Dataset(name="store", digest="d1", source_type="brstnet-store", source="{}")
        context = [InputTag("mlflow.data.context", "2 folds")]
        client.log_inputs(fold, datasets=[DatasetInput(dataset=store, tags=context)])
        report = out / "report"
        (report / "more").mkdir(parents=True, exist_ok=True)
        (report / "genes.csv").write_text(f"gene,{number}")
        (report / "more" / "odd.pkl").write_bytes(pickle.dumps(Bomb()))
        client.log_artifacts(fold, str(report))
        client.set_terminated(fold, end_time=5000)
        client.set_terminated(trial, "FINISHED" if number else "FAILED", end_time=6000)
        (folder / "trials" / f"{number:04}").mkdir(parents=True)
        tracking.write_runs(folder / "trials" / f"{number:04}", {"trial": trial, "fold_0": fold})
    champion = out / "made" / "fold_0"
    champion.mkdir(parents=True, exist_ok=True)
    (champion / "checkpoint.json").write_text(f'"{name}"')
    (champion / "model.safetensors").write_bytes(b"weights")
    facts = {"brstnet.sweep": name, "score": 0.1}
    version = tracking.register(client, trial, champion.parent, facts)
    client.update_model_version(tracking.MODEL, version, "by the rule")
    tracking.log(client, top, tags={"brstnet.champion": trial})
    tracking.write_json(folder / "champion.json", {"trial": 1, "run": trial, "rule": "best"})
    client.set_terminated(top, end_time=7000)
    return client


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, which take seconds to make."""
    folder = tmp_path_factory.mktemp("empty")
    tracking.connect(tracking.local_uri(folder)).search_experiments()
    return folder / tracking.LOCAL_FILE


def with_tables(folder: Path, empty: Path) -> Path:
    folder.mkdir()
    shutil.copyfile(empty, folder / tracking.LOCAL_FILE)
    return folder


@pytest.fixture
def far(tmp_path: Path, empty: Path) -> Path:
    return with_tables(tmp_path / "head", empty)


@pytest.fixture
def near(tmp_path: Path, empty: Path) -> Path:
    return with_tables(tmp_path / "home", empty)


def bring(far: Path, near: Path, sweep: str | None = "s") -> home.Brought:
    """Folders and runs, as the command does it."""
    uri = tracking.local_uri(far)
    for name in home.check(uri, near, sweep):
        shutil.copytree(far / name, near / name, dirs_exist_ok=True, symlinks=True)
    return home.bring(uri, near, sweep)


def client_at(folder: Path) -> MlflowClient:
    return tracking.connect(tracking.local_uri(folder))


def runs_at(folder: Path) -> list[Run]:
    client = client_at(folder)
    return home._all_runs(client, client.get_experiment_by_name("brstnet").experiment_id)


def told(client: MlflowClient, run: Run, names: dict[str, str]) -> dict[str, Any]:
    """All that a run says; ids of other runs by name."""
    histories = {
        key: sorted((m.step, m.timestamp, repr(m.value)) for m in found)
        for key in run.data.metrics
        if (found := client.get_metric_history(run.info.run_id, key))
    }
    place = Path(run.info.artifact_uri.removeprefix("file://"))
    files = {str(f.relative_to(place)): f.read_bytes() for f in place.rglob("*") if f.is_file()}
    inputs = [(i.dataset.to_dictionary(), [t.value for t in i.tags]) for i in home._datasets(run)]
    tags = {key: names.get(value, value) for key, value in run.data.tags.items()}
    own = {key: value for key, value in tags.items() if not key.startswith("brstnet.home.")}
    info = (run.info.status, run.info.start_time, run.info.end_time, run.info.run_name)
    said = {"info": info, "params": run.data.params, "tags": own}
    return {**said, "numbers": histories, "files": files, "inputs": inputs}


def all_told(folder: Path, runs: list[Run], *, home_ids: bool) -> dict[str, dict[str, Any]]:
    client, ids = client_at(folder), {run.info.run_id: run.info.run_id for run in runs}
    if home_ids:
        ids = {run.info.run_id: run.data.tags[home.SOURCE] for run in runs}
    return {ids[run.info.run_id]: told(client, run, ids) for run in runs}


def check_same(far: Path, near: Path) -> None:
    there = all_told(far, runs_at(far), home_ids=False)
    assert all_told(near, runs_at(near), home_ids=True) == there


def test_everything_comes_home(far: Path, near: Path) -> None:
    make_sweep(far)
    brought = bring(far, near)
    assert (brought.new, brought.changed, brought.unchanged) == (5, 0, 0)
    check_same(far, near)
    assert len({run.info.run_id for run in [*runs_at(near), *runs_at(far)]}) == 10
    client = client_at(near)
    version = tracking.find_version(client, "models:/brstnet@champion")
    assert str(version.version) == brought.champion
    assert (version.tags["score"], version.description) == ("0.1", "by the rule")
    place = Path(version.source.removeprefix("file://"))
    assert place.is_relative_to(near / "artifacts")
    assert (place / "fold_0" / "model.safetensors").read_bytes() == b"weights"
    ids = {run.info.run_id for run in runs_at(near)}
    for folder in (near / "s", *(near / "s" / "trials").iterdir()):
        assert set(tracking.read_runs(folder).values()) <= ids
    assert json.loads((near / "s" / "champion.json").read_text())["run"] == version.run_id
    info = leaderboard_info(client, "s")
    assert info.facts["champion"]["score"] == pytest.approx(0.1)
    assert "mlflow.sharedViewState.s" in client.get_experiment_by_name("brstnet").tags
    assert not Path("exploded").exists()


def test_what_is_home_stays_and_what_is_new_comes(far: Path, near: Path) -> None:
    client = make_sweep(far)
    bring(far, near)
    ids = {run.data.tags[home.SOURCE]: run.info.run_id for run in runs_at(near)}
    again = bring(far, near)
    assert (again.new, again.changed, again.unchanged) == (0, 0, 5)
    sweep = tracking.read_runs(far / "s")["sweep"]
    trial = tracking.read_runs(far / "s" / "trials" / "0000")["trial"]
    tracking.log(client, trial, {"score": 0.7}, step=2, tags={"brstnet.reason": "resumed"})
    (far / "late.txt").write_text("late")
    client.log_artifact(sweep, str(far / "late.txt"))
    experiment = client.get_experiment_by_name("brstnet").experiment_id
    judged = {"brstnet.sweep": "s", "brstnet.patients": "B", "brstnet.protocol_line": "judged"}
    tracking.start_run(client, experiment, "evaluation", "evaluation", judged, trial)
    more = bring(far, near)
    assert (more.new, more.changed, more.unchanged) == (1, 2, 3)
    check_same(far, near)
    now = {run.data.tags[home.SOURCE]: run.info.run_id for run in runs_at(near)}
    assert {there: now[there] for there in ids} == ids


def test_another_champion_of_the_same_run_comes_too(far: Path, near: Path) -> None:
    client = make_sweep(far)
    bring(far, near)
    old = tracking.find_version(client, "models:/brstnet@champion")
    (far / "made" / "fold_0" / "checkpoint.json").write_text('"t"')  # as many bytes
    tracking.register(client, old.run_id, far / "made", {"score": 0.2})
    assert bring(far, near).changed == 1
    version = tracking.find_version(client_at(near), "models:/brstnet@champion")
    assert version.tags["score"] == "0.2"
    place = Path(version.source.removeprefix("file://"))
    assert (place / "fold_0" / "checkpoint.json").read_text() == '"t"'
    assert bring(far, near).champion == str(version.version)


def test_a_sweep_of_several_and_the_champion_of_another(far: Path, near: Path) -> None:
    make_sweep(far, "one")
    make_sweep(far, "two")
    brought = bring(far, near, "one")
    assert (brought.sweeps, brought.champion) == (["one"], None)  # it is of the sweep two
    assert {run.data.tags["brstnet.sweep"] for run in runs_at(near)} == {"one"}
    both = bring(far, near, None)
    assert (both.sweeps, both.new, both.unchanged) == (["one", "two"], 5, 5)
    check_same(far, near)
    with pytest.raises(ValueError, match="there is one, two"):
        home.check(tracking.local_uri(far), near, "three")


def test_killed_in_the_middle_nothing_is_taken_for_done(
    far: Path, near: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_sweep(far)
    whole, filled = home._fill, []

    def dies(here: Any, run: Run, numbers: Any) -> None:
        if len(filled) == 2:
            here.client.log_batch(here.id_of(run.info.run_id), numbers[:1])
            raise KeyboardInterrupt
        filled.append(run)
        whole(here, run, numbers)

    monkeypatch.setattr(home, "_fill", dies)
    with pytest.raises(KeyboardInterrupt):
        bring(far, near)
    monkeypatch.undo()
    assert not list(near.glob("home-*"))
    again = bring(far, near)
    assert (again.new, again.changed, again.unchanged) == (0, 3, 2)
    check_same(far, near)


def test_a_sweep_of_ones_own_is_left_alone(far: Path, near: Path) -> None:
    make_sweep(far)
    make_sweep(near, "mine")
    mine = [run.info.run_id for run in runs_at(near)]
    bring(far, near)
    assert {run.info.run_id for run in runs_at(near)} > set(mine)
    (near / "s" / tracking.ID_FILE).write_text("another")
    with pytest.raises(ValueError, match="another sweep that has this name"):
        home.check(tracking.local_uri(far), near, "s")


# What a server must not do -----------------------------------------------------------------------


def lies_about(monkeypatch: pytest.MonkeyPatch, **methods: Callable) -> None:
    """Let the artifacts' server answer something else, where there is something to answer."""
    honest = artifacts.get_artifact_repository

    def hostile(address: str, tracking_uri: str) -> SimpleNamespace:
        real = honest(address, tracking_uri=tracking_uri)
        own = {name: lambda *a, m=method: m(real, *a) for name, method in methods.items()}
        return SimpleNamespace(
            **{"list_artifacts": real.list_artifacts, "_download_file": real._download_file, **own}
        )

    monkeypatch.setattr(artifacts, "get_artifact_repository", hostile)


@pytest.mark.parametrize(
    "path",
    [
        "../../escaped",
        "/tmp/escaped",
        "a/../../escaped",
        "..",
        "more/deeper",
        "a\\b",
        "./a",
        "a//b",
    ],
)
def test_a_path_that_leads_elsewhere_is_refused_and_named(
    far: Path, near: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    make_sweep(far, trials=1)

    def listed(real: Any, folder: str | None = None) -> list[FileInfo]:
        return [*real.list_artifacts(folder), *([] if folder else [FileInfo(path, False, 7)])]

    lies_about(monkeypatch, list_artifacts=listed)
    before = set(near.parent.rglob("escaped"))
    with pytest.raises(ValueError, match="refused") as error:
        bring(far, near)
    assert repr(path) in str(error.value)
    assert set(near.parent.rglob("escaped")) == before
    assert not any(home.STATE in run.data.tags for run in runs_at(near))
    monkeypatch.undo()
    assert bring(far, near).changed == 3  # and comes when the server is honest


def test_what_mlflow_itself_refuses_is_told(
    far: Path, near: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_sweep(far, trials=1)

    def listed(*_: Any) -> list[FileInfo]:
        raise MlflowException.invalid_parameter_value("Invalid path: ../x")

    lies_about(monkeypatch, list_artifacts=listed)
    with pytest.raises(ValueError, match=r"is refused: Invalid path: \.\./x"):
        bring(far, near)


def test_a_file_that_comes_in_part_is_not_taken_for_whole(
    far: Path, near: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_sweep(far, trials=1)
    lies_about(monkeypatch, _download_file=lambda _, path, to: Path(to).write_text("h"))
    with pytest.raises(OSError, match=r"came with 1 bytes of"):
        bring(far, near)
    monkeypatch.undo()
    bring(far, near)
    check_same(far, near)


@pytest.mark.parametrize("name", ["model.pkl", "fold_0/model.pt", "code.py", "fold_0/x"])
def test_a_champion_with_anything_like_code_is_refused(far: Path, near: Path, name: str) -> None:
    client = make_sweep(far)
    version = tracking.find_version(client, "models:/brstnet@champion")
    odd = Path(version.source.removeprefix("file://")) / name
    odd.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="cannot hold code") as error:
        bring(far, near)
    assert f"champion/{name}" in str(error.value)
    assert client_at(near).search_model_versions("name = 'brstnet'") == []
    assert not [f for f in (near / "artifacts").rglob("*") if "champion" in f.parts]
    assert sum(home.STATE in run.data.tags for run in runs_at(near)) == 4  # the others have come
    assert not Path("exploded").exists()


def test_files_of_another_place_are_refused(far: Path, near: Path) -> None:
    client = make_sweep(far)
    run = tracking.find_version(client, "models:/brstnet@champion").run_id
    client.create_model_version("brstnet", "file:///etc", run_id=run)
    with pytest.raises(ValueError, match="'file:///etc', which is refused"):
        bring(far, near)


@pytest.mark.parametrize(
    "address",
    [
        "file:///etc",
        "mlflow-artifacts://elsewhere/1",
        "s3://bucket/1",
        "mlflow-artifacts:/a/%2e%2e/b",
    ],
)
def test_artifacts_come_from_the_server_alone(address: str) -> None:
    run = SimpleNamespace(info=SimpleNamespace(run_id="r", artifact_uri=address))
    with pytest.raises(ValueError, match="served by the MLflow server itself"):
        artifacts.Files("http://127.0.0.1:1", run)


@pytest.mark.parametrize("name", ["../s", "a/b", "..", ".ssh", "-rf", "a b", ""])
def test_a_name_that_is_no_folders_is_refused(far: Path, near: Path, name: str) -> None:
    client = make_sweep(far)
    client.set_tag(tracking.read_runs(far / "s")["sweep"], "brstnet.sweep", name)
    with pytest.raises(ValueError, match="the sweep's name"):
        home.check(tracking.local_uri(far), near)


def test_links_in_the_folder_are_named_and_not_followed(
    far: Path, near: Path, tmp_path: Path
) -> None:
    make_sweep(far)
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.move(far / "s" / "trials" / "0001" / "mlflow.json", outside / "mlflow.json")
    before = (outside / "mlflow.json").read_text()
    (far / "s" / "trials" / "0001" / "mlflow.json").symlink_to(outside / "mlflow.json")
    (far / "s" / "trials" / "0002").symlink_to(outside)
    with pytest.raises(ValueError, match="symbolic link") as error:
        bring(far, near)
    assert "trials/0001/mlflow.json" in str(error.value)
    assert "trials/0002" in str(error.value)
    assert (outside / "mlflow.json").read_text() == before


def test_a_server_that_is_away_or_refuses_is_said(
    near: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(OSError, match="MLflow is away"):
        home.check(f"http://127.0.0.1:{free_port()}", near)


# As a user does it -------------------------------------------------------------------------------


@pytest.mark.drill
@pytest.mark.cluster
def test_a_real_sweep_comes_home_and_works_there(
    demo_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL, S3 and accounts there; the leaderboard, the judge and the UI at home."""
    out, near = tmp_path / "cluster", tmp_path / "home"
    with head(tmp_path / "brstnet") as ours:
        uri = ours.settings.url
        config = write_yaml(tmp_path, "mini", trials=2)
        places = ("--store", demo_store.path, "--out", out, "--tracking_uri", uri)
        finish(start("sweeps/run.py", config, *places), 0)
        assert home.check(uri, near) == ["mini"]
        left = shutil.ignore_patterns("tune", "*.lock")
        shutil.copytree(out / "mini", near / "mini", ignore=left)
        brought = home.bring(uri, near)
        assert (brought.new, brought.champion) == (7, "1")
        assert home.bring(uri, near).unchanged == 7
        there = tracking.connect(uri)
        for run in runs_at(near):
            source = there.get_run(run.data.tags[home.SOURCE])
            assert source.data.params == run.data.params
            assert source.info.end_time == run.info.end_time
            for key in source.data.metrics:
                pair = [
                    {home._number(m) for m in client.get_metric_history(its.info.run_id, key)}
                    for client, its in ((there, source), (client_at(near), run))
                ]
                assert pair[0] == pair[1] != set()
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "not " + SECRET)
        with pytest.raises(OSError, match="refuses this account"):
            home.check(uri, near)
    for name in [name for name in os.environ if name.startswith(("AWS_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    finish(start("dashboards/leaderboard.py", "--runs", near, "--sweep", "mini"), 0)
    assert "mini" in (near / "mini" / "leaderboard.html").read_text()
    judge = ("sweeps/evaluate.py", "models:/brstnet@champion", demo_store.path)
    whom = ("--patients", "BC90006", "--out", tmp_path / "judged", "--runs", near)
    assert "judged on BC90006" in finish(start(*judge, *whom), 0)
    check_ui(near)


def check_ui(runs: Path) -> None:
    port = free_port()
    environment = {**os.environ, "BROWSER": "true"}
    command = [sys.executable, "sweeps/ui.py", "--runs", str(runs), "--port", str(port)]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    server = subprocess.Popen(command, cwd=ROOT, env=environment, **quiet)
    limit = threading.Timer(180, server.terminate)
    limit.start()
    try:
        assert server.stdout is not None
        assert any("viewStateShareKey=mini" in line for line in server.stdout)
        page = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search?max_results=9"
        with urlopen(page, timeout=30) as answer:
            assert b"brstnet" in answer.read()
    finally:
        limit.cancel()
        server.terminate()
        server.wait(30)
