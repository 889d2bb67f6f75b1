"""What a person looks at of a training: its plots, its model card, and why the model was chosen.

Putting measurements and pages together belongs here; how a plot or a page is drawn is plots.py's and model_card.py's.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from streamflow import evaluation, model_card, plots, selection, value, windows
from streamflow.contract import CONTRACT, Contract
from streamflow.scoring import decide

if TYPE_CHECKING:
    from streamflow.procedure import Candidate, Forward, Measured
    from streamflow.warehouse import MonthWrite

VALUE_THRESHOLDS = np.linspace(0.01, 0.99, 99)


def why_chosen(candidate: "Candidate") -> str:
    """Why this estimator on this feature service, in a sentence or two."""
    if candidate.selection is None:
        return f"{candidate.model.estimator} was asked for by name; nothing was chosen."
    return candidate.selection.reason


def images(candidate: "Candidate", measured: "Measured", contract: Contract = CONTRACT) -> dict[str, bytes]:
    """The plots of the held-out users as PNG, by file name."""
    labels, probabilities, threshold = candidate.labels, candidate.validation, candidate.model.threshold
    intervals, config = measured.evidence.metrics, candidate.procedure.config
    fees = candidate.data.holdout_rows[contract.fee].to_numpy(dtype=np.float64)
    values = [value.realized(labels, fees, decide(probabilities, at), config.value) for at in VALUE_THRESHOLDS.tolist()]
    return {
        "roc.png": plots.roc_plot(labels, probabilities, intervals["auc"]),
        "precision_recall.png": plots.precision_recall_plot(
            labels, probabilities, threshold, intervals["average_precision"]
        ),
        "reliability.png": plots.reliability_plot(
            evaluation.reliability(labels, probabilities), intervals["ece"], measured.evidence.perfect_ece
        ),
        "confusion_matrix.png": plots.confusion_plot(
            labels, probabilities, threshold, recall=intervals["recall"], precision=intervals["precision"]
        ),
        "lift.png": plots.lift_plot(labels, probabilities, measured.capture),
        "scores.png": plots.score_plot(labels, probabilities, threshold),
        "segments.png": plots.segments_plot(measured.evidence.segments, intervals["auc"]),
        "value.png": plots.value_plot(
            VALUE_THRESHOLDS,
            np.array(values),
            threshold=threshold,
            value=measured.value.realized_value,
            users=len(labels),
        ),
        "importances.png": plots.importance_plot(measured.importances, len(labels)),
    }


def card(
    candidate: "Candidate",
    measured: "Measured",
    forward: "Forward | None",
    source: "MonthWrite",
    lineage: Mapping[str, Any],
    plots: Mapping[str, bytes],
    contract: Contract = CONTRACT,
) -> str:
    """The model card, nothing decided yet; ``source`` is the write of the training dataset, ``plots`` `images`'."""
    data, model, evidence = candidate.data, candidate.model, measured.evidence
    chosen = candidate.selection
    return model_card.render(
        model_card.Card(
            month=data.month,
            as_of=data.month.as_of,
            estimator=model.estimator,
            service=model.service.name,
            calibrated=model.calibrated,
            threshold=model.threshold,
            threshold_reason=candidate.threshold_reason,
            params=model.params,
            data=model_card.Data(
                rows=source.rows,
                dropped=data.dropped,
                churn_rate=float(data.labels.mean()),
                trained_on=model.train_rows,
                held_out=evidence.users,
                held_out_churned=evidence.churned,
            ),
            windows=windows.as_table(candidate.window),
            window_reason=candidate.window.reason,
            candidates=pd.DataFrame() if chosen is None else selection.as_table(chosen),
            reason=why_chosen(candidate),
            train=evidence.train_metrics,
            validation=evidence.metrics,
            perfect_ece=evidence.perfect_ece,
            capture=measured.capture,
            segments=evidence.segments,
            fairness=evidence.fairness,
            protected_used=evidence.protected,
            value=measured.value,
            assumptions=candidate.procedure.config.value,
            fee=float(data.frame[contract.fee].mean()),
            importances=measured.importances,
            forward=forward,
            parity=candidate.parity,
            golden_rows=len(candidate.scorer.golden_rows),
            invariances=evidence.invariances,
            scoring_microseconds=evidence.scoring_microseconds,
            possible_leaks=evidence.possible_leaks,
            lineage=lineage,
            plots=plots,
        )
    )
