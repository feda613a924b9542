"""The leak gate of an evaluation: each check fails for a model that leaks, and for no other."""

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import yaml
from trainings import CPU, quiet, with_training

from brstnet.config import Settings, plain, to_yaml
from brstnet.data.store import Store, sha256
from brstnet.evaluation.leaks.checks import FAILED, NOTE, PASSED, UNKNOWN, Check
from brstnet.evaluation.leaks.contents import colour_statistics, look
from brstnet.evaluation.leaks.gate import gate_line, gate_rows, judge_gate
from brstnet.evaluation.predict import Ensemble, load_ensemble
from brstnet.evaluation.report import gate_blocks
from brstnet.training.checkpoint import describe
from brstnet.training.fitted import Fitted, fit_statistics
from brstnet.training.folds import Fold, make_folds
from brstnet.training.keep import finished
from brstnet.training.leaks import LeakError
from brstnet.training.task import prepare_task
from brstnet.training.train import fit, run_epoch, start
from sweeps.champion import read_outcomes
from sweeps.choice import choose
from sweeps.gather import gather

HELD_OUT, SECTION = "BC90006", "BC90006_C1"
OF_MEMBER = {
    "patients",
    "copies",
    "folds",
    "statistics",
    "panel",
    "filters",
    "targets",
    "image_statistics",
    "stain_target",
    "epoch",
}


