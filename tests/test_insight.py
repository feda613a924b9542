"""What is told after a sweep, against studies with planted answers."""

from __future__ import annotations

import csv
import math
import re
import shutil
import subprocess
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
import pandas as pd
import pytest
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import RandomSampler
from optuna.study import StudyDirection
from optuna.trial import TrialState

from sweeps import importance as shares
from sweeps import insight

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

EVIL = "</script><script>alert('pwned')</script>"
NAMES = ["insight.html", "importance.csv", "trials.csv", "pareto.csv"]


def run(objective: Callable[[optuna.Trial], Any], trials: int, **kinds: Any) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    kinds = kinds or {"direction": "maximize"}
    study = optuna.create_study(sampler=RandomSampler(seed=0), study_name="planted", **kinds)
    study.optimize(objective, n_trials=trials, catch=(RuntimeError,))
    return study


def draw_point(trial: optuna.Trial) -> tuple[float, float]:
    """Score and cost; where AuxNet is there, its weight decides."""
    backbone = trial.suggest_categorical("backbone", ["small", "middle", EVIL])
    trial.suggest_categorical("genes", [250, 500, 1000])
    trial.suggest_categorical("hidden", [None, 128, "wide"])
    rate = trial.suggest_float("learning_rate", 3e-4, 0.3, log=True)
    score = {"small": 0.0, "middle": 0.05, EVIL: 0.1}[backbone]
    score -= 0.1 * (math.log10(rate) + 2.5) ** 2
    if trial.suggest_categorical("auxnet", [True, False]):
        score -= abs(math.log10(trial.suggest_float("aux_weight", 0.1, 100, log=True)) - 1)
    if trial.suggest_categorical("optimizer", ["sgd", "adamw"]) == "sgd":
        trial.suggest_float("momentum", 0.5, 0.99)
    cost = {"small": 60.0, "middle": 120.0, EVIL: 240.0}[backbone] + 0.1 * trial.number
    trial.set_user_attr("cost_seconds", cost)
    return score, cost


def one(trial: optuna.Trial) -> float:
    score, _ = draw_point(trial)
    trial.report(score, 500)
    if trial.number % 10 == 3:
        raise optuna.TrialPruned
    if trial.number % 10 == 7:
        raise RuntimeError(EVIL)
    trial.report(score, 2000)
    return score


@pytest.fixture(scope="module")
def study() -> optuna.Study:
    return run(one, 100)


@pytest.fixture(scope="module")
def pair() -> optuna.Study:
    return run(draw_point, 50, directions=["maximize", "minimize"])


