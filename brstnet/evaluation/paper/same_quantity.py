"""Whether our numbers and the paper's are of the same quantity, judged from how ours came about.

Three things are kept apart: what is measured, how the models were made, and what the paper leaves
open. Nothing here says "same" by itself: each reason is looked up in the protocol of the trials.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from brstnet.config import Prepare, Settings, Training, plain, preset
from brstnet.data.store import Store
from brstnet.evaluation.paper import printed

NOT_TRAINING = (
    "backbone",
    "auxnet",
    "seed",
    "micro_batch",
    "sync_batchnorm",
    "engine",
    "precision",
)
"""Settings that are a row of the paper's tables, or that it does not say."""

IMAGES = ("stain", "luminosity", "window_px", "input_px")
"""How the patches were made."""

LOSS = (
    "the paper names cross-entropy as its loss, which is undefined for real-valued targets: ours "
    "is the mean squared error"
)
STATISTICS = (
    "gene list, means and deviations are those of each fold's training patients; whose the paper's "
    "are it does not say"
)
WHICH_MODEL = (
    "the held-out patient is predicted by the mean of the fold models; by which model the paper's "
    "is, it does not say"
)
UNSTATED = "momentum and weight decay are those of the authors' code: the paper does not state them"
OVER_SPOTS = (
    "a PCC is over a section's spots, per gene, and the median over the patient's sections (the "
    "paper's formula says n is the number of genes; its Fig. 4 shows one of spots)"
)
ERRORS = (
    "aMAE and aRMSE are means over genes of the median over sections, in training standard "
    "deviations of each gene; how the paper averages it does not say"
)
TRAINING_ERRORS = (
    "training columns: each fold's model on its own training spots, in evaluation mode, patches as "
    "they lie, mean over folds; the paper may have averaged its training loop's errors instead (of "
    "augmented patches, while the weights still changed, of one fold or all)"
)
WHICH_BEST = "which model is called best here is decided by cross-validation, not on the patient"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that decides whether the trials' numbers are the paper's quantities.

    Attributes:
        layout: of the raw data.
        patients: of the whole store.
        sections: of the whole store.
        spots_raw: before any filter.
        spots_kept: after the filter on total counts.
        prepare: how the patches were made, by the names of `Prepare`.
        settings: protocol and training, the same for all models but for backbone and AuxNet.
        judged: patients.
        judged_sections: theirs.
        machines: device, workers, threads, as checkpoints say; each once.
    """

    layout: str
    patients: int
    sections: int
    spots_raw: int
    spots_kept: int
    prepare: Mapping[str, Any]
    settings: Settings
    judged: tuple[str, ...]
    judged_sections: tuple[str, ...]
    machines: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def of(
        cls,
        store: Store,
        settings: Settings,
        judged: Sequence[str],
        machines: Sequence[Mapping[str, Any]] = (),
    ) -> Self:
        """The facts of models trained with these settings on this store."""
        prepare = {**plain(Prepare()), **store.index["prepare"]}
        entries = store.sections.values()
        unique = {repr(sorted(m.items(), key=str)): m for m in machines}
        return cls(
            layout=str(prepare["layout"]),
            patients=len(store.patients),
            sections=len(store.sections),
            spots_raw=sum(entry["spots_raw"] for entry in entries),
            spots_kept=sum(entry["spots_kept"] for entry in entries),
            prepare=prepare,
            settings=settings,
            judged=tuple(sorted(judged)),
            judged_sections=tuple(store.of_patients(judged)),
            machines=tuple(unique.values()),
        )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a table of ours and the paper's are of the same quantity.

    Attributes:
        quantity: why what is measured is another.
        training: how the models were made otherwise.
        open: what the paper does not say, and what was done here.
    """

    quantity: tuple[str, ...]
    training: tuple[str, ...]
    open: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether the same is measured on the same patient; models may still differ."""
        return not self.quantity

    @property
    def line(self) -> str:
        """The verdict in a sentence."""
        if self.quantity:
            return "Not the same quantity as the paper's: " + "; ".join(self.quantity) + "."
        if self.training:
            return "The same quantity as the paper's, of models that were made otherwise."
        return "The same quantity as the paper's, of models made as far as it says how."


def table_1(facts: Facts) -> Verdict:
    """Of a gene's median PCC."""
    return Verdict(
        quantity=(*data(facts), *target(facts)),
        training=(*folds(facts), *panel(facts), *images(facts), *training(facts)),
        open=(OVER_SPOTS, WHICH_MODEL, LOSS, STATISTICS, UNSTATED, WHICH_BEST),
    )


