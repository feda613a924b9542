"""Where a trial is trained: in Tune's actor itself, or in a worker group that the actor leads."""

import os
from collections.abc import Mapping
from typing import Any

import psutil
import ray
import ray.train
from ray import tune
from ray.train import ControllerError, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from sweeps.nodes import BrokenNodeError, Nodes, forget_places, is_broken_node, read_place
from sweeps.space import Asked
from sweeps.trial import Job, got_nowhere, train_folds

ECHOES = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "c10d")
"""Words of an error that a worker has because another one failed."""

CHANCES = 3
"""So often a group waits anew for the same places, a minute each, before others are looked for."""

NEVER_BEGAN = 5
"""After so many groups in a row that did not come to the trial's first line a person is told."""


def run_trial(config: Mapping[str, Any], job: Job) -> None:
    """What Tune calls."""
    asked = Asked(**config)
    if job.sweep.workers_per_trial == 1:
        train_folds(asked, job, tune.report)
    else:
        train_in_workers(asked, job)


def train_in_workers(asked: Asked, job: Job) -> None:
    """Train the trial in a Ray Train worker group, which reports through this actor to Tune.

    A group of which a worker dies, or that finds no place, is started anew where there is one now:
    away from a machine on which it got nowhere. That the trial is given up after so many tries is
    decided where it begins.

    Raises:
        BrokenNodeError: no machine with a working GPU is left.
        ControllerError: as the next.
        WorkerGroupError: the group failed before it began, time and again.
    """
    nodes, folder, tries, never = Nodes(job.out), job.folder(asked), 0, 0

    def selector() -> dict[str, str]:
        return nodes.selector(asked.name, job.bundle, job.sweep.workers_per_trial)

    while True:
        forget_places(folder)
        try:
            make_trainer(asked, job, selector(), tries).fit()
        except (WorkerGroupError, ControllerError) as error:
            tries += 1
            never = never + 1 if read_place(folder, 0) is None else 0
            if never == NEVER_BEGAN:
                raise
            for rank, failure in getattr(error, "worker_failures", {}).items():
                place, broken = read_place(folder, rank), is_broken_node(error_text(failure))
                if place is None or echo(failure) or not (broken or got_nowhere(folder)):
                    continue
                nodes.failed(asked.name, place, str(failure), broken=broken)
                if broken and not selector():
                    raise BrokenNodeError(str(failure)) from error
        else:
            return


def echo(failure: BaseException) -> bool:
    """Whether a worker failed only because another one did."""
    return any(word in error_text(failure).lower() for word in ECHOES)


def error_text(failure: BaseException) -> str:
    """A worker's error as Ray hands it on."""
    return f"{type(failure).__name__}: {failure}"


def make_trainer(asked: Asked, job: Job, selector: dict[str, str], tries: int) -> TorchTrainer:
    """A worker group of the trial, on nodes with these labels."""
    sweep = job.sweep
    return TorchTrainer(
        worker_loop,
        train_loop_config={"asked": asked, "job": job},
        torch_config=ByAddress(backend="nccl" if job.gpus_per_worker >= 1 else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=sweep.workers_per_trial,
            use_gpu=job.gpus_per_worker > 0,
            resources_per_worker=job.bundle,
            label_selector=selector or None,  # type: ignore[call-arg]
        ),
        run_config=ray.train.RunConfig(
            name=f"{asked.name}-{job.session}-{tries}",
            storage_path=str(job.out / "train"),
            callbacks=[TuneReportCallback()],  # type: ignore[list-item]
            failure_config=ray.train.FailureConfig(
                max_failures=0,  # the loop above tries again
                controller_failure_limit=CHANCES,  # type: ignore[call-arg]
            ),
        ),
    )


def worker_loop(loop_config: dict[str, Any]) -> None:
    """What each worker of a group runs."""
    train_folds(**loop_config, report=ray.train.report)


def name_interface() -> None:
    """Tell gloo which network to use: by itself it takes that of the host's name, even loopback."""
    address = ray.util.get_node_ip_address()
    names = [
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(one.address == address for one in addresses)
    ]
    if names:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])


class _Backend(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(name_interface)
        super().on_start(worker_group, backend_config)


class ByAddress(TorchConfig):
    """Torch's process group over the network of the nodes' addresses in Ray."""

    @property
    def backend_cls(self) -> type:
        """What Ray Train starts the group with."""
        return _Backend
