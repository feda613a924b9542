"""An S3 server in this process that counts its requests and fails when it is told to: moto's."""

import io
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import boto3
import pytest
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

BUCKET = "stores"
App = Callable[[dict[str, Any], Any], Iterable[bytes]]


class Quiet(WSGIRequestHandler):
    """Writes no log."""

    def log(self, *_: Any, **__: Any) -> None:
        pass


@dataclass
class Storage:
    """The server: what was asked of it, and what goes wrong there."""

    url: str = ""
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path, and the range of bytes, of each request."""
    fail: Callable[[str, str], int] = lambda _method, _path: 0
    """The status that a request fails with; 0 lets it pass."""
    seconds: float = 0.0
    """How long the answer to a GET of an object takes."""

    def uri(self, name: str) -> str:
        return f"s3://{BUCKET}/{name}"

    @property
    def client(self) -> Any:
        names = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
        return boto3.client("s3", endpoint_url=self.url, region_name="us-east-1", **names)

    def gets(self, ending: str = "") -> list[str]:
        """The first GET of each object, the index and lists left out: how often it was fetched."""
        found = [p for m, p, part in self.asked if m == "GET" and part.startswith(("", "bytes=0-"))]
        files = [p for p in found if p.count("/") > 2 and not p.endswith("index.json")]
        return sorted(p for p in files if p.endswith(ending))

    def put(self, name: str, content: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=name, Body=content)

    def get(self, name: str) -> bytes:
        content: bytes = self.client.get_object(Bucket=BUCKET, Key=name)["Body"].read()
        return content

    def names(self, prefix: str) -> list[str]:
        found = self.client.list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/")
        return sorted(o["Key"].removeprefix(f"{prefix}/") for o in found.get("Contents", []))


def watched(app: App, storage: Storage) -> App:
    def answer(environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        part = environ.get("HTTP_RANGE", "")
        listing = "list-type" in environ.get("QUERY_STRING", "")
        storage.asked.append(("LIST" if listing else method, path, part))
        if status := storage.fail(method, path):
            start(f"{status} Failed", [("Content-Length", "0")])
            return io.BytesIO()
        if method == "GET" and path.count("/") > 2:
            time.sleep(storage.seconds)
        return app(environ, start)

    return answer


@contextmanager
def serving(port: int = 0) -> Iterator[Storage]:
    """A server with an empty bucket, on loopback."""
    storage = Storage()
    app = watched(DomainDispatcherApplication(create_backend_app), storage)
    server = make_server("127.0.0.1", port, app, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    storage.url = f"http://127.0.0.1:{server.server_port}"
    try:
        storage.client.create_bucket(Bucket=BUCKET)
        yield storage
        # All servers of a process share what moto keeps.
        urllib.request.urlopen(f"{storage.url}/moto-api/reset", data=b"").close()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def in_environment(patch: pytest.MonkeyPatch, storage: Storage) -> None:
    """Object storage is this server, for this process and its children."""
    patch.setenv("AWS_ENDPOINT_URL", storage.url)
    patch.setenv("AWS_ACCESS_KEY_ID", "test")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
