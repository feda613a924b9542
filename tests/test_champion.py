"""Who is chosen and why, what lies in the champion's folder, what the registry is told."""

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from jsonargparse import Namespace
from mlflow import MlflowClient
from mlflow.entities import Run
from scipy import stats
from trainings import CPU, quiet, same_bits, with_training

from brstnet.config import Protocol, Settings, Training, build, read_yaml, to_yaml
from brstnet.data.store import Store
from brstnet.evaluation.evaluate import evaluate
from brstnet.evaluation.predict import find_checkpoints
from brstnet.training import checkpoint
from brstnet.training.folds import ALL, make_folds
from brstnet.training.keep import finished
from brstnet.training.train import fit
from sweeps import gather as gathering
from sweeps import tracking
from sweeps.card import bootstrap, mean_interval
from sweeps.champion import crown, describe_leaderboard, promote, read_outcomes
from sweeps.choice import Choice, Outcome, by_hand, choose
from sweeps.evaluate import earlier_looks, log_evaluation
from sweeps.gather import gather
from sweeps.refit import median_epochs, refit, refit_folder, refit_settings
from sweeps.space import Sweep

HELD_OUT = "BC90006"


def outcome(
    trial: int, score: float | None, cost: float = 100.0, seed: int = 0, **more: Any
) -> Outcome:
    """One ended trial; by default complete, with two folds and no sections."""
    name = f"{trial:04d}" + (f"-seed{seed}" if seed else "")
    return {
        "trial": trial,
        "seed": seed,
        "state": "COMPLETE",
        "config": {"genes": 60},
        "score": score,
        "scores": [score, score] if score is not None else [],
        "sections": {},
        "cost_seconds": cost,
        "reason": "",
        "folder": f"runs/demo/trials/{name}",
        **more,
    }


def sections(values: Sequence[float | None]) -> dict[str, float | None]:
    return {f"S{number}": value for number, value in enumerate(values)}


# The choice --------------------------------------------------------------------------------------


def test_the_cheaper_one_is_taken_when_no_test_tells_it_from_the_best() -> None:
    best = outcome(7, 0.357, cost=100, sections=sections([0.30, 0.40, 0.35, 0.38, 0.36]))
    near = outcome(12, 0.352, cost=41, sections=sections([0.31, 0.38, 0.36, 0.36, 0.355]))
    choice = choose([best, near])
    assert (choice.chosen.trial, choice.best.trial) == (12, 7)
    assert choice.reason == (
        "trial 12: within one standard error of trial 7 (0.352 against 0.357, "
        "difference 0.005 ± 0.007 over 5 sections, p = 0.28) at 41% of its cost"
    )
    row = choice.table.set_index("trial").loc[12]
    differences = np.array([-0.01, 0.02, -0.01, 0.02, 0.005])
    assert row["difference"] == pytest.approx(differences.mean())
    assert row["error"] == pytest.approx(stats.sem(differences))
    assert row["p"] == pytest.approx(stats.wilcoxon(differences, alternative="greater").pvalue)


def test_the_cheaper_one_is_not_taken_when_it_is_worse_on_every_section() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0.35, 0.05, 8)
    best = outcome(1, 0.35, sections=sections(values))
    worse = outcome(2, 0.33, cost=1, sections=sections(values - rng.uniform(0.01, 0.03, 8)))
    choice = choose([best, worse])
    assert choice.chosen.trial == 1
    assert "no other is within one standard error" in choice.reason


def test_within_one_error_but_worse_by_the_test_is_not_taken() -> None:
    """One section that is far better hides in the mean that seven are worse."""
    differences = np.array([0.02, 0.021, 0.022, 0.023, 0.024, 0.025, 0.026, 0.027, -0.1])
    best = outcome(1, 0.35, sections=sections(0.4 + differences))
    other = outcome(2, 0.34, cost=1, sections=sections(np.full(9, 0.4)))
    row = choose([best, other]).table.set_index("trial").loc[2]
    assert row["difference"] < row["error"]
    assert row["p"] > 0.05  # so few sections: the test alone would let it pass
    more = np.concatenate([differences, 0.02 + np.arange(8) / 2000])
    best = outcome(1, 0.35, sections=sections(0.4 + more))
    other = outcome(2, 0.34, cost=1, sections=sections(np.full(17, 0.4)))
    choice = choose([best, other])
    assert choice.chosen.trial == 1
    assert choice.table.set_index("trial").loc[2, "p"] < 0.05


