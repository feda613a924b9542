"""What many tests need: demo tissue, its store, settings that train in a second, real tissue."""

import functools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from trainings import CPU, quiet, with_training

from brstnet.config import Prepare, Protocol, Settings, Training
from brstnet.data import genes
from brstnet.data.prepare import prepare
from brstnet.data.store import Store
from brstnet.data.synthetic import Demo, make_demo
from brstnet.training.train import fit

HER2ST = Path(__file__).parents[2] / "shared" / "data" / "her2st"
HELD_OUT = "BC90006"


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(int(os.environ.get("BRSTNET_TEST_THREADS", "1")))


@pytest.fixture(scope="session")
def her2st_raw() -> Path:
    """Real tissue: 5 slides, 33 count matrices."""
    if not HER2ST.is_dir():
        pytest.skip(f"real tissue is not here: {HER2ST}")
    return HER2ST


@pytest.fixture(scope="module")
def hgnc_once() -> Iterator[None]:
    """The table of gene symbols is read once a module: half the time that a tiny store takes."""
    original = genes._answers
    answers = functools.cache(lambda: original(genes._hgnc()[0]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(genes, "_hgnc", functools.cache(genes._hgnc))
        patch.setattr(genes, "_answers", lambda _: answers())
        yield


@pytest.fixture(scope="session")
def demo_raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demo tissue in the stnet layout: 6 patients, one section of about 24 spots each."""
    folder = tmp_path_factory.mktemp("demo") / "raw"
    make_demo(folder, Demo(patients=6, sections_per_patient=1, spots_per_section=24, genes=150))
    return folder


@pytest.fixture(scope="session")
def demo_store(demo_raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The demo tissue as a store of 32 px patches; not to be changed."""
    settings = Prepare(layout="stnet", window_px=64, input_px=32, held_out=(HELD_OUT,))
    folder = tmp_path_factory.mktemp("store") / "demo"
    return prepare(demo_raw, folder, settings, progress=False)


@pytest.fixture(scope="session")
def settings() -> Settings:
    """Two epochs of timm's smallest ResNet on two folds."""
    return Settings(
        protocol=Protocol(held_out=(HELD_OUT,), folds=2, panel_size=40),
        training=Training(
            backbone="test_resnet",
            genes=60,
            epochs=2,
            batch_size=8,
            learning_rate=0.02,
            aux_weight=1.0,
            schedule="cosine",
            stopping="fixed",
        ),
    )


@pytest.fixture(scope="session")
def trained(
    demo_store: Store, settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Both folds of the usual settings, in fold_0 and fold_1; not to be changed."""
    return _both_folds(demo_store, settings, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def briefly_trained(
    demo_store: Store, settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Both folds in float32 after one epoch; five patients, one section each, validate them."""
    short = with_training(settings, epochs=1, precision="float32")
    return _both_folds(demo_store, short, tmp_path_factory.mktemp("briefly_trained"))


def _both_folds(store: Store, settings: Settings, folder: Path) -> Path:
    for number in range(2):
        fit(store, settings, number, folder / f"fold_{number}", device=CPU, on_epoch=quiet)
    return folder
