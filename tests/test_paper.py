"""The paper's results: its printed values, ours beside them, and whether they can be compared."""

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import anndata
import cv2
import numpy as np
import pandas as pd
import pytest
import yaml
from scipy.stats import pearsonr
from trainings import CPU, quiet

from brstnet.config import Prepare, Protocol, Settings, Training, plain, preset, to_yaml
from brstnet.data.prepare import prepare
from brstnet.data.readers import stnet
from brstnet.data.store import Store, sha256
from brstnet.data.synthetic import Demo, make_demo
from brstnet.evaluation.paper import figures as paper_figures
from brstnet.evaluation.paper import models as paper
from brstnet.evaluation.paper import picture, printed, same_quantity
from brstnet.evaluation.paper import tables as paper_tables
from brstnet.evaluation.paper.models import DEPTH, Model, section_scores
from brstnet.evaluation.paper.same_quantity import Facts
from brstnet.evaluation.paper.tables import bin_counts
from brstnet.evaluation.predict import Ensemble, load_ensemble, predict
from brstnet.evaluation.scores import MODEL
from brstnet.evaluation.slides.slide import open_slide
from brstnet.training.train import fit
from sweeps import paper as command
from sweeps import paper_trials as trials
from sweeps.board import write_outcome
from sweeps.paper_results import wide_1, with_clock
from sweeps.space import Sweep

pytestmark = pytest.mark.slow  # all of it, together

TEXT = Path(__file__).parents[2] / "shared" / "paper"
HELD_OUT = "BC90006"
PANEL = 30
SYMBOLS = list(printed.table_1().index)
ABSENT = SYMBOLS[-1]
"""TMSB4X: the one of the paper's ten that the store below does not have."""


# What the paper prints ---------------------------------------------------------------------------


def test_printed_values_by_hand() -> None:
    one, two, three = printed.table_1(), printed.table_2(), printed.table_3()
    assert one.shape == (10, 10)
    assert one.loc["B2M", "efficientnet_b0"] == 0.6325
    assert one.loc["ACTB", "vit_b16"] == 0.6359
    assert one.loc["TMSB10", "efficientnet_b1"] == 0.0634
    assert two.loc[("efficientnet_b0", True)].tolist() == [0.7730, 0.9528, 0.7490, 0.9144]
    assert two.loc[("vit_b32", False)].tolist() == [0.7961, 0.9829, 0.7607, 0.9311]
    assert three[("efficientnet_b0", True)] == (19 * 60 + 4) * 60 + 28
    assert three.sum() // 3600 == 504
    assert paper_tables.clock(three.sum()) == "504:07:17"
    assert list(one.columns) == list(printed.NAMES)
    assert set(two.index) == {(name, aux) for name in printed.NAMES for aux in (True, False)}


def test_printed_bins_make_up_the_panel() -> None:
    bins = printed.bins()
    assert list(bins.values()) == [13, 12, 78, 123, 24]
    assert sum(bins.values()) == 250
    assert sum(list(bins.values())[1:]) == 237


def test_printed_values_are_those_of_the_text() -> None:
    files = sorted(TEXT.glob("*.txt"))
    if not files:
        pytest.skip("the paper's text is not here")
    text = files[0].read_text()
    for symbol, row in printed.table_1().iterrows():
        assert "\t".join([str(symbol), *(f"{v:.4f}" for v in row)]) in text
    for (backbone, auxnet), row in printed.table_2().iterrows():
        name = paper.label(backbone, auxnet=auxnet)
        assert "\t".join([name, *(f"{v:.4f}" for v in row)]) in text
        assert f"{name}\t{paper_tables.clock(printed.table_3()[(backbone, auxnet)])}\n" in text
    said = "237 genes with positive correlation (Fig. 3), including 24 genes"
    assert said in text
    assert "123 genes with PCC values between 0.3 and 0.5" in text
    assert "78 genes with PCC values between 0.1 and 0.3" in text


# The same quantity? ------------------------------------------------------------------------------


def papers_facts() -> Facts:
    """What a run of sweeps/paper.yaml on the paper's data set would be."""
    said = preset("paper", "protocol", "training")
    parts: dict[str, dict[str, object]] = {"protocol": {}, "training": {}}
    for key, value in said.items():
        group, name = key.split(".")
        parts[group][name] = tuple(value) if isinstance(value, list) else value
    return Facts(
        layout="stnet",
        patients=23,
        sections=68,
        spots_raw=30_612,
        spots_kept=28_792,
        prepare=plain(Prepare()),
        settings=Settings(
            protocol=Protocol(**parts["protocol"]), training=Training(**parts["training"])
        ),
        judged=("BC23903",),
        judged_sections=("BC23903_C1", "BC23903_C2", "BC23903_D1"),
        machines=({"device": "NVIDIA V100", "workers": 2, "precision": "float32"},),
    )