@pytest.mark.parametrize(("cost", "chosen"), [(80.0, 2), (81.0, 1), (100.0, 1), (120.0, 1)])
def test_only_a_clearly_lower_cost_counts(cost: float, chosen: int) -> None:
    same = sections([0.3, 0.4, 0.5, 0.6, 0.7])
    twins = [outcome(1, 0.4, sections=same), outcome(2, 0.4, cost=cost, sections=same)]
    choice = choose(twins)
    assert choice.chosen.trial == chosen
    assert choice.table.set_index("trial").loc[2, "p"] == 1.0  # all differences are zero
    assert ("none for at most 80% of its cost" in choice.reason) == (chosen == 1)


def test_of_equally_cheap_ones_the_better_is_taken_and_then_the_earlier() -> None:
    far = sections([0.2, 0.4, 0.6, 0.3, 0.3])

    def near(trial: int, score: float, cost: float) -> Outcome:
        return outcome(trial, score, cost, sections=sections([0.25, 0.35, 0.6, 0.3, 0.3]))

    best = outcome(9, 0.42, 1000, sections=far)
    assert choose([best, near(1, 0.40, 100), near(2, 0.41, 110)]).chosen.trial == 2
    assert choose([best, near(2, 0.41, 110), near(1, 0.41, 110)]).chosen.trial == 1
    assert choose([best, near(1, 0.40, 100), near(2, 0.41, 200)]).chosen.trial == 1
    assert choose([outcome(3, 0.4, 0.0), outcome(4, 0.4, 0.0)]).chosen.trial == 3


def test_two_folds_and_sections_that_say_nothing_are_enough() -> None:
    nothing = {"S0": math.nan, "S1": None, "S2": 0.3}
    a = outcome(1, 0.35, scores=[0.3, 0.4], sections=nothing)
    b = outcome(2, 0.34, cost=10, scores=[0.31, 0.37], sections=sections([0.3, 0.3, math.nan]))
    choice = choose([a, b])
    assert choice.table["over"].tolist() == ["folds", "folds"]
    assert choice.table["n"].tolist() == [2, 2]
    assert choice.chosen.trial == 1  # whatever it costs: two folds can call nothing worse
    assert "over 2 folds no test could tell a cheaper one from a worse one" in choice.reason
    assert choice.chosen.sections == {"S2": 0.3}


def test_one_configuration_is_the_champion() -> None:
    states = [outcome(n, None, state="FAILED", reason="loss") for n in (1, 2)]
    choice = choose([outcome(5, 0.2), *states])
    assert choice.chosen.trial == 5
    assert "only configuration" in choice.reason
    assert choice.searched == {"COMPLETE": 1, "FAILED": 2}


def test_without_a_complete_trial_the_reasons_are_told() -> None:
    pruned = outcome(1, 0.9, state="PRUNED")
    failed = outcome(2, None, state="FAILED", reason="the loss is nan")
    with pytest.raises(ValueError, match=r"runs/demo: no trial .* PRUNED; the loss is nan"):
        choose([pruned, failed])
    with pytest.raises(ValueError, match="no trial completed all folds: none has ended"):
        choose([])
    with pytest.raises(ValueError, match="must be one of one_se, best, got 'cheap'"):
        choose([outcome(1, 0.1)], "cheap")


def test_only_those_with_several_seeds_are_candidates_and_their_means_are_compared() -> None:
    lucky = outcome(1, 0.50)
    finalists = [
        outcome(2, 0.48, scores=[0.40, 0.56]),
        outcome(2, 0.30, seed=1, scores=[0.30, 0.30]),
        outcome(3, 0.45, 95.0, sections=sections([0.4, None, 0.5])),
        outcome(3, 0.43, 105.0, seed=1, sections=sections([0.2, 0.3, 0.4])),
        outcome(4, 0.47),
        outcome(4, None, seed=1, state="FAILED"),
    ]
    choice = choose([lucky, *finalists])
    assert choice.table["trial"].tolist() == [3, 2]
    assert choice.chosen.trial == 3
    assert choice.chosen.score == pytest.approx(0.44)
    assert choice.chosen.sections == pytest.approx({"S0": 0.3, "S1": 0.3, "S2": 0.45})
    assert choice.chosen.cost == 100
    assert (choice.chosen.seed, choice.chosen.folder.name) == (0, "0003")
    assert choice.chosen.spread == pytest.approx(0.02 / math.sqrt(2))
    assert "(means of 2 training seeds)" in choice.reason
    assert choice.searched == {"COMPLETE": 4}  # repeats are no new configurations


def some_outcomes(rng: np.random.Generator) -> list[Outcome]:
    """A sweep as it may come out: states, scores, costs and missing sections at random."""
    found = []
    for trial in range(int(rng.integers(1, 12))):
        state = str(rng.choice(["COMPLETE", "PRUNED", "FAILED"], p=[0.6, 0.3, 0.1]))
        for seed in range(int(rng.choice([1, 1, 3]) if state == "COMPLETE" else 1)):
            values = np.round(rng.normal(0.3, 0.03, int(rng.integers(0, 6))), 2)
            gaps = [None if rng.random() < 0.1 else float(v) for v in values]
            score = None if state == "FAILED" else float(rng.normal(0.3, 0.03))
            cost = float(rng.uniform(10, 100))
            one = outcome(trial, score, cost, seed, state=state, sections=sections(gaps))
            found.append(one)
    return found if any(o["state"] == "COMPLETE" for o in found) else [*found, outcome(99, 0.1)]


