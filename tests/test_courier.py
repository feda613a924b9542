"""The courier against a real MLflow: all arrives, in order, once, whoever dies or is away."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException, RestException

from brstnet.config import Protocol, Training
from brstnet.data.store import Store
from sweeps import courier as couriers
from sweeps import tracking
from sweeps.board import Board, open_study
from sweeps.courier import Courier, serve
from sweeps.events import FILE, Events, read
from sweeps.progress import tell_end
from sweeps.record import TrialRecord
from sweeps.space import Asked, Sweep

ROOT = Path(__file__).parents[1]
TRIAL = "0000"


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture(scope="module")
def client(uri: str) -> MlflowClient:
    return tracking.connect(uri)


@pytest.fixture
def experiment(client: MlflowClient, tmp_path: Path) -> str:
    """An experiment of the test's own."""
    place = (tmp_path / "artifacts").as_uri()
    return str(client.create_experiment(str(tmp_path), artifact_location=place))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A sweep's folder."""
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / tracking.ID_FILE).write_text(f"id-{tmp_path.name}")
    return folder


def begin_sweep(out: Path) -> Events:
    events = Events(out)
    events.start("sweep", "s", "sweep", {"brstnet.sweep": "s"})
    events.status("sweep", "RUNNING")
    return events


def train(out: Path, store: Store, name: str = TRIAL, folds: int = 2, epochs: int = 3) -> None:
    """What a trial's process tells, and what it leaves in its folder."""
    folder = out / "trials" / name
    record = TrialRecord(folder, "s")
    asked = Asked(number=int(name[:4]), point={})
    record.begin(asked, Training(learning_rate=1e-6), store, Protocol())
    scores = []
    for fold in range(folds):
        record.fold(fold)
        for epoch in range(epochs):
            record.epoch(fold, {"epoch": epoch, "train_loss": loss_at(fold, epoch)})
        report = folder / f"fold_{fold}" / "report"
        report.mkdir(parents=True, exist_ok=True)
        (report / "genes.csv").write_text(f"{name} {fold}")
        scores.append(0.1 * (fold + 1))
        record.end_fold(fold, scores[-1], report)
        (report.parent / "told").touch()
        note = {"score": float(np.mean(scores)), "folds_done": fold + 1, "cost_seconds": 1.0}
        record.running({**note, "scores": scores})


def loss_at(fold: int, epoch: int) -> float:
    return 10.0 * fold + epoch / 3


def end_trial(out: Path, events: Events, name: str = TRIAL, state: str = "COMPLETE") -> None:
    """What the driver tells when a trial has ended."""
    plan = Sweep(name="s", trials=9, space={"genes": [250, 300]})
    outcome = {"trial": int(name[:4]), "seed": 0, "state": state, "reason": "", "score": 0.15}
    board = SimpleNamespace(
        sweep=plan, out=out, outcomes={name: outcome}, complete=[outcome], spent_hours=lambda: 0.5
    )
    tell_end(events, board, name, outcome)  # type: ignore[arg-type]


def runs_of(client: MlflowClient, experiment: str) -> dict[str, Any]:
    """Every run of the experiment by its key; two of one key are a mistake."""
    runs = client.search_runs([experiment], max_results=10000)
    keys = [run.data.tags["brstnet.key"].partition("/")[2] for run in runs]
    assert len(set(keys)) == len(keys), sorted(keys)
    return dict(zip(keys, runs, strict=True))


def history(client: MlflowClient, run: Any, metric: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, metric)]


