"""The chart as helm renders it: valid for Kubernetes, and with the content that a safe deployment needs."""

import re
import subprocess
import tomllib
from pathlib import Path

import msgspec
import pytest
import yaml

from server.settings import Settings, read_settings
from tests.deploy.chart import (
    CHART,
    RENDERINGS,
    ROOT,
    Helm,
    environment_of,
    find,
    leaves,
    pod_of,
    pods_of,
    server_of,
)
from tests.deploy.schemas import NEWEST, OLDEST, check

GPU = ("--set", "gpu.count=2,settings.gpu=require")


@pytest.mark.parametrize("values", RENDERINGS, ids=lambda path: path.stem)
def test_lint_finds_nothing(each_helm: Helm, values: Path) -> None:
    outcome = each_helm.run("lint", "--strict", CHART, "--values", values)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


@pytest.mark.parametrize("kubernetes", [OLDEST, NEWEST])
@pytest.mark.parametrize("values", RENDERINGS, ids=lambda path: path.stem)
def test_rendered_manifests_are_valid(helm: Helm, values: Path, kubernetes: str) -> None:
    if kubernetes == OLDEST and values.stem.startswith("image-volume"):
        assert "needs Kubernetes 1.31" in helm.refusal("--values", values, "--kube-version", kubernetes)
        return
    manifests = helm.template("--values", values, "--kube-version", kubernetes)
    for manifest in manifests:
        check(manifest, kubernetes)
    names = [(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests]
    assert len(names) == len(set(names))


def test_optional_kinds_are_all_rendered_by_some_values(helm: Helm) -> None:
    """Otherwise a template could be broken and no values file would show it."""
    kinds = {m["kind"] for values in RENDERINGS for m in helm.template("--values", values, "--kube-version", NEWEST)}
    templates = list((CHART / "templates").rglob("*.yaml"))
    written = {line.split()[1] for path in templates for line in path.read_text().splitlines() if line[:5] == "kind:"}
    assert kinds == {kind for kind in written if kind != "{{"} | {"Deployment", "StatefulSet"}


def test_both_helm_majors_render_the_same(helms: dict[int, Helm]) -> None:
    for values in RENDERINGS:
        arguments = ("--values", values, "--kube-version", NEWEST)
        assert helms[3].template(*arguments) == helms[4].template(*arguments)


def test_package_carries_the_schema_and_not_the_ci_values(each_helm: Helm, tmp_path: Path) -> None:
    outcome = each_helm.run("package", CHART, "--destination", tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    (archive,) = tmp_path.glob("slipstream-*.tgz")
    listing = subprocess.run(["tar", "-tzf", archive], capture_output=True, text=True, check=True).stdout
    assert "slipstream/values.schema.json" in listing
    assert "/ci/" not in listing


def test_chart_and_server_have_one_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert chart["appVersion"] == project["version"]


def test_default_release_holds_no_optional_resource(helm: Helm) -> None:
    kinds = sorted(manifest["kind"] for manifest in helm.template())
    assert kinds == ["ConfigMap", "ConfigMap", "Deployment", "Pod", "Service", "ServiceAccount"]


def test_service_selects_the_pods_of_the_deployment_and_not_the_test_pod(helm: Helm) -> None:
    manifests = helm.template("--set", "podLabels.team=vision,podLabels.app\\.kubernetes\\.io/name=other")
    labels = find(manifests, "Deployment")["spec"]["template"]["metadata"]["labels"]
    selector = find(manifests, "Service")["spec"]["selector"]
    assert selector.items() <= labels.items()
    assert find(manifests, "Deployment")["spec"]["selector"]["matchLabels"] == selector
    assert labels["team"] == "vision"
    assert not selector.items() <= find(manifests, "Pod")["metadata"]["labels"].items()
    (port,) = find(manifests, "Service")["spec"]["ports"]
    assert port["targetPort"] in {entry["name"] for entry in server_of(manifests)["ports"]}


@pytest.mark.parametrize("release", ["slipstream", "r" * 53])
def test_names_fit_the_limit_of_kubernetes(helm: Helm, release: str) -> None:
    for manifest in helm.template("--set", "models.claim.create=true,nameOverride=" + "n" * 63, release=release):
        assert len(manifest["metadata"]["name"]) <= 63
        assert all(len(label) <= 63 for label in manifest["metadata"]["labels"].values())


def test_probes_ask_ready_for_traffic_and_live_for_restarts(helm: Helm) -> None:
    server = server_of(helm.template())
    paths = {name: server[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert paths == {
        "startupProbe": "/v2/health/ready",
        "readinessProbe": "/v2/health/ready",
        "livenessProbe": "/v2/health/live",
    }
    assert {server[name]["httpGet"]["port"] for name in paths} == {"http"}
    assert server["startupProbe"]["periodSeconds"] * server["startupProbe"]["failureThreshold"] >= 300


@pytest.mark.parametrize("values", RENDERINGS, ids=lambda path: path.stem)
def test_every_pod_runs_without_privilege(helm: Helm, values: Path) -> None:
    manifests = helm.template("--values", values, "--kube-version", "1.37")
    pods = pods_of(manifests)
    assert len(pods) >= 2
    for pod in pods:
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 10001
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not [volume for volume in pod.get("volumes", []) if "hostPath" in volume]
        for container in pod["containers"] + pod.get("initContainers", []):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"].keys() == {"requests", "limits"}


def test_service_links_cannot_overwrite_settings(helm: Helm) -> None:
    manifests = helm.template(release="slipstream")
    # What Kubernetes would inject for a Service of this name, and what the server would make of it.
    assert find(manifests, "Service")["metadata"]["name"] == "slipstream"
    assert pod_of(manifests)["enableServiceLinks"] is False
    assert find(manifests, "Pod")["spec"]["enableServiceLinks"] is False


def test_environment_is_read_by_the_server_as_meant(helm: Helm) -> None:
    values = "settings.max_queue_delay_s=0.002,settings.max_body_bytes=268435456,settings.cpu_instances=3"
    settings = read_settings({}, environment_of(helm.template("--set", values)))
    assert settings == Settings(
        host="0.0.0.0",
        gpu="off",
        engine_cache=Path("/tmp/engines"),
        log_format="json",
        max_queue_delay_s=0.002,
        max_body_bytes=268435456,
        cpu_instances=3,
    )


def test_large_numbers_of_a_values_file_are_not_printed_as_floats(helm: Helm, tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    values.write_text("settings: {max_body_bytes: 1073741824, drain_timeout_s: 12.5, default_timeout_s: 0.00005}\n")
    environment = environment_of(helm.template("--values", values))
    assert environment["SLIPSTREAM_MAX_BODY_BYTES"] == "1073741824"
    assert read_settings({}, environment).drain_timeout_s == 12.5
    assert read_settings({}, environment).default_timeout_s == 0.00005


def test_schema_knows_exactly_the_settings_of_the_server() -> None:
    schema = msgspec.json.decode((CHART / "values.schema.json").read_bytes())
    fields = {field.name for field in msgspec.structs.fields(Settings)}
    # The repository is where the chart mounts the models.
    assert schema["properties"]["settings"]["properties"].keys() == fields - {"repository"}


def test_defaults_are_the_servers_own_except_where_a_pod_differs() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())["settings"]
    server = msgspec.to_builtins(Settings(), enc_hook=str)
    different = {key: value for key, value in values.items() if value != server[key]}
    assert different == {"host": "0.0.0.0", "gpu": "off", "engine_cache": "/tmp/engines", "log_format": "json"}
    assert values.keys() == server.keys() - {"repository"}


def test_port_and_folder_reach_every_place_that_names_them(helm: Helm) -> None:
    values = "settings.port=9000,service.port=80,models.mountPath=/srv/models"
    manifests = helm.template("--set", values)
    server = server_of(manifests)
    assert server["ports"] == [{"name": "http", "containerPort": 9000, "protocol": "TCP"}]
    assert server["args"] == ["serve", "/srv/models"]
    assert {mount["name"]: mount["mountPath"] for mount in server["volumeMounts"]}["models"] == "/srv/models"
    address = find(manifests, "Pod")["spec"]["containers"][0]["command"][-1]
    assert address == "http://rel-slipstream.serving.svc:80"


def test_only_the_temporary_folder_is_writable(helm: Helm) -> None:
    manifests = helm.template("--set", "models.existingClaim=models,models.subPath=team/a")
    mounts = {mount["mountPath"]: mount for mount in server_of(manifests)["volumeMounts"]}
    assert mounts["/models"]["readOnly"] is True
    assert mounts["/models"]["subPath"] == "team/a"
    assert [path for path, mount in mounts.items() if not mount.get("readOnly")] == ["/tmp"]


@pytest.mark.parametrize(
    ("values", "volume"),
    [
        ("replicaCount=1", {"emptyDir": {"sizeLimit": "4Gi"}}),
        ("models.existingClaim=mine", {"persistentVolumeClaim": {"claimName": "mine"}}),
        ("models.claim.create=true", {"persistentVolumeClaim": {"claimName": "rel-slipstream-models"}}),
        ("models.image.reference=m:1", {"image": {"reference": "m:1", "pullPolicy": "IfNotPresent"}}),
    ],
)
def test_models_come_from_the_chosen_source(helm: Helm, values: str, volume: dict[str, object]) -> None:
    manifests = helm.template("--set", values, "--kube-version", "1.37")
    assert pod_of(manifests)["volumes"][0] == {"name": "models", **volume}
    claims = [manifest for manifest in manifests if manifest["kind"] == "PersistentVolumeClaim"]
    assert [claim["metadata"]["name"] for claim in claims] == (
        ["rel-slipstream-models"] if "claim.create" in values else []
    )
    assert all(claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep" for claim in claims)


def test_gpu_is_a_limit_and_selects_the_gpu_image(helm: Helm) -> None:
    manifests = helm.template(*GPU, "--set", "gpu.runtimeClassName=nvidia", "--values", CHART / "values-gpu.yaml")
    server = server_of(manifests)
    assert server["resources"]["limits"] == {"cpu": "4", "memory": "16Gi", "nvidia.com/gpu": 2}
    assert "nvidia.com/gpu" not in server["resources"]["requests"]
    assert server["image"].endswith("-gpu")
    assert pod_of(manifests)["runtimeClassName"] == "nvidia"
    assert pod_of(manifests)["tolerations"][0]["key"] == "nvidia.com/gpu"
    # Where no surplus pod may start, one must be allowed to stop, or the update never moves.
    assert find(manifests, "Deployment")["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 1, "maxSurge": 0}


def test_default_release_asks_for_no_gpu(helm: Helm) -> None:
    manifests = helm.template()
    assert server_of(manifests)["resources"]["limits"].keys() == {"cpu", "memory"}
    assert not server_of(manifests)["image"].endswith("-gpu")
    assert not {"runtimeClassName", "tolerations", "nodeSelector", "affinity"} & pod_of(manifests).keys()


@pytest.mark.parametrize(
    ("values", "image"),
    [
        ("image.tag=7", "slipstream:7"),
        (f"image.tag=7,image.digest=sha256:{'0' * 64}", f"slipstream@sha256:{'0' * 64}"),
    ],
)
def test_image_is_the_one_named(helm: Helm, values: str, image: str) -> None:
    manifests = helm.template("--set-string", values)
    assert server_of(manifests)["image"] == image
    assert find(manifests, "Pod")["spec"]["containers"][0]["image"] == image


def test_pod_lives_longer_than_its_work_may_take(helm: Helm) -> None:
    manifests = helm.template()
    settings = read_settings({}, environment_of(manifests))
    (_, pause) = server_of(manifests)["lifecycle"]["preStop"]["exec"]["command"]
    needed = int(pause) + settings.shutdown_grace_s + settings.drain_timeout_s
    assert pod_of(manifests)["terminationGracePeriodSeconds"] > needed
    assert "lifecycle" not in server_of(helm.template("--set", "preStopSleepSeconds=0"))


def test_shortest_accepted_termination_is_just_above_the_sum(helm: Helm) -> None:
    # 5 + 0.5 + 30 seconds.
    helm.template("--set", "terminationGracePeriodSeconds=36")
    assert "= 35.5, or queued requests are killed" in helm.refusal("--set", "terminationGracePeriodSeconds=35")
    fraction = ("--set", "terminationGracePeriodSeconds=36,settings.shutdown_grace_s=1.0")
    assert "queued requests are killed" in helm.refusal(*fraction)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ("replicaCount=0", "replicaCount"),
        ("replicas=2", "replicas"),
        ("settings.bogus=1", "bogus"),
        ("settings.repository=/elsewhere", "repository"),
        ("settings.gpu=maybe", "gpu"),
        ("settings.log_level=verbose", "log_level"),
        ("settings.port=80", "port"),
        ("settings.host=127.0.0.1", "host"),
        ("settings.max_queue_delay_s=soon", "max_queue_delay_s"),
        ("settings.drain_timeout_s=null", "drain_timeout_s"),
        ("models.mountPath=/tmp", "mountPath"),
        ("models.mountPath=models", "mountPath"),
        ("models.subPath=../other", "subPath"),
        ("service.port=70000", "port"),
        ("probes.startup.failureThreshold=0", "failureThreshold"),
        ("probes.readiness.path=/", "path"),
        ("image.digest=latest", "digest"),
        # A tag such as 1.10 in a values file is the number 1.1.
        ("image.tag=7", "tag"),
        ("podSecurityContext.runAsUser=0", "runAsUser"),
        ("podSecurityContext.runAsNonRoot=false", "runAsNonRoot"),
        ("securityContext.privileged=true", "privileged"),
        ("securityContext.readOnlyRootFilesystem=false", "readOnlyRootFilesystem"),
        ("rollout=both", "rollout"),
        ("gpu.resourceName=gpu", "resourceName"),
    ],
)
def test_schema_refuses(each_helm: Helm, values: str, words: str) -> None:
    refusal = each_helm.refusal("--set", values)
    assert "schema" in refusal
    assert words in refusal


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ("settings.gpu=require", "set gpu.count to 1 or more"),
        ("gpu.count=1", "the GPU would lie idle"),
        ("models.existingClaim=a,models.claim.create=true", "set at most one source of models"),
        ("models.existingClaim=a,models.image.reference=b", "set at most one source of models"),
    ],
)
def test_values_that_contradict_each_other_are_refused(each_helm: Helm, values: str, words: str) -> None:
    assert words in each_helm.refusal("--set", values)


@pytest.mark.parametrize(
    "values",
    [
        "rollout=replace",
        "podSecurityContext.runAsUser=null,podSecurityContext.runAsGroup=null,podSecurityContext.fsGroup=null",
        "global.imageRegistry=example.com",
    ],
)
def test_schema_accepts(each_helm: Helm, values: str) -> None:
    assert each_helm.template("--set", values)


def test_every_value_is_documented_with_its_default() -> None:
    values = leaves(yaml.safe_load((CHART / "values.yaml").read_text()))
    rows = dict(re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|", (CHART / "README.md").read_text(), re.MULTILINE))
    assert rows.keys() == values.keys()
    shown = {key: value if isinstance(value, str) else yaml.safe_load(rows[key]) for key, value in values.items()}
    assert shown == values
    assert all(rows[key] == (value or '""') for key, value in values.items() if isinstance(value, str))


def test_notes_forward_the_port_that_their_curl_asks(helm: Helm) -> None:
    place = ("--namespace", "serving", "--set", "service.port=80")
    outcome = helm.run("install", "rel", CHART, "--dry-run=client", *place)
    assert outcome.returncode == 0, outcome.stderr
    notes = outcome.stdout.split("NOTES:", 1)[1]
    forward = re.search(r"kubectl --namespace serving port-forward service/rel-slipstream (\d+):80\n", notes)
    assert forward is not None, notes
    assert f"curl --fail --include http://127.0.0.1:{forward[1]}/v2/health/ready" in notes
    assert "the model repository is an empty volume" in notes


def test_notes_do_not_warn_when_models_have_a_source(helm: Helm) -> None:
    outcome = helm.run("install", "rel", CHART, "--dry-run=client", "--set", "models.existingClaim=models")
    assert "WARNING" not in outcome.stdout