@pytest.mark.parametrize("seed", range(60))
def test_whatever_comes_out_the_choice_keeps_its_promises(seed: int) -> None:
    outcomes = some_outcomes(np.random.default_rng(seed))
    best, ruled = choose(outcomes, "best"), choose(outcomes)
    shuffled = [outcomes[i] for i in np.random.default_rng(seed).permutation(len(outcomes))]
    assert choose(shuffled).reason == ruled.reason
    for choice in (best, ruled):
        assert all(o["state"] == "COMPLETE" for o in choice.chosen.outcomes)
        assert choice.best.score == choice.table["score"].max()
        assert str(choice.chosen.trial) in choice.reason
    assert best.chosen == best.best
    if ruled.chosen.trial != ruled.best.trial:
        row = ruled.table.set_index("trial").loc[ruled.chosen.trial]
        assert row["as_good"]
        assert row["difference"] <= row["error"]
        assert row["p"] >= 0.05
        assert ruled.chosen.cost <= 0.8 * ruled.best.cost
    if any(o["seed"] for o in outcomes):
        assert len(ruled.chosen.outcomes) > 1


def test_a_choice_by_hand_needs_all_folds_and_says_what_the_rule_would_take() -> None:
    outcomes = [outcome(1, 0.4), outcome(2, 0.2), outcome(3, 0.1, state="PRUNED")]
    choice = by_hand(outcomes, 2)
    assert (choice.chosen.trial, choice.rule) == (2, "hand")
    assert "promoted by hand" in choice.reason
    assert "The rule takes trial 1" in choice.reason
    with pytest.raises(ValueError, match=r"trial 3 is PRUNED.* COMPLETE are 1, 2"):
        by_hand(outcomes, 3)
    with pytest.raises(ValueError, match="trial 8 is not there"):
        by_hand(outcomes, 8)


# Intervals ---------------------------------------------------------------------------------------


def test_the_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for draw in range(300):
        low, high = bootstrap(rng.normal(0.3, 0.1, 30), seed=draw)
        inside += low <= 0.3 <= high
    assert 0.90 <= inside / 300 <= 0.98


def test_an_interval_is_the_same_every_time_and_that_of_numpy() -> None:
    values = [0.1, 0.2, 0.4, 0.3]
    drawn = np.random.default_rng(0).choice(values, (2000, 4)).mean(axis=1)
    assert bootstrap(values) == tuple(np.percentile(drawn, [2.5, 97.5]))
    assert all(np.isnan(bootstrap([0.3])))


def test_patients_are_drawn_and_sections_where_they_are_too_few() -> None:
    table = pd.DataFrame({"patient": list("AABC"), "pcc": [0.1, 0.3, 0.4, 0.6]})
    found = mean_interval(table)
    assert (found.n, found.over) == (3, "patients")
    assert found.mean == pytest.approx(0.4)  # a patient counts once
    assert (found.low, found.high) == bootstrap([0.2, 0.4, 0.6])
    two = mean_interval(table[table["patient"] != "C"])
    assert (two.n, two.over) == (3, "sections")
    one = mean_interval(table.iloc[:1])
    assert str(one) == "0.100 (no interval: n = 1 sections)"
    nothing = mean_interval(table.assign(pcc=np.nan))
    assert nothing.n == 0
    assert np.isnan(nothing.mean)


# The leaderboard ---------------------------------------------------------------------------------


def a_sweep(name: str = "demo") -> Sweep:
    return Sweep(name=name, trials=3, protocol=Protocol(folds=2, held_out=(HELD_OUT,)))


def test_the_leaderboard_prints_the_best_and_counts_the_others() -> None:
    many = [outcome(n, 0.3 + n / 1000, config={"genes": n}) for n in range(60)]
    many += [outcome(60 + n, 0.2, state="PRUNED", scores=[0.2]) for n in range(4)]
    lines = describe_leaderboard(many, a_sweep()).splitlines()
    assert "held out BC90006" in lines[1]
    assert lines[2].split() == ["rank", "trial", "state", "score", "folds", "settings"]
    assert lines[3].split() == ["1", "59", "COMPLETE", "0.3590", "0.359", "0.359", "genes=59"]
    assert len(lines) == 3 + 20 + 2
    assert lines[-2] == "and 44 more: 40 COMPLETE, 4 PRUNED"
    assert len({line.index("genes=") for line in lines[3:-2]}) == 1


