"""The code location: assembles the graph, decides nothing."""

from dagster import Definitions, in_process_executor

from streamflow_dagster.defs import automation, feature_views, jobs, landing, model, monitoring, scoring, snapshots
from streamflow_dagster.defs.resources import PlatformResource

LAYERS = (landing, snapshots, feature_views, scoring, monitoring, model)


def build_definitions(core: PlatformResource | None = None) -> Definitions:
    """The graph over the platform that the environment describes, or over another one for tests."""
    return Definitions(
        assets=[
            *landing.ASSETS,
            *snapshots.ASSETS,
            *feature_views.ASSETS,
            *scoring.ASSETS,
            *monitoring.ASSETS,
            *model.ASSETS,
        ],
        jobs=jobs.JOBS,
        sensors=automation.SENSORS,
        resources={"core": core or PlatformResource()},
        executor=in_process_executor,
    )


defs = build_definitions()
