"""The situation in which it is decided whether to train again, as PostgreSQL has it.

One query and what its answer means, for the loop, which acts on the decision, and for the service, which shows it: each
asks by its own driver. Nothing heavy is imported. The decision is retraining.py's.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import TypeVar

import msgspec

from streamflow import retraining
from streamflow.errors import ConfigurationError
from streamflow.months import Month
from streamflow.relations import DRIFT_REPORT, PERFORMANCE_REPORT
from streamflow.retraining import Correction, Performance, Production, Retraining, Situation, Size

MOST_ATTEMPTS = 3
"""How often a training is begun for one cause when its process is killed each time."""

# A version from before models chose among windows learned from its own month.
QUERY = """
    WITH production AS (
        SELECT version, lineage, coalesce(lineage -> 'window', jsonb_build_array(to_char(as_of, 'YYYY-MM'))) AS months
        FROM streamflow.model_versions
        WHERE version = (
            SELECT version FROM streamflow.promotion_ledger
            WHERE action IN ('promote', 'rollback') ORDER BY id DESC LIMIT 1
        )
    ), begun AS (
        SELECT month, cause, started_at, attempts, failure IS NOT NULL AS failed, made.version,
            EXISTS (
                SELECT FROM streamflow.promotion_ledger
                WHERE version = made.version AND action IN ('promote', 'rollback')
            ) AS promoted,
            (
                SELECT bool_or((gate ->> 'passed')::boolean) FROM jsonb_array_elements(judged.gates) AS gate
                WHERE gate ->> 'name' = 'better_than_production'
            ) AS better
        FROM streamflow.retrainings
        LEFT JOIN LATERAL (
            SELECT max(version) AS version FROM streamflow.model_versions WHERE lineage ->> 'cause' = cause
        ) AS made ON true
        LEFT JOIN LATERAL (
            SELECT gates FROM streamflow.promotion_ledger
            WHERE version = made.version AND gates <> '[]' ORDER BY id DESC LIMIT 1
        ) AS judged ON true
    )
    SELECT json_build_object(
        'production', (
            SELECT json_build_object('version', version, 'trained_on', months, 'datasets', (
                SELECT coalesce(json_object_agg(origin ->> 'month', origin #>> '{dataset,digest}'), '{}')
                FROM (
                    SELECT lineage AS origin
                    UNION ALL SELECT jsonb_array_elements(coalesce(lineage -> 'earlier', '[]'))
                ) AS origins
                WHERE months ? (origin ->> 'month')
            ))
            FROM production
        ),
        'datasets', (
            SELECT coalesce(json_object_agg(month, digest), '{}')
            FROM streamflow.month_writes WHERE relation = 'training_dataset'
        ),
        'performance', (
            SELECT coalesce(json_object_agg(month, report), '{}')
            FROM (
                SELECT DISTINCT ON (month) month, json_build_object(
                    'month', month, 'version', model_version,
                    'worse_than_promised', content -> 'worse_than_promised',
                    'no_better_than_chance', content -> 'no_better_than_chance',
                    'worse_calibrated', content -> 'worse_calibrated', 'sliding', content -> 'sliding'
                ) AS report
                FROM streamflow.reports WHERE kind = 'performance_report' ORDER BY month, id DESC
            ) AS in_force
        ),
        'drift', (
            SELECT coalesce(json_object_agg(month, report), '{}')
            FROM (
                SELECT month, json_build_object(
                    'version', model_version,
                    'features', content #> '{report,features}', 'score', content #> '{report,score}'
                ) AS report
                FROM streamflow.reports WHERE kind = 'drift_report' ORDER BY month DESC, id DESC LIMIT 1
            ) AS newest
        ),
        'begun', (SELECT coalesce(json_agg(row_to_json(begun) ORDER BY started_at, cause), '[]') FROM begun)
    )::text
"""
"""One row of one document, which `read` understands; without parameters, whose marks drivers write differently."""

_Report = TypeVar("_Report")


class InProduction(msgspec.Struct, frozen=True):
    """The version in Production, the months it learned from, and the digest of the dataset of each."""

    version: int
    trained_on: tuple[str, ...]
    datasets: Mapping[str, str | None]


class Begun(msgspec.Struct, frozen=True):
    """A retraining that was begun, and what came of it so far.

    ``better`` says whether its version passed the gate against Production, None where it was not asked.
    """

    month: str
    cause: str
    started_at: datetime
    attempts: int
    failed: bool
    version: int | None
    promoted: bool
    better: bool | None

    @property
    def is_over(self) -> bool:
        """Whether it ended; one whose process was killed may be begun again, up to ``MOST_ATTEMPTS`` times."""
        return self.version is not None or self.failed or self.attempts >= MOST_ATTEMPTS

    @property
    def helped(self) -> bool | None:
        """Whether its version was better than the one it was to replace; None as long as nobody knows."""
        return (self.promoted or None) if self.better is None else self.better


class _Feature(msgspec.Struct, frozen=True):
    name: str
    significant: bool
    size: Size


class _Drift(msgspec.Struct, frozen=True):
    version: int
    features: tuple[_Feature, ...]
    score: _Feature


class Known(msgspec.Struct, frozen=True):
    """What `QUERY` answers; ``datasets`` has the digest of each month's training dataset as it is now.

    By month, ``performance`` has the reports in force, ``drift`` that of the newest month alone. ``begun`` has the
    retrainings in the order in which they were begun.
    """

    production: InProduction | None
    datasets: Mapping[str, str]
    performance: Mapping[str, msgspec.Raw]
    drift: Mapping[str, msgspec.Raw]
    begun: tuple[Begun, ...]

    def situation(self, newest: Month | None) -> Situation:
        """The situation with ``newest`` as the newest month that has labels.

        Raises ConfigurationError for a report of another version of this program.
        """
        performance = None if newest is None else self.performance.get(str(newest))
        over = [one for one in self.begun if one.is_over]
        return Situation(
            newest,
            self._production(),
            None if performance is None else _read(performance, Performance, PERFORMANCE_REPORT, str(newest)),
            self._drift(),
            self._corrections(),
            tuple(Retraining(Month.parse(one.month), one.cause, one.promoted, one.helped) for one in over),
        )

    def _production(self) -> Production | None:
        if self.production is None:
            return None
        return Production(self.production.version, tuple(sorted(map(Month.parse, self.production.trained_on))))

    def _drift(self) -> retraining.Drift | None:
        if not self.drift:
            return None
        ((month, report),) = self.drift.items()
        found = _read(report, _Drift, DRIFT_REPORT, month)
        drifting = [one for one in found.features if one.significant]
        return retraining.Drift(
            Month.parse(month),
            found.version,
            tuple(one.name for one in drifting),
            tuple(one.name for one in drifting if one.size in ("moderate", "large")),
            tuple(one.name for one in drifting if one.size == "large"),
            found.score.size if found.score.significant else "none",
        )

    def _corrections(self) -> tuple[Correction, ...]:
        """The months that Production learned from whose dataset is another one now."""
        learned = self.production.datasets if self.production else {}
        return tuple(
            Correction(Month.parse(month), self.datasets[month])
            for month, digest in sorted(learned.items())
            if month in self.datasets and self.datasets[month] != digest
        )


def read(document: str) -> Known:
    """What the document that `QUERY` answers says."""
    return msgspec.json.decode(document, type=Known)


def _read(document: msgspec.Raw, kind: type[_Report], name: str, month: str) -> _Report:
    try:
        return msgspec.json.decode(document, type=kind)
    except msgspec.ValidationError as failure:
        raise made_by_another(name, month, failure) from failure


def made_by_another(kind: str, month: str, failure: Exception) -> ConfigurationError:
    """The refusal of a report that another version of this program has made."""
    return ConfigurationError(
        f"the {kind} of {month} was made by another version of StreamFlow ({failure}); run: streamflow run {month}"
    )
