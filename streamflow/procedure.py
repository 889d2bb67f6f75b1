"""The training procedure: from a month's dataset to a chosen, fitted, compiled and measured model, all in memory.

The order of the steps and what is measured of a model belong here. How each is done is in the modules that are called;
storing what comes out is pipeline.py's.
"""

import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from streamflow import evaluation, scoring, selection, training, value, windows
from streamflow.contract import CONTRACT, USER_ID, Column, Contract, FeatureService
from streamflow.dataset import TrainingDataset, on_both_sides
from streamflow.errors import ConfigurationError, TrainingRefused
from streamflow.gates import NOT_TAKEN, Evidence, Invariance
from streamflow.policy import InvarianceRule, Policy
from streamflow.training_config import Segments, TrainingConfig

if TYPE_CHECKING:
    from streamflow.months import Month
    from streamflow.scoring import Scorer

NAMED_THRESHOLD = 0.5
TIMED_ROWS = 32
TIMED_ROUNDS = 15
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Procedure:
    """What is done with a dataset: choose the window, then among ``services`` and the estimators, then fit.

    With ``estimator`` nothing is chosen: it is fitted as it comes on the month alone and the first of ``services``, not
    calibrated, with a threshold of 0.5, for comparison with published figures.
    """

    config: TrainingConfig
    services: tuple[FeatureService, ...]
    estimator: str | None = None

    @classmethod
    def of(
        cls,
        config: TrainingConfig,
        policy: Policy,
        *,
        estimator: str | None = None,
        service: str | None = None,
        contract: Contract = CONTRACT,
    ) -> "Procedure":
        """The procedure that configuration and policy state; ``service`` restricts it to one feature service.

        Raises ConfigurationError for an estimator or service that training.toml does not have, and when the policy
        leaves no service to train on.
        """
        if estimator is not None and estimator not in config.estimators:
            known = ", ".join(config.estimators)
            raise ConfigurationError(f"there is no estimator {estimator!r}; training.toml has {known}")
        if service is not None and service not in config.services:
            known = ", ".join(config.services)
            raise ConfigurationError(f"there is no feature service {service!r} to train on; training.toml has {known}")
        wanted = [contract.service(name) for name in config.services if service in (None, name)]
        allowed = tuple(one for one in wanted if not one.protected or policy.protected_attributes == "predict")
        if not allowed:
            raise ConfigurationError(
                f"the policy lets no model predict from protected attributes, and {service or 'every service'} of "
                'training.toml does; add another service, or set protected_attributes = "predict" in policy.toml'
            )
        return cls(config, allowed, estimator)

    def windows(self, month: "Month", labelled: Iterable["Month"]) -> list[windows.Window]:
        """The windows that a model of ``month`` is chosen among, where the months ``labelled`` have datasets."""
        if self.estimator is not None:
            return [windows.Window(windows.MONTH_ALONE, (month,))]
        return windows.candidates(month, labelled, self.config.windows)

    @property
    def earlier_months(self) -> int | None:
        """How many calendar months before its own a model may learn from; None for every one."""
        return 0 if self.estimator is not None else windows.earlier_months(self.config.windows)

    @property
    def document(self) -> dict[str, Any]:
        """The procedure as plain data, enough to follow it again."""
        return {
            "config": self.config.document,
            "config_digest": self.config.digest,
            "seed": self.config.seed,
            "services": [service.name for service in self.services],
            "estimator_by_name": self.estimator,
        }

    @classmethod
    def of_document(cls, document: Mapping[str, Any], contract: Contract = CONTRACT) -> "Procedure":
        """The procedure that `document` came from."""
        services = tuple(contract.service(name) for name in document["services"])
        return cls(TrainingConfig.of_document(document["config"]), services, document["estimator_by_name"])