def counts(facts: Facts, genes: int | None = None) -> Verdict:
    """Of how many genes of the panel lie in each bin (Figs 2 and 3), where so many are judged."""
    wanted = facts.settings.protocol.panel_size
    fewer = f"{genes} of the panel's {wanted} genes are both predicted and measured here"
    lacking = genes is not None and genes < wanted
    return Verdict(
        quantity=(*data(facts), *target(facts), *panel(facts), *([fewer] if lacking else [])),
        training=(*folds(facts), *images(facts), *training(facts)),
        open=(OVER_SPOTS, WHICH_MODEL, LOSS, STATISTICS, UNSTATED),
    )


def table_2(facts: Facts, genes: int) -> Verdict:
    """Of the errors over so many genes, which all models predict."""
    wanted, of_counts = facts.settings.protocol.panel_size, counts(facts)
    fewer = f"over {genes} of the panel's {wanted} genes: those that every model here predicts"
    return Verdict(
        quantity=(*of_counts.quantity, *([fewer] if genes < wanted else [])),
        training=of_counts.training,
        open=(ERRORS, TRAINING_ERRORS, WHICH_MODEL, LOSS, STATISTICS, UNSTATED),
    )


def table_3(facts: Facts) -> Verdict:
    """Of the training time."""
    return Verdict(
        quantity=(*hardware(facts), *whole_data(facts), *folds(facts)),
        training=(*images(facts), *training(facts)),
        open=(
            "time: from the first start of a trial to its end, all folds with validation and "
            "saving; what the paper's clock includes it does not say",
        ),
    )


def figure_3(facts: Facts, genes: int, model: tuple[str, bool]) -> Verdict:
    """Of the histogram of the best model, which is named by backbone and AuxNet."""
    verdict = counts(facts, genes)
    return replace(verdict, quantity=(*verdict.quantity, *_other_model(model)))


def figure_4(facts: Facts, model: tuple[str, bool], section: str, symbol: str) -> Verdict:
    """Of the map of one gene on one section, and its PCC."""
    verdict, found = table_1(facts), [*_other_model(model)]
    if section != f"{printed.PATIENT}_{printed.MAP_SECTION}":
        shown = f"{printed.PATIENT} {printed.MAP_SECTION}"
        found.append(f"another section: {section} (paper: {shown})")
    if symbol != printed.MAP_GENE:
        found.append(f"another gene: {symbol} (paper: {printed.MAP_GENE})")
    return replace(verdict, quantity=(*verdict.quantity, *found))


def _other_model(model: tuple[str, bool]) -> tuple[str, ...]:
    if model == (printed.BEST, True):
        return ()
    backbone, auxnet = model
    ours = f"{printed.NAMES.get(backbone, backbone)} with{'' if auxnet else 'out'} AuxNet"
    return (f"another model: {ours} (paper: {printed.NAMES[printed.BEST]} with AuxNet)",)


def whole_data(facts: Facts) -> tuple[str, ...]:
    """Whether the data set is the paper's."""
    found = (facts.patients, facts.sections)
    if facts.layout == "stnet" and found == (printed.PATIENTS, printed.SECTIONS):
        return _spots(facts)
    return (
        f"another data set: {facts.patients} patients, {facts.sections} sections, "
        f"{facts.spots_raw:,} spots in the layout {facts.layout} (paper: {printed.PATIENTS}, "
        f"{printed.SECTIONS} and {printed.SPOTS_RAW:,})",
    )


