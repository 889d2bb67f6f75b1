"""What the platform holds: the state of each month and what is in Production."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from streamflow.contract import CONTRACT, Contract
from streamflow.features import is_published
from streamflow.landing import MonthManifest
from streamflow.monitoring import DRIFT_REPORT, PERFORMANCE_REPORT
from streamflow.months import Month
from streamflow.pipeline import (
    CHURN_MODEL,
    REGISTERED_VERSION,
    TRAINING_DATASET,
    Platform,
    considered,
    earlier_sources,
)
from streamflow.promotion import Entry, Version, current, decision_in_force, in_force
from streamflow.scores import CHURN_SCORES
from streamflow.warehouse import MonthWrite, month_writes

TRAINED = (CHURN_MODEL, REGISTERED_VERSION)
"""What is made when a model is trained, and not for every month."""
WATCHED = (CHURN_SCORES, DRIFT_REPORT, PERFORMANCE_REPORT)
"""What is made of every month once something is in Production."""
State = Literal["landed", "incomplete", "stale", "unlabelled", "complete"]

MEANINGS: Mapping[State, str] = {
    "landed": "files are in the landing zone, nothing is materialized",
    "incomplete": "materialization has not gone through",
    "stale": "something was made from data that has been replaced or added to since",
    "unlabelled": "features are online and scored; labels.csv has not landed, so nothing is judged or trained",
    "complete": "everything is materialized from what has landed",
}


@dataclass(frozen=True)
class MonthStatus:
    """One landed month: ``revision`` is the highest of its tables, ``rows`` the customers in users.csv.

    ``missing`` and ``stale`` are relations, upstream first. A model is missing only where its training was begun.
    """

    month: str
    state: State
    revision: int
    rows: int
    missing: tuple[str, ...]
    stale: tuple[str, ...]

    @property
    def pending(self) -> tuple[str, ...]:
        """What is to be made by itself, upstream first: all that is missing or stale but models, which need a cause."""
        due = {*self.missing, *(name for name in self.stale if name not in TRAINED)}
        return tuple(name for name in relations() if name in due)

    @property
    def is_pending(self) -> bool:
        """Whether something is to be made by itself."""
        return bool(self.pending)


@dataclass(frozen=True)
class ProductionStatus:
    """The version in Production."""

    version: int
    run_id: str
    as_of: str
    threshold: float
    promoted_at: datetime
    promoted_by: str


def relations(contract: Contract = CONTRACT) -> dict[str, tuple[str, ...]]:
    """Every relation of the graph, upstream first, with what it is made from."""
    users = contract.tables[0].name
    snapshots = tuple(str(table.snapshot) for table in contract.snapshots)
    return {
        **{table.name: () for table in contract.tables},
        **{str(table.snapshot): tuple(dict.fromkeys((users, table.name))) for table in contract.snapshots},
        **{view.name: (view.snapshot,) for view in contract.views},
        TRAINING_DATASET: (contract.label_table.name, *snapshots),
        CHURN_SCORES: snapshots,
        DRIFT_REPORT: (*snapshots, CHURN_SCORES),
        PERFORMANCE_REPORT: (TRAINING_DATASET, CHURN_SCORES),
        CHURN_MODEL: (TRAINING_DATASET,),
        REGISTERED_VERSION: (CHURN_MODEL,),
    }


def month_status(
    manifest: MonthManifest,
    written: Mapping[str, MonthWrite],
    contract: Contract = CONTRACT,
    earlier: Sequence[MonthWrite] = (),
    *,
    in_production: bool,
) -> MonthStatus:
    """Hold what has landed against what was made of it.

    ``written`` is the month's writes by relation, ``earlier`` the training datasets of the months before it.
    ``in_production`` says whether there is a version to score with.
    """
    graph = relations(contract)
    labelled = contract.label_table.name in manifest.tables
    not_wanted = {
        *(name for name in graph if not labelled and needs_labels(name, contract)),
        *(() if in_production else WATCHED),
        *(() if CHURN_MODEL in written else TRAINED),
    }
    missing = tuple(name for name in graph if name not in written and name not in not_wanted)
    stale = tuple(_stale(manifest, written, graph, earlier))
    state: State = "complete" if labelled else "unlabelled"
    if stale:
        state = "stale"
    elif missing:
        state = "incomplete" if written else "landed"
    current_revisions = manifest.current
    return MonthStatus(
        manifest.month,
        state,
        max(revision.revision for revision in current_revisions.values()),
        current_revisions[contract.tables[0].name].rows,
        missing,
        stale,
    )


def needs_labels(relation: str, contract: Contract = CONTRACT) -> bool:
    """Whether a relation cannot be made of a month that has no labels."""
    graph = relations(contract)
    return relation == contract.label_table.name or any(needs_labels(source, contract) for source in graph[relation])


def _stale(
    manifest: MonthManifest,
    written: Mapping[str, MonthWrite],
    graph: Mapping[str, tuple[str, ...]],
    earlier: Sequence[MonthWrite],
) -> Iterable[str]:
    """The relations that were made from content that is no longer in force, directly or further up."""
    found: set[str] = set()
    for name, sources in graph.items():
        if name not in written:
            continue
        write = written[name]
        landed = manifest.current.get(name)
        replaced = landed is not None and (write.revision, write.digest) != (landed.revision, landed.sha256)
        outdated = any(
            source in found or (source in written and write.sources.get(source) != written[source].as_source)
            for source in sources
        )
        if replaced or outdated or (name == CHURN_MODEL and _considered_others(write, earlier)):
            found.add(name)
            yield name


def _considered_others(model: MonthWrite, earlier: Sequence[MonthWrite]) -> bool:
    """Whether a model's window was chosen in view of other datasets of earlier months than it would be now."""
    then = {name: source for name, source in model.sources.items() if name != TRAINING_DATASET}
    return then != earlier_sources(considered(model.month, model.facts.get("earlier_months", 0), earlier))


def production_status(entries: list[Entry], versions: Iterable[Version]) -> ProductionStatus | None:
    """What the ledger says is in Production, since when, by whom and at which threshold; None while nothing is."""
    entry = decision_in_force(entries)
    if entry is None:
        return None
    version = in_force(entries, next(version for version in versions if version.version == entry.version))
    return ProductionStatus(version.version, version.run_id, str(version.as_of), version.threshold, entry.at, entry.by)


def month_statuses(platform: Platform) -> list[MonthStatus]:
    """The state of every landed month, oldest first."""
    written: dict[Month, dict[str, MonthWrite]] = {}
    views = {view.name for view in platform.contract.views}
    for write in month_writes(platform.database):
        if write.relation not in views or is_published(write, platform.settings.online_store):
            written.setdefault(write.month, {})[write.relation] = write
    zone, contract = platform.landing, platform.contract
    in_production = current(platform.ledger.entries()) is not None
    datasets = [writes[TRAINING_DATASET] for writes in written.values() if TRAINING_DATASET in writes]
    return [
        month_status(
            zone.manifest(month),
            written.get(month, {}),
            contract,
            [one for one in datasets if one.month < month],
            in_production=in_production,
        )
        for month in zone.months()
    ]