@dataclass(frozen=True)
class Candidate:
    """A fitted and compiled model: ``probabilities`` are the scorer's of every row, ``seconds`` those of each step.

    ``data`` is the newest month's, of which ``probabilities`` and everything measured are; ``earlier`` are the other
    months that ``window`` was chosen among.
    """

    data: TrainingDataset
    earlier: tuple[TrainingDataset, ...]
    procedure: Procedure
    window: windows.Choice
    selection: selection.Selection | None
    model: training.TrainedModel
    threshold_reason: str
    artifact: bytes
    scorer: "Scorer"
    probabilities: Floats
    parity: scoring.Parity
    seconds: Mapping[str, float]

    @property
    def labels(self) -> NDArray[np.bool_]:
        """The labels of the held-out rows."""
        return self.data.labels[self.data.holdout]

    @property
    def validation(self) -> Floats:
        """The probabilities of the held-out rows."""
        return self.probabilities[self.data.holdout]

    @cached_property
    def artifact_sha256(self) -> str:
        """The digest of the compiled scorer."""
        return scoring.sha256(self.artifact)

    @cached_property
    def predictions_digest(self) -> str:
        """The digest of the probabilities of every row."""
        return predictions_digest(self.data.frame[USER_ID].tolist(), self.probabilities)


@dataclass(frozen=True)
class Measured:
    """What was measured of a candidate on its held-out users, beyond what gates need; ``seconds`` as in `Candidate`."""

    evidence: Evidence
    capture: evaluation.Capture
    value: value.ValueReport
    importances: pd.DataFrame
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Forward:
    """How a model of one month does on the held-out users of the next, as intervals of 95 %."""

    trained_on: "Month"
    month: "Month"
    users: int
    metrics: dict[str, evaluation.Interval]


@dataclass
class _Clock:
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[step] = time.perf_counter() - started


def run(
    data: TrainingDataset,
    procedure: Procedure,
    contract: Contract = CONTRACT,
    *,
    earlier: Sequence[TrainingDataset] = (),
) -> Candidate:
    """Choose, fit, compile, and score every row of the dataset by the pipeline and by the compiled scorer.

    The model is of the month of ``data``; datasets of ``earlier`` months may be learned from too, if that predicts the
    users of this month better. Where it does not, the result is the same to the bit as without them.

    Raises TrainingRefused for data that must not be trained on, ConfigurationError for a configuration that cannot be
    followed on it.
    """
    config, clock, cores = procedure.config, _Clock(), os.cpu_count() or 1
    choices = procedure.windows(data.month, [one.month for one in earlier])
    by_month = {one.month: one for one in (*earlier, data)}
    of_months = {month: by_month[month].training_rows for window in choices for month in window.months}
    held_out = data.holdout_rows[USER_ID].tolist()
    for month, of_month in of_months.items():
        if both := on_both_sides(of_month[USER_ID].tolist(), held_out):
            raise TrainingRefused(
                f"{len(both)} users to learn from in {month} are in the hold-out of {data.month}, such as {both[0]}"
            )
    training.require_trainable(of_months[data.month], data.label, config)
    if len(np.unique(data.labels[data.holdout])) < 2:
        raise TrainingRefused(
            f"the {data.holdout.sum()} held-out users of {data.month} do not have both values of {data.label}; "
            "more users are needed to measure a model"
        )
    with clock.timed("windows"):
        window = windows.choose(choices, of_months, data.label, procedure.services[-1], config, n_jobs=cores)
    rows = windows.pool(window.window, of_months)
    chosen: selection.Selection | None = None
    with clock.timed("selection"):
        if procedure.estimator is None:
            chosen = selection.select(rows, data.label, procedure.services, config, n_jobs=cores)
    spec, reason = _spec(data, procedure, chosen, contract)
    with clock.timed("fit"):
        model = training.fit(rows, data.label, spec, config, n_jobs=cores)
    with clock.timed("compile"):
        artifact = scoring.compile_pipeline(model, data)
        scorer = scoring.Scorer.from_bytes(artifact)
        scoring.self_test(scorer)
    with clock.timed("parity"):
        probabilities = score(scorer, data.frame)
        parity = scoring.parity(model.probabilities(data.frame), probabilities, model.threshold)
    return Candidate(
        data,
        tuple(one for one in earlier if one.month in of_months),
        procedure,
        window,
        chosen,
        model,
        reason,
        artifact,
        scorer,
        probabilities,
        parity,
        clock.seconds,
    )


