"""Presets: every line where paper and code disagree is one key, and goes where it is asked for."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from brstnet import __main__ as cli
from brstnet.config import (
    PRESETS,
    Prepare,
    Protocol,
    Settings,
    Training,
    build,
    preset_names,
    read_yaml,
)
from sweeps import run


def values(name: str) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = read_yaml(PRESETS / f"{name}.yaml")
    return found


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_makes_valid_settings_and_says_nothing_else(name: str) -> None:
    assert set(values(name)) == {"prepare", "protocol", "training"}
    for group, cls in (("prepare", Prepare), ("protocol", Protocol), ("training", Training)):
        build(cls, values(name)[group], name)
    build(Settings, {g: values(name)[g] for g in ("protocol", "training")}, name)


def test_the_papers_training_is_what_nothing_said_means() -> None:
    assert build(Training, values("paper")["training"], "paper") == Training()
    assert build(Prepare, values("paper")["prepare"], "paper") == Prepare(held_out=("BC23903",))


def test_paper_and_code_differ_where_their_sources_do() -> None:
    """The table of shared/design/paper.md; backbone: only B4 is reachable in the code."""
    paper, code = values("paper"), values("code")
    made = {
        group: (build(cls, paper[group], "paper"), build(cls, code[group], "code"))
        for group, cls in (("prepare", Prepare), ("protocol", Protocol), ("training", Training))
    }
    differ = {
        group: {f.name for f in dataclasses.fields(a) if getattr(a, f.name) != getattr(b, f.name)}
        for group, (a, b) in made.items()
    }
    assert differ == {
        "prepare": {"held_out", "window_px", "luminosity"},
        "protocol": {"held_out", "min_gene_fraction", "max_white_fraction"},
        "training": {
            "backbone",
            "aux_weight",
            "aux_target",
            "epochs",
            "schedule",
            "cosine_period",
            "min_learning_rate",
            "stopping",
        },
    }


def printed(argv: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, object]]:
    with pytest.raises(SystemExit) as end:
        cli.main([*argv, "--print_config"])
    assert not end.value.code
    config: dict[str, dict[str, object]] = yaml.safe_load(capsys.readouterr().out)
    return config


def test_a_preset_is_the_defaults_and_what_is_said_goes_over_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("training: {epochs: 7}\n")
    argv = ["train", "STORE", "--preset", "code", "--config", str(file), "--training.genes", "99"]
    training = printed(argv, capsys)["training"]
    expected = {**values("code")["training"], "epochs": 7, "genes": 99}
    assert {key: training[key] for key in expected} == expected
    prepare = printed(["prepare", "RAW", "STORE", "--preset=code"], capsys)
    assert prepare["window_px"] == 299
    assert prepare["luminosity"] == "target"


def test_an_unknown_preset_is_refused_with_those_there_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["train", "STORE", "--preset", "papers"]) == 2
    assert "preset must be one of best, code, paper, got 'papers'" in capsys.readouterr().err


def test_a_sweep_begins_from_a_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "preset: code\nprotocol: {folds: 3}\ntraining: {epochs: 7}\nsearch: grid\n"
        "space: {genes: [250, 300]}\n"
    )
    plan = run.parse([str(file)])[0]
    assert plan.training == dataclasses.replace(
        build(Training, values("code")["training"], "code"), epochs=7
    )
    assert plan.protocol.folds == 3
    assert plan.protocol.held_out == ("BC23450", "BC23903")
    other = run.parse([str(file), "--preset", "paper"])[0]
    assert other.training == dataclasses.replace(Training(), epochs=7)
