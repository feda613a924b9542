"""After the last trial: the champion chosen, refitted if asked, registered, and what was learnt."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import ray
import torch
from mlflow import MlflowClient

from brstnet.config import Settings
from brstnet.data.mirror import open_store
from brstnet.evaluation import validation
from brstnet.launch import pick_device
from brstnet.training.keep import finished
from sweeps import insight, tracking
from sweeps.board import Board
from sweeps.champion import crown, promoted, read_outcomes
from sweeps.choice import Candidate, Choice, by_hand, choose
from sweeps.cluster import capacity, gpus_per_worker, start_ray
from sweeps.nodes import Nodes, check_gpu
from sweeps.refit import refit, refit_folder, refit_settings

INSIGHT = "insight"


def conclude(
    client: MlflowClient, board: Board, stores: dict[str, str], address: str | None
) -> None:
    """Crown the champion and write down what the sweep has taught. May be repeated.

    Raises:
        ValueError: no trial completed all folds.
    """
    sweep, out = board.sweep, board.out
    choice = choose(read_outcomes(out), sweep.champion_rule)
    if (trial := promoted(out)) is not None:
        choice = by_hand(read_outcomes(out), trial)  # --promote of another trial changes it
    say(f"chosen: {choice.reason}")
    store = stores[choice.chosen.outcomes[0]["config"].get("store", "")]
    if sweep.refit:
        refit_champion(board, choice.chosen, store, address)
    version = crown(client, out, choice)
    draw_maps(client, board, choice.chosen, store, address)
    explain(client, board, choice)
    client.set_terminated(tracking.read_runs(out)["sweep"])
    say(f"what mattered: {out / INSIGHT / 'insight.html'}")
    say(f"champion: models:/{tracking.MODEL}@{tracking.ALIAS} (version {version})")


def refit_champion(board: Board, chosen: Candidate, store: str, address: str | None) -> None:
    """Train the champion's configuration on all folds, on a worker of the cluster.

    Raises:
        ValueError: its schedule needs a validation.
    """
    settings, folder = refit_settings(chosen), refit_folder(board.out, chosen.trial)
    if finished(folder) is not None:
        return
    say(
        f"refit: trial {chosen.trial} on the patients of all folds, "
        f"{settings.training.epochs} epochs"
    )
    on_worker(board, address, _refit, store, settings, folder)


def _refit(device: torch.device, store: str, settings: Settings, folder: Path) -> None:
    refit(store, settings, folder, device)


def draw_maps(
    client: MlflowClient, board: Board, chosen: Candidate, store: str, address: str | None
) -> None:
    """Maps of the champion's best genes, into its folds' runs."""
    runs = tracking.read_runs(chosen.folder)
    folds = [chosen.folder / f"fold_{n}" for n in range(board.sweep.protocol.folds)]
    on_worker(board, address, _draw_maps, store, folds)
    for fold in folds:
        client.log_artifact(runs[fold.name], str(fold / "report" / "gene_map.png"))


def _draw_maps(device: torch.device, where: str, folds: Sequence[Path]) -> None:
    store = open_store(where, patches=False)
    for fold in folds:
        done = finished(fold)
        assert done is not None
        figure = validation.gene_map(done.folder, store, device)
        figure.savefig(fold / "report" / "gene_map.png")


def on_worker(board: Board, address: str | None, function: Callable[..., None], *args: Any) -> None:
    """Let a worker do something, on no broken machine: the head may lack a GPU and the patches."""
    if not ray.is_initialized():
        start_ray(board.sweep, address)
    cpus, gpus = board.sweep.cpus_per_worker, gpus_per_worker(board.sweep, capacity(address))

    def task() -> None:
        check_gpu(gpus)
        function(pick_device(), *args)

    bundle = {name: amount for name, amount in {"CPU": cpus, "GPU": gpus}.items() if amount}
    selector = Nodes(board.out).selector("", bundle)
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=3, label_selector=selector)(task)
    ray.get(remote.remote())


def explain(client: MlflowClient, board: Board, choice: Choice) -> None:
    """The page and tables of what mattered, beside the sweep and in its run."""
    folder = board.out / INSIGHT
    folder.mkdir(exist_ok=True)
    choice.table.to_csv(folder / "choice.csv", index=False)
    title = f"Sweep {board.sweep.name}"
    insight.write(board.study, folder, title=title, note=board.sweep.protocol.line())
    client.log_artifacts(tracking.read_runs(board.out)["sweep"], str(folder), INSIGHT)
    if board.sweep.objective == "score_and_cost":
        table = pd.read_csv(folder / "pareto.csv")
        say(f"\nnot beaten in both score and cost:\n{table.to_string(index=False)}\n")


def say(text: str) -> None:
    """Print a line."""
    print(text)  # noqa: T201 - the command line's output
