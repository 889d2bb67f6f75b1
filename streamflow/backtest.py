"""Backtest: simulated months replayed under retraining policies, each judged on users that no model has seen.

Here belong the scenarios, the policies, the replay and its summary. How months come about is `simulate.py`'s, fitting
`training.py`'s, and the picture `plots.py`'s. What the product decides is decided by its own code here: `drift.py` and
`decay.py` find out, `retraining.py` says whether to train, `windows.py` on which months, and `gates.py` whether the
outcome is better than Production. All of it happens in memory, without PostgreSQL, feature store or registry.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import msgspec
import numpy as np
import pandas as pd

from streamflow import decay, drift, evaluation, gates, retraining, selection, simulate, training, value, windows
from streamflow.bootstrap import Floats
from streamflow.contract import CONTRACT, USER_ID, Contract
from streamflow.dataset import TrainingDataset
from streamflow.errors import ConfigurationError
from streamflow.months import Month
from streamflow.policy import DecayPolicy, RetrainingPolicy
from streamflow.policy import Policy as ProductPolicy
from streamflow.retraining import Situation
from streamflow.simulate import TRUTH, Scenario
from streamflow.training_config import TrainingConfig
from streamflow.windows import Window

OURS = "ours"
"""The policy that decides as the product does."""
BEST_POSSIBLE = "best possible"
"""Beside the policies: the simulator's true probabilities."""
THRESHOLD = 0.5
"""Of the models' decisions; whom it pays to contact goes by expected value here, which no threshold changes."""
DRAWS = 200
"""Of the bootstrap: fewer than the product takes, because a backtest looks at thousands of months."""
PER_CUSTOMERS = 1_000

Report = Literal["drift", "performance"]


# --- scenarios ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A world to replay; the labels of a month arrive ``label_delay`` months after everything else of it."""

    about: str
    scenario: Scenario
    label_delay: int = 0


SETTINGS: Mapping[str, Setting] = {
    "stable": Setting("nothing changes", Scenario(season=0)),
    "gradual-drift": Setting(
        "from 2024-04 to 2025-09 four features move and 80 % of the customers come to churn by another rule",
        Scenario(
            season=0,
            feature_drift_from=Month(2024, 4),
            concept_drift_from=Month(2024, 4),
            concept_drift=0.8,
            drift_months=18,
        ),
    ),
    "sudden-shift": Setting(
        "from 2024-10 on all customers churn by another rule",
        Scenario(season=0, concept_drift_from=Month(2024, 10)),
    ),
    "seasonal": Setting(
        "churn and hours watched swing with the year, and towards July 60 % of the customers churn by another rule",
        Scenario(season=0.5, concept_season=0.6),
    ),
    "label-delay": Setting(
        "labels arrive 2 months late; from 2024-09 to 2025-02 all customers come to churn by another rule",
        Scenario(season=0, concept_drift_from=Month(2024, 9), drift_months=6),
        label_delay=2,
    ),
}


# --- policies -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Policy:
    """When to train again, and on what.

    ``cause`` says why to train again, from what is known in a month, or None: a pure function. A fixed policy then
    learns from all labelled months and deploys at once; one that ``chooses`` takes the window that validates best, and
    replaces Production only by what is better. ``watches`` names the reports that it looks at; others are not made.
    """

    cause: Callable[[Situation], str | None]
    watches: frozenset[Report] = frozenset()
    chooses: bool = False


def _has_news(known: Situation) -> bool:
    return known.production is not None and known.newest not in known.production.trained_on


def _every_month(known: Situation) -> str | None:
    return "month" if _has_news(known) else None


def _on_drift(known: Situation) -> str | None:
    drifted = known.drift is not None and (known.drift.significant or known.drift.score != "none")
    return "drift" if drifted and _has_news(known) else None


def _on_decay(known: Situation) -> str | None:
    decayed = known.performance is not None and known.performance.decayed
    return "decay" if decayed and _has_news(known) else None