def changed(facts: Facts, **changes: object) -> Facts:
    """The facts with other protocol, training, prepare or facts of their own."""
    settings, own, made = facts.settings, {}, dict(facts.prepare)
    facts_own = {field.name for field in dataclasses.fields(Facts)}
    for name, value in changes.items():
        if name in facts_own:
            own[name] = value
        elif hasattr(settings.protocol, name):
            protocol = dataclasses.replace(settings.protocol, **{name: value})
            settings = dataclasses.replace(settings, protocol=protocol)
        elif name in made:
            made[name] = value
        elif hasattr(settings.training, name):
            training = dataclasses.replace(settings.training, **{name: value})
            settings = dataclasses.replace(settings, training=training)
    return dataclasses.replace(facts, settings=settings, prepare=made, **own)


def test_the_papers_own_protocol_is_the_same_quantity_but_for_time() -> None:
    facts = papers_facts()
    for verdict in (
        same_quantity.table_1(facts),
        same_quantity.table_2(facts, 250),
        same_quantity.counts(facts, 250),
    ):
        assert verdict.same
        assert verdict.training == ()
        assert verdict.line.startswith("The same quantity")
        assert any("cross-entropy" in each for each in verdict.open)
    time = same_quantity.table_3(facts)
    assert not time.same
    assert "2 x NVIDIA V100" in time.line
    assert "that it does not name" in time.line


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"target": "log_normalised"}, "another target"),
        ({"judged": ("BC23450",)}, "another held-out patient: BC23450"),
        ({"judged": ("BC23450", "BC23903")}, "another held-out patient: BC23450, BC23903"),
        ({"patients": 22}, "another data set: 22 patients"),
        ({"layout": "her2st"}, "another data set"),
        ({"min_counts": 500}, "spots with at least 500 counts"),
        ({"spots_kept": 25_000}, "25,000 spots pass the filter"),
    ],
)
def test_what_is_measured_on_whom_changes_the_quantity(
    change: dict[str, object], reason: str
) -> None:
    facts = changed(papers_facts(), **change)
    for verdict in (
        same_quantity.table_1(facts),
        same_quantity.table_2(facts, 250),
        same_quantity.counts(facts, 250),
    ):
        assert not verdict.same
        assert reason in verdict.line
        assert "Not the same quantity" in verdict.line


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"epochs": 20}, "epochs 20 (paper: 200)"),
        ({"aux_weight": 1.0}, "aux_weight 1.0 (paper: 40.0)"),
        ({"weights": "timm"}, "weights timm (paper: None)"),
        ({"window_px": 299}, "window_px 299 (paper: 224)"),
        ({"stain": "none"}, "stain none (paper: vahadane)"),
        ({"folds": 3}, "3 folds by patient (paper: 5 by patient)"),
        ({"group": "section"}, "5 folds by section (paper: 5 by patient)"),
        ({"seed": 7}, ""),
        ({"backbone": "vit_b16"}, ""),
    ],
)
def test_how_models_were_made_is_said_apart(change: dict[str, object], reason: str) -> None:
    verdict = same_quantity.table_1(changed(papers_facts(), **change))
    assert verdict.same
    assert verdict.training == ((reason,) if reason else ())
    assert ("made otherwise" in verdict.line) == bool(reason)


def test_the_panel_is_the_quantity_of_counts_and_errors_alone() -> None:
    facts = changed(papers_facts(), panel_size=100)
    assert same_quantity.table_1(facts).same
    for verdict in (same_quantity.counts(facts, 100), same_quantity.table_2(facts, 100)):
        assert "panel of 100 genes (paper: 250)" in verdict.quantity
    errors = same_quantity.table_2(papers_facts(), 240)
    assert errors.quantity == (
        "over 240 of the panel's 250 genes: those that every model here predicts",
    )
    fewer = same_quantity.counts(papers_facts(), 240)
    assert fewer.quantity == ("240 of the panel's 250 genes are both predicted and measured here",)


def test_figures_of_another_model_section_or_gene_say_so() -> None:
    facts, best = papers_facts(), ("efficientnet_b0", True)
    assert same_quantity.figure_3(facts, 250, best).same
    other = same_quantity.figure_3(facts, 250, ("vit_b16", False))
    assert other.quantity == (
        "another model: ViT-B16 without AuxNet (paper: EfficientNet-b0 with AuxNet)",
    )
    assert same_quantity.figure_4(facts, best, "BC23903_C2", "B2M").same
    reasons = same_quantity.figure_4(facts, best, "BC23903_C1", "ACTB").quantity
    assert reasons == (
        "another section: BC23903_C1 (paper: BC23903 C2)",
        "another gene: ACTB (paper: B2M)",
    )