def test_the_leaderboard_shows_finalists_first_with_their_spread() -> None:
    outcomes = [
        outcome(1, 0.5),
        outcome(2, 0.4),
        outcome(2, 0.3, seed=1),
        outcome(3, None, state="FAILED"),
    ]
    lines = describe_leaderboard(outcomes, a_sweep()).splitlines()
    assert " ".join(lines[2].split()) == "rank trial state score seeds ± folds settings"
    assert lines[3].split()[:6] == ["1", "2", "COMPLETE", "0.3500", "2", "0.0707"]
    assert lines[4].split()[:6] == ["2", "1", "COMPLETE", "0.5000", "1", "-"]
    assert lines[5].split()[:4] == ["-", "3", "FAILED", "-"]
    assert lines[2].index("settings") == lines[3].index("genes=60") == lines[5].index("genes=60")


# Gathering ---------------------------------------------------------------------------------------


def plant_fold(folder: Path, settings: Settings, number: int, score: float, epoch: int = 1) -> None:
    """A finished fold with the files that a champion needs; its weights are words."""
    best = folder / ("best" if settings.training.stopping == "early" else "last")
    best.mkdir(parents=True)
    (best / "model.safetensors").write_text(f"weights {score}")
    (best / "optimizer.safetensors").write_text("momentum")
    validated = [f"P{patient}_S1" for patient in range(number, 4, 2)]
    facts = {
        "format": "brstnet-checkpoint",
        "version": 1,
        "versions": {"brstnet": "0.3.0", "torch": "2.9", "timm": "1.0.31"},
        "settings": json.loads(json.dumps(dataclasses.asdict(settings))),
        "fold": {"number": number, "train": ["P1_S1", "P3_S1"], "held_out": ["P9_S1", "P9_S2"]},
        "store": {
            "digest": "f00dcafe",
            "prepare": {"layout": "stnet", "stain_target": None, "held_out": ["P9"]}
            | {"window_px": 224, "input_px": 224},
            "stain_target": {"section": "P1_S1", "patient": "P1"},
        },
        "machine": {"device": "cpu", "precision": "float32", "threads": 1, "workers": 1},
        "scores": {"score": score},
    }
    (best / "checkpoint.json").write_text(json.dumps(facts))
    rows = [
        {"gene": gene, "section": name, "patient": name[:2], "pcc": score + 0.01 * gene, "n": 20}
        for name in validated
        for gene in range(3)
    ]
    pd.DataFrame(rows).to_parquet(best / "validation.parquet")
    result = {"checkpoint": best.name, "score": score, "epoch": epoch, "epochs": 9, "seconds": 1.0}
    (folder / "result.json").write_text(json.dumps(result))


