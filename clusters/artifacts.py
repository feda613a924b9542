"""A run's artifacts on a server that is not trusted: where they may lie, and their copy here."""

import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

MOST_FILES, DEEPEST = 10_000, 12
"""Of one folder's entries, and folders in folders; more is no sweep's."""


class Files:
    """A run's artifacts on a server, by path with their sizes; each path is checked.

    Args:
        uri: of the server, or of a local database.
        run: whose they are.

    Raises:
        ValueError: one lies elsewhere, or there are more than a sweep's run has.
    """

    def __init__(self, uri: str, run: Run) -> None:
        self.run_id, address = run.info.run_id, str(run.info.artifact_uri)
        parts = urlsplit(address)
        scheme = "file" if uri.startswith("sqlite") else "mlflow-artifacts"
        if parts.scheme != scheme or parts.netloc or ".." in unquote(unquote(parts.path)):
            raise ValueError(
                f"run {self.run_id}: its artifacts lie at {address!r}, which is refused: they must "
                f"be served by the MLflow server itself ({scheme}:/...)"
            )
        self.repository = get_artifact_repository(address, tracking_uri=uri)
        self.sizes = dict(self._walk("", 0))

    def _walk(self, folder: str, depth: int) -> Iterator[tuple[str, int]]:
        if depth > DEEPEST:
            raise ValueError(
                f"run {self.run_id}: {folder!r} is refused: over {DEEPEST} folders deep"
            )
        try:
            entries = self.repository.list_artifacts(folder or None)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":  # what MLflow itself refuses
                raise
            raise ValueError(
                f"run {self.run_id}: a path among its artifacts, in {folder or '.'!r}, is refused: "
                f"{error.message}"
            ) from error
        if len(entries) > MOST_FILES:
            raise ValueError(f"run {self.run_id}: {folder!r} is refused: over {MOST_FILES} files")
        for entry in entries:
            path = PurePosixPath(entry.path)
            plain = str(path) == entry.path and str(path.parent) == (folder or ".")
            if not plain or path.name in ("", ".", "..") or set(entry.path) & set("\\\0"):
                raise ValueError(
                    f"run {self.run_id}: the artifact {entry.path!r} is refused: it does not lie "
                    f"in the folder {folder or '.'!r} that was asked for"
                )
            if entry.is_dir:
                yield from self._walk(entry.path, depth + 1)
            else:
                yield entry.path, int(entry.file_size or 0)

    def download(self, place: Path) -> None:
        """Copy all into an empty folder.

        Raises:
            OSError: the disk is too small, or a file came in part.
        """
        if sum(self.sizes.values()) > shutil.disk_usage(place).free:
            raise OSError(f"{place.parent}: no room for the artifacts of run {self.run_id}")
        for path, size in self.sizes.items():
            target = place / path
            target.parent.mkdir(parents=True, exist_ok=True)
            self.repository._download_file(path, str(target))
            if target.stat().st_size != size:
                raise OSError(
                    f"run {self.run_id}: {path} came with {target.stat().st_size} bytes of {size}; "
                    "bring it again"
                )
