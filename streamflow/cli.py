"""The `streamflow` command: reads arguments, calls the core, prints. It decides nothing.

Exit codes: 0 done, 1 failed or refused with the reason on stderr, 2 wrong usage.
"""

import dataclasses
import functools
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from streamflow.errors import ConfigurationError, RegistryUnavailable, StreamFlowError, WarehouseUnavailable
from streamflow.months import FIRST_MONTH, Month
from streamflow.settings import Settings

if TYPE_CHECKING:
    from streamflow.landing import Landed
    from streamflow.pipeline import Platform
    from streamflow.predictions import Summary
    from streamflow.promotion import Entry, Gate
    from streamflow_dagster.runner import MonthRun

app = typer.Typer(
    help="StreamFlow: a month of CSVs in, a traced churn prediction out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)
UNBOUNDED = 10_000

UNWRAPPED = 400
"""Columns for what is laid out in columns, where no terminal says how many there are."""

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
By = Annotated[str, typer.Option("--by", help="Who decides.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; it goes into the ledger.")]
RequestId = Annotated[
    UUID | None, typer.Argument(metavar="REQUEST_ID", show_default=False, help="The request_id of an answer.")
]
FirstMonth = Annotated[str, typer.Option("--first-month", help="Month of the first folder that is not named YYYY-MM.")]


def main() -> None:
    """Run the command line; a refusal or failure that a user can mend is one message and exit code 1."""
    try:
        app()
    except StreamFlowError as refusal:
        err.print(str(refusal), markup=False)
        sys.exit(1)


def now() -> datetime:
    """The time that records bear; the core never asks a clock."""
    return datetime.now(UTC)


@contextmanager
def connected(**overrides: Any) -> Iterator["Platform"]:
    """The platform of the environment; its embedded PostgreSQL runs at least as long as the block."""
    import psycopg

    from streamflow import stack
    from streamflow.embedded import postgres
    from streamflow.pipeline import Platform

    settings = Settings.load(**overrides)
    with postgres(settings) as database:
        with database.connect():
            pass  # a database that is away is said here, and not deep in a library that tries again and again
        os.environ.update(stack.environment(settings, database))
        try:
            yield Platform(settings, database)
        except psycopg.errors.InsufficientPrivilege as failure:
            reason = failure.diag.message_primary
            raise ConfigurationError(
                f"PostgreSQL refuses: {reason}; set {stack.OWNER_ADDRESS} for `streamflow migrate`"
            ) from failure
        except psycopg.OperationalError as failure:
            raise WarehouseUnavailable(f"PostgreSQL has gone away: {str(failure).strip()}") from failure


def _month(key: str) -> Month:
    """The month that an argument names; anything else is wrong usage."""
    try:
        return Month.parse(key)
    except ConfigurationError as refusal:
        raise typer.BadParameter(str(refusal)) from refusal


def _months(text: str) -> list[Month]:
    """The months of an argument YYYY-MM or YYYY-MM..YYYY-MM; anything else is wrong usage."""
    try:
        return Month.parse_range(text)
    except ConfigurationError as refusal:
        raise typer.BadParameter(str(refusal)) from refusal


@contextmanager
def prepared() -> Iterator["Platform"]:
    """The same, once `streamflow migrate` has been run there."""
    from streamflow.pipeline import require_prepared

    with connected() as platform:
        require_prepared(platform)
        yield platform


def as_json(facts: Any) -> None:
    """Print facts as JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, msgspec.Struct):
            return _facts(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return value.isoformat() if hasattr(value, "isoformat") else str(value)

    sys.stdout.write(json.dumps(facts, default=plain, indent=2) + "\n")


# --- data ---------------------------------------------------------------------------------------------------------


@app.command()
def simulate(
    months: Annotated[str, typer.Option(help="YYYY-MM or YYYY-MM..YYYY-MM.")],
    out_folder: Annotated[Path, typer.Option("--out", help="Folder for the months.")],
    users: Annotated[int, typer.Option(help="Customers in each month.")] = 7_000,
    seed: Annotated[int, typer.Option(help="Another seed is another world.")] = 1,
    feature_drift_from: Annotated[str | None, typer.Option(help="Month from which features shift.")] = None,
    feature_drift: Annotated[float, typer.Option(help="How far, in units of their spread; 0 to 5.")] = 0.5,
    concept_drift_from: Annotated[str | None, typer.Option(help="Month from which churn follows another rule.")] = None,
    concept_drift: Annotated[float, typer.Option(help="Part of the customers that follow it; 0 to 1.")] = 1.0,
    drift_months: Annotated[int, typer.Option(help="Months that drift takes: 1 is sudden.")] = 1,
    season: Annotated[float, typer.Option(help="Amplitude of the season; 0 to 2.")] = 0.1,
) -> None:
    """Write deterministic months of the real shape, with the truth beside them."""
    from streamflow import simulate as simulator

    scenario = simulator.Scenario(
        feature_drift_from=_month(feature_drift_from) if feature_drift_from else None,
        feature_drift=feature_drift,
        concept_drift_from=_month(concept_drift_from) if concept_drift_from else None,
        concept_drift=concept_drift,
        drift_months=drift_months,
        season=season,
    )
    folders = simulator.simulate(out_folder, _months(months), users=users, seed=seed, scenario=scenario)
    out.print(f"{len(folders)} months of {users:,} users in {out_folder}; the truth is in {out_folder / '.truth'}")


@app.command()
def land(
    path: Annotated[Path, typer.Argument(help="A folder with the CSVs, or a folder of such folders in order.")],
    month: Annotated[str | None, typer.Option(help="The month of the folder, YYYY-MM.")] = None,
    first_month: Annotated[str | None, typer.Option(help="Of a folder of folders: the month of the first.")] = None,
    json_: AsJson = False,
) -> None:
    """Validate a month's CSV files and take them into the landing zone; a refused month does not stop the others."""
    from streamflow.landing import LandingRefused, LandingZone, folders_in

    if month and first_month:
        raise typer.BadParameter("give --month for one folder or --first-month for a folder of folders, not both")
    folders = [(path, _month(month))] if month else folders_in(path, _month(first_month or FIRST_MONTH))
    if not month and not first_month and folders[0][0] == path:
        raise typer.BadParameter(f"{path} holds the files of one month; say which by --month YYYY-MM")
    zone = LandingZone(Settings.load().home)
    landed, refused = [], []
    for folder, of in folders:
        try:
            landed.append(zone.land(folder, of, now()))
        except LandingRefused as refusal:
            refused.append(refusal)
    if json_:
        as_json([_landed_facts(one) for one in landed])
    else:
        for one in landed:
            _print_landed(one)
    if refused:
        raise StreamFlowError("\n".join(map(str, refused)))


def _landed_facts(landed: "Landed") -> dict[str, Any]:
    return {
        "month": str(landed.month),
        "changed": {name: _facts(revision) for name, revision in landed.changed.items()},
        "unchanged": list(landed.unchanged),
        "warnings": [str(warning) for warning in landed.manifest.warnings],
    }


def _print_landed(landed: "Landed") -> None:
    if landed.changed:
        news = ", ".join(f"{name} (revision {revision.revision})" for name, revision in landed.changed.items())
        out.print(f"{landed.month} landed: {news}")
    else:
        out.print(f"{landed.month} had landed already; nothing changed")
    for warning in landed.manifest.warnings:
        err.print(f"  warning: {warning}", markup=False)


def _facts(struct: Any) -> dict[str, Any]:
    return {name: getattr(struct, name) for name in struct.__struct_fields__}


@app.command()
def migrate() -> None:
    """Bring the databases of the platform and its tools to this version, and MLflow's stages in line with the ledger.

    Months of the prediction log that are older than STREAMFLOW_PREDICTION_RETENTION_MONTHS are dropped. An MLflow
    server of your own (STREAMFLOW_MLFLOW_URI) looks after its database itself.
    """
    from streamflow import pipeline, predictions

    with connected() as platform:
        for change in pipeline.prepare(platform):
            out.print(change)
        keep = platform.settings.prediction_retention_months
        for month in predictions.drop_old_months(platform.database, keep, now()):
            out.print(f"dropped the predictions of {month}")
        with _dagster_runner().instance():
            pass
        if platform.settings.mlflow_uri is None:
            platform.registry.prepare()  # before its server and a run would make the tables at the same time
        if platform.ledger.production() is not None:
            try:
                platform.ledger.follow()
            except RegistryUnavailable as failure:
                err.print(f"MLflow's stages could not follow the ledger: {failure}", markup=False)


@app.command("run")
def run_(
    months: Annotated[
        list[str] | None, typer.Argument(help="YYYY-MM or YYYY-MM..YYYY-MM, one or several; whatever is due, if none.")
    ] = None,
    estimator: Annotated[
        str | None, typer.Option(help="Fit this estimator of training.toml as it comes, instead of choosing one.")
    ] = None,
    service: Annotated[str | None, typer.Option(help="Train on this feature service only, such as churn_v1.")] = None,
    json_: AsJson = False,
) -> None:
    """Materialize months through the whole graph, with a model for each; a bad month does not stop the others.

    Without months, do what is due: what has landed, in order, and a model where there is reason to train one. That is
    what the sensors do while `streamflow up` runs.
    """
    from streamflow import loop
    from streamflow.procedure import Procedure

    wanted = list(dict.fromkeys(month for text in months or () for month in _months(text)))
    if not wanted and (estimator or service):
        raise typer.BadParameter("--estimator and --service are for months that are named")
    with prepared() as platform:
        for month in wanted:
            platform.landing.manifest(month)
        Procedure.of(platform.training_config, platform.policy, estimator=estimator, service=service)
        choice = {name: value for name, value in (("estimator", estimator), ("service", service)) if value is not None}
        with loop.at_work(platform.database, wait=True):
            runs = _run_months(platform, wanted, choice, progress_on=err if json_ else out)
    if json_:
        as_json([{**vars(run), "month": str(run.month)} for run in runs])
    if failed := sorted({str(run.month) for run in runs if not run.succeeded}):
        raise StreamFlowError(
            f"{', '.join(failed)} failed; {'the others are' if len(wanted) > 1 else 'the rest is'} done"
        )


def _dagster_runner() -> Any:
    import logging

    logging.captureWarnings(capture=True)
    logging.disable(logging.WARNING)
    from streamflow_dagster import runner

    return runner


def _run_months(
    platform: "Platform", wanted: Sequence[Month], choice: dict[str, str], *, progress_on: Console
) -> list["MonthRun"]:
    """Run what is due or, if months are named, all of each and then what its model makes due."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from streamflow import loop

    runner = _dagster_runner()
    runs: list[MonthRun] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[asset]}"),
    )
    with Progress(*columns, console=progress_on) as progress, runner.instance() as instance:

        def run(step: loop.Step, training: dict[str, str]) -> "MonthRun":
            task = progress.add_task(f"{step.month}", total=len(step.assets), asset="")
            done: MonthRun = runner.run_assets(
                instance,
                step.month,
                step.assets,
                training=training,
                progress=lambda asset: progress.update(task, advance=1, asset=asset),
            )
            progress.update(task, asset=f"{done.seconds:.1f} s" if done.succeeded else "failed")
            for asset, reason in done.failures.items():
                err.print(f"{step.month} {asset}: {reason}", markup=False)
            runs.append(done)
            return done

        for step in loop.whole_months(platform, wanted):
            run(step, choice)
        failed, seen = set[Month](), set[loop.Step]()
        while not wanted and (due := loop.due(platform, left_out=failed)):
            if due in seen and due.cause:
                break
            if due.cause:
                progress.console.print(f"{due.month}: {due.reason}", markup=False)
            done = run(due, {"cause": due.cause, "reason": due.reason} if due.cause else {})
            if due in seen or not (done.succeeded or due.cause):
                failed.add(due.month)
            seen.add(due)
    return runs


# --- models -------------------------------------------------------------------------------------------------------


@app.command()
def models(json_: AsJson = False) -> None:
    """List the registered versions with their stage, metrics, threshold and gates."""
    from streamflow.promotion import gates_of, in_force

    with prepared() as platform:
        stages = {number: version.stage for number, version in platform.registry.versions().items()}
        entries = platform.ledger.entries()
        versions = [in_force(entries, version) for version in platform.ledger.versions()]
    facts = [
        {
            "version": version.version,
            "stage": stages.get(version.version, "deleted"),
            "as_of": version.as_of,
            "run_id": version.run_id,
            "service": version.service,
            "estimator": version.lineage["estimator"],
            "threshold": version.threshold,
            "metrics": version.metrics,
            "gates": list(gates_of(entries, version.version)),
            "evidence": msgspec.to_builtins(version.evidence),
            "dataset_digest": version.dataset_digest,
            "predictions_digest": version.predictions_digest,
            "artifact_sha256": version.artifact_sha256,
            "registered_at": version.registered_at,
        }
        for version in versions
    ]
    if json_:
        as_json(facts)
        return
    columns = ("version", "stage", "as of", "AUC (95 % interval)", "threshold", "service", "estimator", "gates")
    table = Table(*columns, box=None, header_style="bold")
    for version, fact in zip(versions, facts, strict=True):
        auc = version.evidence.metrics["auc"]
        table.add_row(
            str(version.version),
            str(fact["stage"]),
            str(version.as_of),
            f"{auc.value:.3f} ({auc.low:.3f} to {auc.high:.3f})",
            f"{fact['threshold']:.4g}",
            version.service,
            str(fact["estimator"]),
            _outcome(fact["gates"]),
        )
    if versions:
        _print_table(table)
    else:
        out.print("No version is registered yet; `streamflow run MONTH` trains one.")


def _print_table(table: Table) -> None:
    """Print a table that is wide by nature: as wide as the terminal, and with whole lines where there is none."""
    Console(highlight=False, width=None if out.is_terminal else UNBOUNDED).print(table, markup=False)


def _outcome(gates: "Sequence[Gate]") -> str:
    """What came of the gates, in a few words."""
    if not gates:
        return "not decided yet"
    failed = [gate.name for gate in gates if not gate.passed]
    return f"failed: {', '.join(failed)}" if failed else "passed"


@app.command()
def promote(
    version: int,
    by: By,
    reason: Reason,
    override: Annotated[bool, typer.Option(help="Promote although a gate failed; recorded as such.")] = False,
    bug_fix: Annotated[bool, typer.Option(help="It need not be better than Production, only not worse.")] = False,
    json_: AsJson = False,
) -> None:
    """Make a version Production; the service follows within seconds."""
    from streamflow import pipeline

    with prepared() as platform:
        pipeline.scorer_of(platform, platform.ledger.version(version))
        entry = platform.ledger.promote(
            version,
            by=by,
            reason=reason,
            now=now(),
            policy=platform.policy,
            compare=functools.partial(pipeline.compare_versions, platform),
            override=override,
            bug_fix=bug_fix,
        )
        pipeline.explain(platform, entry)
    _print_entry(entry, json_=json_)


@app.command()
def rollback(
    by: By,
    reason: Reason,
    version: Annotated[int | None, typer.Argument(help="A former Production; the one before, if not given.")] = None,
    json_: AsJson = False,
) -> None:
    """Go back to the version that was Production before, without training."""
    from streamflow import pipeline

    with prepared() as platform:
        entry = platform.ledger.rollback(version, by=by, reason=reason, now=now(), policy=platform.policy)
        pipeline.explain(platform, entry)
    _print_entry(entry, json_=json_)


@app.command()
def threshold(
    version: int,
    value: Annotated[float, typer.Argument(help="The probability from which on a customer counts as churning.")],
    by: By,
    reason: Reason,
    override: Annotated[bool, typer.Option(help="Change it although a gate fails then; recorded as such.")] = False,
    json_: AsJson = False,
) -> None:
    """Change the threshold of a version without training it again; the service follows within a second."""
    from streamflow import pipeline

    with prepared() as platform:
        entry = platform.ledger.set_threshold(
            version,
            value,
            by=by,
            reason=reason,
            now=now(),
            policy=platform.policy,
            remeasure=functools.partial(pipeline.remeasure, platform),
            override=override,
        )
        pipeline.explain(platform, entry)
    if json_:
        as_json(entry)
    else:
        out.print(f"Version {entry.version} says churn from probability {entry.threshold:g} on, by {entry.by}")


def _print_entry(entry: "Entry", *, json_: bool) -> None:
    if json_:
        as_json(entry)
    else:
        before = f"; before: version {entry.previous}" if entry.previous else ""
        out.print(f"Version {entry.version} is Production, by {entry.by}{before}")


@app.command()
def ledger(
    at: Annotated[str | None, typer.Option(help="A time, such as 2024-02-03T04:05Z: what was Production then.")] = None,
    json_: AsJson = False,
) -> None:
    """List what was decided about versions, or tell which was Production at a time, and by which decision."""
    moment = _moment(at) if at else None
    with prepared() as platform:
        entries = platform.ledger.entries()
    if moment:
        _print_production_at(moment, entries, json_=json_)
    elif json_:
        as_json(entries)
    else:
        _print_ledger(entries)


def _moment(text: str) -> datetime:
    """The time that an argument names, in UTC unless it says otherwise; anything else is wrong usage."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as failure:
        raise typer.BadParameter(f"{text!r} is no time such as 2024-02-03 or 2024-02-03T04:05:06Z") from failure
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _print_production_at(moment: datetime, entries: "Sequence[Entry]", *, json_: bool) -> None:
    from streamflow.promotion import decision_in_force, production_at, until

    entry = decision_in_force(until(entries, moment))
    if json_:
        as_json({"at": moment, "production": production_at(entries, moment), "decision": entry})
    elif entry:
        done = {"promote": "promoted", "rollback": "rolled back to"}[entry.action]
        out.print(
            f"Production at {_utc(moment)}: version {entry.version}, {done} {_utc(entry.at)} by {entry.by}: "
            f"{entry.reason}",
            markup=False,
        )
    else:
        out.print(f"Production at {_utc(moment)}: nothing")


def _print_ledger(entries: "Sequence[Entry]") -> None:
    table = Table("when (UTC)", "what", "version", "before", "by", "policy", "reason", box=None, header_style="bold")
    for entry in entries:
        what = f"threshold {entry.threshold:g}" if entry.threshold is not None else entry.action
        table.add_row(
            f"{entry.at.astimezone(UTC):%Y-%m-%d %H:%M:%S}",
            f"{what}, override" if entry.override and entry.action != "refuse" else what,
            str(entry.version),
            str(entry.previous or ""),
            entry.by,
            entry.policy,
            entry.reason,
        )
    if entries:
        _print_table(table)
    else:
        out.print("Nothing has been decided yet; `streamflow run MONTH` registers a first version.")


def _utc(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


@app.command()
def rebuild(
    version: Annotated[int, typer.Option(help="The registered version.")],
    json_: AsJson = False,
) -> None:
    """Rebuild a version's dataset from the archived files, train again, and compare the predictions."""
    from streamflow import pipeline

    with prepared() as platform:
        rebuilt = pipeline.rebuild(platform, version)
    if json_:
        as_json(rebuilt)
    else:
        by = f"DIFFERENT, by {rebuilt.largest_difference:.1e} at most"
        out.print(f"dataset: {'identical' if rebuilt.same_dataset else 'DIFFERENT'}")
        out.print(f"predictions: {'identical' if rebuilt.same_predictions else by}")
    if not rebuilt.identical:
        raise StreamFlowError(f"version {version} was not rebuilt identically: {rebuilt.explanation}")


@app.command()
def trace(
    request_id: RequestId = None,
    version: Annotated[int | None, typer.Option(help="A registered version.")] = None,
    json_: AsJson = False,
) -> None:
    """Follow a prediction or a version back to the landed files, and fail if a link is missing or altered."""
    from streamflow import tracing

    if (request_id is None) == (version is None):
        raise typer.BadParameter("give the REQUEST_ID of a prediction or --version N")
    traced: tracing.Trace | tracing.TracedPrediction
    with prepared() as platform:
        if version is not None:
            traced = tracing.trace_version(platform, version)
        else:
            traced = tracing.trace_prediction(platform, str(request_id))
    if json_:
        as_json(traced)
    else:
        tree = tracing.as_tree(traced) if isinstance(traced, tracing.Trace) else tracing.prediction_as_tree(traced)
        Console(highlight=False, width=None if out.is_terminal else UNWRAPPED).print(tree)
    tracing.require_whole(traced)


@app.command()
def replay(
    request_id: RequestId = None,
    all_: Annotated[bool, typer.Option("--all", help="Every logged prediction.")] = False,
    since: Annotated[str | None, typer.Option(help="With --all: a time, such as 2024-02-03T04:05Z.")] = None,
    json_: AsJson = False,
) -> None:
    """Score logged features again with the artifact that answered, and fail unless every bit is the same."""
    from streamflow import predictions

    if (request_id is None) != all_ or (since and not all_):
        raise typer.BadParameter("give the REQUEST_ID of a prediction, or --all, which --since may limit")
    moment = _moment(since) if since else None
    with prepared() as platform:
        one = predictions.replay(platform, str(request_id)) if request_id else None
        summary = predictions.summarize([one] if one else predictions.replay_all(platform, moment))
    if json_:
        as_json(one or summary)
    else:
        _print_replay(summary)
    if not summary.count:
        raise StreamFlowError(f"nothing was replayed: no prediction is logged{' since then' if since else ''}")
    if summary.identical != summary.count:
        raise StreamFlowError(
            f"{summary.count - summary.identical:,} of {summary.count:,} predictions were not replayed identically"
        )


def _print_replay(summary: "Summary") -> None:
    out.print(
        f"{summary.count:,} replayed: {summary.identical:,} identical, {summary.different:,} different, "
        f"{summary.not_replayable:,} not replayable"
    )
    for one in summary.named:
        again = f"{one.replayed.probability!r}" if one.replayed else one.problem
        out.print(f"  {one.request_id}  logged {one.logged.probability!r}, now {again}", markup=False)


# --- using and watching -------------------------------------------------------------------------------------------


@app.command()
def predict(user_id: str, json_: AsJson = False) -> None:
    """Ask the running service for one customer's prediction."""
    import httpx

    from streamflow.api_keys import request_headers

    settings = Settings.load()
    address = _api(settings)
    try:
        response = httpx.post(
            f"{address}/predict",
            json={"user_id": user_id},
            headers=request_headers(settings),
            timeout=10,
            trust_env=False,
        )
    except httpx.HTTPError as failure:
        raise StreamFlowError(f"no service answers at {address} ({failure}); start `streamflow up`") from failure
    if "json" not in response.headers.get("content-type", ""):
        raise StreamFlowError(f"what answers at {address} is not StreamFlow; set STREAMFLOW_API_PORT")
    answer = response.json()
    if json_:
        as_json(answer)
    if response.is_error:
        raise StreamFlowError(f"{answer.get('detail') or answer.get('title', 'refused')} ({response.status_code})")
    if not json_:
        _print_prediction(answer)


def _print_prediction(answer: dict[str, Any]) -> None:
    decision = "churns" if answer["prediction"] else "stays"
    out.print(
        f"{answer['user_id']} {decision}: probability {answer['probability']:.4f}, "
        f"threshold {answer['threshold']:g}, by version {answer['model_version']}, "
        f"features as of {answer['features_as_of']}, request {answer['request_id']}"
    )
    table = Table("feature", "value", box=None, header_style="bold")
    for name, value in answer["features_used"].items():
        table.add_row(name, str(value))
    out.print(table)


def _api(settings: Settings) -> str:
    from streamflow.stack import Addresses

    return Addresses.of(settings).api


@app.command()
def status(json_: AsJson = False) -> None:
    """Tell what is in Production, the state of each month, and whether there is reason to train again."""
    from streamflow import loop
    from streamflow import status as state

    with prepared() as platform:
        months = state.month_statuses(platform)
        production = state.production_status(platform.ledger.entries(), platform.ledger.versions())
        retraining = loop.decision(platform, loop.newest_labelled(months))
    if json_:
        as_json({"production": production, "months": months, "retraining": retraining})
        return
    if production:
        out.print(
            f"Production: version {production.version}, trained as of {production.as_of}, "
            f"threshold {production.threshold:g}, "
            f"promoted {production.promoted_at:%Y-%m-%d %H:%M} UTC by {production.promoted_by}"
        )
    else:
        out.print("Production: nothing yet; `streamflow models` lists candidates, `streamflow promote` promotes one")
    table = Table("month", "state", "revision", "customers", "", box=None, header_style="bold")
    for month in months:
        note = ", ".join(month.stale or month.missing) if month.state in ("stale", "incomplete") else ""
        table.add_row(month.month, month.state, str(month.revision), f"{month.rows:,}", note)
    out.print(table if months else "No month has landed; `streamflow land FOLDER --month YYYY-MM` lands one.")
    due = "due, `streamflow run` does it" if retraining.retrain else "not due"
    out.print(f"Training again: {due}: {retraining.reason}", markup=False)
    for alarm in retraining.alarms:
        out.print(f"ALARM  {alarm.says}", markup=False)


@app.command()
def doctor(json_: AsJson = False) -> None:
    """Check this installation and tell what to do about each finding."""
    from streamflow.doctor import examine

    findings = examine(Settings.load())
    if json_:
        as_json(findings)
    else:
        for finding in findings:
            out.print(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.what}: {finding.says}", markup=False)
    if not all(finding.ok for finding in findings):
        raise StreamFlowError("something needs attention; see above")


@app.command()
def backtest(
    months: Annotated[str, typer.Option(help="YYYY-MM..YYYY-MM to simulate.")] = "2024-01..2025-12",
    users: Annotated[int, typer.Option(help="Customers in each month.")] = 2_000,
    seeds: Annotated[int, typer.Option(min=1, help="Worlds of each scenario, with the seeds 1, 2 ...")] = 10,
    scenario: Annotated[list[str] | None, typer.Option(help="Repeat it for several; all by default.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for backtest.md and backtest.png.")] = None,
    json_: AsJson = False,
) -> None:
    """Replay simulated months under retraining policies, the product's own among them; a few minutes on two cores."""
    import pandas as pd
    from rich.progress import track

    from streamflow import backtest as replay
    from streamflow import plots
    from streamflow.policy import Policy
    from streamflow.training_config import TrainingConfig

    settings = Settings.load()
    names = scenario or list(replay.SETTINGS)
    if output:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as failure:
            raise ConfigurationError(f"{output} cannot be made ({failure.strerror}); name another folder") from failure
    worlds = replay.backtest(
        names,
        _months(months),
        users=users,
        seeds=range(1, seeds + 1),
        config=TrainingConfig.load(settings.training_file),
        product=Policy.load(settings),
        jobs=os.cpu_count() or 1,
    )
    rows = pd.concat(track(worlds, "Replaying", len(names) * seeds, console=err), ignore_index=True)
    summary, by_month = replay.summarize(rows), replay.by_month(rows)
    if output:
        title = f"{seeds} worlds of {users:,} customers each"
        (output / "backtest.md").write_text(replay.markdown(summary), encoding="utf-8")
        (output / "backtest.png").write_bytes(plots.backtest_plot(by_month, title))
    if json_:
        found = {
            name: table.replace({float("nan"): None}).to_dict("records")
            for name, table in (("summary", summary), ("by_month", by_month))
        }
        as_json({"months": months, "users": users, "seeds": seeds} | found)
    else:
        _print_backtest(summary)


def _print_backtest(summary: Any) -> None:
    from streamflow import backtest as replay

    for name, policies in summary.groupby("scenario", sort=False):
        out.print(f"[bold]{name}[/bold]: {replay.SETTINGS[str(name)].about}")
        table = Table("policy", box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
        for heading in ("AUC", "log loss", "value", "trained", "live", "regret", "ours ahead by"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in policies.itertuples():
            style = {replay.OURS: "bold", replay.BEST_POSSIBLE: "dim"}.get(row.policy, "")
            cells = (f"{row.auc:.4f}", f"{row.logloss:.4f}", f"{row.value:,.0f}", *replay.comparison(row))
            table.add_row(row.policy, *cells, style=style)
        out.print(table, "")
    out.print(
        "Means over months and worlds, of held-out customers. Value: from contacting whom it pays to, in the currency\n"
        "of the fee per 1,000 customers and month. Trained: models; live: those that replaced Production. Regret: AUC\n"
        "below that of the true probabilities. Ours ahead: in AUC, ± standard error over worlds."
    )


# --- services -----------------------------------------------------------------------------------------------------


@app.command()
def env() -> None:
    """Print the variables that feast, mlflow and dagster need here, for `eval "$(streamflow env)"`."""
    from streamflow import stack

    with connected() as platform:
        for name, value in sorted(stack.environment(platform.settings, platform.database).items()):
            if value:
                sys.stdout.write(f"export {name}={shlex.quote(value)}\n")


@app.command()
def serve(
    workers: Annotated[int | None, typer.Option(min=1, max=64, help="Processes; STREAMFLOW_WORKERS, or 1.")] = None,
) -> None:
    """Run the prediction service alone."""
    _replace_by("api", **({"workers": workers} if workers else {}))


@app.command()
def key(
    name: Annotated[str, typer.Argument(help="Who will use it.")],
    json_: AsJson = False,
) -> None:
    """Make an API key, add its hash to STREAMFLOW_API_KEYS_FILE and print it, this once."""
    from streamflow.api_keys import make_key

    file = Settings.load().api_keys_file
    if file is None:
        raise ConfigurationError("set STREAMFLOW_API_KEYS_FILE to the file that is to hold the hashes of API keys")
    secret = make_key(file, name)
    if json_:
        as_json({"name": name, "key": secret, "file": str(file)})
        return
    err.print(f"The API key of {name}, which is not shown again; the service takes it from its next start:")
    out.print(secret, markup=False)


@app.command()
def service(name: Annotated[str, typer.Argument(help="mlflow, code, webserver, daemon or api.")]) -> None:
    """Run one service of the stack in the foreground, as containers do."""
    from streamflow.stack import SERVICES

    if name not in SERVICES:
        raise ConfigurationError(f"there is no service {name!r}; there are {', '.join(SERVICES)}")
    _replace_by(name)


def _replace_by(name: str, **overrides: Any) -> None:
    from streamflow import stack

    with connected(**overrides) as platform:
        command = stack.command(name, platform.settings, platform.database)
        # A shell ignores it for what runs in the background, and Dagster's code server stops its child by it.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        with subprocess.Popen(command.argv, env={**os.environ, **command.environment}) as process:
            signal.signal(signal.SIGTERM, lambda *_: process.terminate())
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the service by itself
            code = process.wait()
    sys.exit(code if code >= 0 else 128 - code)


@app.command()
def up(
    data: Annotated[Path | None, typer.Option(help="Real months; without it two months are simulated.")] = None,
    first_month: FirstMonth = FIRST_MONTH,
    policy: Annotated[str | None, typer.Option(help="manual or auto; without it policy.toml says.")] = None,
    once: Annotated[bool, typer.Option(help="Do the main job, check one prediction, print the summary, stop.")] = False,
) -> None:
    """Run the whole platform in the foreground: land, materialize, serve. Ctrl-C stops everything."""
    from streamflow.up import bring_up

    settings = Settings.load(**({"policy": policy} if policy else {}))
    sys.exit(bring_up(settings, data=data, first_month=_month(first_month), once=once, console=out))
