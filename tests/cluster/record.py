"""python -m cluster.record SWEEP, on the head: the sweep's runs in MLflow, as one line of JSON."""

import json
import os
import sys
from pathlib import Path

from drills.compare import runs, steps
from mlflow import MlflowClient


def main() -> None:
    """Print status, parameters, last values and the steps of every metric, by the run's key."""
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    found = {}
    for key, run in runs(client, Path(os.environ["BRSTNET_RUNS"]) / sys.argv[1]):
        assert key not in found, f"MLflow has two runs of {key}"
        metrics = {} if key == "sweep" else steps(client, run.info.run_id, run.data.metrics)
        found[key] = {
            "status": run.info.status,
            "last": run.data.metrics,
            "steps": {name: [step for step, _ in told] for name, told in metrics.items()},
        }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
