"""docker/prometheus and docker/grafana: every rule and query is asked of a real Prometheus that reads the real service.

What needs Prometheus is skipped where it is not installed; that every metric exists is checked without it.
"""

import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from loop_world import report_performance, tell_the_story
from prometheus_client.parser import text_string_to_metric_families
from serving_world import NOW, Mlflow, Platform, copied, eventually, metrics_of, predict, running

from serving import closed_loop
from serving.app import utc_now
from serving.closed_loop import LoopState, MonthHeld
from serving.metrics import Metrics
from streamflow.api_keys import make_key
from streamflow.contract import CONTRACT
from streamflow.database import Database
from streamflow.retraining import RetrainingDecision
from streamflow.settings import PROJECT_ROOT
from streamflow.situation import Begun

DOCKER = PROJECT_ROOT / "docker"
CONFIGURATION = DOCKER / "prometheus" / "prometheus.yml"
RULES = DOCKER / "prometheus" / "alerts.yml"
ALERTS = {rule["alert"]: rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]}
DASHBOARDS = {
    file.stem: json.loads(file.read_text()) for file in sorted((DOCKER / "grafana" / "dashboards").glob("*.json"))
}
PANELS = [(name, panel) for name, dashboard in DASHBOARDS.items() for panel in dashboard["panels"]]
QUERIES = [
    pytest.param(target["expr"], id=f"{name}: {panel['title']} {target['refId']}")
    for name, panel in PANELS
    for target in panel["targets"]
]
NEEDS_PROMETHEUS = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="Prometheus is not installed (Debian: apt install prometheus); its rules and queries are only read here",
)
PATIENCE_S = 60


# --- without Prometheus ---------------------------------------------------------------------------------------------


def _told() -> set[str]:
    """The name of every series that the service can have."""
    interval = closed_loop.Interval(0.5, 0.4, 0.6)
    psi = closed_loop.FeatureDrift("failed_payments_90d", 0.1, True, 0.0)
    nothing = closed_loop.Finding(False)
    auc = closed_loop.Auc(interval)
    state = LoopState(
        NOW,
        [MonthHeld("2024-01", NOW, 1, 1, True)],
        [closed_loop.DriftReport("2024-01", 1, closed_loop.Drifts((psi,), psi))],
        [
            closed_loop.PerformanceReport(
                "2024-01",
                1,
                closed_loop.HeldOut(auc),
                auc,
                *(nothing,) * 4,
                drop=closed_loop.Drop(interval, interval, True),
            )
        ],
        [Begun("2024-02", "decay:2024-02:version 1", NOW, 1, False, 2, True, True)],
        RetrainingDecision(False, None, "nothing calls for it", ()),
        {},
        NOW,
        NOW.date(),
        0,
    )
    names = {sample.name for family in closed_loop.metrics_of(state) for sample in family.samples}
    ends = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("_total",)}
    for family in text_string_to_metric_families(Metrics(CONTRACT, lambda: NOW).page().decode()):
        names |= {family.name + end for end in ends.get(family.type, ("",))}
    return names


