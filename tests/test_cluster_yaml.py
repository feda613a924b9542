"""The clusters' files, checked offline against the schemas of Ray, the clouds and Kubernetes.

KubeRay's own schema is in no package that tests can install: data/raycluster.schema.yaml is a copy
of its fields by hand. What Kubernetes defines is checked against the kubernetes package's types,
EC2's and Compute Engine's requests against the descriptions that their client libraries carry.
"""

from __future__ import annotations

import copy
import json
import os
import re
import socket
import subprocess
import tomllib
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr as as_ray_reads,
)
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]
FILES = {
    "aws": "cluster.yaml",
    "gcp": "clusters/gcp.yaml",
    "ssh": "clusters/ssh.yaml",
    "kuberay": "clusters/kuberay.yaml",
}
TEXTS = {name: (ROOT / path).read_text(encoding="utf-8") for name, path in FILES.items()}
LAUNCHED = ["aws", "gcp", "ssh"]
CLOUDS = ["aws", "gcp"]
SHARED = "/mnt/brstnet"
SECRETS = [
    r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",  # AWS access key ids
    r"PRIVATE KEY",
    r"(?i)(password|passwd|secret_access_key|session_token)\s*[:=]",
    r"RAY_AUTH_TOKEN\s*[:=]",
    r"://[^/\s:@]+:[^/\s@]+@",  # user:password in a URI
    r"\b[0-9a-fA-F]{32,}\b",  # tokens, hashes
    r"\b\d{12}\b",  # AWS account numbers
    r"(?m)^kind: Secret",
]

launched = pytest.mark.parametrize("name", LAUNCHED)
clouds = pytest.mark.parametrize("name", CLOUDS)


def config(name: str) -> dict[str, Any]:
    """What one of Ray's launcher's files says."""
    found: dict[str, Any] = yaml.safe_load(TEXTS[name])
    return found


def node(name: str, kind: str) -> dict[str, Any]:
    """What the cloud is asked for."""
    found: dict[str, Any] = config(name)["available_node_types"][kind]["node_config"]
    return found


def line(name: str, key: str, what: str) -> str:
    """The one line among those commands that has this in it."""
    (found,) = [command for command in config(name)[key] if what in command]
    return str(found)


@cache
def kubernetes() -> dict[str, dict[str, Any]]:
    """The manifest's objects by their kind."""
    return {found["kind"]: found for found in yaml.safe_load_all(TEXTS["kuberay"])}


