"""The scores: every customer of the month, by the version that was Production when it arrived."""

from collections.abc import Iterator
from time import perf_counter

from dagster import AssetExecutionContext, Config, MaterializeResult, MetadataValue, asset
from pydantic import Field

from streamflow import monitoring, pipeline, scores
from streamflow.contract import CONTRACT
from streamflow_dagster.defs.conditions import WHEN_REMADE
from streamflow_dagster.defs.failing import fails_plainly
from streamflow_dagster.defs.partitions import MONTHLY
from streamflow_dagster.defs.resources import PlatformResource
from streamflow_dagster.defs.results import OWNERS, materialized, month_of, shown


class ScoringChoice(Config):
    """What a person may ask of a scoring from the launchpad."""

    version: int | None = Field(
        None, description="Score with this version; else with the one that scored the month before, or Production."
    )


@asset(
    name=scores.CHURN_SCORES,
    deps=[str(table.snapshot) for table in CONTRACT.snapshots],
    group_name="scoring",
    owners=OWNERS,
    kinds={"postgres", "parquet"},
    code_version=pipeline.code_version("contract", "scoring", "scores", "value"),
    partitions_def=MONTHLY,
    output_required=False,
    automation_condition=WHEN_REMADE,
)
@fails_plainly
def churn_scores(
    context: AssetExecutionContext, core: PlatformResource, config: ScoringChoice
) -> Iterator[MaterializeResult]:
    """Every customer of the month with probability, decision and what contacting them is worth; whom to contact."""
    started, month = perf_counter(), month_of(context)
    scoring = monitoring.score_month(core.platform, month, core.now(), version=config.version)
    if scoring is None:
        context.log.warning("nothing is in Production, so nobody is scored; `streamflow models` lists the candidates")
        return
    folder = monitoring.scores_folder(core.platform.settings) / str(month)
    facts = scoring.write.facts
    yield materialized(
        scoring.write,
        started,
        more={
            "version": facts["version"],
            "threshold": facts["threshold"],
            "customers without a score": facts["unscored"]["customers"],
            "expected to churn": facts["acted"],
            "to contact": facts[scores.CONTACTS],
            "expected value of contacting them": facts["expected_value"],
            **({"scores": shown(scoring.image, "Scores")} if scoring.write.rows else {}),
            "whom to contact": MetadataValue.path(folder / f"{scores.CONTACTS}.csv"),
            "all scores": MetadataValue.path(folder / f"{scores.CHURN_SCORES}.parquet"),
        },
    )


ASSETS = [churn_scores]
