"""The jobs a person finds in the UI: a month through the whole graph, and its data layers alone."""

from dagster import AssetSelection, define_asset_job

DATA_GROUPS = ("landing", "snapshots", "feature_views")

whole_month = define_asset_job(
    "whole_month",
    selection=AssetSelection.all(),
    description="A landed month through the whole graph: tables, snapshots, feature views, model, version.",
)
month_data = define_asset_job(
    "month_data",
    selection=AssetSelection.groups(*DATA_GROUPS) - AssetSelection.assets("labels"),
    description="The data layers of a month that has landed without labels: everything but labels and model.",
)

JOBS = [whole_month, month_data]
