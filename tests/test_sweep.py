"""Whole sweeps on demo tissue, as a user runs them: the command, Ray, MLflow, the registry."""

import json
import signal
import time
from collections import Counter
from pathlib import Path

import optuna
import pandas as pd
import pytest
from commands import finish, start
from mlflow import MlflowClient
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from brstnet.data.store import Store

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.cluster, pytest.mark.slow]

YAML = """
name: {name}
protocol: {{held_out: [BC90006], folds: 2, panel_size: 40}}
training:
  {{backbone: test_resnet, epochs: {epochs}, batch_size: 8, schedule: cosine, stopping: fixed}}
trials: {trials}
pruning: {pruning}
workers_per_trial: {workers}
space:
  genes: [60, 100]
  learning_rate: {{low: 0.0001, high: 1.0e+30, log: true}}
  aux_weight: {{low: 0.1, high: 40, log: true}}
points:
  - {{genes: 60, learning_rate: 0.05, aux_weight: 1}}
  - {{genes: 100, learning_rate: 1.0e+25, aux_weight: 1}}
  - {{genes: 100, learning_rate: 0.02, aux_weight: 1}}
"""


def write_yaml(folder: Path, name: str, **changes: object) -> Path:
    values = {"epochs": 2, "trials": 4, "pruning": "none", "workers": 1, **changes}
    path = folder / f"{name}.yaml"
    path.write_text(YAML.format(name=name, **values))
    return path


def runs_of(client: MlflowClient, kind: str, parent: str | None = None) -> list:
    experiment = client.get_experiment_by_name("brstnet")
    where = f"tags.`brstnet.kind` = '{kind}'"
    where += f" and tags.`mlflow.parentRunId` = '{parent}'" if parent else ""
    return list(client.search_runs([experiment.experiment_id], where, max_results=1000))


def journal(folder: Path) -> JournalStorage:
    return JournalStorage(JournalFileBackend(str(folder / "optuna.jsonl")))


def test_a_sweep_ends_in_a_registered_champion_that_is_judged(
    demo_store: Store, tmp_path: Path
) -> None:
    config, out = write_yaml(tmp_path, "whole"), tmp_path / "runs"
    command = ("sweeps/run.py", config, "--store", demo_store.path, "--out", out)
    said = finish(start(*command), 0)
    assert "champion: models:/brstnet@champion" in said
    outcomes = {
        o["trial"]: o
        for o in (json.loads(f.read_text()) for f in out.glob("whole/trials/*/outcome.json"))
    }
    assert [outcomes[n]["state"] for n in range(4)] == [
        "COMPLETE",
        "COMPLETE",
        "FAILED",
        "COMPLETE",
    ]
    assert "loss" in outcomes[2]["reason"]
    assert outcomes[0]["config"]["learning_rate"] == 0.001
    assert "without pruning" in said  # the cost was said beforehand
    assert all(set(o["sections"]) for o in outcomes.values() if o["state"] == "COMPLETE")

    client = MlflowClient(f"sqlite:///{out / 'mlflow.db'}")
    (sweep,) = runs_of(client, "sweep")
    trials = runs_of(client, "trial", sweep.info.run_id)
    assert {t.data.tags["brstnet.trial"]: t.data.tags["brstnet.state"] for t in trials} == {
        str(n): outcomes[n]["state"] for n in range(4)
    }
    assert sweep.info.status == "FINISHED"
    experiment = client.get_experiment_by_name("brstnet")
    view = json.loads(experiment.tags["mlflow.sharedViewState.whole"])  # what `make ui` opens at
    assert "params.`learning_rate`" in view["selectedColumns"]
    crowned = sweep.data.tags["brstnet.champion"]
    complete = [t for t in trials if t.data.tags["brstnet.state"] == "COMPLETE"]
    best = max(complete, key=lambda t: t.data.metrics["score"])
    folds = runs_of(client, "fold", best.info.run_id)
    assert len(folds) == 2
    for fold in folds:
        steps = [m.step for m in client.get_metric_history(fold.info.run_id, "train_loss")]
        assert steps == [0, 1]
        names = {a.path for a in client.list_artifacts(fold.info.run_id)}
        assert {"genes.csv", "leak_report.json"} <= names
        assert "gene_map.png" in names or fold.data.tags["mlflow.parentRunId"] != crowned
    assert best.inputs.dataset_inputs[0].dataset.digest == demo_store.digest
    scores = [f.data.metrics["fold_score"] for f in folds]
    assert best.data.metrics["score"] == pytest.approx(sum(scores) / 2)
    version = client.get_model_version_by_alias("brstnet", "champion")
    assert version.run_id == crowned
    assert crowned in {t.info.run_id for t in complete}
    assert sweep.data.metrics["best_score"] == pytest.approx(best.data.metrics["score"])
    assert {a.path for a in client.list_artifacts(sweep.info.run_id)} == {"sweep.yaml", "insight"}
    card = (out / "whole" / "champion" / "README.md").read_text()
    assert "held out BC90006" in card
    assert not (out / "whole" / "refused.jsonl").exists()

    study = optuna.load_study(study_name="whole", storage=journal(out / "whole"))
    assert Counter(t.state.name for t in study.trials) == {"COMPLETE": 3, "FAIL": 1}

    is_judged(out, demo_store, client)
    goes_on_and_may_be_changed(command, out, client)


