"""What the platform holds: the state of each month and what is in Production."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from streamflow.contract import CONTRACT, Contract
from streamflow.features import is_published
from streamflow.landing import MonthManifest
from streamflow.months import Month
from streamflow.pipeline import (
    CHURN_MODEL,
    REGISTERED_VERSION,
    TRAINING_DATASET,
    Platform,
    considered,
    earlier_sources,
)
from streamflow.promotion import Entry, Version, decision_in_force, in_force
from streamflow.warehouse import MonthWrite, month_writes

State = Literal["landed", "incomplete", "stale", "unlabelled", "complete"]

MEANINGS: Mapping[State, str] = {
    "landed": "files are in the landing zone, nothing is materialized",
    "incomplete": "materialization has not gone through",
    "stale": "something was made from data that has been replaced or added to since",
    "unlabelled": "features are online; labels.csv has not landed, so nothing is trained",
    "complete": "everything is materialized from what has landed",
}


@dataclass(frozen=True)
class MonthStatus:
    """One landed month: ``revision`` is the highest of its tables, ``rows`` the customers in users.csv."""

    month: str
    state: State
    revision: int
    rows: int
    missing: tuple[str, ...]
    stale: tuple[str, ...]

    @property
    def is_pending(self) -> bool:
        """Whether materializing the month would bring something new."""
        return self.state in ("landed", "incomplete", "stale")


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
    return {
        **{table.name: () for table in contract.tables},
        **{str(table.snapshot): tuple(dict.fromkeys((users, table.name))) for table in contract.snapshots},
        **{view.name: (view.snapshot,) for view in contract.views},
        TRAINING_DATASET: (contract.label_table.name, *(str(table.snapshot) for table in contract.snapshots)),
        CHURN_MODEL: (TRAINING_DATASET,),
        REGISTERED_VERSION: (CHURN_MODEL,),
    }


def month_status(
    manifest: MonthManifest,
    written: Mapping[str, MonthWrite],
    contract: Contract = CONTRACT,
    earlier: Sequence[MonthWrite] = (),
) -> MonthStatus:
    """Hold what has landed against what was made of it.

    ``written`` is the month's writes by relation, ``earlier`` the training datasets of the months before it.
    """
    graph = relations(contract)
    labelled = contract.label_table.name in manifest.tables
    wanted = [name for name in graph if labelled or not _needs_labels(name, graph, contract)]
    missing = tuple(name for name in wanted if name not in written)
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


def _needs_labels(relation: str, graph: Mapping[str, tuple[str, ...]], contract: Contract) -> bool:
    labels = contract.label_table.name
    return relation == labels or any(_needs_labels(source, graph, contract) for source in graph[relation])


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
    zone = platform.landing
    datasets = [writes[TRAINING_DATASET] for writes in written.values() if TRAINING_DATASET in writes]
    return [
        month_status(
            zone.manifest(month),
            written.get(month, {}),
            platform.contract,
            [one for one in datasets if one.month < month],
        )
        for month in zone.months()
    ]
