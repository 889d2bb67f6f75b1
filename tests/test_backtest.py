import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from streamflow import backtest as module
from streamflow import cli, training
from streamflow.backtest import (
    BEST_POSSIBLE,
    OURS,
    SETTINGS,
    Setting,
    World,
    backtest,
    by_month,
    markdown,
    policies,
    summarize,
)
from streamflow.backtest import replay as replayed
from streamflow.bootstrap import Interval
from streamflow.contract import CONTRACT
from streamflow.dataset import split
from streamflow.errors import ConfigurationError, TrainingRefused
from streamflow.evaluation import Comparison, SegmentComparison
from streamflow.months import Month
from streamflow.policy import Policy
from streamflow.retraining import Drift, Finding, Performance, Production, Situation
from streamflow.settings import PROJECT_ROOT, Settings
from streamflow.simulate import TRUTH, Scenario, frames
from streamflow.training_config import TrainingConfig
from streamflow.windows import Window

MONTHS = Month.parse_range("2024-01..2024-05")
JANUARY, FEBRUARY, MARCH, APRIL, MAY = MONTHS
CONFIG = TrainingConfig.load(PROJECT_ROOT / "training.toml")
PRODUCT = Policy.load(Settings(policy_file=PROJECT_ROOT / "policy.toml"))
POLICIES = policies(PRODUCT.retraining)
SHIFT = Setting("all changes in March", Scenario(season=0, concept_drift_from=MARCH))
STABLE = SETTINGS["stable"]
USERS = 600


def world(setting: Setting = STABLE, months: list[Month] = MONTHS, users: int = USERS, seed: int = 1) -> World:
    return World(setting, months, users=users, seed=seed, config=CONFIG)


def replay(policy: str, of: World) -> pd.DataFrame:
    return pd.DataFrame(replayed(of, POLICIES[policy], PRODUCT)).set_index("month")


def performance(*, worse: bool = False, chance: bool = False, version: int = 0) -> Performance:
    def finding(*, found: bool = False) -> Finding:
        return Finding(found, "it says so")

    return Performance("2024-02", version, finding(found=worse), finding(found=chance), finding(), finding())


def drifted(*significant: str, score: str = "none", large: tuple[str, ...] = ()) -> Drift:
    return Drift(FEBRUARY, 0, (*significant, *large), large, large, score)  # type: ignore[arg-type]


def known(
    performance: Performance | None = None, drift: Drift | None = None, learned: tuple[Month, ...] = (JANUARY,)
) -> Situation:
    return Situation(FEBRUARY, Production(0, learned), performance, drift, (), ())


@pytest.mark.parametrize(
    ("policy", "situation", "cause"),
    [
        ("never", known(performance(worse=True), drifted("monthly_fee", score="large")), None),
        ("every month", known(), "month"),
        ("every month", known(learned=(JANUARY, FEBRUARY)), None),
        ("on drift", known(drift=drifted()), None),
        ("on drift", known(drift=drifted("monthly_fee")), "drift"),
        ("on drift", known(drift=drifted(score="small")), "drift"),
        ("on drift", known(performance(worse=True)), None),
        ("on drift", known(drift=drifted("monthly_fee"), learned=(FEBRUARY,)), None),
        ("on decay", known(performance()), None),
        ("on decay", known(performance(worse=True)), "decay"),
        ("on decay", known(performance(chance=True)), "decay"),
        ("on decay", known(drift=drifted("monthly_fee")), None),
        ("on decay", known(performance(worse=True), learned=(FEBRUARY,)), None),
        (OURS, known(performance(), drifted("monthly_fee")), None),
        (OURS, known(performance(worse=True)), "decay:2024-02:version 0"),
        (OURS, known(drift=drifted(large=("monthly_fee",))), "drift:2024-02:version 0"),
        (OURS, known(performance(worse=True, version=3)), None),
    ],
)
def test_when_each_policy_trains_again(policy: str, situation: Situation, cause: str | None) -> None:
    assert POLICIES[policy].cause(situation) == cause


def test_fixed_policies_learn_from_all_labelled_months_and_deploy_at_once() -> None:
    every = replay("every month", world())
    assert list(every.index) == ["2024-02", "2024-03", "2024-04", "2024-05"]
    assert every["learned_from"].tolist() == [f"2024-01..2024-0{last}" for last in (1, 2, 3, 4)]
    assert every["retrained"].all()
    assert every["promoted"].all()
    never = replay("never", world())
    assert set(never["learned_from"]) == {"2024-01..2024-01"}
    assert not never["retrained"].any()