@pytest.fixture(scope="module")
def trained(
    demo_store: Store, settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A trial of two folds, gathered as the champion of a sweep: sweep/champion; not to change."""
    sweep = tmp_path_factory.mktemp("runs") / "demo"
    trial = sweep / "trials" / "0000"
    for fold in range(2):
        fit(demo_store, settings, fold, trial / f"fold_{fold}", device=CPU, on_epoch=quiet)
    results = [result for n in range(2) if (result := finished(trial / f"fold_{n}"))]
    (trial / "settings.yaml").write_text(to_yaml(settings))
    names = [n for n, e in demo_store.sections.items() if e["patient"] != HELD_OUT]
    told = {
        "trial": 0,
        "seed": 0,
        "state": "COMPLETE",
        "config": {"genes": 60},
        "score": float(np.mean([r.score for r in results])),
        "scores": [r.score for r in results],
        "sections": dict.fromkeys(names, 0.1),
        "cost_seconds": 1.0,
        "reason": "",
    }
    (trial / "outcome.json").write_text(json.dumps(told))
    (sweep / "sweep.yaml").write_text(yaml.safe_dump({"protocol": plain(settings.protocol)}))
    gather(sweep, choose(read_outcomes(sweep)))
    return sweep


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    """A copy of the champion's folder, to be spoilt."""
    return Path(shutil.copytree(trained / "champion", tmp_path / "champion"))


def ensemble(*folders: Path) -> Ensemble:
    return load_ensemble(folders, CPU)


def judge(
    folder: Path, store: Store, sections: Sequence[str] = (SECTION,), **more: Any
) -> dict[str, list[Check]]:
    """The checks by name."""
    checks = judge_gate(ensemble(folder), store, list(sections), **more)
    return {c.name: [d for d in checks if d.name == c.name] for c in checks}


def refused(match: str, folder: Path, store: Store, sections: Sequence[str] = (SECTION,)) -> str:
    """What the gate says when it refuses."""
    with pytest.raises(LeakError, match=match) as caught:
        judge_gate(ensemble(folder), store, list(sections))
    return str(caught.value)


def failed(message: str) -> set[str]:
    """The names of the checks that a refusal tells of."""
    return {line.split(":")[0].split("(")[0].strip() for line in message.splitlines()[1:]}


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Another checkpoint.json."""
    file = folder / "checkpoint.json"
    facts = json.loads(file.read_text())
    edit(facts)
    file.write_text(json.dumps(facts))


def cut(
    store: Store,
    folder: Path,
    keep: Sequence[str],
    new: Mapping[str, tuple[str, str, Sequence[int]]] | None = None,
) -> Store:
    """A store of some of the sections, and of new ones: name to (old, patient, its rows)."""
    folder.mkdir()
    index = copy.deepcopy(store.index)
    entries = {e["section"]: e for e in index["sections"]}
    for name in keep:
        shutil.copytree(store.path / name, folder / name)
    made = []
    for name, (old, patient, rows) in (new or {}).items():
        shutil.copytree(store.path / old, folder / name)
        np.save(folder / name / "patches.npy", np.load(store.path / old / "patches.npy")[rows])
        adata = anndata.read_h5ad(store.path / old / "spots.h5ad")[list(rows)].copy()
        adata.write_h5ad(folder / name / "spots.h5ad")
        files = {file: sha256(folder / name / file) for file in entries[old]["files"]}
        own = {"section": name, "patient": patient, "spots_kept": len(rows), "files": files}
        made.append({**entries[old], **own})
    index["sections"] = [entries[name] for name in keep] + made
    shutil.copy(store.path / "genes.parquet", folder)
    (folder / "index.json").write_text(json.dumps(index))
    return Store(folder)


def others(store: Store) -> list[str]:
    return [name for name in store.sections if name != SECTION]


# Honest ------------------------------------------------------------------------------------------


def test_an_honest_champion_passes_every_check(trained: Path, demo_store: Store) -> None:
    checks = judge_gate(ensemble(trained / "champion"), demo_store, [SECTION], earlier=0)
    assert {c.name for c in checks} == {*OF_MEMBER, "champion", "earlier"}
    assert all(sum(c.name == name for c in checks) == 2 for name in OF_MEMBER)
    assert {c.state for c in checks if c.name != "stain_target"} == {PASSED}
    states = sorted(c.state for c in checks if c.name == "stain_target")
    assert states == [NOTE, PASSED]  # the target validates one of the folds and trains the other
    (champion,) = (c for c in checks if c.name == "champion")
    assert "tried 1 configurations on 5 sections of BC90001, BC90002" in champion.why
    assert champion.why.endswith(f"{HELD_OUT} was held out")


def test_the_report_can_be_read_by_people_and_programs(trained: Path, demo_store: Store) -> None:
    checks = judge_gate(ensemble(trained / "champion"), demo_store, [SECTION], earlier=2)
    assert gate_line(checks) == "leak gate: 20 passed, 2 note"
    assert "2 earlier evaluations of these patients" in checks[-1].why
    rows = json.loads(json.dumps(gate_rows(checks)))
    assert [Check(**row) for row in rows] == checks
    assert list(pd.DataFrame(rows)) == ["name", "of", "state", "why"]


# Who is judged -----------------------------------------------------------------------------------


def test_who_trained_or_validated_is_refused_and_every_reason_is_told(
    trained: Path, demo_store: Store
) -> None:
    for name in others(demo_store):
        patient = demo_store.sections[name]["patient"]
        match = f"section {name} of patient {patient} cannot judge .*{HELD_OUT}"
        message = refused(match, trained / "champion", demo_store, [SECTION, name])
        assert message.count("cannot judge /") == 2  # both folds saw the patient
        assert {"patients", "champion"} <= failed(message)
        assert f"section {SECTION}" not in message


def test_a_section_under_another_name_is_known_by_its_patches(
    trained: Path, demo_store: Store, tmp_path: Path
) -> None:
    store = cut(demo_store, tmp_path / "s", [SECTION])
    entry = copy.deepcopy(demo_store.sections["BC90003_C1"])
    shutil.copytree(demo_store.path / "BC90003_C1", store.path / "X7_A")
    store.index["sections"].append({**entry, "section": "X7_A", "patient": "X7"})
    (store.path / "index.json").write_text(json.dumps(store.index))
    match = "section X7_A of patient X7 cannot judge"
    assert "patients" in failed(refused(match, trained / "champion", Store(store.path), ["X7_A"]))


def test_a_piece_of_a_training_section_is_known_by_its_spots(
    trained: Path, demo_store: Store, tmp_path: Path
) -> None:
    """Cut again: no name, no patient and no file is the same, but seven spots are."""
    old = others(demo_store)[2]
    new = {"Y1_A": (old, "Y1", range(3, 10))}
    store = cut(demo_store, tmp_path / "s", list(demo_store.sections), new)
    message = refused(
        f"patches of 7 spots of section Y1_A are in {old}", trained / "champion", store, ["Y1_A"]
    )
    assert f"counts of 7 spots of section Y1_A are in {old}" in message
    assert failed(message) == {"copies"}


def test_the_same_counts_under_other_pixels_are_a_copy_too(
    trained: Path, demo_store: Store, tmp_path: Path
) -> None:
    """As after another stain normalisation."""
    old = others(demo_store)[0]
    store = cut(demo_store, tmp_path / "s", others(demo_store), {"Y1_A": (old, "Y1", range(5))})
    patches = np.load(store.path / "Y1_A" / "patches.npy")
    np.save(store.path / "Y1_A" / "patches.npy", 255 - patches)
    message = refused(
        f"counts of 5 spots of section Y1_A are in {old}", trained / "champion", store, ["Y1_A"]
    )
    assert "patches of" not in message


def test_patches_of_one_colour_are_no_copies(
    trained: Path, demo_store: Store, tmp_path: Path
) -> None:
    """Empty glass is the same on every slide."""
    new = {"Y1_A": (SECTION, "Y1", range(9)), "Y2_A": (SECTION, "Y2", range(9, 18))}
    store = cut(demo_store, tmp_path / "s", others(demo_store), new)
    for name in new:
        file = store.path / name / "patches.npy"
        patches = np.load(file)
        patches[4] = 255
        np.save(file, patches)
    protocol = ensemble(trained / "champion").members[0].settings.protocol
    one, two = (look(store, name, protocol) for name in new)
    assert (len(one.patches), len(two.patches)) == (8, 8)
    assert not one.patches & two.patches
    assert len(one.counts) == 9


def test_where_training_is_not_in_the_store_that_is_said(
    trained: Path, demo_store: Store, tmp_path: Path
) -> None:
    store = cut(demo_store, tmp_path / "s", [SECTION])
    checks = judge(trained / "champion", store)
    unseen = ("copies", "folds", "panel", "filters", "targets", "image_statistics")
    assert {c.state for name in unseen for c in checks[name]} == {UNKNOWN}
    assert "said by the checkpoint: the 40 genes" in checks["panel"][0].why
    assert {c.state for c in checks["patients"]} == {PASSED}
    assert "not in this store: a patient renamed since" in checks["patients"][0].why


# What was fitted ---------------------------------------------------------------------------------


def fitted_on_all(store: Store, fold: Fold, settings: Settings) -> Fitted:
    """Statistics over everybody, which say that they are of the training sections."""
    everybody = dataclasses.replace(fold, train=tuple(store.sections))
    honest = fit_statistics(store, fold, settings)
    leaky = fit_statistics(store, everybody, settings)
    return dataclasses.replace(leaky, sections=fold.train, spots=honest.spots)


def test_a_model_that_was_trained_with_everybodys_statistics_is_refused(
    trained: Path, demo_store: Store, settings: Settings, tmp_path: Path
) -> None:
    settings = with_training(settings, auxnet=False)  # with it more genes pass on more spots
    task, model = prepare_task(demo_store, settings, 0, CPU)
    leaky = fitted_on_all(demo_store, task.fold, settings)
    said = task.facts["leak_report"]
    facts = {**task.facts, **describe(settings, task.fold, leaky, demo_store, said)}
    run = start(dataclasses.replace(task, fitted=leaky, facts=facts), model, tmp_path / "fold_0")
    for _ in range(settings.training.epochs):
        run_epoch(run)
    run.saver.wait()
    message = refused("targets are not the training spots'", tmp_path / "fold_0/last", demo_store)
    assert failed(message) >= {"panel", "targets", "image_statistics"}
    assert "patients" not in failed(message)


def test_each_statistic_of_everybody_is_found_alone(
    place: Path, demo_store: Store, settings: Settings
) -> None:
    """Each in a checkpoint that is honest in all else."""
    shutil.rmtree(place / "fold_1")
    fold = make_folds(demo_store, settings.protocol)[0]
    leaky, honest = fitted_on_all(demo_store, fold, settings), place / "fold_0"
    genes = pd.read_parquet(honest / "genes.parquet")
    of_all = leaky.genes.reindex(genes.index)
    for columns, name in ((["mean", "std"], "targets"), (["mean_count"], "panel")):
        planted = genes.copy()
        planted[columns] = of_all[columns].fillna(genes[columns])
        planted.to_parquet(honest / "genes.parquet")
        assert failed(refused(f"{name} ", place, demo_store)) == {name}
    genes.to_parquet(honest / "genes.parquet")
    facts = json.loads((honest / "checkpoint.json").read_text())
    for key, value, name in (
        ("median_total", leaky.median_total, "targets"),
        ("image_mean", list(leaky.image_mean), "image_statistics"),
        ("image_std", list(leaky.image_std), "image_statistics"),
        ("spots", leaky.spots + 1, "filters"),
        ("sections", [*fold.train, SECTION], "statistics"),
    ):
        planted = copy.deepcopy(facts)
        planted["fitted"][key] = value
        (honest / "checkpoint.json").write_text(json.dumps(planted))
        assert failed(refused(f"{name} ", place, demo_store)) == {name}, key
    (honest / "checkpoint.json").write_text(json.dumps(facts))
    assert {c.state for c in judge(place, demo_store)["panel"]} == {PASSED}


def test_genes_that_another_filter_lets_pass_are_found(place: Path, demo_store: Store) -> None:
    """The lowest gene that everybody has, in place of one that passes on the training spots."""
    file = place / "fold_0" / "genes.parquet"
    genes = pd.read_parquet(file)
    missing = demo_store.genes.index.difference(genes.index)
    names = list(genes.index)
    names[-1] = missing[0] if len(missing) else names[-2]
    genes.index = pd.Index(names, name=genes.index.name)
    genes.to_parquet(file)
    assert failed(refused("filters .*not the first", place, demo_store)) == {"filters"}


def test_genes_of_equal_mean_may_change_places(trained: Path, demo_store: Store) -> None:
    """The store of tomorrow may have its genes in another order."""
    member = ensemble(trained / "champion").members[0]
    store = Store(demo_store.path)
    order = np.random.default_rng(0).permutation(len(store.genes))
    store.__dict__["genes"] = store.genes.iloc[order]
    checks = judge_gate(
        Ensemble(members=[member], genes=member.fitted.genes, median_total=1.0), store, [SECTION]
    )
    assert {c.state for c in checks if c.name in ("panel", "filters", "targets")} == {PASSED}


def test_colour_statistics_are_those_of_the_pixels(demo_store: Store, settings: Settings) -> None:
    protocol = dataclasses.replace(settings.protocol, max_white_fraction=0.2)
    levels_CL = np.zeros((3, 256), int)
    pixels = []
    for name in others(demo_store):
        levels_CL += look(demo_store, name, protocol).levels_CL
        rows = demo_store.spots([name])["white_fraction"].to_numpy() <= 0.2
        pixels.append(np.array(demo_store.patches(name))[rows].reshape(-1, 3) / 255)
    joined = np.concatenate(pixels)
    mean_C, std_C = colour_statistics(levels_CL)
    np.testing.assert_allclose(mean_C, joined.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(std_C, joined.std(axis=0), rtol=1e-12)


def test_colours_of_the_weights_are_compared_with_the_weights(
    place: Path, demo_store: Store
) -> None:
    def of_weights(facts: dict[str, Any]) -> None:
        facts["settings"]["training"]["image_statistics"] = "weights"

    shutil.rmtree(place / "fold_1")
    change(place / "fold_0", of_weights)
    message = refused("image_statistics .*not those of the backbone", place, demo_store)
    assert failed(message) == {"image_statistics"}
    cfg = ensemble(place).members[0].model.backbone.pretrained_cfg
    assert isinstance(cfg, dict)

    def honest(facts: dict[str, Any]) -> None:
        facts["fitted"] |= {"image_mean": list(cfg["mean"]), "image_std": list(cfg["std"])}

    change(place / "fold_0", honest)
    assert judge(place, demo_store)["image_statistics"][0].state == PASSED


@pytest.fixture(scope="module")
def towards_the_judged(
    demo_store: Store, settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A model of a store whose stain target is of a patient who was then taken out of it."""
    folder = tmp_path_factory.mktemp("stain")
    store = cut(demo_store, folder / "store", others(demo_store))
    index = copy.deepcopy(store.index)
    stains = (np.array(index["stain_target"]["stain_matrix"]) * 0.99).tolist()
    own = {"section": SECTION, "patient": HELD_OUT, "stain_matrix": stains}
    index["stain_target"] |= own
    (folder / "store" / "index.json").write_text(json.dumps(index))
    asked = dataclasses.replace(settings.protocol, held_out=())
    settings = dataclasses.replace(settings, protocol=asked)
    fit(Store(folder / "store"), settings, 0, folder / "fold_0", device=CPU, on_epoch=quiet)
    return folder


def test_a_stain_target_of_the_judged_is_refused(
    towards_the_judged: Path, demo_store: Store
) -> None:
    match = f"stain target of its training is section {SECTION} of patient {HELD_OUT}"
    assert failed(refused(match, towards_the_judged / "fold_0", demo_store)) == {"stain_target"}


def test_a_stain_target_is_known_by_its_stains(
    towards_the_judged: Path, demo_store: Store, tmp_path: Path
) -> None:
    """The judged patient has another name here, but the same stains were normalised to."""
    store = cut(demo_store, tmp_path / "s", [], {"Y1_A": (SECTION, "Y1", range(5))})
    index = copy.deepcopy(store.index)
    facts = json.loads((towards_the_judged / "fold_0/last/checkpoint.json").read_text())
    index["stain_target"] = {**facts["store"]["stain_target"], "section": "Y1_A", "patient": "Y1"}
    (store.path / "index.json").write_text(json.dumps(index))
    refused(
        f"patient {HELD_OUT} alias Y1, who is judged",
        towards_the_judged / "fold_0",
        Store(store.path),
        ["Y1_A"],
    )


# What was chosen ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("training", "state", "why"),
    [
        ({"stopping": "early"}, NOTE, "chosen on them"),
        ({"stopping": "early", "schedule": "plateau"}, NOTE, "they lowered the learning rate"),
        ({"schedule": "plateau"}, NOTE, "the last of 2 epochs; .* lowered the learning rate"),
        ({"epochs": 9}, NOTE, "epoch 1 of 9 that were fixed: maybe chosen"),
        ({}, PASSED, "the last of 2 epochs"),
    ],
)
def test_an_epoch_that_the_validation_chose_is_noted(
    place: Path, demo_store: Store, training: Mapping[str, Any], state: str, why: str
) -> None:
    change(place / "fold_0", lambda facts: facts["settings"]["training"].update(training))
    shutil.rmtree(place / "fold_1")
    (check,) = judge(place, demo_store)["epoch"]
    assert check.state == state
    assert pd.Series([check.why]).str.contains(why).all()


