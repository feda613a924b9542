"""A checkpoint stands alone, holds no pickle, and survives being killed while it is replaced."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import pytest
import safetensors.torch
import timm
import torch

from brstnet import __version__
from brstnet.config import Settings, plain
from brstnet.data.store import Store
from brstnet.training import checkpoint
from brstnet.training.batches import to_input
from brstnet.training.train import FitResult, Run, fit, prepare_task, run_epoch, start

CPU = torch.device("cpu")


class Killed(Exception):
    """What a test raises where a process might be killed."""


def quiet(note: Mapping[str, float]) -> None:
    """A callback that does nothing."""


@pytest.fixture
def run(demo_store: Store, settings: Settings, tmp_path: Path) -> Run:
    """A run after its first epoch, its checkpoints under tmp_path/run."""
    one = start(prepare_task(demo_store, settings, 0, CPU), tmp_path / "run", 32)
    run_epoch(one)
    return one


@pytest.fixture(scope="module")
def whole(
    demo_store: Store, settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> FitResult:
    """A finished fold; not to be changed."""
    out = tmp_path_factory.mktemp("whole") / "fit"
    return fit(demo_store, settings, 0, out, device=CPU, on_epoch=quiet)


@pytest.fixture
def result(whole: FitResult, tmp_path: Path) -> FitResult:
    """A finished fold under tmp_path/fit, to do with as one likes."""
    shutil.copytree(whole.folder.parent, tmp_path / "fit")
    return dataclasses.replace(whole, folder=tmp_path / "fit" / whole.folder.name)


# Round trip --------------------------------------------------------------------------------------


def test_a_loaded_model_predicts_bit_for_bit_what_the_trained_one_does(
    run: Run, tmp_path: Path
) -> None:
    shutil.move(run.out / "last", tmp_path / "elsewhere")
    loaded = checkpoint.load(tmp_path / "elsewhere")
    spots, fitted = run.task.validation, run.task.fitted
    x_BHWC = spots.patches(torch.from_numpy(spots.rows))
    with torch.inference_mode():
        before = run.model.eval()(to_input(x_BHWC, fitted, None))
        after = loaded.model(to_input(x_BHWC, loaded.fitted, None))
    assert not loaded.model.training
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


def test_everything_fitted_comes_back_as_it_was(
    run: Run, settings: Settings, demo_store: Store
) -> None:
    loaded = checkpoint.load(run.out / "last")
    assert loaded.settings == settings
    assert loaded.fold == run.task.fold
    pd.testing.assert_frame_equal(loaded.fitted.genes, run.task.fitted.genes, check_exact=True)
    assert dataclasses.replace(loaded.fitted, genes=None) == dataclasses.replace(  # type: ignore[arg-type]
        run.task.fitted,
        genes=None,  # type: ignore[arg-type]
    )


def test_a_checkpoint_says_where_it_is_from(
    run: Run, settings: Settings, demo_store: Store
) -> None:
    facts = checkpoint.read_facts(run.out / "best")
    fold = run.task.fold
    assert facts["settings"] == plain(settings)
    assert facts["store"]["digest"] == demo_store.digest
    assert set(facts["store"]["sections"]) == {*fold.train, *fold.validation}
    assert facts["patients"] == sorted(
        name.removesuffix("_C1") for name in fold.train + fold.validation
    )
    assert facts["versions"]["brstnet"] == __version__
    assert facts["leak_report"]["checks"]["statistics"]["ok"]
    assert facts["scores"]["epoch"] == 0
    assert facts["machine"] == {
        **facts["machine"],
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "workers": 1,
    }


def test_there_are_no_pickles_in_it(result: FitResult, tmp_path: Path) -> None:
    files = {p for p in (tmp_path / "fit").rglob("*") if p.is_file()}
    assert {p.suffix for p in files} == {".json", ".parquet", ".safetensors"}
    names = {"checkpoint.json", "model.safetensors", "genes.parquet", "validation.parquet"}
    resumable = names | {"optimizer.safetensors", "progress.json"}
    assert {p.name for p in files if p.parent.name == "best"} == names
    assert {p.name for p in files if p.parent.name == "last"} == resumable
    assert {p.name for p in files if p.parent.name == "fit"} == {"result.json"}


def test_a_model_that_began_from_a_file_no_longer_needs_it(
    demo_store: Store, settings: Settings, tmp_path: Path
) -> None:
    file = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(timm.create_model("test_resnet").state_dict(), file)
    training = dataclasses.replace(settings.training, weights=str(file))
    settings = dataclasses.replace(settings, training=training)
    result = fit(demo_store, settings, 0, tmp_path / "fit", device=CPU, on_epoch=quiet)
    file.unlink()
    assert checkpoint.load(result.folder).settings.training.weights == str(file)


def test_the_validation_table_is_that_of_the_score(result: FitResult) -> None:
    table = pd.read_parquet(result.folder / "validation.parquet")
    by_gene = table.groupby("gene")["pcc"].mean()  # one section a patient here
    assert result.score == pytest.approx(by_gene.median())


# Formats -----------------------------------------------------------------------------------------


def change_facts(folder: Path, **changes: object) -> None:
    file = folder / "checkpoint.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_newer_format_is_refused_by_name(result: FitResult) -> None:
    change_facts(result.folder, version=checkpoint.VERSION + 1)
    with pytest.raises(
        ValueError, match=r"format version 2 is newer than this brstnet reads \(1\)"
    ):
        checkpoint.load(result.folder)


def test_something_else_is_refused(result: FitResult, tmp_path: Path) -> None:
    change_facts(result.folder, format="brstnet-store")
    with pytest.raises(ValueError, match="format is 'brstnet-store', must be 'brstnet-checkpoint'"):
        checkpoint.load(result.folder)
    with pytest.raises(FileNotFoundError, match="no checkpoint here"):
        checkpoint.load(tmp_path)


def test_a_setting_this_version_does_not_know_is_refused(result: FitResult) -> None:
    settings = checkpoint.read_facts(result.folder)["settings"]
    settings["training"]["warmup"] = 3
    change_facts(result.folder, settings=settings)
    with pytest.raises(ValueError, match=r"training\.warmup is no setting"):
        checkpoint.load(result.folder)


# Replacing ---------------------------------------------------------------------------------------


def save_again(run: Run) -> None:
    checkpoint.save(run.out / "last", run.model, run.task.fitted.genes, run.task.facts)


def test_a_replacement_killed_between_its_two_renames_is_put_back(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = run.out / "last"
    before = (last / "progress.json").read_text()
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise Killed
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(Killed):
            save_again(run)
    assert not last.exists()
    assert (run.out / "last.old").is_dir()
    assert checkpoint.settle(last)
    assert (last / "progress.json").read_text() == before
    save_again(run)
    assert sorted(p.name for p in run.out.iterdir()) == ["best", "last"]


def test_a_replacement_killed_while_it_writes_leaves_the_old_one(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(pd.DataFrame, "to_parquet", killed)
        with pytest.raises(Killed):
            save_again(run)
    assert checkpoint.settle(run.out / "last")
    assert (run.out / "last" / "progress.json").is_file()
    save_again(run)
    assert sorted(p.name for p in run.out.iterdir()) == ["best", "last"]


def test_training_goes_on_from_what_a_killed_replacement_left(
    demo_store: Store, settings: Settings, run: Run, result: FitResult
) -> None:
    (run.out / "last").rename(run.out / "last.old")
    (run.out / "best").rename(run.out / "best.old")
    (run.out / "last.tmp").mkdir()
    epochs: list[Mapping[str, float]] = []
    again = fit(demo_store, settings, 0, run.out, device=CPU, on_epoch=epochs.append)
    assert [note["epoch"] for note in epochs] == [1]
    for name in ("model", "optimizer"):
        one, other = (
            safetensors.torch.load_file(r.folder / f"{name}.safetensors") for r in (again, result)
        )
        assert all(torch.equal(one[key], other[key]) for key in other)
    assert not list(run.out.glob("*.old"))


def test_settle_finds_nothing_where_nothing_was_finished(tmp_path: Path) -> None:
    assert not checkpoint.settle(tmp_path / "last")
    (tmp_path / "last.tmp").mkdir()
    assert not checkpoint.settle(tmp_path / "last")


def test_training_without_momentum_goes_on_as_well(
    demo_store: Store, settings: Settings, tmp_path: Path
) -> None:
    training = dataclasses.replace(settings.training, momentum=0.0)
    settings = dataclasses.replace(settings, training=training)
    run_epoch(start(prepare_task(demo_store, settings, 0, CPU), tmp_path / "a", 32))
    results = [
        fit(demo_store, settings, 0, tmp_path / name, device=CPU, on_epoch=quiet) for name in "ab"
    ]
    one, other = (safetensors.torch.load_file(r.folder / "model.safetensors") for r in results)
    assert all(torch.equal(one[key], other[key]) for key in other)
