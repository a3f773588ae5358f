"""What the optional parts of the chart do once they are asked for."""

from pathlib import Path

import pytest

from server.settings import read_settings
from tests.deploy.chart import (
    CHART,
    Helm,
    Manifest,
    all_of,
    environment_of,
    find,
    pod_of,
    server_of,
    workload_of,
)

CI = CHART / "ci"
STATEFUL = ("--values", CI / "stateful-fetch-values.yaml")
JOBS = ("--values", CI / "jobs-values.yaml")
PRODUCTION = ("--values", CI / "production-values.yaml")
# What a first install of each optional part needs beside its switch.
SWITCHES = {
    "Ingress": "ingress.enabled=true",
    "HTTPRoute": "httpRoute.enabled=true,httpRoute.parentRefs[0].name=public",
    "HorizontalPodAutoscaler": "autoscaling.enabled=true",
    "ScaledObject": "keda.enabled=true",
    "PodDisruptionBudget": "podDisruptionBudget.enabled=true",
    "NetworkPolicy": "networkPolicy.enabled=true",
    "ServiceMonitor": "serviceMonitor.enabled=true",
    "PrometheusRule": "prometheusRule.enabled=true",
    "Job": "loadTest.enabled=true",
}


def selects(selector: dict[str, str], manifest: Manifest) -> bool:
    return selector.items() <= manifest["metadata"]["labels"].items()


@pytest.mark.parametrize("kind", SWITCHES)
def test_each_optional_kind_has_one_switch(helm: Helm, kind: str) -> None:
    assert all_of(helm.template(), kind) == []
    assert find(helm.template("--set", SWITCHES[kind]), kind)


@pytest.mark.parametrize(("rollout", "surge", "unavailable"), [("surge", 1, 0), ("replace", 0, 1)])
def test_rollout_says_which_pod_goes_first(helm: Helm, rollout: str, surge: int, unavailable: int) -> None:
    strategy = workload_of(helm.template("--set", f"rollout={rollout}"))["spec"]["strategy"]
    assert strategy["rollingUpdate"] == {"maxSurge": surge, "maxUnavailable": unavailable}


@pytest.mark.parametrize("switch", ["autoscaling.enabled=true", "keda.enabled=true"])
@pytest.mark.parametrize("cache", ["", ",cache.enabled=true,rollout=replace"])
def test_autoscaler_owns_the_number_of_replicas(helm: Helm, switch: str, cache: str) -> None:
    manifests = helm.template("--set", switch + cache)
    scaler = find(manifests, "ScaledObject" if "keda" in switch else "HorizontalPodAutoscaler")
    workload = workload_of(manifests)
    assert "replicas" not in workload["spec"]
    assert scaler["spec"]["scaleTargetRef"] == {
        "apiVersion": workload["apiVersion"],
        "kind": workload["kind"],
        "name": workload["metadata"]["name"],
    }
    assert workload_of(helm.template("--set", "replicaCount=3"))["spec"]["replicas"] == 3


def test_two_autoscalers_are_refused(each_helm: Helm) -> None:
    refusal = each_helm.refusal("--set", "autoscaling.enabled=true,keda.enabled=true")
    assert "schema" in refusal


def test_keda_looks_at_busy_lanes_when_told(helm: Helm) -> None:
    (queue,) = find(helm.template("--set", "keda.enabled=true"), "ScaledObject")["spec"]["triggers"]
    assert "slipstream_queue_seconds_sum" in queue["metadata"]["query"]
    assert queue["metadata"]["threshold"] == "2"
    (_, lanes) = find(helm.template("--set", "keda.enabled=true,keda.busyLanes=1.4"), "ScaledObject")["spec"][
        "triggers"
    ]
    assert "slipstream_compute_seconds_sum" in lanes["metadata"]["query"]
    assert lanes["metadata"]["threshold"] == "1.4"