def test_a_model_that_stopped_early_says_so(
    demo_store: Store, settings: Settings, tmp_path: Path
) -> None:
    early = with_training(settings, stopping="early", patience=5)
    fit(demo_store, early, 0, tmp_path / "fold_0", device=CPU, on_epoch=quiet)
    (check,) = judge(tmp_path / "fold_0", demo_store)["epoch"]
    assert (check.state, check.of) == (NOTE, "fold 0")


def note_of(place: Path, **changes: Any) -> None:
    """Another champion.json, whose hash is still that of the models."""
    file = place / "champion.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_champion_that_was_chosen_on_the_judged_is_refused(
    place: Path, demo_store: Store
) -> None:
    note = json.loads((place / "champion.json").read_text())
    note_of(place, sections={**note["sections"], SECTION: 0.3}, searched={"COMPLETE": 40})
    message = refused("tried 40 configurations on 6 sections", place, demo_store)
    assert failed(message) == {"champion"}
    assert f"{HELD_OUT}, who is judged, was in it" in message


def test_a_judged_patient_whom_the_sweep_did_not_hold_out_is_refused(
    place: Path, demo_store: Store
) -> None:
    (place / "sweep.yaml").write_text("protocol: {held_out: [BC1]}")
    assert failed(refused(f"{HELD_OUT} was not held out", place, demo_store)) == {"champion"}
    note_of(place, store="another")  # it was not even in the sweep's store
    assert judge(place, demo_store)["champion"][0].state == NOTE


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda p: (p / "champion.json").unlink(), "no champion.json beside the checkpoints"),
        (lambda p: (p / "champion.json").write_text("{"), "cannot be read"),
        (lambda p: (p / "champion.json").write_text("{}"), "is no champion's"),
        (lambda p: note_of(p, searched=3), "cannot be read: AttributeError"),
        (lambda p: note_of(p, trial=7), "its hash is not that of the checkpoints"),
        (lambda p: change(p / "fold_1", lambda f: f.update(x=1)), "its hash is not that"),
        (lambda p: (p / "sweep.yaml").unlink(), "no sweep.yaml beside it says who was held out"),
        (lambda p: (p / "sweep.yaml").write_text("a: ["), "cannot be read: ValueError"),
    ],
)
def test_what_cannot_be_read_of_a_choice_is_unknown(
    place: Path, demo_store: Store, spoil: Callable[[Path], object], why: str
) -> None:
    spoil(place)
    (check,) = judge(place, demo_store)["champion"]
    assert check.state == UNKNOWN
    assert why in check.why