def _spec(
    data: TrainingDataset, procedure: Procedure, chosen: selection.Selection | None, contract: Contract
) -> tuple[training.ModelSpec, str]:
    if chosen is None:
        named = training.ModelSpec(str(procedure.estimator), procedure.services[0], False, NAMED_THRESHOLD)
        return named, f"{NAMED_THRESHOLD:g}, as for every model that is trained by name"
    rows = data.training_rows
    threshold = value.choose_threshold(
        rows[data.label].to_numpy(dtype=np.bool_),
        chosen.probabilities,
        rows[contract.fee].to_numpy(dtype=np.float64),
        procedure.config,
        customers=len(data.frame),
    )
    spec = training.ModelSpec(chosen.estimator, chosen.service, chosen.calibrated, threshold.threshold)
    return spec, threshold.reason


def score(scorer: "Scorer", rows: pd.DataFrame) -> Floats:
    """The scorer's probability of each row of a dataset."""
    return scorer.score_columns({feature.name: rows[feature.name].to_numpy() for feature in scorer.features})


def measure(candidate: Candidate, policy: Policy, contract: Contract = CONTRACT) -> Measured:
    """Measure a candidate on the users that it has not seen, with intervals, by segment, in money, and for its gates.

    What only the registry and the online store can tell of it is left as the evidence's defaults.
    """
    from threadpoolctl import threadpool_limits

    data, config, clock = candidate.data, candidate.procedure.config, _Clock()
    rows, labels, probabilities = data.holdout_rows, candidate.labels, candidate.validation
    threshold, drawn = candidate.model.threshold, {"seed": config.seed, "draws": config.bootstrap_draws}
    with clock.timed("bootstrap"):
        quality = _quality(data, candidate.probabilities, threshold, config, contract)
        capture = evaluation.capture(labels, probabilities, **drawn)
        perfect = evaluation.perfect_ece(probabilities, **drawn)
    # The limit holds for the process: set once around the threads, or one's end would lift it for the others.
    with clock.timed("importances"), threadpool_limits(limits=1):
        importances = evaluation.permutation_importances(
            candidate.model.probabilities,
            rows,
            labels,
            candidate.model.service.names,
            seed=config.seed,
            repeats=config.importance_repeats,
            threads=os.cpu_count() or 1,
        )
    with clock.timed("checks"):
        leaks = possible_leaks(data, config, contract)
        invariances = tuple(_invariance(candidate.scorer, rows, rule, contract) for rule in policy.invariances)
        microseconds = _microseconds_of_one_row(candidate)
    evidence = Evidence(
        users=len(labels),
        churned=int(labels.sum()),
        perfect_ece=perfect,
        **quality,
        parity_difference=candidate.parity.max_difference,
        flipped_decisions=candidate.parity.flipped_decisions,
        parity_rows=candidate.parity.rows,
        golden_rows_reproduced=False,
        invariances=invariances,
        features_offline=(),
        signature_fits=False,
        protected=candidate.model.service.protected,
        scoring_microseconds=microseconds,
        possible_leaks=leaks,
    )
    fees = rows[contract.fee].to_numpy(dtype=np.float64)
    money = value.report(labels, probabilities, fees, threshold, config.value)
    return Measured(evidence, capture, money, importances, clock.seconds)


def at_threshold(
    evidence: Evidence,
    scorer: "Scorer",
    data: TrainingDataset,
    threshold: float,
    config: TrainingConfig,
    contract: Contract = CONTRACT,
) -> Evidence:
    """The evidence of a model as it would decide at another threshold; ``data`` is what it was trained on.

    A decision counts as flipped where the scorer's known difference to its pipeline reaches across the threshold.
    """
    probabilities = score(scorer, data.frame)
    margins = np.abs(probabilities - threshold)
    within_reach = (margins <= evidence.parity_difference) & (evidence.parity_difference > 0)
    quality = _quality(data, probabilities, threshold, config, contract)
    return msgspec.structs.replace(evidence, flipped_decisions=int(within_reach.sum()), **quality)


