"""Who is stopped and who is not, whatever dies on the way; and the replay that measures it."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import WilcoxonPruner
from scipy import stats

from benchmarks.pruning import ARMS, Arm, Bench, choices, simulate, sweeps_info, units_of
from benchmarks.recording import Curves, beside, curves_of, read_curves, record
from brstnet.config import Protocol, Settings, Training, to_yaml
from sweeps.pruning import Pruner, expected_share, paired_p_value, read_ledger

NAN = math.nan


def make(ledger: Path | None = None, **changed: object) -> Pruner:
    """Four folds, rungs at .25, .75 and 2.25."""
    options = {"folds": 4, "grace_folds": 0.25, "reduction_factor": 3, "paired_p": 0.2, **changed}
    return Pruner(**options, ledger=ledger)  # type: ignore[arg-type]


def at_rung(pruner: Pruner, scores: list[float], done: float = 0.25) -> list[str]:
    return [pruner.judge(number, done, score, {}) for number, score in enumerate(scores)]


# --- where the rungs stand


def test_rungs_climb_by_the_reduction_factor_and_end_below_the_last_fold() -> None:
    assert make().rungs == (0.25, 0.75, 2.25)
    assert make(grace_folds=1, reduction_factor=2).rungs == (1, 2)
    assert make(grace_folds=4).rungs == ()
    with pytest.raises(ValueError, match="grace_folds must be above 0, got 0"):
        make(grace_folds=0)
    with pytest.raises(ValueError, match="reduction_factor must be at least 2, got 1"):
        make(reduction_factor=1)
    with pytest.raises(ValueError, match="paired_p"):
        make(paired_p=1.5)


@pytest.mark.parametrize("epochs", [1, 3, 6, 7, 10, 30, 200])
def test_every_rung_is_met_once_at_the_first_epoch_that_reaches_it(epochs: int) -> None:
    pruner = make(grace_folds=0.1)
    done = [fold + (epoch + 1) / epochs for fold in range(4) for epoch in range(epochs)]
    met = [after for before, after in itertools.pairwise([0.0, *done]) if pruner.due(before, after)]
    exact = [math.ceil(round(rung * epochs, 6)) / epochs for rung in pruner.rungs]
    assert met == pytest.approx(sorted(set(exact)))


# --- successive halving


def test_the_best_third_goes_on_and_the_reason_says_why() -> None:
    verdicts = at_rung(make(), [0.1, 0.2, 0.15, 0.12, 0.3, 0.18, 0.22, 0.05, 0.21, 0.2])
    assert [bool(stop) for stop in verdicts] == [
        *(False, False, True, True, False),
        *(True, False, True, False, True),
    ]
    assert verdicts[2] == "mean 0.150 over 0.25 folds is below the 0.200 of the best of 3 trials"
    assert verdicts[5].endswith("is below the 0.200 of the best third of 6 trials")


def test_before_its_first_rung_nobody_is_judged() -> None:
    pruner = make()
    assert at_rung(pruner, [0.5, 0.1, NAN], done=0.2) == ["", "", ""]
    assert pruner.judge(1, 0.25, 0.4, {}) == ""


def test_a_trial_is_judged_once_at_a_rung_and_a_stop_is_for_good() -> None:
    pruner = make()
    first, second = at_rung(pruner, [0.2, 0.1])
    pruner.judge(2, 0.25, 0.5, {})
    assert first == ""
    assert pruner.judge(0, 0.25, 0.2, {}) == ""  # now below the best of 3, but it has passed
    assert pruner.judge(0, 0.5, 0.0, {}) == ""  # between rungs
    assert second
    assert pruner.judge(1, 0.25, 0.9, {}) == second
    assert pruner.judge(1, 2.0, 0.9, {}) == second


def test_nan_is_worse_than_any_score_and_no_reason_by_itself() -> None:
    assert at_rung(make(), [NAN, NAN]) == ["", ""]
    verdicts = at_rung(make(reduction_factor=2), [NAN, -0.5, NAN, -0.6, NAN, NAN, NAN, NAN])
    assert [bool(stop) for stop in verdicts] == [False, False, True, False, *[True] * 4]


def test_a_rung_that_was_jumped_over_is_left_out_and_the_end_is_not_judged() -> None:
    pruner = make(grace_folds=0.25, reduction_factor=2)
    assert pruner.judge(0, 0.5, 0.1, {}) == ""
    assert pruner.judge(1, 0.25, 0.0, {}) == ""  # the first at that rung
    assert pruner.judge(1, 4.0, 0.0, {}) == ""


def test_a_planted_best_is_never_stopped_and_a_planted_bad_one_is() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        pruner = make()
        for number in range(30):
            level = 1.0 if number == 20 else -1.0 if number == 10 else float(rng.uniform(0, 0.9))
            stopped = next((d for d in pruner.rungs if pruner.judge(number, d, level, {})), None)
            assert number != 20 or stopped is None
            assert number != 10 or stopped == 0.25
            if stopped is None:
                pruner.complete(number, level, {})


# --- the paired test


def sections(values: list[float]) -> dict[str, float]:
    return {f"S{n}": value for n, value in enumerate(values)}


def test_a_trial_below_the_best_on_every_section_is_stopped_at_the_end_of_a_fold() -> None:
    best, worse = [0.30, 0.10, 0.50, 0.20, 0.40], [0.28, 0.07, 0.46, 0.15, 0.34]
    pruner = make(grace_folds=0.9, paired_p=0.05)
    assert pruner.judge(1, 1.0, 0.26, sections(worse)) == ""  # there is nobody to compare with
    pruner.complete(0, 0.3, sections([*best, 0.9, 0.9]))
    assert pruner.judge(2, 1.5, 0.26, sections(worse)) == ""  # not the end of a fold
    reason = pruner.judge(2, 2.0, 0.26, sections(worse))
    assert reason == "0.040 below trial 0 over 5 shared sections (paired test, p 0.031)"
    assert make(paired_p=None).judge(2, 2.0, 0.26, sections(worse)) == ""


def test_the_incumbent_is_the_best_complete_trial() -> None:
    pruner = make(grace_folds=1, reduction_factor=2, paired_p=0.1)
    pruner.complete(0, 0.2, sections([0.2] * 4))
    pruner.complete(1, 0.4, sections([0.4] * 4))
    pruner.complete(2, 0.3, sections([0.3] * 4))
    pruner.complete(3, NAN, sections([NAN] * 4))
    assert "trial 1" in pruner.judge(4, 3.0, 0.35, sections([0.31, 0.32, 0.33, 0.34]))


@pytest.mark.parametrize("seed", range(12))
def test_the_paired_test_decides_as_optunas_pruner_does(seed: int) -> None:
    rng = np.random.default_rng(seed)
    best = rng.normal(0.3, 0.1, 8)
    trial = best + rng.normal(-0.03, 0.06, 8) * (rng.random(8) < 0.8)  # some are equal
    with pytest.warns(ExperimentalWarning):
        judge = WilcoxonPruner(p_threshold=0.1)
    study = optuna.create_study(direction="maximize", pruner=judge)
    study.add_trial(
        optuna.trial.create_trial(value=best.mean(), intermediate_values=dict(enumerate(best)))
    )
    asked = study.ask()
    for step, value in enumerate(trial):
        asked.report(value, step)
    p = paired_p_value(trial - best)
    assert (p < 0.1) == asked.should_prune()
    if trial.mean() < best.mean():
        less = stats.wilcoxon(trial - best, alternative="less", zero_method="zsplit")
        assert p == less.pvalue


def test_no_trial_is_stopped_whose_mean_is_not_below() -> None:
    lower_on_most = np.array([-0.01] * 9 + [0.5])
    assert stats.wilcoxon(lower_on_most, alternative="less").pvalue < 0.1
    assert paired_p_value(lower_on_most) == 1
    assert paired_p_value(np.array([-0.1])) == 1
    assert paired_p_value(np.array([-0.1, -0.2, NAN, -0.3])) == 0.125


# --- the ledger


def play(pruner: Pruner, calls: list[tuple]) -> list[str | None]:
    return [getattr(pruner, name)(*values) for name, *values in calls]


def some_calls(seed: int, count: int = 120) -> list[tuple]:
    """Trials that go their way in a mixed order, as they do in a sweep."""
    rng = np.random.default_rng(seed)
    levels, done, calls = rng.uniform(0, 0.4, 20), np.zeros(20), []
    for _ in range(count):
        number = int(rng.integers(20))
        done[number] += 0.25
        known = sections(list(levels[number] + rng.normal(0, 0.02, 3 * int(done[number]))))
        score = NAN if rng.random() < 0.05 else float(levels[number] + rng.normal(0, 0.02))
        if done[number] < 4:
            calls.append(("judge", number, float(done[number]), score, known))
        elif done[number] == 4:
            calls.append(("complete", number, score, known))
    return calls


@pytest.mark.parametrize("seed", range(3))
def test_a_pruner_that_dies_anywhere_goes_on_as_if_it_had_not(tmp_path: Path, seed: int) -> None:
    calls = some_calls(seed)
    expected = play(make(), calls)
    assert any(expected)
    assert play(make(), calls) == expected
    for cut in range(0, len(calls), 17):
        ledger = tmp_path / f"{cut}.jsonl"
        before = play(make(ledger), calls[:cut])
        with ledger.open("a") as file:
            file.write('{"judged": 3, "done": 2.2')  # killed while it wrote
        pruner = make(ledger)
        assert play(pruner, calls[:cut]) == play(make(ledger), calls[:cut])  # asked again
        assert before + play(pruner, calls[cut:]) == expected
        assert ledger.read_text().endswith("}\n")
        json.loads(ledger.read_text().splitlines()[-1])


def test_what_a_trial_was_told_is_on_disk_and_stands_after_a_restart(tmp_path: Path) -> None:
    ledger = tmp_path / "new" / "ledger.jsonl"
    told = at_rung(make(ledger), [0.2, 0.1, 0.3])
    assert [line["stop"] for line in read_ledger(ledger)[1:]] == told
    again = make(ledger)
    assert at_rung(again, [0.0, 0.9, 0.0]) == told  # whatever they report now
    assert len(read_ledger(ledger)) == 4


def test_a_ledger_of_another_sweep_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    at_rung(make(ledger), [0.2, 0.1])
    with pytest.raises(ValueError, match="this sweep's would with"):
        make(ledger, reduction_factor=2)
    lines = ledger.read_text().splitlines()
    ledger.write_text("\n".join([lines[0], lines[1][:-5], lines[2], ""]))
    with pytest.raises(ValueError, match="line 2 is damaged"):
        make(ledger)
    ledger.write_text(lines[0][:10])  # died while it wrote the first line
    make(ledger)
    assert len(read_ledger(ledger)) == 1


# --- the replay


def made_curves(configs: int = 24, seed: int = 0, noise: float = 0.02) -> Curves:
    """Configurations that differ by a level, folds that differ by a level, and noise."""
    rng = np.random.default_rng(seed)
    level_C, level_F = rng.uniform(0, 0.4, configs), np.array([-0.05, 0.0, 0.05, 0.02])
    rows = [
        (c, f, e, level_C[c] * (e + 1) / 4 + level_F[f] + rng.normal(0, noise), 1.0 + 0.1 * c)
        for c, f, e in itertools.product(range(configs), range(4), range(4))
    ]
    rows = [row for row in rows if not (row[0] == 3 and row[1:3] > (1, 2))]  # 3 fails in its
    rows = [(*row[:3], NAN, NAN) if row[:3] == (3, 1, 2) else row for row in rows]  # 7th epoch
    table = pd.DataFrame(rows, columns=["trial", "fold", "epoch", "score", "seconds"])
    last = table[table["epoch"] == 3]
    parts = [
        last.assign(section=last["fold"].astype(str) + side, pcc=last["score"]) for side in "ab"
    ]
    return curves_of(table, pd.concat(parts), "made")


def test_without_pruning_all_is_spent_and_nothing_is_lost() -> None:
    bench = Bench(curves=made_curves(), draws=12, slots=3, repeats=20)
    info = sweeps_info(bench, ARMS[0])
    assert (info["share"] == 1).all()
    assert (info["regret"] == 0).all()
    assert (info["lost"] == 0).all()


def test_pruning_spends_less_and_every_arm_runs() -> None:
    bench = Bench(curves=made_curves(noise=0.0), draws=8, slots=3, repeats=2)
    for arm in ARMS[1:]:
        info = sweeps_info(bench, arm)
        assert (info["share"] <= 1).all()
        assert (info["regret"] >= 0).all()
    rungs = sweeps_info(bench, Arm(name="rungs", grace_folds=0.25))
    assert rungs["share"].max() < 0.7
    assert (rungs["regret"] == 0).all()  # curves without noise never cross


def test_a_failed_configuration_ends_at_its_epoch_and_is_never_chosen() -> None:
    curves, arm = made_curves(), ARMS[0]
    assert np.isnan(curves.final_C[3])
    done, spent = simulate(units_of(curves, arm)[3], arm.pruner(4), 4, 1)
    assert not done
    assert spent == 7
    single = [unit for c in (3, 5) for unit in units_of(curves, Arm(name="", per_fold=True))[c]]
    done, _ = simulate(single, arm.pruner(1), 4, 2)
    assert sorted((d.unit.config, d.unit.fold) for d in done) == [
        (3, 0),
        *((5, f) for f in range(4)),
    ]
    assert len(list(choices(done))) == 5


def test_the_running_score_is_the_mean_of_finished_folds_and_the_current_one() -> None:
    curves = made_curves()
    running = curves.whole(0).running
    score_FE = curves.score_CFE[0]
    assert running[2] == pytest.approx(score_FE[0, 2])
    assert running[9] == pytest.approx((score_FE[0, 3] + score_FE[1, 3] + score_FE[2, 1]) / 3)
    assert running[-1] == pytest.approx(curves.final_C[0])
    assert sorted(curves.whole(0).sections[2]) == ["0a", "0b", "1a", "1b"]


@pytest.mark.parametrize(("folds", "grace", "factor"), [(4, 0.25, 3), (5, 1, 2), (4, 0.5, 2)])
def test_the_expected_share_comes_to_its_limit_with_many_trials(
    folds: int, grace: float, factor: int
) -> None:
    ends = [0.0, *make(folds=folds, grace_folds=grace, reduction_factor=factor).rungs, folds]
    pairs = enumerate(itertools.pairwise(ends))
    limit = sum((end - begin) / factor**climbed for climbed, (begin, end) in pairs) / folds
    few, some, many = (expected_share(folds, grace, factor, n) for n in (6, 30, 1000))
    assert few > some > many
    assert many == pytest.approx(limit, rel=0.1)
    assert some < 1.7 * limit


def test_the_expected_share_by_hand() -> None:
    assert expected_share(4, 4, 3, 10) == 1
    assert expected_share(4, 0.25, 3, 1) == 1
    # of two, the better goes on if it is first; second, both do
    assert expected_share(4, 1, 2, 2) == pytest.approx((4 + 4 + 4 + 1) / 16, abs=0.02)


def test_a_sweeps_folder_becomes_curves(tmp_path: Path) -> None:
    training = Training(epochs=2, stopping="fixed")
    settings = Settings(protocol=Protocol(folds=2), training=training)
    for trial, (state, ran) in enumerate([("COMPLETE", [2, 2]), ("FAILED", [2, 1])]):
        folder = tmp_path / "trials" / f"{trial:04d}"
        for fold, epochs in enumerate(ran):
            last = folder / f"fold_{fold}" / "last"
            last.mkdir(parents=True)
            history = [{"epoch": e, "score": 0.1 * e + fold, "seconds": 2.0} for e in range(epochs)]
            (last / "progress.json").write_text(json.dumps({"history": history}))
            if epochs == 2:
                (last.parent / "result.json").write_text("{}")
                table = pd.DataFrame({"section": ["A", "A", "B"], "pcc": [0.2, NAN, 0.4]})
                table.to_parquet(last / "validation.parquet")
        (folder / "settings.yaml").write_text(to_yaml(settings))
        (folder / "outcome.json").write_text(json.dumps({"trial": trial, "state": state}))
    out = tmp_path / "curves" / "mine.parquet"
    record(tmp_path, out)
    curves = read_curves(out)
    assert curves.protocol == settings.protocol.line()
    assert curves.score_CFE[0].tolist() == [[0.0, 0.1], [1.0, 1.1]]
    assert curves.final_C[0] == pytest.approx(0.6)
    assert curves.whole(1).ran == 4
    assert np.isnan(curves.final_C[1])
    assert curves.sections[0, 1] == {"A": pytest.approx(0.1), "B": 0.4}
    assert len(pd.read_parquet(beside(out))) == 6
