"""Backbones, heads, weights from files, and the precision that is chosen."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import safetensors.torch
import timm
import torch

from brstnet.config import Training
from brstnet.training.fitted import AUX, MAIN, Fitted
from brstnet.training.model import (
    PAPER_BACKBONES,
    BrSTNet,
    build_backbone,
    build_model,
    choose_precision,
    fit_to,
    load_weights,
    timm_name,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALLEST_PX = {"inception_v3": 75, "vit_b16": 224, "vit_b32": 224}


def fitted(main: int, aux: int) -> Fitted:
    """Nothing but the number of genes."""
    return Fitted(
        genes=pd.DataFrame({"role": [MAIN] * main + [AUX] * aux}),
        target="log_normalised",
        median_total=1.0,
        image_mean=(0, 0, 0),
        image_std=(1, 1, 1),
        sections=(),
        spots=0,
    )


@pytest.mark.parametrize("backbone", PAPER_BACKBONES)
def test_the_papers_ten_backbones_predict_with_and_without_auxnet(backbone: str) -> None:
    side = SMALLEST_PX.get(backbone, 64)
    both = build_model(Training(backbone=backbone), fitted(11, 17), side).eval()
    alone = BrSTNet(both.backbone, 11, 0).eval()
    x_BCHW = torch.randn(2, 3, side, side).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        main, aux, no_depth = both(x_BCHW)
        only, nothing, _ = alone(x_BCHW)
        feature = both.backbone(x_BCHW)
        torch.testing.assert_close(main, both.main(feature))
        torch.testing.assert_close(aux, both.aux(feature))
        torch.testing.assert_close(only, alone.main(feature))
    assert nothing is None
    assert no_depth is None
    assert alone.aux is None
    assert main.shape == only.shape == (2, 11)
    assert aux.shape == (2, 17)
    assert torch.isfinite(torch.cat([main, aux, only], dim=1)).all()


def test_the_backbones_are_the_papers_by_their_number_of_parameters() -> None:
    """Millions, without classifier, as published (speed.md, section 6)."""
    millions = {
        "resnet101": 42.5,
        "inception_v3": 21.8,
        "efficientnet_b0": 4.0,
        "efficientnet_b1": 6.5,
        "efficientnet_b2": 7.7,
        "efficientnet_b3": 10.7,
        "efficientnet_b4": 17.6,
        "efficientnet_b5": 28.3,
        "vit_b16": 85.8,
        "vit_b32": 87.5,
    }
    assert set(millions) == set(PAPER_BACKBONES)
    with torch.device("meta"):
        for name, expected in millions.items():
            backbone = timm.create_model(timm_name(name), num_classes=0)
            assert sum(p.numel() for p in backbone.parameters()) / 1e6 == pytest.approx(
                expected, abs=0.06
            )


@pytest.mark.parametrize(
    ("backbone", "side", "why"),
    [
        ("inception_v3", 64, "at least 75 px, got 64"),
        ("resnet101", 16, "at least 32 px, got 16"),
        ("vit_b16", 100, "multiple of 16 px, got 100"),
        ("vit_b32", 112, "multiple of 32 px, got 112"),
    ],
)
def test_an_input_size_that_does_not_fit_is_refused(backbone: str, side: int, why: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=why):
        build_backbone(Training(backbone=backbone), side)


def test_an_unknown_backbone_is_refused_with_the_valid_names() -> None:
    with pytest.raises(ValueError, match="got 'efficientnet_bo'") as caught:
        build_backbone(Training(backbone="efficientnet_bo"), 64)
    for name in PAPER_BACKBONES:
        assert name in str(caught.value)
    assert timm_name("test_resnet") == "test_resnet"
    assert timm_name("vit_b16") == "vit_base_patch16_224"


def test_auxnet_is_there_for_its_genes_whatever_its_weight() -> None:
    for weight in (0.0, 40.0):
        training = Training(backbone="test_resnet", aux_weight=weight)
        assert build_model(training, fitted(5, 3), 32).aux is not None
        assert build_model(training, fitted(5, 0), 32).aux is None


def test_initial_weights_follow_from_the_seed_alone() -> None:
    def weights(seed: int, noise: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(noise)
        return build_model(Training(backbone="test_vit", seed=seed), fitted(4, 2), 32).state_dict()

    first, again, other = weights(0, 1), weights(0, 2), weights(1, 1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["main.weight"], other["main.weight"])


def test_convolutions_are_channels_last() -> None:
    model = build_model(Training(backbone="test_resnet"), fitted(4, 0), 32)
    kernels = [p for p in model.parameters() if p.ndim == 4]
    assert kernels
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)


# Weights -----------------------------------------------------------------------------------------


@pytest.fixture
def donor() -> torch.nn.Module:
    """A backbone with a classifier, whose weights a file may hold."""
    torch.manual_seed(99)
    model: torch.nn.Module = timm.create_model("test_resnet", num_classes=10)
    return model


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_come_from_a_local_file_without_its_classifier(
    donor: torch.nn.Module, tmp_path: Path, suffix: str
) -> None:
    file, state = tmp_path / f"weights{suffix}", donor.state_dict()
    assert any(name.startswith("fc.") for name in state)
    if suffix == ".pth":
        torch.save(state, file)
    else:
        safetensors.torch.save_file(state, file)
    model = build_model(Training(backbone="test_resnet", weights=str(file)), fitted(4, 0), 32)
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, state[name]), name


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return Path.write_text, (self.target, "boom")


def test_a_pickle_with_code_in_it_is_refused_and_not_run(
    donor: torch.nn.Module, tmp_path: Path
) -> None:
    file, trace = tmp_path / "weights.pth", tmp_path / "trace"
    torch.save({"fc.weight": Bomb(trace)}, file)
    with pytest.raises(ValueError, match="cannot be read as weights alone"):
        load_weights(donor, file)
    file.write_bytes(pickle.dumps({"fc.weight": Bomb(trace)}, protocol=2))
    with pytest.raises(ValueError, match="cannot be read as weights alone"):
        load_weights(donor, file)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_a_file_that_is_no_weights_is_refused(
    donor: torch.nn.Module, tmp_path: Path, name: str
) -> None:
    file = tmp_path / name
    with pytest.raises(FileNotFoundError, match="no such file of weights"):
        load_weights(donor, file)
    for content in (b"", b"not weights at all"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read as weights alone"):
            load_weights(donor, file)


def test_a_file_that_holds_something_else_is_refused(
    donor: torch.nn.Module, tmp_path: Path
) -> None:
    for content in ([torch.zeros(2)], {"epoch": 3, "state_dict": {}}):
        torch.save(content, tmp_path / "weights.pth")
        with pytest.raises(ValueError, match="must hold a state dict"):
            load_weights(donor, tmp_path / "weights.pth")


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(timm.create_model("test_vit", num_classes=0).state_dict(), file)
    with pytest.raises(ValueError, match=r"weights.safetensors: does not fit the backbone"):
        build_backbone(Training(backbone="test_resnet", weights=str(file)), 32)


# Precision ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["resnet101", "inception_v3", "vit_b16", "efficientnet_b0"])
@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_precision_on_the_cpu_is_what_was_measured_to_be_fastest(
    monkeypatch: pytest.MonkeyPatch, backbone: str, native: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: native)
    assert choose_precision(Training(backbone=backbone), CPU) == expected


@pytest.mark.parametrize("copied", [False, True], ids=["itself", "its moving average"])
def test_depthwise_convolutions_are_kept_out_of_bfloat16_on_the_cpu(copied: bool) -> None:
    """Each computes in float32, all others in bfloat16; a copy does so with its own weights."""
    torch.manual_seed(0)
    model = build_model(Training(backbone="test_efficientnet"), fitted(4, 0), 32).eval()
    fit_to(model, CPU, torch.bfloat16)
    if copied:
        original, model = model, copy.deepcopy(model)
        with torch.no_grad():
            for parameter in original.parameters():
                parameter.fill_(float("nan"))
    dtypes: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            depthwise = 1 < module.groups == module.in_channels
            module.register_forward_hook(
                lambda _, __, y, depthwise=depthwise: dtypes[depthwise].add(y.dtype)
            )
    x_BCHW = torch.randn(2, 3, 32, 32)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        predicted = model(x_BCHW).main
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}
    with torch.inference_mode():
        wide = model(x_BCHW).main
    torch.testing.assert_close(predicted, wide, rtol=0.1, atol=0.02)


@pytest.mark.parametrize(
    ("device", "precision"), [(CPU, torch.float32), (CUDA, torch.bfloat16), (CUDA, torch.float32)]
)
def test_elsewhere_a_model_is_left_as_it_is(device: torch.device, precision: torch.dtype) -> None:
    model = build_model(Training(backbone="test_efficientnet"), fitted(4, 0), 32)
    fit_to(model, device, precision)
    assert not [m for m in model.modules() if "forward" in vars(m)]


@pytest.mark.parametrize("depth", ["kept", "nuisance"])
def test_a_depth_head_is_there_where_depth_is_a_nuisance(depth: Any) -> None:
    model = build_model(Training(backbone="test_vit", depth=depth), fitted(4, 2), 32).eval()
    found = model(torch.randn(3, 3, 32, 32)).depth
    assert (found is None) == (depth == "kept")
    assert found is None or found.shape == (3, 1)


@pytest.mark.parametrize("native", [True, False])
def test_precision_on_the_gpu_is_bfloat16_where_it_has_it(
    monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: native)
    expected = torch.bfloat16 if native else torch.float32
    for backbone in ("efficientnet_b0", "resnet101"):
        assert choose_precision(Training(backbone=backbone), CUDA) == expected


def test_a_precision_that_is_asked_for_is_taken() -> None:
    for name in ("float32", "bfloat16"):
        training = Training(backbone="efficientnet_b0", precision=name)  # type: ignore[arg-type]
        assert choose_precision(training, CPU) == getattr(torch, name)
        assert choose_precision(training, CUDA) == getattr(torch, name)