def policies(retrain: RetrainingPolicy) -> dict[str, Policy]:
    """The policies to hold against each other, by name; ``ours`` decides by `retraining.should_retrain`."""
    return {
        "never": Policy(lambda _: None),
        "every month": Policy(_every_month),
        "on drift": Policy(_on_drift, frozenset({"drift"})),
        "on decay": Policy(_on_decay, frozenset({"performance"})),
        OURS: Policy(
            lambda known: retraining.should_retrain(known, retrain).cause,
            frozenset({"drift", "performance"}),
            chooses=True,
        ),
    }


# --- a world and its models -----------------------------------------------------------------------------------------


class World:
    """The months of one simulated world, and every model that any policy asks for, fitted once.

    The model is the simplest of the configuration on its first feature service; it learns from the users outside the
    hold-out. Raises ConfigurationError for months that cannot be simulated, and where the held-out users of one all
    stayed or all churned.
    """

    def __init__(
        self,
        setting: Setting,
        months: Sequence[Month],
        *,
        users: int,
        seed: int,
        config: TrainingConfig,
        contract: Contract = CONTRACT,
    ) -> None:
        self.setting, self.months, self.contract = setting, tuple(months), contract
        estimator, service = config.candidates[0], contract.service(config.services[0])
        compared = msgspec.structs.replace(config.windows, estimator=estimator)
        self.config = msgspec.structs.replace(config, windows=compared)
        self._spec = training.ModelSpec(estimator, service, calibrated=False, threshold=THRESHOLD)
        self._drawn: dict[str, Any] = {"seed": config.seed, "draws": DRAWS}
        self._data: dict[Month, TrainingDataset] = {}
        self._truth: dict[Month, Floats] = {}
        simulated = simulate.frames(months, users=users, seed=seed, scenario=setting.scenario, contract=contract)
        for month, frame in simulated:
            ordered = frame.sort_values(USER_ID, ignore_index=True)
            self._data[month] = _checked(TrainingDataset(ordered.drop(columns=TRUTH), month, contract.label, dropped=0))
            self._truth[month] = ordered[TRUTH].to_numpy(dtype=np.float64)
        self._model = cache(self._fitted)
        self.scores = cache(self._scores)
        self.promise = cache(self._promise)
        self.chosen_window = cache(self._chosen_window)

    def _fitted(self, window: Window) -> training.TrainedModel:
        rows = {month: self._data[month].training_rows for month in window.months}
        return training.fit(windows.pool(window, rows), self.contract.label, self._spec, self.config)

    def _scores(self, window: Window, month: Month) -> Floats:
        """What the model of a window gives every user of a month."""
        return self._model(window).probabilities(self._data[month].frame)

    def _chosen_window(self, labelled: tuple[Month, ...]) -> Window:
        """What the product would learn from when these are the months with labels."""
        considered = windows.candidates(labelled[-1], labelled, self.config.windows)
        rows = {month: self._data[month].training_rows for month in labelled}
        return windows.choose(considered, rows, self.contract.label, self._spec.service, self.config).window

    def judge(self, scores: Floats, month: Month) -> dict[str, float]:
        """AUC, logloss and value of the scores of a month's users, measured on the held-out ones.

        The value is what contacting those brings for whom that is expected to pay, in the currency of the fee for
        ``PER_CUSTOMERS`` customers.
        """
        from sklearn.metrics import roc_auc_score

        labels, unseen = self._unseen(scores, month)
        fees = self._data[month].holdout_rows[self.contract.fee].to_numpy(dtype=np.float64)
        acted = value.expected(unseen, fees, self.config.value) > 0
        return {
            "auc": float(roc_auc_score(labels, unseen)),
            "logloss": float(selection.losses(labels, unseen).mean()),
            "value": value.realized(labels, fees, acted, self.config.value) * PER_CUSTOMERS / len(labels),
        }

    def best_possible(self, month: Month) -> dict[str, float]:
        """What the true probabilities achieve."""
        return self.judge(self._truth[month], month)

    def _unseen(self, scores: Floats, month: Month) -> tuple[evaluation.Labels, Floats]:
        data = self._data[month]
        return data.labels[data.holdout], scores[data.holdout]

    def _promise(self, window: Window) -> gates.Evidence:
        """What a window's model promises, measured on its newest month; what only other gates need is left out."""
        newest = window.months[-1]
        scores, data = self.scores(window, newest), self._data[newest]
        labels, unseen = self._unseen(scores, newest)
        seen = evaluation.metrics(data.labels[~data.holdout], scores[~data.holdout], THRESHOLD)
        return gates.Evidence(
            users=len(labels),
            churned=int(labels.sum()),
            metrics=evaluation.intervals(labels, unseen, THRESHOLD, **self._drawn),
            train_metrics=vars(seen),
            perfect_ece=evaluation.perfect_ece(unseen, **self._drawn),
            segments=(),
            fairness=(),
            parity_difference=0.0,
            flipped_decisions=0,
            parity_rows=0,
            golden_rows_reproduced=True,
            invariances=(),
            features_offline=(),
            signature_fits=True,
            protected=(),
            scoring_microseconds=0.0,
            possible_leaks={},
        )

    def drift(self, version: int, window: Window, month: Month) -> retraining.Drift:
        """How a month differs from the newest one that a version learned from, as the drift report has it."""
        reference = window.months[-1]
        found = drift.compare(
            self._data[reference].frame,
            self._data[month].frame,
            self._spec.service.columns,
            reference_scores=self.scores(window, reference),
            current_scores=self.scores(window, month),
        )
        score = found.score.size if found.score.significant else "none"
        return retraining.Drift(month, version, found.significant, found.drifted("moderate"), found.large, score)

    def performance(
        self,
        version: int,
        window: Window,
        month: Month,
        history: Sequence[decay.PerformanceReport],
        policy: DecayPolicy,
    ) -> decay.PerformanceReport:
        """What a version achieved in a month against its promise, as the performance report has it."""
        labels, unseen = self._unseen(self.scores(window, month), month)
        held_out = np.ones(len(labels), dtype=np.bool_)
        outcome = decay.Outcome(month, unseen, THRESHOLD, labels, held_out, groups={})
        promise = decay.Promise(version, window.months, self.promise(window))
        return decay.performance_report(outcome, promise, history, policy, **self._drawn)

    def compare(self, candidate: Window, production: Window, month: Month) -> evaluation.Comparison:
        """Two models on the same held-out users of a month, as before a promotion."""
        labels, ours = self._unseen(self.scores(candidate, month), month)
        _, theirs = self._unseen(self.scores(production, month), month)
        groups = evaluation.segment_groups(self._data[month].holdout_rows, self.config.segments)
        return evaluation.compare(labels, ours, theirs, groups, **self._drawn)


