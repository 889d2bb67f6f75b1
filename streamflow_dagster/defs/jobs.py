"""The jobs a person finds in the UI: a month through the whole graph, or parts of that."""

from dagster import AssetSelection, define_asset_job

from streamflow.contract import CONTRACT
from streamflow.status import TRAINED, needs_labels, relations

WITHOUT_LABELS = [name for name in relations() if not needs_labels(name)]

whole_month = define_asset_job(
    "whole_month",
    selection=AssetSelection.all(),
    description="A landed month through the whole graph: data, scores, reports and a model.",
)
month = define_asset_job(
    "month",
    selection=AssetSelection.all() - AssetSelection.assets(*TRAINED),
    description="A landed month as it is when it arrives: data, scores and reports, but no model.",
)
month_without_labels = define_asset_job(
    "month_without_labels",
    selection=AssetSelection.assets(*WITHOUT_LABELS),
    description=f"A month that has landed without {CONTRACT.label_table.file}: data, scores and drift.",
)
training = define_asset_job(
    "training",
    selection=AssetSelection.assets(*TRAINED),
    description="A model of a month whose data is there: trained, registered, and held against the promotion policy.",
)

JOBS = [whole_month, month, month_without_labels, training]
