"""The leaderboard against a small MLflow database with planted runs."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from mlflow import MlflowClient

from dashboards.leaderboard import Leaderboard, leaderboard_html, leaderboard_info, main

if TYPE_CHECKING:
    from pathlib import Path

PROTOCOL = {"folds": [["BC1"], ["BC2"], ["BC3"]], "held_out": ["BC90007"], "panel_size": 120}
LINE = "3 folds by patient; held out BC90007; panel 120; target log_normalised"
EVIL = "<script>alert('pwned')</script>"
EQUAL = {"learning_rate": "0.00031622776601683794", "augment": "True"}


class Planted:
    """An MLflow database that is filled run by run, as sweeps/tracking.py does."""

    def __init__(self, folder: Path) -> None:
        self.client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
        location = (folder / "artifacts").as_uri()
        self.experiment = self.client.create_experiment("brstnet", artifact_location=location)

    def run(self, kind: str, sweep: str, parent: str = "", **tags: str) -> str:
        tags = {f"brstnet.{name}": value for name, value in tags.items()}
        tags |= {"brstnet.kind": kind, "brstnet.sweep": sweep}
        tags |= {"mlflow.parentRunId": parent} if parent else {}
        return self.client.create_run(self.experiment, tags=tags).info.run_id

    def log(self, run: str, metrics: dict[str, float], params: dict[str, str]) -> str:
        for name, value in metrics.items():
            self.client.log_metric(run, name, value)
        for name, setting in params.items():
            self.client.log_param(run, name, setting)
        return run

    def sweep(self, name: str, protocol: dict[str, Any]) -> str:
        text = json.dumps(protocol)
        return self.run("sweep", name, protocol=text, protocol_line=LINE, store="f00d")

    def trial(self, parent: str, number: int, state: str, *scores: float, **params: str) -> str:
        run = self.run("trial", "first", parent, trial=str(number), state=state)
        metrics = {f"score_fold_{k}": score for k, score in enumerate(scores)}
        if scores:
            metrics["score"] = sum(scores) / len(scores)
        metrics |= {"folds_done": len(scores), "cost_seconds": 60.0 * len(scores)}
        return self.log(run, metrics, params)


def plant(planted: Planted) -> None:
    """Six trials in mixed order, one evaluation, a second sweep, and a name with two protocols."""
    sweep = planted.sweep("first", PROTOCOL)
    trial = planted.trial
    failed = trial(sweep, 0, "FAILED")
    planted.client.set_tag(failed, "brstnet.reason", EVIL)
    trial(sweep, 1, "PRUNED", 0.30, genes="500", backbone="resnet18", **EQUAL)
    trial(sweep, 2, "COMPLETE", 0.1, 0.2, 0.3, genes="1000", backbone="resnet18", **EQUAL)
    aux = {"aux_weight": "0.5", **EQUAL}
    best = trial(sweep, 3, "COMPLETE", 0.3, 0.4, 0.5, genes="500", backbone=EVIL, **aux)
    trial(sweep, 4, "PRUNED", 0.10, 0.15, genes="500", backbone="resnet18", **EQUAL)
    trial(sweep, 5, "PRUNED", 0.20, 0.35, genes="500", backbone="resnet18", **EQUAL)
    planted.client.set_tag(sweep, "brstnet.champion", best)
    planted.run("fold", "first", best)
    held = planted.run("evaluation", "first", best, patients="BC90007", protocol_line=LINE)
    medians = {"median_pcc": 0.33, "median_pcc_depth_only": -0.05, "median_pcc_colour_ridge": 0.2}
    planted.log(held, medians | {"genes_above_0": 118, "genes_above_0.3": 70}, {})
    other = planted.sweep("it's second", PROTOCOL)
    planted.run("trial", "it's second", other, trial="0", state="RUNNING")
    planted.sweep("empty", PROTOCOL)
    for size in (120, 250):
        planted.sweep("mixed", PROTOCOL | {"panel_size": size})
    odd = planted.sweep("odd", PROTOCOL)
    planted.run("trial", "odd", odd, trial="0", state="DONE")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    plant(Planted(folder))
    return folder


@pytest.fixture(scope="module")
def client(runs: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")


@pytest.fixture(scope="module")
def info(client: MlflowClient) -> Leaderboard:
    return leaderboard_info(client, "first")


def test_complete_trials_come_first_then_pruned_by_folds_then_failed(info: Leaderboard) -> None:
    assert info.trials["trial"].tolist() == [3, 2, 5, 4, 1, 0]
    assert info.trials["state"].tolist() == ["COMPLETE"] * 2 + ["PRUNED"] * 3 + ["FAILED"]


def test_only_complete_trials_are_ranked(info: Leaderboard) -> None:
    assert info.trials["rank"].tolist()[:2] == [1, 2]
    assert info.trials["rank"][2:].isna().all()


def test_scores_and_folds_are_those_logged(info: Leaderboard) -> None:
    assert info.folds == ["score_fold_0", "score_fold_1", "score_fold_2"]
    assert info.trials[info.folds].iloc[0].tolist() == [0.3, 0.4, 0.5]
    assert info.trials["score"][0] == pytest.approx(0.4)
    assert math.isnan(info.trials["score"].iloc[-1])


def test_champion_is_the_trial_that_the_sweep_names(info: Leaderboard) -> None:
    assert info.trials.loc[info.trials["champion"], "trial"].tolist() == [3]
    assert info.facts["champion"]["trial"] == 3


def test_settings_are_split_and_a_trial_without_any_does_not_count(info: Leaderboard) -> None:
    assert info.constants == EQUAL
    assert info.varying == {"aux_weight": True, "backbone": False, "genes": True}


def test_facts_of_the_sweep(info: Leaderboard) -> None:
    assert info.protocol == PROTOCOL
    assert info.facts["protocol_line"] == LINE
    assert info.facts["states"] == {"COMPLETE": 2, "PRUNED": 3, "RUNNING": 0, "FAILED": 1}
    assert info.facts["cost_seconds"] == 60 * 11
    assert info.facts["range"] == (-0.05, 0.5)


def test_evaluation_stands_beside_its_controls(info: Leaderboard) -> None:
    (evaluation,) = info.evaluations
    assert (evaluation["trial"], evaluation["patients"]) == (3, "BC90007")
    assert evaluation["medians"] == {
        "model": 0.33,
        "control: colour ridge": 0.2,
        "control: depth only": -0.05,
    }
    assert evaluation["genes_above"] == {0.0: 118, 0.3: 70}


def test_page_escapes_what_runs_say(info: Leaderboard) -> None:
    page = leaderboard_html(info)
    assert EVIL not in page
    assert page.count("&lt;script&gt;") == 3  # the reason; the backbone, shown and as a sort key
    assert page.count("<script>") == 1  # ours


def test_page_loads_nothing(info: Leaderboard) -> None:
    page = leaderboard_html(info)
    assert not re.search(r"""https?:|src=|<link|@import|url\(""", page)


def test_page_shows_protocol_rank_order_and_controls(info: Leaderboard) -> None:
    page = leaderboard_html(info)
    assert page.count(LINE) == 2  # of the sweep and of the evaluation
    assert page.index("champion</span>") < page.index("pruned\n")
    assert "control: depth only" in page
    assert "\N{MINUS SIGN}0.050" in page
    assert "0.0003162" in page


def test_sweep_without_trials_gives_a_page(client: MlflowClient) -> None:
    info = leaderboard_info(client, "empty")
    assert info.trials.empty
    assert "0 complete, 0 pruned" in leaderboard_html(info).replace("\n", "")


def test_sweep_without_scores_gives_a_page(client: MlflowClient) -> None:
    info = leaderboard_info(client, "it's second")
    assert info.trials["state"].tolist() == ["RUNNING"]
    page = leaderboard_html(info)
    assert "none chosen yet" in page
    assert "Not evaluated yet" in page


def test_unknown_sweep_is_refused_with_the_names(client: MlflowClient) -> None:
    with pytest.raises(
        ValueError, match="one of empty, first, it's second, mixed, odd; got 'third'"
    ):
        leaderboard_info(client, "third")


def test_a_sweep_begun_anew_shows_its_own_trials_only(client: MlflowClient) -> None:
    assert leaderboard_info(client, "mixed").trials.empty


def test_unknown_state_is_refused(client: MlflowClient) -> None:
    with pytest.raises(ValueError, match=r"state must be one of .* got 'DONE'"):
        leaderboard_info(client, "odd")


def test_main_writes_into_the_folder_of_the_sweep(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(sweep="first", runs=runs)
    written = runs / "first" / "leaderboard.html"
    assert written.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert capsys.readouterr().out == f"{written}\n"


def test_missing_database_is_refused_and_not_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mlflow\.db must exist"):
        main(sweep="first", runs=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.browser
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_clicking_a_header_sorts_with_missing_values_last(
    info: Leaderboard, tmp_path: Path
) -> None:
    click = "<script>document.querySelectorAll('th button')[3].click()</script></html>"
    page = tmp_path / "page.html"
    page.write_text(leaderboard_html(info).replace("</html>", click), encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
    flags += " --disable-background-networking --disable-component-update --disable-sync"
    command = ["chromium", *flags.split(), f"--user-data-dir={tmp_path}", "--dump-dom", str(page)]
    dom = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    shown = re.findall(r'class="n score" data-v="([^"]*)"', dom)
    assert [float(value) for value in shown[:-1]] == sorted(info.trials["score"].dropna())
    assert shown[-1] == ""
