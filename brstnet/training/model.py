"""Backbone, main head and AuxNet.

Shape letters: B batch, C channels, H and W pixels, F features, G genes of the main head, A genes of
AuxNet.
"""

import pickle
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from brstnet.config import Training
from brstnet.training.fitted import Fitted

PAPER_BACKBONES = {
    "resnet101": "resnet101",
    "inception_v3": "inception_v3",
    **{f"efficientnet_b{size}": f"efficientnet_b{size}" for size in range(6)},
    "vit_b16": "vit_base_patch16_224",
    "vit_b32": "vit_base_patch32_224",
}
"""The paper's ten backbones (Table 1) and what timm calls them."""

Colour = tuple[float, float, float]

SOURCES = ("hf-hub:", "local-dir:")
"""Where timm finds an encoder that brings its own configuration."""


class Outputs(NamedTuple):
    """Of the main genes (B, G); of the auxiliary ones (B, A) or None; the depth (B, 1) or None."""

    main: Tensor
    aux: Tensor | None
    depth: Tensor | None


class BrSTNet(nn.Module):
    """A backbone with a linear main head and, on the same pooled feature, AuxNet (paper, Fig. 1).

    AuxNet is there when there are auxiliary genes to predict, whatever their weight in the loss; a
    depth head where the depth is a nuisance.
    """

    def __init__(
        self,
        backbone: nn.Module,
        main_genes: int,
        aux_genes: int,
        *,
        dropout: float = 0.0,
        depth: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        features: int = backbone.num_features  # type: ignore[assignment]
        self.dropout = nn.Dropout(dropout)
        self.main = nn.Linear(features, main_genes)
        self.aux = nn.Linear(features, aux_genes) if aux_genes else None
        self.depth = nn.Linear(features, 1) if depth else None

    def forward(self, x: Tensor) -> Outputs:
        """What the heads say of standardised patches (B, C, H, W); see `Units.whole`."""
        feature_BF = self.dropout(self.backbone(x))
        with torch.autocast(x.device.type, enabled=False):  # predictions in full precision
            feature_BF = feature_BF.to(self.main.weight.dtype)
            return Outputs(
                self.main(feature_BF),
                None if self.aux is None else self.aux(feature_BF),
                None if self.depth is None else self.depth(feature_BF),
            )


class Seen(nn.Identity):
    """Stands in for a frozen backbone that has already seen every patch: features pass through."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def timm_name(backbone: str) -> str:
    """What timm calls a backbone.

    Raises:
        ValueError: it is neither one of the paper's nor timm's.
    """
    name = PAPER_BACKBONES.get(backbone, backbone)
    if not name.startswith(SOURCES) and not timm.is_model(name.split(".")[0]):
        near = timm.list_models(f"*{backbone.split('_')[0]}*")[:5]
        raise ValueError(
            f"training.backbone must be one of {', '.join(PAPER_BACKBONES)}, a model of timm"
            f"{f' (such as {near[0]})' if near else ''}, or an encoder ({' or '.join(SOURCES)}...)"
            f", got {backbone!r}"
        )
    return name


def architecture(backbone: nn.Module) -> dict[str, Any]:
    """What makes this backbone again, without its weights and wherever its configuration came from.

    Returns `name` (timm's) and `args`.
    """
    drops = ("drop_path_rate", "pretrained_model_args")
    args = {k: v for k, v in backbone._model_args.items() if k not in drops}  # type: ignore[union-attr, operator]
    name = backbone.pretrained_cfg["architecture"]  # type: ignore[index]
    return {"name": name, "args": args}


def build_backbone(training: Training, input_px: int) -> nn.Module:
    """A timm backbone that gives pooled features.

    Raises:
        ValueError: the backbone is unknown, cannot take this input size, or the weights do not fit.
        FileNotFoundError: the weights' file, or the encoder's folder, is missing.
    """
    name = timm_name(training.backbone)
    args: dict[str, Any] = {"drop_path_rate": training.drop_path} if training.drop_path else {}
    sized = ("vit_", "deit", "eva", "swin")
    if name.startswith(sized):
        args["img_size"] = input_px
    try:
        backbone = create(name, {"num_classes": 0, **args}, pretrained=training.weights == "timm")
        _check_input_size(backbone, name, input_px)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"training.backbone {training.backbone} cannot take patches of {input_px} px: {error}"
        ) from error
    except TypeError as error:
        if training.drop_path and "drop_path_rate" in str(error):
            raise ValueError(
                f"training.drop_path is {training.drop_path}, but {training.backbone} has no "
                "stochastic depth: set it to 0, or use training.dropout"
            ) from error
        raise
    if training.weights not in (None, "timm"):
        load_weights(backbone, Path(training.weights))
    return backbone


def create(name: str, args: Mapping[str, Any], *, pretrained: bool = False) -> nn.Module:
    """A backbone by timm's name of it and the arguments that `architecture` has kept."""
    backbone: nn.Module = timm.create_model(name, pretrained=pretrained, **args)
    return backbone


def colours(backbone: nn.Module) -> tuple[Colour, Colour]:
    """Mean and deviation of each colour, in 0..1, that the backbone's weights were trained with."""
    facts: dict[str, Any] = backbone.pretrained_cfg  # type: ignore[assignment]
    return tuple(facts["mean"]), tuple(facts["std"])


def _check_input_size(backbone: nn.Module, name: str, input_px: int) -> None:
    embed = getattr(backbone, "patch_embed", None)
    side = getattr(embed, "patch_size", (1, 1))[0]
    if input_px % side:
        raise ValueError(f"{name} takes patches of a multiple of {side} px, got {input_px}")
    smallest = 75 if name.startswith("inception_v3") else 32
    if input_px < smallest:
        raise ValueError(f"{name} takes patches of at least {smallest} px, got {input_px}")


def load_weights(backbone: nn.Module, path: Path) -> None:
    """Load backbone weights from a local file; classifier weights in it are left out.

    Nothing is unpickled but tensors (torch's weights_only).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file lacks weights of the backbone, has others, or holds no weights.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of weights (training.weights)")
    classifier = ("fc.", "head.", "classifier.")
    state = {k: v for k, v in _read_weights(path).items() if not k.startswith(classifier)}
    try:
        backbone.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path}: does not fit the backbone: {error}") from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read as weights alone: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: must hold a state dict (names to tensors)")
    return state


def build_model(training: Training, fitted: Fitted, input_px: int) -> BrSTNet:
    """The model for a fold, in channels_last; initial weights follow from `training.seed`."""
    torch.manual_seed(training.seed)
    return with_heads(build_backbone(training, input_px), training, fitted)


def with_heads(backbone: nn.Module, training: Training, fitted: Fitted) -> BrSTNet:
    """A backbone with the heads that a fold's genes ask for, in channels_last."""
    model = BrSTNet(
        backbone,
        fitted.main_genes,
        fitted.aux_genes,
        dropout=training.dropout,
        depth=training.depth == "nuisance",
    )
    return model.to(memory_format=torch.channels_last)


def choose_precision(training: Training, device: torch.device) -> torch.dtype:
    """The dtype of forward and backward; parameters and updates are always float32.

    On the CPU bfloat16 was measured faster for every kind of network where the processor has it,
    once depthwise convolutions are kept out of it (`fit_to`).
    """
    if training.precision != "auto":
        return getattr(torch, training.precision)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def fit_to(model: nn.Module, device: torch.device, precision: torch.dtype) -> None:
    """Make the model fast where it runs, in place: on the CPU depthwise convolutions are float32.

    oneDNN has no good bfloat16 kernel for their backward pass: EfficientNet was 0.5 to 0.9 times as
    fast in bfloat16 as in float32, and is 1.2 to 1.6 times as fast without them (benchmarks/).
    """
    if device.type != "cpu" or precision == torch.float32:
        return
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels:
            module.forward = types.MethodType(_in_float32, module)  # type: ignore[method-assign]


def _in_float32(convolution: nn.Conv2d, x_BCHW: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return type(convolution).forward(convolution, x_BCHW.float())