def check_all_arrived(
    client: MlflowClient, experiment: str, store: Store, names: tuple[str, ...] = (TRIAL,)
) -> None:
    runs = runs_of(client, experiment)
    folds = [f"{name}/fold_{n}" for name in names for n in range(2)]
    assert set(runs) == {"sweep", *(f"{name}/trial" for name in names), *folds}
    for name in names:
        trial = runs[f"{name}/trial"]
        assert trial.data.tags["mlflow.parentRunId"] == runs["sweep"].info.run_id
        assert trial.data.tags["brstnet.kind"] == "trial"
        assert trial.data.tags["brstnet.state"] == "COMPLETE"
        assert trial.data.params["learning_rate"] == "1e-06"
        assert trial.info.status == "FINISHED"
        assert history(client, trial, "score") == [(1, 0.1), (2, pytest.approx(0.15))]
        (dataset,) = trial.inputs.dataset_inputs
        assert dataset.dataset.digest == store.digest
        assert [tag.value for tag in dataset.tags] == [Protocol().line()]
        for number in range(2):
            fold = runs[f"{name}/fold_{number}"]
            assert fold.data.tags["mlflow.parentRunId"] == trial.info.run_id
            assert fold.info.status == "FINISHED"
            losses = history(client, fold, "train_loss")
            assert losses == [(e, loss_at(number, e)) for e in range(3)]
            assert history(client, fold, "fold_score") == [(0, 0.1 * (number + 1))]
            (artifact,) = client.list_artifacts(fold.info.run_id)
            assert artifact.path == "genes.csv"


def test_a_sweep_arrives_whole(
    client: MlflowClient, experiment: str, out: Path, demo_store: Store
) -> None:
    events = begin_sweep(out)
    train(out, demo_store)
    end_trial(out, events)
    courier = Courier(client, experiment, out, 1)
    sent = courier.round()
    written = [read(f / FILE)[0] for f in (out, out / "trials" / TRIAL)]
    assert sent == sum(map(len, written))
    assert (courier.pending(), courier.refused, courier.round()) == (0, 0, 0)
    check_all_arrived(client, experiment, demo_store)
    runs = runs_of(client, experiment)
    assert runs["sweep"].info.status == "RUNNING"
    assert runs["sweep"].data.metrics["trials_complete"] == 1
    (first,) = [e for e in written[1] if e["do"] == "log" and e["step"] == 0 and e["metrics"]][:1]
    (metric, *_) = client.get_metric_history(runs[f"{TRIAL}/fold_0"].info.run_id, "train_loss")
    assert metric.timestamp == first["time"]  # when it was, not when it arrived
    start = next(e for e in written[1] if e["do"] == "start")
    assert runs[f"{TRIAL}/trial"].info.start_time == start["time"]


def test_everything_delivered_twice_changes_nothing(
    client: MlflowClient, experiment: str, out: Path, demo_store: Store
) -> None:
    events = begin_sweep(out)
    train(out, demo_store)
    end_trial(out, events)
    for forgotten in ((), ("delivered.json",)):
        for name in forgotten:
            for file in out.rglob(name):
                file.unlink()
        Courier(client, experiment, out, 1).round()
        check_all_arrived(client, experiment, demo_store)
    assert not (out / couriers.REFUSALS).exists()


@pytest.mark.parametrize("crash", range(4))
def test_killed_between_making_a_run_and_noting_its_id(
    client: MlflowClient,
    experiment: str,
    out: Path,
    demo_store: Store,
    monkeypatch: pytest.MonkeyPatch,
    crash: int,
) -> None:
    events = begin_sweep(out)
    train(out, demo_store)
    end_trial(out, events)
    written, real = 0, tracking.write_runs

    def dying(*words: Any) -> None:
        nonlocal written
        written += 1
        if written == crash + 1:
            raise KeyboardInterrupt
        real(*words)

    with monkeypatch.context() as patch:
        patch.setattr(tracking, "write_runs", dying)
        with pytest.raises(KeyboardInterrupt):
            Courier(client, experiment, out, 1).round()
    Courier(client, experiment, out, 1).round()
    check_all_arrived(client, experiment, demo_store)
    assert not list(out.rglob("creating"))