@pytest.fixture(scope="module")
def written(study: optuna.Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "insight"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = insight.write(study, folder, title=f"Sweep {EVIL}", note=f"5 folds {EVIL}")
    assert [path.name for path in paths] == NAMES
    return folder


@pytest.fixture(scope="module")
def importance(written: Path) -> pd.DataFrame:
    return pd.read_csv(written / "importance.csv", keep_default_na=False, na_values=[""])


def first(table: pd.DataFrame, branch: str, column: str) -> str:
    rows = table[table["branch"] == branch].set_index("parameter")
    return str(rows[column].idxmax())


def by_force(study: optuna.Study, cost: Callable[[optuna.trial.FrozenTrial], float]) -> set[int]:
    points = {
        trial.number: (trial.values[0], -cost(trial))
        for trial in study.trials
        if trial.state == TrialState.COMPLETE
    }
    return {
        number
        for number, (a, b) in points.items()
        if not any(c >= a and d >= b and (c, d) != (a, b) for c, d in points.values())
    }


# Importances


@pytest.mark.parametrize("column", ["fanova", "ped_anova"])
def test_planted_parameter_comes_first_on_its_branch(importance: pd.DataFrame, column: str) -> None:
    assert first(importance, "auxnet = True", column) == "aux_weight"


@pytest.mark.parametrize("column", ["fanova", "ped_anova"])
@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_planted_parameter_comes_first_in_all_trials(direction: str, column: str) -> None:
    sign = 1 if direction == "maximize" else -1

    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("idle", 0, 1)
        x = trial.suggest_int("x", 1, 100, log=True)
        return sign * (trial.suggest_categorical("c", [None, 128]) == 128) * 0.2 - sign * abs(
            math.log10(x) - 1
        )

    table = shares.importance_table(run(objective, 60, direction=direction))
    assert first(table, "all", column) == "x"
    assert set(table["note"]) == {""}


def test_branches_are_named_by_what_separates_them(importance: pd.DataFrame) -> None:
    found = ["all", "auxnet = True", "optimizer = sgd"]
    early = [f"{label} after 0.5 folds" for label in found]
    assert list(importance["branch"].unique()) == [*found, *early]
    rows = importance.groupby("branch")["parameter"].agg(set)
    assert "aux_weight" not in rows["all"]
    assert {"aux_weight", "optimizer"} < rows["auxnet = True"]
    assert "auxnet" not in rows["auxnet = True"]


def test_shares_add_to_one_and_trials_are_counted(
    importance: pd.DataFrame, study: optuna.Study
) -> None:
    sums = importance.groupby("branch")[["fanova", "ped_anova"]].sum()
    assert sums.to_numpy() == pytest.approx(1)
    done = shares.complete(study)
    counts = importance.groupby("branch")["trials"].first()
    assert counts["all"] == len(done) == 80
    assert counts["auxnet = True"] == sum(trial.params["auxnet"] for trial in done)


def test_a_log_parameter_is_judged_on_its_logarithm() -> None:
    """A peak in the first decade of three: most of the variance, and a hundredth of the range."""

    def objective(trial: optuna.Trial) -> float:
        rate = trial.suggest_float("learning_rate", 3e-4, 0.3, log=True)
        peak = math.exp(-(((math.log10(rate) + 2.8) / 0.35) ** 2))
        return peak + 0.5 * trial.suggest_float("x", 0, 1)

    study = run(objective, 100)
    table = shares.importance_table(study).set_index("parameter")
    parts = np.array(
        [[t.value - 0.5 * t.params["x"], 0.5 * t.params["x"]] for t in shares.complete(study)]
    )
    variance = parts.var(axis=0)
    assert table.loc["learning_rate", "fanova"] == pytest.approx(
        variance[0] / variance.sum(), abs=0.1
    )


def test_a_branch_may_hang_on_several_values_or_on_two_parameters() -> None:
    def objective(trial: optuna.Trial) -> float:
        size = trial.suggest_categorical("size", ["s", "m", "l"])
        frozen = trial.suggest_categorical("frozen", [True, False])
        trial.suggest_float("rate", 0, 1)
        if size != "s":
            trial.suggest_float("drop", 0, 1)
            if not frozen:
                trial.suggest_float("deep", 0, 1)
        if trial.number % 2:
            trial.suggest_float("odd", 0, 1)
        return float(trial.number)

    found = shares.branches(shares.complete(run(objective, 30)))
    labels = {"all", "size = m or l", "frozen = False and size = m or l", "with odd"}
    assert {branch.label for branch in found} == labels


def test_few_trials_are_not_judged(tmp_path: Path) -> None:
    study = run(draw_point, 5, directions=["maximize", "minimize"])
    page = insight.write(study, tmp_path, title="few", note="")[0].read_text()
    table = shares.importance_table(study)
    assert table[["fanova", "ped_anova"]].isna().all(axis=None)
    everywhere = table[table["branch"] == "all"]
    assert set(everywhere["note"]) == {"not enough trials (5) to judge"}
    assert "not enough trials (5) to judge" in page


@pytest.mark.parametrize(
    ("objective", "note"),
    [
        (lambda trial: 0 * trial.suggest_float("x", 0, 1), "all scores are equal"),
        (lambda trial: trial.number * trial.suggest_int("x", 3, 3), "one value only"),
        (lambda trial: trial.suggest_float("x", 0, 1 + trial.number), "drawn from different"),
        (lambda trial: trial.suggest_float("x", 0, 1), "the only parameter that varies"),
        (lambda trial: float(trial.number), "no parameter"),
    ],
)
def test_what_cannot_be_judged_has_a_note(
    objective: Callable[[optuna.Trial], float], note: str
) -> None:
    (row,) = shares.importance_table(run(objective, 12)).to_dict("records")
    assert note in row["note"]
    assert math.isnan(row["fanova"])
    assert math.isnan(row["ped_anova"])


def test_scores_that_tie_at_the_top_are_no_equal_shares() -> None:
    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("y", 0, 1)
        return float(trial.suggest_float("x", 0, 1) > 0.02)

    table = shares.importance_table(run(objective, 100))
    assert first(table, "all", "fanova") == "x"
    study = run(lambda t: 1e-9 * objective(t), 100)
    assert first(shares.importance_table(study), "all", "fanova") == "x"


# Tables


def test_pareto_of_score_and_cost_is_the_brute_force_one(
    study: optuna.Study, written: Path
) -> None:
    table = pd.read_csv(written / "pareto.csv")
    assert set(table["number"]) == by_force(study, lambda trial: trial.user_attrs["cost_seconds"])
    assert table["score"].is_monotonic_decreasing
    assert table["score"][0] == pytest.approx(study.best_value)


def test_pareto_of_two_objectives_is_the_study_s_own(pair: optuna.Study) -> None:
    table = shares.pareto_table(pair)
    assert set(table["number"]) == {trial.number for trial in pair.best_trials}
    assert set(table["number"]) == by_force(pair, lambda trial: trial.values[1])
    assert list(table.columns[:3]) == ["number", "score", "cost"]


def test_pareto_without_costs_is_the_best_trial() -> None:
    study = run(lambda trial: trial.suggest_float("x", 0, 1), 10)
    assert shares.pareto_table(study)["number"].tolist() == [study.best_trial.number]


def test_a_trial_that_told_no_cost_is_not_on_the_front() -> None:
    def objective(trial: optuna.Trial) -> float:
        if trial.number:
            trial.set_user_attr("cost_seconds", 1.0)
        return -trial.suggest_float("x", trial.number, trial.number + 0.5)

    assert shares.pareto_table(run(objective, 5))["number"].tolist() == [1]


def test_trials_table_says_what_was_drawn(study: optuna.Study, written: Path) -> None:
    with (written / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["number"]) for row in rows] == list(range(100))
    for row, trial in zip(rows, study.trials, strict=True):
        assert row["state"] == trial.state.name
        assert row["score"] == ("" if trial.value is None else str(trial.value))
        assert float(row["cost_seconds"]) == trial.user_attrs["cost_seconds"]
        assert float(row["duration_seconds"]) >= 0
        assert row["params_hidden"] == str(trial.params["hidden"])  # None is a choice
        assert row["params_genes"] in ("250", "500", "1000")
        assert (row["params_momentum"] == "") == (trial.params["optimizer"] == "adamw")


