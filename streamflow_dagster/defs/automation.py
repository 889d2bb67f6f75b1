"""What runs by itself, without a person or a month: the watch over stages that are set by hand."""

import functools

from dagster import DefaultSensorStatus, SensorEvaluationContext, SkipReason, sensor

from streamflow import pipeline
from streamflow.errors import RegistryUnavailable
from streamflow_dagster.defs.resources import PlatformResource

INTERVAL_S = 30


@sensor(
    minimum_interval_seconds=INTERVAL_S,
    default_status=DefaultSensorStatus.RUNNING,
    description="Answers stages that were changed by hand in MLflow: self-tested and held against the gates, a version "
    "becomes Production or the stage is set back, and the ledger says which. Requests no runs.",
)
def registry_stages(context: SensorEvaluationContext, core: PlatformResource) -> SkipReason:
    """Hold MLflow's stages against the promotion ledger."""
    platform = core.platform
    try:
        found = platform.ledger.reconcile(
            now=core.now(),
            policy=platform.policy,
            compare=functools.partial(pipeline.compare_versions, platform),
            self_test=functools.partial(pipeline.scorer_of, platform),
        )
    except RegistryUnavailable as failure:
        return SkipReason(f"not looked at: {failure}")
    for entry in found:
        context.log.warning(f"{entry.action} version {entry.version}: {entry.reason}")
        if entry.action != "flag":
            pipeline.explain(platform, entry)
    said = "; ".join(f"{entry.action} version {entry.version}: {entry.reason}" for entry in found)
    return SkipReason(said or "MLflow's stages are those of the ledger")


SENSORS = [registry_stages]