class Away:
    """A client whose server goes away now and then, before or after it did what was asked."""

    def __init__(self, client: MlflowClient, fails: Callable[[int], str]) -> None:
        self.client, self.fails, self.calls = client, fails, 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.client, name)

        def call(*words: Any, **more: Any) -> Any:
            self.calls += 1
            when = self.fails(self.calls)
            if when == "before":
                raise MlflowException("Connection refused")
            result = method(*words, **more)
            if when == "after":
                raise MlflowException("Read timed out")
            return result

        return call


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_server_that_goes_away_again_and_again_loses_and_doubles_nothing(
    client: MlflowClient, experiment: str, out: Path, demo_store: Store, when: str
) -> None:
    events = begin_sweep(out)
    train(out, demo_store)
    end_trial(out, events)
    total = sum(len(read(folder / FILE)[0]) for folder in (out, out / "trials" / TRIAL))
    rounds, failed, left = 0, 0, total
    fails = {1, 2, 5, 9, 14, 20, 27, 35, 60}
    away = Away(client, lambda n: when if n in fails else "")
    courier = Courier(away, experiment, out, 1)  # type: ignore[arg-type]
    while courier.pending():
        rounds += 1
        assert rounds < 50
        try:
            courier.round()
        except MlflowException:
            failed += 1
            assert 0 < courier.pending() <= left
            left = courier.pending()
    assert failed >= 5
    check_all_arrived(client, experiment, demo_store)
    assert courier.refused == 0


def test_a_server_that_was_away_from_the_first_moment_gets_all_in_order(
    client: MlflowClient, experiment: str, out: Path, demo_store: Store
) -> None:
    """The driver said of a trial that it has ended before a single run was made."""
    events = begin_sweep(out)
    away = Away(client, lambda _: "before")
    courier = Courier(away, experiment, out, 1)  # type: ignore[arg-type]
    for name in ("0000", "0001"):
        with pytest.raises(MlflowException):
            courier.round()
        train(out, demo_store, name)
        end_trial(out, events, name)
    away.fails = lambda _: ""
    courier.round()
    assert courier.pending() == courier.refused == 0
    check_all_arrived(client, experiment, demo_store, ("0000", "0001"))
    assert runs_of(client, experiment)["0000/trial"].info.run_name.startswith("trial 0 ")


def test_the_drivers_end_of_a_trial_comes_after_the_trials_own_last_word(
    client: MlflowClient, experiment: str, out: Path, demo_store: Store
) -> None:
    """Also where the trial goes on telling while the courier is on its round."""
    events = begin_sweep(out)
    courier = Courier(client, experiment, out, 1)
    courier.round()
    seen: list[str] = []
    deliver = courier.deliver

    def watch(folder: couriers.Folder, *words: Any) -> int:
        seen.append(folder.path.name)
        count = deliver(folder, *words)
        if folder.path.name == TRIAL and not list((folder.path).glob("fold_*")):
            train(out, demo_store)  # between the trial's turn and the driver's
            end_trial(out, events)
        return count

    courier.deliver = watch  # type: ignore[method-assign]
    Events(out / "trials" / TRIAL).start(f"{TRIAL}/trial", "t", "trial", {}, "sweep")
    courier.round()
    assert courier.driver.pending_bytes > 0  # kept for the next round
    assert runs_of(client, experiment)[f"{TRIAL}/trial"].info.status == "RUNNING"
    courier.round()
    runs = runs_of(client, experiment)
    assert runs[f"{TRIAL}/trial"].info.status == "FINISHED"
    assert len(history(client, runs[f"{TRIAL}/fold_1"], "train_loss")) == 3


def test_a_stopped_trial_that_goes_on_is_running_again(
    client: MlflowClient, experiment: str, out: Path, demo_store: Store
) -> None:
    events = begin_sweep(out)
    train(out, demo_store, folds=1)
    events.status(f"{TRIAL}/trial", "KILLED")
    events.status("sweep", "KILLED")
    courier = Courier(client, experiment, out, 1)
    courier.round()
    runs = runs_of(client, experiment)
    assert runs["sweep"].info.status == runs[f"{TRIAL}/trial"].info.status == "KILLED"
    for restarted in (courier, Courier(client, experiment, out, 1)):
        events = begin_sweep(out)
        train(out, demo_store)
        restarted.round()
    assert runs_of(client, experiment)[f"{TRIAL}/trial"].info.status == "RUNNING"
    end_trial(out, events)
    restarted.round()
    check_all_arrived(client, experiment, demo_store)