def pod(group: str) -> dict[str, Any]:
    """The specification of the head's pod or the workers'."""
    spec = kubernetes()["RayCluster"]["spec"]
    found = spec["headGroupSpec"] if group == "head" else spec["workerGroupSpecs"][0]
    return dict(found["template"]["spec"])


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, no credentials."""

    def refuse(*_: object) -> None:
        raise AssertionError("the files must be checked without a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_"))]:
        monkeypatch.delenv(name)


# Schemas ------------------------------------------------------------------------------------------


@launched
@pytest.mark.usefixtures("offline")
def test_ray_prepares_and_accepts_it(name: str) -> None:
    prepared = prepare_config(copy.deepcopy(config(name)))
    validate_config(prepared)
    # Nothing of Ray's defaults is left where they would hurt.
    commands = [line for key, lines in prepared.items() if "commands" in key for line in lines]
    assert not any("0.0.0.0" in line or "ray-wheels" in line for line in commands)
    assert not any("pip install" in line for line in commands)
    for role in ("head", "worker"):
        # What all nodes do comes first: the environment's tarball is on the shared file system.
        *before, last = prepared[f"{role}_setup_commands"]
        assert before[: len(prepared["setup_commands"])] == prepared["setup_commands"]
        assert last.endswith(f"bash ~/brstnet/clusters/setup.sh {role}")


@launched
@pytest.mark.usefixtures("offline")
def test_ray_refuses_a_misspelt_key(name: str) -> None:
    """The schema is looked at, so the test above means something."""
    prepared = prepare_config(copy.deepcopy(config(name)) | {"idle_timeout": 10})
    with pytest.raises(Exception, match="idle_timeout"):
        validate_config(prepared)


def run_instances(request: dict[str, Any]) -> str:
    """What botocore has against a request for instances."""
    from botocore.session import Session
    from botocore.validate import ParamValidator

    shape = Session().get_service_model("ec2").operation_model("RunInstances").input_shape
    # As Ray's provider does: it takes one of the subnets and adds counts.
    (request["SubnetId"], *_) = request.pop("SubnetIds")
    return str(
        ParamValidator().validate(request | {"MinCount": 1, "MaxCount": 1}, shape).generate_report()
    )


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("kind", ["head", "gpu"])
def test_ec2_knows_what_it_is_asked_for(kind: str) -> None:
    assert run_instances(node("aws", kind)) == ""
    assert "InstanceKind" in run_instances(node("aws", kind) | {"InstanceKind": "g5"})


@pytest.mark.usefixtures("offline")
def test_ray_starts_such_machines_on_a_mock_of_ec2(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ray's own provider makes a head and a worker, and gives neither more than the file says."""
    moto = pytest.importorskip("moto", reason="needs moto, of the extra `servers`")
    import boto3
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    monkeypatch.setenv("HOME", str(tmp_path))  # for the key pair that Ray makes
    region = config("aws")["provider"]["region"]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    monkeypatch.setenv("AWS_DEFAULT_REGION", region)
    with moto.mock_aws():
        ec2, iam = boto3.resource("ec2"), boto3.client("iam")
        network = ec2.create_vpc(CidrBlock="10.0.0.0/16")
        subnet = network.create_subnet(CidrBlock="10.0.0.0/24")
        group = network.create_security_group(GroupName="brstnet", Description="brstnet")
        image = next(iter(ec2.images.all()))
        for role in ("head", "worker"):
            iam.create_instance_profile(InstanceProfileName=f"brstnet-{role}")
        text = TEXTS["aws"]
        for made in (subnet.id, group.id, image.id):
            text = text.replace(f"{made.split('-')[0]}-REPLACE", made)
        groups = {found.id for found in ec2.security_groups.all()}
        ready = bootstrap_aws(prepare_config(yaml.safe_load(text)))
        assert {found.id for found in ec2.security_groups.all()} == groups
        assert iam.list_roles()["Roles"] == []
        provider = AWSNodeProvider(ready["provider"], ready["cluster_name"])
        for kind in ("head", "gpu"):
            asked = ready["available_node_types"][kind]["node_config"]
            provider.create_node(copy.deepcopy(asked), {"ray-node-name": kind}, 1)
        machines = {machine.instance_type: machine for machine in ec2.instances.all()}
        head, gpu = machines["m6i.xlarge"], machines["g5.xlarge"]
        assert (head.instance_lifecycle, gpu.instance_lifecycle) == (None, "spot")
        for machine, role in ((head, "head"), (gpu, "worker")):
            assert machine.public_ip_address is None
            assert [found["GroupId"] for found in machine.security_groups] == [group.id]
            assert machine.iam_instance_profile["Arn"].endswith(f"/brstnet-{role}")
            assert {"Key": "project", "Value": "brstnet"} in machine.tags
        at_shutdown = head.describe_attribute(Attribute="instanceInitiatedShutdownBehavior")
        assert at_shutdown["InstanceInitiatedShutdownBehavior"] == {"Value": "terminate"}


@cache
def compute_engine() -> jsonschema.Draft202012Validator:
    """Google's description of an instance as a JSON schema that knows no other fields."""
    import googleapiclient.discovery_cache as cached

    file = Path(cached.__file__).with_name("documents") / "compute.v1.json"
    described = json.loads(file.read_text(encoding="utf-8"))["schemas"]
    schemas = {name: strict(schema) for name, schema in described.items()}
    return jsonschema.Draft202012Validator({"$ref": "#/$defs/Instance", "$defs": schemas})


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """Of a schema in Google's dialect, what it says of types and names."""
    if "$ref" in schema:
        return {"$ref": f"#/$defs/{schema['$ref']}"}
    found = {key: schema[key] for key in ("type", "enum") if key in schema}
    if found.get("type") == "any":
        del found["type"]
    if "properties" in schema:
        found["properties"] = {key: strict(value) for key, value in schema["properties"].items()}
        found["additionalProperties"] = False
    elif "additionalProperties" in schema:
        found["additionalProperties"] = strict(schema["additionalProperties"])
    if "items" in schema:
        found["items"] = strict(schema["items"])
    return found


