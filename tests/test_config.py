"""Settings: frozen, checked when made, YAML in and out, with a fingerprint."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from brstnet.__main__ import make_parser
from brstnet.config import (
    Prepare,
    Protocol,
    Settings,
    Training,
    build,
    check_names,
    fingerprint,
    from_namespace,
    plain,
    read_yaml,
    to_yaml,
)

CHANGED = Settings(
    protocol=Protocol(held_out=("BC1", "BC2"), folds=3, group="section", panel_size=7),
    training=Training(
        backbone="resnet18",
        weights="timm",
        genes=9,
        auxnet=False,
        learning_rate=1e-5,
        cosine_period=4,
        input_px=64,
        seed=2**31,
    ),
)


# --- YAML


@pytest.mark.parametrize(
    "settings",
    [Settings(), CHANGED, Prepare(), Prepare(layout="her2st", stain_target="C2", held_out=("A",))],
    ids=["default", "changed", "prepare", "prepare changed"],
)
def test_yaml_round_trip(settings: Any, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(to_yaml(settings))
    again = build(type(settings), read_yaml(path), str(path))
    assert again == settings
    assert fingerprint(plain(again)) == fingerprint(plain(settings))
    assert yaml.safe_load(to_yaml(settings)) == json.loads(json.dumps(plain(settings)))


def test_what_yaml_leaves_out_is_the_default() -> None:
    assert build(Settings, {}, "x.yaml") == Settings()
    read = build(Settings, {"training": {"epochs": 3}}, "x.yaml")
    assert read == Settings(training=Training(epochs=3))


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "{}"])
def test_empty_yaml_is_all_defaults(tmp_path: Path, text: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    assert build(Settings, read_yaml(path), str(path)) == Settings()


def test_yaml_that_is_missing_or_none(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    with pytest.raises(FileNotFoundError, match=r"settings\.yaml: no such settings file"):
        read_yaml(path)
    path.write_text("training: [1, 2")
    with pytest.raises(ValueError, match=r"settings\.yaml: not valid YAML"):
        read_yaml(path)


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().training.epochs = 3  # type: ignore[misc]
    assert {Settings(), Settings()} == {Settings()}, "hashable, so that a sweep can name a trial"


# --- fingerprints


def test_fingerprint_is_equal_for_equal_settings() -> None:
    assert Settings().fingerprint() == Settings().fingerprint()
    assert len(Settings().fingerprint()) == 12
    int(Settings().fingerprint(), 16)
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": (2,), "a": 1})
    mapping = plain(CHANGED)
    turned = {key: dict(reversed(values.items())) for key, values in reversed(mapping.items())}
    assert build(Settings, turned, "x").fingerprint() == CHANGED.fingerprint()


@pytest.mark.parametrize("source", ["python", "yaml"])
def test_a_whole_number_is_the_same_float(source: str) -> None:
    """1 == 1.0, so their settings are equal and must have one fingerprint."""
    whole = {"aux_weight": 40, "weight_decay": 0}
    if source == "python":
        read = Settings(training=Training(**whole), protocol=Protocol(min_gene_fraction=0))
    else:
        read = build(Settings, {"training": whole, "protocol": {"min_gene_fraction": 0}}, "x")
    floats = Settings(training=Training(aux_weight=40.0, weight_decay=0.0))
    assert read == floats
    assert read.fingerprint() == floats.fingerprint()


def other(value: Any, kind: Any) -> Any:
    """Another value that the setting takes."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return value / 2 if value else 0.25
    if isinstance(value, int):
        return value + 1
    if isinstance(value, tuple):
        return ("BC1",)
    if options := getattr(kind, "__args__", None):
        if value in options:
            return next(option for option in options if option != value)
        return next(other for k, other in ((int, 64), (float, 0.5), (str, "timm")) if k in options)
    return f"{value}_other"


def test_fingerprint_changes_with_every_setting() -> None:
    seen = {Settings().fingerprint()}
    for part, cls in (("protocol", Protocol), ("training", Training)):
        for field in dataclasses.fields(cls):
            changed = other(getattr(cls(), field.name), field.type)
            settings = Settings(**{part: cls(**{field.name: changed})})
            assert settings.fingerprint() not in seen, field.name
            seen.add(settings.fingerprint())


# --- names


@pytest.mark.parametrize(
    ("cls", "mapping", "wrong", "near", "valid"),
    [
        (Settings, {"trainin": {}}, "trainin", "training", ["protocol", "training"]),
        (
            Settings,
            {"training": {"learning_rte": 0.1}},
            "training.learning_rte",
            "training.learning_rate",
            [f.name for f in dataclasses.fields(Training)],
        ),
        (
            Settings,
            {"protocol": {"held_uot": ["A"]}},
            "protocol.held_uot",
            "protocol.held_out",
            [f.name for f in dataclasses.fields(Protocol)],
        ),
        (
            Prepare,
            {"windowpx": 64},
            "windowpx",
            "window_px",
            [f.name for f in dataclasses.fields(Prepare)],
        ),
    ],
    ids=["top", "training", "protocol", "prepare"],
)
def test_misspelt_names_are_refused_with_the_near_and_the_valid_ones(
    cls: type, mapping: dict[str, Any], wrong: str, near: str, valid: list[str]
) -> None:
    with pytest.raises(ValueError, match="is no setting") as caught:
        build(cls, mapping, "some.yaml")
    message = str(caught.value)
    assert message.startswith(f"some.yaml: {wrong} is no setting; did you mean {near}?")
    assert message.endswith(f"valid names: {', '.join(valid)}")


