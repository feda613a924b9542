"""A predicted slide as SpatialData: what squidpy, napari-spatialdata and spatialdata-plot open.

The libraries are heavy and belong to the extra `spatial`: nothing imports them unless asked.
"""

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np

from brstnet.evaluation.slides.slide import Slide

CHUNK_PX = 2048
SMALLEST_PX = 1024
"""The pyramid ends at the first level whose longer side is no longer than this."""

IMAGE, SPOTS, TABLE = "slide", "spots", "predictions"


def require() -> None:
    """Say what to install, before any work is done.

    Raises:
        ImportError: spatialdata is not installed.
    """
    if importlib.util.find_spec("spatialdata") is None:
        raise ImportError(
            "slide.zarr is written by spatialdata, which is not installed: pip install "
            "'brstnet[spatial]' -c constraints.txt (or leave --spatialdata away: predictions.h5ad "
            "and the maps need nothing more)"
        )


def write(path: Path, adata: anndata.AnnData, slide: Slide, radius_px: float) -> None:
    """Write the slide as an image pyramid, the spots as circles, and the predictions' table.

    Args:
        path: zarr folder to make.
        adata: predictions; X goes into the layer `predicted` too.
        slide: at the level that was read; coordinates stay those of the full resolution.
        radius_px: of the spots' circles, in pixels of the full resolution.
    """
    require()
    from spatialdata import SpatialData

    elements = {
        "images": {IMAGE: _image(slide)},
        "shapes": {SPOTS: _circles(adata, radius_px)},
        "tables": {TABLE: _table(adata)},
    }
    with warnings.catch_warnings():
        # A change of zarr's defaults that concerns who reads and writes a chunk at a time.
        warnings.filterwarnings("ignore", message="zarr v3 autosharding")
        SpatialData(**elements).write(path)


def _image(slide: Slide) -> Any:
    import dask.array as da
    from spatialdata.models import Image2DModel
    from spatialdata.transformations import Scale

    width, height = slide.size_px
    chunks = ((3,), _pieces(height), _pieces(width))
    pixels = da.map_blocks(
        _block, slide, chunks=chunks, dtype=np.uint8, meta=np.empty((0, 0, 0), np.uint8)
    )
    halvings = max(0, int(np.ceil(np.log2(max(slide.size_px) / SMALLEST_PX))))
    return Image2DModel.parse(
        pixels,
        dims=("c", "y", "x"),
        c_coords=["r", "g", "b"],
        scale_factors=[2] * halvings or None,
        chunks=(3, CHUNK_PX, CHUNK_PX),
        transformations={"global": Scale([slide.zoom, slide.zoom], axes=("x", "y"))},
    )


def _pieces(length: int) -> tuple[int, ...]:
    whole, rest = divmod(length, CHUNK_PX)
    return (CHUNK_PX,) * whole + ((rest,) if rest else ())


def _block(slide: Slide, block_info: Any = None) -> np.ndarray:
    """One piece of the slide, read when it is written: the whole is never in memory."""
    _, (top, bottom), (left, right) = block_info[None]["array-location"]
    return slide.read(left, top, right - left, bottom - top).transpose(2, 0, 1)


def _circles(adata: anndata.AnnData, radius_px: float) -> Any:
    from spatialdata.models import ShapesModel
    from spatialdata.transformations import Identity

    return ShapesModel.parse(
        adata.obsm["spatial"],
        geometry=0,
        radius=radius_px,
        index=np.array(adata.obs_names),
        transformations={"global": Identity()},
    )


def _table(adata: anndata.AnnData) -> Any:
    from spatialdata.models import TableModel

    table = adata.copy()
    table.layers["predicted"] = table.X
    table.obs["region"] = SPOTS
    table.obs["region"] = table.obs["region"].astype("category")
    table.obs["instance_id"] = np.array(table.obs_names)
    return TableModel.parse(table, region=SPOTS, region_key="region", instance_key="instance_id")
