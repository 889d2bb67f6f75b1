"""What runs by itself: months that land, corrections, retraining, and the watch over stages that are set by hand."""

import functools
import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta

from dagster import (
    AssetKey,
    AssetSelection,
    AutomationConditionSensorDefinition,
    DagsterInstance,
    DagsterRunStatus,
    DefaultSensorStatus,
    RunRequest,
    RunsFilter,
    SensorEvaluationContext,
    SkipReason,
    sensor,
)

from streamflow import loop, pipeline
from streamflow.contract import CONTRACT
from streamflow.errors import RegistryUnavailable
from streamflow.months import Month
from streamflow.pipeline import CHURN_MODEL, Platform
from streamflow.settings import Settings
from streamflow.status import WATCHED, month_statuses
from streamflow.warehouse import month_writes
from streamflow_dagster.defs import jobs
from streamflow_dagster.defs.failing import ticks_plainly
from streamflow_dagster.defs.resources import PlatformResource

INTERVAL_S = 30
LOOP_INTERVAL_S = 10
OVERDUE = timedelta(minutes=1)
"""Longer than automation conditions take to look and to have begun what they ask for."""
RUN_KEY = "dagster/run_key"
PARTITION = "dagster/partition"
AUTOMATION = Settings.load().automation
BY_ITSELF = DefaultSensorStatus.RUNNING if AUTOMATION == "on" else DefaultSensorStatus.STOPPED
ACTIVE = [
    DagsterRunStatus.QUEUED,
    DagsterRunStatus.NOT_STARTED,
    DagsterRunStatus.STARTING,
    DagsterRunStatus.STARTED,
    DagsterRunStatus.CANCELING,
]
BUSY = "`streamflow run` is at work; it does what is due itself"


@sensor(
    jobs=[jobs.month],
    minimum_interval_seconds=LOOP_INTERVAL_S,
    default_status=BY_ITSELF,
    description="Notices months that have landed or were corrected, by the digests of their files, and requests one "
    "run for each, older months first: a new month whole, of a corrected one the tables that changed. What else a "
    "correction makes stale in its month, the sensor corrections has made again; if it has not after a minute, and for "
    "drift reports of other months that were held against it, as no partition mapping can name them, this one does. A "
    "month waits for the retraining that an older one gave reason to.",
)
@ticks_plainly
def landed_months(context: SensorEvaluationContext, core: PlatformResource) -> RunRequest | SkipReason:
    """Request the next month's run."""
    platform = core.platform
    with loop.at_work(platform.database) as ours:
        if not ours:
            return SkipReason(BUSY)
        active = _active(context.instance)
        step, left_out = _due(context.instance, platform, core.now())
        said = f"; {', '.join(map(str, left_out))} failed and waits for a person" if left_out else ""
        if step is None:
            waiting = [one.month for one in month_statuses(platform) if one.state == "unlabelled"]
            said += f"; {', '.join(waiting)} waits for {CONTRACT.label_table.file}" if waiting else ""
            return SkipReason(f"every landed month is done{said}")
        if step.cause is not None:
            return SkipReason(f"the sensor retraining goes first: {step.month}, {step.reason}{said}")
        if step.month in active:
            return SkipReason(f"{step.month} is being worked on by run {active[step.month]}{said}")
        request = _request(platform, step, core.now())
        if not request.assets:
            stale = ", ".join(step.assets)
            return SkipReason(f"{step.month} is stale; the sensor corrections has {stale} made again")
        return RunRequest(
            run_key=request.key,
            partition_key=str(step.month),
            asset_selection=[AssetKey(name) for name in request.assets],
            tags={"streamflow/reason": step.reason},
        )


@sensor(
    jobs=[jobs.training],
    minimum_interval_seconds=LOOP_INTERVAL_S,
    default_status=BY_ITSELF,
    description="Reads the newest reports on drift and performance, decides by the policy whether a model must be "
    "trained again, and requests one run for each cause. What becomes of the model is the promotion policy's to say.",
)
@ticks_plainly
def retraining(context: SensorEvaluationContext, core: PlatformResource) -> RunRequest | SkipReason:
    """Request a training when there is a cause for one."""
    platform = core.platform
    with loop.at_work(platform.database) as ours:
        if not ours:
            return SkipReason(BUSY)
        active = _active(context.instance)
        decision = loop.decision(platform, loop.newest_labelled(month_statuses(platform)))
        for alarm in decision.alarms:
            context.log.warning(alarm.says)
        step, _ = _due(context.instance, platform, core.now())
        if step is None or step.cause is None:
            return SkipReason(decision.reason)
        if step.month in active:
            return SkipReason(f"{step.month} is being worked on by run {active[step.month]}")
        return RunRequest(
            run_key=f"{step.cause}, attempt {loop.attempt(platform.database, step.cause)}",
            partition_key=str(step.month),
            run_config={"ops": {CHURN_MODEL: {"config": {"cause": step.cause, "reason": step.reason}}}},
            tags={"streamflow/reason": step.reason},
        )