# The page


def test_page_escapes_and_loads_nothing(written: Path) -> None:
    page = (written / "insight.html").read_text(encoding="utf-8")
    ours = page.replace(insight.offline.get_plotlyjs(), "", 1)
    assert len(ours) < 1e6 < len(page)
    assert "<h1>Sweep &lt;/script&gt;" in ours
    assert "5 folds &lt;/script&gt;" in ours
    assert "pwned')</script>" not in ours
    assert not re.search(r"<script[^>]+src|<link|@import|url\(|https?://", ours)


def test_page_has_its_sections_and_counts(written: Path) -> None:
    page = (written / "insight.html").read_text(encoding="utf-8")
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == [
        "Optimisation history",
        "Parameter importances",
        "Parallel coordinates",
        "Slices",
        "Parallel coordinates, all trials after 0.5 folds",
        "Slices, all trials after 0.5 folds",
        "Intermediate values",
        "Pareto front",
        "Timeline",
    ]
    assert "100 trials: 80 complete, 10 failed, 10 pruned." in page
    assert "biased sample" in page


def test_pruned_trials_count_at_the_first_report() -> None:
    """Pruning leaves alike survivors: only all trials' first scores show that x matters."""

    def objective(trial: optuna.Trial) -> float:
        x, y = trial.suggest_float("x", 0, 1), trial.suggest_float("y", 0, 1)
        trial.report(x, 250)
        if x < 0.9:
            raise optuna.TrialPruned
        return 0.1 * y

    study = run(objective, 60)
    early, when = shares.early_view(study)
    assert when == " after 0.25 folds"
    assert [t.value for t in early.trials] == [t.params["x"] for t in study.trials]
    assert first(shares.importance_table(study), f"all{when}", "fanova") == "x"
    whole = run(lambda trial: trial.suggest_float("x", 0, 1), 10)
    assert not shares.early_view(whole)[0].trials