def _checked(data: TrainingDataset) -> TrainingDataset:
    labels = data.labels[data.holdout]
    if labels.all() or not labels.any():
        which = f"the {len(labels)} held-out users of {data.month}"
        raise ConfigurationError(f"{which} do not have both values of {data.label}; simulate more users")
    return data


# --- the replay -----------------------------------------------------------------------------------------------------


@dataclass
class _Run:
    """What has happened under a policy so far; a version is the place of its window among ``versions``."""

    versions: list[Window]
    production: int = 0
    predicted_by: dict[Month, int] = field(default_factory=dict)
    reports: list[decay.PerformanceReport] = field(default_factory=list)
    past: list[retraining.Retraining] = field(default_factory=list)

    @property
    def window(self) -> Window:
        """What Production learned from."""
        return self.versions[self.production]


def replay(world: World, policy: Policy, product: ProductPolicy) -> Iterator[dict[str, Any]]:
    """Live through the months of a world: a row for each month for which there was a model, with what it achieved.

    A month is scored by what is Production when it arrives. Then its drift and the labels that arrive with it are
    looked at, and what is trained upon that scores the next month. The first model is that of the first month with
    labels, whatever the policy. ``retrained`` and ``promoted`` say what followed from the month.
    """
    run: _Run | None = None
    for at, month in enumerate(world.months):
        labelled = world.months[: max(0, at + 1 - world.setting.label_delay)]
        if run is None:
            run = _Run([Window("month", labelled)]) if labelled else None
            continue
        window, promoted = run.window, False
        run.predicted_by[month] = run.production
        cause = policy.cause(_known(world, run, month, labelled[-1], policy, product))
        if cause is not None:
            promoted = _retrain(world, run, labelled, cause, policy, product)
        yield {
            "month": str(month),
            **world.judge(world.scores(window, month), month),
            "learned_from": f"{window.months[0]}..{window.months[-1]}",
            "window": window.name,
            "cause": cause,
            "retrained": cause is not None,
            "promoted": promoted,
        }


