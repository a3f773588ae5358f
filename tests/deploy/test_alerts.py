"""When each alert fires and when it does not, computed by Prometheus' own tool."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.debian import CommandUnavailable, command
from tests.deploy.chart import Helm, find

OURS = 'namespace="serving",service="rel-slipstream",pod="p",model="m",version="1"'
LANE = f'{OURS},variant="v"'
# An hour of one sample a minute: a steady rate, or a steady value.
RATE, VALUE = "0+{}x60", "{}x60"

# Alert -> series that make it fire, and series that do not.
Series = dict[str, str]
SCENARIOS: dict[str, tuple[Series, Series]] = {
    "SlipstreamOverload": (
        {
            f'slipstream_requests_total{{{OURS},code="ok"}}': RATE.format(95),
            f'slipstream_requests_total{{{OURS},code="queue_full"}}': RATE.format(5),
        },
        {
            f'slipstream_requests_total{{{OURS},code="ok"}}': RATE.format(95),
            f'slipstream_requests_total{{{OURS},code="malformed_request"}}': RATE.format(5),
        },
    ),
    "SlipstreamRequestsFail": (
        {
            f'slipstream_requests_total{{{OURS},code="ok"}}': RATE.format(95),
            f'slipstream_requests_total{{{OURS},code="inference_failed"}}': RATE.format(5),
        },
        {
            f'slipstream_requests_total{{{OURS},code="ok"}}': RATE.format(995),
            f'slipstream_requests_total{{{OURS},code="inference_failed"}}': RATE.format(5),
        },
    ),
    "SlipstreamLaneDown": (
        {f'slipstream_lane_up{{{LANE},device="cpu"}}': VALUE.format(0)},
        {f'slipstream_lane_up{{{LANE},device="cpu"}}': VALUE.format(1)},
    ),
    "SlipstreamModelNotReady": (
        {f"slipstream_model_ready{{{OURS}}}": VALUE.format(0)},
        {f"slipstream_model_ready{{{OURS}}}": VALUE.format(1)},
    ),
    "SlipstreamCpuFallback": (
        {
            f'slipstream_lane_up{{{LANE},device="cpu"}}': VALUE.format(1),
            f'slipstream_lane_up{{{LANE},device="cuda:0"}}': VALUE.format(0),
        },
        {
            f'slipstream_lane_up{{{LANE},device="cpu"}}': VALUE.format(1),
            f'slipstream_lane_up{{{LANE},device="cuda:0"}}': VALUE.format(1),
        },
    ),
    "SlipstreamVariantRefused": (
        {f"slipstream_variant_served{{{LANE}}}": VALUE.format(0)},
        {f"slipstream_variant_served{{{LANE}}}": VALUE.format(1)},
    ),
    "SlipstreamRunTimeDrift": (
        {
            f'slipstream_prediction_ratio_sum{{{LANE},device="cpu"}}': RATE.format(200),
            f'slipstream_prediction_ratio_count{{{LANE},device="cpu"}}': RATE.format(100),
        },
        {
            f'slipstream_prediction_ratio_sum{{{LANE},device="cpu"}}': RATE.format(110),
            f'slipstream_prediction_ratio_count{{{LANE},device="cpu"}}': RATE.format(100),
        },
    ),
    "SlipstreamVersionRefused": (
        # A series that appears, as counters with labels do.
        {f'slipstream_model_swaps_total{{{OURS},result="refused"}}': "_x50 1x10"},
        {
            f'slipstream_model_swaps_total{{{OURS},result="swapped"}}': "_x50 1x10",
            f'slipstream_model_swaps_total{{{OURS},result="failed"}}': "_x10 1x50",
        },
    ),
    "SlipstreamOutputDrift": (
        {
            f'slipstream_shadow_requests_total{{{OURS},result="same"}}': RATE.format(80),
            f'slipstream_shadow_requests_total{{{OURS},result="differs"}}': RATE.format(20),
        },
        {
            f'slipstream_shadow_requests_total{{{OURS},result="same"}}': RATE.format(98),
            f'slipstream_shadow_requests_total{{{OURS},result="differs"}}': RATE.format(2),
        },
    ),
    "SlipstreamSlow": (
        {
            f'slipstream_request_seconds_bucket{{{OURS},le="0.4"}}': RATE.format(90),
            f'slipstream_request_seconds_bucket{{{OURS},le="0.8"}}': RATE.format(100),
            f'slipstream_request_seconds_bucket{{{OURS},le="+Inf"}}': RATE.format(100),
        },
        {
            f'slipstream_request_seconds_bucket{{{OURS},le="0.4"}}': RATE.format(100),
            f'slipstream_request_seconds_bucket{{{OURS},le="+Inf"}}': RATE.format(100),
        },
    ),
}


def fired(helm: Helm, folder: Path, name: str, series: Series) -> str:
    """What promtool says when it is told that the alert does not fire: empty when that is so."""
    values = "gpu.count=1,settings.gpu=require,prometheusRule.enabled=true,prometheusRule.p99Seconds=0.5"
    groups: dict[str, Any] = find(helm.template("--set", values), "PrometheusRule")["spec"]
    test = {
        "rule_files": ["rules.yaml"],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": key, "values": value} for key, value in series.items()],
                "alert_rule_test": [{"eval_time": "55m", "alertname": name, "exp_alerts": []}],
            }
        ],
    }
    (folder / "rules.yaml").write_text(yaml.safe_dump(groups))
    (folder / "test.yaml").write_text(yaml.safe_dump(test))
    try:
        promtool = command(["promtool"], "prometheus")
    except CommandUnavailable as exc:
        pytest.skip(str(exc))
    outcome = subprocess.run(
        [promtool, "test", "rules", "test.yaml"], cwd=folder, capture_output=True, text=True, check=False
    )
    return "" if outcome.returncode == 0 else outcome.stdout + outcome.stderr


@pytest.mark.parametrize("name", SCENARIOS)
def test_alert_fires_when_it_should_and_only_then(helm: Helm, tmp_path: Path, name: str) -> None:
    firing, quiet = SCENARIOS[name]
    said = fired(helm, tmp_path, name, firing)
    assert f'alertname="{name}"' in said
    # The text is filled in.
    assert 'model="m"' in said
    assert "<no value>" not in said
    assert "{{" not in said
    assert fired(helm, tmp_path, name, quiet) == ""


def test_alerts_of_another_release_stay_quiet(helm: Helm, tmp_path: Path) -> None:
    series = f'slipstream_lane_up{{{LANE},device="cpu"}}'.replace('service="rel-slipstream"', 'service="other"')
    assert fired(helm, tmp_path, "SlipstreamLaneDown", {series: VALUE.format(0)}) == ""


def test_every_alert_has_a_scenario(helm: Helm) -> None:
    values = "gpu.count=1,settings.gpu=require,prometheusRule.enabled=true,prometheusRule.p99Seconds=0.5"
    rules = find(helm.template("--set", values), "PrometheusRule")["spec"]["groups"][0]["rules"]
    assert SCENARIOS.keys() == {rule["alert"] for rule in rules}