@pytest.mark.parametrize("name", ["epoch", "Epochs", "EPOCHS", "training.epochs", "xyzzy", 3])
def test_no_name_is_guessed(name: object) -> None:
    """An abbreviation, another case, a dotted name, a stranger: refused, never taken as near."""
    with pytest.raises(ValueError, match=rf"x: training\.{name} is no setting"):
        build(Settings, {"training": {name: 3}}, "x")


@pytest.mark.parametrize("value", [None, 3, "epochs", [1]])
def test_settings_must_be_mappings(value: object) -> None:
    with pytest.raises(ValueError, match="x: the whole must be a mapping of settings, got"):
        check_names(Settings, value, "x")
    with pytest.raises(ValueError, match="x: training must be a mapping of settings, got"):
        build(Settings, {"training": value}, "x")


# --- types and ranges


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", "many"),
        ("epochs", 1.5),
        ("epochs", True),
        ("epochs", None),
        ("epochs", [3]),
        ("backbone", 3),
        ("backbone", None),
        ("auxnet", "maybe"),
        ("auxnet", 1),
        ("learning_rate", "fast"),
        ("learning_rate", None),
        ("schedule", "plateu"),
        ("schedule", None),
        ("stopping", "Early"),
        ("precision", "float16"),
        ("optimizer", "adam"),
        ("engine", "cuda"),
        ("image_statistics", "imagenet"),
        ("augmentation", "color"),
        ("min_counts", 0.5),
        ("warmup_epochs", 0.5),
        ("micro_batch", 1.5),
        ("weights", 3),
        ("input_px", 64.5),
        ("cosine_period", "all"),
    ],
)
def test_wrong_types_are_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^x\.yaml: .*\b{name}\b") as caught:
        build(Settings, {"training": {name: value}}, "x.yaml")
    assert str(caught.value).endswith(str(value)), "what came"


RANGES: list[tuple[type, str, list[object], list[object]]] = [
    (Prepare, "min_counts", [0, -1], [1]),
    (Prepare, "window_px", [15, 4097], [16, 4096]),
    (Prepare, "input_px", [15, 4097], [16, 4096]),
    (Protocol, "folds", [1, 0, -5], [2]),
    (Protocol, "panel_size", [0], [1]),
    (Protocol, "min_gene_fraction", [-0.1, 1.1, float("nan")], [0.0, 1.0]),
    (Protocol, "max_white_fraction", [-0.1, 1.1, float("nan")], [0.0, 1.0]),
    (Protocol, "held_out", [["A", "A"]], [["A", "B"]]),
    (Training, "genes", [0], [1]),
    (Training, "min_counts", [-1], [0, 2000]),
    (Training, "epochs", [0], [1]),
    (Training, "patience", [0], [1]),
    (Training, "plateau_patience", [0], [1]),
    (Training, "batch_size", [1, 0], [2]),
    (Training, "learning_rate", [0.0, -1e-3, float("nan"), float("inf")], [1e-9]),
    (Training, "momentum", [-0.1, 1.0, float("nan")], [0.0, 0.999]),
    (Training, "plateau_factor", [0.0, 1.0], [0.5]),
    (Training, "dropout", [-0.1, 1.0], [0.0, 0.5]),
    (Training, "drop_path", [-0.1, 1.0], [0.0, 0.5]),
    (Training, "ema_decay", [-0.1, 1.0, float("nan")], [0.0, 0.9999]),
    (Training, "backbone_learning_rate", [-1e-9, float("nan")], [0.0, 1e-9, None]),
    (Training, "warmup_epochs", [-1], [0, 5]),
    (Training, "micro_batch", [0, -1], [1, None]),
    (Training, "aux_weight", [-1.0, float("nan"), float("inf")], [0.0]),
    (Training, "weight_decay", [-1e-6, float("inf")], [0.0]),
    (Training, "min_learning_rate", [-1e-6, float("nan")], [0.0]),
    (Training, "seed", [-1], [0]),
    (Training, "cosine_period", [0], [1, None]),
    (Training, "input_px", [15, 4097], [16, 4096, None]),
]


