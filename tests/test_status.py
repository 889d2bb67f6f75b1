from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, date, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from governed import evidence

from streamflow import status
from streamflow.contract import CONTRACT
from streamflow.landing import MonthManifest, Revision
from streamflow.months import Month
from streamflow.promotion import Action, Entry, Version
from streamflow.relations import Months, of_other_months
from streamflow.settings import Settings
from streamflow.status import MEANINGS, month_status, production_status, relations
from streamflow.warehouse import MonthWrite

JANUARY = Month(2024, 1)
NOW = datetime(2024, 2, 3, tzinfo=UTC)
TABLES = ("users", "subscriptions", "usage_agg_30d", "payments_agg_90d", "support_agg_90d", "labels")
VIEWS = (
    "subs_profile_fv",
    "usage_agg_30d_fv",
    "payments_agg_90d_fv",
    "support_agg_90d_fv",
    "contract_fv",
    "customer_fv",
)
SNAPSHOTS = (
    "users_snapshots",
    "subscriptions_profile_snapshots",
    "usage_agg_30d_snapshots",
    "payments_agg_90d_snapshots",
    "support_agg_90d_snapshots",
)
WATCHED = ("churn_scores", "drift_report", "performance_report")
MODEL = ("training_dataset", "churn_model", "registered_model_version")
TRAINED = ("churn_model", "registered_model_version")
EVERYTHING = (*TABLES, *SNAPSHOTS, *VIEWS, *WATCHED, *MODEL)
UNTRAINED = tuple(name for name in EVERYTHING if name not in TRAINED)


def manifest(*corrected: str, tables: Iterable[str] = TABLES) -> MonthManifest:
    """A month whose ``corrected`` tables have a second revision."""

    def revision(table: str, number: int) -> Revision:
        sha = f"{TABLES.index(table)}{number}".ljust(64, "0")
        return Revision(number, sha, 100, 1_000, "2024-02-03T00:00:00+00:00")

    return MonthManifest(
        str(JANUARY),
        {name: tuple(revision(name, n) for n in range(1, 3 if name in corrected else 2)) for name in tables},
        (),
    )


def materialized(landed: MonthManifest, *names: str, old: dict[str, MonthWrite] | None = None) -> dict[str, MonthWrite]:
    """The writes after making ``names``, in their order, from what is there."""
    writes = dict(old or {})
    graph = relations()
    for name in names:
        sources = {source: writes[source].as_source for source in graph[name]}
        if name in TABLES:
            revision = landed.current[name]
            digest, number = revision.sha256, revision.revision
        else:
            digest, number = f"{name} of {sorted(s['digest'] for s in sources.values())}", 1
        writes[name] = MonthWrite(name, JANUARY, number, digest, 100, sources, NOW)
    return writes


COMPLETE = materialized(manifest(), *relations())


def test_the_graph_is_the_one_of_the_assets() -> None:
    from streamflow_dagster.definitions import defs

    graph = defs.resolve_asset_graph()
    assets = {
        key.to_user_string(): {parent.to_user_string() for parent in graph.get(key).parent_keys}
        for key in graph.materializable_asset_keys
    }
    assert {name: set(sources) for name, sources in relations().items()} == assets


def test_the_graph_is_told_upstream_first() -> None:
    seen: set[str] = set()
    for name, sources in relations().items():
        assert set(sources) <= seen, name
        seen.add(name)
        assert len(set(sources)) == len(sources), name
    assert seen == set(EVERYTHING)
    assert relations()["users_snapshots"] == ("users",)


WITHOUT_LABELS = tuple(name for name in relations() if name not in ("labels", "performance_report", *MODEL))
UNTRAINED_IN_ORDER = tuple(name for name in relations() if name not in TRAINED)
UNSCORED = tuple(name for name in relations() if name not in WATCHED)


