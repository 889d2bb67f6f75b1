"""The training configuration: how a month's model is chosen, fitted and measured, as training.toml states it.

What the file may say, and that it makes sense, belongs here; what is done with it belongs to the modules that do it.
Which hyper-parameters an estimator has is known to scikit-learn, so that `training.bare_classifier` checks them.
"""

import hashlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from streamflow.contract import CONTRACT, Contract
from streamflow.errors import ConfigurationError
from streamflow.settings import read_toml
from streamflow.training import ESTIMATORS

Positive = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(gt=0, le=1)]
Inside = Annotated[float, Meta(gt=0, lt=1)]
LARGEST_FLOAT = 1e16
WindowName = Annotated[str, Meta(pattern=r"^(month|all|recent|last ([2-9]|[1-9][0-9]+))$")]


class Windows(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which windows of months may be learned from, simplest first; see `windows.candidates`."""

    names: Annotated[tuple[WindowName, ...], Meta(min_length=1)]
    half_life_months: Positive
    estimator: str


class Value(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What acting on a prediction costs and brings, in the currency of the fee; see `value.py`."""

    contact_cost: Annotated[float, Meta(ge=0)]
    retained_share: Share
    months_retained: Positive


class Threshold(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the threshold of a version is chosen; ``capacity`` is how many customers of a month can be contacted."""

    rule: Literal["value", "capacity", "fixed"]
    capacity: Annotated[int, Meta(ge=1)] | None = None
    fixed: Inside | None = None


class Segments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The groups of customers to report by: the values of attributes, and bands of numbers between given edges."""

    attributes: tuple[str, ...]
    bands: dict[str, tuple[float, ...]] = {}


class Guards(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is not trained on, and what is flagged."""

    minimum_positives: Annotated[int, Meta(ge=2)]
    suspicious_auc: Annotated[float, Meta(gt=0.5, le=1)]


class TrainingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """See training.toml. ``services`` and ``candidates`` are in the order of their simplicity, simplest first.

    ``candidates`` are the names of ``estimators`` to choose from. The order of a table's keys never counts.
    """

    seed: Annotated[int, Meta(ge=0, lt=2**32)]
    folds: Annotated[int, Meta(ge=2)]
    bootstrap_draws: Annotated[int, Meta(ge=1000)]
    importance_repeats: Annotated[int, Meta(ge=2)]
    services: Annotated[tuple[str, ...], Meta(min_length=1)]
    candidates: Annotated[tuple[str, ...], Meta(min_length=1)]
    windows: Windows
    estimators: Annotated[dict[str, dict[str, Any]], Meta(min_length=1)]
    value: Value
    threshold: Threshold
    segments: Segments
    guards: Guards

    @classmethod
    def load(cls, path: Path, contract: Contract = CONTRACT) -> "TrainingConfig":
        """Read the file; raises ConfigurationError that names the file and the key that cannot be used."""
        config = read_toml(path, cls, "the training configuration")
        if faults := list(config._faults(contract)):
            reason = "; ".join((*faults, "correct the file"))
            raise ConfigurationError(f"the training configuration {path} cannot be used: {reason}")
        return config

    @classmethod
    def of_document(cls, document: Mapping[str, Any]) -> "TrainingConfig":
        """The configuration that `document` came from; raises ConfigurationError if it is none of this version's."""
        try:
            return msgspec.convert(document, cls)
        except msgspec.ValidationError as failure:
            raise ConfigurationError(f"the recorded training configuration cannot be used: {failure}") from None

    @property
    def document(self) -> dict[str, Any]:
        """The configuration as plain data, for the record of a run."""
        return msgspec.to_builtins(self)  # type: ignore[no-any-return]

    @property
    def digest(self) -> str:
        """SHA-256 of what the file says; comments, spacing and the order of keys do not count."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()

    def _faults(self, contract: Contract) -> Iterator[str]:
        """What the file says that no model can be chosen, fitted or measured by."""
        yield from _not_recordable("", self.document)
        yield from _unknown("services", self.services, [service.name for service in contract.services])
        listed = {"services": self.services, "candidates": self.candidates, "windows.names": self.windows.names}
        for key, names in listed.items():
            if repeated := sorted({name for name in names if names.count(name) > 1}):
                yield f"{key} has {', '.join(repeated)} more than once"
        yield from _unknown("estimators", self.estimators, ESTIMATORS)
        yield from _unknown("candidates", self.candidates, self.estimators)
        yield from _unknown("windows.estimator", [self.windows.estimator], self.estimators)
        groups = [column.name for column in contract.features if column.kind in ("category", "boolean")]
        numbers = [column.name for column in contract.features if column.kind in ("integer", "float")]
        yield from _unknown("segments.attributes", self.segments.attributes, groups)
        yield from _unknown("segments.bands", self.segments.bands, numbers)
        for name, edges in self.segments.bands.items():
            if not edges or any(low >= high for low, high in pairwise(edges)):
                yield f"segments.bands.{name} needs edges, each above the one before"
        rule = self.threshold.rule
        if rule == "capacity" and self.threshold.capacity is None:
            yield 'threshold.capacity is needed for rule = "capacity"'
        if (rule == "fixed") != (self.threshold.fixed is not None):
            yield f'threshold.fixed is for rule = "fixed" and needed there; the rule is "{rule}"'


def _unknown(key: str, names: Iterable[str], known: Collection[str]) -> Iterator[str]:
    for name in names:
        if name not in known:
            yield f"{key} has {name!r}; known are {', '.join(known)}"


def _not_recordable(key: str, value: object) -> Iterator[str]:
    """What a record in PostgreSQL could not give back as it is here: its JSON has 1e16 as a whole number."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _not_recordable(f"{key}.{name}" if key else name, inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _not_recordable(key, inner)
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{key} is {value}, which is no finite number"
    elif isinstance(value, float) and abs(value) >= LARGEST_FLOAT:
        yield f"{key} is {value}; floats must be below {LARGEST_FLOAT:g}, write a whole number without exponent instead"
