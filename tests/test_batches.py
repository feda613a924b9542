"""Patches on their way to the network: which, how turned, how standardised."""

import dataclasses
import shutil
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from brstnet.config import Settings, Training
from brstnet.data.store import Store
from brstnet.training import batches
from brstnet.training.batches import Batch, Plan, Spots, Units, epoch_plan, load_spots, turn
from brstnet.training.fitted import Fitted, fit_statistics, training_rows, transform
from brstnet.training.folds import Fold, make_folds
from brstnet.training.jitter import draw_jitter, jitter
from brstnet.training.model import Outputs

CPU = torch.device("cpu")
AUGMENTATIONS = ("none", "symmetries", "colour")


@pytest.fixture
def fold(demo_store: Store, settings: Settings) -> Fold:
    return make_folds(demo_store, settings.protocol)[0]


@pytest.fixture
def fitted(demo_store: Store, fold: Fold, settings: Settings) -> Fitted:
    return fit_statistics(demo_store, fold, settings)


def units(fitted: Fitted, **changes: Any) -> Units:
    """The units of a fold on the CPU."""
    return Units.of(fitted, Training(**changes), CPU)


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


def both(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Rows and symmetries of a plan that has both."""
    assert plan.symmetry_SB is not None
    return plan.rows_SB, plan.symmetry_SB


# The plan of an epoch ----------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "batch"), [(10, 4), (12, 4), (3, 8), (1, 2), (1000, 32)])
def test_every_row_is_drawn_and_every_batch_is_full(n: int, batch: int) -> None:
    rows = np.random.default_rng(0).choice(5000, n, replace=False)
    drawn, symmetry = both(epoch_plan(rows, batch, seed=1, epoch=2))
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
    whole = epoch_plan(rows, 16, 3, 5, augmentation="colour")
    for rank in range(world):
        part = epoch_plan(rows, 16, 3, 5, rank, world, "colour")
        for mine, all_of_it in zip(part, whole, strict=True):
            assert mine is not None
            assert all_of_it is not None
            assert mine.shape[:2] == (4, 16 // world)
            np.testing.assert_array_equal(mine, all_of_it[:, rank::world])


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_the_plan_follows_from_seed_and_epoch_alone(augmentation: str) -> None:
    rows = np.arange(40)

    def plan(seed: int, epoch: int) -> bytes:
        drawn = epoch_plan(rows, 8, seed, epoch, augmentation=augmentation)
        return b"".join(part.tobytes() for part in drawn if part is not None)

    first = plan(0, 0)
    np.random.default_rng().random()
    torch.manual_seed(7)
    assert plan(0, 0) == first
    assert len({plan(seed, epoch) for seed in range(4) for epoch in range(4)}) == 16


def test_symmetries_are_uniform() -> None:
    _, symmetry = both(epoch_plan(np.arange(8000), 32, seed=0, epoch=0))
    counts = np.bincount(symmetry.ravel(), minlength=8)
    assert ((counts - 1000) ** 2 / 1000).sum() < 24.3  # chi squared, 7 degrees: 1 in 1000


def test_augmentations_draw_the_same_rows_and_symmetries() -> None:
    """Each as it would without the next; no patch, step or epoch has the jitter of another."""
    rows = np.arange(40)
    none, turned, colour = (
        epoch_plan(rows, 8, 3, 5, augmentation=augmentation) for augmentation in AUGMENTATIONS
    )
    assert none[1:] == (None, None)
    assert turned.jitter_SB43 is None
    for plan in (none, colour):
        np.testing.assert_array_equal(plan.rows_SB, turned.rows_SB)
    np.testing.assert_array_equal(colour.symmetry_SB, turned.symmetry_SB)
    maps = [epoch_plan(rows, 8, 3, epoch, augmentation="colour").jitter_SB43 for epoch in (5, 6)]
    np.testing.assert_array_equal(colour.jitter_SB43, maps[0])
    drawn = np.stack(maps)
    assert drawn.shape == (2, 5, 8, 4, 3)
    assert len(np.unique(drawn.reshape(80, 12), axis=0)) == 80


def test_a_part_of_a_plan_is_its_steps() -> None:
    for augmentation in AUGMENTATIONS:
        whole = epoch_plan(np.arange(40), 8, 3, 5, augmentation=augmentation)
        for part, all_of_it in zip(whole.part(1, 3), whole, strict=True):
            assert (part is None) == (all_of_it is None)
            if part is not None and all_of_it is not None:
                np.testing.assert_array_equal(part, all_of_it[1:3])


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
    assert len(spots.counts_NG) == len(spots.scale_N) == len(table)


@pytest.mark.parametrize("aux_target", ["standardised", "log"])
def test_targets_of_the_spots(
    demo_store: Store, fold: Fold, fitted: Fitted, settings: Settings, aux_target: str
) -> None:
    """Raw counts of a batch, scaled, logged and standardised on the device: as scipy does it."""
    allowed = training_rows(demo_store.spots(fold.train), settings.protocol)
    spots = load_spots(demo_store, fold.train, fitted, CPU, rows=allowed)
    made = units(fitted, aux_target=aux_target).target(spots.batch(torch.arange(len(allowed))))
    assert made.dtype == torch.float32
    y = made.numpy()[allowed].astype(float)
    main, aux = y[:, : fitted.main_genes], y[:, fitted.main_genes :]
    np.testing.assert_allclose(main.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(main.std(axis=0), 1, atol=1e-5)
    columns = demo_store.genes.index.get_indexer(fitted.genes.index)
    totals = demo_store.spots(fold.train)["total_counts"].to_numpy(float)
    counts = demo_store.counts(fold.train)[:, columns]
    log_units = transform(counts, totals, fitted.target, fitted.median_total).toarray()[allowed]
    in_log = log_units[:, fitted.main_genes :]
    mean, std = fitted.genes["mean"].to_numpy(), fitted.genes["std"].to_numpy()
    np.testing.assert_allclose(
        y,
        np.where(
            (aux_target == "log") & (fitted.genes["role"] == "aux").to_numpy(),
            log_units,
            (log_units - mean) / std,
        ),
        atol=1e-4,
    )
    if aux_target == "log":
        np.testing.assert_allclose(aux, in_log, atol=1e-6)
    else:
        np.testing.assert_allclose(aux.std(axis=0), 1, atol=1e-5)


@pytest.mark.parametrize("highest", [2**15 - 1, 2**15, 100_000])
def test_counts_stay_whole_numbers_however_high(
    demo_store: Store, fold: Fold, fitted: Fitted, monkeypatch: pytest.MonkeyPatch, highest: int
) -> None:
    counts = demo_store.counts(fold.validation)
    counts.data[0] = highest
    gene = demo_store.genes.index[counts.indices[0]]
    monkeypatch.setattr(Store, "counts", lambda *_: counts)
    spots = load_spots(demo_store, fold.validation, fitted, CPU)
    assert spots.counts_NG.dtype == (torch.int16 if highest < 2**15 else torch.int32)
    assert int(spots.counts_NG[0, fitted.genes.index.get_loc(gene)]) == highest


# Feeding -----------------------------------------------------------------------------------------


def plan(spots: Spots, augmentation: str = "symmetries") -> Plan:
    """Some steps of 8."""
    rows = np.random.default_rng(3).choice(spots.rows, 56)
    return epoch_plan(rows, 8, 3, 0, augmentation=augmentation)


def same(one: Batch, other: Batch) -> bool:
    pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(Batch)]
    return all(a is b is None or torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_the_feed_is_direct_indexing_in_order(spots: Spots, augmentation: str) -> None:
    """From the maps by a thread, and from memory."""
    drawn = plan(spots, augmentation)
    resident = dataclasses.replace(
        spots, resident=torch.from_numpy(np.concatenate(list(spots.maps)))
    )
    fed, picked = list(spots.feed(drawn)), list(resident.feed(drawn))
    assert len(fed) == len(picked) == 7
    whole = np.concatenate(list(spots.maps))
    for step, (one, other) in enumerate(zip(fed, picked, strict=True)):
        direct = spots.batch(*(None if p is None else torch.from_numpy(p[step]) for p in drawn))
        assert same(one, direct)
        assert same(other, direct)
        np.testing.assert_array_equal(one.x, whole[drawn.rows_SB[step]])


@pytest.mark.parametrize("first", [0, 1, 5, 6, 7])
def test_fed_from_the_middle_of_a_plan_the_batches_are_the_same(spots: Spots, first: int) -> None:
    drawn = plan(spots, "colour")
    whole = list(spots.feed(drawn))[first:]
    rest = list(spots.feed(drawn.part(first)))
    assert len(rest) == len(whole) == 7 - first
    assert all(same(one, other) for one, other in zip(rest, whole, strict=True))


def test_a_batch_that_was_fed_is_not_written_to_again(spots: Spots) -> None:
    kept = [(batch, batch.x.clone()) for batch in spots.feed(plan(spots))]
    assert all(torch.equal(batch.x, copy) for batch, copy in kept)


def test_no_more_than_a_few_batches_are_gathered_ahead(
    spots: Spots, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered: list[int] = []
    true = Spots._gathered
    monkeypatch.setattr(Spots, "_gathered", lambda s, r: (gathered.append(1), true(s, r))[1])
    feed = spots.feed(plan(spots))
    for taken, _ in enumerate(feed, 1):
        time.sleep(0.02)
        assert len(gathered) <= taken + batches.AHEAD
    assert len(gathered) == 7


def test_an_error_in_the_consumer_or_in_the_gathering_ends_the_feed(
    spots: Spots, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = threading.active_count()

    def consume() -> None:
        for _ in spots.feed(plan(spots)):
            raise KeyError("consumer")

    with pytest.raises(KeyError, match="consumer"):
        consume()
    assert threading.active_count() == before

    def broken(_: Spots, rows: np.ndarray) -> torch.Tensor:
        raise OSError("the disk is gone")

    monkeypatch.setattr(Spots, "_gathered", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        list(spots.feed(plan(spots)))
    assert threading.active_count() == before


@pytest.mark.parametrize("depth", ["kept", "nuisance"])
def test_a_goal_that_is_met_is_the_target(fitted: Fitted, spots: Spots, depth: str) -> None:
    """Outputs that equal the goal are put together to the target, bit for bit but for rounding."""
    made = units(fitted, depth=depth)
    batch = spots.batch(torch.arange(len(spots.counts_NG)))
    goal, y_BG = made.goal(batch), made.target(batch)
    main, end = fitted.main_genes, fitted.main_genes + fitted.aux_genes
    assert goal.shape[1] == end + (depth == "nuisance")
    depth_B1 = goal[:, end:] if depth == "nuisance" else None
    whole = made.whole(Outputs(goal[:, :main], goal[:, main:end], depth_B1))
    torch.testing.assert_close(whole, y_BG, atol=1e-5, rtol=1e-5)
    alone = made.whole(Outputs(goal[:, :end], None, depth_B1))
    torch.testing.assert_close(alone, y_BG, atol=1e-5, rtol=1e-5)


def test_the_rest_of_a_target_does_not_follow_the_depth(
    demo_store: Store, fold: Fold, fitted: Fitted, settings: Settings
) -> None:
    """On the training spots, where the line was fitted: numpy's correlation is zero."""
    allowed = training_rows(demo_store.spots(fold.train), settings.protocol)
    spots = load_spots(demo_store, fold.train, fitted, CPU, rows=allowed)
    goal = units(fitted, depth="nuisance").goal(spots.batch(torch.from_numpy(spots.rows)))
    rest, depth = goal[:, :-1].double().numpy(), goal[:, -1].double().numpy()
    totals = demo_store.spots(fold.train)["total_counts"].to_numpy(float)[allowed]
    assert abs(np.corrcoef(depth, np.log1p(totals))[0, 1]) == pytest.approx(1)
    assert np.abs((rest * (depth - depth.mean())[:, None]).mean(axis=0)).max() < 1e-5


@pytest.mark.parametrize("rank", [1, 5])
def test_a_goal_of_a_rank_is_what_a_singular_value_decomposition_keeps(
    demo_store: Store, fold: Fold, fitted: Fitted, settings: Settings, rank: int
) -> None:
    """Of the main targets of the training spots; the auxiliary ones stay as they are."""
    allowed = training_rows(demo_store.spots(fold.train), settings.protocol)
    spots = load_spots(demo_store, fold.train, fitted, CPU, rows=allowed)
    batch, main = spots.batch(torch.from_numpy(spots.rows)), fitted.main_genes
    made = units(fitted)
    y_NG = made.target(batch).double().numpy()
    u, s, vt = np.linalg.svd(y_NG[:, :main], full_matrices=False)
    goal = made.of_rank(rank, main, spots).goal(batch).double().numpy()
    kept = u[:, :rank] * s[:rank] @ vt[:rank]
    np.testing.assert_allclose(goal[:, :main], kept, atol=1e-4)
    np.testing.assert_array_equal(goal[:, main:], y_NG[:, main:])
    with pytest.raises(ValueError, match=r"training\.target_rank is 61, but 60 main genes"):
        made.of_rank(61, main, spots)


def test_features_take_the_place_of_patches(spots: Spots) -> None:
    """The symmetry picks the view; without one it is the view that is not turned."""
    n = len(spots.counts_NG)
    seen = dataclasses.replace(spots, features_VNF=torch.randn(8, n, 5))
    assert seen.features_VNF is not None
    rows_SB, symmetry_SB = both(plan(spots))
    for step, batch in enumerate(seen.feed(plan(spots))):
        assert torch.equal(batch.x, seen.features_VNF[symmetry_SB[step], rows_SB[step]])
        assert batch.symmetry_B is None
    for step, batch in enumerate(seen.feed(plan(spots, "none"))):
        assert torch.equal(batch.x, seen.features_VNF[0, rows_SB[step]])
    rows_B = torch.tensor([4, 0, 9])
    assert torch.equal(seen.batch(rows_B).x, seen.features_VNF[0, rows_B])


# The network's input -----------------------------------------------------------------------------


def test_input_is_standardised_by_the_folds_statistics(fitted: Fitted) -> None:
    planted = dataclasses.replace(fitted, image_mean=(0.2, 0.4, 0.6), image_std=(0.1, 0.2, 0.4))
    x_BHWC = torch.zeros((2, 4, 6, 3), dtype=torch.uint8)
    x_BHWC[1] = torch.tensor([51, 153, 255], dtype=torch.uint8)
    x_BCHW = units(planted).image(x_BHWC)
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
    x_BCHW = units(fitted).input(spots.batch(torch.from_numpy(spots.rows))).double()
    np.testing.assert_allclose(x_BCHW.mean(dim=(0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(x_BCHW.std(dim=(0, 2, 3), correction=0), 1, atol=1e-5)


def test_shrunk_patches_are_drawn_where_they_are_asked_for(
    demo_store: Store, fold: Fold, fitted: Fitted, tmp_path: Path
) -> None:
    store = Store(shutil.copytree(demo_store.path, tmp_path / "store"))
    spots = load_spots(store, fold.validation, fitted, CPU, 16)
    rows_B = torch.tensor([3, 0])
    x_BHWC = spots.patches(rows_B)
    whole = np.concatenate([store.patches(name) for name in fold.validation])[rows_B.numpy()]
    mean = whole.reshape(2, 16, 2, 16, 2, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(x_BHWC.numpy(), mean, atol=0.5 + 1e-6)


def test_the_input_of_a_batch_is_turned_and_then_standardised(fitted: Fitted, spots: Spots) -> None:
    made, rows_B, how_B = units(fitted), torch.arange(16), torch.arange(16) % 8
    turned = made.image(turn(spots.patches(rows_B), how_B))
    assert torch.equal(made.input(spots.batch(rows_B, how_B)), turned)
    assert torch.equal(made.input(spots.batch(rows_B)), made.image(spots.patches(rows_B)))
    maps = torch.from_numpy(draw_jitter(np.random.default_rng(0), (16,)))
    jittered = made.image(jitter(turn(spots.patches(rows_B), how_B), maps))
    assert torch.equal(made.input(spots.batch(rows_B, how_B, maps)), jittered)
    assert torch.equal(
        made.input(spots.batch(rows_B, None, maps)), made.image(jitter(spots.patches(rows_B), maps))
    )
    features = torch.randn(3, 7)
    batch = dataclasses.replace(spots.batch(rows_B[:3]), x=features)
    assert made.input(batch) is features


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
    rows = torch.randperm(len(spots.counts_NG))
    for on_gpu in (resident.patches(rows.to(cuda)), mapped.patches(rows.to(cuda))):
        assert on_gpu.device.type == "cuda"
        assert torch.equal(on_gpu.cpu(), spots.patches(rows))
    assert torch.equal(resident.counts_NG.cpu(), spots.counts_NG)