def test_a_champion_json_that_is_a_link_elsewhere_is_not_followed(
    place: Path, demo_store: Store, tmp_path: Path
) -> None:
    secret = tmp_path / "secret.json"
    shutil.move(place / "champion.json", secret)
    (place / "champion.json").symlink_to(secret)
    (check,) = judge(place, demo_store)["champion"]
    assert check.state == UNKNOWN
    assert "leads out of" in check.why


def test_a_folder_that_is_named_says_nothing_of_models_elsewhere(
    trained: Path, place: Path, demo_store: Store
) -> None:
    (check,) = judge(trained / "trials" / "0000", demo_store, chosen=place)["champion"]
    assert check.state == UNKNOWN
    assert "says nothing of" in check.why


@pytest.mark.parametrize(("earlier", "state"), [(None, UNKNOWN), (0, PASSED), (3, NOTE)])
def test_earlier_looks_are_told(
    trained: Path, demo_store: Store, earlier: int | None, state: str
) -> None:
    (check,) = judge(trained / "champion", demo_store, earlier=earlier)["earlier"]
    assert check.state == state
    assert ("3 earlier evaluations" in check.why) == (earlier == 3)


# Cross-validated ---------------------------------------------------------------------------------


def test_a_fold_may_be_judged_on_its_own_validation_and_nobody_elses(
    trained: Path, demo_store: Store
) -> None:
    first, second = (ensemble(trained / "champion" / f"fold_{n}").members[0] for n in range(2))
    alone = ensemble(trained / "champion" / "fold_0")
    checks = judge_gate(alone, demo_store, first.fold.validation, cross_validated=True)
    states = {c.name: c.state for c in checks}
    assert (states["patients"], states["champion"]) == (NOTE, NOTE)
    assert {states[name] for name in ("copies", "panel", "targets", "folds")} == {PASSED}
    with pytest.raises(LeakError, match=r"patients .*trained"):
        judge_gate(alone, demo_store, second.fold.validation, cross_validated=True)
    with pytest.raises(LeakError, match="are not the validation of fold 0"):
        judge_gate(alone, demo_store, [SECTION], cross_validated=True)


