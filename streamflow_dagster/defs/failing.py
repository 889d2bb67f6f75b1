"""How steps and ticks fail: the first line that Dagster shows says what is wrong and what to do.

Dagster puts a line of its own before the message of an exception, except of the two kinds that are raised here.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from dagster import (
    AssetCheckResult,
    AssetCheckSeverity,
    AssetExecutionContext,
    DagsterError,
    Failure,
    MaterializeResult,
)

from streamflow.errors import StreamFlowError

_Tick = TypeVar("_Tick", bound=Callable[..., Any])


class TickFailed(DagsterError):
    """A sensor could not find out what is to be done; the message says why and what to do."""


def fails_plainly(compute: Callable[..., Any]) -> Callable[..., Iterator[MaterializeResult]]:
    """The same asset, whose failed step begins with the message of the refusal, or of the checks that block.

    The checks' outcomes are recorded all the same. What was raised stays below as the cause.
    """

    @functools.wraps(compute)
    def computed(context: AssetExecutionContext, **given: Any) -> Iterator[MaterializeResult]:
        again = f"run: streamflow run {context.partition_key}"
        try:
            made = compute(context, **given)
            results: list[MaterializeResult] = list(made) if isinstance(made, Iterator) else [made]
        except StreamFlowError as refusal:
            raise Failure(str(refusal)) from refusal
        except Exception as defect:
            reason = f"unforeseen {type(defect).__name__}: {defect}; see the traceback below, then {again}"
            raise Failure(reason) from defect
        yield from results
        if blocking := [one for result in results for one in _blocking(result.check_results or ())]:
            found = "; ".join(f"{one.check_name} failed ({one.description})" for one in blocking)
            raise Failure(f"{found}, so nothing is made of it; land corrected files if they are wrong, then {again}")

    computed.__annotations__ = {**compute.__annotations__, "return": Iterator[MaterializeResult]}
    return computed


def _blocking(checks: Sequence[AssetCheckResult]) -> list[AssetCheckResult]:
    return [one for one in checks if not one.passed and one.severity is AssetCheckSeverity.ERROR]


def ticks_plainly(evaluate: _Tick) -> _Tick:
    """The same sensor, whose failed tick begins with the message of the refusal."""

    @functools.wraps(evaluate)
    def evaluated(*given: Any, **named: Any) -> Any:
        try:
            return evaluate(*given, **named)
        except StreamFlowError as refusal:
            raise TickFailed(str(refusal)) from refusal

    return evaluated  # type: ignore[return-value]
