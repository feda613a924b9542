"""The plan of clusters: its simulation against closed forms, its tables from what is shipped."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks.cluster_plan import (
    RATES,
    Data,
    Known,
    bottlenecks,
    feed,
    jobs_of,
    judge_of,
    main,
    scenarios,
    simulate,
    speeds,
)
from benchmarks.cluster_simulation import Cluster, Job, Outcome, Simulation
from sweeps.probe import STEPS, Speed
from sweeps.pruning import Pruner, folds_spent


def trials(seconds: Sequence[float], stops: Sequence[float] = (1,), **speed: float) -> list[Job]:
    """Trials of one epoch and one step a fold, in so many seconds a fold."""
    return [
        Job(
            number=number,
            speed=Speed(point={}, step_seconds=s, steps=1, epochs=1, **speed),  # type: ignore[arg-type]
            stops=stops,
        )
        for number, s in enumerate(seconds)
    ]


def run(
    cluster: Cluster, *phases: list[Job], pruner: Pruner | None = None, seed: int = 0
) -> Outcome:
    names = ["search", *(f"phase {n}" for n in range(1, len(phases)))]
    rng = np.random.default_rng(seed)
    out = Simulation(cluster, pruner, rng).run(dict(zip(names, phases, strict=True)))
    assert out.total == pytest.approx(out.nodes * out.wall)  # nothing is left out
    assert min(out.parts.values()) >= -1e-6
    return out


# --- the simulation against closed forms


@pytest.mark.parametrize(("count", "gpus"), [(20, 1), (20, 8), (20, 64), (64, 64), (65, 64)])
def test_equal_trials_take_as_many_rounds_as_they_fill(count: int, gpus: int) -> None:
    out = run(Cluster(gpus=gpus), trials([100] * count))
    assert out.wall == pytest.approx(math.ceil(count / gpus) * 100)
    assert out.paid == pytest.approx(out.nodes * out.wall)
    assert out.nodes == min(count, gpus)
    assert out.parts["steps"] == pytest.approx(count * 100)


def test_one_slot_takes_the_sum() -> None:
    seconds = [3.0, 100.0, 7.5, 40.0]
    out = run(Cluster(gpus=1), trials(seconds, stops=[1, 2, 3]))
    assert out.wall == out.paid == pytest.approx(3 * sum(seconds))


def test_phases_wait_for_each_other() -> None:
    out = run(Cluster(gpus=2), trials([10, 30]), trials([5]))
    assert out.wall == pytest.approx(35)
    assert out.parts["idle in the search"] == pytest.approx(20)
    assert out.parts["idle in the phase 1"] == pytest.approx(5)


def test_unequal_trials_lie_between_the_bounds_of_list_scheduling() -> None:
    seconds = np.random.default_rng(0).uniform(1, 100, 50).tolist()
    for gpus in (2, 7, 20):
        least = max(sum(seconds) / gpus, max(seconds))
        most = sum(seconds) / gpus + max(seconds) * (1 - 1 / gpus)  # Graham 1969
        assert least <= run(Cluster(gpus=gpus), trials(seconds)).wall <= most + 1e-9


def test_one_slot_with_pruning_takes_what_the_plan_says() -> None:
    scores = np.random.default_rng(1).permutation(60)
    jobs = trials([100] * 60, stops=[0.5, 1, 1.5, 2, 3, 4, 4.5, 5])
    for job, score in zip(jobs, scores, strict=True):
        job.score = float(score)
    pruner = Pruner(folds=5, grace_folds=0.5, reduction_factor=3, paired_p=None)
    out = run(Cluster(gpus=1), jobs, pruner=pruner)
    assert out.wall == pytest.approx(100 * folds_spent(scores, 5, 0.5, 3))


def test_a_fold_is_made_ready_once_and_ended_once() -> None:
    jobs = trials([10], stops=[0.5, 1, 2], setup_seconds=7, validation_seconds=2)
    parts = run(Cluster(gpus=1, end_fold_seconds=0.5, hand_over_seconds=3), jobs).parts
    assert parts == pytest.approx(
        {"steps": 20, "validation": 4, "fold set-up": 14, "hand-over": 4}
        | {"shared files": 0, "driver": 0, "redone after spot": 0, "start-up": 0, "store copy": 0}
        | {"idle in the search": 0}
    )


def test_the_driver_hands_out_one_trial_after_the_other() -> None:
    assert run(Cluster(gpus=10, driver_seconds=2), trials([50] * 10)).wall == pytest.approx(70)


def test_a_search_that_learns_takes_no_more_gpus_than_it_may() -> None:
    out = run(Cluster(gpus=64, at_once=10), trials([10] * 60))
    assert (out.wall, out.nodes) == (pytest.approx(60), 10)


def test_nodes_come_five_at_a_time_and_then_twice_as_many() -> None:
    """At 100, 200 and 300 s there are 5, 10 and 20, as Ray's autoscaler asks for them."""
    slow = Cluster(gpus=20, boot_seconds=60, copy_seconds=40, first_nodes=5)
    out = run(slow, trials([1000] * 20))
    assert out.wall == pytest.approx(1300)
    assert out.paid == pytest.approx(5 * 1300 + 5 * 1200 + 10 * 1100)
    assert out.parts["store copy"] == pytest.approx(20 * 40)