@pytest.mark.parametrize(
    ("landed", "written", "state", "missing"),
    [
        (manifest(), {}, "landed", UNTRAINED),
        (manifest(tables=TABLES[:-1]), {}, "landed", WITHOUT_LABELS),
        (manifest(), materialized(manifest(), "users"), "incomplete", set(UNTRAINED) - {"users"}),
        (
            manifest(),
            materialized(manifest(), *WITHOUT_LABELS),
            "incomplete",
            {"labels", "training_dataset", "performance_report"},
        ),
        (manifest(), materialized(manifest(), *list(relations())[:-1]), "incomplete", {"registered_model_version"}),
        (manifest(), materialized(manifest(), *UNSCORED), "incomplete", WATCHED),
        (manifest(), materialized(manifest(), *UNTRAINED_IN_ORDER), "complete", set()),
        (manifest(tables=TABLES[:-1]), materialized(manifest(), *WITHOUT_LABELS), "unlabelled", set()),
        (manifest(), COMPLETE, "complete", set()),
    ],
)
def test_states(landed: MonthManifest, written: dict[str, MonthWrite], state: str, missing: Iterable[str]) -> None:
    status = month_status(landed, written, in_production=True)

    assert status.state == state
    assert set(status.missing) == set(missing)
    assert status.stale == ()
    assert bool(status.pending) == (state in ("landed", "incomplete"))
    assert (status.month, status.revision, status.rows) == ("2024-01", 1, 100)
    assert status.scored == ("churn_scores" in written)
    assert state in MEANINGS


@pytest.mark.parametrize(
    ("corrected", "stale"),
    [
        ("usage_agg_30d", {"usage_agg_30d_snapshots", "usage_agg_30d_fv", *WATCHED, *MODEL}),
        ("payments_agg_90d", {"payments_agg_90d_snapshots", "payments_agg_90d_fv", *WATCHED, *MODEL}),
        ("subscriptions", {"subscriptions_profile_snapshots", "subs_profile_fv", "contract_fv", *WATCHED, *MODEL}),
        ("labels", {"performance_report", *MODEL}),
        ("users", {*SNAPSHOTS, *VIEWS, *WATCHED, *MODEL}),
    ],
)
def test_a_corrected_table_makes_stale_what_depends_on_it_and_nothing_else(corrected: str, stale: set[str]) -> None:
    status = month_status(manifest(corrected), COMPLETE, in_production=True)

    assert status.state == "stale"
    assert set(status.stale) == {corrected, *stale}
    assert status.missing == ()
    assert status.pending == tuple(name for name in relations() if name in {corrected, *stale} - set(TRAINED))
    assert status.revision == 2


def test_staleness_ends_step_by_step_as_it_is_materialized_again() -> None:
    landed, written = manifest("usage_agg_30d"), COMPLETE
    of_it = {"usage_agg_30d", "usage_agg_30d_snapshots", "usage_agg_30d_fv", *WATCHED, *MODEL}
    chain = [name for name in relations() if name in of_it]
    for number, name in enumerate(chain):
        status = month_status(landed, written, in_production=True)
        assert status.stale == tuple(chain[number:])
        assert bool(status.pending) == (number < len(chain) - 2)
        written = materialized(landed, name, old=written)
    assert month_status(landed, written, in_production=True).state == "complete"


def test_a_correction_that_changes_no_content_ends_at_the_snapshot() -> None:
    landed = manifest("usage_agg_30d")
    written = materialized(landed, "usage_agg_30d", old=COMPLETE)
    snapshot = COMPLETE["usage_agg_30d_snapshots"]
    sources = {**snapshot.sources, "usage_agg_30d": written["usage_agg_30d"].as_source}
    written = {**written, snapshot.relation: replace(snapshot, sources=sources)}
    assert month_status(landed, written, in_production=True).state == "complete"


def dataset_of(month: Month, digest: str) -> MonthWrite:
    return MonthWrite("training_dataset", month, 1, digest, 9, {}, NOW)