def test_a_validation_patient_with_another_section_in_training_is_refused(
    trained: Path, demo_store: Store
) -> None:
    """By patient it is a leak; folds by section say so of themselves, and it is noted."""
    member = ensemble(trained / "champion" / "fold_0").members[0]
    store = Store(demo_store.path)
    store.index["sections"] = copy.deepcopy(store.index["sections"])
    patient = store.sections[member.fold.train[0]]["patient"]
    store.sections[member.fold.validation[0]]["patient"] = patient
    own = Ensemble(members=[member], genes=member.fitted.genes, median_total=1.0)
    with pytest.raises(LeakError, match=f"patients {patient} trained"):
        judge_gate(own, store, member.fold.validation, cross_validated=True)
    protocol = dataclasses.replace(member.settings.protocol, group="section")
    settings = dataclasses.replace(member.settings, protocol=protocol)
    by_section = dataclasses.replace(member, settings=settings)
    own = Ensemble(members=[by_section], genes=member.fitted.genes, median_total=1.0)
    checks = judge_gate(own, store, member.fold.validation, cross_validated=True)
    (check,) = (c for c in checks if c.name == "patients")
    assert check.state == NOTE
    assert f"of patients {patient} other sections trained" in check.why


def test_no_state_is_left_out_of_the_line_and_no_check_of_the_page() -> None:
    checks = [
        Check(name="a", of="fold 0", state=PASSED, why="x"),
        Check(name="a", of="fold 1", state=FAILED, why="y"),
        Check(name="b", state=UNKNOWN, why="z"),
    ]
    assert gate_line(checks) == "leak gate: 1 passed, 1 unknown, 1 failed"
    few, every = gate_blocks(checks)
    assert few.table is not None
    assert few.table["state"].tolist() == [FAILED, UNKNOWN]
    assert every.table is not None
    assert every.table["why"].tolist() == ["x", "y", "z"]