def plant_trial(sweep: Path, told: Outcome, **training: Any) -> None:
    """A trial's folder: its outcome, its settings, two folds."""
    told = {k: v for k, v in told.items() if k != "folder"}
    seed = told["seed"]
    folder = sweep / "trials" / (f"{told['trial']:04d}" + (f"-seed{seed}" if seed else ""))
    folder.mkdir(parents=True)
    settings = Settings(
        protocol=Protocol(folds=2, held_out=("P9",), panel_size=3),
        training=Training(genes=60, seed=seed, **training),
    )
    (folder / "settings.yaml").write_text(to_yaml(settings))
    for number in range(len(told["scores"])):
        plant_fold(folder / f"fold_{number}", settings, number, told["score"], epoch=3 + number)
    (folder / "outcome.json").write_text(json.dumps(told))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep of four trials: 0 best, 1 clearly worse, 2 pruned, 3 failed; 0 again with a seed."""
    folder = tmp_path / "runs" / "demo"
    told = sections([0.4, 0.42, 0.38, 0.41])
    plant_trial(folder, outcome(0, 0.4, sections={f"P{n}_S1": 0.4 + n / 100 for n in range(4)}))
    plant_trial(folder, outcome(1, 0.2, sections=told))
    plant_trial(folder, outcome(2, 0.3, state="PRUNED", scores=[0.3]))
    plant_trial(folder, outcome(3, None, state="FAILED", reason="the loss is nan"))
    (folder / "sweep.yaml").write_text("name: demo\n")
    return folder


def test_outcomes_are_read_best_first_and_old_ones_too(sweep: Path) -> None:
    file = sweep / "trials" / "0001" / "outcome.json"
    old = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in old.items() if k not in ("seed", "sections")}))
    plant_trial(sweep, outcome(0, 0.41, seed=1))
    found = read_outcomes(sweep)
    assert [(o["trial"], o["seed"]) for o in found] == [(0, 1), (0, 0), (1, 0), (2, 0), (3, 0)]
    assert Path(found[0]["folder"]).name == "0000-seed1"
    assert found[2]["sections"] == {}


def gathered(sweep: Path, **more: Any) -> tuple[Choice, Path]:
    choice = choose(read_outcomes(sweep))
    return choice, gather(sweep, choice, **more)


def test_a_champion_is_gathered_with_its_card(sweep: Path) -> None:
    choice, place = gathered(sweep, store="/data/the store")
    assert choice.chosen.trial == 0
    names = {"fold_0", "fold_1", "settings.yaml", "sweep.yaml", "champion.json", "README.md"}
    assert {p.name for p in place.iterdir()} == names
    assert {p.name for p in (place / "fold_0").iterdir()} == {
        "checkpoint.json",
        "model.safetensors",
        "validation.parquet",
    }
    assert find_checkpoints(place) == [place / "fold_0", place / "fold_1"]
    facts = json.loads((place / "champion.json").read_text())
    assert (facts["trial"], facts["seed"], facts["refit"]) == (0, 0, False)
    assert facts["sections"] == {f"P{n}_S1": 0.4 + n / 100 for n in range(4)}
    assert facts["searched"] == {"COMPLETE": 2, "PRUNED": 1, "FAILED": 1}
    assert build(Settings, facts["settings"], "here").training.genes == 60
    card = (place / "README.md").read_text()
    for heading in ("Model", "Training data", "Scores", "How it was chosen", "Limits", "How to"):
        assert f"## {heading}" in card
    low, high = bootstrap([0.4, 0.41, 0.42, 0.43])
    for said in (
        "2 folds by patient; held out P9",
        "score 0.4000; by fold 0.4000, 0.4000",
        f"0.415, 95 % interval {low:.3f} to {high:.3f} (n = 4 patients)",
        "| P3 | P3_S1 | 1 | 20 | 0.4300 |",
        "4 configurations were searched: 2 complete, 1 failed, 1 pruned",
        "optimistic",
        "Not for clinical use",
        "store f00dcafe: /data/the store",
        "held out, in no fold and no choice: P9 (2 sections)",
        f"train '/data/the store' --config {place}/settings.yaml --fold $fold",
        f"sweeps/run.py {place}/sweep.yaml --store '/data/the store'",
        "models:/brstnet@champion '/data/the store' --patients P9",
        "--layout stnet --held_out '[P9]' --window_px 224",
        "torch 2.9",
    ):
        assert said in card, said
    assert "within-patient" not in card
    assert "Folds are by section" not in card


def test_the_card_says_what_few_patients_sections_and_seeds_mean(sweep: Path) -> None:
    plant_trial(sweep, outcome(0, 0.3, seed=1, sections={"P0_S1": 0.2}))
    plant_trial(sweep, outcome(1, 0.2, seed=1))
    for file in sweep.glob("trials/*/settings.yaml"):
        file.write_text(file.read_text().replace("group: patient", "group: section"))
    for file in sweep.glob("trials/*/fold_*/*/validation.parquet"):
        table = pd.read_parquet(file)
        table.assign(patient="P0").to_parquet(file)
    choice, place = gathered(sweep)
    card = (place / "README.md").read_text()
    assert choice.chosen.score == pytest.approx(0.35)
    for said in (
        "score 0.3500",
        "by training seed 0.4000, 0.3000 (standard deviation 0.0707)",
        "trained with 2 seeds; models of the others are not in here",
        "| P0 | P0_S1 | 0 | 20 | 0.3000 |",
        "(n = 4 sections)",
        "fewer than 3 patients: sections were drawn",
        "Folds are by section: sections of one patient train and validate",
    ):
        assert said in card, said


def test_a_crash_while_gathering_leaves_the_old_champion_whole(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, place = gathered(sweep)
    before = {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}
    other = by_hand(read_outcomes(sweep), 1)
    with monkeypatch.context() as patch:
        copied = iter([True, False])
        real = gathering.shutil.copytree

        def dies(*args: Any, **more: Any) -> Any:
            if not next(copied):
                raise KeyboardInterrupt
            return real(*args, **more)

        patch.setattr(gathering.shutil, "copytree", dies)
        with pytest.raises(KeyboardInterrupt):
            gather(sweep, other)
    assert {p: p.read_bytes() for p in place.rglob("*") if p.is_file()} == before
    gather(sweep, other)
    assert json.loads((place / "champion.json").read_text())["trial"] == 1
    assert (place / "fold_0" / "model.safetensors").read_text() == "weights 0.2"
    assert "promoted by hand" in (place / "README.md").read_text()
    assert not list(sweep.glob("champion.*"))


def test_a_crash_between_the_renames_is_mended_by_the_next_call(sweep: Path) -> None:
    choice, place = gathered(sweep)
    place.rename(sweep / "champion.old")
    (sweep / "champion.tmp" / "fold_0").mkdir(parents=True)
    assert gather(sweep, choice) == place
    assert len(find_checkpoints(place)) == 2
    assert not list(sweep.glob("champion.*"))


def test_models_that_are_there_are_not_copied_again(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice, place = gathered(sweep)
    (place / "README.md").unlink()
    (sweep / "sweep.yaml").write_text("name: demo\ntrials: 9\n")
    monkeypatch.delattr(gathering.shutil, "copytree")
    gather(sweep, choice)
    assert (place / "README.md").is_file()
    assert "trials: 9" in (place / "sweep.yaml").read_text()


@pytest.mark.parametrize("lost", ["fold_1/result.json", "fold_1/last/model.safetensors"])
def test_missing_checkpoints_are_told(sweep: Path, lost: str) -> None:
    fixed = sweep / "trials" / "0005"
    plant_trial(sweep, outcome(5, 0.9), stopping="fixed")
    (fixed / lost).unlink()
    with pytest.raises(ValueError, match=r"0005: no checkpoint of fold_1 is here; bring"):
        gathered(sweep)
    assert not (sweep / "champion").exists()


def test_missing_settings_are_told(sweep: Path) -> None:
    (sweep / "trials" / "0000" / "settings.yaml").unlink()
    with pytest.raises(ValueError, match=r"settings\.yaml: missing"):
        gathered(sweep)


# The registry ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables take seconds to make: they are made once."""
    folder = tmp_path_factory.mktemp("mlflow")
    MlflowClient(f"sqlite:///{folder / 'mlflow.db'}").search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def client(sweep: Path, empty_database: Path) -> MlflowClient:
    """A database beside the sweep, with a run of it and of its trials."""
    out = sweep.parent
    (out / "mlflow.db").write_bytes(empty_database.read_bytes())
    uri = tracking.local_uri(out)
    client = tracking.connect(uri)
    experiment = tracking.experiment(client, out, uri)
    tags = {"brstnet.sweep": "demo"}
    parent = tracking.start_run(client, experiment, "sweep", "demo", tags)
    tracking.write_runs(sweep, {"sweep": parent})
    for folder in (sweep / "trials").iterdir():
        numbered = {**tags, "brstnet.trial": str(int(folder.name[:4]))}
        run = tracking.start_run(client, experiment, "trial", folder.name, numbered, parent)
        fold = tracking.start_run(client, experiment, "fold", "fold 0", tags, run)
        tracking.write_runs(folder, {"trial": run, "fold_0": fold})
    return client