@pytest.mark.parametrize("kind", ["head", "gpu"])
def test_compute_engine_knows_what_it_is_asked_for(kind: str) -> None:
    compute_engine().validate(node("gcp", kind))
    # What Ray's own examples say.
    wrong = node("gcp", kind) | {"scheduling": [{"preemptible": True}]}
    with pytest.raises(jsonschema.ValidationError, match="is not of type 'object'"):
        compute_engine().validate(wrong)


def test_kuberay_knows_the_cluster() -> None:
    schema = yaml.safe_load((ROOT / "tests/data/raycluster.schema.yaml").read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    cluster = kubernetes()["RayCluster"]
    jsonschema.validate(cluster, schema)
    wrong = copy.deepcopy(cluster)
    wrong["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    with pytest.raises(jsonschema.ValidationError, match="is not of type 'string'"):
        jsonschema.validate(wrong, schema)


def check_kind(kind: str, found: dict[str, Any]) -> None:
    """All fields are Kubernetes' own, spelt and typed as it has them."""
    from kubernetes import client

    read = getattr(client, kind).model_validate(found)
    assert read.model_dump(by_alias=True, exclude_unset=True) == found


def test_kubernetes_knows_all_that_is_not_kuberay_s() -> None:
    objects = kubernetes()
    spec = objects["RayCluster"]["spec"]
    check_kind("V1PersistentVolumeClaim", objects["PersistentVolumeClaim"])
    check_kind("V1NetworkPolicy", objects["NetworkPolicy"])
    check_kind("V1ObjectMeta", objects["RayCluster"]["metadata"])
    check_kind("V1ResourceRequirements", spec["autoscalerOptions"]["resources"])
    templates = [spec["headGroupSpec"]["template"], spec["workerGroupSpecs"][0]["template"]]
    for template in templates:
        check_kind("V1PodTemplateSpec", template)
    wrong = copy.deepcopy(templates[0])
    wrong["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(ValueError, match="volumeMount"):
        check_kind("V1PodTemplateSpec", wrong)


def test_ray_reads_of_the_manifest_what_was_meant() -> None:
    """Ray's own autoscaler, as it would in the head's pod."""
    cluster = copy.deepcopy(kubernetes()["RayCluster"])
    cluster["metadata"]["namespace"] = "default"
    read = as_ray_reads(cluster)
    types = read["available_node_types"]
    head, gpu = types[read["head_node_type"]], types["gpu"]
    assert head["resources"]["CPU"] == 0
    assert (gpu["resources"]["CPU"], gpu["resources"]["GPU"]) == (4, 1)
    assert (gpu["min_workers"], gpu["max_workers"], read["max_workers"]) == (0, 8, 8)
    assert read["idle_timeout_minutes"] == 10


@launched
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of ray.serve
def test_ray_start_knows_its_options(name: str) -> None:
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    for role in ("head", "worker"):
        command = line(name, f"{role}_start_ray_commands", "ray start")
        assert set(re.findall(r"--[a-z-]+", command)) <= known
    if name == "aws":
        spec = kubernetes()["RayCluster"]["spec"]
        for group in (spec["headGroupSpec"], spec["workerGroupSpecs"][0]):
            assert {f"--{option}" for option in group["rayStartParams"]} <= known


@launched
def test_all_commands_are_valid_bash(name: str) -> None:
    commands = [line for key, lines in config(name).items() if "commands" in key for line in lines]
    for command in commands:
        subprocess.run(["bash", "-n", "-c", command], check=True)


@pytest.mark.parametrize("name", FILES)
def test_programs_of_ours_are_there(name: str) -> None:
    named = re.findall(r"clusters/\w+\.(?:sh|yaml)|clusters/Dockerfile", TEXTS[name])
    named += [f"clusters/{module}.py" for module in re.findall(r"-m clusters\.(\w+)", TEXTS[name])]
    named += ["clusters/__main__.py"] if "python -m clusters " in TEXTS[name] else []
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


# Safety -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("pattern", SECRETS)
def test_no_secret_is_in_the_file(name: str, pattern: str) -> None:
    assert not re.search(pattern, TEXTS[name])


@launched
def test_token_is_on_and_travels_as_a_file(name: str) -> None:
    for role in ("head", "worker"):
        assert "RAY_AUTH_MODE=token" in line(name, f"{role}_start_ray_commands", "ray start")
    secrets = ["~/.ray/auth_token", "~/.brstnet/nodes.env", "~/.brstnet/tracking.env"]
    mounts = config(name)["file_mounts"]
    assert all(mounts[file] == file for file in secrets)


@clouds
def test_no_machine_has_a_public_address(name: str) -> None:
    assert config(name)["provider"]["use_internal_ips"] is True
    for kind in config(name)["available_node_types"]:
        if name == "aws":
            # Without a group of one's own Ray makes one that opens SSH to everybody.
            assert node(name, kind)["SecurityGroupIds"]
            assert node(name, kind)["SubnetIds"]
            assert node(name, kind)["MetadataOptions"]["HttpTokens"] == "required"
        else:
            (interface,) = node(name, kind)["networkInterfaces"]
            assert "accessConfigs" not in interface


@clouds
def test_rights_are_named(name: str) -> None:
    """Unnamed, Ray gives the head rights to all machines and buckets."""
    key = {"aws": "IamInstanceProfile", "gcp": "serviceAccounts"}[name]
    rights = [node(name, kind)[key] for kind in ("head", "gpu")]
    assert rights[0] != rights[1]


def test_nobody_outside_reaches_the_pods() -> None:
    spec = kubernetes()["RayCluster"]["spec"]
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert spec["authOptions"] == {"mode": "token"}
    policy = kubernetes()["NetworkPolicy"]["spec"]
    mine = {"podSelector": {"matchLabels": {"ray.io/cluster": "brstnet"}}}
    assert policy == mine | {"policyTypes": ["Ingress"], "ingress": [{"from": [mine]}]}
    for group in ("head", "gpu"):
        assert pod(group)["securityContext"]["runAsNonRoot"]
        for container in pod(group)["containers"]:
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert "ports" not in container
    assert pod("gpu")["automountServiceAccountToken"] is False
    # The server's password is for the head alone.
    assert "tracking" not in [volume["name"] for volume in pod("gpu")["volumes"]]


# The same shape -----------------------------------------------------------------------------------


@launched
def test_head_shows_nothing_and_trains_nothing(name: str) -> None:
    command = line(name, "head_start_ray_commands", "ray start")
    for option in ("--num-cpus=0", "--dashboard-host=127.0.0.1", "RAY_JOB_STOP_WAIT_TIME_S=120"):
        assert option in command
    assert "--node-ip-address=" in command
    if name in CLOUDS:
        assert config(name)["head_node_type"] == "head"
        assert config(name)["available_node_types"]["head"]["resources"] == {"CPU": 0}


def test_head_pod_shows_nothing_and_trains_nothing() -> None:
    params = kubernetes()["RayCluster"]["spec"]["headGroupSpec"]["rayStartParams"]
    assert (params["num-cpus"], params["dashboard-host"]) == ("0", "127.0.0.1")
    assert {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": "120"} in pod("head")["containers"][0][
        "env"
    ]


@pytest.mark.parametrize("name", FILES)
def test_tracking_server_runs_on_the_head(name: str) -> None:
    if name == "kuberay":
        commands = [" ".join(c.get("args", [])) for c in pod("head")["containers"]]
    else:
        commands = config(name)["head_start_ray_commands"]
        # After Ray: a database that is away leaves a cluster that can be looked at.
        assert "ray start" in commands[-2]
    assert "python -m clusters.tracking" in commands[-1]


@clouds
def test_workers_are_spot_gpus_from_zero_to_eight(name: str) -> None:
    gpu = config(name)["available_node_types"]["gpu"]
    assert (gpu["min_workers"], gpu["max_workers"], config(name)["max_workers"]) == (0, 8, 8)
    assert gpu["resources"]["GPU"] == 1
    assert config(name)["idle_timeout_minutes"] == 10
    if name == "aws":
        assert gpu["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert "InstanceMarketOptions" not in node(name, "head")
    else:
        scheduling = gpu["node_config"]["scheduling"]
        assert scheduling["provisioningModel"] == "SPOT"
        assert scheduling["instanceTerminationAction"] == "DELETE"
        assert "scheduling" not in node(name, "head")


@clouds
def test_workers_hear_that_they_must_leave(name: str) -> None:
    command = line(name, "worker_start_ray_commands", "clusters.notice")
    # Ray's connection ends before it does.
    assert "setsid -f python" in command
    assert command.endswith("< /dev/null")


def test_worker_pods_are_spot_and_say_that_they_leave() -> None:
    assert pod("gpu")["nodeSelector"] == {"cloud.google.com/gke-spot": "true"}
    assert "nodeSelector" not in pod("head")
    (container,) = pod("gpu")["containers"]
    assert "touch /tmp/brstnet-leaving" in container["lifecycle"]["preStop"]["exec"]["command"][-1]


def test_an_ended_head_is_deleted() -> None:
    assert node("aws", "head")["InstanceInitiatedShutdownBehavior"] == "terminate"
    assert config("aws")["provider"]["cache_stopped_nodes"] is False


def test_machines_have_one_image_an_own_disk_and_names_for_the_bill() -> None:
    aws = [node("aws", kind) for kind in ("head", "gpu")]
    assert len({machine["ImageId"] for machine in aws}) == 1
    for machine in aws:
        (disk,) = machine["BlockDeviceMappings"]
        assert disk["Ebs"]["Encrypted"]
        assert disk["Ebs"]["DeleteOnTermination"]
        assert disk["Ebs"]["VolumeSize"] >= 150
        tagged = {tags["ResourceType"]: tags["Tags"] for tags in machine["TagSpecifications"]}
        name = [{"Key": "project", "Value": "brstnet"}]
        assert tagged == {"instance": name, "volume": name}
    gcp = [node("gcp", kind) for kind in ("head", "gpu")]
    for machine in gcp:
        (disk,) = machine["disks"]
        assert disk["autoDelete"]
        assert int(disk["initializeParams"]["diskSizeGb"]) >= 150
        assert machine["labels"] == disk["initializeParams"]["labels"] == {"project": "brstnet"}
    assert len({machine["disks"][0]["initializeParams"]["sourceImage"] for machine in gcp}) == 1
    assert all(
        found["metadata"]["labels"] == {"project": "brstnet"} for found in kubernetes().values()
    )
    assert len({c["image"] for group in ("head", "gpu") for c in pod(group)["containers"]}) == 1


@clouds
def test_shared_file_system_is_mounted_before_setup(name: str) -> None:
    mount, own = config(name)["setup_commands"]
    assert mount.startswith(f"mountpoint -q {SHARED} || ")
    assert "nfsvers=4.1" in mount
    assert own == f'test -w {SHARED} || sudo chown "$(id -u)" {SHARED}'


def test_shared_claim_is_mounted_where_machines_have_it() -> None:
    assert kubernetes()["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]
    for group in ("head", "gpu"):
        ray = pod(group)["containers"][0]
        mounts = {mount["name"]: mount["mountPath"] for mount in ray["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod(group)["volumes"]}
        assert mounts.keys() == volumes.keys()
        assert mounts["shared"] == SHARED
        assert volumes["shared"]["persistentVolumeClaim"] == {"claimName": "brstnet"}
        environment = {variable["name"]: variable["value"] for variable in ray["env"]}
        assert environment["BRSTNET_RUNS"] == f"{SHARED}/runs"
        assert environment["BRSTNET_CACHE"] == mounts["cache"]


@launched
def test_mounts_hold_the_packages_but_not_the_folder(name: str) -> None:
    """Ray reads all files below a mount, rsync_exclude or not: never mount what grows."""
    local = {
        Path(path) for path in config(name)["file_mounts"].values() if not path.startswith("~")
    }
    assert local == project_files()
    assert all((ROOT / path).exists() for path in local)
    if name in CLOUDS:
        assert {".venv", "runs", "stores", ".git"} <= set(config(name)["rsync_exclude"])


def project_files() -> set[Path]:
    """What a node needs of the project."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
    files = ["pyproject.toml", "constraints.txt", project["project"]["readme"]]
    return {Path(name.rstrip("*")) for name in [*packages, *files]}


def test_image_has_what_machines_have() -> None:
    text = (ROOT / "clusters/Dockerfile").read_text(encoding="utf-8")
    copied = re.findall(r"^COPY (.+) \S+$", text, flags=re.MULTILINE)
    assert {Path(name) for names in copied for name in names.split()} == project_files()
    assert "pip install --no-cache-dir -c constraints.txt -e '.[cluster]'" in text
    assert "ENV RAY_AUTH_MODE=token" in text


def test_ray_s_version_is_the_image_s() -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    said = kubernetes()["RayCluster"]["spec"]["rayVersion"]
    assert f"ray=={said}" in pins
    assert said == version("ray")
