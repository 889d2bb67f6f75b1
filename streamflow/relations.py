"""What is made of a month: each relation and what it is made from, the record of it, and the state that follows.

All of it is pure, and nothing heavy is imported: the service's page tells the state of months too.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Any, Literal, TypedDict

from streamflow.contract import CONTRACT, Contract
from streamflow.months import Month

TRAINING_DATASET = "training_dataset"
CHURN_SCORES = "churn_scores"
DRIFT_REPORT: Literal["drift_report"] = "drift_report"
PERFORMANCE_REPORT: Literal["performance_report"] = "performance_report"
CHURN_MODEL = "churn_model"
REGISTERED_VERSION = "registered_model_version"
TRAINED = (CHURN_MODEL, REGISTERED_VERSION)
"""What is made when a model is trained, and not for every month."""
WATCHED = (CHURN_SCORES, DRIFT_REPORT, PERFORMANCE_REPORT)
"""What is made of every month once something is in Production."""

ONLINE_STORE = "online_store"
"""The fact of a published month that says which online store it is in; PostgreSQL where it is not stated."""
POSTGRES, REDIS = "postgres", "redis"

State = Literal["landed", "incomplete", "stale", "unlabelled", "complete"]
MEANINGS: Mapping[State, str] = {
    "landed": "files are in the landing zone, nothing is materialized",
    "incomplete": "materialization has not gone through",
    "stale": "something was made from data that has been replaced or added to since",
    "unlabelled": "features are online and scored; labels.csv has not landed, so nothing is judged or trained",
    "complete": "everything is materialized from what has landed",
}


class Source(TypedDict):
    """Which revision of a relation, and which content, something was made from."""

    revision: int
    digest: str


@dataclass(frozen=True)
class MonthWrite:
    """What a relation of the graph holds for a month.

    ``digest`` is that of the file for a table and that of the content for all else; ``sources`` gives revision and
    digest of each relation that it was made from, ``facts`` whatever else is needed to go on from it.
    """

    relation: str
    month: Month
    revision: int
    digest: str
    rows: int
    sources: Mapping[str, Source]
    written_at: datetime
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def as_source(self) -> Source:
        """How what is made from this names it."""
        return {"revision": self.revision, "digest": self.digest}


Months = Mapping[Month, Mapping[str, MonthWrite]]
"""What every month holds, by month and relation."""


def is_published(written: MonthWrite, online_store: str) -> bool:
    """Whether a view's month is in that online store (``postgres`` or ``redis``), and not in the one before it."""
    return bool(written.facts.get(ONLINE_STORE, POSTGRES) == online_store)


def in_store(
    writes: Iterable[MonthWrite], online_store: str, contract: Contract = CONTRACT
) -> dict[Month, dict[str, MonthWrite]]:
    """The writes that count, by month and relation: those of views only if they went to that online store."""
    views = {view.name for view in contract.views}
    found: dict[Month, dict[str, MonthWrite]] = {}
    for write in writes:
        if write.relation not in views or is_published(write, online_store):
            found.setdefault(write.month, {})[write.relation] = write
    return found


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


def needs_labels(relation: str, contract: Contract = CONTRACT) -> bool:
    """Whether a relation cannot be made of a month that has no labels."""
    graph = relations(contract)
    return relation == contract.label_table.name or any(needs_labels(source, contract) for source in graph[relation])


def considered(month: Month, earlier_months: int | None, datasets: Iterable[MonthWrite]) -> list[MonthWrite]:
    """Of training datasets the earlier ones, oldest first, that a model of ``month`` may learn from beside its own.

    They are those of so many calendar months before, or with None of all.
    """
    oldest = None if earlier_months is None else month.shift(-earlier_months)
    found = [one for one in datasets if one.month < month and (oldest is None or one.month >= oldest)]
    return sorted(found, key=lambda one: one.month)


def of_other_months(writes: Iterable[MonthWrite]) -> dict[str, Source]:
    """How what was made in view of other months, a model or a drift report, names what it took from them."""
    return {f"{one.relation} {one.month}": one.as_source for one in writes}


