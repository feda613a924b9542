"""The champion's model card: what it is, what it learned from, what its scores mean and do not."""

import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from brstnet.config import Settings, to_yaml
from sweeps.choice import Candidate, Choice
from sweeps.tracking import ALIAS, MODEL

DRAWS = 2000
"""Bootstrap draws of an interval."""

FEWEST_PATIENTS = 3
"""With fewer, sections are drawn instead."""

MOST_ROWS = 20
"""Compared configurations that the card lists."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a card is written of.

    `facts` are those of the first fold's checkpoint; `sections` has a row a validation section:
    section, patient, fold, spots, pcc. `refit` are the facts of the refit's checkpoint, or None.
    `folder` is where the champion will lie, `out` the sweeps' folder. `store` is the path of the
    trial's store, `sweep_store` of the one that the sweep was started with.
    """

    sweep: str
    choice: Choice
    settings: Settings
    facts: Mapping[str, Any]
    sections: pd.DataFrame
    refit: Mapping[str, Any] | None
    folder: Path
    out: Path
    store: str
    sweep_store: str


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its 95 % bootstrap interval; ends are NaN where only one value is there."""

    mean: float
    low: float
    high: float
    n: int
    over: str

    def __str__(self) -> str:
        if np.isnan(self.low):
            return f"{self.mean:.3f} (no interval: n = {self.n} {self.over})"
        return (
            f"{self.mean:.3f}, 95 % interval {self.low:.3f} to {self.high:.3f} "
            f"(n = {self.n} {self.over})"
        )


def section_table(folders: Sequence[Path], candidate: Candidate) -> pd.DataFrame:
    """The validation sections of fold checkpoints, with the candidate's median PCC of each.

    That is the mean over its seeds where the outcomes tell it, else that of the checkpoint.
    """
    parts = []
    for number, folder in enumerate(folders):
        table = pd.read_parquet(folder / "validation.parquet").groupby("section", sort=False)
        part = table.agg(patient=("patient", "first"), spots=("n", "first"), pcc=("pcc", "median"))
        parts.append(part.reset_index().assign(fold=number))
    sections = pd.concat(parts, ignore_index=True)
    told = sections["section"].map(dict(candidate.sections))
    return sections.assign(pcc=told.fillna(sections["pcc"]))


def bootstrap(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean (Efron 1979); NaN with fewer than two."""
    if len(values) < 2:
        return float("nan"), float("nan")
    drawn = np.random.default_rng(seed).choice(np.asarray(values, float), (DRAWS, len(values)))
    low, high = np.percentile(drawn.mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def mean_interval(sections: pd.DataFrame) -> Interval:
    """Mean over the patients of the mean of their sections, drawn by patient, if there are enough.

    Sections of one patient are alike: drawn one by one they would make the interval too narrow.
    """
    defined = sections.dropna(subset="pcc")
    by_patient = defined.groupby("patient")["pcc"].mean()
    few = len(by_patient) < FEWEST_PATIENTS
    values = (defined["pcc"] if few else by_patient).tolist()
    low, high = bootstrap(values)
    mean = float(np.mean(values)) if values else float("nan")
    over = "sections" if few else "patients"
    return Interval(mean=mean, low=low, high=high, n=len(values), over=over)


def write_card(subject: Subject) -> str:
    """The whole card, in Markdown."""
    chosen = subject.choice.chosen
    parts = [
        [f"# BrST-Net, champion of sweep {subject.sweep}: trial {chosen.trial}"],
        _model(subject),
        _data(subject),
        _scores(subject),
        _chosen(subject.choice),
        _limits(subject),
        _reproduce(subject),
        _versions(subject.facts),
    ]
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def _model(subject: Subject) -> list[str]:
    training, chosen = subject.settings.training, subject.choice.chosen
    prepare = subject.facts["store"]["prepare"]
    heads = f"a head for {training.genes} genes" + (
        " and AuxNet for all others" if training.auxnet else ""
    )
    lines = [
        "## Model",
        "",
        f"Predicts gene expression at a spot of an H&E slide from the {prepare['window_px']} px "
        f"window round it, seen as {training.input_px or prepare['input_px']} px: "
        f"{training.backbone}, {'frozen, ' if training.frozen else ''}with {heads}.",
        "",
        f"`fold_0` to `fold_{subject.settings.protocol.folds - 1}` are the models of the folds, "
        f"trained with the search's own seed ({training.seed}); a prediction is their mean.",
    ]
    if len(chosen.outcomes) > 1:
        lines[-1] += (
            f" The configuration was trained with {len(chosen.outcomes)} seeds; models of the "
            "others are not in here, but the scores below are means over all."
        )
    if subject.refit is not None:
        epochs = subject.refit["settings"]["training"]["epochs"]
        lines += [
            "",
            f"`refit` is one model more, trained on all {len(subject.refit['fold']['train'])} "
            f"sections for {epochs} epochs. Nobody validated it, and it is no part of the mean: "
            "the scores below are not its own.",
        ]
    return [*lines, "", "Settings:", "", "```yaml", to_yaml(subject.settings).strip(), "```"]


def _data(subject: Subject) -> list[str]:
    store, sections = subject.facts["store"], subject.sections
    protocol, stain = subject.settings.protocol, store["stain_target"]
    held_out = subject.facts["fold"]["held_out"]
    patients = sorted(sections["patient"].unique())
    prepare = _options(store["prepare"]).removeprefix("--").replace(" --", ", ")
    out = f"{', '.join(protocol.held_out)} ({len(held_out)} sections)" if held_out else "nobody"
    lines = [
        "## Training data",
        "",
        f"- store {store['digest']}: {subject.store}",
        f"- {len(patients)} patients ({', '.join(patients)}) trained and validated the folds: "
        f"{len(sections)} sections, {int(sections['spots'].sum())} spots",
        f"- held out, in no fold and no choice: {out}",
        f"- prepared with {prepare}",
    ]
    if stain is not None:
        lines.append(
            f"- stains normalised to section {stain['section']} of patient {stain['patient']}"
        )
    return lines


def _scores(subject: Subject) -> list[str]:
    chosen, sections = subject.choice.chosen, subject.sections
    mean = mean_interval(sections)
    lines = [
        "## Scores on the validation sections",
        "",
        f"Protocol: {subject.settings.protocol.line()}.",
        "",
        "A fold's score is the median over the panel's genes of the Pearson correlation (PCC) in "
        "each section, averaged over the fold's validation patients; the score is the mean over "
        "the folds.",
        "",
        f"- score {chosen.score:.4f}; by fold {', '.join(f'{s:.4f}' for s in chosen.folds)}",
        f"- a section's median PCC, mean over the {mean.over}: {mean}; percentile bootstrap over "
        f"{mean.over}, {DRAWS} draws",
    ]
    if mean.over == "sections":
        lines.append(
            f"- fewer than {FEWEST_PATIENTS} patients: sections were drawn, which are more alike "
            "than patients, and the interval says nothing of a new patient"
        )
    if len(chosen.outcomes) > 1:
        seeds = ", ".join(f"{o['score']:.4f}" for o in chosen.outcomes)
        lines.append(f"- by training seed {seeds} (standard deviation {chosen.spread:.4f})")
    if mean.n < 10:
        lines.append(f"- with n = {mean.n} such an interval is rather too narrow than too wide")
    lines += ["", "| patient | section | fold | spots | median PCC |", "|---|---|---|---|---|"]
    for row in sections.sort_values(["patient", "section"]).to_dict("records"):
        pcc = "-" if np.isnan(row["pcc"]) else f"{row['pcc']:.4f}"
        about = " | ".join(str(row[name]) for name in ("patient", "section", "fold", "spots"))
        lines.append(f"| {about} | {pcc} |")
    return lines


def _chosen(choice: Choice) -> list[str]:
    states = ", ".join(f"{n} {state.lower()}" for state, n in sorted(choice.searched.items()))
    lines = [
        "## How it was chosen",
        "",
        f"{choice.reason[0].upper()}{choice.reason[1:]}.",
        "",
        f"{sum(choice.searched.values())} configurations were searched: {states}. Held-out "
        "patients had no part in it. As the choice was made on these very scores, they are "
        "optimistic: the more configurations, the more.",
        "",
        "| trial | seeds | score | below the best | p | cost in seconds |",
        "|---|---|---|---|---|---|",
    ]
    for row in choice.table.head(MOST_ROWS).itertuples():
        below = f"{row.difference:.4f} ± {row.error:.4f} ({row.n} {row.over})"
        lines.append(
            f"| {row.trial} | {row.seeds} | {row.score:.4f} | {below} | {row.p:.3f} | "
            f"{row.cost_seconds:.0f} |"
        )
    if (more := len(choice.table) - MOST_ROWS) > 0:
        lines.append(f"\nand {more} with lower scores.")
    return lines


def _limits(subject: Subject) -> list[str]:
    protocol, patients = subject.settings.protocol, subject.sections["patient"].nunique()
    held_out = ", ".join(protocol.held_out)
    judge = (
        f"only held-out patients ({held_out}) can judge it"
        if held_out
        else "nobody was held out: judge it on patients of another store"
    )
    lines = [
        "## Limits",
        "",
        "- For research. Not for clinical use.",
        "- The scores above are selection scores, and optimistic: configurations (and with early "
        f"stopping epochs) were chosen by them; {judge}.",
        f"- {patients} patients of one data set, prepared in one way: slides of another "
        "institution, scanner or stain are not tested.",
        f"- A score is a median over the panel, the {protocol.panel_size} genes with the highest "
        "mean counts: single genes are far above and below it, and no other gene was scored.",
    ]
    if protocol.group == "section":
        lines.append(
            "- Folds are by section: sections of one patient train and validate. The scores are "
            "within-patient and say nothing of a new patient."
        )
    return lines


def _reproduce(subject: Subject) -> list[str]:
    here, store = shlex.quote(str(subject.folder)), shlex.quote(subject.store)
    out = shlex.quote(str(subject.out))
    folds = " ".join(map(str, range(subject.settings.protocol.folds)))
    patients = " ".join(map(shlex.quote, subject.settings.protocol.held_out)) or "PATIENT"
    train = f"python -m brstnet train {store} --config"
    commands = [
        f"# the store (its digest must be {subject.facts['store']['digest']})",
        f"python -m brstnet prepare RAW {store} {_options(subject.facts['store']['prepare'])}",
        "# this configuration: all folds",
        f"for fold in {folds}; do {train} {here}/settings.yaml --fold $fold --out again; done",
    ]
    commands += [
        "# the whole sweep, from the beginning",
        f"python sweeps/run.py {here}/sweep.yaml --store {shlex.quote(subject.sweep_store)} "
        "--out again",
        "# judged on patients that it has not seen",
        f"python sweeps/evaluate.py models:/{MODEL}@{ALIAS} {store} --patients {patients} "
        f"--out judged --runs {out}",
    ]
    if subject.refit is not None:
        commands += [
            "# the refit: trained again, and judged",
            f"{train} {here}/refit/settings.yaml --fold=-1 --out again",
            f"python -m brstnet evaluate {here}/refit {store} --patients {patients} "
            "--out judged-refit",
        ]
    machine = subject.facts["machine"]
    return [
        "## How to reproduce",
        "",
        "In the repository's folder; every random number follows from the seed. The same machine "
        f"gives the same bits ({machine['device']}, {machine['precision']}, {machine['threads']} "
        f"threads, {machine['workers']} worker(s)), another nearly the same.",
        "",
        "```sh",
        *commands,
        "```",
    ]


def _options(prepare: Mapping[str, Any]) -> str:
    """Prepare settings as options of the command line."""
    words = []
    for key, value in prepare.items():
        word = f"[{', '.join(value)}]" if isinstance(value, list) else str(value)
        if value is not None:
            words.append(f"--{key} {shlex.quote(word)}")
    return " ".join(words)


def _versions(facts: Mapping[str, Any]) -> list[str]:
    versions = {**facts["versions"], "python": platform.python_version()}
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    return ["## Versions", "", f"{listed}; git commit {git_commit() or 'not known'}."]


def git_commit() -> str | None:
    """The commit of the code that runs, marked where files differ from it; None outside of git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40"]
    try:
        done = subprocess.run(
            [*command, "--dirty=, changed", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