def test_a_month_is_judged_on_users_that_no_model_has_seen() -> None:
    of_world = dict(frames(MONTHS, users=USERS, seed=1, scenario=STABLE.scenario))
    april = of_world[APRIL]
    unseen = april[split(april["user_id"].tolist())]
    learned = pd.concat([of_world[month].assign(month=str(month)) for month in MONTHS[:3]])
    learned = learned[~split(learned["user_id"].tolist())]
    spec = training.ModelSpec("logistic_regression", CONTRACT.service("churn_v1"), calibrated=False, threshold=0.5)
    scores = training.fit(learned, "churn_label", spec, CONFIG).probabilities(unseen)
    fees, labels = unseen["monthly_fee"], unseen["churn_label"]
    contacted = scores * 0.2 * 6 * fees > 20
    worth = (labels * 0.2 * 6 * fees - 20)[contacted].sum()

    judged = replay("every month", world()).loc["2024-04"]
    assert judged["auc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-9)
    assert judged["logloss"] == pytest.approx(log_loss(labels, scores), abs=1e-6)
    assert judged["value"] == pytest.approx(worth * 1000 / len(unseen), abs=1e-6)
    best = world().best_possible(APRIL)
    assert best["auc"] == roc_auc_score(labels, unseen[TRUTH])


def test_late_labels_are_learned_from_and_judge_only_when_they_are_there() -> None:
    late = Setting("late", SHIFT.scenario, label_delay=2)
    every = replay("every month", world(late))
    assert every["learned_from"].to_dict() == {"2024-04": "2024-01..2024-01", "2024-05": "2024-01..2024-02"}
    assert replay("on decay", world(late, users=2_000))["cause"].isna().all()
    prompt = replay("on decay", world(SHIFT, users=2_000))
    assert prompt["cause"].dropna().to_dict() == {"2024-03": "decay"}


def test_ours_notices_a_shift_learns_from_the_new_month_alone_and_recovers() -> None:
    of = world(SHIFT, users=2_000)
    ours = replay(OURS, of)
    assert ours.loc["2024-03", "cause"] == "decay:2024-03:version 0"
    assert ours["promoted"].to_dict()["2024-03"]
    assert ours["learned_from"].tolist()[:3] == ["2024-01..2024-01", "2024-01..2024-01", "2024-03..2024-03"]
    after = ["2024-04", "2024-05"]
    assert replay("never", of).loc[after, "auc"].max() < 0.55
    assert ours.loc[after, "auc"].mean() > replay("every month", of).loc[after, "auc"].mean() + 0.03


def segment(low: float, high: float) -> SegmentComparison:
    return SegmentComparison("net_service=DSL", 200, Interval((low + high) / 2, low, high))


@pytest.mark.parametrize(
    ("auc", "segments", "promoted", "helped"),
    [
        (Interval(0.05, 0.01, 0.09), (segment(-0.01, 0.1),), True, True),
        (Interval(0.02, -0.01, 0.05), (segment(-0.01, 0.1),), False, True),
        (Interval(-0.02, -0.05, 0.01), (segment(-0.01, 0.1),), False, False),
        (Interval(0.05, 0.01, 0.09), (segment(-0.3, -0.2),), False, True),
    ],
)
def test_ours_replaces_production_only_by_what_the_gates_call_better(
    auc: Interval,
    segments: tuple[SegmentComparison, ...],
    promoted: bool,
    helped: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of, run = world(), module._Run([Window("month", (JANUARY,))])
    monkeypatch.setattr(of, "compare", lambda *_: Comparison(150, auc, Interval(0.0, -0.1, 0.1), segments))
    assert module._retrain(of, run, (JANUARY, FEBRUARY), "decay", POLICIES[OURS], PRODUCT) is promoted
    assert run.production == int(promoted)
    assert [(one.month, one.cause, one.promoted, one.helped) for one in run.past] == [
        (FEBRUARY, "decay", promoted, helped)
    ]


@pytest.mark.parametrize("policy", list(POLICIES))
def test_nothing_is_known_of_the_future(policy: str) -> None:
    """What later months are like, or whether there are any, changes nothing of what happened before."""
    setting = Setting("", Scenario(season=0, concept_drift_from=FEBRUARY))
    otherwise = replace(setting, scenario=replace(setting.scenario, feature_drift_from=MAY, feature_drift=5))
    whole, other = (replay(policy, world(one)) for one in (setting, otherwise))
    begun = replay(policy, world(setting, MONTHS[:4]))
    past = ["2024-02", "2024-03", "2024-04"]
    pd.testing.assert_frame_equal(whole.loc[past], begun)
    pd.testing.assert_frame_equal(whole.loc[past], other.loc[past])
    assert whole.loc["2024-05", "auc"] != other.loc["2024-05", "auc"]


def run(scenarios: tuple[str, ...] = ("stable",), seeds: tuple[int, ...] = (1,), **arguments: Any) -> pd.DataFrame:
    given: dict[str, Any] = {"users": 400, "config": CONFIG, "product": PRODUCT, "months": MONTHS[:3]} | arguments
    return pd.concat(backtest(scenarios, seeds=seeds, **given), ignore_index=True)


def test_a_backtest_is_deterministic_whatever_else_is_replayed_and_on_however_many_cores() -> None:
    both = run(("stable", "seasonal"), (1, 2), jobs=2)
    pd.testing.assert_frame_equal(both, run(("stable", "seasonal"), (1, 2)))
    one = both[(both["scenario"] == "seasonal") & (both["seed"] == 2)].reset_index(drop=True)
    pd.testing.assert_frame_equal(one, run(("seasonal",), (2,)))
    stable = both[both["scenario"] == "stable"]
    assert list(dict.fromkeys(stable["policy"])) == [*POLICIES, BEST_POSSIBLE]
    assert stable.groupby("policy").size().to_dict() == dict.fromkeys([*POLICIES, BEST_POSSIBLE], 4)
    first, second = (stable[stable["seed"] == seed]["auc"].to_numpy() for seed in (1, 2))
    assert (first != second).all()


def test_the_truth_is_better_than_every_policy_on_average() -> None:
    summary = summarize(
        run(("stable", "sudden-shift"), (1, 2, 3), users=800, months=Month.parse_range("2024-01..2024-04"))
    )
    fixed = summary[summary["policy"] != BEST_POSSIBLE]
    assert (fixed["regret"] > 0.01).all()
    best = summary[summary["policy"] == BEST_POSSIBLE].set_index("scenario")
    assert (fixed["logloss"] > best["logloss"].loc[fixed["scenario"]].to_numpy()).all()
    assert (fixed["value"] < best["value"].loc[fixed["scenario"]].to_numpy()).all()
    assert best.loc["stable", "auc"] == pytest.approx(0.845, abs=0.02)


def handmade() -> pd.DataFrame:
    """Two months and seeds; AUC of ours minus that of never is 0.1 with one seed and 0.2 with the other."""
    auc = {"never": (0.5, 0.5, 0.6, 0.6), OURS: (0.6, 0.6, 0.7, 0.9), BEST_POSSIBLE: (0.9, 0.9, 0.9, 1.0)}
    rows: Iterator[dict[str, Any]] = (
        {
            "scenario": "stable",
            "policy": policy,
            "seed": at // 2,
            "month": f"2024-0{2 + at % 2}",
            "auc": one,
            "logloss": 0.5,
            "value": 1000.0 * at,
            "retrained": policy == OURS and at > 0,
            "promoted": policy == OURS and at == 3,
        }
        for policy, values in auc.items()
        for at, one in enumerate(values)
    )
    return pd.DataFrame(rows)


def test_the_summary_compares_the_same_worlds() -> None:
    summary = summarize(handmade()).set_index("policy")
    assert list(summary.index) == ["never", OURS, BEST_POSSIBLE]
    assert summary["auc"].to_dict() == pytest.approx({"never": 0.55, OURS: 0.7, BEST_POSSIBLE: 0.925})
    assert summary["regret"].to_dict() == pytest.approx({"never": 0.375, OURS: 0.225, BEST_POSSIBLE: 0.0})
    assert summary.loc["never", "ahead"] == pytest.approx(0.15)
    assert summary.loc["never", "standard_error"] == pytest.approx(0.05)
    assert summary.loc[OURS, ["retrainings", "promotions", "ahead"]].tolist() == [1.5, 0.5, 0]
    assert summary["value"].tolist() == [1500, 1500, 1500]
    months = by_month(handmade()).set_index(["policy", "month"])["auc"]
    assert months[OURS].to_dict() == pytest.approx({"2024-02": 0.65, "2024-03": 0.75})


def test_the_table_in_markdown() -> None:
    assert markdown(summarize(handmade())).splitlines()[2:] == [
        "| stable | never | **0.5500** | 0.5000 | 1,500 | 0.0 | 0.0 | 0.3750 | +0.1500 ± 0.0500 |",
        "| stable | ours | 0.7000 | 0.5000 | 1,500 | 1.5 | 0.5 | 0.2250 |  |",
        "| stable | best possible | 0.9250 | 0.5000 | 1,500 |  |  |  |  |",
    ]


def test_the_scenarios_are_what_they_say() -> None:
    scenarios = {name: setting.scenario for name, setting in SETTINGS.items()}

    def changed(name: str, month: str) -> float:
        return scenarios[name].changed_part(Month.parse(month))

    assert [changed("stable", month) for month in ("2024-01", "2025-12")] == [0, 0]
    assert [changed("sudden-shift", month) for month in ("2024-09", "2024-10")] == [0, 1]
    assert changed("gradual-drift", "2024-03") == 0
    assert changed("gradual-drift", "2025-09") == changed("gradual-drift", "2025-12") == pytest.approx(0.8)
    assert 0 < changed("gradual-drift", "2024-04") < 0.05
    assert [changed("seasonal", month) for month in ("2024-01", "2024-07", "2025-01")] == [0, 0.6, 0]
    assert [changed("label-delay", month) for month in ("2024-08", "2025-02")] == [0, 1]
    assert {name: setting.label_delay for name, setting in SETTINGS.items() if setting.label_delay} == {
        "label-delay": 2
    }


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scenarios": ("calm",)}, ConfigurationError, "no scenario 'calm'; there are stable, gradual-drift"),
        ({"months": []}, ConfigurationError, "0 months are too few for stable; it takes 2"),
        ({"months": [JANUARY]}, ConfigurationError, "1 months are too few for stable; it takes 2"),
        ({"scenarios": ("label-delay",)}, ConfigurationError, "3 months are too few for label-delay; it takes 4"),
        ({"months": [FEBRUARY, JANUARY]}, ConfigurationError, "must ascend"),
        ({"months": [JANUARY.shift(-1), JANUARY]}, ConfigurationError, "cannot be simulated"),
        ({"users": 4}, ConfigurationError, "held-out users of 2024-01 do not have both values"),
        ({"users": 60}, TrainingRefused, "churned"),
    ],
)
def test_what_cannot_be_replayed(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(**arguments)


def test_the_command_reports_and_writes_the_table_and_the_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--months", "2024-01..2024-03", "--users", "400", "--seeds", "1", "--scenario", "stable"]

    def command(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["streamflow", "backtest", *given, *more])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        return capsys.readouterr().out

    facts = json.loads(command("--json", "--output", str(tmp_path / "made")))
    summary = {row["policy"]: row for row in facts["summary"]}
    assert list(summary) == [*POLICIES, BEST_POSSIBLE]
    rows = run()
    assert summary["never"]["auc"] == pytest.approx(rows[rows["policy"] == "never"]["auc"].mean())
    assert summary["never"]["standard_error"] is None
    assert {row["month"] for row in facts["by_month"]} == {"2024-02", "2024-03"}
    assert (tmp_path / "made" / "backtest.md").read_text().count("| stable |") == 6
    assert (tmp_path / "made" / "backtest.png").read_bytes().startswith(b"\x89PNG")
    table = command()
    assert "stable: nothing changes" in table
    assert f"{summary['every month']['auc']:.4f}" in table
    assert max(map(len, table.splitlines())) <= 110
    assert "nan" not in table


def test_a_folder_that_cannot_be_made_is_said_before_anything_is_replayed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["streamflow", "backtest", "--output", str(tmp_path / "file" / "made")])
    monkeypatch.setattr(module, "backtest", lambda *_, **__: pytest.fail("replayed"))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert "cannot be made (Not a directory); name another folder" in capsys.readouterr().err
