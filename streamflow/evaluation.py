"""How good a model is: metrics, tables and plots as pure functions of labels and probabilities.

Nothing here fits, stores or decides.
"""

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from streamflow.contract import USER_ID
from streamflow.dataset import TrainingDataset
from streamflow.scoring import decide
from streamflow.training import CLASSIFIER, TrainedModel, encoded_columns

Labels = NDArray[np.bool_]
Probabilities = NDArray[np.float64]

SAMPLE_ROWS = 20

_INK = "#1f2933"
_MUTED = "#9aa5b1"
_ACCENT = "#0b69a3"


@dataclass(frozen=True)
class Metrics:
    """Scores on one set of users, all between 0 and 1 but logloss (natural logarithm, lower is better)."""

    auc: float
    f1: float
    accuracy: float
    precision: float
    recall: float
    logloss: float


def metrics(labels: Labels, probabilities: Probabilities, threshold: float) -> Metrics:
    """Score probabilities against labels of both values; precision, recall and F1 are 0 when nobody is predicted."""
    from sklearn import metrics as sk

    predicted = decide(probabilities, threshold)
    return Metrics(
        auc=float(sk.roc_auc_score(labels, probabilities)),
        f1=float(sk.f1_score(labels, predicted, zero_division=0)),
        accuracy=float(sk.accuracy_score(labels, predicted)),
        precision=float(sk.precision_score(labels, predicted, zero_division=0)),
        recall=float(sk.recall_score(labels, predicted, zero_division=0)),
        logloss=float(sk.log_loss(labels, probabilities)),
    )


def importances(model: TrainedModel) -> pd.DataFrame:
    """The forest's mean decrease in impurity per feature of the contract, largest first, summing to 1.

    The columns of a one-hot encoded feature are added up. Equal importances keep the order of the feature service.
    """
    values = model.pipeline[CLASSIFIER].feature_importances_
    features = [feature for feature, _ in encoded_columns(model.service)]
    summed = pd.Series(values, index=features).groupby(level=0).sum()
    in_order = summed[[column.name for column in model.service.columns]]
    ranked = in_order.sort_values(ascending=False, kind="stable")
    return ranked.rename_axis("feature").reset_index(name="importance")


def prediction_sample(dataset: TrainingDataset, probabilities: Probabilities, threshold: float) -> pd.DataFrame:
    """Some held-out users from the lowest to the highest probability, evenly spread: their row and the prediction.

    ``probabilities`` belongs to the held-out rows of ``dataset``, in order.
    """
    held_out = dataset.frame[dataset.holdout].reset_index(drop=True)
    held_out["probability"] = probabilities
    held_out["prediction"] = decide(probabilities, threshold)
    ranked = held_out.sort_values(["probability", USER_ID], ignore_index=True)
    return ranked.iloc[_evenly(len(ranked), SAMPLE_ROWS)].reset_index(drop=True)


def _evenly(rows: int, wanted: int) -> NDArray[np.intp]:
    return np.linspace(0, rows - 1, min(rows, wanted)).round().astype(np.intp)


def roc_plot(labels: Labels, probabilities: Probabilities) -> bytes:
    """The ROC curve as a PNG, with the diagonal of a model that knows nothing."""
    from sklearn.metrics import roc_auc_score, roc_curve

    false_positives, true_positives, _ = roc_curve(labels, probabilities)
    auc = roc_auc_score(labels, probabilities)

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=_MUTED, linestyle=(0, (4, 3)), linewidth=1.2)
        axes.text(0.66, 0.61, "chance", color=_MUTED, rotation=45, rotation_mode="anchor", fontsize=9)
        axes.plot(false_positives, true_positives, color=_ACCENT, linewidth=2)
        axes.fill_between(false_positives, true_positives, color=_ACCENT, alpha=0.08, linewidth=0)
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
        axes.set_xlabel("False positive rate (stayed, predicted to churn)")
        axes.set_ylabel("True positive rate (churned, found)")
        axes.grid(color=_MUTED, alpha=0.25, linewidth=0.6)
        _title(axes, f"ROC: AUC {auc:.3f}", f"{_users(labels)}, {int(labels.sum()):,} of them churned")

    return _png(draw, width=5.2, height=5.5)


def confusion_plot(labels: Labels, probabilities: Probabilities, threshold: float) -> bytes:
    """The confusion matrix at ``threshold`` as a PNG: users, and their share of those who truly stayed or churned."""
    from sklearn.metrics import confusion_matrix

    counts = confusion_matrix(labels, decide(probabilities, threshold), labels=[False, True])
    shares = counts / counts.sum(axis=1, keepdims=True)
    accuracy = counts.trace() / counts.sum()

    def draw(axes: Any) -> None:
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (row, column), share in np.ndenumerate(shares):
            colour = "white" if share > 0.55 else _INK
            axes.text(column, row - 0.06, f"{counts[row, column]:,}", ha="center", color=colour, fontsize=17)
            axes.text(column, row + 0.16, f"{share:.0%} of row", ha="center", color=colour, fontsize=9)
        axes.set_xticks([0, 1], ["stay", "churn"])
        axes.set_yticks([0, 1], ["stayed", "churned"])
        axes.tick_params(length=0)
        axes.set_xlabel("Predicted")
        axes.set_ylabel("Actual")
        axes.spines[:].set_visible(False)
        _title(
            axes, f"Confusion: accuracy {accuracy:.3f}", f"{_users(labels)}, churn from probability {threshold:g} on"
        )

    return _png(draw, width=4.8, height=5.3)


def importance_plot(importances: pd.DataFrame) -> bytes:
    """The table of `importances` as a PNG, a bar per feature, the most important on top."""
    features, values = importances["feature"], importances["importance"].to_numpy()

    def draw(axes: Any) -> None:
        axes.barh(features, values, color=_ACCENT, height=0.68)
        for position, value in enumerate(values):
            axes.text(value + values.max() * 0.012, position, f"{value:.3f}", va="center", color=_INK, fontsize=9)
        axes.margins(y=0.015)
        axes.invert_yaxis()
        axes.set_xlim(0, values.max() * 1.12)
        axes.set_xlabel("Importance (mean decrease in impurity, all features sum to 1)")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        _title(axes, "Feature importance", f"{len(features)} features, one-hot columns added up")

    return _png(draw, width=7, height=1.4 + 0.29 * len(features))


def _users(labels: Labels) -> str:
    return f"n = {len(labels):,} held-out users"


def _title(axes: Any, title: str, subtitle: str) -> None:
    axes.set_title(f"{title}\n", loc="left", color=_INK, fontsize=13, fontweight="bold")
    axes.text(0, 1.025, subtitle, transform=axes.transAxes, color=_INK, fontsize=9.5)


def _png(draw: Callable[[Any], None], *, width: float, height: float) -> bytes:
    """A PNG of one pair of axes, ``width`` by ``height`` inches; the same drawing gives the same bytes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=140, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes)
    content = BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()
