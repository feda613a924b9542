"""The watch for a spot machine's end: real HTTP on loopback, and a real node that is drained."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from ray.autoscaler.v2.sdk import get_cluster_resource_state
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import NodeStatus

from clusters import notice
from clusters.notice import Raylet, cloud, raylets, watch

AWS, GOOGLE = "AWS", "Google"


class Metadata(ThreadingHTTPServer):
    """What a cloud tells a machine about itself."""

    kind = ""
    ends: datetime | None = None
    tokens = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Metadata

    def reply(self, code: int, text: str = "") -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_PUT(self) -> None:
        if self.server.kind != AWS or not self.headers["X-aws-ec2-metadata-token-ttl-seconds"]:
            self.reply(405)
            return
        self.server.tokens += 1
        self.reply(200, f"token-{self.server.tokens}")

    def do_GET(self) -> None:
        ends = self.server.ends
        if self.server.kind == AWS and self.path == "/latest/meta-data/spot/instance-action":
            if self.headers["X-aws-ec2-metadata-token"] != f"token-{self.server.tokens}":
                self.reply(401)
            elif ends is None:
                self.reply(404)
            else:
                said = {"action": "terminate", "time": ends.strftime("%Y-%m-%dT%H:%M:%SZ")}
                self.reply(200, json.dumps(said))
        elif self.server.kind == GOOGLE and self.headers["Metadata-Flavor"] == "Google":
            assert self.path == "/computeMetadata/v1/instance/preempted"
            self.reply(200, "TRUE" if ends else "FALSE")
        else:
            self.reply(404)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    server = Metadata(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_aws_gives_the_time(metadata: Metadata) -> None:
    metadata.kind = AWS
    ask = cloud(metadata.url)
    assert ask is not None
    assert ask() is None
    metadata.ends = datetime.now(UTC) + timedelta(seconds=120)
    seconds = ask()
    assert seconds is not None
    assert 110 < seconds <= 120


def test_aws_token_that_is_over_is_renewed(metadata: Metadata) -> None:
    metadata.kind = AWS
    ask = cloud(metadata.url)
    assert ask is not None
    metadata.tokens += 1  # the service has forgotten ours
    metadata.ends = datetime.now(UTC) + timedelta(seconds=60)
    assert ask() is None
    assert ask() is not None


def test_google_says_only_that(metadata: Metadata) -> None:
    metadata.kind = GOOGLE
    ask = cloud(metadata.url)
    assert ask is not None
    assert ask() is None
    metadata.ends = datetime.now(UTC)
    assert ask() == 30.0


def test_machine_of_ones_own_has_nothing_to_wait_for(
    metadata: Metadata,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setenv("BRSTNET_METADATA_URL", metadata.url)  # 404 and 405 only
    monkeypatch.setenv("BRSTNET_LEAVING", str(tmp_path / "leaving"))
    (tmp_path / "leaving").touch()  # of the machine that had this disk before
    assert notice.main([]) == 0
    assert "nothing to wait for" in capsys.readouterr().out
    assert not (tmp_path / "leaving").exists()
    metadata.server_close()
    assert notice.main([]) == 0  # nobody listens


def test_lost_answers_and_a_deaf_head_are_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    raylet = Raylet(pid=1, node="a", head="b")
    answers: list[object] = [OSError("lost"), None, 60.0]
    heard = iter([False, True])

    def ask() -> float | None:
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        assert answer is None or isinstance(answer, float)
        return answer

    monkeypatch.setattr(notice, "POLL_S", 0)
    monkeypatch.setattr(notice, "raylets", lambda: [raylet])
    monkeypatch.setattr(notice, "drain", lambda *_: next(heard))
    watch(ask, raylet, tmp_path / "leaving")
    assert (tmp_path / "leaving").exists()
    assert "no answer: lost" in capsys.readouterr().out
    assert not list(heard)


def test_watch_ends_with_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notice, "POLL_S", 0)
    watch(lambda: None, Raylet(pid=1, node="a", head="b"), tmp_path / "leaving")
    assert not (tmp_path / "leaving").exists()


def test_one_watch_a_machine(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as first, (tmp_path / "lock").open("w") as second:
        assert notice.taken(first, 0)
        assert not notice.taken(second, 0)


@pytest.mark.cluster
@pytest.mark.slow
def test_notice_drains_the_real_node(
    metadata: Metadata, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    try:
        worker = cluster.add_node(num_cpus=1)
        node = worker.node_id
        assert node in [raylet.node for raylet in raylets()]
        metadata.kind = AWS
        environment = {
            **os.environ,
            "BRSTNET_METADATA_URL": metadata.url,
            "BRSTNET_LEAVING": str(tmp_path / "leaving"),
        }
        command = [sys.executable, "-m", "clusters.notice", "--node-id", node]
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert "on AWS" in process.stdout.readline()
            assert not (tmp_path / "leaving").exists()
            metadata.ends = datetime.now(UTC) + timedelta(seconds=100)
            said = process.stdout.read()
        assert process.returncode == 0
        assert "the head knows" in said
        assert (tmp_path / "leaving").exists()
        gcs = cluster.head_node.get_gcs_client()
        deadline = time.monotonic() + 60
        while True:  # it runs nothing, so it leaves at once
            found = get_cluster_resource_state(gcs).node_states
            if {n.node_id.hex(): n.status for n in found}[node] == NodeStatus.Value("DEAD"):
                break
            assert time.monotonic() < deadline
            time.sleep(0.2)
    finally:
        cluster.shutdown()