def _metrics_in(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:streamflow|process)_\w+", re.sub(r'"[^"]*"', '""', expression)))


@pytest.mark.parametrize(
    "expression", [*QUERIES, *(pytest.param(rule["expr"], id=name) for name, rule in ALERTS.items())]
)
def test_every_metric_that_is_asked_for_is_told(expression: str) -> None:
    asked = _metrics_in(expression)
    assert asked or re.search(r"\b(up|ALERTS)\b", expression)
    assert asked <= _told()


def test_months_drift_decay_retraining_and_promotion_are_all_shown() -> None:
    asked = {metric for query in QUERIES for metric in _metrics_in(str(query.values[0]))}
    told = {name for name in _told() if not name.startswith(("process_", "python_"))}
    left_out = told - asked
    assert {name for name in left_out if not name.endswith(("_sum", "_count"))} == {
        "streamflow_model_loaded_age_seconds",
        "streamflow_model_promoted_age_seconds",
        "streamflow_month_written_timestamp_seconds",
        "streamflow_month_promised_auc_low",
        "streamflow_month_promised_auc_high",
        "streamflow_retraining_unfinished",
    }


@pytest.mark.parametrize("name", DASHBOARDS)
def test_panels_are_told_apart_and_fill_the_page(name: str) -> None:
    panels = DASHBOARDS[name]["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in panels}) == len(panels)
    cells = [_cells(panel["gridPos"]) for panel in panels]
    assert not any(one & other for one, other in combinations(cells, 2))
    rows = max(y for _, y in set().union(*cells)) + 1
    assert len(set().union(*cells)) == 24 * rows, "there is a hole, or something beyond the page's 24 columns"


def _cells(position: Mapping[str, int]) -> set[tuple[int, int]]:
    x, y, w, h = (position[key] for key in "xywh")
    return {(column, row) for column in range(x, x + w) for row in range(y, y + h)}


def test_dashboards_have_names_of_their_own_and_find_each_other() -> None:
    assert {name: dashboard["uid"] for name, dashboard in DASHBOARDS.items()} == {
        "model": "streamflow-model",
        "service": "streamflow-service",
    }
    links = {name: dashboard["links"][0]["url"] for name, dashboard in DASHBOARDS.items()}
    assert links == {"model": "/d/streamflow-service", "service": "/d/streamflow-model"}


@pytest.mark.parametrize("panel", [pytest.param(panel, id=f"{name}: {panel['title']}") for name, panel in PANELS])
def test_panel_says_what_it_shows_and_in_which_unit(panel: dict[str, Any]) -> None:
    assert panel["description"].endswith(".")
    assert panel["datasource"] == {"type": "prometheus", "uid": "prometheus"}
    defaults = panel["fieldConfig"]["defaults"]
    if panel["type"] == "timeseries":
        assert "unit" in defaults
    if "thresholds" in defaults:
        steps = [step["value"] for step in defaults["thresholds"]["steps"]]
        assert steps[0] is None
        assert steps[1:] == sorted(steps[1:])
    references = [target["refId"] for target in panel["targets"]]
    assert len(set(references)) == len(references)
    renamed: dict[str, str] = {}
    for step in panel.get("transformations", ()):
        renamed |= step["options"].get("renameByName", {})
    several = {name.removeprefix("Value #") for name in renamed if name.startswith("Value #")}
    assert several in (set(), set(references))
    named = {override["matcher"]["options"] for override in panel["fieldConfig"]["overrides"]}
    axis = panel.get("options", {}).get("xField")
    assert named | ({axis} if axis else set()) <= set(renamed.values())


@pytest.mark.parametrize("name", ALERTS)
def test_alert_says_what_is_wrong_and_what_to_do(name: str) -> None:
    rule = ALERTS[name]
    assert name.startswith("Streamflow")
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert set(rule["annotations"]) == {"summary", "description"}
    assert len(rule["annotations"]["summary"]) <= 80
    assert rule["annotations"]["description"].endswith(".")


def test_operations_tell_what_to_do_about_every_alert() -> None:
    section = (PROJECT_ROOT / "docs" / "operations.md").read_text().split("\n### Alerts\n")[1].split("\n## ")[0]
    told = dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", section, re.MULTILINE))
    assert told == {name: rule["labels"]["severity"] for name, rule in ALERTS.items()}


# --- each alert by itself -------------------------------------------------------------------------------------------

DAY = 86_400
ANSWERED = 'streamflow_requests_total{route="/predict",status="200"}'
FAILED = 'streamflow_requests_total{route="/predict",status="503"}'
QUICK = 'streamflow_request_seconds_bucket{route="/predict",le="0.1"}'
ALL = 'streamflow_request_seconds_bucket{route="/predict",le="+Inf"}'
YOUNG = 'streamflow_feature_age_days_bucket{le="45.0"}'
AGES = "streamflow_feature_age_days_count"
SHED = "streamflow_requests_shed_total"
END = 'streamflow_month_end_timestamp_seconds{month="2024-02"}'
LABELLED = 'streamflow_month_labelled{month="2024-02"}'
SCORED = 'streamflow_month_scored_customers{month="2024-02"}'
PSI = 'streamflow_drift_psi{month="2024-02",version="1",feature="skips_7d"}'
SIGNIFICANT = 'streamflow_drift_significant{month="2024-02",version="1",feature="skips_7d"}'
MISSING = 'streamflow_drift_missing_ratio{month="2024-02",version="1",feature="skips_7d"}'
HELD_BACK = 'streamflow_retraining_held_back{cause="decay",obstacle="no_newer_labels"}'
SERVED, EARLIER = 'streamflow_model_info{version="1"}', 'streamflow_model_info{version="2"}'


def _readiness(part: str, state: str) -> str:
    return f'streamflow_readiness{{part="{part}",state="{state}"}}'


def _decay(finding: str) -> str:
    return f'streamflow_month_decay{{month="2024-02",version="1",finding="{finding}"}}'


WELL = {
    'up{job="streamflow",instance="api:8000"}': 1,
    **{
        _readiness(part, state): state == "ready"
        for part in ("model", "feature_store", "registry")
        for state in ("ready", "degraded", "unavailable")
    },
    ANSWERED: "0+6000x{n}",
    FAILED: "0+30x{n}",
    'streamflow_requests_total{route="/ready",status="503"}': "0+6000x{n}",
    QUICK: "0+5990x{n}",
    'streamflow_request_seconds_bucket{route="/predict",le="0.2"}': "0+6000x{n}",
    ALL: "0+6000x{n}",
    YOUNG: "0+5900x{n}",
    AGES: "0+6000x{n}",
    SHED: 7,
    "streamflow_prediction_log_spilled_rows": 0,
    "streamflow_prediction_log_backlog": 10_000,
    "streamflow_closed_loop_read_timestamp_seconds": "0+{step}x{n}",
    SERVED: 1,
    EARLIER: 0,
    'streamflow_month_auc{month="2024-02",version="1"}': 0.49,
    **{_decay(finding): 0 for finding in closed_loop.FINDINGS},
    'streamflow_month_auc{month="2024-01",version="2"}': 0.4,
    **{
        f'streamflow_month_decay{{month="2024-01",version="2",finding="{finding}"}}': 1
        for finding in closed_loop.FINDINGS
    },
    PSI: 0.24,
    SIGNIFICANT: 1,
    'streamflow_drift_psi{month="2024-02",version="1",feature="monthly_fee"}': 0.9,
    'streamflow_drift_significant{month="2024-02",version="1",feature="monthly_fee"}': 0,
    MISSING: 0.5,
    END: -37 * DAY,
    LABELLED: 0,
    'streamflow_month_end_timestamp_seconds{month="2023-01"}': -400 * DAY,
    'streamflow_month_labelled{month="2023-01"}': 0,
    SCORED: 7_032,
    "streamflow_production_promoted_timestamp_seconds": 5 * DAY,
    "streamflow_production_data_end_timestamp_seconds": -364 * DAY,
    "streamflow_retraining_unfinished": 0,
    "streamflow_retrainings_in_vain": 0,
    HELD_BACK: 0,
    'streamflow_retraining_held_back{cause="slide",obstacle="cooldown"}': 0,
    "streamflow_candidates_waiting": 0,
}
"""Each series while all is well, close to its bounds, with a version that was bad and is served no more."""

CASES: Mapping[str, Sequence[Mapping[str, object]]] = {
    "StreamflowDown": [{'up{job="streamflow",instance="api:8000"}': 0}],
    "StreamflowNotReady": [{_readiness("feature_store", "unavailable"): 1}, {_readiness("model", "unavailable"): 1}],
    "StreamflowDegraded": [{_readiness("registry", "degraded"): 1}],
    "StreamflowVersionRefused": [{_readiness("model", "degraded"): 1}],
    "StreamflowErrors": [{FAILED: "0+70x{n}"}],
    "StreamflowSlow": [{QUICK: "0+5900x{n}"}],
    "StreamflowOverloaded": [{SHED: "0+1x{n}"}],
    "StreamflowPredictionLogBehind": [
        {"streamflow_prediction_log_spilled_rows": 1},
        {"streamflow_prediction_log_backlog": 10_001},
    ],
    "StreamflowStaleFeatures": [{YOUNG: "0+5600x{n}"}],
    "StreamflowClosedLoopUnread": [{"streamflow_closed_loop_read_timestamp_seconds": -301}],
    "StreamflowWorseThanPromised": [{_decay("worse_than_promised"): 1}],
    "StreamflowNoBetterThanChance": [{_decay("no_better_than_chance"): 1}],
    "StreamflowWorseCalibrated": [{_decay("worse_calibrated"): 1}],
    "StreamflowSliding": [{_decay("sliding"): 1}],
    "StreamflowLargeDrift": [{PSI: 0.25}],
    "StreamflowFeatureMissing": [{MISSING: 0.51}],
    "StreamflowMonthLate": [{END: -41 * DAY}],
    "StreamflowLabelsLate": [{END: -61 * DAY}, {END: -178 * DAY}],
    "StreamflowMonthNotScored": [{SCORED: 0}],
    "StreamflowRetrainingUnfinished": [{"streamflow_retraining_unfinished": 1}],
    "StreamflowRetrainingInVain": [{"streamflow_retrainings_in_vain": 1}],
    "StreamflowRetrainingHeldBack": [{HELD_BACK: 1}],
    "StreamflowCandidateWaits": [{"streamflow_candidates_waiting": 1}],
    "StreamflowProductionOld": [{"streamflow_production_data_end_timestamp_seconds": -367 * DAY}],
}
ALSO = {"StreamflowLabelsLate": {"StreamflowMonthLate"}}
"""What else is to fire then."""
UNITS_S = {"m": 60, "h": 3_600, "d": DAY}


def test_every_alert_is_tried() -> None:
    assert set(CASES) == set(ALERTS)


def _trial(series: Mapping[str, object], wait_s: int, firing: set[str], not_yet: set[str]) -> dict[str, Any]:
    """A test of promtool: which alerts fire once they have waited so long, and which do not just before."""
    step = 60 if wait_s <= 3 * 3_600 else 240
    warm = 900
    end = warm + wait_s
    numbers = {"step": step, "n": end // step + 10}

    def values(given: object) -> str:
        return given.format(**numbers) if isinstance(given, str) else f"{float(given)}+0x{numbers['n']}"  # type: ignore[arg-type]

    def expected(moment_s: int, alerts: set[str]) -> dict[str, Any]:
        return {
            "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
            "eval_time": f"{moment_s}s",
            "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in sorted(alerts)],
        }

    return {
        "interval": f"{step}s",
        "input_series": [{"series": name, "values": values(given)} for name, given in series.items()],
        "promql_expr_test": [
            *([expected(wait_s - step, firing - not_yet)] if wait_s else []),
            expected(end, firing),
        ],
    }


@NEEDS_PROMETHEUS
def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    trials = [_trial(WELL, 3 * 3_600, set(), set()), _trial(WELL, DAY + 7_200, set(), set())]
    for name, cases in CASES.items():
        wait = re.fullmatch(r"(\d+)([mhd])", ALERTS[name].get("for", "0m"))
        assert wait
        wait_s = int(wait[1]) * UNITS_S[wait[2]]
        for case in cases:
            assert set(case) <= set(WELL)
            trials.append(_trial({**WELL, **case}, wait_s, {name, *ALSO.get(name, set())}, {name}))
    file = tmp_path / "trials.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "tests": trials}))
    done = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# --- a real Prometheus and the real service -------------------------------------------------------------------------


@dataclass(frozen=True)
class Scraped:
    """A Prometheus that reads the service."""

    platform: Platform
    api: httpx.Client
    prometheus: httpx.Client

    def ask(self, path: str, **parameters: str) -> Any:
        answer = self.prometheus.get(f"/api/v1/{path}", params=parameters)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask("query", query=expression.replace("$__rate_interval", "10m"))["result"]
        return found

    def wait_for_scrapes(self) -> None:
        """Wait until what has happened so far has been read."""
        (before,) = self.query('sum(count_over_time(up{job="streamflow"}[1h])) or vector(0)')
        expected = float(before["value"][1]) + 2
        reads = f'sum(count_over_time(up{{job="streamflow"}}[1h])) >= {expected}'
        eventually(lambda: bool(self.query(reads)), within_s=PATIENCE_S)

    def alert(self, name: str) -> dict[str, Any] | None:
        """An alert that fires or is about to."""
        alerts = self.ask("alerts")["alerts"]
        return next((alert for alert in alerts if alert["labels"]["alertname"] == name), None)


@pytest.fixture(scope="module")
def scraped(
    migrated: Database, server: Database, artifacts: tuple[bytes, bytes], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scraped]:
    folder = tmp_path_factory.mktemp("monitoring")
    mlflow = Mlflow()
    platform = Platform(copied(migrated, server), mlflow)
    platform.publish()
    platform.publish("OUTSI-DEEEE", monthly_fee=9_999.0)
    platform.publish("INCOM-PLETE", skips_7d=None)
    tell_the_story(platform, artifacts)
    key = make_key(folder / "api_keys", "prometheus")
    settings = platform.settings(folder).model_copy(update={"api_keys_file": folder / "api_keys"})
    with running(settings, utc_now) as api:
        api.headers["Authorization"] = f"Bearer {key}"
        eventually(lambda: api.get("/ready").status_code == 200)
        eventually(lambda: ("streamflow_candidates_waiting", frozenset[tuple[str, str]]()) in metrics_of(api))
        with RunningPrometheus(folder, api.base_url.port or 0, key) as prometheus:
            world = Scraped(platform, api, prometheus)
            eventually(lambda: bool(world.query('up{job="streamflow"} == 1')), within_s=PATIENCE_S)
            for _ in range(2):
                _use(api)
                world.wait_for_scrapes()
            yield world
    mlflow.stop()


class RunningPrometheus:
    """Prometheus with the committed configuration but for addresses, secrets and its pace."""

    def __init__(self, folder: Path, api_port: int, key: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        (folder / "key").write_text(key + "\n")
        text = CONFIGURATION.read_text()
        for committed, here in (
            (": 15s", ": 1s"),
            ("/run/secrets/prometheus_api_key", str(folder / "key")),
            ("api:8000", f"127.0.0.1:{api_port}"),
            ("[alerts.yml]", f"[{RULES}]"),
        ):
            assert committed in text
            text = text.replace(committed, here)
        self.configuration = folder / "prometheus.yml"
        self.configuration.write_text(text)
        options = [f"--config.file={self.configuration}", f"--storage.tsdb.path={folder / 'tsdb'}"]
        self._command = ["prometheus", *options, f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
        self._log = folder / "prometheus.log"
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)

    def __enter__(self) -> httpx.Client:
        checked = subprocess.run(["promtool", "check", "config", self.configuration], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout + checked.stderr
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=subprocess.STDOUT)
        try:
            eventually(self._ready, within_s=PATIENCE_S)
        except BaseException:
            self._process.kill()
            raise
        return self._client

    def _ready(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        try:
            return self._client.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self._process.terminate()
        try:
            self._process.wait(30)
        finally:
            self._process.kill()


def _use(api: httpx.Client) -> None:
    """Everything that a caller can do to the metrics."""
    for _ in range(5):
        assert predict(api).status_code == 200
    assert "monthly_fee" in predict(api, "OUTSI-DEEEE").json()["features_outside_training"]
    assert predict(api, "INCOM-PLETE").status_code == 422
    assert predict(api, "nobody").status_code == 404
    assert api.get("/nowhere").status_code == 404


@NEEDS_PROMETHEUS
@pytest.mark.parametrize("expression", QUERIES)
def test_panel_has_data(scraped: Scraped, expression: str) -> None:
    found = scraped.query(expression)
    assert found, "no data"
    assert [sample for sample in found if sample["value"][1] == "NaN"] == []


@NEEDS_PROMETHEUS
@pytest.mark.parametrize("panel", [pytest.param(panel, id=f"{name}: {panel['title']}") for name, panel in PANELS])
def test_labels_that_a_panel_shows_are_there(scraped: Scraped, panel: dict[str, Any]) -> None:
    columns = {label for step in panel.get("transformations", ()) for label in step["options"].get("renameByName", {})}
    labels = {label for label in columns if not label.startswith("Value")}
    if panel["title"] == "Alerts":
        labels = {"alertname", "severity"}
    shown: set[str] = set()
    for target in panel["targets"]:
        found = [set(sample["metric"]) for sample in scraped.query(target["expr"])]
        asked = set(re.findall(r"\{\{(\w+)\}\}", target.get("legendFormat", "")))
        assert all(asked <= of_sample for of_sample in found)
        shown |= set.intersection(*found)
    assert labels <= shown


@NEEDS_PROMETHEUS
@pytest.mark.parametrize("name", ALERTS)
def test_rule_is_evaluated_and_what_it_asks_for_is_there(scraped: Scraped, name: str) -> None:
    groups = scraped.ask("rules")["groups"]
    (rule,) = [rule for group in groups for rule in group["rules"] if rule["name"] == name]
    assert (rule["health"], rule.get("lastError", "")) == ("ok", "")
    scraped.query(ALERTS[name]["expr"])
    for selector in re.findall(r"\b((?:streamflow_\w+|up)(?:\{[^}]*\})?)(?:\[|\s|\)|$)", ALERTS[name]["expr"]):
        anything = re.sub(r'status=~"5\.\."', 'status=~".+"', selector)
        assert scraped.query(anything), f"no series is {anything}"


@NEEDS_PROMETHEUS
def test_alerts_are_about_the_version_that_is_served(scraped: Scraped) -> None:
    """The months are of 2024, long past; what January's version did in February is over."""
    eventually(lambda: scraped.alert("StreamflowMonthLate") is not None, within_s=PATIENCE_S)
    late = scraped.alert("StreamflowMonthLate")
    assert late is not None
    assert late["state"] == "firing"
    days = (utc_now() - datetime(2024, 4, 1, tzinfo=UTC)).days
    assert re.fullmatch(rf"No new month for {days}d \d+h \d+m \d+s", late["annotations"]["summary"])
    for name in ("StreamflowWorseThanPromised", "StreamflowNoBetterThanChance", "StreamflowNotReady", "StreamflowDown"):
        assert scraped.alert(name) is None
    drift = scraped.alert("StreamflowLargeDrift")
    assert drift is not None
    assert drift["annotations"]["summary"] == "watch_hours_30d has changed a lot in 2024-03"

    found = ("worse_than_promised", "no_better_than_chance")
    report_performance(scraped.platform, "2024-03", 2, auc=0.4912, promised=0.66, found=found)
    eventually(lambda: scraped.alert("StreamflowNoBetterThanChance") is not None, within_s=PATIENCE_S)
    chance = scraped.alert("StreamflowNoBetterThanChance")
    assert chance is not None
    assert (chance["state"], chance["labels"]["severity"]) == ("pending", "critical")
    assert chance["annotations"] == {
        "summary": "Version 2 ranks no better than chance",
        "description": (
            "In 2024-03 the AUC of version 2 was 0.491, where 0.5 is chance, and it is still served: whom to contact "
            "is a lottery. Promote a candidate (`streamflow models`), or train on the newest month: "
            "`streamflow run 2024-03`."
        ),
    }
    assert scraped.alert("StreamflowWorseThanPromised") is not None

    assert scraped.alert("StreamflowRetrainingHeldBack") is None
    report_performance(scraped.platform, "2024-02", 2, auc=0.4912, promised=0.66, found=found)
    eventually(lambda: scraped.alert("StreamflowRetrainingHeldBack") is not None, within_s=PATIENCE_S)
    held_back = scraped.alert("StreamflowRetrainingHeldBack")
    assert held_back is not None
    assert held_back["annotations"] == {
        "summary": "Production should be replaced, and nothing is trained",
        "description": (
            "What calls for another model: decay. What forbids to train one: no newer labels. `streamflow status`, or "
            "the page at /, says for which month and what to do: land labels, train by hand, or change [retraining] of "
            "the policy."
        ),
    }
