"""What the platform holds: the state of each month and what is in Production."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType

from streamflow.contract import CONTRACT, Contract
from streamflow.landing import MonthManifest
from streamflow.months import Month
from streamflow.pipeline import Platform
from streamflow.promotion import Entry, Version, current, decision_in_force, in_force
from streamflow.relations import CHURN_SCORES, Months, MonthWrite, Source, Standing, in_store, standing
from streamflow.relations import MEANINGS as MEANINGS
from streamflow.relations import TRAINED as TRAINED
from streamflow.relations import WATCHED as WATCHED
from streamflow.relations import State as State
from streamflow.relations import needs_labels as needs_labels
from streamflow.relations import relations as relations
from streamflow.warehouse import month_writes


@dataclass(frozen=True)
class MonthStatus:
    """One landed month: ``revision`` is the highest of its tables, ``rows`` the customers in users.csv.

    ``missing`` and ``stale`` are relations, upstream first. A model is missing only where its training was begun.
    ``because_of`` has those of the stale that nothing in the month itself made so, with the months that did. ``scored``
    says whether its customers have scores, which then keep their version.
    """

    month: str
    state: State
    revision: int
    rows: int
    missing: tuple[str, ...]
    stale: tuple[str, ...]
    because_of: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    scored: bool = False

    @property
    def standing(self) -> Standing:
        """How far the month is."""
        because_of = {name: tuple(map(Month.parse, months)) for name, months in self.because_of.items()}
        return Standing(self.state, self.missing, self.stale, because_of)

    @property
    def pending(self) -> tuple[str, ...]:
        """What is to be made by itself, upstream first."""
        return self.standing.pending


@dataclass(frozen=True)
class ProductionStatus:
    """The version in Production."""

    version: int
    run_id: str
    as_of: str
    threshold: float
    promoted_at: datetime
    promoted_by: str


def month_status(
    manifest: MonthManifest,
    written: Mapping[str, MonthWrite],
    contract: Contract = CONTRACT,
    everywhere: Months = MappingProxyType({}),
    *,
    in_production: bool,
) -> MonthStatus:
    """Hold what has landed against what was made of it.

    ``written`` is the month's writes by relation, ``everywhere`` those of every month. ``in_production`` says whether
    there is a version to score with.
    """
    current_revisions = manifest.current
    landed: dict[str, Source] = {
        name: {"revision": one.revision, "digest": one.sha256} for name, one in current_revisions.items()
    }
    stands = standing(landed, written, contract, everywhere, in_production=in_production)
    return MonthStatus(
        manifest.month,
        stands.state,
        max(revision.revision for revision in current_revisions.values()),
        current_revisions[contract.tables[0].name].rows,
        stands.missing,
        stands.stale,
        {name: tuple(map(str, months)) for name, months in stands.because_of.items()},
        scored=CHURN_SCORES in written,
    )


def production_status(entries: list[Entry], versions: Iterable[Version]) -> ProductionStatus | None:
    """What the ledger says is in Production, since when, by whom and at which threshold; None while nothing is."""
    entry = decision_in_force(entries)
    if entry is None:
        return None
    version = in_force(entries, next(version for version in versions if version.version == entry.version))
    return ProductionStatus(version.version, version.run_id, str(version.as_of), version.threshold, entry.at, entry.by)


def month_statuses(platform: Platform) -> list[MonthStatus]:
    """The state of every landed month, oldest first."""
    zone, contract = platform.landing, platform.contract
    written = in_store(month_writes(platform.database), platform.settings.online_store, contract)
    in_production = current(platform.ledger.entries()) is not None
    return [
        month_status(
            zone.manifest(month),
            written.get(month, {}),
            contract,
            written,
            in_production=in_production,
        )
        for month in zone.months()
    ]