def _known(
    world: World, run: _Run, month: Month, newest: Month, policy: Policy, product: ProductPolicy
) -> retraining.Situation:
    """What is known when a month has been scored and the labels of ``newest`` have arrived."""
    performance = None
    if "performance" in policy.watches and newest in run.predicted_by:
        version = run.predicted_by[newest]
        report = world.performance(version, run.versions[version], newest, run.reports, product.decay)
        run.reports.append(report)
        performance = msgspec.convert(report, retraining.Performance, from_attributes=True)
    return Situation(
        newest=newest,
        production=retraining.Production(run.production, run.window.months),
        performance=performance,
        drift=world.drift(run.production, run.window, month) if "drift" in policy.watches else None,
        corrected=(),
        past=tuple(run.past),
    )


def _retrain(
    world: World, run: _Run, labelled: tuple[Month, ...], cause: str, policy: Policy, product: ProductPolicy
) -> bool:
    """Train a version, and say whether it became Production."""
    newest = labelled[-1]
    if policy.chooses:
        window = world.chosen_window(labelled)
        comparison = world.compare(window, run.window, newest)
        candidate = gates.Candidate(len(run.versions), world.promise(window), history=())
        promoted = all(gate.passed for gate in gates.relative_gates(candidate, comparison, product))
        helped = comparison.auc.value > 0
    else:
        window, promoted, helped = Window("all", labelled), True, None
    run.versions.append(window)
    run.past.append(retraining.Retraining(newest, cause, promoted, helped))
    if promoted:
        run.production = len(run.versions) - 1
    return promoted


def backtest(
    scenarios: Sequence[str],
    months: Sequence[Month],
    *,
    users: int,
    seeds: Sequence[int],
    config: TrainingConfig,
    product: ProductPolicy,
    contract: Contract = CONTRACT,
    jobs: int = 1,
) -> Iterator[pd.DataFrame]:
    """Replay each of the named ``SETTINGS`` with each seed under all policies, on ``jobs`` cores.

    Yields one frame for each world, in the order of scenarios and seeds: a row for each policy and month with the
    columns scenario, seed, policy and those of `replay`, and the rows of ``BEST_POSSIBLE``. Raises ConfigurationError
    for an unknown scenario, months that do not ascend or are too few to judge any, and what `World` raises;
    TrainingRefused for too few users to learn from.
    """
    from joblib import Parallel, delayed

    for name in scenarios:
        if name not in SETTINGS:
            raise ConfigurationError(f"there is no scenario {name!r}; there are {', '.join(SETTINGS)}")
        if len(months) < (least := SETTINGS[name].label_delay + 2):
            raise ConfigurationError(
                f"{len(months)} months are too few for {name}; it takes {least} to learn from one and to score another"
            )
    tasks = (
        delayed(_world)(name, seed, months, users, config, product, contract) for name in scenarios for seed in seeds
    )
    yield from Parallel(n_jobs=jobs, return_as="generator")(tasks)


