"""The paper's tables and figures from a finished grid sweep, its printed values beside ours.

python sweeps/paper.py paper STORE --out DIR
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import anndata
from jsonargparse import Namespace

from brstnet.config import Parser, Settings, read_yaml
from brstnet.data.mirror import open_store
from brstnet.data.prepare import READERS
from brstnet.data.store import Store
from brstnet.evaluation import plots
from brstnet.evaluation.paper import figures as paper_figures
from brstnet.evaluation.paper import picture, printed, same_quantity
from brstnet.evaluation.paper import tables as paper_tables
from brstnet.evaluation.paper.models import Model
from brstnet.evaluation.paper.same_quantity import Facts, Verdict
from brstnet.evaluation.slides.slide import open_slide
from brstnet.launch import pick_device
from brstnet.training.checkpoint import read_facts
from brstnet.training.keep import finished
from sweeps import tracking
from sweeps.champion import read_outcomes
from sweeps.choice import Outcome
from sweeps.gather import write_whole
from sweeps.paper_page import page
from sweeps.paper_results import Results, as_json, markdown, written
from sweeps.paper_trials import Judge, by_row, checkpoints, kept, read_models, read_sweep
from sweeps.space import Sweep


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="sweeps/paper.py", description="The paper's results beside ours.")
    parser.add_argument("sweep", help="name of a grid sweep over backbone and auxnet")
    parser.add_argument("store", help="the patch store that it was trained on")
    parser.add_argument("--runs", type=Path, default=tracking.runs_folder(), help="of the sweeps")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--patients", nargs="+", help="default: whom the sweep holds out")
    parser.add_argument("--raw", type=Path, help="raw folder: Fig. 4 shows its slide")
    parser.add_argument("--gene", help="of Fig. 4; default: B2M, else the best predicted")
    parser.add_argument("--section", help="of Fig. 4; default: the held-out patient's C2")
    parser.add_argument(
        "--skip_training", action="store_true", help="leave out Table 2's training columns"
    )
    parser.add_argument("--device", default="auto")
    return parser


def make_results(options: Namespace) -> Results:
    """Judge what there is and write everything under `--out`.

    Raises:
        FileNotFoundError: there is no such sweep, store or raw folder.
        ValueError: the sweep is no such grid, the store another, or nobody is held out.
    """
    sweep = read_sweep(options.runs, options.sweep)
    folder = (options.runs / options.sweep).resolve()
    store = open_store(options.store, patches=False)
    check_store(folder, store)
    patients = tuple(options.patients or sweep.protocol.held_out)
    if not patients:
        raise ValueError(f"{folder}: the sweep holds nobody out, so that nobody can be judged")
    judge = Judge(
        sweep=sweep,
        store=store,
        patients=patients,
        device=pick_device(options.device),
        cache=options.out / "cache",
        training=not options.skip_training,
    )
    outcomes, section = read_outcomes(folder), pick_section(judge, options.section)
    with store.read_once():
        models = read_models(judge, outcomes)
        best = paper_tables.best_of(models)
        facts = facts_of(judge, outcomes)
        results = tables(sweep, facts, models, best)
        draw(results, options.out)
        outcome = by_row(sweep, outcomes)[best.key]
        shown = draw_map(judge, outcome, results, options, section)
    verdict = same_quantity.figure_4(facts, best.key, section, shown.symbol)
    results.verdicts["fig4"] = verdict
    write(results, options.out)
    return results


def check_store(folder: Path, store: Store) -> None:
    """Check that the store is the one that the sweep was trained on.

    Raises:
        ValueError: it is another.
    """
    trained = read_yaml(folder / "identity.yaml").get("store")
    if trained != store.digest:
        raise ValueError(
            f"{store.address}: is store {store.digest}, but {folder.name} was trained on "
            f"{trained}: give that one, whose training spots Table 2 needs"
        )


def facts_of(judge: Judge, outcomes: Iterable[Outcome]) -> Facts:
    """How the numbers came about: the sweep's protocol, the store, the machines."""
    machines = []
    for outcome in outcomes:
        for number in range(judge.sweep.protocol.folds):
            done = finished(Path(outcome["folder"]) / f"fold_{number}")
            if done is not None and (done.folder / "checkpoint.json").is_file():
                machines.append(read_facts(done.folder).get("machine", {}))
    settings = Settings(protocol=judge.sweep.protocol, training=judge.sweep.training)
    return Facts.of(judge.store, settings, judge.patients, [m for m in machines if m])