def test_hpa_measures_the_server_and_not_its_neighbours(helm: Helm) -> None:
    manifests = helm.template("--set", "autoscaling.enabled=true")
    (metric,) = find(manifests, "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert metric["containerResource"]["container"] == server_of(manifests)["name"]


def test_cache_makes_a_stateful_set_whose_pods_have_names(helm: Helm) -> None:
    manifests = helm.template(*STATEFUL)
    stateful = find(manifests, "StatefulSet")["spec"]
    headless = find(manifests, "Service", "-pods")
    assert stateful["serviceName"] == headless["metadata"]["name"]
    assert headless["spec"]["clusterIP"] == "None"
    (claim,) = stateful["volumeClaimTemplates"]
    mounts = {mount["mountPath"]: mount["name"] for mount in server_of(manifests)["volumeMounts"]}
    assert mounts["/cache"] == claim["metadata"]["name"]
    variables = {variable["name"]: variable["value"] for variable in server_of(manifests)["env"]}
    assert variables == {"CUDA_CACHE_PATH": "/cache/cuda", "SLIPSTREAM_ENGINE_CACHE": "/cache/engines"}
    assert not all_of(manifests, "Deployment")


def test_what_kubernetes_never_changes_holds_no_version(helm: Helm) -> None:
    """A label with the chart's version there would make every upgrade fail."""
    stateful = workload_of(helm.template(*STATEFUL))["spec"]
    constant = {"app.kubernetes.io/name": "slipstream", "app.kubernetes.io/instance": "rel"}
    assert stateful["selector"]["matchLabels"] == constant
    assert stateful["volumeClaimTemplates"][0]["metadata"]["labels"] == constant
    assert workload_of(helm.template())["spec"]["selector"]["matchLabels"] == constant


def test_fetched_models_outlive_the_pod_where_there_is_a_cache(helm: Helm) -> None:
    for arguments, volume in (
        (STATEFUL, "cache"),
        (("--set", "models.fetch.uri=s3://b/m,models.fetch.image=f"), "models"),
    ):
        manifests = helm.template(*arguments)
        (fetching,) = pod_of(manifests)["initContainers"]
        written = next(mount for mount in fetching["volumeMounts"] if mount["mountPath"] == "/models")
        read = next(mount for mount in server_of(manifests)["volumeMounts"] if mount["mountPath"] == "/models")
        assert written["name"] == read["name"] == volume
        assert written.get("subPath") == read.get("subPath")
        assert "readOnly" not in written
        assert read["readOnly"] is True
        declared = {entry["name"] for entry in pod_of(manifests)["volumes"]}
        declared |= {c["metadata"]["name"] for c in workload_of(manifests)["spec"].get("volumeClaimTemplates", [])}
        for container in (fetching, server_of(manifests)):
            assert {mount["name"] for mount in container["volumeMounts"]} <= declared
        assert fetching["command"][:2] == ["python", "/scripts/fetch_models.py"]


def test_fetching_comes_before_the_containers_of_the_user(helm: Helm) -> None:
    manifests = helm.template(
        "--values", CI / "init-container-values.yaml", "--set", "models.fetch.uri=s3://b/m,models.fetch.image=f"
    )
    assert [container["name"] for container in pod_of(manifests)["initContainers"]] == ["fetch-models", "fetch-models"]


def test_changed_settings_start_new_pods_and_others_do_not(helm: Helm) -> None:
    def checksum(values: str) -> str:
        template = workload_of(helm.template("--set", values))["spec"]["template"]
        return str(template["metadata"]["annotations"]["checksum/settings"])

    assert checksum("settings.cpu_instances=2") != checksum("settings.cpu_instances=3")
    assert checksum("settings.cpu_instances=2") == checksum("settings.cpu_instances=2,replicaCount=2")


def test_metrics_are_scraped_once(helm: Helm) -> None:
    manifests = helm.template(*STATEFUL, "--set", "serviceMonitor.enabled=true")
    monitor = find(manifests, "ServiceMonitor")["spec"]
    services = [s for s in all_of(manifests, "Service") if selects(monitor["selector"]["matchLabels"], s)]
    assert [service["metadata"]["name"] for service in services] == ["rel-slipstream"]
    (endpoint,) = monitor["endpoints"]
    assert endpoint["port"] in {port["name"] for port in services[0]["spec"]["ports"]}
    assert endpoint["path"] == "/metrics"
    assert monitor["namespaceSelector"]["matchNames"] == ["serving"]


def test_routes_lead_to_the_service(helm: Helm) -> None:
    manifests = helm.template(*PRODUCTION)
    service = find(manifests, "Service")
    (rule,) = find(manifests, "Ingress")["spec"]["rules"]
    backend = rule["http"]["paths"][0]["backend"]["service"]
    assert backend["name"] == service["metadata"]["name"]
    assert backend["port"]["name"] == service["spec"]["ports"][0]["name"]
    (reference,) = find(manifests, "HTTPRoute")["spec"]["rules"][0]["backendRefs"]
    assert reference == {"name": service["metadata"]["name"], "port": service["spec"]["ports"][0]["port"]}
    # Neither shows /metrics to the world.
    assert rule["http"]["paths"][0]["path"] == "/v2"


def test_network_policy_lets_in_who_is_named_and_the_charts_own_pods(helm: Helm) -> None:
    manifests = helm.template(*PRODUCTION, "--set", "loadTest.enabled=true")
    policy = find(manifests, "NetworkPolicy")["spec"]
    assert selects(policy["podSelector"]["matchLabels"], workload_of(manifests)["spec"]["template"])
    (rule,) = policy["ingress"]
    assert rule["ports"] == [{"port": "http", "protocol": "TCP"}]
    allowed = [
        peer["podSelector"]["matchLabels"] for peer in rule["from"] if peer.get("podSelector", {}).get("matchLabels")
    ]
    for asking in (find(manifests, "Pod"), find(manifests, "Job")["spec"]["template"]):
        assert any(selects(labels, asking) for labels in allowed)
        assert not selects(policy["podSelector"]["matchLabels"], asking)
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert policy["egress"] == []
    assert (
        "from" not in find(helm.template("--set", "networkPolicy.enabled=true"), "NetworkPolicy")["spec"]["ingress"][0]
    )


def test_disruption_budget_covers_the_pods(helm: Helm) -> None:
    manifests = helm.template("--set", "podDisruptionBudget.enabled=true")
    budget = find(manifests, "PodDisruptionBudget")["spec"]
    assert budget["maxUnavailable"] == 1
    assert selects(budget["selector"]["matchLabels"], workload_of(manifests)["spec"]["template"])
    share = find(helm.template(*STATEFUL), "PodDisruptionBudget")["spec"]
    assert share["minAvailable"] == "50%"
    assert "maxUnavailable" not in share
    old = helm.template("--set", "podDisruptionBudget.enabled=true", "--kube-version", "1.26")
    assert "unhealthyPodEvictionPolicy" not in find(old, "PodDisruptionBudget")["spec"]


def test_spread_counts_the_pods_of_this_release(helm: Helm) -> None:
    manifests = helm.template("--values", CHART / "values-cpu.yaml")
    (constraint,) = pod_of(manifests)["topologySpreadConstraints"]
    assert selects(constraint["labelSelector"]["matchLabels"], workload_of(manifests)["spec"]["template"])
    assert constraint["topologyKey"] == "kubernetes.io/hostname"


def test_optimizer_writes_where_the_server_reads(helm: Helm) -> None:
    manifests = helm.template(*JOBS)
    jobs = [job for job in all_of(manifests, "Job") if "-optimize-" in job["metadata"]["name"]]
    claim = find(manifests, "PersistentVolumeClaim")["metadata"]["name"]
    assert len(jobs) == 2
    for job in jobs:
        volumes = {volume["name"]: volume for volume in job["spec"]["template"]["spec"]["volumes"]}
        assert volumes["models"]["persistentVolumeClaim"]["claimName"] == claim
        assert volumes["source"]["persistentVolumeClaim"] == {"claimName": "onnx-files", "readOnly": True}
        assert job["spec"]["template"]["spec"]["containers"][0]["image"] == "slipstream:0.1.0-optimizer"
    assert pod_of(manifests)["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim


def test_a_job_is_made_again_only_when_it_would_do_something_else(helm: Helm) -> None:
    """Kubernetes refuses a changed Job of the same name, which would fail the upgrade."""

    def names(*arguments: str) -> set[str]:
        return {job["metadata"]["name"] for job in all_of(helm.template(*JOBS, *arguments), "Job")}

    assert names() == names("--set", "settings.log_level=DEBUG,replicaCount=3")
    assert len(names() & names("--set-string", "optimizer.models[0].args={--slo-ms,10}")) == 2
    assert len(names() & names("--set", "optimizer.resources.limits.memory=16Gi")) == 1
    assert len(names() & names("--set", "models.mountPath=/srv/models")) == 1
    assert not names() & names("--set", "image.pullPolicy=Always")
    assert not names() & names("--set", "podSecurityContext.runAsUser=20000")


def test_optimizer_measures_on_the_nodes_that_serve(helm: Helm) -> None:
    gpu = ("--set", "optimizer.gpuCount=1,nodeSelector.pool=gpu", "--values", CI / "gpu-values.yaml")
    manifests = helm.template(*JOBS, *gpu, "--set", "models.claim.create=false,image.digest=")
    for job in all_of(manifests, "Job"):
        pod = job["spec"]["template"]["spec"]
        if "-optimize-" in job["metadata"]["name"]:
            assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
            assert pod["nodeSelector"] == pod_of(manifests)["nodeSelector"]
            assert pod["tolerations"] == pod_of(manifests)["tolerations"]
            assert pod["runtimeClassName"] == "nvidia"


def test_production_keeps_a_pod_longer_than_its_work_may_take(helm: Helm) -> None:
    manifests = helm.template(*PRODUCTION)
    settings = read_settings({}, environment_of(manifests))
    (_, pause) = server_of(manifests)["lifecycle"]["preStop"]["exec"]["command"]
    needed = int(pause) + settings.shutdown_grace_s + settings.drain_timeout_s
    assert pod_of(manifests)["terminationGracePeriodSeconds"] > needed
    assert settings.model_control == "off"


def test_ci_holds_the_production_values() -> None:
    """Otherwise they would be rendered by themselves alone, without models and routes."""
    shared = [line for line in (CHART / "values-production.yaml").read_text().splitlines() if line[:1] not in ("#", "")]
    written = Path(CI / "production-values.yaml").read_text().splitlines()
    assert [line for line in shared if line not in written] == []


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ("models.fetch.uri=s3://b/m", "models.fetch.image is empty"),
        ("models.fetch.uri=s3://b/m,models.fetch.image=f,models.existingClaim=c", "set at most one source of models"),
        ("cache.enabled=true", 'set rollout to "replace"'),
        (
            "models.fetch.uri=s3://b/m,models.fetch.image=f,networkPolicy.enabled=true",
            "allow DNS and the storage there",
        ),
        ("keda.enabled=true,keda.minReplicas=11", "keda.minReplicas is 11, above keda.maxReplicas, which is 10"),
        ("autoscaling.enabled=true,autoscaling.maxReplicas=1", "autoscaling.minReplicas is 2, above"),
        ("optimizer.models[0].name=a,optimizer.models[0].file=a.onnx", "optimizer.models needs a claim to write to"),
        (
            "optimizer.models[0].name=a,optimizer.models[0].file=a.onnx,models.existingClaim=c",
            "set optimizer.source.existingClaim",
        ),
    ],
)
def test_values_that_cannot_work_are_refused_with_their_fix(each_helm: Helm, values: str, words: str) -> None:
    assert words in each_helm.refusal("--set", values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ("autoscaling.maxReplicas=0", "maxReplicas"),
        ("keda.prometheusAddress=prometheus", "prometheusAddress"),
        ("keda.queueSecondsPerSecond=0", "queueSecondsPerSecond"),
        ("httpRoute.enabled=true", "parentRefs"),
        ("httpRoute.timeout=soon", "timeout"),
        ("ingress.hosts[0].host=a,ingress.hosts[0].paths[0].path=v2", "path"),
        ("prometheusRule.refusedShare=2", "refusedShare"),
        ("podDisruptionBudget.minAvailable=half", "minAvailable"),
        ("serviceMonitor.interval=15", "interval"),
        ("models.fetch.uri=bucket", "uri"),
        ("models.mountPath=/cache/models", "mountPath"),
        ("env[0].name=SLIPSTREAM_PORT,env[0].value=x", "env"),
        ("optimizer.models[0].name=a,optimizer.models[0].file=../a.onnx", "file"),
        ("topologySpreadConstraints[0].topologyKey=zone", "topologySpreadConstraints"),
        ("loadTest.maxRefusedShare=1.5", "maxRefusedShare"),
    ],
)
def test_schema_refuses(helm: Helm, values: str, words: str) -> None:
    refusal = helm.refusal("--set", values)
    assert "schema" in refusal
    assert words in refusal