def test_an_idle_node_is_paid_until_it_is_released() -> None:
    out = run(Cluster(gpus=2, idle_seconds=15), trials([10, 100]))
    assert out.paid == pytest.approx(100 + 25)


def test_a_node_that_was_released_must_come_again() -> None:
    cluster = Cluster(gpus=2, boot_seconds=5, idle_seconds=15)
    out = run(cluster, trials([10, 100]), trials([50, 50]))
    assert out.wall == pytest.approx(5 + 100 + 5 + 50)


def test_saves_of_all_share_the_file_system() -> None:
    """Two trials each wait for 2 x 10 MB at 1 MB/s, where an epoch takes 5 s."""
    cluster = Cluster(gpus=2, epoch_write_seconds=1)
    out = run(cluster, trials([5, 5], model_mb=10))
    assert out.wall == pytest.approx(20)
    assert out.parts["shared files"] == pytest.approx(30)


def test_a_file_system_that_takes_all_holds_nobody_up() -> None:
    """One in ten writes for 10 s in each 20 s: more than a tenth, but all together half."""
    jobs = [*trials([20], model_mb=10), *trials([20] * 9)]
    for number, job in enumerate(jobs):
        job.number = number
    assert run(Cluster(gpus=10, epoch_write_seconds=1), jobs).wall == pytest.approx(20)


def test_interruptions_cost_their_number_times_what_each_costs() -> None:
    hours, rate, coming = 200, 0.5, 600.0
    spot = Cluster(gpus=1, boot_seconds=coming, interruptions=rate, save_seconds=0)
    walls = [run(spot, trials([3600 * hours]), seed=n).wall for n in range(40)]
    lost = (np.array(walls) - 3600 * hours) / coming - 1
    assert np.allclose(lost, np.round(lost))
    assert np.mean(lost) == pytest.approx(hours * rate, abs=4 * math.sqrt(hours * rate / 40))


def test_an_interruption_loses_no_more_than_what_was_not_saved() -> None:
    spot = Cluster(gpus=1, boot_seconds=100, interruptions=1, save_seconds=300)
    out = run(spot, trials([360_000], setup_seconds=20))
    lost = round(out.parts["start-up"] / 100) - 1
    assert lost > 50
    redone = out.parts["redone after spot"] / lost
    assert redone == pytest.approx(150 + 20, abs=4 * 300 / math.sqrt(12 * lost))
    assert out.wall == pytest.approx(360_020 + out.parts["start-up"] + redone * lost)


def test_the_largest_shares_beside_steps_are_named() -> None:
    out = run(Cluster(gpus=2, hand_over_seconds=1), trials([10, 100]))
    assert bottlenecks(out)[0] == ("idle in the search", pytest.approx(90 / 202))
    assert bottlenecks(out)[1] == ("hand-over", pytest.approx(2 / 202))


# --- rates


def test_a_measured_rate_is_taken_as_it_is() -> None:
    rate = Known(RATES).rate("cpu", "resnet101")
    assert (rate.value, rate.mark) == (5.7, "measured")


def changed(tmp_path: Path, **devices: object) -> Known:
    content = yaml.safe_load(RATES.read_text())
    content["devices"] |= devices
    file = tmp_path / "rates.yaml"
    file.write_text(yaml.safe_dump(content))
    return Known(file)


def test_a_missing_rate_is_derived_by_flops_and_pixels_from_the_nearest(tmp_path: Path) -> None:
    mine = {"costs": "gflop", "input_px": 112, "source": "here"}
    measured = {"resnet101": 100.0, "efficientnet_b0": 900.0}
    known = changed(tmp_path, mine={**mine, "patches_per_second": measured})
    rate = known.rate("mine", "vit_b16")
    assert rate.value == pytest.approx(100 * 46.6 / 105.2 / 4)
    assert rate.mark == "derived"
    assert rate.formula == "100 (resnet101, 112 px) x 46.6 / 105.2 gflop x (112 / 224)^2"
    assert known.rate("mine", "efficientnet_b0").mark == "derived"  # at other pixels