def test_time_without_a_gpu_says_so() -> None:
    cpu = ({"device": "cpu", "workers": 1, "threads": 2},)
    verdict = same_quantity.table_3(dataclasses.replace(papers_facts(), machines=cpu))
    assert "1 worker(s) of 2 CPU thread(s), no GPU" in verdict.quantity[0]
    verdict = same_quantity.table_3(dataclasses.replace(papers_facts(), machines=()))
    assert "do not say" in verdict.quantity[0]


# Sums over genes ---------------------------------------------------------------------------------


def made_up(pcc_wanted: dict[str, str]) -> Model:
    """A model with one gene each whose prediction is right, opposite or constant, or truth is."""
    rng = np.random.default_rng(0)
    spots = pd.DataFrame({"section": ["A"] * 20 + ["B"] * 30, "patient": "P"})
    true_NG = rng.normal(size=(50, len(pcc_wanted)))
    pred_NG = np.empty_like(true_NG)
    for column, kind in enumerate(pcc_wanted.values()):
        match kind:
            case "right":
                pred_NG[:, column] = true_NG[:, column]
            case "opposite":
                pred_NG[:, column] = -true_NG[:, column]
            case "constant":
                pred_NG[:, column] = 0.7
            case "flat truth":
                true_NG[:, column], pred_NG[:, column] = 1.0, rng.normal(size=50)
    genes = pd.DataFrame({"symbol": list(pcc_wanted), "panel": True, "papers": False})
    genes.index = pd.Index(list(pcc_wanted), name="gene")
    parts = [
        section_scores(pred_NG, true_NG, spots, genes.index, ("0", name)) for name in (MODEL, DEPTH)
    ]
    return Model(
        backbone="vit_b16", auxnet=True, score=0.1, genes=genes, test=pd.concat(parts), seconds=60
    )


def test_a_constant_prediction_counts_as_0_and_a_flat_truth_as_none() -> None:
    kinds = {"a": "right", "b": "opposite", "c": "constant", "d": "flat truth"}
    model = made_up(kinds)
    pcc = model.pcc()
    assert pcc["a"] == pytest.approx(1)
    assert pcc["b"] == pytest.approx(-1)
    assert pcc["c"] == 0
    assert np.isnan(pcc["d"])
    counts = bin_counts(pcc)
    assert counts == {
        "<= 0": 2,
        "0 - 0.1": 0,
        "0.1 - 0.3": 0,
        "0.3 - 0.5": 0,
        "> 0.5": 1,
        "no PCC": 1,
    }
    info = paper_tables.figure_2_info([model], model)
    assert info["genes"].tolist() == [4, 4]  # the model, the control


def test_a_genes_pcc_is_the_median_of_its_sections() -> None:
    rng = np.random.default_rng(1)
    spots = pd.DataFrame({"section": np.repeat(["A", "B", "C"], 40), "patient": "P"})
    true_NG = rng.normal(size=(120, 1))
    pred_NG = true_NG + np.repeat([0.1, 1.0, 30.0], 40)[:, None] * rng.normal(size=(120, 1))
    genes = pd.DataFrame({"symbol": ["a"], "panel": True, "papers": False}, index=["a"])
    scores = section_scores(pred_NG, true_NG, spots, genes.index, ("0", MODEL))
    model = Model(backbone="vit_b16", auxnet=True, genes=genes, test=scores)
    each = [
        pearsonr(pred_NG[rows, 0], true_NG[rows, 0])[0]
        for rows in (slice(0, 40), slice(40, 80), slice(80, 120))
    ]
    assert abs(np.median(each) - np.mean(each)) > 0.05
    assert model.pcc()["a"] == pytest.approx(np.median(each), abs=1e-12)


def test_of_genes_with_one_symbol_the_highest_is_the_papers(demo: tuple[Path, Store]) -> None:
    store = demo[1]
    genes = store.genes.iloc[:4].assign(symbol=["B2M", "B2M", "ACTB", "other"])
    genes["panel"] = [True, False, False, False]
    ensemble = Ensemble(members=[], genes=genes, median_total=1.0)
    wanted = paper.wanted_genes(ensemble, store)
    assert list(wanted.index) == [genes.index[0], genes.index[2]]
    assert wanted["papers"].tolist() == [True, True]
    assert wanted["panel"].tolist() == [True, False]


