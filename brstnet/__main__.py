"""Command line: prepare, info, train, evaluate, score, predict, push, demo-data."""

import json
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from jsonargparse import ActionConfigFile, Namespace
from tqdm import tqdm

from brstnet.config import (
    Parser,
    Prepare,
    Protocol,
    Settings,
    Training,
    from_namespace,
    preset,
    preset_asked,
    preset_names,
)
from brstnet.data.synthetic import Demo, make_demo
from brstnet.evaluation.judging import Judging
from brstnet.launch import pick_device, restart_with_allocator

# torch takes seconds to import: only the commands that need it do.

STORE = "patch store: a folder, or its address such as s3://BUCKET/NAME"


def make_parser(preset_name: str | None = None) -> Parser:
    """The command line of all commands; a preset's values are the defaults."""
    parser = Parser(prog="brstnet", description="Learn spatial gene expression from H&E slides.")
    commands = parser.add_subcommands()
    for name, (make, summary, _) in COMMANDS.items():
        sub = Parser(description=summary)
        make(sub)
        if preset_name is not None and name in PRESET_GROUPS:
            sub.set_defaults(preset(preset_name, *PRESET_GROUPS[name]))
        commands.add_subcommand(name, sub, help=summary)
    return parser


PRESET_GROUPS = {"prepare": ("prepare",), "train": ("protocol", "training")}
"""Which of a preset's groups a command takes."""


def _preset_option(parser: Parser) -> None:
    about = "defaults: what the paper says, what its code does, or what was measured to be best"
    parser.add_argument("--preset", help=f"{about} ({', '.join(preset_names())})")


def _prepare_options(parser: Parser) -> None:
    parser.add_argument("raw", type=Path, help="folder of raw slides and counts")
    parser.add_argument("store", type=Path, help="patch store to make")
    _preset_option(parser)
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_class_arguments(Prepare)


def _prepare(args: Namespace) -> None:
    from brstnet.data.prepare import prepare

    store = prepare(args.raw, args.store, from_namespace(Prepare, args))
    _say(_describe(store.info()))


def _info_options(parser: Parser) -> None:
    parser.add_argument("store", help=STORE)
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--verify", action="store_true", help="compare every file with its hash")


def _info(args: Namespace) -> None:
    from brstnet.data.mirror import open_store

    store = open_store(args.store, patches=args.verify)
    _say(json.dumps(store.info(), indent=1) if args.json else _describe(store.info()))
    if args.verify:
        if damaged := store.verify():
            raise ValueError(f"{store.path}: files differ from their hashes: {', '.join(damaged)}")
        if not args.json:
            _say("every file has the hash it was written with")


def _describe(info: Mapping[str, Any]) -> str:
    """A store in a table that fits a terminal."""
    sections = info["sections"]
    row = "{:<14} {:<10} {:<16} {:>6} {:>6} {:>8} {:>7}  {}"
    names = ("section", "patient", "subtype", "raw", "kept", "counts", "um/px", "lost")
    lines = [row.format(*names)]
    for s in sections:
        lost = ", ".join(f"{reason} {n}" for reason, n in s["lost"].items()) or "-"
        about = (s["section"], s["patient"], s["subtype"] or "-", s["spots_raw"], s["spots_kept"])
        pitch = "-" if s["um_per_px"] is None else f"{s['um_per_px']:.3f}"
        lines.append(row.format(*about, f"{s['median_counts']:.0f}", pitch, lost))
    raw, kept = (sum(s[key] for s in sections) for key in ("spots_raw", "spots_kept"))
    target = info["stain_target"]
    lines += [
        f"{len(info['patients'])} patients, {len(sections)} sections, {kept} of {raw} spots kept, "
        f"{info['genes']} genes (counts: median a kept spot)",
        f"stain: {info['prepare']['stain']}"
        + (f", normalised to {target['section']} of {target['patient']}" if target else ""),
        "settings: " + ", ".join(f"{k}={v}" for k, v in info["prepare"].items()),
        f"gene symbols: {info['gene_names']['source'] or 'ids as they are (no table installed)'}; "
        f"{len(info['gene_names']['ambiguous'])} ambiguous, "
        f"{len(info['gene_names']['unknown'])} unknown",
        f"store {info['digest']}, format {info['format']} {info['version']}",
    ]
    if alone := info["left_alone"]:
        reasons = sorted(set(alone.values()))
        lines.append(f"left alone: {len(alone)} ({'; '.join(reasons)}): {', '.join(alone)}")
    return "\n".join(lines)


def _train_options(parser: Parser) -> None:
    parser.add_argument("store", help=STORE)
    _preset_option(parser)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML: protocol and training")
    parser.add_argument("--fold", type=int, default=0, help="-1: all, and nobody validates")
    parser.add_argument("--out", type=Path, default=Path("runs/train"), help="folder to write to")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_class_arguments(Protocol, "protocol")
    parser.add_class_arguments(Training, "training")


