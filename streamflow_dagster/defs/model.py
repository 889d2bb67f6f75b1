"""The model: what it learns from, the trained pipeline, and its version in the registry."""

from contextlib import AbstractContextManager, nullcontext
from time import perf_counter

from dagster import (
    AssetCheckResult,
    AssetCheckSeverity,
    AssetDep,
    AssetExecutionContext,
    Config,
    MaterializeResult,
    MetadataValue,
    asset,
)
from pydantic import Field

from streamflow import loop, pipeline
from streamflow.contract import CONTRACT
from streamflow.months import Month
from streamflow.plots import with_interval
from streamflow_dagster.defs import checks
from streamflow_dagster.defs.conditions import WHEN_REMADE
from streamflow_dagster.defs.failing import fails_plainly
from streamflow_dagster.defs.partitions import MONTHLY, up_to_the_month
from streamflow_dagster.defs.resources import PlatformResource
from streamflow_dagster.defs.results import (
    OWNERS,
    candidates_as_table,
    gates_as_table,
    materialized,
    metrics_as_table,
    month_of,
    shown,
    windows_as_table,
)

AFTER_THE_SCORES = {"dagster/priority": "-1"}
"""In a run of the whole graph a month is scored by what was Production before it is trained on."""
SNAPSHOTS = [str(table.snapshot) for table in CONTRACT.snapshots]
EARLIER_MONTHS = 98
"""Dagster compares what a partition was made from with what there is now for fewer than 100 partitions upstream."""
SHOWN_IMAGES = {"ROC curve": "roc.png", "Reliability": "reliability.png", "Segments": "segments.png"}


class TrainingChoice(Config):
    """What a person may ask of a training from the launchpad; without it the model is chosen by cross-validation."""

    estimator: str | None = Field(
        None, description="Fit this estimator of training.toml as it comes: not calibrated, threshold 0.5."
    )
    service: str | None = Field(None, description="Use the features of this feature service only, such as churn_v1.")
    cause: str | None = Field(None, description="What the retraining sensor asks for it for; leave it empty.")
    reason: str = Field("", description="The same in words.")


@asset(
    deps=[CONTRACT.label_table.name, *SNAPSHOTS],
    group_name="training",
    owners=OWNERS,
    kinds={"feast", "parquet"},
    code_version=pipeline.code_version("contract", "features", "dataset"),
    partitions_def=MONTHLY,
    check_specs=[checks.no_single_feature_leaks("training_dataset")],
    automation_condition=WHEN_REMADE,
)
@fails_plainly
def training_dataset(context: AssetExecutionContext, core: PlatformResource) -> MaterializeResult:
    """Features and labels of the same as_of, joined point in time through Feast, kept under their digest."""
    started = perf_counter()
    written = pipeline.assemble_dataset(core.platform, month_of(context), core.now())
    leaks = written.facts["possible_leaks"]
    shown = {name: written.facts[name] for name in ("dropped", "churn_rate")}
    return materialized(
        written,
        started,
        checks=[
            AssetCheckResult(
                passed=not leaks,
                check_name=checks.NO_LEAK,
                severity=AssetCheckSeverity.WARN,
                description="; ".join(f"{name} alone has AUC {auc:.3f}" for name, auc in leaks.items())
                or "no feature alone separates the classes suspiciously well",
            )
        ],
        more={**shown, "files": MetadataValue.json(written.facts["files"])},
    )


@asset(
    deps=[AssetDep(training_dataset, partition_mapping=up_to_the_month(EARLIER_MONTHS))],
    group_name="training",
    owners=OWNERS,
    kinds={"scikitlearn", "mlflow"},
    code_version=pipeline.code_version(
        *("contract", "dataset", "training", "training_config", "selection", "windows", "procedure", "evaluation"),
        *("bootstrap", "value", "scoring", "report", "plots", "model_card"),
    ),
    partitions_def=MONTHLY,
    check_specs=checks.of_model("churn_model"),
    pool="training",
    op_tags=AFTER_THE_SCORES,
)
@fails_plainly
def churn_model(context: AssetExecutionContext, core: PlatformResource, config: TrainingChoice) -> MaterializeResult:
    """The month's churn model: chosen, fitted, evaluated on held-out users, compiled, and logged in MLflow."""
    started, month = perf_counter(), month_of(context)
    with _for_its_cause(core, month, config):
        trained = pipeline.train(
            core.platform, month, core.now(), estimator=config.estimator, service=config.service, cause=config.cause
        )
    parity, model, evidence = trained.candidate.parity, trained.candidate.model, trained.measured.evidence
    agreement = AssetCheckResult(
        passed=parity.holds,
        check_name=checks.AGREES,
        description=f"the compiled scorer differs from the pipeline by {parity.max_difference:.1e} at most and flips "
        f"{parity.flipped_decisions} decisions",
        metadata={"largest difference": parity.max_difference, "flipped decisions": parity.flipped_decisions},
    )
    forwards = {
        f"forward in time: {one.trained_on} on {one.month}": (
            f"AUC {with_interval(one.metrics['auc'])} of {one.users:,} held-out users"
        )
        for one in trained.forwards
    }
    return materialized(
        trained.write,
        started,
        checks=[agreement],
        more={
            **({"trained because": config.reason or config.cause} if config.cause else {}),
            "estimator": model.estimator,
            "feature service": model.service.name,
            "calibrated": model.calibrated,
            "threshold": model.threshold,
            "metrics": MetadataValue.md(metrics_as_table(evidence)),
            "window": MetadataValue.md(windows_as_table(trained.candidate.window)),
            "candidates": MetadataValue.md(candidates_as_table(trained.candidate.selection)),
            **forwards,
            **({"not validated forward in time": "; ".join(trained.not_validated)} if trained.not_validated else {}),
            **{title: shown(trained.images[name], title) for title, name in SHOWN_IMAGES.items()},
            "model card": MetadataValue.url(pipeline.card_link(core.platform, trained.run_id)),
            "MLflow run": MetadataValue.url(pipeline.run_link(core.platform, trained.run_id)),
        },
    )


def _for_its_cause(core: PlatformResource, month: Month, config: TrainingChoice) -> AbstractContextManager[None]:
    if config.cause is None:
        return nullcontext()
    by, reason = core.platform.settings.actor, config.reason or config.cause
    return loop.retraining(core.platform, month, config.cause, reason, by=by, now=core.now())


@asset(
    deps=[churn_model],
    group_name="registry",
    owners=OWNERS,
    kinds={"mlflow"},
    code_version=pipeline.code_version("gates", "policy", "promotion", "registry"),
    partitions_def=MONTHLY,
)
@fails_plainly
def registered_model_version(context: AssetExecutionContext, core: PlatformResource) -> MaterializeResult:
    """The model's version in MLflow and in our own records, and what the promotion policy made of it."""
    started = perf_counter()
    registered = pipeline.register(core.platform, month_of(context), core.now())
    return materialized(
        registered.write,
        started,
        more={
            "version": registered.version.version,
            "promoted": registered.decision.promote,
            "decision": registered.decision.reason,
            "gates": MetadataValue.md(gates_as_table(registered.decision.gates)),
            "model card": MetadataValue.url(pipeline.card_link(core.platform, registered.version.run_id)),
            "MLflow run": MetadataValue.url(pipeline.run_link(core.platform, registered.version.run_id)),
        },
    )


ASSETS = [training_dataset, churn_model, registered_model_version]