def versions(client: MlflowClient) -> list[str]:
    return sorted(str(v.version) for v in client.search_model_versions("name = 'brstnet'"))


@pytest.mark.slow
def test_the_champion_is_registered_once_however_often_it_is_crowned(
    sweep: Path, client: MlflowClient
) -> None:
    choice = choose(read_outcomes(sweep))
    runs = tracking.read_runs(sweep / "trials" / "0000")
    assert crown(client, sweep, choice) == "1"
    (sweep / "champion.json").unlink()  # as after a crash before it was written
    client.delete_registered_model_alias("brstnet", "champion")
    assert crown(client, sweep, choice) == "1"
    assert versions(client) == ["1"]
    version = client.get_model_version_by_alias("brstnet", "champion")
    assert version.run_id == runs["trial"]
    assert version.tags["brstnet.sweep"] == "demo"
    assert version.tags["brstnet.trial"] == "0"
    assert version.tags["brstnet.rule"] == "one_se"
    assert version.tags["brstnet.reason"] == choice.reason
    assert float(version.tags["score"]) == 0.4
    assert "held out P9" in version.tags["brstnet.protocol_line"]
    assert choice.reason in version.description
    names = {a.path for a in client.list_artifacts(runs["trial"], "champion")}
    assert "champion/README.md" in names
    assert json.loads((sweep / "champion.json").read_text()) == {
        "trial": 0,
        "version": "1",
        "run": runs["trial"],
        "rule": "one_se",
    }
    own = client.get_run(tracking.read_runs(sweep)["sweep"]).data
    assert own.tags["brstnet.champion"] == runs["trial"]


@pytest.mark.slow
def test_another_is_promoted_by_hand_and_back(sweep: Path, client: MlflowClient) -> None:
    out = sweep.parent
    crown(client, sweep, choose(read_outcomes(sweep)))
    assert promote(client, out, "demo/1") == "2"
    assert promote(client, out, "demo/0001") == "2"
    version = client.get_model_version_by_alias("brstnet", "champion")
    assert (str(version.version), version.tags["brstnet.rule"]) == ("2", "hand")
    assert "Trial 1: promoted by hand" in (sweep / "champion" / "README.md").read_text()
    first = tracking.read_runs(sweep / "trials" / "0000")["trial"]
    assert promote(client, out, first) == "1"
    version = client.get_model_version_by_alias("brstnet", "champion")
    assert (str(version.version), version.tags["brstnet.rule"]) == ("1", "hand")
    assert versions(client) == ["1", "2"]
    assert (sweep / "champion" / "fold_0" / "model.safetensors").read_text() == "weights 0.4"


