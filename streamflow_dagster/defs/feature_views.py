"""The feature views: a month of a snapshot, published to the online store."""

from time import perf_counter

from dagster import AssetExecutionContext, AssetsDefinition, MaterializeResult, asset

from streamflow import pipeline
from streamflow.contract import CONTRACT, FeatureView
from streamflow_dagster.defs.conditions import WHEN_REMADE
from streamflow_dagster.defs.failing import fails_plainly
from streamflow_dagster.defs.partitions import MONTHLY
from streamflow_dagster.defs.resources import PlatformResource
from streamflow_dagster.defs.results import OWNERS, materialized, month_of

CODE = pipeline.code_version("contract", "features", "online_store", "online_redis")


def published(view: FeatureView) -> AssetsDefinition:
    """The asset of one feature view."""

    @asset(
        name=view.name,
        deps=[view.snapshot],
        group_name="feature_views",
        description=view.description,
        owners=OWNERS,
        kinds={"feast", "postgres"},
        code_version=CODE,
        partitions_def=MONTHLY,
        automation_condition=WHEN_REMADE,
        metadata={"features": [column.name for column in view.columns]},
    )
    @fails_plainly
    def feature_view(context: AssetExecutionContext, core: PlatformResource) -> MaterializeResult:
        started = perf_counter()
        return materialized(pipeline.publish_view(core.platform, view, month_of(context), core.now()), started)

    return feature_view


ASSETS = [published(view) for view in CONTRACT.views]