@pytest.mark.parametrize(
    ("earlier_months", "then", "now", "stale"),
    [
        (None, {}, {}, False),
        (None, {2: "a"}, {2: "a"}, False),
        (None, {2: "a"}, {2: "b"}, True),
        (None, {}, {2: "a"}, True),
        (None, {2: "a"}, {}, True),
        # Out of reach of a training on the month alone, or on two months before it.
        (0, {}, {2: "a"}, False),
        (2, {2: "a"}, {2: "a", 3: "c"}, False),
        (2, {2: "a"}, {2: "b", 3: "c"}, True),
    ],
)
def test_a_model_is_stale_when_its_window_would_be_chosen_among_other_months(
    earlier_months: int | None, then: dict[int, str], now: dict[int, str], stale: bool
) -> None:
    model = COMPLETE["churn_model"]
    considered = {
        f"training_dataset {JANUARY.shift(-ago)}": dataset_of(JANUARY, digest).as_source for ago, digest in then.items()
    }
    model = replace(model, sources={**model.sources, **considered}, facts={"earlier_months": earlier_months})
    written = {**COMPLETE, "churn_model": model}
    version = written["registered_model_version"]
    written["registered_model_version"] = replace(version, sources={"churn_model": model.as_source})
    everywhere = {JANUARY.shift(-ago): {"training_dataset": dataset_of(JANUARY.shift(-ago), now[ago])} for ago in now}
    found = month_status(manifest(), written, everywhere=everywhere, in_production=True)
    assert found.stale == (("churn_model", "registered_model_version") if stale else ())
    assert found.because_of == ({"churn_model": (str(JANUARY.shift(-2)),)} if stale else {})


REFERENCE = JANUARY.shift(-4)


def held_against(digest: str) -> dict[str, MonthWrite]:
    """A complete month whose drift report was held against such content of the reference."""
    against = of_other_months([snapshot_of(REFERENCE, digest)])
    report = replace(COMPLETE["drift_report"], sources={**COMPLETE["drift_report"].sources, **against})
    return {**COMPLETE, "drift_report": report}


def snapshot_of(month: Month, digest: str) -> MonthWrite:
    return MonthWrite("usage_agg_30d_snapshots", month, 1, digest, 9, {}, NOW)


@pytest.mark.parametrize(
    ("everywhere", "stale"),
    [
        ({REFERENCE: {"usage_agg_30d_snapshots": snapshot_of(REFERENCE, "a")}}, False),
        ({REFERENCE: {"usage_agg_30d_snapshots": snapshot_of(REFERENCE, "b")}}, True),
        # Of another month, of another relation, and of a reference that is no longer there.
        ({REFERENCE.shift(1): {"usage_agg_30d_snapshots": snapshot_of(REFERENCE.shift(1), "b")}}, False),
        ({REFERENCE: {"labels": replace(snapshot_of(REFERENCE, "b"), relation="labels")}}, False),
        ({}, False),
    ],
)
def test_a_drift_report_is_stale_when_the_month_that_it_was_held_against_is_another(
    everywhere: Months, stale: bool
) -> None:
    found = month_status(manifest(), held_against("a"), everywhere=everywhere, in_production=True)
    assert found.stale == found.pending == (("drift_report",) if stale else ())
    assert found.because_of == ({"drift_report": (str(REFERENCE),)} if stale else {})
    assert found.state == ("stale" if stale else "complete")


def test_what_its_own_month_made_stale_is_not_laid_to_another() -> None:
    everywhere = {REFERENCE: {"usage_agg_30d_snapshots": snapshot_of(REFERENCE, "b")}}
    found = month_status(manifest("users"), held_against("a"), everywhere=everywhere, in_production=True)
    assert "drift_report" in found.stale
    assert found.because_of == {}


def test_stale_is_said_before_incomplete() -> None:
    written = {name: write for name, write in COMPLETE.items() if name != "registered_model_version"}
    status = month_status(manifest("labels"), written, in_production=True)

    assert status.state == "stale"
    assert status.missing == ("registered_model_version",)
    assert status.stale == ("labels", "training_dataset", "performance_report", "churn_model")