@dataclass(frozen=True)
class Standing:
    """How far a month is; ``missing`` and ``stale`` are relations, upstream first.

    ``because_of`` has those of the stale that nothing in the month itself made so, with the months that did.
    """

    state: State
    missing: tuple[str, ...]
    stale: tuple[str, ...]
    because_of: Mapping[str, tuple[Month, ...]]

    @property
    def pending(self) -> tuple[str, ...]:
        """What is to be made by itself, upstream first: all that is missing or stale but models, which need a cause."""
        due = {*self.missing, *(name for name in self.stale if name not in TRAINED)}
        return tuple(name for name in relations() if name in due)


def newest_labelled(months: Mapping[Month, Standing]) -> Month | None:
    """The newest month that has labels and of which nothing is to be made."""
    return max((month for month, one in months.items() if one.state != "unlabelled" and not one.pending), default=None)


def standing(
    landed: Mapping[str, Source],
    written: Mapping[str, MonthWrite],
    contract: Contract = CONTRACT,
    everywhere: Months = MappingProxyType({}),
    *,
    in_production: bool,
) -> Standing:
    """Hold the tables that have landed for a month against what was made of them, both by relation.

    ``everywhere`` has what every month holds, from which is told what another month has made stale. ``in_production``
    says whether there is a version to score with. A model is missing only where its training was begun.
    """
    graph = relations(contract)
    labelled = contract.label_table.name in landed
    not_wanted = {
        *(name for name in graph if not labelled and needs_labels(name, contract)),
        *(() if in_production else WATCHED),
        *(() if CHURN_MODEL in written else TRAINED),
    }
    missing = tuple(name for name in graph if name not in written and name not in not_wanted)
    stale = _stale(landed, written, graph, everywhere)
    state: State = "complete" if labelled else "unlabelled"
    if stale:
        state = "stale"
    elif missing:
        state = "incomplete" if written else "landed"
    because_of = {name: months for name, months in stale.items() if months}
    return Standing(state, missing, tuple(stale), because_of)


def _stale(
    landed: Mapping[str, Source],
    written: Mapping[str, MonthWrite],
    graph: Mapping[str, tuple[str, ...]],
    everywhere: Months,
) -> dict[str, tuple[Month, ...]]:
    """The relations that were made from content that is no longer in force, directly or further up.

    With those that nothing in their own month made stale stand the months that did.
    """
    found: dict[str, tuple[Month, ...]] = {}
    for name, sources in graph.items():
        if name not in written:
            continue
        write = written[name]
        replaced = name in landed and write.as_source != landed[name]
        outdated = any(
            source in found or (source in written and write.sources.get(source) != written[source].as_source)
            for source in sources
        )
        if replaced or outdated:
            found[name] = ()
        elif others := _changed_elsewhere(write, graph, everywhere):
            found[name] = others
    return found


def _changed_elsewhere(
    write: MonthWrite, graph: Mapping[str, tuple[str, ...]], everywhere: Months
) -> tuple[Month, ...]:
    """The other months that this was made in view of, or would be now, and of which it saw something else."""
    then = {name: source for name, source in write.sources.items() if name not in graph}
    if write.relation == CHURN_MODEL:
        datasets = [written[TRAINING_DATASET] for written in everywhere.values() if TRAINING_DATASET in written]
        others = considered(write.month, write.facts.get("earlier_months", 0), datasets)
    else:
        named = map(_named, then)
        others = [everywhere[month][relation] for relation, month in named if relation in everywhere.get(month, {})]
        then = {name: then[name] for name in of_other_months(others)}
    now = of_other_months(others)
    return tuple(sorted({_named(name)[1] for name in then.keys() | now.keys() if then.get(name) != now.get(name)}))


def _named(source: str) -> tuple[str, Month]:
    relation, _, month = source.rpartition(" ")
    return relation, Month.parse(month)
