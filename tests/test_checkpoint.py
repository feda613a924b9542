"""A checkpoint stands alone, holds no pickle, and survives being killed while it is replaced."""

import dataclasses
import functools
import json
import shutil
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
import safetensors.torch
import timm
import torch
from trainings import CPU, Stop, same_bits, stop_after, train, weights, with_training

from brstnet import __version__
from brstnet.config import Settings, plain
from brstnet.data.store import Store
from brstnet.training import checkpoint
from brstnet.training.batches import Units
from brstnet.training.keep import FitResult
from brstnet.training.task import Run, prepare_task
from brstnet.training.train import run_epoch, start


class Killed(Exception):
    """What a test raises where a process might be killed."""


@pytest.fixture
def run(demo_store: Store, settings: Settings, tmp_path: Path) -> Run:
    """A run after its first epoch, its checkpoints under tmp_path/run."""
    one = start(*prepare_task(demo_store, settings, 0, CPU), tmp_path / "run")
    run_epoch(one)
    one.saver.wait()
    return one


@pytest.fixture(scope="module")
def whole(
    demo_store: Store, settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> FitResult:
    """A finished fold; not to be changed."""
    out = tmp_path_factory.mktemp("whole") / "fit"
    return train(demo_store, settings, out)


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
    everyone = run.task.validation.batch(torch.from_numpy(run.task.validation.rows))
    units = Units.of(loaded.fitted, loaded.settings.training, CPU)
    with torch.inference_mode():
        before = run.model.eval()(run.task.units.input(everyone))
        after = loaded.model(units.input(everyone))
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
    settings = with_training(settings, weights=str(file))
    result = train(demo_store, settings, tmp_path / "fit")
    file.unlink()
    assert checkpoint.load(result.folder).settings.training.weights == str(file)


@pytest.mark.parametrize(
    ("by_hand", "frozen"),
    [(False, False), (True, True)],
    ids=["timm's", "a configuration and weights, frozen"],
)
def test_a_model_that_began_from_a_folder_no_longer_needs_it(
    demo_store: Store, settings: Settings, tmp_path: Path, by_hand: bool, frozen: bool
) -> None:
    """An encoder as the hub has it; the folder's weights are those that training began from."""
    torch.manual_seed(7)
    encoder = timm.create_model("test_vit", num_classes=0, img_size=32)
    folder, colours = tmp_path / "encoder", {"mean": [0.7, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
    if by_hand:
        folder.mkdir()
        config = {
            "architecture": "test_vit",
            "num_features": encoder.num_features,
            "model_args": {"img_size": 32, "num_classes": 0},
            "pretrained_cfg": {**colours, "input_size": [3, 32, 32], "num_classes": 0},
        }
        (folder / "config.json").write_text(json.dumps(config))
        safetensors.torch.save_file(encoder.state_dict(), folder / "model.safetensors")
    else:
        encoder.pretrained_cfg = {**encoder.pretrained_cfg, **colours}
        args = {"img_size": 32, "num_classes": 0}
        timm.models.save_for_hf(encoder, folder, model_args=args)
    asked = with_training(
        settings,
        backbone=f"local-dir:{folder}",
        weights="timm",
        image_statistics="weights",
        frozen=frozen,
        learning_rate=1e-3,
        epochs=1,
    )
    store = Store(shutil.copytree(demo_store.path, tmp_path / "store"))
    _, model = prepare_task(store, with_training(asked, frozen=False), 0, CPU)
    for name, value in encoder.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], value), name
    result = train(store, asked, tmp_path / "fit")
    before = checkpoint.load(result.folder)
    shutil.rmtree(folder)
    after = checkpoint.load(result.folder)
    assert after.facts["architecture"]["name"] == "test_vit"
    assert after.fitted.image_mean == (0.7, 0.5, 0.6)
    x_BCHW = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(after.model(x_BCHW)[0], before.model(x_BCHW)[0])
        if frozen:
            torch.testing.assert_close(after.model.backbone(x_BCHW), encoder.eval()(x_BCHW))


def test_a_checkpoint_of_before_there_was_an_architecture_in_it_is_read(result: FitResult) -> None:
    facts = checkpoint.read_facts(result.folder)
    assert facts["architecture"]["name"] == "test_resnet"
    before = checkpoint.load(result.folder).model.state_dict()
    del facts["architecture"]
    (result.folder / "checkpoint.json").write_text(json.dumps(facts))
    after = checkpoint.load(result.folder).model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_weights_of_a_checkpoint_are_those_that_were_validated(
    demo_store: Store, settings: Settings, tmp_path: Path
) -> None:
    """The moving average's; the weights that learn are beside the optimiser's."""
    asked = with_training(settings, ema_decay=0.9, epochs=1)
    run = start(*prepare_task(demo_store, asked, 0, CPU), tmp_path)
    run_epoch(run)
    run.saver.wait()
    kept, state = weights(tmp_path / "last"), weights(tmp_path / "last", "optimizer")
    for name, value in run.judged.state_dict().items():
        assert torch.equal(kept[name], value), name
    for name, value in run.model.state_dict().items():
        assert torch.equal(state[f"weights.{name}"], value), name
    assert not torch.equal(kept["main.weight"], state["weights.main.weight"])


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
    contents = checkpoint.Contents(
        weights=checkpoint.on_host(run.model.state_dict()),
        genes=run.task.fitted.genes,
        facts=run.task.facts,
    )
    checkpoint.save(run.out / "last", contents)


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
    epochs: list[dict[str, float]] = []
    again = train(demo_store, settings, run.out, on_epoch=epochs.append)
    assert [note["epoch"] for note in epochs] == [1]
    assert same_bits(again.folder, result.folder, "model", "optimizer")
    assert not list(run.out.glob("*.old"))


def test_settle_finds_nothing_where_nothing_was_finished(tmp_path: Path) -> None:
    assert not checkpoint.settle(tmp_path / "last")
    (tmp_path / "last.tmp").mkdir()
    assert not checkpoint.settle(tmp_path / "last")


def test_training_without_momentum_goes_on_as_well(
    demo_store: Store, settings: Settings, tmp_path: Path
) -> None:
    settings = with_training(settings, momentum=0.0)
    with pytest.raises(Stop):
        train(demo_store, settings, tmp_path / "a", on_epoch=stop_after(0))
    one, other = (train(demo_store, settings, tmp_path / name) for name in "ab")
    assert same_bits(one.folder, other.folder)


def test_what_a_killed_replacement_left_goes_with_the_next_try(
    demo_store: Store, settings: Settings, run: Run
) -> None:
    """Killed while the old one was taken away: its rest must not stay in a finished fold."""
    for left in ("best.old", "last.old", "position.old", "position.tmp"):
        (run.out / left).mkdir()
    train(demo_store, settings, run.out)
    assert {p.name for p in run.out.iterdir()} == {"best", "last", "result.json"}


# The saver ---------------------------------------------------------------------------------------


def test_the_saver_writes_in_order_one_after_the_other() -> None:
    saver, written = checkpoint.Saver(), []
    busy = threading.Lock()

    def write(number: int) -> None:
        assert busy.acquire(blocking=False)
        time.sleep(0.01)
        written.append(number)
        busy.release()

    for number in range(5):
        saver.submit(functools.partial(write, number))
    saver.wait()
    assert written == [0, 1, 2, 3, 4]


def test_what_could_not_be_written_is_told_once() -> None:
    saver, written = checkpoint.Saver(), []

    def full() -> None:
        raise OSError(28, "No space left on device")

    saver.submit(full)
    with pytest.raises(OSError, match="No space left"):
        saver.submit(lambda: written.append(1))
    saver.wait()
    saver.submit(lambda: written.append(2))
    saver.wait()
    assert written == [2]


def test_a_full_disk_ends_a_training_with_its_own_words(
    demo_store: Store, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    with pytest.raises(OSError, match="No space left"):
        train(demo_store, settings, tmp_path)
    assert not (tmp_path / "last").exists()


def test_a_copy_on_the_host_does_not_change_with_its_source() -> None:
    source = torch.arange(24.0).reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    copies = checkpoint.on_host({"whole": source, "number": torch.tensor(3)})
    expected = source.clone()
    source.zero_()
    assert torch.equal(copies["whole"], expected)
    assert copies["whole"].is_contiguous()
    assert copies["number"].shape == ()
