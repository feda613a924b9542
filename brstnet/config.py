"""Every setting of the platform: frozen, checked when made, YAML in and out, with a fingerprint.

`Prepare` makes a store. `Protocol` says what is predicted, on whom and how it is scored: it is the
same for every trial of a sweep. `Training` is what a sweep may search. `Settings` is the two
together: one run.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

T = TypeVar("T")

PRESETS = Path(__file__).parent / "presets"
"""A YAML file each: what `--preset NAME` and a sweep's `preset: NAME` take for defaults."""


def _must(holds: bool, what: str, came: object) -> None:  # noqa: FBT001 - reads as a sentence
    if not holds:
        raise ValueError(f"{what}, got {came!r}")


def _check_values(settings: Any) -> None:
    """Refuse a null that is no choice, infinity and NaN.

    In a float, 1 becomes 1.0: equal settings have equal fingerprints.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        optional = "None" in str(field.type)
        _must(optional or value is not None, f"{field.name} must have a value", value)
        if field.type in (float, float | None) and value is not None:
            _must(math.isfinite(value), f"{field.name} must be a finite number", value)
            object.__setattr__(settings, field.name, float(value))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepare:
    """How raw slides and counts become a store.

    Args:
        layout: raw folder layout: the paper's data set (stnet) or Andersson et al. 2021 (her2st).
        stain: Vahadane per colour, the StainTools library itself, or none.
        stain_target: section that all others are normalised to; by default the first section of
            the patient with most sections, never of one in `held_out`.
        held_out: patients who will be held out, so that none of them becomes the stain target.
        min_counts: spots with fewer total counts go to the ledger (paper: 1000).
        window_px: side of the square window round a spot, in slide pixels (paper: 224).
        input_px: side of the stored patch, in pixels (paper: 224).
        luminosity: whose lightness is standardised before the stains are: that of the target and
            of every slide (paper), or of the target alone (code).
    """

    layout: Literal["stnet", "her2st"] = "stnet"
    stain: Literal["vahadane", "staintools", "none"] = "vahadane"
    stain_target: str | None = None
    held_out: tuple[str, ...] = ()
    min_counts: int = 1000
    window_px: int = 224
    input_px: int = 224
    luminosity: Literal["both", "target"] = "both"

    def __post_init__(self) -> None:
        _check_values(self)
        _must(self.min_counts >= 1, "min_counts must be at least 1", self.min_counts)
        for name in ("window_px", "input_px"):
            side = getattr(self, name)
            _must(16 <= side <= 4096, f"{name} must be from 16 to 4096 pixels", side)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is predicted, on whom, and how it is scored. Stands beside every number.

    Args:
        held_out: patients that no fold sees, for the final evaluation (paper: BC23903).
        folds: number of folds; groups sorted by name go round in turn (paper: 5).
        group: what never stands on both sides of a split. `section` lets one patient's sections
            do so: scores are then within-patient, and every result says it.
        target: log1p of the count scaled from the spot's total to the training median
            (log_normalised), or log1p of the count (log_counts, the paper's).
        panel_size: every model is scored on this many genes, those with the highest mean count
            on the fold's training spots (paper: 250).
        min_gene_fraction: genes in fewer of the training spots are left out; 0 keeps every gene
            with a mean above 0 (paper), 0.1 is the authors' code.
        max_white_fraction: training spots whose patch is whiter are left out (paper: 0.5).
    """

    held_out: tuple[str, ...] = ()
    folds: int = 5
    group: Literal["patient", "section"] = "patient"
    target: Literal["log_normalised", "log_counts"] = "log_normalised"
    panel_size: int = 250
    min_gene_fraction: float = 0.0
    max_white_fraction: float = 0.5

    def __post_init__(self) -> None:
        _check_values(self)
        _must(self.folds >= 2, "folds must be at least 2", self.folds)
        _must(self.panel_size >= 1, "panel_size must be at least 1", self.panel_size)
        for name in ("min_gene_fraction", "max_white_fraction"):
            share = getattr(self, name)
            _must(0 <= share <= 1, f"{name} must be from 0 to 1", share)
        _must(
            len(set(self.held_out)) == len(self.held_out),
            "held_out must name each patient once",
            self.held_out,
        )

    def line(self) -> str:
        """The protocol in one line, to stand beside a score."""
        held_out = ", ".join(self.held_out) or "nobody"
        within = " (sections of one patient on both sides)" if self.group == "section" else ""
        return (
            f"{self.folds} folds by {self.group}{within}; held out {held_out}; "
            f"panel {self.panel_size}; target {self.target}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """How one model is trained: what a sweep may search. Defaults are the paper's.

    Args:
        backbone: one of the paper's ten (brstnet.training.model.PAPER_BACKBONES), a timm name, or
            an encoder that brings its own configuration: `hf-hub:OWNER/NAME`, `local-dir:FOLDER`.
        weights: null trains from scratch (paper), `timm` loads the weights that belong to the
            backbone's name, anything else is a local .safetensors or .pth file.
        frozen: the backbone's weights stay as they are; its features are computed once for each
            section and symmetry, and kept beside the store.
        image_statistics: colours are standardised by the training patches' mean and deviation
            (paper), or by those that the backbone's weights were trained with.
        augmentation: what a training patch goes through. `symmetries`: one of the square's eight
            (paper: random flips and rotation). `none`: it stays as it lies. `colour`: a symmetry,
            and its haematoxylin, eosin and residual stain are each multiplied by 1 + a and shifted
            by b, uniform in -0.05..0.05 (HED-light of Tellez et al. 2019, doi
            10.1016/j.media.2019.101544). Validation and prediction see no jitter.
        min_counts: training spots with fewer total counts are not drawn; 0 draws all (paper).
            Panel, targets and validation stay as they are, and so do the statistics that targets
            and images are standardised by: scores can be compared.
        genes: genes of the main head, those with the highest mean count (paper: 250).
        auxnet: predict all other genes by a second linear head (AuxNet).
        aux_weight: lambda in loss = main + lambda * auxiliary (paper: 40, code: 1).
        aux_target: auxiliary targets standardised per gene, or log1p only (code).
        target_rank: the main genes' targets are brought down to so many principal components of the
            training spots', which leaves out what genes do not share (counting noise above all);
            null learns them as they are (paper).
        depth: `kept` learns targets as they are (paper). `nuisance` takes out of each target the
            line on the log of the spot's total count that its training spots give, learns the rest,
            and that depth with an output of its own; a prediction is the rest plus the line at the
            predicted depth.
        dropout: share of the pooled feature that is dropped in training.
        drop_path: stochastic depth, the share at the deepest block (where the backbone has it).
        optimizer: SGD (paper), or AdamW, which leaves biases and norms undecayed.
        learning_rate: the highest (paper: 0.001).
        backbone_learning_rate: of the backbone alone; null takes `learning_rate`.
        momentum: of SGD (code: 0.9).
        weight_decay: of SGD (code: 1e-6) or AdamW.
        warmup_epochs: the rate climbs from 0 over so many epochs, step by step.
        ema_decay: validate and keep a moving average of the weights with this decay (it begins
            lower: after t steps at most 1 - (1 + t)^(-2/3)); 0 keeps the weights themselves.
        batch_size: over all workers together (paper: 32).
        micro_batch: patches that one worker takes through the network at a time; the gradients of
            a batch are summed. null takes the largest that fits, halving when memory runs out.
        sync_batchnorm: BatchNorm takes its statistics over all workers' patches.
        epochs: at most this many (paper: 200, code: 50).
        schedule: ReduceLROnPlateau on the validation loss (paper), CosineAnnealingLR (code), none.
        plateau_factor: plateau: the learning rate is multiplied by this.
        plateau_patience: plateau: after so many epochs without a lower validation loss.
        min_learning_rate: no schedule goes below this.
        cosine_period: cosine: epochs from highest to lowest (code: 5); null means all epochs.
        stopping: `early` ends after `patience` epochs without a lower validation loss (paper),
            `fixed` runs all epochs.
        patience: early: in epochs (paper preset: 20).
        input_px: patches are shrunk to this side on the device; null keeps the store's.
        views: 8 predicts with the mean over a patch's symmetries, 1 as it lies; so is validated,
            but with `stopping: fixed` in the last epoch alone, whose score is the fold's.
        precision: auto takes what was measured to be fastest for device and backbone.
        engine: how a step is run. `eager` launches kernel after kernel; `graph` records a whole
            step as a CUDA graph and replays it; `compile` is torch.compile. auto is `eager` on the
            CPU, and on one GPU `graph` after it has given the same as `eager` on the first batch.
        seed: every random number follows from (seed, epoch, step, rank).
    """

    backbone: str = "efficientnet_b0"
    weights: str | None = None
    frozen: bool = False
    image_statistics: Literal["training", "weights"] = "training"
    augmentation: Literal["symmetries", "none", "colour"] = "symmetries"
    min_counts: int = 0
    genes: int = 250
    auxnet: bool = True
    aux_weight: float = 40.0
    aux_target: Literal["standardised", "log"] = "standardised"
    target_rank: int | None = None
    depth: Literal["kept", "nuisance"] = "kept"
    dropout: float = 0.0
    drop_path: float = 0.0
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 1e-3
    backbone_learning_rate: float | None = None
    momentum: float = 0.9
    weight_decay: float = 1e-6
    warmup_epochs: int = 0
    ema_decay: float = 0.0
    batch_size: int = 32
    micro_batch: int | None = None
    sync_batchnorm: bool = False
    epochs: int = 200
    schedule: Literal["plateau", "cosine", "none"] = "plateau"
    plateau_factor: float = 0.1
    plateau_patience: int = 5
    min_learning_rate: float = 1e-6
    cosine_period: int | None = None
    stopping: Literal["early", "fixed"] = "early"
    patience: int = 20
    input_px: int | None = None
    views: Literal[1, 8] = 1
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    engine: Literal["auto", "eager", "graph", "compile"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        _check_values(self)
        for name in ("genes", "epochs", "patience", "plateau_patience"):
            _must(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        _must(self.batch_size >= 2, "batch_size must be at least 2", self.batch_size)
        _must(self.learning_rate > 0, "learning_rate must be above 0", self.learning_rate)
        _must(0 < self.plateau_factor < 1, "plateau_factor must be in 0..1", self.plateau_factor)
        for name in ("momentum", "dropout", "drop_path", "ema_decay"):
            share = getattr(self, name)
            _must(0 <= share < 1, f"{name} must be from 0 to below 1", share)
        for name in ("aux_weight", "weight_decay", "min_learning_rate"):
            _must(getattr(self, name) >= 0, f"{name} must not be negative", getattr(self, name))
        for name in ("min_counts", "warmup_epochs", "seed"):
            _must(getattr(self, name) >= 0, f"{name} must not be negative", getattr(self, name))
        if (rate := self.backbone_learning_rate) is not None:
            _must(rate >= 0, "backbone_learning_rate must not be negative", rate)
        if self.target_rank is not None:
            _must(self.target_rank >= 1, "target_rank must be at least 1", self.target_rank)
        if self.micro_batch is not None:
            _must(self.micro_batch >= 1, "micro_batch must be at least 1", self.micro_batch)
        if self.cosine_period is not None:
            _must(self.cosine_period >= 1, "cosine_period must be at least 1", self.cosine_period)
        if self.input_px is not None:
            _must(16 <= self.input_px <= 4096, "input_px must be from 16 to 4096", self.input_px)
        _must(
            not (self.frozen and self.augmentation == "colour"),
            "augmentation must be symmetries or none with frozen: true (its features are computed "
            "once for each symmetry, while colour changes a patch in every epoch)",
            self.augmentation,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """One run: the protocol it is judged by and how it trains.

    Args:
        protocol: what is predicted, on whom, and how it is scored.
        training: how one model is trained.
    """

    protocol: Protocol = Protocol()
    training: Training = Training()

    def __post_init__(self) -> None:
        genes, panel = self.training.genes, self.protocol.panel_size
        if not self.training.auxnet and genes < panel:
            raise ValueError(
                f"training.genes is {genes} without AuxNet, but every model is scored on the "
                f"{panel} genes of the panel: raise training.genes to at least {panel}, lower "
                "protocol.panel_size, or set training.auxnet to true"
            )

    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that are equal for equal settings."""
        return fingerprint(dataclasses.asdict(self))


class Parser(ArgumentParser):
    """jsonargparse, except that abbreviations are refused and an unknown name shows the valid ones.

    Built on jsonargparse because one dataclass then gives the command line, the YAML and the types.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Add the valid names, and the likeliest before them, when an option is unknown."""
        unknown = re.findall(r"option '([\w.]+)'|--([\w.+-]+)|[Kk]ey \"?'?([\w.]+)", message)
        names = sorted(self._parser_of(message).setting_names())
        if unknown and ("accept" in message or "nrecognized" in message):
            wrong = next(part for part in unknown[0] if part).split("=")[0]
            near = difflib.get_close_matches(wrong, names, cutoff=0.85) or near_leaves(wrong, names)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            message += f"\n{hint}valid names: {', '.join(names)}"
        if "class 'tuple'" in message:
            message += "\nwrite a list in brackets, as in '[A, B]'"
        super().error(message, ex)
        raise AssertionError  # pragma: no cover - error() exits or raises

    def instantiate(self, namespace: Namespace, *args: Any, **kwargs: Any) -> Namespace:
        """Parsed values as settings.

        Raises:
            ValueError: a settings file has something else than a mapping for a group of settings.
        """
        for group in sorted({n.split(".")[0] for n in self.setting_names() if "." in n}):
            if not isinstance(values := namespace.get(group), Namespace):
                raise ValueError(f"{group} must be a mapping of settings, got {values!r}")
        return super().instantiate(namespace, *args, **kwargs)

    def _parser_of(self, message: str) -> "Parser":
        """The parser that a message is about: a settings file's faults are told by its parent."""
        named = re.match(r"Subcommand '([\w-]+)'", message)
        parsers = [a.choices for a in self._actions if isinstance(a.choices, dict)]
        return parsers[0][named[1]] if named and parsers else self

    def setting_names(self) -> set[str]:
        """The names of all options, dotted as in YAML."""
        hidden = {"help", "config", "print_config", "print_shtab"}
        dests = {a.dest for a in self._actions if a.option_strings}
        return {d for d in dests if not any(o.startswith(d + ".") for o in dests)} - hidden


def preset_names() -> list[str]:
    """The presets there are."""
    return sorted(file.stem for file in PRESETS.glob("*.yaml"))


def preset(name: str, *groups: str) -> dict[str, Any]:
    """The settings of a preset as defaults of a parser: dotted name -> value.

    Args:
        name: of the preset.
        groups: prepare (whose names are not dotted), protocol, training.

    Raises:
        ValueError: there is no such preset.
    """
    if name not in preset_names():
        raise ValueError(f"preset must be one of {', '.join(preset_names())}, got {name!r}")
    values = read_yaml(PRESETS / f"{name}.yaml")
    return {
        key if group == "prepare" else f"{group}.{key}": value
        for group in groups
        for key, value in values[group].items()
    }


def preset_asked(words: Sequence[str]) -> str | None:
    """The NAME of `--preset NAME` in a command line, if it is there."""
    for number, word in enumerate(words):
        if word.startswith("--preset="):
            return word.partition("=")[2]
        if word == "--preset" and number + 1 < len(words):
            return words[number + 1]
    return None


def near_leaves(wrong: str, names: Iterable[str]) -> list[str]:
    """The dotted names whose last part is like that of `wrong`, the likeliest first."""
    by_leaf: dict[str, list[str]] = {}
    for name in names:
        by_leaf.setdefault(name.rsplit(".", 1)[-1], []).append(name)
    close = difflib.get_close_matches(wrong.rsplit(".", 1)[-1], by_leaf)
    return [name for leaf in close for name in by_leaf[leaf]]


def check_names(cls: type, mapping: object, source: str, prefix: str = "") -> None:
    """Refuse what is no setting of the dataclass `cls`, at any depth, with the names that are.

    Raises:
        ValueError: `mapping` is no mapping, or has a name that is not known.
    """
    if not isinstance(mapping, dict):
        where = prefix.rstrip(".") or "the whole"
        raise ValueError(f"{source}: {where} must be a mapping of settings, got {mapping!r}")
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    for name, value in mapping.items():
        if name not in fields:
            near = difflib.get_close_matches(str(name), fields, n=1)
            hint = f"did you mean {prefix}{near[0]}? " if near else ""
            raise ValueError(
                f"{source}: {prefix}{name} is no setting; {hint}valid names: {', '.join(fields)}"
            )
        kind = fields[name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            check_names(kind, value, source, f"{prefix}{name}.")


def build(cls: type[T], mapping: Any, source: str) -> T:
    """Make checked settings of a mapping.

    Raises:
        ValueError: a name is unknown or a value wrong; the message names `source`.
    """
    check_names(cls, mapping, source)
    parser = Parser(exit_on_error=False)
    parser.add_class_arguments(cls)
    try:
        return cls(**vars(parser.instantiate(parser.parse_object(mapping))))
    except (ArgumentError, ValueError, TypeError) as error:
        raise ValueError(f"{source}: {error}") from error


def read_yaml(path: Path) -> Any:
    """The contents of a YAML file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not YAML.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such settings file")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error


def plain(settings: object) -> dict[str, Any]:
    """Settings as plain dictionaries, lists and values, for JSON and YAML."""
    if not dataclasses.is_dataclass(settings) or isinstance(settings, type):
        raise TypeError(f"settings must be a dataclass value, got {settings!r}")
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(settings)))
    return values


def to_yaml(settings: object) -> str:
    """Settings as YAML, in their own order; `build` reads it back."""
    return yaml.safe_dump(plain(settings), sort_keys=False)


def fingerprint(value: object) -> str:
    """Twelve hexadecimal digits of the SHA-256 of the value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def from_namespace(cls: type[T], values: Namespace) -> T:
    """Make settings of the flat part of parsed arguments that belongs to `cls`."""
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    return cls(**{name: getattr(values, name) for name in names})