def _due(instance: DagsterInstance, platform: Platform, now: datetime) -> tuple[loop.Step | None, list[Month]]:
    """The next step that was not tried in vain before, and the months that it leaves out because they failed."""
    left_out: list[Month] = []
    while (step := loop.due(platform, left_out)) is not None and step.cause is None:
        if not _in_vain(instance, _request(platform, step, now)):
            return step, left_out
        left_out.append(step.month)
    return step, left_out


@dataclass(frozen=True)
class _Request:
    """Assets to ask for, none while the automation conditions have them made; ``key`` names what for."""

    key: str
    assets: Collection[str]


def _request(platform: Platform, step: loop.Step, now: datetime) -> _Request:
    """What to ask for of a step that trains no model: all, or with automation on what no automation condition sees.

    Which month a drift report is held against, the ledger says; Dagster's partition mappings know fixed offsets only.
    What an automation condition sees is asked for too when nobody has made it in time: a condition looks once, and
    neither when its run failed nor when its cursor was lost again.
    """
    what = "scores" if set(step.assets) <= set(WATCHED) else "month"
    if AUTOMATION != "on":
        return _Request(_key(platform, what, step), step.assets)
    status = next(one for one in month_statuses(platform) if one.month == str(step.month))
    tables = {table.name for table in CONTRACT.tables}
    unseen = [name for name in step.assets if name in (*status.missing, *status.because_of) or name in tables]
    if unseen:
        return _Request(_key(platform, what, step), unseen)
    newest = max(one.written_at for one in month_writes(platform.database) if one.month == step.month)
    return _Request(_key(platform, "stale", step), step.assets if now - newest > OVERDUE else ())


def _key(platform: Platform, what: str, step: loop.Step) -> str:
    """Names what has landed of the month, and of the other months that something of it is due for.

    Revisions count, not only contents: a correction may be taken back.
    """
    manifests = [platform.landing.manifest(month).current for month in (step.month, *step.because_of)]
    landed = ",".join(
        f"{name}@{one.revision}:{one.sha256}" for current in manifests for name, one in sorted(current.items())
    )
    return f"{what} {step.month}:{hashlib.sha256(landed.encode()).hexdigest()[:16]}"


def _active(instance: DagsterInstance) -> dict[Month, str]:
    """The months that are being worked on, each with a run.

    To be asked before what is due: a run that ends in between would be neither at work nor seen to have done it.
    """
    runs = instance.get_runs(RunsFilter(statuses=ACTIVE))
    return {Month.parse(run.tags[PARTITION]): run.run_id for run in runs if PARTITION in run.tags}


def _in_vain(instance: DagsterInstance, request: _Request) -> bool:
    """Whether a request has been made, and is over, and yet is to be made."""
    runs = instance.get_runs(RunsFilter(tags={RUN_KEY: request.key}), limit=1)
    if not runs or not runs[0].is_finished:
        return False
    return runs[0].status is not DagsterRunStatus.SUCCESS or bool(request.assets)


corrections = AutomationConditionSensorDefinition(
    "corrections",
    target=AssetSelection.all(),
    default_status=BY_ITSELF,
    minimum_interval_seconds=LOOP_INTERVAL_S,
    description="Makes anew, of whichever month, what was made from something that has been made anew since: the "
    "automation conditions of the assets. Models are not among them; the sensor retraining decides about those.",
)


@sensor(
    minimum_interval_seconds=INTERVAL_S,
    default_status=DefaultSensorStatus.RUNNING,
    description="Answers stages that were changed by hand in MLflow: self-tested and held against the gates, a version "
    "becomes Production or the stage is set back, and the ledger says which. Requests no runs.",
)
@ticks_plainly
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


SENSORS = [landed_months, corrections, retraining, registry_stages]
