"""The model: what it learns from, the trained pipeline, and its version in the registry."""

import base64
from time import perf_counter

from dagster import AssetCheckResult, AssetExecutionContext, MaterializeResult, MetadataValue, asset

from streamflow import pipeline
from streamflow.contract import CONTRACT
from streamflow_dagster.defs import checks
from streamflow_dagster.defs.partitions import MONTHLY
from streamflow_dagster.defs.resources import PlatformResource
from streamflow_dagster.defs.results import OWNERS, gates_as_table, materialized, month_of

SNAPSHOTS = [view.snapshot for view in CONTRACT.service(pipeline.SERVICE).views]


@asset(
    deps=[CONTRACT.label_table.name, *SNAPSHOTS],
    group_name="training",
    owners=OWNERS,
    kinds={"feast", "parquet"},
    code_version=pipeline.code_version("contract", "features", "dataset"),
    partitions_def=MONTHLY,
)
def training_dataset(context: AssetExecutionContext, core: PlatformResource) -> MaterializeResult:
    """Features and labels of the same as_of, joined point in time through Feast, kept under their digest."""
    started = perf_counter()
    written = pipeline.assemble_dataset(core.platform, month_of(context), core.now())
    shown = {name: written.facts[name] for name in ("service", "dropped", "churn_rate")}
    return materialized(written, started, more={**shown, "files": MetadataValue.json(written.facts["files"])})


@asset(
    deps=[training_dataset],
    group_name="training",
    owners=OWNERS,
    kinds={"scikitlearn", "mlflow"},
    code_version=pipeline.code_version("contract", "dataset", "training", "evaluation", "scoring"),
    partitions_def=MONTHLY,
    check_specs=checks.of_model("churn_model"),
    pool="training",
)
def churn_model(context: AssetExecutionContext, core: PlatformResource) -> MaterializeResult:
    """The month's churn model: fitted, evaluated on held-out users, compiled, and logged in MLflow."""
    started = perf_counter()
    trained = pipeline.train(core.platform, month_of(context), core.now())
    agreement = AssetCheckResult(
        passed=trained.parity.holds,
        check_name=checks.AGREES,
        metadata={
            "largest difference": trained.parity.max_difference,
            "flipped decisions": trained.parity.flipped_decisions,
        },
    )
    image = base64.b64encode(trained.roc).decode()
    return materialized(
        trained.write,
        started,
        checks=[agreement],
        more={
            **trained.metrics,
            "ROC curve": MetadataValue.md(f"![ROC curve](data:image/png;base64,{image})"),
            "MLflow run": MetadataValue.url(pipeline.run_link(core.platform, trained.run_id)),
        },
    )


@asset(
    deps=[churn_model],
    group_name="registry",
    owners=OWNERS,
    kinds={"mlflow"},
    code_version=pipeline.code_version("promotion", "registry"),
    partitions_def=MONTHLY,
)
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
            "gates": MetadataValue.md(gates_as_table(registered.version.gates)),
            "MLflow run": MetadataValue.url(pipeline.run_link(core.platform, registered.version.run_id)),
        },
    )


ASSETS = [training_dataset, churn_model, registered_model_version]
