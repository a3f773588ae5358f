"""Dashboard, alerts and autoscaling ask for metrics, labels and codes that a running server really has."""

import itertools
import json
import re
import threading
from collections.abc import Iterator

import httpx
import promql_parser
import pytest
from prometheus_client.parser import text_string_to_metric_families

from server import errors, gpus
from tests import models
from tests.artifacts import write_artifact
from tests.deploy.chart import CHART, Helm, find
from tests.end_to_end.conftest import latency
from tests.end_to_end.process import Server

GPU = ("--set", "gpu.count=1,settings.gpu=require,prometheusRule.enabled=true,prometheusRule.p99Seconds=0.5")
KEDA = ("--set", "keda.enabled=true,keda.busyLanes=2")
# Added by the ServiceMonitor's scrape, not by the server.
SCRAPED = {"namespace", "service", "pod"}

Labels = dict[str, dict[str, set[str]]]

# What a server with a GPU exports besides; tests/server has it with libraries that stand for the driver's.
_WITH_A_GPU: Labels = {
    **{name: {"device": {"cuda:0"}} for name in gpus.KINDS},
    "slipstream_engine_builds_total": {"model": {"mlp"}, "result": {"served"}},
    "slipstream_out_of_memory_total": {"model": {"mlp"}, "device": {"cuda:0"}},
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Labels:
    """Sample name -> label -> values, of a server that has answered, cached, swapped and compared."""
    root, files = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("files")
    mlp, newer = models.save_mlp(files / "1.onnx"), models.save_mlp(files / "2.onnx", seed=1)
    tables = {"fp32": latency(0.1)}
    write_artifact(root, "mlp", "1", {"fp32": mlp}, latency=tables)
    options = ("--cache-bytes", "1000000", "--shadow-share", "1", "--shadow-s", "0.2", "--watch-interval-s", "0.1")
    with Server(root, *options) as server, httpx.Client(base_url=server.url) as client:
        signature = client.get("/v2/models/mlp").json()["inputs"][0]
        size = signature["shape"][1]
        tensor = {"name": signature["name"], "shape": [1, size], "datatype": "FP32", "data": [0.5] * size}
        body = {"inputs": [tensor]}
        for _ in range(3):
            assert client.post("/v2/models/mlp/infer", json=body).status_code == 200
        assert client.post("/v2/models/mlp/infer", json={"inputs": []}).status_code == 400
        stop = threading.Event()
        asking = threading.Thread(target=_ask, args=(server.url, body, stop))
        asking.start()
        try:
            write_artifact(root, "mlp", "2", {"fp32": newer}, latency=tables)
            server.wait_for_metric(1, "slipstream_model_swaps_total", model="mlp", result="swapped")
        finally:
            stop.set()
            asking.join()
        return _labels(client.get("/metrics").text) | _WITH_A_GPU


def _ask(url: str, body: dict[str, list[dict[str, object]]], stop: threading.Event) -> None:
    """Each time with other inputs, or the cache would answer and there were nothing to compare."""
    (tensor,) = body["inputs"]
    with httpx.Client(base_url=url) as client:
        for number in itertools.count():
            if stop.is_set():
                return
            data = [number * 0.01] * len(tensor["data"])
            client.post("/v2/models/mlp/infer", json={"inputs": [tensor | {"data": data}]})


def _labels(text: str) -> Labels:
    found: Labels = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    return found


def queries(helm: Helm) -> Iterator[tuple[str, str]]:
    """Where from, and PromQL."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["definition"]
    for rule in find(helm.template(*GPU), "PrometheusRule")["spec"]["groups"][0]["rules"]:
        yield rule["alert"], rule["expr"]
    for trigger in find(helm.template(*KEDA), "ScaledObject")["spec"]["triggers"]:
        yield "keda", trigger["metadata"]["query"]


def dashboard() -> dict[str, list[dict[str, object]]]:
    return json.loads((CHART / "files" / "dashboard.json").read_text())


def test_every_query_is_promql(helm: Helm) -> None:
    for place, query in queries(helm):
        if not query.startswith("label_values("):
            try:
                promql_parser.parse(query.replace("$__rate_interval", "5m"))
            except ValueError as exc:
                pytest.fail(f"{place}: {exc}: {query}")


def test_every_metric_and_label_is_exported(helm: Helm, exported: Labels) -> None:
    checked = 0
    for place, query in queries(helm):
        selected = re.findall(r"(slipstream_\w+)(?:\{([^}]*)\})?", query)
        assert selected, f"{place} asks for no metric of the server: {query}"
        own = set()
        for metric, matchers in selected:
            assert metric in exported, f"{place}: {metric} is not exported"
            own |= exported[metric].keys()
            for label in re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", matchers):
                assert label in exported[metric].keys() | SCRAPED, f"{place}: {metric} has no label {label}"
            checked += 1
        for group in re.findall(r"by \(([^)]*)\)", query):
            grouped = {label.strip() for label in group.split(",")}
            assert grouped <= own | SCRAPED, f"{place}: {grouped - own} cannot be grouped by"
    assert checked > 40


def test_legends_and_annotations_name_labels_that_the_query_keeps(helm: Helm) -> None:
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            kept = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", target["expr"]))))
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= kept, panel["title"]
    for rule in find(helm.template(*GPU), "PrometheusRule")["spec"]["groups"][0]["rules"]:
        groups = re.findall(r"by \(([^)]*)\)", rule["expr"])
        named = set(re.findall(r"\$labels\.(\w+)", json.dumps(rule["annotations"])))
        if groups:
            assert all(named <= set(re.findall(r"\w+", group)) for group in groups), rule["alert"]


def test_codes_and_results_are_those_that_the_server_writes(helm: Helm, exported: Labels) -> None:
    codes = {kind.code for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "code")} | {"ok"}
    # server.metrics names them in its help texts.
    results = {"swapped", "failed", "refused", "rolled_back", "same", "differs", "hit", "shared", "miss"}
    states = {"ready", "loading", "shadowed", "draining", "failed", "rolled_back", "unloaded"}
    allowed = {"code": codes, "result": results, "state": states, "device": {"cpu"}}
    seen: set[str] = set()
    for place, query in queries(helm):
        for label, values in re.findall(r'(code|result|state|device)(?:=~|!=|=)"([^"]*)"', query):
            assert set(values.split("|")) <= allowed[label], f"{place}: {label} {values}"
            seen.add(label)
    assert seen == allowed.keys()
    assert exported["slipstream_lane_up"]["device"] == {"cpu"}
    assert {"ok", "signature_mismatch"} <= exported["slipstream_requests_total"]["code"] <= codes
    assert exported["slipstream_model_swaps_total"]["result"] <= results
    assert exported["slipstream_shadow_requests_total"]["result"] <= results


def test_every_metric_of_the_server_is_on_the_dashboard(exported: Labels) -> None:
    shown = json.dumps(dashboard())
    names = {re.sub(r"_(total|created|bucket|sum|count)$", "", name) for name in exported}
    assert {name for name in names if name not in shown} == set()


def test_panels_do_not_overlap_and_have_their_own_numbers() -> None:
    cells: set[tuple[int, int]] = set()
    panels = dashboard()["panels"]
    for panel in panels:
        place = panel["gridPos"]
        columns = range(place["x"], place["x"] + place["w"])
        taken = {(column, line) for column in columns for line in range(place["y"], place["y"] + place["h"])}
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        cells |= taken
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_alerts_watch_this_release_alone(helm: Helm) -> None:
    for rule in find(helm.template(*GPU), "PrometheusRule")["spec"]["groups"][0]["rules"]:
        selectors = re.findall(r"slipstream_\w+(\{[^}]*\})?", rule["expr"])
        assert all('namespace="serving",service="rel-slipstream"' in selector for selector in selectors), rule["alert"]
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"].keys() == {"summary", "description"}


def test_cpu_fallback_is_watched_where_pods_own_gpus_only(helm: Helm) -> None:
    without = find(helm.template("--set", "prometheusRule.enabled=true"), "PrometheusRule")
    alerts = {rule["alert"] for rule in without["spec"]["groups"][0]["rules"]}
    assert "SlipstreamLaneDown" in alerts
    assert not alerts & {"SlipstreamCpuFallback", "SlipstreamSlow"}


def test_alerts_of_the_readme_are_those_of_the_rule(helm: Helm) -> None:
    rules = find(helm.template(*GPU), "PrometheusRule")["spec"]["groups"][0]["rules"]
    documented = re.findall(r"^\| (Slipstream\w+) \|", (CHART / "README.md").read_text(), re.MULTILINE)
    assert documented == [rule["alert"] for rule in rules]


def test_dashboard_arrives_whole(helm: Helm) -> None:
    rendered = find(helm.template("--set", "dashboard.enabled=true"), "ConfigMap", "-dashboard")
    assert json.loads(rendered["data"]["slipstream.json"]) == dashboard()
    assert rendered["metadata"]["labels"]["grafana_dashboard"] == "1"