def test_what_the_server_refuses_is_kept_and_holds_up_nothing_else(
    client: MlflowClient, experiment: str, out: Path, demo_store: Store
) -> None:
    events = begin_sweep(out)
    trial = Events(out / "trials" / TRIAL)
    trial.start(f"{TRIAL}/trial", "t", "trial", {}, "sweep")
    trial.log(f"{TRIAL}/trial", {"a": 1.0}, params={"genes": 250})
    trial.log(f"{TRIAL}/trial", {"a": 2.0}, step=1, params={"genes": 300})  # another value
    trial.log(f"{TRIAL}/trial", {"bad\nname": 1.0}, step=2)
    trial.log(f"{TRIAL}/trial", {"a": 3.0}, step=3)  # sent together with these
    trial.status(f"{TRIAL}/fold_7", "FINISHED")  # never begun
    events.log("sweep", {"x": 1.0})
    courier = Courier(client, experiment, out, 1)
    courier.round()
    runs = runs_of(client, experiment)
    assert [step for step, _ in history(client, runs[f"{TRIAL}/trial"], "a")] == [0, 3]
    assert runs["sweep"].data.metrics == {"x": 1.0}
    refused = read(out / couriers.REFUSALS)[0]
    assert [(e["run"], e.get("step")) for e in refused] == [
        (f"{TRIAL}/trial", 1),
        (f"{TRIAL}/trial", 2),
        (f"{TRIAL}/fold_7", None),
    ]
    assert "never begun" in refused[2]["refused"]
    assert (courier.pending(), courier.refused) == (0, 3)
    for file in out.rglob("delivered.json"):
        file.unlink()
    again = Courier(client, experiment, out, 1)
    again.round()
    assert again.refused == len(read(out / couriers.REFUSALS)[0]) == 3


def test_a_run_that_was_deleted_in_the_ui_stops_nothing(
    client: MlflowClient, experiment: str, out: Path, demo_store: Store
) -> None:
    events = begin_sweep(out)
    train(out, demo_store, "0000", folds=1)
    courier = Courier(client, experiment, out, 1)
    courier.round()
    runs = runs_of(client, experiment)
    client.delete_run(runs["0000/fold_0"].info.run_id)
    client.delete_run(runs["0000/trial"].info.run_id)
    train(out, demo_store, "0000")
    train(out, demo_store, "0001")
    end_trial(out, events, "0000")
    end_trial(out, events, "0001")
    courier.round()
    assert courier.pending() == 0
    assert courier.refused > 0
    check = {key for key in runs_of(client, experiment) if key.startswith("0001")}
    assert check == {"0001/trial", "0001/fold_0", "0001/fold_1"}


def test_a_half_written_line_waits_until_it_is_whole(
    client: MlflowClient, experiment: str, out: Path
) -> None:
    begin_sweep(out).log("sweep", {"x": 1.0}, step=5)
    text = (out / FILE).read_bytes()
    (out / FILE).write_bytes(text[:-10])
    courier = Courier(client, experiment, out, 1)
    assert courier.round() == 2
    assert courier.pending() == 0
    run = runs_of(client, experiment)["sweep"]
    assert run.data.metrics == {}
    (out / FILE).write_bytes(text)
    assert courier.round() == 1
    assert history(client, run, "x") == [(5, 1.0)]


def test_more_than_mlflow_takes_at_once(client: MlflowClient, experiment: str, out: Path) -> None:
    events = begin_sweep(out)
    for step in range(30):
        events.log("sweep", {f"m{n}": step + n for n in range(50)}, step=step)
    events.log(
        "sweep",
        {f"n{n}": float(n) for n in range(950)},
        params={f"p{n}": n for n in range(130)},
        tags={f"t{n}": "v" * 9000 for n in range(110)},
    )
    courier = Courier(client, experiment, out, 1)
    courier.round()
    assert courier.refused == 0
    run = runs_of(client, experiment)["sweep"]
    assert len(run.data.metrics) == 1000
    assert len(run.data.params) == 130
    assert len([t for t in run.data.tags if t.startswith("t")]) == 110
    assert history(client, run, "m49") == [(s, s + 49.0) for s in range(30)]