def test_nothing_is_to_be_scored_while_nothing_is_in_production() -> None:
    status = month_status(manifest(), materialized(manifest(), *UNSCORED), in_production=False)
    assert (status.state, status.pending) == ("complete", ())


def test_a_second_labels_file_of_a_month_without_labels_is_no_concern_of_its_features() -> None:
    landed = manifest()
    written = materialized(manifest(tables=TABLES[:-1]), *WITHOUT_LABELS)
    assert month_status(landed, written, in_production=True).state == "incomplete"
    written = materialized(landed, "labels", "training_dataset", "performance_report", old=written)
    assert month_status(landed, written, in_production=True).state == "complete"


# --- production ---------------------------------------------------------------------------------------------------


UNSEEN: Any = None
"""The evidence, which the status does not look at."""


def version(number: int) -> Version:
    sha = "a" * 64
    as_of = date(2024, number, 28)
    return Version(number, f"run-{number}", as_of, "churn_v1", 0.4, "scorer", sha, sha, sha, UNSEEN, {}, NOW)


def entry(action: Action, number: int, by: str, day: int, threshold: float | None = None) -> Entry:
    at = datetime(2024, 3, day, tzinfo=UTC)
    seen = evidence() if threshold else None
    return Entry(at, action, number, None, by, "because", "manual", False, (), threshold, seen)


def test_production_is_what_the_ledger_says_since_when_and_by_whom() -> None:
    versions = [version(1), version(2)]
    assert production_status([], versions) is None
    assert production_status([entry("refuse", 1, "anna", 1)], versions) is None

    entries = [entry("promote", 1, "anna", 1), entry("promote", 2, "ben", 2), entry("refuse", 1, "carl", 3)]
    status = production_status(entries, versions)
    assert status is not None
    assert (status.version, status.run_id, status.as_of, status.threshold) == (2, "run-2", "2024-02-28", 0.4)
    assert (status.promoted_by, status.promoted_at) == ("ben", datetime(2024, 3, 2, tzinfo=UTC))

    status = production_status([*entries, entry("rollback", 1, "dora", 4)], versions)
    assert status is not None
    assert (status.version, status.promoted_by) == (1, "dora")


def test_a_threshold_that_was_decided_later_is_the_one_in_force() -> None:
    versions = [version(1), version(2)]
    entries = [
        entry("promote", 1, "anna", 1),
        entry("threshold", 2, "ben", 2, threshold=0.9),
        entry("threshold", 1, "carl", 3, threshold=0.2),
        entry("wait", 2, "policy", 4),
        entry("flag", 2, "mlflow", 5),
    ]
    status = production_status(entries, versions)
    assert status is not None
    assert (status.version, status.threshold) == (1, 0.2)
    assert (status.promoted_by, status.promoted_at) == ("anna", datetime(2024, 3, 1, tzinfo=UTC))

    status = production_status([*entries, entry("promote", 2, "dora", 6)], versions)
    assert status is not None
    assert (status.version, status.threshold) == (2, 0.9)


def test_every_table_of_the_contract_is_in_the_tests_list() -> None:
    assert tuple(table.name for table in CONTRACT.tables) == TABLES


def test_what_is_in_another_online_store_is_to_be_published_again(monkeypatch: pytest.MonkeyPatch) -> None:
    landing = SimpleNamespace(months=lambda: [JANUARY], manifest=lambda _: manifest())
    monkeypatch.setattr(status, "month_writes", lambda _: list(COMPLETE.values()))
    for online_store, state, missing in (("postgres", "complete", ()), ("redis", "incomplete", VIEWS)):
        platform = SimpleNamespace(
            database=None,
            landing=landing,
            contract=CONTRACT,
            settings=Settings(online_store=online_store),
            ledger=SimpleNamespace(entries=lambda: [entry("promote", 1, "anna", 1)]),
        )
        (month,) = status.month_statuses(platform)  # type: ignore[arg-type]
        assert (month.state, month.missing, bool(month.pending)) == (state, missing, state == "incomplete")