def test_what_is_kept_is_kept_whole(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        trials.whole(tmp_path / "deep" / "file", fail)
    assert not (tmp_path / "deep" / "file").exists()


def test_bins_have_their_upper_limit() -> None:
    counts = bin_counts(pd.Series([-0.2, 0.0, 1e-9, 0.1, 0.3, 0.30001, 0.5, 0.50001]))
    assert list(counts.values()) == [2, 2, 1, 2, 1, 0]


def test_the_best_is_that_of_cross_validation_with_auxnet() -> None:
    first = made_up({"a": "right"})
    second = dataclasses.replace(first, backbone="vit_b32", score=0.2)
    without = dataclasses.replace(first, backbone="resnet101", auxnet=False, score=0.9)
    gone = Model(backbone="inception_v3", auxnet=True, missing="trial 3 failed: so it did")
    assert paper_tables.best_of([first, second, without, gone]) is second
    assert paper_tables.best_of([gone, without]) is without
    with pytest.raises(ValueError, match=r"no model .* so it did"):
        paper_tables.best_of([gone])


# A real grid -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ran:
    """A grid sweep of two backbones with and without AuxNet, as it lies on disk."""

    runs: Path
    store: Store
    raw: Path
    sweep: Sweep

    @property
    def folder(self) -> Path:
        return self.runs / self.sweep.name

    def words(self, out: Path, *more: str) -> list[str]:
        where = ["--runs", str(self.runs), "--out", str(out), "--device", "cpu"]
        return [self.sweep.name, str(self.store.path), *where, *more]


@pytest.fixture(scope="module")
def demo(hgnc_once: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Store]:
    """Demo tissue with the paper's genes in it: eight of the highest, one low, one absent."""
    base = tmp_path_factory.mktemp("paper")
    make_demo(
        base / "raw", Demo(patients=6, sections_per_patient=2, spots_per_section=14, genes=150)
    )
    settings = Prepare(layout="stnet", window_px=64, input_px=32, held_out=(HELD_OUT,))
    store = prepare(base / "raw", base / "store", settings, progress=False)
    table, mean = store.genes.copy(), store.counts(list(store.sections)).mean(axis=0)
    order = np.argsort(-np.asarray(mean).ravel(), kind="stable")
    for place, symbol in zip([*range(8), 100], SYMBOLS[:9], strict=True):
        table.iloc[order[place], table.columns.get_loc("symbol")] = symbol
    table.to_parquet(base / "store" / "genes.parquet")
    index = json.loads((base / "store" / "index.json").read_text())
    index["files"]["genes.parquet"] = sha256(base / "store" / "genes.parquet")
    (base / "store" / "index.json").write_text(json.dumps(index))
    return base / "raw", Store(base / "store")


@pytest.fixture(scope="module")
def ran(demo: tuple[Path, Store], tmp_path_factory: pytest.TempPathFactory) -> Ran:
    raw, store = demo
    sweep = Sweep(
        name="tiny",
        protocol=Protocol(held_out=(HELD_OUT,), folds=2, panel_size=PANEL, target="log_counts"),
        training=Training(
            backbone="test_resnet",
            genes=PANEL,
            epochs=1,
            batch_size=8,
            learning_rate=0.02,
            aux_weight=1.0,
            schedule="cosine",
            stopping="fixed",
        ),
        search="grid",
        pruning="none",
        space={"backbone": ["efficientnet_b0", "test_resnet", "vit_b16"], "auxnet": [True, False]},
    )
    runs = tmp_path_factory.mktemp("runs")
    folder = runs / "tiny"
    folder.mkdir()
    (folder / "sweep.yaml").write_text(to_yaml(sweep))
    (folder / "identity.yaml").write_text(yaml.safe_dump({"store": store.digest}))
    for number, key in enumerate(trials.grid(sweep)[:4]):
        point = dict(zip(("backbone", "auxnet"), key, strict=True))
        trial, scores = folder / "trials" / f"{number:04d}", []
        for fold in range(2):
            out = trial / f"fold_{fold}"
            done = fit(store, sweep.settings(point), fold, out, device=CPU, on_epoch=quiet)
            scores.append(done.score)
        outcome = ended(number, point, "COMPLETE", "") | {
            "scores": scores,
            "score": float(np.mean(scores)),
            "cost_seconds": 3600.0 + 1800 * number,
        }
        write_outcome(trial, outcome)
    failed = ended(4, {"backbone": "vit_b16", "auxnet": True}, "FAILED", "patches too small\nmore")
    write_outcome(folder / "trials" / "0004", failed)
    return Ran(runs=runs, store=store, raw=raw, sweep=sweep)


def ended(number: int, point: dict[str, object], state: str, reason: str) -> dict[str, object]:
    return {
        "trial": number,
        "seed": 0,
        "state": state,
        "config": point,
        "score": None,
        "scores": [],
        "sections": {},
        "cost_seconds": 10.0,
        "reason": reason,
    }


@pytest.fixture(scope="module")
def found(ran: Ran, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes."""
    out = tmp_path_factory.mktemp("found") / "deep" / "out"
    assert command.main(ran.words(out)) == 0
    return out


@pytest.fixture
def results(found: Path) -> Iterator[dict]:
    return json.loads((found / "results.json").read_text())


def folds_of(ran: Ran, number: int) -> list[Path]:
    outcome = {"folder": str(ran.folder / "trials" / f"{number:04d}")}
    return trials.checkpoints(outcome, ran.sweep)


def by_hand(ran: Ran, number: int) -> dict[str, pd.DataFrame]:
    """Standardised predictions of the folds' mean and truth on the held-out patient, by section.

    From each model's own predictions and the raw counts, without brstnet.evaluation's tables.
    """
    paths, found = folds_of(ran, number), {}
    members = [load_ensemble([path], CPU).members[0] for path in paths]
    shared = [g for g in members[0].fitted.genes.index if g in members[1].fitted.genes.index]
    stats = [m.fitted.genes.loc[shared, ["mean", "std"]] for m in members]
    mean, std = ((stats[0][c] + stats[1][c]).to_numpy() / 2 for c in ("mean", "std"))
    for section in ran.store.of_patients([HELD_OUT]):
        preds = [predict(m, ran.store, [section])[shared].to_numpy(float) for m in members]
        columns = ran.store.genes.index.get_indexer(shared)
        true = np.log1p(ran.store.counts([section]).toarray()[:, columns])
        pred = ((preds[0] + preds[1]) / 2).astype(np.float32)  # what predictions are kept in
        pred = ((pred - mean) / std).astype(np.float32).astype(float)
        both = {"pred": pred, "true": (true - mean) / std}
        found[section] = pd.concat(
            {name: pd.DataFrame(values, columns=shared) for name, values in both.items()}, axis=1
        )
    return found


@pytest.fixture(scope="module")
def hands(ran: Ran) -> list[dict[str, pd.DataFrame]]:
    """`by_hand` of each trial."""
    return [by_hand(ran, number) for number in range(4)]


@pytest.fixture(scope="module")
def common(ran: Ran) -> list[str]:
    """The panel's genes that all four models predict."""
    ensembles = [load_ensemble(folds_of(ran, number), CPU) for number in range(4)]
    return sorted(set.intersection(*(set(e.genes.query("panel").index) for e in ensembles)))


def rows_of(results: dict, table: str, **wanted: object) -> pd.DataFrame:
    frame = pd.DataFrame(results[table])
    for column, value in wanted.items():
        frame = frame[frame[column] == value]
    return frame


@pytest.mark.parametrize("number", range(4))
def test_table_1_is_scipys(
    ran: Ran, results: dict, hands: list[dict[str, pd.DataFrame]], number: int
) -> None:
    backbone, auxnet = trials.grid(ran.sweep)[number]
    mine = rows_of(results, "table1", backbone=backbone, auxnet=auxnet)
    sections = hands[number].values()
    checked = 0
    for row in mine.to_dict("records"):
        if row["gene"] not in next(iter(sections))["pred"]:
            assert np.isnan(row["pcc"])
            assert row["note"] == "not predicted"
            continue
        pccs = [pearsonr(s["pred"][row["gene"]], s["true"][row["gene"]])[0] for s in sections]
        assert row["pcc"] == pytest.approx(np.median(pccs), abs=1e-5)
        checked += 1
    assert checked >= 14


def test_table_1_has_our_ten_then_the_papers(results: dict) -> None:
    mine = rows_of(results, "table1", backbone="efficientnet_b0", auxnet=True)
    best = rows_of(results, "table1", model=results["best"])
    assert best["rank"].tolist()[:10] == list(range(1, 11))
    top = best["pcc"].tolist()[:10]
    assert top == sorted(top, reverse=True)
    assert set(SYMBOLS) <= set(mine["symbol"])
    assert len(mine) == len(set(mine["symbol"]))
    shown = mine.set_index("symbol")["printed"]
    assert shown[SYMBOLS].tolist() == printed.table_1()["efficientnet_b0"].tolist()
    assert shown.drop(SYMBOLS).isna().all()
    without = rows_of(results, "table1", backbone="efficientnet_b0", auxnet=False)
    assert without["printed"].isna().all()  # those are in the supplement
    low = mine.set_index("symbol").loc[SYMBOLS[8]]
    assert low["rank"] is None or np.isnan(low["rank"])  # predicted by AuxNet, not in the panel
    assert np.isfinite(low["pcc"])
    assert np.isnan(mine.set_index("symbol").loc[ABSENT, "pcc"])


def test_table_1_of_the_control_follows_the_total_count(
    ran: Ran, results: dict, hands: list[dict[str, pd.DataFrame]]
) -> None:
    control = rows_of(results, "table1", backbone=DEPTH).dropna(subset="pcc")
    number = [paper.label(b, auxnet=a) for b, a in trials.grid(ran.sweep)].index(results["best"])
    sections = hands[number]
    slopes = load_ensemble(folds_of(ran, number), CPU).genes["depth_slope"]
    for row in control.to_dict("records"):
        signed = [
            np.sign(slopes[row["gene"]])
            * pearsonr(np.log1p(ran.store.spots([name])["total_counts"]), s["true"][row["gene"]])[0]
            for name, s in sections.items()
        ]
        assert row["pcc"] == pytest.approx(np.median(signed), abs=1e-6)


@pytest.mark.parametrize("number", range(4))
def test_table_2_by_hand(
    ran: Ran,
    results: dict,
    hands: list[dict[str, pd.DataFrame]],
    common: list[str],
    number: int,
) -> None:
    backbone, auxnet = trials.grid(ran.sweep)[number]
    row = rows_of(results, "table2", backbone=backbone, auxnet=auxnet).iloc[0]
    genes = common
    assert results["genes_in_table2"] == len(genes) <= PANEL
    errors = [s["pred"][genes] - s["true"][genes] for s in hands[number].values()]
    mae = np.median([e.abs().mean() for e in errors], axis=0).mean()
    rmse = np.median([np.sqrt((e**2).mean()) for e in errors], axis=0).mean()
    assert row["test_aMAE"] == pytest.approx(mae, abs=1e-5)
    assert row["test_aRMSE"] == pytest.approx(rmse, abs=1e-5)
    folds = []
    for path in folds_of(ran, number):
        member = load_ensemble([path], CPU).members[0]
        stats = member.fitted.genes.loc[genes]
        columns = ran.store.genes.index.get_indexer(genes)
        per_section = []
        for section in member.fold.train:
            kept = (ran.store.spots([section])["white_fraction"] <= 0.5).to_numpy()
            pred = predict(member, ran.store, [section])[genes].to_numpy()[kept]
            true = np.log1p(ran.store.counts([section]).toarray()[kept][:, columns])
            error = (pred - true) / stats["std"].to_numpy()
            per_section.append(np.abs(error).mean(axis=0))
        folds.append(np.median(per_section, axis=0).mean())
    assert row["training_aMAE"] == pytest.approx(np.mean(folds), abs=1e-5)
    papers = printed.table_2()
    if (backbone, auxnet) in papers.index:
        shown = [row[f"printed_{name}"] for name in printed.ERRORS]
        assert shown == papers.loc[(backbone, auxnet)].tolist()
    else:
        assert row[[f"printed_{name}" for name in printed.ERRORS]].isna().all()


def test_table_3_and_its_ratios(results: dict) -> None:
    table = pd.DataFrame(results["table3"]).set_index("model")
    assert table.loc["EfficientNet-b0 + AuxNet", "seconds"] == 3600
    assert table.loc["test_resnet + AuxNet", "relative"] == pytest.approx(2.0)
    assert table.loc["test_resnet", "relative"] == pytest.approx(9000 / 5400)
    assert table.loc["ResNet101", "printed_relative"] == pytest.approx(86339 / 71355)
    last = with_clock(pd.DataFrame(results["table3"])).iloc[-1]
    assert last["time"] == "7:00:00"
    assert last["printed_time"] == "504:07:17"


def test_figures_2_and_3_count_the_same_genes(results: dict) -> None:
    two, three = pd.DataFrame(results["fig2"]), pd.DataFrame(results["fig3"])
    best = two[(two["model"] == results["best"]) & (two["whose"] == "ours")].iloc[0]
    assert best["genes"] == PANEL if "AuxNet" in results["best"] else best["genes"] <= PANEL
    positive = best[list(printed.bins())[1:]].sum()
    assert three[MODEL].sum() == positive
    shown = two[two["whose"] == "printed"]
    assert shown["model"].tolist() == ["EfficientNet-b0 + AuxNet"]
    assert shown[list(printed.bins())].iloc[0].tolist() == [13, 12, 78, 123, 24]
    control = two[two["backbone"] == DEPTH].iloc[0]
    assert three[DEPTH].sum() == control[list(printed.bins())[1:]].sum()


def test_missing_models_are_empty_rows_that_say_why(results: dict) -> None:
    missing = {m["model"]: m["missing"] for m in results["models"] if m["missing"]}
    assert missing["ViT-B16 + AuxNet"] == "trial 4 failed: patches too small"
    assert "has not ended" in missing["ViT-B16"]
    assert missing["ResNet101"] == "not in this sweep's grid"
    assert len(results["models"]) == 22  # the paper's twenty, and test_resnet twice
    assert len(missing) == 18
    table = pd.DataFrame(results["table2"]).set_index("model")
    assert table.loc["ViT-B16 + AuxNet", "note"] == "trial 4 failed: patches too small"
    assert np.isnan(table.loc["ViT-B16 + AuxNet", "test_aMAE"])
    assert table.loc["ViT-B16 + AuxNet", "printed_test_aMAE"] == 0.7262


def test_what_is_written(found: Path, results: dict) -> None:
    for name in ("table1", "table2", "table3", "fig2", "fig3"):
        written = pd.read_csv(found / f"{name}.csv")
        lines = (found / f"{name}.md").read_text().splitlines()
        assert len(lines) == len(written) + 2
        assert len(lines[0].split(" | ")) == written.shape[1]
    one = pd.read_csv(found / "table1.csv").set_index("symbol")
    pd.testing.assert_frame_equal(
        one.drop(columns="rank"),
        wide_1(pd.DataFrame(results["table1"]))
        .set_index("symbol")
        .drop(columns="rank")
        .replace({"gene": {"": np.nan}}),
        check_dtype=False,
    )
    assert one.loc["B2M", "EfficientNet-b0 + AuxNet, printed"] == 0.6325
    assert {p.name for p in found.glob("*.png")} == {
        "fig2.png",
        "fig3.png",
        f"fig4_{HELD_OUT}_C2_B2M.png",
    }
    assert results["fig4"]["gene"] == "B2M"


def test_the_page_stands_alone_and_says_what_can_be_compared(found: Path, results: dict) -> None:
    html = (found / "index.html").read_text()
    assert html.count("data:image/png;base64,") == 3
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    assert html.count("Not the same quantity as the paper") == 6
    assert "another held-out patient: BC90006 with 2 sections" in html
    assert "trial 4 failed: patches too small" in html
    assert "0.6325" in html
    assert "another section: BC90006_C2 (paper: BC23903 C2)" in html
    verdict = results["comparable"]["table2"]
    assert not verdict["same"]
    assert any("panel of 30 genes" in reason for reason in verdict["quantity"])
    assert any("epochs 1 (paper: 200)" in reason for reason in verdict["training"])


def test_a_second_call_reads_what_was_kept(
    ran: Ran, found: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "again"
    shutil.copytree(found, out)
    before = (out / "results.json").read_bytes()
    asked = []

    def judge(paths: list[Path], *_: object) -> None:
        asked.append(paths)
        raise ValueError("predicts again")

    monkeypatch.setattr(paper, "judge", judge)
    monkeypatch.setattr(paper, "training_errors", judge)
    assert command.main(ran.words(out)) == 0
    assert (out / "results.json").read_bytes() == before
    assert not asked
    copied = dataclasses.replace(ran, runs=tmp_path / "runs")
    shutil.copytree(ran.runs, copied.runs)
    file = folds_of(copied, 0)[1] / "checkpoint.json"
    file.write_text(file.read_text() + "\n")  # another checkpoint
    assert command.main(copied.words(out)) == 0
    assert len(asked) == 1
    models = json.loads((out / "results.json").read_text())["models"]
    assert {m["missing"] for m in models if m["model"] == "EfficientNet-b0 + AuxNet"} == {
        "trial 0 cannot be judged: predicts again"
    }


def test_training_columns_can_be_left_out_and_lost_checkpoints_are_told(
    ran: Ran, tmp_path: Path
) -> None:
    copied = dataclasses.replace(ran, runs=tmp_path / "runs")
    shutil.copytree(ran.runs, copied.runs)
    shutil.rmtree(copied.folder / "trials" / "0003" / "fold_1")
    out = tmp_path / "out"
    assert command.main(copied.words(out, "--skip_training")) == 0
    table = pd.read_csv(out / "table2.csv").set_index("model")
    assert "no checkpoint of fold 1 is here" in table.loc["test_resnet", "note"]
    assert table.loc["test_resnet + AuxNet", "note"] == "training errors were not asked for"
    assert table["training_aMAE"].isna().all()
    assert np.isfinite(table.loc["test_resnet + AuxNet", "test_aMAE"])
    assert not list((out / "cache").glob("*.training.parquet"))


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"search": "random", "trials": 2}, "must be a grid .* search is random"),
        ({"space": {"backbone": ["resnet18"], "genes": [30, 60]}}, "the space has genes"),
    ],
)
def test_other_sweeps_are_refused(
    ran: Ran,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, object],
    says: str,
) -> None:
    other = dataclasses.replace(ran, runs=tmp_path)
    other.folder.mkdir()
    sweep = dataclasses.replace(ran.sweep, **changes)
    (other.folder / "sweep.yaml").write_text(to_yaml(sweep))
    assert command.main(other.words(tmp_path / "out")) == 2
    assert re.search(says, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_unknown_sweep_other_store_and_seen_patients_are_refused(
    ran: Ran, found: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(found, out)
    words = ran.words(out)
    assert command.main(["nothing", *words[1:]]) == 2
    assert f"{ran.runs} has tiny" in capsys.readouterr().err
    other = dataclasses.replace(ran, runs=tmp_path / "runs")
    other.folder.mkdir(parents=True)
    (other.folder / "sweep.yaml").write_text(to_yaml(ran.sweep))
    (other.folder / "identity.yaml").write_text("store: 0123456789ab\n")
    assert command.main(other.words(out)) == 2
    assert "was trained on 0123456789ab" in capsys.readouterr().err
    assert command.main([*words, "--patients", "BC90001"]) == 2
    assert "BC90001 cannot judge" in capsys.readouterr().err
    assert command.main([*words, "--patients", "X"]) == 2
    assert "no patient X" in capsys.readouterr().err
    assert command.main([*words, "--gene", "NOSUCH"]) == 2
    assert "--gene NOSUCH: not among" in capsys.readouterr().err
    assert command.main([*words, "--section", "BC90001_C1"]) == 2
    assert f"must be one of {HELD_OUT}_C1, {HELD_OUT}_C2" in capsys.readouterr().err


# Fig. 4 ------------------------------------------------------------------------------------------


def test_the_picture_of_patches_has_them_at_their_places(demo: tuple[Path, Store]) -> None:
    _, store = demo
    name = f"{HELD_OUT}_C1"
    made, spots = picture.of_patches(store, name), store.spots([name])
    left, right, bottom, top = made.extent
    zoom = (right - left) / made.image_HW3.shape[1]
    assert zoom == pytest.approx(2)  # 64 slide pixels are 32 of a patch
    assert (bottom - top) / made.image_HW3.shape[0] == pytest.approx(zoom)
    for patch, x, y in zip(store.patches(name), spots["pixel_x"], spots["pixel_y"], strict=True):
        column, row = ((round(v) - 32 - low) / zoom for v, low in ((x, left), (y, top)))
        part = made.image_HW3[round(row) : round(row) + 32, round(column) : round(column) + 32]
        assert np.abs(part[2:-2, 2:-2].astype(int) - patch[2:-2, 2:-2]).mean() < 1e-9
    assert (made.image_HW3 == 255).all(axis=2).any()


def test_the_picture_of_a_slide_is_it_shrunk(demo: tuple[Path, Store]) -> None:
    raw, _ = demo
    path = next(f.slide for f in stnet.find(raw).sections if f.section == f"{HELD_OUT}_C1")
    made = picture.of_slide(open_slide(path))
    whole = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
    assert made.extent == (0, whole.shape[1], whole.shape[0], 0)
    assert max(made.image_HW3.shape) <= picture.LONGER_PX
    height, width = made.image_HW3.shape[:2]
    small = cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA)
    assert np.abs(made.image_HW3.astype(int) - small).mean() < 2


def test_figure_4_is_of_the_slide_where_it_is_given(
    ran: Ran, found: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(found, out)
    more = ["--raw", str(ran.raw), "--section", f"{HELD_OUT}_C1", "--gene", "ACTB"]
    assert command.main(ran.words(out, *more)) == 0
    assert [p.name for p in out.glob("fig4_*")] == [f"fig4_{HELD_OUT}_C1_ACTB.png"]
    html = (out / "index.html").read_text()
    assert "H&amp;E: the slide itself" in html
    assert "H&amp;E: the store&#39;s patches" in (found / "index.html").read_text()
    other = tmp_path / "raw"
    shutil.copytree(ran.raw, other)
    slide = next(f.slide for f in stnet.find(other).sections if f.section == f"{HELD_OUT}_C2")
    cv2.imwrite(str(slide), cv2.imread(str(slide))[:-8])
    assert command.main(ran.words(out, "--raw", str(other))) == 2
    assert "give the raw folder that the store was made of" in capsys.readouterr().err


def test_the_maps_pcc_is_scipys_and_labels_may_be_missing(ran: Ran, found: Path) -> None:
    adata = anndata.read_h5ad(sorted((found / "cache").glob("*.h5ad"))[0])
    name, gene = f"{HELD_OUT}_C1", adata.var_names[3]
    shown = picture.of_patches(ran.store, name)
    info = paper_figures.map_info(adata, name, gene, shown)
    part = adata[adata.obs["section"] == name]
    pred, true = np.asarray(part[:, gene].X), np.asarray(part[:, gene].layers["measured"])
    assert info.pcc == pytest.approx(pearsonr(pred.ravel(), true.ravel())[0], abs=1e-6)
    assert set(info.kind_N) <= {"tumour", "normal", ""}
    drawn = paper_figures.plot_map(info, "title")
    assert "no labels" not in [t.get_text() for axes in drawn.axes for t in axes.texts]
    adata.obs["label"] = ""
    bare = paper_figures.map_info(adata, name, gene, shown)
    assert bare.kind_N is None
    drawn = paper_figures.plot_map(bare, "title")
    assert "no labels" in [t.get_text() for axes in drawn.axes for t in axes.texts]
    adata.X[:, 3] = 0.5  # a prediction that is constant
    assert paper_figures.map_info(adata, name, gene, shown).pcc == 0


def test_the_section_of_figure_4_is_c2_where_there_is_one() -> None:
    assert paper_figures.section_of(dict.fromkeys(["P_C1", "P_C2", "P_D1"])) == "P_C2"
    assert paper_figures.section_of(dict.fromkeys(["B4"])) == "B4"
