"""The compiled scorer: a model as one file of plain data that needs no pickle, and the proof that it is the model.

Compiling, loading, scoring and comparing with the pipeline belong here. The service loads this module, so neither
pandas, scikit-learn nor MLflow is imported for loading and scoring.
"""

import hashlib
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from streamflow.contract import Kind
from streamflow.errors import ArtifactRefused, StreamFlowError, TrainingRefused

if TYPE_CHECKING:
    from streamflow.contract import FeatureService
    from streamflow.dataset import TrainingDataset
    from streamflow.training import TrainedModel

MAX_DIFFERENCE = 1e-9
GOLDEN_ROWS = 32
FORMAT = 1
_NAME = b"streamflow-scorer "
_MAGIC = _NAME + f"{FORMAT:04d}\n".encode()
_HEADER_SIZE = len(_MAGIC) + hashlib.sha256().digest_size

Value = bool | int | float | str
Floats = NDArray[np.float64]


class UnscorableFeatures(StreamFlowError):
    """A feature value that the model cannot take: missing, not finite, of another type or of an unknown category.

    ``row`` is the row's index among those to be scored, ``feature`` the feature's name.
    """

    def __init__(self, row: int, feature: "ScorerFeature", value: object) -> None:
        wanted = f"one of {', '.join(feature.categories)}" if feature.categories else f"a known {feature.kind}"
        super().__init__(f"row {row}: {feature.name} is {value!r}, not {wanted}")
        self.row = row
        self.feature = feature.name


@overload
def decide(probability: float, threshold: float) -> bool: ...
@overload
def decide(probability: Floats, threshold: float) -> NDArray[np.bool_]: ...
def decide(probability: float | Floats, threshold: float) -> bool | NDArray[np.bool_]:
    """Whether a user counts as churning: the one place that says on which side the threshold itself lies."""
    return probability >= threshold


class ScorerFeature(msgspec.Struct, frozen=True):
    """One feature that the scorer takes, the feature view that serves it, and its categories if it has any."""

    name: str
    view: str
    kind: Kind
    categories: tuple[str, ...]


class EncodedColumn(msgspec.Struct, frozen=True):
    """One column of the matrix that the estimator takes: a feature's number, or whether it is of one category.

    Both are indices: of the scorer's features, and of that feature's categories.
    """

    feature: int
    category: int | None


class TreeEnsemble(msgspec.Struct, frozen=True, tag="trees"):
    """A treelite model (serialised, deflated) whose last output is the probability of churn.

    ``inputs`` is the precision that the trees were grown in, to which the inputs are rounded before they are compared
    with the trees' 64-bit thresholds: scikit-learn's forests compare in float32.
    """

    inputs: Literal["float32"]
    model: bytes


class _Artifact(msgspec.Struct, frozen=True):
    service: str
    features: tuple[ScorerFeature, ...]
    encoding: tuple[EncodedColumn, ...]
    estimator: TreeEnsemble
    threshold: float
    golden_rows: tuple[tuple[Value, ...], ...]
    golden_probabilities: tuple[float, ...]