def _world(
    name: str,
    seed: int,
    months: Sequence[Month],
    users: int,
    config: TrainingConfig,
    product: ProductPolicy,
    contract: Contract,
) -> pd.DataFrame:
    world = World(SETTINGS[name], months, users=users, seed=seed, config=config, contract=contract)
    found = {policy: pd.DataFrame(replay(world, by, product)) for policy, by in policies(product.retraining).items()}
    judged = found[OURS]["month"]
    best = pd.DataFrame([world.best_possible(Month.parse(month)) for month in judged]).assign(month=judged)
    found[BEST_POSSIBLE] = best.assign(retrained=False, promoted=False)
    rows = pd.concat([frame.assign(policy=policy) for policy, frame in found.items()], ignore_index=True)
    return rows.assign(scenario=name, seed=seed)


# --- the summary ----------------------------------------------------------------------------------------------------

_MEASURES = ["auc", "logloss", "value"]


def by_month(rows: pd.DataFrame) -> pd.DataFrame:
    """The means over seeds of AUC, logloss and value, by scenario, policy and month, in the order of ``rows``."""
    return rows.groupby(["scenario", "policy", "month"], sort=False)[_MEASURES].mean().reset_index()


def summarize(rows: pd.DataFrame) -> pd.DataFrame:
    """One row for each scenario and policy: means over months and seeds.

    ``retrainings`` and ``promotions`` are counts in one series of months. ``regret`` is the AUC of the true
    probabilities minus the policy's. ``ahead`` is the AUC of ours minus the policy's, and ``standard_error`` that of
    its mean over seeds, each world being the same for both (missing for one seed).
    """
    each = rows.groupby(["scenario", "policy", "seed"], sort=False)
    worlds = each[_MEASURES].mean().join(each[["retrained", "promoted"]].sum()).reset_index()
    worlds = worlds.rename(columns={"retrained": "retrainings", "promoted": "promotions"})
    auc = worlds.set_index(["scenario", "seed", "policy"])["auc"].unstack()
    key = pd.MultiIndex.from_frame(worlds[["scenario", "seed"]])
    worlds["regret"] = auc[BEST_POSSIBLE].loc[key].to_numpy() - worlds["auc"]
    worlds["ahead"] = auc[OURS].loc[key].to_numpy() - worlds["auc"]
    grouped = worlds.groupby(["scenario", "policy"], sort=False)
    means = grouped[[*_MEASURES, "retrainings", "promotions", "regret", "ahead"]].mean()
    return means.assign(standard_error=grouped["ahead"].sem()).reset_index()


def markdown(summary: pd.DataFrame) -> str:
    """The summary as a table in Markdown, with the best fixed policy of each scenario in bold."""
    lines = [
        "| scenario | policy | AUC | log loss | value | trained | live | regret | ours ahead by |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for scenario, policies_of in summary.groupby("scenario", sort=False):
        fixed = policies_of[~policies_of["policy"].isin([OURS, BEST_POSSIBLE])]
        best = fixed.loc[fixed["auc"].idxmax(), "policy"]
        for row in policies_of.itertuples():
            auc = f"**{row.auc:.4f}**" if row.policy == best else f"{row.auc:.4f}"
            cells = [str(scenario), str(row.policy), auc, f"{row.logloss:.4f}", f"{row.value:,.0f}", *comparison(row)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def comparison(row: Any) -> tuple[str, str, str, str]:
    """What a row of the summary says of retrainings, promotions, regret and the distance to ours, for people."""
    if row.policy == BEST_POSSIBLE:
        return "", "", "", ""
    error = "" if math.isnan(row.standard_error) else f" ± {row.standard_error:.4f}"
    ahead = "" if row.policy == OURS else f"{row.ahead:+.4f}{error}".replace("-", "\N{MINUS SIGN}")
    return f"{row.retrainings:.1f}", f"{row.promotions:.1f}", f"{row.regret:.4f}", ahead