def test_a_number_that_is_none_arrives(client: MlflowClient, experiment: str, out: Path) -> None:
    events = begin_sweep(out)
    events.log("sweep", {"nan": float("nan"), "low": float("-inf")})
    courier = Courier(client, experiment, out, 1)
    for _ in range(2):
        courier.round()
        (out / "delivered.json").unlink()
        courier = Courier(client, experiment, out, 1)
    assert courier.refused == 0
    run = runs_of(client, experiment)["sweep"]
    ((_, value),) = history(client, run, "nan")
    assert np.isnan(value)


class Recorder:
    """A slow server in memory, for many threads."""

    def __init__(self) -> None:
        self.lock, self.runs, self.logged = threading.Lock(), [], []
        self.most = self.now = 0
        self.fails: set[str] = set()

    def _at_work(self, seconds: float) -> None:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(seconds)
        with self.lock:
            self.now -= 1

    def create_run(self, experiment: str, tags: dict[str, str], **_: Any) -> Any:
        key = tags["brstnet.key"].partition("/")[2]
        if key in self.fails:
            raise MlflowException("Connection refused")
        self._at_work(0.1)
        with self.lock:
            self.runs.append(key)
        return SimpleNamespace(info=SimpleNamespace(run_id=key))

    def search_runs(self, _: Any, where: str) -> list[Any]:
        key = where.split("'")[1].partition("/")[2]
        with self.lock:
            found = [key] if key in self.runs else []
        return [SimpleNamespace(info=SimpleNamespace(run_id=k)) for k in found]

    def log_batch(self, run_id: str, metrics: list[Any], *_: Any) -> None:
        with self.lock:
            self.logged += [(run_id, m.step) for m in metrics]

    def update_run(self, *_: Any, **__: Any) -> None:
        pass

    set_terminated = log_inputs = log_artifacts = update_run


def test_eight_threads_deliver_each_trial_in_order(out: Path) -> None:
    begin_sweep(out)
    for number in range(24):
        trial = Events(out / "trials" / f"{number:04d}")
        trial.start(f"{number:04d}/trial", "t", "trial", {}, "sweep")
        for step in range(5):
            trial.log(f"{number:04d}/trial", {"x": 1.0}, step=step)
            trial.status(f"{number:04d}/trial", "RUNNING")
    server = Recorder()
    courier = Courier(server, "1", out, 8)  # type: ignore[arg-type]
    courier.round()
    assert courier.pending() == 0
    assert server.most == 8
    assert len(set(server.runs)) == len(server.runs) == 25
    for number in range(24):
        steps = [step for run, step in server.logged if run == f"{number:04d}/trial"]
        assert steps == list(range(5))


def test_a_round_that_fails_leaves_no_thread_behind(out: Path) -> None:
    """Else the next round would deliver the same folder a second time, at the same time."""
    begin_sweep(out)
    for number in range(4):
        trial = Events(out / "trials" / f"{number:04d}")
        trial.start(f"{number:04d}/trial", "t", "trial", {}, "sweep")
    server = Recorder()
    server.fails = {"0000/trial"}
    courier = Courier(server, "1", out, 8)  # type: ignore[arg-type]
    with pytest.raises(MlflowException):
        courier.round()
    assert server.now == 0
    assert sorted(server.runs) == ["0001/trial", "0002/trial", "0003/trial", "sweep"]
    server.fails = set()
    courier.round()
    assert len(server.runs) == len(set(server.runs)) == 5


def test_refusals_of_a_rest_server_are_known_by_their_code() -> None:
    refused = RestException({"error_code": "INVALID_PARAMETER_VALUE", "message": "no"})
    away = MlflowException("API request failed")
    assert refused.error_code in couriers.REFUSED
    assert away.error_code not in couriers.REFUSED