@pytest.mark.slow
def test_a_refit_that_came_later_makes_a_new_version(sweep: Path, client: MlflowClient) -> None:
    choice = choose(read_outcomes(sweep))
    assert crown(client, sweep, choice) == "1"
    settings = gathering.read_settings(choice.chosen.folder)
    out = refit_folder(sweep, 0)
    plant_fold(out, settings, ALL, 0.4)
    (out / "settings.yaml").write_text(to_yaml(settings))
    assert crown(client, sweep, choice) == "2"
    assert len(find_checkpoints(sweep / "champion")) == 2  # the folds' alone


@pytest.mark.slow
def test_what_cannot_be_promoted_is_told_with_what_to_do(sweep: Path, client: MlflowClient) -> None:
    out = sweep.parent
    fold = tracking.read_runs(sweep / "trials" / "0000")["fold_0"]
    for run, message in (
        ("demo/2", "trial 2 is PRUNED: a champion needs all folds trained; COMPLETE are 0, 1"),
        ("demo/7", "trial 7 is not there"),
        ("other/1", "no trial has ended here; --out must be the sweeps' folder"),
        ("demo/best", "must be SWEEP/TRIAL, such as demo/3"),
        ("0123456789abcdef0123456789abcdef", "no such run in MLflow"),
        (fold, "this run is of kind fold: a champion is a trial"),
    ):
        with pytest.raises(ValueError, match=message):
            promote(client, out, run)
    (sweep / "trials" / "0001" / "mlflow.json").unlink()
    with pytest.raises(ValueError, match="was not tracked"):
        promote(client, out, "demo/1")
    assert versions(client) == []


# Looks at held-out patients ----------------------------------------------------------------------


