"""Patches on their way to the network: which, how turned, how standardised."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch

from brstnet.config import Settings
from brstnet.data.store import Store
from brstnet.training import batches
from brstnet.training.batches import Spots, epoch_plan, load_spots, target_scale, to_input, turn
from brstnet.training.fitted import Fitted, fit_statistics, targets, training_rows
from brstnet.training.folds import Fold, make_folds

CPU = torch.device("cpu")


@pytest.fixture
def fold(demo_store: Store, settings: Settings) -> Fold:
    return make_folds(demo_store, settings.protocol)[0]


@pytest.fixture
def fitted(demo_store: Store, fold: Fold, settings: Settings) -> Fitted:
    return fit_statistics(demo_store, fold, settings)


@pytest.fixture
def spots(demo_store: Store, fold: Fold, fitted: Fitted) -> Spots:
    return load_spots(demo_store, fold.validation, fitted, CPU)


# Symmetries --------------------------------------------------------------------------------------


def test_turn_gives_exactly_the_eight_symmetries_of_the_square() -> None:
    patch = np.arange(5 * 5 * 3, dtype=np.uint8).reshape(5, 5, 3)
    turned = turn(torch.from_numpy(np.stack([patch] * 8)), torch.arange(8)).numpy()
    reference = {
        np.rot90(side, quarters).tobytes()
        for side in (patch, patch[:, ::-1])
        for quarters in range(4)
    }
    assert len(reference) == 8
    assert {one.tobytes() for one in turned} == reference


def test_turn_bit_by_bit_as_numpy_would() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (64, 6, 6, 3), np.uint8)
    how = rng.integers(0, 8, 64)
    turned = turn(torch.from_numpy(x), torch.from_numpy(how)).numpy()
    for patch, bits, got in zip(x, how, turned, strict=True):
        expected = patch
        if bits & 1:
            expected = np.fliplr(expected)
        if bits & 2:
            expected = np.flipud(expected)
        if bits & 4:
            expected = expected.transpose(1, 0, 2)
        np.testing.assert_array_equal(got, expected)


# The plan of an epoch ----------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "batch"), [(10, 4), (12, 4), (3, 8), (1, 2), (1000, 32)])
def test_every_row_is_drawn_and_every_batch_is_full(n: int, batch: int) -> None:
    rows = np.random.default_rng(0).choice(5000, n, replace=False)
    drawn, symmetry = epoch_plan(rows, batch, seed=1, epoch=2)
    steps = -(-n // batch)
    assert drawn.shape == symmetry.shape == (steps, batch)
    times = Counter(drawn.ravel().tolist())
    assert set(times) == set(rows.tolist())
    filled = steps * batch
    assert set(times.values()) <= {filled // n, -(-filled // n)}
    assert symmetry.min() >= 0
    assert symmetry.max() < 8


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_out_each_batch_that_one_process_would_draw(world: int) -> None:
    rows = np.arange(100, 150)
    whole = np.stack(epoch_plan(rows, 16, seed=3, epoch=5))
    parts = [np.stack(epoch_plan(rows, 16, 3, 5, rank, world)) for rank in range(world)]
    assert {part.shape for part in parts} == {(2, 4, 16 // world)}
    for rank, part in enumerate(parts):
        np.testing.assert_array_equal(part, whole[:, :, rank::world])


def test_the_plan_follows_from_seed_and_epoch_alone() -> None:
    rows = np.arange(40)

    def plan(seed: int, epoch: int) -> bytes:
        return np.stack(epoch_plan(rows, 8, seed, epoch)).tobytes()

    first = plan(0, 0)
    np.random.default_rng().random()
    torch.manual_seed(7)
    assert plan(0, 0) == first
    assert len({plan(seed, epoch) for seed in range(4) for epoch in range(4)}) == 16


def test_symmetries_are_uniform() -> None:
    _, symmetry = epoch_plan(np.arange(8000), 32, seed=0, epoch=0)
    counts = np.bincount(symmetry.ravel(), minlength=8)
    assert ((counts - 1000) ** 2 / 1000).sum() < 24.3  # chi squared, 7 degrees: 1 in 1000


def test_generators_differ_by_key_and_repeat_by_key() -> None:
    keys = [(0, 0), (0, 1), (1, 0), (0, 0, 1), (0, 0, 0, 1)]
    numbers = [batches.rng(*key).integers(2**63) for key in keys]
    assert len(set(numbers)) == len(keys)
    assert numbers == [batches.rng(*key).integers(2**63) for key in keys]


# Gathering ---------------------------------------------------------------------------------------


def test_gathering_from_maps_equals_indexing_their_concatenation(
    demo_store: Store, fold: Fold, spots: Spots
) -> None:
    whole = np.concatenate([demo_store.patches(name) for name in fold.validation])
    assert len(fold.validation) == 3
    rng = np.random.default_rng(0)
    for rows in (rng.permutation(len(whole)), rng.integers(0, len(whole), 200), np.arange(1)):
        got = spots.patches(torch.from_numpy(rows))
        assert got.dtype == torch.uint8
        np.testing.assert_array_equal(got.numpy(), whole[rows])


def test_patches_on_the_device_are_taken_from_there(demo_store: Store, spots: Spots) -> None:
    whole = torch.from_numpy(np.concatenate(list(spots.maps)))
    resident = dataclasses.replace(spots, resident=whole, maps=[])
    rows = torch.tensor([70, 0, 24, 23, 24])
    assert torch.equal(resident.patches(rows), spots.patches(rows))


def test_rows_and_sections_of_the_spots(
    demo_store: Store, fold: Fold, fitted: Fitted, settings: Settings
) -> None:
    table = demo_store.spots(fold.train)
    allowed = training_rows(table, settings.protocol)
    spots = load_spots(demo_store, fold.train, fitted, CPU, rows=allowed)
    assert spots.rows.tolist() == np.flatnonzero(allowed).tolist()
    assert 0 < len(spots.rows) < len(table)
    assert [fold.train[i] for i in spots.section_N] == table["section"].tolist()
    assert len(spots.y_NG) == len(table)


@pytest.mark.parametrize("aux_target", ["standardised", "log"])
def test_targets_of_the_spots(
    demo_store: Store, fold: Fold, fitted: Fitted, settings: Settings, aux_target: str
) -> None:
    allowed = training_rows(demo_store.spots(fold.train), settings.protocol)
    spots = load_spots(demo_store, fold.train, fitted, CPU, aux_target=aux_target, rows=allowed)
    y = spots.y_NG.numpy()[allowed].astype(float)
    main, aux = y[:, : fitted.main_genes], y[:, fitted.main_genes :]
    np.testing.assert_allclose(main.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(main.std(axis=0), 1, atol=1e-5)
    columns = demo_store.genes.index.get_indexer(fitted.genes.index)
    totals = demo_store.spots(fold.train)["total_counts"].to_numpy(float)
    log_units = targets(fitted, demo_store.counts(fold.train)[:, columns], totals)
    if aux_target == "log":
        np.testing.assert_array_equal(aux, log_units[allowed][:, fitted.main_genes :])
    else:
        np.testing.assert_allclose(aux.std(axis=0), 1, atol=1e-5)
    shift, scale = target_scale(fitted, aux_target)
    np.testing.assert_allclose(spots.y_NG.numpy() * scale + shift, log_units, atol=1e-5)


def test_target_scale_does_not_change_the_statistics(fitted: Fitted) -> None:
    before = fitted.genes.copy()
    target_scale(fitted, "log")
    assert fitted.genes.equals(before)


# The network's input -----------------------------------------------------------------------------


def test_input_is_standardised_by_the_folds_statistics(fitted: Fitted) -> None:
    planted = dataclasses.replace(fitted, image_mean=(0.2, 0.4, 0.6), image_std=(0.1, 0.2, 0.4))
    x_BHWC = torch.zeros((2, 4, 6, 3), dtype=torch.uint8)
    x_BHWC[1] = torch.tensor([51, 153, 255], dtype=torch.uint8)
    x_BCHW = to_input(x_BHWC, planted, None)
    assert x_BCHW.shape == (2, 3, 4, 6)
    assert x_BCHW.dtype == torch.float32
    assert x_BCHW.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(x_BCHW[0, :, 0, 0], [-2, -2, -1.5], atol=1e-6)
    np.testing.assert_allclose(x_BCHW[1, :, 3, 5], [0, 1, 1], atol=1e-6)


def test_training_patches_come_out_with_mean_zero_and_deviation_one(
    demo_store: Store, fold: Fold, fitted: Fitted, settings: Settings
) -> None:
    allowed = training_rows(demo_store.spots(fold.train), settings.protocol)
    spots = load_spots(demo_store, fold.train, fitted, CPU, rows=allowed)
    x_BCHW = to_input(spots.patches(torch.from_numpy(spots.rows)), fitted, None).double()
    np.testing.assert_allclose(x_BCHW.mean(dim=(0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(x_BCHW.std(dim=(0, 2, 3), correction=0), 1, atol=1e-5)


def test_a_smaller_input_is_the_mean_over_areas(fitted: Fitted) -> None:
    planted = dataclasses.replace(fitted, image_mean=(0, 0, 0), image_std=(1, 1, 1))
    x = np.random.default_rng(0).integers(0, 256, (3, 12, 12, 3), np.uint8)
    small = to_input(torch.from_numpy(x), planted, 4)
    reference = x.reshape(3, 4, 3, 4, 3, 3).mean(axis=(2, 4)) / 255
    np.testing.assert_allclose(small.permute(0, 2, 3, 1), reference, atol=1e-6)
    assert small.is_contiguous(memory_format=torch.channels_last)
    same = to_input(torch.from_numpy(x), planted, 12)
    assert torch.equal(same, to_input(torch.from_numpy(x), planted, None))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_resident_and_mapped_patches_are_the_same_on_the_gpu(
    demo_store: Store, fold: Fold, fitted: Fitted, spots: Spots, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = torch.device("cuda")
    resident = load_spots(demo_store, fold.validation, fitted, cuda)
    monkeypatch.setattr(batches, "SHARE_OF_FREE_MEMORY", 0.0)
    mapped = load_spots(demo_store, fold.validation, fitted, cuda)
    assert resident.resident is not None
    assert mapped.resident is None
    rows = torch.randperm(len(spots.y_NG))
    for on_gpu in (resident.patches(rows.to(cuda)), mapped.patches(rows.to(cuda))):
        assert on_gpu.device.type == "cuda"
        assert torch.equal(on_gpu.cpu(), spots.patches(rows))
    assert torch.equal(resident.y_NG.cpu(), spots.y_NG)