def _train(args: Namespace) -> None:
    from brstnet.data.mirror import open_store
    from brstnet.training import distributed
    from brstnet.training.train import fit

    settings = Settings(protocol=args.protocol, training=args.training)
    out = args.out / settings.fingerprint() / f"fold_{args.fold}"
    device = distributed.join(pick_device(args.device))
    leads = distributed.world().leads
    with (
        Stopper() as stop,
        tqdm(desc=f"fold {args.fold}", unit=" patches", disable=not leads) as bar,
    ):

        def on_step(patches: int) -> None:
            bar.update(patches - bar.n)
            stop.if_asked()

        def on_epoch(note: Mapping[str, float]) -> None:
            bar.total = bar.n * settings.training.epochs // (int(note["epoch"]) + 1)
            bar.set_postfix_str(
                f"loss {note['train_loss']:.3f}, validation {note['validation_loss']:.3f}, "
                f"score {note['score']:.3f}, {note['step_share']:.0%} of the time in steps, "
                f"{note['memory_gb']:.1f} GB"
            )

        store = open_store(args.store)
        result = fit(
            store, settings, args.fold, out, device=device, on_epoch=on_epoch, on_step=on_step
        )
    distributed.leave()
    if leads:
        _say(f"{settings.protocol.line()}")
        if args.fold >= 0:
            _say(f"score {result.score:.4f} on the validation sections (epoch {result.epoch})")
        _say(f"checkpoint {result.folder}")


class Stopper:
    """Ctrl-C and SIGTERM ask for a stop at the next step, where nothing is lost.

    A second Ctrl-C stops at once.
    """

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> Self:
        self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def if_asked(self) -> None:
        """Stop here if it was asked for.

        Raises:
            KeyboardInterrupt: it was.
        """
        if self.asked:
            raise KeyboardInterrupt


