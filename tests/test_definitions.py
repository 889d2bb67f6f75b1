"""The asset graph as Dagster loads it: a change of the graph is a visible change of this file."""

import subprocess
import sys
from pathlib import Path

import pytest
from dagster import AssetKey

from streamflow.contract import CONTRACT
from streamflow.settings import PROJECT_ROOT
from streamflow_dagster.definitions import defs
from streamflow_dagster.defs.partitions import MONTHLY

SNAPSHOTS = (
    "payments_agg_90d_snapshots",
    "subscriptions_profile_snapshots",
    "support_agg_90d_snapshots",
    "usage_agg_30d_snapshots",
    "users_snapshots",
)
GRAPH = {
    "users": ("landing", ()),
    "subscriptions": ("landing", ()),
    "usage_agg_30d": ("landing", ()),
    "payments_agg_90d": ("landing", ()),
    "support_agg_90d": ("landing", ()),
    "labels": ("landing", ()),
    "users_snapshots": ("snapshots", ("users",)),
    "subscriptions_profile_snapshots": ("snapshots", ("subscriptions", "users")),
    "usage_agg_30d_snapshots": ("snapshots", ("usage_agg_30d", "users")),
    "payments_agg_90d_snapshots": ("snapshots", ("payments_agg_90d", "users")),
    "support_agg_90d_snapshots": ("snapshots", ("support_agg_90d", "users")),
    "subs_profile_fv": ("feature_views", ("subscriptions_profile_snapshots",)),
    "usage_agg_30d_fv": ("feature_views", ("usage_agg_30d_snapshots",)),
    "payments_agg_90d_fv": ("feature_views", ("payments_agg_90d_snapshots",)),
    "support_agg_90d_fv": ("feature_views", ("support_agg_90d_snapshots",)),
    "contract_fv": ("feature_views", ("subscriptions_profile_snapshots",)),
    "customer_fv": ("feature_views", ("users_snapshots",)),
    "training_dataset": ("training", ("labels", *SNAPSHOTS)),
    "churn_scores": ("scoring", SNAPSHOTS),
    "drift_report": ("monitoring", ("churn_scores", *SNAPSHOTS)),
    "performance_report": ("monitoring", ("churn_scores", "training_dataset")),
    "churn_model": ("training", ("training_dataset",)),
    "registered_model_version": ("registry", ("churn_model",)),
}


@pytest.fixture(scope="module")
def specs():
    return {spec.key.to_user_string(): spec for spec in defs.resolve_all_asset_specs()}


def test_assets_their_groups_and_what_they_are_made_from(specs):
    found = {
        name: (spec.group_name, tuple(sorted(dependency.asset_key.to_user_string() for dependency in spec.deps)))
        for name, spec in specs.items()
    }
    assert found == GRAPH


def test_every_asset_is_monthly_described_owned_and_versioned(specs):
    for name, spec in specs.items():
        assert spec.partitions_def == MONTHLY, name
        assert spec.description, name
        assert spec.owners == ["team:platform"], name
        assert spec.kinds, name
        assert spec.code_version, name


def test_the_first_partition_is_january_2024():
    assert MONTHLY.get_first_partition_key() == "2024-01"


def test_checks_are_by_month_and_blocking_but_for_warnings_and_only_where_there_is_something_to_check():
    checks = {
        (key.asset_key.to_user_string(), key.name): defs.resolve_asset_graph().get(key)
        for key in defs.resolve_asset_graph().asset_check_keys
    }
    rows_and_key = {"row_count_equals_source", "key_is_unique"}
    everything = rows_and_key | {"within_bounds", "dates_agree_with_partition"}
    expected = {
        "users": everything,
        "subscriptions": everything - {"dates_agree_with_partition"},
        "usage_agg_30d": everything - {"dates_agree_with_partition"},
        "payments_agg_90d": everything - {"dates_agree_with_partition"},
        "support_agg_90d": everything - {"dates_agree_with_partition"},
        "labels": rows_and_key,
        **{str(table.snapshot): everything for table in CONTRACT.snapshots},
        "training_dataset": {"no_single_feature_separates_the_classes"},
        "churn_model": {"compiled_scorer_agrees"},
    }
    assert set(checks) == {(asset, name) for asset, names in expected.items() for name in names}
    for key, check in checks.items():
        assert check.blocking == (key[0] != "training_dataset"), key
        assert check.partitions_def == MONTHLY, key


def test_training_runs_one_at_a_time():
    assert defs.resolve_assets_def(AssetKey("churn_model")).op.pool == "training"


def test_the_jobs_a_person_finds():
    trained, labelled = (
        {"churn_model", "registered_model_version"},
        {"labels", "training_dataset", "performance_report"},
    )
    jobs = {
        "whole_month": set(GRAPH),
        "month": set(GRAPH) - trained,
        "month_without_labels": set(GRAPH) - trained - labelled,
        "training": trained,
    }
    for name, assets in jobs.items():
        job = defs.resolve_job_def(name)
        assert {key.to_user_string() for key in job.asset_layer.selected_asset_keys} == assets, name
        assert job.description, name


def test_a_month_is_scored_before_it_is_trained_on():
    priorities = {name: defs.resolve_assets_def(AssetKey(name)).op.tags.get("dagster/priority", "0") for name in GRAPH}
    assert priorities == {name: "-1" if name == "churn_model" else "0" for name in GRAPH}


def test_what_is_made_of_a_month_is_made_again_by_itself_but_for_files_and_models():
    conditions = {
        name: defs.resolve_asset_graph().get(AssetKey(name)).automation_condition is not None for name in GRAPH
    }
    by_hand = {*(table.name for table in CONTRACT.tables), "churn_model", "registered_model_version"}
    assert conditions == {name: name not in by_hand for name in GRAPH}


def test_the_workspace_validates_without_any_service():
    command = [Path(sys.executable).with_name("dagster"), "definitions", "validate", "-w", "workspace.yaml"]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Validation successful for code location streamflow" in done.stdout + done.stderr