def tables(sweep: Sweep, facts: Facts, models: Sequence[Model], best: Model) -> Results:
    """All numbers, and whether they are the paper's quantities."""
    genes, common = len(best.panel), len(paper_tables.common_genes(models))
    verdicts: dict[str, Verdict] = {
        "table1": same_quantity.table_1(facts),
        "table2": same_quantity.table_2(facts, common),
        "table3": same_quantity.table_3(facts),
        "fig2": same_quantity.counts(facts, genes),
        "fig3": same_quantity.figure_3(facts, genes, best.key),
    }
    judged = f"{', '.join(facts.judged)} ({same_quantity.sections(len(facts.judged_sections))})"
    return Results(
        sweep=sweep.name,
        line=f"judged on {judged}; mean of the fold models; {sweep.protocol.line()}",
        store=f"{facts.layout}, {facts.patients} patients, {facts.sections} sections",
        best=best,
        models=list(models),
        common=common,
        table_1=paper_tables.table_1_info(models, best),
        table_2=paper_tables.table_2_info(models, best),
        table_3=paper_tables.table_3_info(models),
        figure_2=paper_tables.figure_2_info(models, best),
        figure_3=paper_tables.figure_3_info(best),
        verdicts=verdicts,
    )


def draw(results: Results, out: Path) -> None:
    """Figs 2 and 3, into the folder and the results."""
    bars = paper_figures.plot_figure_2(results.figure_2, results.line)
    histogram = paper_figures.plot_figure_3(results.figure_3, results.best.label, results.line)
    for name, figure in (("fig2", bars), ("fig3", histogram)):
        results.figures[name] = out / f"{name}.png"
        plots.save(figure, results.figures[name])


def draw_map(
    judge: Judge, outcome: Outcome, results: Results, options: Namespace, section: str
) -> paper_figures.Map:
    """Fig. 4 of the best model, whose trial's outcome is given."""
    best, out = results.best, options.out
    adata = anndata.read_h5ad(kept(judge, checkpoints(outcome, judge.sweep))[1])
    gene = pick_gene(best, options.gene)
    shown = slide_picture(judge.store, section, options.raw)
    results.map = info = paper_figures.map_info(adata, section, gene, shown)
    title = f"{section}, {best.label}; H&E: {shown.origin}\n{results.line}"
    for old in out.glob("fig4_*.png"):
        old.unlink()
    results.figures["fig4"] = out / f"fig4_{section}_{file_part(info.symbol, gene)}.png"
    plots.save(paper_figures.plot_map(info, title), results.figures["fig4"])
    return info


def file_part(symbol: str, gene: str) -> str:
    """A gene in the name of a file."""
    return symbol if symbol.replace("-", "").replace(".", "").isalnum() else gene


def pick_gene(best: Model, asked: str | None) -> str:
    """The gene of Fig. 4: the one asked for, the paper's, or the best predicted.

    Raises:
        ValueError: the one asked for is not predicted.
    """
    symbols = best.genes["symbol"]
    wanted = asked or printed.MAP_GENE
    found = symbols.index[(symbols == wanted) | (symbols.index == wanted)]
    if len(found):
        return str(found[0])
    if asked is not None:
        raise ValueError(
            f"--gene {asked}: not among the {len(symbols)} genes that are judged, such as "
            f"{', '.join(symbols[:3])}"
        )
    return str(best.pcc()[best.panel].idxmax())


def pick_section(judge: Judge, asked: str | None) -> str:
    """The section of Fig. 4.

    Raises:
        ValueError: it is none of the patient's.
    """
    sections = judge.store.of_patients(judge.patients)
    if asked is None:
        return paper_figures.section_of(dict.fromkeys(sections))
    if asked not in sections:
        raise ValueError(f"--section {asked}: must be one of {', '.join(sections)}")
    return asked


def slide_picture(store: Store, section: str, raw: Path | None) -> picture.Picture:
    """The section's slide where the raw folder is given, else its patches put together.

    Raises:
        FileNotFoundError: there is no such slide.
        ValueError: the raw folder has no such section, or another slide of it.
    """
    if raw is None:
        return picture.of_patches(store, section)
    listing = READERS[store.index["prepare"]["layout"]].find(raw)
    slides = {files.section: files.slide for files in listing.sections}
    if section not in slides:
        raise ValueError(f"--raw {raw}: no section {section}; it has {', '.join(slides)}")
    slide, expected = open_slide(slides[section]), store.sections[section]["slide_px"]
    if sorted(slide.full_px) != sorted(expected):
        raise ValueError(
            f"{slide.path}: is {slide.full_px} px, but the store's {section} was cut from a slide "
            f"of {tuple(expected)} px: give the raw folder that the store was made of"
        )
    return picture.of_slide(slide)


def write(results: Results, out: Path) -> None:
    """Tables as CSV and Markdown, results.json, index.html."""
    for name, table in written(results).items():
        table.to_csv(out / f"{name}.csv", index=False)
        write_whole(out / f"{name}.md", markdown(table))
    write_whole(out / "results.json", json.dumps(as_json(results), indent=1))
    write_whole(out / "index.html", page(results))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; what the user can mend is told in a few lines, with exit code 2."""
    options = make_parser().parse_args(argv)
    try:
        results = make_results(options)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    there = sum(not model.missing for model in results.models)
    print(f"{there} of {len(results.models)} models; best {results.best.label}")  # noqa: T201
    for name in ("table1", "table2", "table3"):
        print(f"{name}: {results.verdicts[name].line}")  # noqa: T201 - the command's output
    print(f"written to {options.out / 'index.html'}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
