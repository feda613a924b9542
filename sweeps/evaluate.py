"""Judge a registered model on held-out patients and log the result back to MLflow.

python sweeps/evaluate.py models:/brstnet@champion STORE --patients B --out DIR
"""

import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jsonargparse import Namespace
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import Run, ViewType
from mlflow.exceptions import MlflowException

from brstnet.config import Parser, from_namespace
from brstnet.data.mirror import open_store
from brstnet.evaluation.evaluate import Evaluation, evaluate
from brstnet.evaluation.judging import Judging
from brstnet.evaluation.tables import describe_summary
from brstnet.launch import pick_device
from sweeps import tracking


@dataclass(frozen=True, kw_only=True)
class Looks:
    """How often some patients were judged before, and how many models there were."""

    evaluations: int
    models: int


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="sweeps/evaluate.py", description="Judge a registered model.")
    parser.add_argument("model", help="such as models:/brstnet@champion or models:/brstnet/3")
    parser.add_argument(
        "store", help="patch store: a folder or an address, such as s3://BUCKET/NAME"
    )
    parser.add_argument("--patients", nargs="+", required=True, help="held-out patients")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--runs", type=Path, default=tracking.runs_folder(), help="of the sweeps")
    parser.add_argument(
        "--tracking_uri",
        default=os.environ.get("MLFLOW_TRACKING_URI"),
        help="MLflow server; default: MLFLOW_TRACKING_URI, or the database in --runs",
    )
    parser.add_class_arguments(Judging)
    parser.add_argument("--device", default="auto")
    return parser


def judge(options: Namespace) -> Evaluation:
    """Fetch the model, evaluate it, log the result under the trial it came from.

    Raises:
        FileNotFoundError: there is no such database.
        ValueError: there is no such model, or it may not be judged on these patients.
    """
    if options.tracking_uri is None and not (options.runs / tracking.LOCAL_FILE).is_file():
        raise FileNotFoundError(f"{options.runs / tracking.LOCAL_FILE}: no sweep was run here")
    uri = options.tracking_uri or tracking.local_uri(options.runs)
    client = tracking.connect(uri)
    version = tracking.find_version(client, options.model)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            looks = earlier_looks(client, str(version.run_id), options.patients)
            folder = download_artifacts(version.source, dst_path=scratch, tracking_uri=uri)
        except MlflowException as error:
            raise ValueError(f"{options.model}: {version.source} cannot be had: {error}") from error
        result = evaluate(
            [Path(folder)],
            open_store(options.store, patches=False),  # those of the patients are copied
            options.patients,
            options.out,
            device=pick_device(options.device),
            options=from_namespace(Judging, options),
            earlier=looks.evaluations,
        )
    log_evaluation(client, str(version.run_id), options, result, looks)
    return result


def earlier_looks(client: MlflowClient, trial_run: str, patients: Sequence[str]) -> Looks:
    """How often one of these patients was judged before, in the experiment of the model's run.

    A look is not undone by deleting its run: those count too. Models are told apart by the trial
    that made them.
    """
    looks = [
        run
        for run in _evaluations(client, client.get_run(trial_run).info.experiment_id)
        if {*patients} & {*run.data.tags.get("brstnet.patients", "").split(", ")}
    ]
    models = {run.data.tags.get("mlflow.parentRunId", run.info.run_id) for run in looks}
    return Looks(evaluations=len(looks), models=len(models))


def _evaluations(client: MlflowClient, experiment: str) -> Iterator[Run]:
    """All evaluations of an experiment, page by page."""
    token = None
    while True:
        page = client.search_runs(
            [experiment],
            "tags.`brstnet.kind` = 'evaluation'",
            run_view_type=ViewType.ALL,
            page_token=token,
        )
        yield from page
        if not (token := page.token):
            return


def log_evaluation(
    client: MlflowClient, trial_run: str, options: Namespace, result: Evaluation, looks: Looks
) -> None:
    """A run with the summary's numbers and all files, below the trial that made the model."""
    trial = client.get_run(trial_run)
    patients = ", ".join(options.patients)
    tags = {
        "brstnet.sweep": trial.data.tags["brstnet.sweep"],
        "brstnet.patients": patients,
        "brstnet.protocol_line": result.protocol["line"],
        "brstnet.model": options.model,
        "brstnet.earlier_evaluations": str(looks.evaluations),
        "brstnet.earlier_models": str(looks.models),
    }
    name = f"evaluation on {patients}"
    experiment = trial.info.experiment_id
    run_id = tracking.start_run(client, experiment, "evaluation", name, tags, trial_run)
    numbers = {
        k: v for k, v in result.summary.items() if isinstance(v, int | float) and math.isfinite(v)
    }
    for group, found in result.summary.get("groups", {}).items():
        numbers |= {f"{group}_{k}": v for k, v in found.items()}
    tracking.log(client, run_id, numbers)
    client.log_artifacts(run_id, str(options.out))
    client.set_terminated(run_id)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; what the user can mend is told in a few lines, with exit code 2."""
    parser = make_parser()
    options = parser.parse_args(argv)
    try:
        result = judge(options)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    print(describe_summary(result.summary))  # noqa: T201 - the command line's output
    print(f"written to {options.out} and to MLflow")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