def _quality(
    data: TrainingDataset, probabilities: Floats, threshold: float, config: TrainingConfig, contract: Contract
) -> dict[str, Any]:
    """The parts of the evidence that are measured on probabilities and decisions, here of every row of the dataset."""
    drawn = {"seed": config.seed, "draws": config.bootstrap_draws}
    rows, labels, of_rows = data.holdout_rows, data.labels[data.holdout], probabilities[data.holdout]
    groups = evaluation.segment_groups(rows, config.segments)
    return {
        "metrics": evaluation.intervals(labels, of_rows, threshold, **drawn),
        "train_metrics": vars(evaluation.metrics(data.labels[~data.holdout], probabilities[~data.holdout], threshold)),
        "segments": evaluation.segments(labels, of_rows, threshold, groups, **drawn),
        "fairness": evaluation.fairness(labels, of_rows, threshold, protected_groups(rows, contract), **drawn),
    }


def possible_leaks(data: TrainingDataset, config: TrainingConfig, contract: Contract = CONTRACT) -> dict[str, float]:
    """The features that alone separate the classes of the training users suspiciously well, with their AUC."""
    alone = evaluation.univariate_auc(data.training_rows, data.labels[~data.holdout], contract.features)
    return {name: auc for name, auc in alone.items() if auc >= config.guards.suspicious_auc}


def protected_groups(rows: pd.DataFrame, contract: Contract = CONTRACT) -> dict[str, NDArray[Any]]:
    """The group of each row by each protected attribute of the contract."""
    protected = tuple(column.name for column in contract.features if column.protected)
    return evaluation.segment_groups(rows, Segments(protected))


def forward(
    scorer: "Scorer", data: TrainingDataset, trained_on: "Month", threshold: float, config: TrainingConfig
) -> Forward:
    """Validate a model forward in time: on the held-out users of a later month's dataset."""
    rows = data.holdout_rows
    metrics = evaluation.intervals(
        data.labels[data.holdout], score(scorer, rows), threshold, seed=config.seed, draws=config.bootstrap_draws
    )
    return Forward(trained_on, data.month, len(rows), metrics)


def compare(
    data: TrainingDataset, candidate: "Scorer", production: "Scorer", config: TrainingConfig
) -> evaluation.Comparison:
    """Hold two models against each other on the same held-out users of ``data``."""
    rows = data.holdout_rows
    return evaluation.compare(
        data.labels[data.holdout],
        score(candidate, rows),
        score(production, rows),
        evaluation.segment_groups(rows, config.segments),
        seed=config.seed,
        draws=config.bootstrap_draws,
    )


def _invariance(scorer: "Scorer", rows: pd.DataFrame, rule: InvarianceRule, contract: Contract) -> Invariance:
    """By how much a score moves at most when one feature is changed and nothing else."""
    if rule.feature not in {feature.name for feature in scorer.features}:
        return Invariance(rule.feature, NOT_TAKEN, 0.0)
    (column,) = (column for column in contract.features if column.name == rule.feature)
    before = score(scorer, rows)
    moved = [
        np.abs(score(scorer, rows.assign(**{rule.feature: changed})) - before).max(initial=0.0)
        for changed in _changed(rows[rule.feature], column, rule)
    ]
    return Invariance(rule.feature, rule.change, float(max(moved)))


def _changed(values: pd.Series, column: Column, rule: InvarianceRule) -> list[pd.Series]:
    if column.kind == "boolean":
        return [~values]
    if column.kind == "category":
        return [pd.Series(category, index=values.index, dtype=object) for category in column.categories]
    return [values + (rule.add or 0.0)]


def _microseconds_of_one_row(candidate: Candidate) -> float:
    """The median time to score one customer at a time, in microseconds, on this machine now."""
    rows = list(candidate.scorer.golden_rows[:TIMED_ROWS])
    taken = []
    for _ in range(TIMED_ROUNDS):
        for row in rows:
            started = time.perf_counter()
            candidate.scorer.score((row,))
            taken.append(time.perf_counter() - started)
    return float(np.median(taken) * 1e6)


def predictions_digest(user_ids: Sequence[str], probabilities: Floats) -> str:
    """SHA-256 of who got which probability, to the last bit, in the order of user_id."""
    order = np.argsort(np.array(user_ids, dtype=object))
    digest = hashlib.sha256("\n".join(user_ids[index] for index in order).encode())
    digest.update(np.ascontiguousarray(probabilities[order], dtype="<f8").tobytes())
    return digest.hexdigest()