def _spots(facts: Facts) -> tuple[str, ...]:
    least = facts.prepare["min_counts"]
    if least != Prepare().min_counts:
        return (f"spots with at least {least} counts (paper: {Prepare().min_counts})",)
    if abs(facts.spots_kept / printed.SPOTS_KEPT - 1) > 0.01:
        return (f"{facts.spots_kept:,} spots pass the filter (paper: {printed.SPOTS_KEPT:,})",)
    return ()


def data(facts: Facts) -> tuple[str, ...]:
    """Whether the patient, and all others, are the paper's."""
    judged = ", ".join(facts.judged)
    if facts.judged == (printed.PATIENT,):
        return whole_data(facts)
    other = f"another held-out patient: {judged} with {sections(len(facts.judged_sections))}"
    return (*whole_data(facts), f"{other} (paper: {printed.PATIENT} with 3)")


def sections(number: int) -> str:
    """So many sections, in words."""
    return "1 section" if number == 1 else f"{number} sections"


def target(facts: Facts) -> tuple[str, ...]:
    """Whether the target is the paper's."""
    if facts.settings.protocol.target == "log_counts":
        return ()
    return (
        "another target: log1p of the count scaled from the spot's total to the training median "
        "(log_normalised; paper: log1p of the count, which follows the spot's total)",
    )


def panel(facts: Facts) -> tuple[str, ...]:
    """Whether the genes were chosen as in the paper."""
    protocol, found = facts.settings.protocol, []
    if protocol.panel_size != printed.PANEL:
        found.append(f"panel of {protocol.panel_size} genes (paper: {printed.PANEL})")
    if protocol.min_gene_fraction > 0:
        found.append(
            f"genes in less than {100 * protocol.min_gene_fraction:g} % of the training spots are "
            "left out (paper: those with a mean of 0)"
        )
    return tuple(found)


def folds(facts: Facts) -> tuple[str, ...]:
    """Whether the models come from the paper's cross-validation."""
    protocol, found = facts.settings.protocol, []
    if protocol.folds != 5 or protocol.group != "patient":
        found.append(f"{protocol.folds} folds by {protocol.group} (paper: 5 by patient)")
    if protocol.max_white_fraction != 0.5:
        found.append(f"patches up to {protocol.max_white_fraction:g} white trained (paper: 0.5)")
    return tuple(found)


def images(facts: Facts) -> tuple[str, ...]:
    """Whether the patches were made as in the paper."""
    said = preset("paper", "prepare")
    return _differences(facts.prepare, {key: said[key] for key in IMAGES})


def training(facts: Facts) -> tuple[str, ...]:
    """Which training settings are not the paper's."""
    said = {k.rpartition(".")[2]: v for k, v in preset("paper", "training").items()}
    wanted = {**plain(Training()), **said}
    names = [name for name in wanted if name not in NOT_TRAINING]
    return _differences(plain(facts.settings.training), {name: wanted[name] for name in names})


def _differences(ours: Mapping[str, Any], papers: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(
        f"{name} {ours[name]} (paper: {value})"
        for name, value in papers.items()
        if ours[name] != value
    )


def hardware(facts: Facts) -> tuple[str, ...]:
    """Why seconds on our machines are not seconds on the paper's; there is always a reason."""
    papers = f"paper: {printed.GPUS} GPUs that it does not name, {printed.CPU_CORES} CPU cores"
    if not facts.machines:
        return (f"the checkpoints do not say what they were trained on ({papers})",)
    ours = " and ".join(sorted({_machine(machine) for machine in facts.machines}))
    return (f"trained on {ours} ({papers})",)


def _machine(machine: Mapping[str, Any]) -> str:
    workers, threads = machine.get("workers", 1), machine.get("threads", "?")
    if machine.get("device") == "cpu":
        return f"{workers} worker(s) of {threads} CPU thread(s), no GPU"
    return f"{workers} x {machine.get('device')} in {machine.get('precision')}"