def test_same_study_gives_the_same_bytes(tmp_path: Path) -> None:
    def objective(trial: optuna.Trial) -> float:
        return trial.suggest_float("x", 0, 1) + trial.suggest_float("y", 0, 1)

    study = run(objective, 20)
    once, again = (
        [path.read_bytes() for path in insight.write(study, tmp_path / name, title="t", note="n")]
        for name in ("once", "again")
    )
    assert once == again
    assert b"Contour of " in once[0]


def test_two_objectives_give_a_page_with_their_front(pair: optuna.Study, tmp_path: Path) -> None:
    page = insight.write(pair, tmp_path, title="pair", note="")[0].read_text(encoding="utf-8")
    assert "no other trial beats it in score and cost at once" in page
    assert "Intermediate values" not in page
    assert "biased" not in page
    table = pd.read_csv(tmp_path / "importance.csv")
    assert first(table, "auxnet = True", "ped_anova") == "aux_weight"


def test_the_study_s_own_names_are_used(tmp_path: Path) -> None:
    study = run(draw_point, 8, directions=["maximize", "minimize"])
    with pytest.warns(ExperimentalWarning):
        study.set_metric_names(["median_pcc", "gpu_hours"])
    paths = insight.write(study, tmp_path, title="named", note="")
    assert paths[2].read_text().startswith("number,state,median_pcc,gpu_hours,cost_seconds")
    assert "median_pcc and gpu_hours" in paths[0].read_text(encoding="utf-8")


@pytest.mark.parametrize("kinds", [{"direction": "minimize"}, {"directions": ["maximize"] * 2}])
@pytest.mark.parametrize("error", [RuntimeError, optuna.TrialPruned, None])
def test_study_without_complete_trials_gives_a_page(
    error: type[Exception] | None, kinds: dict[str, Any], tmp_path: Path
) -> None:
    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("x", 0, 1)
        assert error is not None
        raise error

    study = run(objective, 3 if error else 0, **kinds)
    paths = insight.write(study, tmp_path, title="none", note="")
    assert "not enough trials (0) to judge" in paths[0].read_text(encoding="utf-8")
    assert paths[3].read_text().startswith("number,score")


def test_unfinished_and_infinite_trials_do_not_raise(tmp_path: Path) -> None:
    study = run(lambda t: t.suggest_float("x", 0, 1) / (t.number != 4 or math.inf), 12)
    study.add_trial(optuna.create_trial(value=math.inf, params={}, distributions={}))
    study.ask()
    study.enqueue_trial({"x": 0.5})
    paths = insight.write(study, tmp_path, title="rest", note="")
    assert pd.read_csv(paths[2])["state"].tolist()[-2:] == ["RUNNING", "WAITING"]
    assert pd.read_csv(paths[3])["number"].tolist() == [
        study.trials.index(max(study.trials[:12], key=lambda trial: trial.value))
    ]


def test_many_trials_are_thinned_evenly_with_the_best() -> None:
    study = optuna.create_study(direction="maximize")
    study.add_trials([optuna.create_trial(value=float(value)) for value in range(1000)])
    few = [trial.value for trial in shares.thinned(study).trials]
    assert max(few) == 999
    assert len(few) == shares.DRAWN
    assert set(np.diff(sorted(few))) == {5}
    assert shares.score_view(study).direction == StudyDirection.MAXIMIZE


@pytest.mark.browser
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_every_figure_is_drawn(written: Path, tmp_path: Path) -> None:
    page = written / "insight.html"
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
    flags += " --disable-background-networking --disable-component-update --disable-sync"
    command = ["chromium", *flags.split(), f"--user-data-dir={tmp_path}"]
    command += ["--virtual-time-budget=8000", "--dump-dom", str(page)]
    dom = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    figures = set(re.findall(r'id="(figure-\d+)"', page.read_text(encoding="utf-8")))
    drawn = re.findall(
        r'id="figure-\d+" class="plotly-graph-div[^>]*><div class="plot-container', dom
    )
    assert len(drawn) == len(figures)
    assert "alert('pwned')</script>" not in dom.split("</head>")[1]
