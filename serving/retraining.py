"""Whether the platform trains again, and what of that a person must look at: decided as the loop decides it.

The decision is retraining.py's of the core, on what the same tables say. Months are as the warehouse has them: of files
that have landed and are not loaded yet, the loop knows more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from serving.months import MonthMade, months_made
from serving.postgres import Postgres
from streamflow import situation
from streamflow.contract import Contract
from streamflow.errors import ConfigurationError
from streamflow.months import Month
from streamflow.policy import Policy
from streamflow.relations import newest_labelled
from streamflow.retraining import RetrainingDecision, should_retrain
from streamflow.settings import Settings
from streamflow.situation import Begun, Known


@dataclass(frozen=True)
class Loop:
    """Where the closed loop stands: months, the newest first, retrainings begun, the oldest first, and the decision.

    ``decision`` is None where it cannot be made, for the reason in ``undecided``.
    """

    months: Mapping[Month, MonthMade]
    begun: Sequence[Begun]
    decision: RetrainingDecision | None
    undecided: str | None = None


async def read_loop(postgres: Postgres, contract: Contract, settings: Settings) -> Loop:
    """Read the tables and the policy file as they are now; raises WarehouseUnavailable."""
    ((document,),) = await postgres.fetch(situation.QUERY)
    known = situation.read(document)
    in_production = known.production is not None
    months = await months_made(postgres, contract, settings.online_store, in_production=in_production)
    try:
        decision = _decision(known, months, settings)
    except ConfigurationError as refusal:
        return Loop(months, known.begun, None, str(refusal))
    return Loop(months, known.begun, decision)


def _decision(known: Known, months: Mapping[Month, MonthMade], settings: Settings) -> RetrainingDecision:
    newest = newest_labelled({month: made.standing for month, made in months.items()})
    return should_retrain(known.situation(newest), Policy.load(settings).retraining)