def is_judged(out: Path, store: Store, client: MlflowClient) -> None:
    judged = out / "judged"
    words = ("sweeps/evaluate.py", "models:/brstnet@champion", store.path, "--runs", out)
    finish(start(*words, "--patients", "BC90006", "--out", judged), 0)
    summary = json.loads((judged / "summary.json").read_text())
    (evaluation,) = runs_of(client, "evaluation")
    assert evaluation.data.metrics["median_pcc"] == pytest.approx(summary["median_pcc"])
    assert set(pd.read_parquet(judged / "scores.parquet")["patient"]) == {"BC90006"}
    refused = finish(start(*words, "--patients", "BC90001", "--out", judged), 2)
    assert "cannot judge" in refused
    page = out / "board.html"
    finish(start("dashboards/leaderboard.py", "--runs", out, "--sweep", "whole", "--out", page), 0)
    assert "held out BC90006" in page.read_text()


def goes_on_and_may_be_changed(command: tuple, out: Path, client: MlflowClient) -> None:
    assert "champion: models:/brstnet@champion (version 1)" in finish(start(*command), 0)
    changed = finish(start(*command, "--training.epochs", "3"), 2)
    assert "a sweep of this name has another training" in changed
    more = finish(start(*command, "--trials", "5"), 0)  # goes on with one more
    assert len(list(out.glob("whole/trials/*/outcome.json"))) == 5
    assert "champion: models:/brstnet@champion" in more
    promoted = finish(start("sweeps/run.py", "--out", out, "--promote", "whole/3"), 0)
    assert "champion: models:/brstnet@champion" in promoted
    promoted_run = client.get_model_version_by_alias("brstnet", "champion").run_id
    assert client.get_run(promoted_run).data.tags["brstnet.trial"] == "3"


def test_a_stopped_sweep_resumes_where_it_was(demo_store: Store, tmp_path: Path) -> None:
    config, out = write_yaml(tmp_path, "stopped", trials=3, epochs=6), tmp_path / "runs"
    command = ("sweeps/run.py", config, "--store", demo_store.path, "--out", out)
    process = start(*command)
    deadline = time.monotonic() + 300
    while not (done := sorted(out.glob("stopped/trials/*/fold_*/result.json"))):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    said = finish(process, 130)
    assert "resumes" in said
    before = {path: path.stat().st_mtime_ns for path in done}
    finish(start(*command), 0)
    assert {path: path.stat().st_mtime_ns for path in done} == before  # finished: not repeated
    client = MlflowClient(f"sqlite:///{out / 'mlflow.db'}")
    (sweep,) = runs_of(client, "sweep")
    trials = runs_of(client, "trial", sweep.info.run_id)
    assert sorted(t.data.tags["brstnet.trial"] for t in trials) == ["0", "1", "2"]
    assert sweep.info.status == "FINISHED"
    complete = [t for t in trials if t.data.tags["brstnet.state"] == "COMPLETE"]
    assert len(complete) == 2
    for trial in complete:
        folds = runs_of(client, "fold", trial.info.run_id)
        assert sorted(f.data.tags["brstnet.fold"] for f in folds) == ["0", "1"]
        for fold in folds:
            history = client.get_metric_history(fold.info.run_id, "train_loss")
            assert sorted({m.step for m in history}) == list(range(6))
    study = optuna.load_study(study_name="stopped", storage=journal(out / "stopped"))
    assert Counter(t.state.name for t in study.trials) == {"COMPLETE": 2, "FAIL": 1}


@pytest.mark.drill
def test_two_workers_train_a_trial(demo_store: Store, tmp_path: Path) -> None:
    config = write_yaml(tmp_path, "pair", trials=2, workers=2)
    out = tmp_path / "runs"
    finish(start("sweeps/run.py", config, "--store", demo_store.path, "--out", out), 0)
    facts = [json.loads(f.read_text()) for f in out.glob("pair/champion/fold_*/checkpoint.json")]
    assert [f["machine"]["workers"] for f in facts] == [2, 2]
    client = MlflowClient(f"sqlite:///{out / 'mlflow.db'}")
    assert len(runs_of(client, "trial")) == 2  # the leading worker alone logs
    assert len(runs_of(client, "fold")) == 4