@pytest.mark.slow
def test_every_look_at_a_held_out_patient_is_counted(
    sweep: Path, client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same patients, with any model, and though its run was deleted since."""
    one_a_page = functools.partial(client.search_runs, max_results=1)
    monkeypatch.setattr(client, "search_runs", one_a_page)
    trials = [tracking.read_runs(sweep / "trials" / f"{n:04d}")["trial"] for n in range(2)]
    (tmp_path / "out").mkdir()
    result: Any = SimpleNamespace(protocol={"line": "judged"}, summary={"median_pcc": 0.3})
    told = []
    for trial, patients in ((0, ["B"]), (0, ["A", "B"]), (1, ["BC"]), (1, ["B", "C"]), (1, ["B"])):
        looks = earlier_looks(client, trials[trial], patients)
        told.append((looks.evaluations, looks.models))
        options = Namespace(patients=patients, model="models:/brstnet/1", out=tmp_path / "out")
        log_evaluation(client, trials[trial], options, result, looks)
        run = max(runs_of(client, "evaluation"), key=lambda r: int(r.info.start_time))
        assert run.data.tags["brstnet.earlier_evaluations"] == str(looks.evaluations)
        client.delete_run(run.info.run_id)
    assert told == [(0, 0), (1, 1), (0, 0), (2, 1), (3, 2)]


def runs_of(client: MlflowClient, kind: str) -> list[Run]:
    """The runs of a kind that are not deleted."""
    (experiment,) = client.search_experiments(filter_string="name = 'brstnet'")
    return list(client.search_runs([experiment.experiment_id], f"tags.`brstnet.kind` = '{kind}'"))


# The refit ---------------------------------------------------------------------------------------


def test_a_refit_takes_the_median_of_the_epochs_that_the_folds_models_had(sweep: Path) -> None:
    plant_trial(sweep, outcome(5, 0.9), stopping="early", schedule="cosine", epochs=50)
    plant_trial(sweep, outcome(5, 0.8, seed=1), stopping="early", schedule="cosine", epochs=50)
    chosen = choose(read_outcomes(sweep)).chosen
    file = Path(chosen.outcomes[1]["folder"]) / "fold_1" / "result.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "epoch": 30}))
    assert median_epochs(chosen, 2) == 5  # of 4, 5, 4, 31: 4.5, rounded up
    training = refit_settings(chosen).training
    assert (training.stopping, training.epochs, training.cosine_period) == ("fixed", 5, 50)
    assert training.seed == 0


def test_a_refit_after_fixed_stopping_has_the_settings_of_the_trial(sweep: Path) -> None:
    plant_trial(sweep, outcome(5, 0.9), stopping="fixed", schedule="none", epochs=7)
    chosen = choose(read_outcomes(sweep)).chosen
    assert refit_settings(chosen) == gathering.read_settings(chosen.folder)
    with pytest.raises(ValueError, match="trial 1 cannot be refitted on all folds"):
        refit_settings(by_hand(read_outcomes(sweep), 1).chosen)


@pytest.fixture(scope="module")
def trained(
    demo_store: Store, settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A sweep of one trial that was really trained, and refitted; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "real"
    trial = folder / "trials" / "0000"
    settings = with_training(settings, stopping="early", patience=5)
    for fold in range(2):
        fit(demo_store, settings, fold, trial / f"fold_{fold}", device=CPU, on_epoch=quiet)
    (trial / "settings.yaml").write_text(to_yaml(settings))
    scores = [result.score for n in range(2) if (result := finished(trial / f"fold_{n}"))]
    told = outcome(0, float(np.mean(scores)), scores=scores)
    (trial / "outcome.json").write_text(json.dumps(told))
    chosen = choose(read_outcomes(folder)).chosen
    refit(demo_store.path, refit_settings(chosen), refit_folder(folder, 0), CPU)
    return folder


def strict_json(path: Path) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(f"{path} has {word}, which is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.mark.slow
def test_a_refit_learns_from_all_but_the_held_out(trained: Path, demo_store: Store) -> None:
    result = finished(refit_folder(trained, 0))
    assert result is not None
    assert result.folder.name == "last"
    assert math.isnan(result.score)
    assert strict_json(result.folder.parent / "result.json")["score"] is None
    facts = strict_json(result.folder / "checkpoint.json")
    assert facts["scores"]["score"] is None
    everyone = [n for n, e in demo_store.sections.items() if e["patient"] != HELD_OUT]
    assert facts["fold"]["train"] == facts["fitted"]["sections"] == everyone
    assert (facts["fold"]["number"], facts["fold"]["validation"]) == (ALL, [])
    assert facts["fold"]["held_out"] == ["BC90006_C1"]
    assert "nobody validates" in facts["leak_report"]["checks"]["groups"]["why"]
    training = facts["settings"]["training"]
    assert training["stopping"] == "fixed"
    assert training["epochs"] == result.epochs == result.epoch + 1
    assert {p.name for p in result.folder.parent.iterdir()} == {
        "last",
        "result.json",
        "settings.yaml",
    }
    assert not (result.folder / "validation.parquet").exists()
    assert not (result.folder / "optimizer.safetensors").exists()


@pytest.mark.slow
def test_a_refit_is_not_repeated_and_reproduced_by_its_settings(
    trained: Path, demo_store: Store, tmp_path: Path
) -> None:
    out = refit_folder(trained, 0)
    done = finished(out)
    assert done is not None
    settings = build(Settings, read_yaml(out / "settings.yaml"), "here")

    def never(_: object) -> None:
        raise AssertionError

    again = refit(demo_store.path, settings, out, CPU, never)
    assert (again.folder, again.epochs) == (done.folder, done.epochs)
    notes: list[Any] = []
    other = refit(demo_store.path, settings, tmp_path, CPU, notes.append)
    assert same_bits(other.folder, done.folder)
    assert all(math.isnan(note["score"]) and math.isfinite(note["train_loss"]) for note in notes)


@pytest.mark.slow
def test_a_refit_is_judged_alone_and_is_no_part_of_the_mean(
    trained: Path, demo_store: Store, tmp_path: Path
) -> None:
    place = gather(trained, choose(read_outcomes(trained)))
    assert find_checkpoints(place) == [place / "fold_0", place / "fold_1"]
    assert find_checkpoints(place / "refit") == [place / "refit" / "model"]
    alone = evaluate(
        [place / "refit"], demo_store, [HELD_OUT], tmp_path, device=CPU, progress=False
    )
    assert alone.protocol["models"][0]["fold"] == ALL
    assert strict_json(tmp_path / "protocol.json")["models"][0]["validation_score"] is None
    assert set(alone.scores["patient"]) == {HELD_OUT}
    assert len(checkpoint.load(place / "refit" / "model").fold.train) == 5
    card = (place / "README.md").read_text()
    assert "trained on all 5 sections for" in card
    assert "--fold=-1" in card
    assert (place / "refit" / "settings.yaml").is_file()


@pytest.mark.slow
def test_a_gathered_champion_is_whole(trained: Path, demo_store: Store, settings: Settings) -> None:
    place = gather(trained, choose(read_outcomes(trained)))
    table = json.loads((place / "champion.json").read_text())["sections"]
    folds = make_folds(demo_store, settings.protocol)
    assert set(table) == {name for fold in folds for name in fold.validation}
    for number in range(2):
        done = finished(trained / "trials" / "0000" / f"fold_{number}")
        assert done is not None
        assert same_bits(place / f"fold_{number}", done.folder)
    assert same_bits(place / "refit" / "model", refit_folder(trained, 0) / "last")