class Scorer:
    """Scores users in memory: the same features give the same bits, whatever else is in the batch, in any thread.

    ``service`` names the feature service, ``features`` are its features in the order that `score` takes them,
    ``threshold`` is the probability from which on `decide` says churn.
    """

    def __init__(self, artifact: _Artifact) -> None:
        _require_consistent(artifact)
        self.service = artifact.service
        self.features = artifact.features
        self.threshold = artifact.threshold
        self.golden_rows = artifact.golden_rows
        self.golden_probabilities = np.array(artifact.golden_probabilities, dtype=np.float64)
        self._converters = [_converter(feature) for feature in artifact.features]
        self._inputs = np.dtype(artifact.estimator.inputs)
        self._encode = _encoder(artifact.encoding)
        self._estimate = _load_trees(artifact.estimator, columns=len(artifact.encoding))

    @classmethod
    def from_bytes(cls, data: bytes) -> "Scorer":
        """Load what `compile_pipeline` made.

        Raises ArtifactRefused when it is truncated, altered, of another format, or contradicts itself. The checksum
        inside catches accidents only: whoever loads bytes from elsewhere compares `sha256` with the ledger first.
        """
        if not data.startswith(_MAGIC):
            found = "of another format" if data.startswith(_NAME) else "no compiled scorer"
            raise ArtifactRefused(f"the model artifact is {found}; this program reads scorers of format {FORMAT}")
        checksum, body = data[len(_MAGIC) : _HEADER_SIZE], memoryview(data)[_HEADER_SIZE:]
        if hashlib.sha256(body).digest() != checksum:
            raise ArtifactRefused("the model artifact is truncated or altered: its checksum does not fit its content")
        try:
            artifact = msgspec.msgpack.decode(body, type=_Artifact)
        except msgspec.MsgspecError as error:
            raise ArtifactRefused(f"the model artifact cannot be read: {error}") from None
        return cls(artifact)

    def score(self, rows: Sequence[Sequence[object]]) -> Floats:
        """The probability of churn of each row of Python values in the order of ``features``.

        Raises UnscorableFeatures, naming row and feature, for a value that the model cannot take, and ValueError for a
        row with more or fewer values than ``features``.
        """
        numbers = [self._numbers(index, row) for index, row in enumerate(rows)]
        matrix = np.array(numbers, dtype=np.float64).reshape(len(rows), len(self.features))
        return self._estimate(self._encode(self._rounded(matrix)))

    def score_columns(self, columns: Mapping[str, ArrayLike]) -> Floats:
        """As `score`, for many rows at once: an array for each feature, by name, such as a data frame holds.

        Scored in sorted order, because similar rows walk the same branches, which are then in the processor's cache.
        """
        numbers = [_column_numbers(feature, np.asarray(columns[feature.name])) for feature in self.features]
        matrix = self._rounded(np.column_stack(numbers))
        order = np.lexsort(matrix.T[::-1])
        probabilities = np.empty(len(matrix))
        probabilities[order] = self._estimate(self._encode(matrix[order]))
        return probabilities

    def decide(self, probability: float) -> bool:
        """Whether a user of that probability counts as churning."""
        return bool(decide(probability, self.threshold))

    def _numbers(self, index: int, row: Sequence[object]) -> list[float]:
        try:
            return [convert(value) for convert, value in zip(self._converters, row, strict=True)]
        except (KeyError, TypeError, OverflowError):
            raise self._refusal(index, row) from None

    def _refusal(self, index: int, row: Sequence[object]) -> UnscorableFeatures:
        for feature, convert, value in zip(self.features, self._converters, row, strict=True):
            try:
                convert(value)
            except (KeyError, TypeError, OverflowError):
                return UnscorableFeatures(index, feature, value)
        raise AssertionError("a row that converts was refused")

    def _rounded(self, numbers: Floats) -> Floats:
        """A matrix with a column per feature, its value or the index of its category, in the estimator's precision."""
        with np.errstate(over="ignore"):
            rounded = numbers.astype(self._inputs).astype(np.float64)
        if not np.isfinite(rounded).all():
            row, feature = np.argwhere(~np.isfinite(rounded))[0].tolist()
            raise UnscorableFeatures(row, self.features[feature], float(numbers[row, feature]))
        return rounded


def _require_consistent(artifact: _Artifact) -> None:
    names = [feature.name for feature in artifact.features]
    fits = (
        0 < len(set(names)) == len(names)
        and all(_points_into(column, artifact.features) for column in artifact.encoding)
        and 0 < artifact.threshold < 1
        and 0 < len(artifact.golden_rows) == len(artifact.golden_probabilities)
        and all(len(row) == len(names) for row in artifact.golden_rows)
    )
    if not fits:
        raise ArtifactRefused("the model artifact contradicts itself: its features, encoding and golden rows disagree")


def _points_into(column: EncodedColumn, features: tuple[ScorerFeature, ...]) -> bool:
    if not 0 <= column.feature < len(features):
        return False
    feature = features[column.feature]
    if column.category is None:
        return feature.kind != "category"
    return 0 <= column.category < len(feature.categories)


def _converter(feature: ScorerFeature) -> Callable[[Any], float]:
    """Python value to number; raises KeyError, TypeError or OverflowError for what does not fit the feature."""
    match feature.kind:
        case "category":
            return {category: float(index) for index, category in enumerate(feature.categories)}.__getitem__
        case "boolean":
            return {False: 0.0, True: 1.0}.__getitem__
        case _:
            return _number


def _number(value: object) -> float:
    if isinstance(value, float | int):
        return float(value)
    raise TypeError


def _column_numbers(feature: ScorerFeature, values: NDArray[Any]) -> Floats:
    if feature.kind != "category":
        if values.dtype.kind not in ("b" if feature.kind == "boolean" else "iuf"):
            raise UnscorableFeatures(0, feature, values[:1])
        return values.astype(np.float64)
    numbers = np.full(len(values), np.nan)
    for index, category in enumerate(feature.categories):
        numbers[values == category] = index
    if (unknown := np.isnan(numbers)).any():
        row = int(unknown.argmax())
        raise UnscorableFeatures(row, feature, values[row])
    return numbers


def _encoder(encoding: tuple[EncodedColumn, ...]) -> Callable[[Floats], Floats]:
    """From a column per feature to the matrix that the estimator takes."""
    sources = np.array([column.feature for column in encoding], dtype=np.intp)
    one_hot = np.array([column.category is not None for column in encoding], dtype=np.bool_)
    categories = np.array([column.category for column in encoding if column.category is not None], dtype=np.float64)

    def encode(numbers: Floats) -> Floats:
        encoded = numbers[:, sources]
        encoded[:, one_hot] = encoded[:, one_hot] == categories
        return encoded

    return encode


