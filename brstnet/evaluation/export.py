"""Predictions in the formats that other tools read."""

import json
from typing import Any

import anndata
import numpy as np
import pandas as pd


def to_anndata(
    predicted_NG: np.ndarray,
    measured_NG: np.ndarray,
    spots: pd.DataFrame,
    genes: pd.DataFrame,
    protocol: dict[str, Any],
) -> anndata.AnnData:
    """Predictions as X and measurements as a layer, both in standardised log units.

    `obs` holds section, patient, position and total count; `obsm["spatial"]` slide pixels; `var`
    each gene's mean and standard deviation in log units; `uns` the units and the protocol, as JSON.
    """
    obs = spots.copy()
    obs.index = pd.Index(spots["section"].astype(str) + "_" + spots["spot"].astype(str))
    return anndata.AnnData(
        X=predicted_NG.astype(np.float32),
        layers={"measured": measured_NG.astype(np.float32)},
        obs=obs,
        var=genes[["symbol", "mean", "std"]],
        obsm={"spatial": spots[["pixel_x", "pixel_y"]].to_numpy(float)},
        uns={
            "brstnet_units": "standardised",
            "brstnet_protocol_line": protocol["line"],
            "brstnet_protocol": json.dumps(protocol),
        },
    )