def test_a_missing_rate_is_said_not_guessed(tmp_path: Path) -> None:
    nothing = {"costs": "gflop", "input_px": 224, "patches_per_second": {}, "source": "nobody"}
    known = changed(tmp_path, mine=nothing)
    with pytest.raises(ValueError, match=r"mine has no measured rate.*benchmarks\.train_step"):
        known.rate("mine", "resnet101")
    with pytest.raises(ValueError, match="vgg19 has neither a measured rate nor costs"):
        known.rate("cpu", "vgg19")
    with pytest.raises(ValueError, match="no device tpu; it has cpu, h100"):
        known.rate("tpu", "resnet101")


def test_a_device_without_a_source_is_refused(tmp_path: Path) -> None:
    for wrong in ({"costs": "gflop"}, {"costs": "money", "input_px": 1, "source": "me"}):
        with pytest.raises(ValueError, match=r"devices\.mine must have costs, input_px"):
            changed(tmp_path, mine={**wrong, "patches_per_second": {}})


def test_a_figure_without_a_mark_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rates.yaml"
    content = yaml.safe_load(RATES.read_text())
    del content["settings"]["price_spot"]["mark"]
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="price_spot must have value, unit, source and a mark"):
        Known(file)
    file.write_text("format: other")
    with pytest.raises(ValueError, match="must begin with format"):
        Known(file)


# --- what is trained, and what is told


def test_the_papers_table_is_a_hundred_trainings() -> None:
    paper, search, cohort = scenarios()
    assert paper.sweep.count * paper.sweep.protocol.folds == 100
    assert search.sweep.count == 60
    assert cohort.data.spots == pytest.approx(28_792 / 68 * 1200)
    found = speeds(Known(RATES), paper, "cpu")
    phases = jobs_of(paper, found, np.random.default_rng(0))
    assert {name: len(jobs) for name, jobs in phases.items()} == {
        "probe": 10,
        "search": 20,
        "repeats": 0,
    }
    names = [job.speed.point["backbone"] for job in phases["search"]]
    assert sorted(names) == sorted(2 * [speed.point["backbone"] for speed in found])


def test_a_store_lies_where_it_fits() -> None:
    known = Known(RATES)
    assert feed(known, Data.like_the_papers("small", 68)) == ("GPU memory", math.inf)
    assert feed(known, Data.like_the_papers("large", 1200))[0] == "host memory"
    where, most = feed(known, Data.like_the_papers("huge", 12_000))
    assert where == "disk"
    assert most == pytest.approx(250e6 / (3 * 224**2))


def test_one_gpu_without_interruptions_is_the_plans_estimate() -> None:
    """Ten backbones in turn: the simulated table is the sum of its trials, and little more."""
    known, paper = Known(RATES), scenarios()[0]
    found = speeds(known, paper, "h100")
    whole = 2 * 5 * sum(speed.fold_seconds() for speed in found)
    out = simulate(known, paper, found, 1, spot=False, repeats=1)
    assert whole < out.wall < 1.002 * whole
    probed = STEPS + 1
    trained = out.parts["steps"] - probed * sum(speed.step_seconds for speed in found)
    setup = 2 * 5 * 10 * found[0].setup_seconds
    assert trained + out.parts["validation"] + setup == pytest.approx(whole)


def test_the_rungs_are_those_of_the_sweep() -> None:
    search = scenarios()[1].sweep
    assert judge_of(search).rungs == (0.5, 1.5, 4.5)


def test_tables_from_the_shipped_figures(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--repeats", "1", "--gpus", "1", "8", "--devices", "h100", "--prices", "2", "1"])
    text = capsys.readouterr().out
    tables = [
        [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]
        for begins, lines in itertools.groupby(text.splitlines(), lambda line: line[:1] == "|")
        if begins
        for lines in [list(lines)]
    ]
    rates, data, sweeps, settings = tables
    assert {row[3] for row in rates[2:]} == {"derived"}
    assert [row[0] for row in data[2:]] == ["paper's", "cohort"]
    assert [row[:3] for row in sweeps[2:]] == [
        [name, "h100", gpus]
        for name in ("paper's table", "search", "search, cohort")
        for gpus in ("1", "8")
    ]
    assert all(
        float(row[6].replace(",", "")) > float(row[8].replace(",", "")) for row in sweeps[2:]
    )
    assert ["price_spot", "1 USD/GPU-h", "set", "--prices"] in settings
    assert {row[2] for row in settings[2:]} == {"measured", "derived", "set", "assumed"}
    assert "20 configurations x 5 folds = 100 trainings" in text


def test_what_is_missing_ends_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--devices", "abacus"])
    assert ended.value.code == 2
    assert "no device abacus" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--rates", str(tmp_path / "none.yaml")])