@pytest.mark.parametrize(("cls", "name", "wrong", "right"), RANGES, ids=[r[1] for r in RANGES])
def test_ranges(cls: type, name: str, wrong: list[object], right: list[object]) -> None:
    for value in wrong:
        with pytest.raises(ValueError, match=rf"x\.yaml: {name} must .*, got "):
            build(cls, {name: value}, "x.yaml")
    for value in right:
        made = getattr(build(cls, {name: value}, "x.yaml"), name)
        assert made == (tuple(value) if isinstance(value, list) else value)


def test_colour_with_a_frozen_backbone_is_refused() -> None:
    told = "augmentation must be symmetries or none with frozen: true .* got 'colour'"
    with pytest.raises(ValueError, match=told):
        Training(frozen=True, augmentation="colour")
    with pytest.raises(ValueError, match=f"x.yaml: .*{told}"):
        build(Settings, {"training": {"frozen": True, "augmentation": "colour"}}, "x.yaml")
    assert Training(frozen=True, augmentation="none").frozen


@pytest.mark.parametrize(("auxnet", "genes"), [(True, 10), (False, 250), (False, 300)])
def test_every_panel_gene_has_a_prediction(auxnet: bool, genes: int) -> None:
    assert Settings(training=Training(auxnet=auxnet, genes=genes)).training.genes == genes


def test_auxnet_off_with_fewer_genes_than_the_panel_is_refused() -> None:
    told = "training.genes is 249 without AuxNet.*raise training.genes to at least 250"
    with pytest.raises(ValueError, match=told):
        Settings(training=Training(auxnet=False, genes=249))
    with pytest.raises(ValueError, match=f"x.yaml: {told}"):
        build(Settings, {"training": {"auxnet": False, "genes": 249}}, "x.yaml")


def test_the_protocol_line_says_what_a_number_stands_on() -> None:
    assert CHANGED.protocol.line() == (
        "3 folds by section (sections of one patient on both sides); held out BC1, BC2; "
        "panel 7; target log_normalised"
    )
    assert "held out nobody" in Protocol().line()


# --- command line


def parse_train(*argv: str) -> Settings:
    parser = make_parser()
    options = parser.instantiate(parser.parse_args(["train", "store", *argv])).train
    return Settings(protocol=options.protocol, training=options.training)


def parse_prepare(*argv: str) -> Prepare:
    parser = make_parser()
    options = parser.instantiate(parser.parse_args(["prepare", "raw", "store", *argv])).prepare
    return from_namespace(Prepare, options)


def test_command_line_overrides_yaml_by_the_settings_own_name(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(CHANGED))
    assert parse_train("--config", str(path)) == CHANGED
    read = parse_train(
        "--config", str(path), "--training.learning_rate", "0.5", "--protocol.held_out", "[BC3]"
    )
    assert read.training == dataclasses.replace(CHANGED.training, learning_rate=0.5)
    assert read.protocol == dataclasses.replace(CHANGED.protocol, held_out=("BC3",))
    path.write_text("window_px: 64\ninput_px: 32\n")
    read_prepare = parse_prepare("--config", str(path), "--input_px", "48")
    assert read_prepare == Prepare(window_px=64, input_px=48)


def test_every_setting_has_its_option(tmp_path: Path) -> None:
    """The defaults of the command line are the dataclasses' own."""
    assert parse_train() == Settings()
    assert parse_prepare() == Prepare()
    assert parse_train("--training.weights", "null").training.weights is None


@pytest.mark.parametrize(
    ("argv", "near"),
    [
        (["train", "s", "--training.learning", "0.1"], "training.learning_rate"),
        (["train", "s", "--training.epoch", "3"], "training.epochs"),
        (["train", "s", "--epochs", "3"], "training.epochs"),
        (["train", "s", "--training.epochss=3"], "training.epochs"),
        (["train", "s", "--trainng.epochs", "3"], "training.epochs"),
        (["prepare", "r", "s", "--window", "64"], "window_px"),
        (["prepare", "r", "s", "--windw_px", "64"], "window_px"),
    ],
    ids=lambda value: value[-2] if isinstance(value, list) else "",
)
def test_abbreviated_and_misspelt_options_are_refused(
    argv: list[str], near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        make_parser().parse_args(argv)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "unrecognized arguments" in error
    assert f"did you mean {near}" in error
    assert "valid names: " in error


@pytest.mark.parametrize(
    ("command", "text", "near"),
    [
        ("train", "training:\n  learning_rte: 0.1\n", "training.learning_rate"),
        ("train", "protocol:\n  fold: 3\n", "protocol.folds"),
        ("train", "trainng:\n  epochs: 3\n", "training.epochs"),
        ("train", "epochs: 3\n", "training.epochs"),
        ("prepare raw", "windowpx: 64\n", "window_px"),
    ],
)
def test_misspelt_names_in_a_settings_file_of_the_command_line(
    command: str, text: str, near: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as caught:
        make_parser().parse_args([*command.split(), "store", "--config", str(path)])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert f"did you mean {near}" in error
    valid = error.rsplit("valid names: ", 1)[1].strip().split(", ")
    assert near in valid
    assert len(valid) >= len(dataclasses.fields(Prepare))