def _evaluate_options(parser: Parser) -> None:
    parser.add_argument("checkpoints", type=Path, nargs="+", help="several: their mean")
    parser.add_argument("store", help=STORE)
    parser.add_argument("--patients", nargs="+", default=[], help="held-out patients")
    parser.add_argument(
        "--cross_validated",
        action="store_true",
        help="instead: each fold's model on the sections that it was validated on",
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_class_arguments(Judging)


def _evaluate(args: Namespace) -> None:
    from brstnet.data.mirror import open_store
    from brstnet.evaluation.evaluate import cross_validate, evaluate
    from brstnet.evaluation.tables import describe_summary

    if bool(args.patients) == args.cross_validated:
        raise ValueError(
            "give either --patients, who are held out, or --cross_validated, which judges each "
            "fold's model on the fold's own validation sections"
        )
    store = open_store(args.store, patches=False)  # those of the patients are copied
    how: dict[str, Any] = {
        "device": pick_device(args.device),
        "options": from_namespace(Judging, args),
    }
    result = (
        cross_validate(args.checkpoints, store, args.out, **how)
        if args.cross_validated
        else evaluate(args.checkpoints, store, args.patients, args.out, **how)
    )
    _say(describe_summary(result.summary))
    _say(f"written to {args.out}")


def _score_options(parser: Parser) -> None:
    parser.add_argument("predictions", type=Path, help=".h5ad: obs section, spot; var gene ids")
    parser.add_argument("store", help=STORE)
    parser.add_argument("--patients", nargs="+", required=True, help="held-out patients")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkpoints", type=Path, nargs="+", default=[], help="panel and means")
    parser.add_argument(
        "--training_patients", nargs="+", default=[], help="or: fit panel and means on these"
    )
    parser.add_argument(
        "--units", help="log_normalised, log_counts or standardised, if the file does not say it"
    )
    parser.add_argument("--device", default="auto", help="of the encoder")
    parser.add_class_arguments(Judging)
    parser.add_class_arguments(Protocol, "protocol", help="of the panel, with --training_patients")


def _score(args: Namespace) -> None:
    from brstnet.data.mirror import open_store
    from brstnet.evaluation.evaluate import wanted
    from brstnet.evaluation.others import File, from_checkpoints, score
    from brstnet.evaluation.tables import describe_summary
    from brstnet.evaluation.yardstick import Yardstick

    if bool(args.checkpoints) == bool(args.training_patients):
        raise ValueError(
            "give either --checkpoints or --training_patients: panel, means and controls are "
            "fitted on training patients, and never on those who are judged"
        )
    store, options = open_store(args.store, patches=False), from_namespace(Judging, args)
    yardstick = (
        from_checkpoints(args.checkpoints, store, args.patients)
        if args.checkpoints
        else Yardstick.fitted_on(store, args.training_patients, args.patients, args.protocol)
    )
    result = score(
        File(path=args.predictions, units=args.units),
        store,
        args.patients,
        args.out,
        yardstick,
        options=options,
        fitting=wanted(options, pick_device(args.device), progress=True),
    )
    _say(describe_summary(result.summary))
    _say(f"written to {args.out}")


def _compare_options(parser: Parser) -> None:
    parser.add_argument(
        "evaluations",
        nargs="+",
        help="folders of evaluate or score, each against the first; FOLDER@colour_ridge: a control",
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")


def _compare(args: Namespace) -> None:
    from brstnet.evaluation.compare import compare, read_side, write

    sides = [read_side(place) for place in args.evaluations]
    found = compare(sides, seed=args.seed)
    write(found, sides, args.out)
    _say(f"first: {sides[0].name}; {sides[0].protocol['line']}")
    _say(found.describe())
    _say(f"written to {args.out}")


def _predict_options(parser: Parser) -> None:
    parser.add_argument("checkpoints", type=Path, nargs="+", help="several: their mean and spread")
    parser.add_argument("slide", type=Path, help="an image, or what OpenSlide reads; no counts")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--spots", type=Path, help=".csv, .parquet or .h5ad; by default a grid")
    parser.add_argument("--mpp", type=float, help="the slide's microns per pixel, if it says none")
    parser.add_argument("--model_mpp", type=float, help="those of the model's training slides")
    parser.add_argument("--pitch_um", type=float, default=200.0, help="of the grid's spots")
    parser.add_argument("--min_tissue", type=float, help="share of a window, by default .5")
    parser.add_argument("--genes", nargs="+", default=[], help="to draw: ids or symbols")
    parser.add_argument(
        "--spatialdata", action="store_true", help="slide.zarr too; needs brstnet[spatial]"
    )
    parser.add_argument(
        "--ome_tiff", action="store_true", help="a pyramid a gene drawn; needs brstnet[ome]"
    )
    parser.add_argument("--intervals", type=Path, help="intervals.parquet of brstnet evaluate")
    parser.add_argument("--level", type=float, default=0.9, help="of the intervals")
    parser.add_argument("--device", default="auto")


def _predict(args: Namespace) -> None:
    from brstnet.evaluation.slides.new_slide import Asked, predict_slide

    asked = Asked(
        spots=args.spots,
        um_per_px=args.mpp,
        model_um_per_px=args.model_mpp,
        pitch_um=args.pitch_um,
        min_tissue=args.min_tissue,
        genes=tuple(args.genes),
        spatialdata=args.spatialdata,
        ome_tiff=args.ome_tiff,
        intervals=args.intervals,
        level=args.level,
    )
    device = pick_device(args.device)
    result = predict_slide(args.checkpoints, args.slide, args.out, asked, device=device)
    _say(f"{result.adata.n_obs} spots, {result.adata.n_vars} genes")
    for warning in result.warnings:
        _say(f"warning: {warning}")
    _say(f"written to {result.folder}: {', '.join(result.files)}")


def _push_options(parser: Parser) -> None:
    parser.add_argument("store", type=Path, help="patch store to upload")
    parser.add_argument("uri", help="where to: s3://BUCKET/NAME, gs://BUCKET/NAME, file:///FOLDER")
    parser.add_argument("--replace", action="store_true", help="remove another store that is there")


def _push(args: Namespace) -> None:
    from brstnet.data.mirror import push

    _say(push(args.store, args.uri, replace=args.replace))


def _demo_options(parser: Parser) -> None:
    parser.add_argument("folder", type=Path, help="folder to make")
    parser.add_class_arguments(Demo)


def _demo(args: Namespace) -> None:
    demo = from_namespace(Demo, args)
    with tqdm(total=demo.patients * demo.sections_per_patient, unit="slide", desc="drawing") as bar:
        make_demo(args.folder, demo, lambda _: bar.update())
    _say(f"demo tissue in {args.folder}, the truth beside it in truth.parquet")


COMMANDS = {
    "prepare": (_prepare_options, "raw slides and counts to a patch store", _prepare),
    "info": (_info_options, "what a store holds, and what was lost and why", _info),
    "train": (_train_options, "one fold of one configuration", _train),
    "evaluate": (_evaluate_options, "judge checkpoints on held-out patients", _evaluate),
    "score": (_score_options, "judge anybody's predictions by the same tables", _score),
    "compare": (_compare_options, "judged models side by side: is one better?", _compare),
    "predict": (_predict_options, "a slide without counts: expression at every spot", _predict),
    "push": (_push_options, "a store to object storage, for all machines", _push),
    "demo-data": (_demo_options, "synthetic tissue in the stnet layout", _demo),
}


def _say(text: str) -> None:
    print(text)  # noqa: T201 - the command line's output


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; what the user can mend is told in a few lines, with exit code 2."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        parser = make_parser(preset_asked(words))
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    args = parser.parse_args(words)
    command = args.subcommand
    try:
        options = parser.instantiate(args)[command]
        COMMANDS[command][2](options)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
        sys.stderr.write(f"error: {error}{notes}\n")
        return 2
    except KeyboardInterrupt:
        again = {"train": "step", "prepare": "section", "push": "file"}.get(command)
        goes_on = f"; the same command goes on at the {again} it was at" if again else ""
        sys.stderr.write(f"\nstopped{goes_on}\n")
        return 130
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        restart_with_allocator("brstnet")
    sys.exit(main())