def test_serving_ends_when_all_is_delivered_or_patience_is_over(
    client: MlflowClient, experiment: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_sweep(out)
    ended = threading.Event()
    ended.set()
    monkeypatch.setattr(couriers, "BACK_OFF_SECONDS", (0.05,))
    away = Away(client, lambda _: "before")
    courier = Courier(away, experiment, out, 1)  # type: ignore[arg-type]
    assert serve(courier, ended, 0.3) == 3
    note = json.loads((out / couriers.STATUS).read_text())
    assert note == {"pending": 2, "refused": 0, "error": "Connection refused"}
    for _ in range(6):
        begin_sweep(out)
    away.fails = lambda n: "before" if n % 3 == 0 else ""  # it takes two requests at a time
    assert serve(courier, ended, 20.0) == 0
    note = json.loads((out / couriers.STATUS).read_text())
    assert note == {"pending": 0, "refused": 0, "error": ""}


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen]]:
    started: list[subprocess.Popen] = []
    yield started
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def start(uri: str, experiment: str, out: Path) -> subprocess.Popen:
    words = ["--tracking_uri", uri, "--experiment", experiment, "--patience", "60"]
    return subprocess.Popen(
        [sys.executable, "-m", "sweeps.courier", str(out), *words], cwd=ROOT, stdin=subprocess.PIPE
    )


@pytest.mark.slow
def test_the_process_delivers_what_there_is_when_its_driver_ends(
    uri: str,
    client: MlflowClient,
    experiment: str,
    out: Path,
    demo_store: Store,
    processes: list[subprocess.Popen],
) -> None:
    events = begin_sweep(out)
    train(out, demo_store, folds=1)
    killed = start(uri, experiment, out)
    processes.append(killed)
    deadline = time.monotonic() + 200
    while not (out / "trials" / TRIAL / "delivered.json").exists():
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    killed.terminate()  # Ctrl-C and a TERM are for the driver
    time.sleep(0.5)
    assert killed.poll() is None
    train(out, demo_store)
    killed.kill()
    killed.wait()
    end_trial(out, events)
    process = start(uri, experiment, out)
    processes.append(process)
    assert process.stdin is not None
    process.stdin.close()  # the driver is gone before it has begun
    assert process.wait(timeout=200) == 0
    check_all_arrived(client, experiment, demo_store)


# --- what others read back


def test_the_champions_point_is_read_from_what_the_courier_told(
    client: MlflowClient, experiment: str, out: Path, demo_store: Store
) -> None:
    begin_sweep(out)
    training = Training(learning_rate=5e-5, weight_decay=1e-6, auxnet=False, genes=300)
    record = TrialRecord(out / "trials" / TRIAL, "s")
    record.begin(Asked(number=0, point={}), training, demo_store, Protocol())
    Courier(client, experiment, out, 1).round()
    run = runs_of(client, experiment)[f"{TRIAL}/trial"]
    client.create_registered_model(tracking.MODEL)
    version = client.create_model_version(tracking.MODEL, "file:///m", run_id=run.info.run_id)
    client.set_registered_model_alias(tracking.MODEL, tracking.ALIAS, version.version)
    assert tracking.champion_settings(client) == {
        f: getattr(training, f) for f in training.__dataclass_fields__
    }
    plan = Sweep(
        name="t",
        trials=3,
        points=["champion"],
        space={
            "learning_rate": {"low": 1e-6, "high": 1e-2, "log": True},
            "weight_decay": {"low": 1e-7, "high": 1e-2, "log": True},
            "warmup_epochs": {"low": 0, "high": 5},
            "input_px": [None, 112],
        },
    )
    folder = out.parent / "t"
    folder.mkdir()
    study = open_study(plan, folder, tracking.champion_settings(client))
    board = Board(sweep=plan, study=study, out=folder, concurrent=2)
    board.next()
    second = board.next()
    assert second.point == {  # type: ignore[union-attr]
        "learning_rate": 5e-5,
        "weight_decay": 1e-6,
        "warmup_epochs": 0,
        "input_px": None,
    }