def _load_trees(trees: TreeEnsemble, *, columns: int) -> Callable[[Floats], Floats]:
    """Ready treelite's predictor. It walks and adds up the trees of a row in a fixed order, one thread per call."""
    from treelite import Model, TreeliteError, gtil

    try:
        model = Model.deserialize_bytes(zlib.decompress(trees.model))
    except (zlib.error, TreeliteError) as error:
        raise ArtifactRefused(f"the trees of the model artifact cannot be read: {error}") from None
    if model.num_feature != columns:
        raise ArtifactRefused(f"the trees of the model artifact take {model.num_feature} columns, not {columns}")

    def estimate(encoded: Floats) -> Floats:
        probabilities: Floats = gtil.predict(model, encoded, nthread=1)[:, 0, -1]
        return probabilities

    return estimate


def sha256(data: bytes) -> str:
    """The digest by which the ledger knows an artifact."""
    return hashlib.sha256(data).hexdigest()


def self_test(scorer: Scorer) -> None:
    """Score the rows stored with the scorer; raises ArtifactRefused unless each result is the stored one, bit by bit.

    Trees only compare and add, in a fixed order, so that bit equality holds on every kind of CPU.
    """
    found = scorer.score(scorer.golden_rows)
    if (differing := np.flatnonzero(found != scorer.golden_probabilities)).size:
        row = int(differing[0])
        raise ArtifactRefused(
            f"the model artifact fails its self-test in {differing.size} of {found.size} rows: row {row} scores "
            f"{float(found[row])!r}, stored is {float(scorer.golden_probabilities[row])!r}"
        )


@dataclass(frozen=True)
class Parity:
    """How far the compiled scorer is from the pipeline on ``rows`` rows: in probability, and in changed decisions."""

    max_difference: float
    flipped_decisions: int
    rows: int

    @property
    def holds(self) -> bool:
        """Whether the scorer may stand for the pipeline."""
        return self.rows > 0 and self.max_difference <= MAX_DIFFERENCE and self.flipped_decisions == 0


def parity(pipeline: Floats, scorer: Floats, threshold: float) -> Parity:
    """Compare the probabilities that the scikit-learn pipeline and the compiled scorer give the same rows."""
    flipped = decide(pipeline, threshold) != decide(scorer, threshold)
    return Parity(float(np.abs(pipeline - scorer).max(initial=0)), int(flipped.sum()), len(pipeline))


def compile_pipeline(model: "TrainedModel", dataset: "TrainingDataset") -> bytes:
    """The model as one file of data, with some rows of its dataset and their scores for `self_test`.

    The same model and dataset give the same bytes. Raises TrainingRefused for an estimator without a compiled form.
    """
    from streamflow.training import CLASSIFIER, encoded_columns

    features = _features(model.service)
    positions = np.linspace(0, len(dataset.frame) - 1, GOLDEN_ROWS).astype(np.intp)
    rows = tuple(dataset.features.iloc[positions].itertuples(index=False, name=None))
    draft = _Artifact(
        service=model.service.name,
        features=features,
        encoding=_encoding(features, encoded_columns(model.service)),
        estimator=_compile_trees(model.pipeline[CLASSIFIER]),
        threshold=model.threshold,
        golden_rows=rows,
        golden_probabilities=(0.0,) * len(rows),
    )
    golden = tuple(Scorer(draft).score(rows).tolist())
    body = msgspec.msgpack.encode(msgspec.structs.replace(draft, golden_probabilities=golden))
    return _MAGIC + hashlib.sha256(body).digest() + body


def _features(service: "FeatureService") -> tuple[ScorerFeature, ...]:
    return tuple(
        ScorerFeature(column.name, view.name, column.kind, column.categories)
        for view in service.views
        for column in view.columns
    )


def _encoding(
    features: tuple[ScorerFeature, ...], columns: Iterable[tuple[str, str | None]]
) -> tuple[EncodedColumn, ...]:
    by_name = {feature.name: (index, feature.categories) for index, feature in enumerate(features)}
    return tuple(
        EncodedColumn(by_name[name][0], None if category is None else by_name[name][1].index(category))
        for name, category in columns
    )


def _compile_trees(classifier: Any) -> TreeEnsemble:
    import treelite
    from sklearn.ensemble import RandomForestClassifier

    if not isinstance(classifier, RandomForestClassifier):
        raise TrainingRefused(f"{type(classifier).__name__} has no compiled form")
    model = treelite.sklearn.import_model(classifier)
    for index in range(model.num_tree):
        _drop_training_statistics(model.get_tree_accessor(index))
    return TreeEnsemble("float32", zlib.compress(model.serialize_bytes(), level=3))


def _drop_training_statistics(tree: Any) -> None:
    """Empty the per-node fields that prediction never reads: a quarter of the model, half of the deflated file."""
    for field, dtype in (("data_count", np.uint64), ("sum_hess", np.float64), ("gain", np.float64)):
        tree.set_field(field, np.zeros(0, dtype))
        tree.set_field(f"{field}_present", np.zeros(0, np.uint8))
