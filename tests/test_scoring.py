import hashlib
import math
import os
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

import msgspec
import numpy as np
import pytest
import treelite
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dataset import handmade_dataset, real_dataset

from streamflow import scoring
from streamflow.contract import CONTRACT
from streamflow.errors import ArtifactRefused, TrainingRefused
from streamflow.scoring import Parity, Scorer, UnscorableFeatures, compile_pipeline, decide, parity, self_test, sha256
from streamflow.training import ModelSpec, encoded_columns, fit
from streamflow.training_config import TrainingConfig

HEADER = 23 + 32
BASELINE = "random_forest_baseline"
FORESTS = ("random_forest_leaf_limited", BASELINE)
ESTIMATORS = ("logistic_regression", "gradient_boosting", *FORESTS)
SERVICES = ("churn_v1", "churn_v2", "churn_v2_protected")
ANY_ESTIMATOR = pytest.mark.parametrize("estimator", ESTIMATORS)
CALIBRATED_OR_NOT = pytest.mark.parametrize("calibrated", [False, True], ids=["uncalibrated", "calibrated"])


class World:
    """A dataset, and the models and artifacts of it that tests ask for; each is made once."""

    def __init__(self, dataset, config):
        self.dataset = dataset
        self.config = config
        self.model = cache(self.fitted)
        self.scorer = cache(lambda *which: Scorer.from_bytes(self.artifact(*which)))

    def fitted(self, estimator, calibrated=False, service="churn_v1", threshold=0.5, n_jobs=1):
        spec = ModelSpec(estimator, CONTRACT.service(service), calibrated, threshold)
        return fit(self.dataset.training_rows, self.dataset.label, spec, self.config, n_jobs=n_jobs)

    def artifact(self, *which):
        return compile_pipeline(self.model(*which), self.dataset)

    def rows(self, service="churn_v1"):
        frame = self.dataset.frame[CONTRACT.service(service).names]
        return list(frame.itertuples(index=False, name=None))

    def compared(self, *which):
        return compared(self.model(*which), self.scorer(*which), self.dataset.frame)


@pytest.fixture(scope="module")
def config(quick_training_file):
    return TrainingConfig.load(quick_training_file)


@pytest.fixture(scope="module")
def world(config):
    return World(handmade_dataset(), config)


@pytest.fixture(scope="module")
def january(real_data, config):
    return World(real_dataset(real_data), config)


@pytest.fixture(scope="module")
def dataset(world):
    return world.dataset


@pytest.fixture(scope="module")
def model(world):
    return world.model(BASELINE)


@pytest.fixture(scope="module")
def artifact(world):
    return world.artifact(BASELINE)


@pytest.fixture(scope="module")
def scorer(world):
    return world.scorer(BASELINE)


@pytest.fixture(scope="module")
def rows(world):
    return world.rows()


def compared(model, scorer, frame):
    return parity(model.probabilities(frame), scorer.score_columns(columns(scorer, frame)), scorer.threshold)


def columns(scorer, frame):
    return {feature.name: frame[feature.name].to_numpy() for feature in scorer.features}


def content(artifact):
    return msgspec.msgpack.decode(artifact[HEADER:])


def repacked(artifact, **changes):
    """The artifact with some fields changed and a checksum that fits."""
    body = msgspec.msgpack.encode(content(artifact) | changes)
    return artifact[: HEADER - 32] + hashlib.sha256(body).digest() + body


# The same model


@ANY_ESTIMATOR
@pytest.mark.parametrize(
    ("calibrated", "service"),
    [(False, "churn_v1"), (True, "churn_v1"), (True, "churn_v2"), (False, "churn_v2_protected")],
)
def test_scores_are_the_pipelines(world, estimator, calibrated, service):
    found = world.compared(estimator, calibrated, service)
    assert found.rows == 400
    assert found.max_difference <= 1e-12
    assert found.flipped_decisions == 0


@pytest.mark.parametrize("estimator", FORESTS)
def test_scores_of_a_forest_are_the_pipelines_to_the_bit(world, estimator):
    assert world.compared(estimator) == Parity(0.0, 0, 400)


@pytest.mark.parametrize(("calibrated", "service"), [(False, "churn_v1"), (True, "churn_v2")])
@ANY_ESTIMATOR
def test_real_january_has_parity_on_every_row(january, estimator, calibrated, service):
    self_test(january.scorer(estimator, calibrated, service))
    found = january.compared(estimator, calibrated, service)
    assert found.rows == 7043
    assert found.max_difference <= 1e-12
    assert found.flipped_decisions == 0


def test_log_odds_of_boosting_are_the_pipelines_to_the_bit(world):
    model = world.model("gradient_boosting")
    encoded = model.pipeline["preprocessing"].transform(world.dataset.frame[model.service.names])
    log_odds = model.pipeline["classifier"].estimator_.decision_function(encoded).tolist()
    unlinked = Scorer.from_bytes(repacked(world.artifact("gradient_boosting"), link=None))
    assert unlinked.score(world.rows()).tolist() == log_odds
    linked = world.scorer("gradient_boosting").score(world.rows()).tolist()
    assert linked == [1 / (1 + math.exp(-number)) for number in log_odds]


@CALIBRATED_OR_NOT
def test_a_line_is_added_up_in_order_on_every_kind_of_cpu(world, calibrated):
    found = content(world.artifact("logistic_regression", calibrated))
    unscaled = world.model(BASELINE).pipeline["preprocessing"]
    numbers = unscaled.transform(world.dataset.frame[CONTRACT.service("churn_v1").names]).tolist()
    line, link = found["estimator"], found["link"]
    for row, score in zip(numbers, world.scorer("logistic_regression", calibrated).score(world.rows()), strict=True):
        total = 0.0
        for number, mean, coefficient in zip(row, line["means"], line["coefficients"], strict=True):
            total += (number - mean) * coefficient
        log_odds = link["slope"] * (total + line["intercept"]) + link["intercept"]
        assert score == 1 / (1 + math.exp(-log_odds))


def test_scores_beside_a_forests_thresholds_are_the_pipelines(world):
    trees = [tree.tree_ for tree in world.model(BASELINE).pipeline["classifier"].estimator_.estimators_]
    thresholds = np.concatenate([tree.threshold[tree.feature == monthly_fee()] for tree in trees])
    scores_beside(thresholds, world, BASELINE)


def test_scores_beside_the_thresholds_of_boosting_are_the_pipelines(world):
    boosting = world.model("gradient_boosting").pipeline["classifier"].estimator_
    nodes = np.concatenate([tree.nodes for trees in boosting._predictors for tree in trees])
    thresholds = nodes["num_threshold"][(nodes["is_leaf"] == 0) & (nodes["feature_idx"] == monthly_fee())]
    below, at, above = scores_beside(thresholds, world, "gradient_boosting")
    assert (below == at).all()
    assert (at != above).any()


def monthly_fee():
    return encoded_columns(CONTRACT.service("churn_v1")).index(("monthly_fee", None))


def scores_beside(thresholds, world, estimator):
    """Scores where monthly_fee is just below, at and just above thresholds of the trees, if they are the pipeline's."""
    model, scorer, frame = world.model(estimator), world.scorer(estimator), world.dataset.frame
    thresholds = thresholds[: len(frame)]
    assert len(thresholds) > 5
    fees = (np.nextafter(thresholds, -np.inf), thresholds, np.nextafter(thresholds, np.inf))
    changed = [frame[: len(thresholds)].assign(monthly_fee=fee) for fee in fees]
    assert all(compared(model, scorer, rows).max_difference <= 1e-15 for rows in changed)
    return [scorer.score_columns(columns(scorer, rows)) for rows in changed]


def test_parity_notices_another_model(world):
    model = world.model("gradient_boosting")
    found = compared(model, world.scorer(BASELINE), world.dataset.frame)
    assert not found.holds
    assert found.max_difference > 0.1
    assert found.flipped_decisions > 0


@pytest.mark.parametrize(
    ("found", "holds"),
    [
        (Parity(1e-9, 0, 10), True),
        (Parity(1.1e-9, 0, 10), False),
        (Parity(1e-12, 1, 10), False),
        (Parity(float("nan"), 0, 10), False),
        (Parity(0.0, 0, 0), False),
    ],
)
def test_when_parity_holds(found, holds):
    assert found.holds is holds


@pytest.mark.parametrize("service", SERVICES)
def test_features_are_stated_in_the_services_order(world, service):
    scorer = world.scorer("logistic_regression", False, service)
    wanted = CONTRACT.service(service)
    assert scorer.service == service
    assert [feature.name for feature in scorer.features] == wanted.names
    assert [feature.view for feature in scorer.features] == [
        view.name for view in wanted.views for _ in wanted.columns_of(view)
    ]
    assert [feature.categories for feature in scorer.features] == [column.categories for column in wanted.columns]


def test_the_threshold_is_the_models(world):
    scorer = world.scorer(BASELINE, False, "churn_v1", 0.3)
    assert scorer.threshold == 0.3
    assert scorer.decide(0.3) is True


def with_classifier(model, classifier):
    from sklearn.pipeline import Pipeline

    return replace(model, pipeline=Pipeline([*model.pipeline.steps[:1], ("classifier", classifier)]))


def test_an_estimator_without_compiled_form_is_refused(model, dataset):
    from sklearn.tree import DecisionTreeClassifier

    with pytest.raises(TrainingRefused, match="DecisionTreeClassifier has no compiled form"):
        compile_pipeline(with_classifier(model, DecisionTreeClassifier()), dataset)


@pytest.mark.parametrize("options", [{"method": "isotonic", "ensemble": False}, {"method": "sigmoid"}])
def test_a_calibration_without_compiled_form_is_refused(world, options):
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.linear_model import LogisticRegression

    model, rows = world.model("logistic_regression"), world.dataset.frame
    calibrated = CalibratedClassifierCV(LogisticRegression(), cv=2, **options)
    calibrated.fit(model.pipeline["preprocessing"].transform(rows[model.service.names]), world.dataset.labels)
    with pytest.raises(TrainingRefused, match="only a calibration by one sigmoid"):
        compile_pipeline(with_classifier(model, calibrated), world.dataset)


# A score depends on its row alone


@ANY_ESTIMATOR
@CALIBRATED_OR_NOT
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_a_score_does_not_depend_on_the_batch(data, world, estimator, calibrated):
    rows, scorer = world.rows(), world.scorer(estimator, calibrated)
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=70))
    together = scorer.score([rows[index] for index in chosen])
    assert together.tolist() == [scorer.score([rows[index]])[0] for index in chosen]
    in_bulk = scorer.score_columns(columns(scorer, world.dataset.frame.iloc[chosen]))
    assert together.tolist() == in_bulk.tolist()


@ANY_ESTIMATOR
@CALIBRATED_OR_NOT
def test_single_rows_bulk_and_batch_agree_to_the_bit(world, estimator, calibrated):
    rows, scorer, frame = world.rows(), world.scorer(estimator, calibrated), world.dataset.frame
    together = scorer.score(rows).tolist()
    assert [scorer.score([row])[0] for row in rows] == together
    assert scorer.score_columns(columns(scorer, frame)).tolist() == together
    assert scorer.score_columns(columns(scorer, frame[::-1]))[::-1].tolist() == together


@ANY_ESTIMATOR
def test_threads_score_alike(world, estimator):
    rows, scorer = world.rows(), world.scorer(estimator, True)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda row: scorer.score([row])[0], rows * 3))
    assert found == scorer.score(rows).tolist() * 3


@ANY_ESTIMATOR
def test_no_rows_have_no_scores(world, estimator):
    scorer = world.scorer(estimator, True)
    assert scorer.score([]).shape == (0,)
    assert scorer.score_columns(columns(scorer, world.dataset.frame[:0])).shape == (0,)


def test_the_threshold_itself_is_churn(scorer):
    assert scorer.decide(0.5) is True
    assert scorer.decide(np.nextafter(0.5, 0)) is False
    assert decide(np.array([0.2, 0.3]), 0.3).tolist() == [False, True]


# Values that cannot be scored


@pytest.mark.parametrize(
    ("feature", "value", "message"),
    [
        ("net_service", "Cable", "row 1: net_service is 'Cable', not one of DSL, Fiber optic, No"),
        ("net_service", None, "row 1: net_service is None, not one of"),
        ("net_service", ["DSL"], r"row 1: net_service is \['DSL'\], not one of"),
        ("monthly_fee", None, "row 1: monthly_fee is None, not a known float"),
        ("monthly_fee", "29.85", "row 1: monthly_fee is '29.85', not a known float"),
        ("monthly_fee", float("nan"), "row 1: monthly_fee is nan, not a known float"),
        ("monthly_fee", float("-inf"), "row 1: monthly_fee is -inf, not a known float"),
        ("monthly_fee", 1e39, r"row 1: monthly_fee is 1e\+39, not a known float"),
        ("monthly_fee", -(2.0**128 - 2.0**103), r"row 1: monthly_fee is -3\.40282\d+e\+38, not a known float"),
        ("skips_7d", 10**400, "row 1: skips_7d is 1000"),
        ("paperless_billing", "False", "row 1: paperless_billing is 'False', not a known boolean"),
        ("paperless_billing", None, "row 1: paperless_billing is None, not a known boolean"),
    ],
)
def test_what_cannot_be_scored_is_named(scorer, rows, feature, value, message):
    position = [known.name for known in scorer.features].index(feature)
    bad = (*rows[0][:position], value, *rows[0][position + 1 :])
    with pytest.raises(UnscorableFeatures, match=message) as refused:
        scorer.score([rows[0], bad, rows[1]])
    assert (refused.value.row, refused.value.feature) == (1, feature)


@pytest.mark.parametrize(
    ("feature", "values", "row"),
    [
        ("net_service", ["DSL", "No", "Cable", None], 2),
        ("net_service", [1.0, 2.0, 3.0, 4.0], 0),
        ("monthly_fee", [1.0, 2.0, 3.0, float("nan")], 3),
        ("monthly_fee", [1.0, 2.0, None, 3.0], 0),
        ("monthly_fee", [1.0, -1e39, 2.0, 3.0], 1),
        ("paperless_billing", [1.0, 0.0, 1.0, 0.0], 0),
    ],
)
def test_what_cannot_be_scored_in_bulk_is_named(scorer, dataset, feature, values, row):
    with pytest.raises(UnscorableFeatures) as refused:
        scorer.score_columns(columns(scorer, dataset.frame[:4]) | {feature: values})
    assert (refused.value.row, refused.value.feature) == (row, feature)


@pytest.mark.parametrize("row", range(6))
def test_a_missing_number_in_bulk_is_named_by_its_own_row(scorer, dataset, row):
    missing = {"skips_7d": np.where(np.arange(6) == row, np.nan, 1.0)}
    with pytest.raises(UnscorableFeatures, match=f"row {row}: skips_7d is nan, not a known integer"):
        scorer.score_columns(columns(scorer, dataset.frame[:6]) | missing)


@ANY_ESTIMATOR
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_whatever_can_be_scored_has_a_probability(data, world, estimator):
    scorer = world.scorer(estimator, True)
    largest = float(np.finfo(np.float32).max)
    numbers = st.sampled_from([0.0, -largest, largest]) | st.floats(-largest, largest)
    row = [
        data.draw(st.sampled_from(feature.categories) if feature.categories else st.booleans())
        if feature.kind in ("category", "boolean")
        else data.draw(numbers)
        for feature in scorer.features
    ]
    (probability,) = scorer.score([row])
    assert 0 <= probability <= 1


def test_a_row_of_another_length_is_an_error(scorer, rows):
    for row in (rows[0][:-1], (*rows[0], 1)):
        with pytest.raises(ValueError, match="zip"):
            scorer.score([row])


# The file


@ANY_ESTIMATOR
@CALIBRATED_OR_NOT
def test_the_same_model_gives_the_same_bytes(world, estimator, calibrated):
    artifact = world.artifact(estimator, calibrated)
    again = world.fitted(estimator, calibrated, n_jobs=2)
    assert compile_pipeline(again, world.dataset) == artifact
    assert sha256(artifact) == hashlib.sha256(artifact).hexdigest()


def test_another_process_compiles_the_same_bytes(world, quick_training_file):
    program = (
        "from pathlib import Path\n"
        "from test_scoring import ESTIMATORS, TrainingConfig, World, handmade_dataset, sha256\n"
        f"world = World(handmade_dataset(), TrainingConfig.load(Path({str(quick_training_file)!r})))\n"
        "print(*(sha256(world.artifact(estimator, True)) for estimator in ESTIMATORS))"
    )
    assert run(program).split() == [sha256(world.artifact(estimator, True)) for estimator in ESTIMATORS]


def test_loading_and_scoring_import_nothing_heavy(world, tmp_path):
    for estimator in ESTIMATORS:
        (tmp_path / estimator).write_bytes(world.artifact(estimator, True))
    program = (
        "import sys\nfrom pathlib import Path\nfrom streamflow.scoring import Scorer, self_test\n"
        "assert 'treelite' not in sys.modules\n"
        f"for path in Path({str(tmp_path)!r}).iterdir():\n    self_test(Scorer.from_bytes(path.read_bytes()))\n"
        "print(*{'pandas', 'sklearn', 'pyarrow', 'mlflow', 'feast', 'dagster', 'matplotlib'} & set(sys.modules))"
    )
    assert run(program) == ""


def run(program):
    """What a program prints in a process of its own, with another hash seed, locale and time zone.

    What OPENBLAS_CORETYPE says stays: of different kinds of CPU the last bits of a linear model are not the same.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": f"{Path(scoring.__file__).parent.parent}:{Path(__file__).parent}",
        "PYTHONHASHSEED": "7",
        "TZ": "Asia/Tokyo",
        "LC_ALL": "C",
    }
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@ANY_ESTIMATOR
@CALIBRATED_OR_NOT
def test_self_test_passes_and_holds_32_rows(world, estimator, calibrated):
    scorer = world.scorer(estimator, calibrated)
    self_test(scorer)
    assert len(scorer.golden_rows) == 32
    assert scorer.tolerance == (0 if estimator in FORESTS and not calibrated else 1e-9)


def test_self_test_of_a_forest_says_what_differs_by_a_bit(artifact):
    stored = content(artifact)["golden_probabilities"]
    stored[3] = float(np.nextafter(stored[3], 0.5))
    with pytest.raises(ArtifactRefused, match=rf"in 1 of 32 rows: row 3 scores .*, stored is {stored[3]!r}"):
        self_test(Scorer.from_bytes(repacked(artifact, golden_probabilities=stored)))


@pytest.mark.parametrize("estimator", ["logistic_regression", "gradient_boosting"])
def test_self_test_where_exp_is_involved_allows_last_bits_only(world, estimator):
    artifact = world.artifact(estimator)
    stored = content(artifact)["golden_probabilities"]
    stored[3] += 0.9e-9
    self_test(Scorer.from_bytes(repacked(artifact, golden_probabilities=stored)))
    stored[3] += 0.2e-9
    with pytest.raises(ArtifactRefused, match="in 1 of 32 rows: row 3 scores"):
        self_test(Scorer.from_bytes(repacked(artifact, golden_probabilities=stored)))


@pytest.mark.parametrize("column", range(16))
@pytest.mark.parametrize("part", ["means", "coefficients"])
def test_self_test_sees_an_altered_line(world, part, column):
    artifact = world.artifact("logistic_regression")
    estimator = content(artifact)["estimator"]
    estimator[part][column] += 0.01
    with pytest.raises(ArtifactRefused, match="fails its self-test"):
        self_test(Scorer.from_bytes(repacked(artifact, estimator=estimator)))


def test_self_test_sees_scores_that_are_no_numbers(world):
    artifact = world.artifact("logistic_regression")
    estimator = content(artifact)["estimator"] | {"coefficients": [1.7e308, -1.7e308] * 8}
    with pytest.raises(ArtifactRefused, match="scores nan"), np.errstate(all="ignore"):
        self_test(Scorer.from_bytes(repacked(artifact, estimator=estimator)))


@ANY_ESTIMATOR
@pytest.mark.parametrize("part", ["slope", "intercept"])
def test_self_test_sees_an_altered_link(world, estimator, part):
    artifact = world.artifact(estimator, True)
    link = content(artifact)["link"]
    with pytest.raises(ArtifactRefused, match=r"in 3\d of 32 rows"):
        self_test(Scorer.from_bytes(repacked(artifact, link=link | {part: link[part] + 0.01})))


def test_self_test_sees_a_lost_link(world):
    for estimator in ("gradient_boosting", BASELINE):
        with pytest.raises(ArtifactRefused, match="in 32 of 32 rows"):
            self_test(Scorer.from_bytes(repacked(world.artifact(estimator, True), link=None)))


def test_the_sigmoid_is_what_it_says(world, rows):
    artifact = world.artifact("logistic_regression")
    uncalibrated = Scorer.from_bytes(artifact).score(rows)
    log_odds = np.log(uncalibrated / (1 - uncalibrated))
    linked = Scorer.from_bytes(repacked(artifact, link={"slope": -2.0, "intercept": 0.5}))
    assert linked.score(rows) == pytest.approx(1 / (1 + np.exp(2 * log_odds - 0.5)), rel=1e-12)
    for slope, of_those_above in ((1e5, 1), (-1e5, 0)):
        steep = Scorer.from_bytes(repacked(artifact, link={"slope": slope, "intercept": 0.0})).score(rows)
        assert (np.abs(steep - np.where(log_odds > 0, of_those_above, 1 - of_those_above)) < 1e-9).all()


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_changed_byte_is_refused(data, artifact):
    position = data.draw(st.integers(0, len(artifact) - 1) | st.integers(0, HEADER + 200))
    damaged = bytearray(artifact)
    damaged[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ArtifactRefused):
        Scorer.from_bytes(bytes(damaged))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_truncated_or_longer_file_is_refused(data, artifact):
    with pytest.raises(ArtifactRefused):
        Scorer.from_bytes(artifact[: data.draw(st.integers(0, len(artifact) - 1) | st.integers(0, HEADER))])
    with pytest.raises(ArtifactRefused, match="truncated or altered"):
        Scorer.from_bytes(artifact + data.draw(st.binary(min_size=1, max_size=9)))


def test_another_format_is_named(artifact):
    earlier = artifact.replace(b"streamflow-scorer 0003", b"streamflow-scorer 0002", 1)
    with pytest.raises(ArtifactRefused, match="of another format; this program reads scorers of format 3"):
        Scorer.from_bytes(earlier)
    with pytest.raises(ArtifactRefused, match="no compiled scorer"):
        Scorer.from_bytes(b"\x80\x04\x95 a pickle")


def assert_each_refused(artifact, contradictions):
    Scorer.from_bytes(repacked(artifact))
    for changes in contradictions:
        with pytest.raises(ArtifactRefused):
            Scorer.from_bytes(repacked(artifact, **changes))


def test_an_artifact_that_contradicts_itself_is_refused(artifact):
    found = content(artifact)
    contradictions = [
        {"features": found["features"][:-1]},
        {"features": [found["features"][0], *found["features"][:-1]]},
        {"features": []},
        {"encoding": []},
        {"encoding": found["encoding"][:-1]},
        {"encoding": [{"feature": 0, "category": 0}, *found["encoding"][1:]]},
        {"encoding": [{"feature": 5, "category": 3}, *found["encoding"][1:]]},
        {"encoding": [{"feature": 5, "category": None}, *found["encoding"][1:]]},
        {"encoding": [{"feature": 99, "category": None}, *found["encoding"][1:]]},
        *({"threshold": threshold} for threshold in (0, 1, 1.5, -0.1, float("nan"), "half", None)),
        {"golden_rows": []},
        {"golden_rows": [row[:-1] for row in found["golden_rows"]]},
        {"golden_probabilities": found["golden_probabilities"][:-1]},
        {"golden_probabilities": [1.5, *found["golden_probabilities"][1:]]},
        {"golden_probabilities": [float("nan"), *found["golden_probabilities"][1:]]},
        {"estimator": found["estimator"] | {"type": "oracle"}},
        {"estimator": found["estimator"] | {"type": "linear"}},
        {"estimator": found["estimator"] | {"inputs": "float16"}},
        {"estimator": found["estimator"] | {"model": b"not deflated"}},
        {"estimator": found["estimator"] | {"model": zlib.compress(b"not a model")}},
        {"link": {"slope": 1.0}},
        {"link": {"slope": float("nan"), "intercept": 0.0}},
        {"link": {"slope": 1.0, "intercept": float("inf")}},
    ]
    assert_each_refused(artifact, contradictions)


def test_a_linear_artifact_that_contradicts_itself_is_refused(world):
    artifact = world.artifact("logistic_regression")
    found = content(artifact)["estimator"]
    contradictions = [
        {"link": None},
        {"encoding": []},
        {"estimator": found | {"means": [], "coefficients": []}},
        {"estimator": {name: value for name, value in found.items() if name != "intercept"}},
        {"estimator": found | {"intercept": float("inf")}},
        {"estimator": found | {"intercept": "0"}},
    ]
    for part in ("means", "coefficients"):
        first, *rest = found[part]
        wrong = (rest, [0.0, first, *rest], [float("nan"), *rest], [float("-inf"), *rest])
        contradictions += [{"estimator": found | {part: numbers}} for numbers in wrong]
    assert_each_refused(artifact, contradictions)


def test_trees_of_another_output_are_refused(world, artifact):
    """The predictor writes where it is told to: as many scores of as many bits as the trees give."""
    forest = world.model(BASELINE).pipeline["classifier"].estimator_
    of_both_classes = treelite.sklearn.import_model(forest)
    for trees in (of_both_classes, trees_in_32_bits(of_both_classes.num_feature)):
        estimator = {"type": "trees", "inputs": "float32", "model": zlib.compress(trees.serialize_bytes())}
        with pytest.raises(ArtifactRefused, match="do not give one 64-bit score"):
            Scorer.from_bytes(repacked(artifact, estimator=estimator))


def trees_in_32_bits(features):
    from treelite.model_builder import Metadata, ModelBuilder, PostProcessorFunc, TreeAnnotation

    builder = ModelBuilder(
        threshold_type="float32",
        leaf_output_type="float32",
        metadata=Metadata(
            num_feature=features,
            task_type="kRegressor",
            average_tree_output=False,
            num_target=1,
            num_class=[1],
            leaf_vector_shape=(1, 1),
        ),
        tree_annotation=TreeAnnotation(num_tree=1, target_id=[0], class_id=[0]),
        postprocessor=PostProcessorFunc(name="identity"),
        base_scores=[0.0],
    )
    builder.start_tree()
    builder.start_node(0)
    builder.leaf(0.5)
    builder.end_node()
    builder.end_tree()
    return builder.commit()


# --- outside of what it was trained on --------------------------------------------------------------------------------


def test_values_outside_of_training_are_named_and_change_no_score(artifact):
    scorer = Scorer.from_bytes(artifact)
    rows = [list(row) for row in scorer.golden_rows[:4]]
    names = [feature.name for feature in scorer.features]
    trained_on = {feature.name: feature.trained_on for feature in scorer.features}
    at = {name: names.index(name) for name in names}
    rows[0] = [trained_on[name][0] for name in names]
    rows[1] = [trained_on[name][-1] for name in names]
    rows[3][at["monthly_fee"]] = trained_on["monthly_fee"][1] + 0.01
    rows[3][at["months_active"]] = trained_on["months_active"][0] - 1

    probabilities, outside = scorer.examine(rows)
    assert probabilities.tolist() == scorer.score(rows).tolist()
    assert {row: set(found) for row, found in outside.items() if row != 2} == {3: {"monthly_fee", "months_active"}}
    assert list(outside[3]) == sorted(outside[3], key=names.index)


def test_a_category_that_training_lacked_is_outside_of_it(artifact):
    content = msgspec.msgpack.decode(artifact[scoring._HEADER_SIZE :], type=scoring._Artifact)
    index = next(index for index, feature in enumerate(content.features) if len(feature.categories) == 3)
    feature = content.features[index]
    first, middle, last = feature.categories
    gone = msgspec.structs.replace(feature, trained_on=(first, last))
    features = (*content.features[:index], gone, *content.features[index + 1 :])
    scorer = Scorer(msgspec.structs.replace(content, features=features))
    row = list(scorer.golden_rows[0])
    for category, found in ((first, False), (middle, True), (last, False)):
        row[index] = category
        assert (feature.name in scorer.examine([row])[1].get(0, ())) is found


def test_what_it_was_trained_on_must_be_values_of_the_feature(artifact):
    content = msgspec.msgpack.decode(artifact[scoring._HEADER_SIZE :], type=scoring._Artifact)
    kinds = {feature.kind: index for index, feature in enumerate(content.features)}
    for kind, wrong in (
        ("category", ("Carrier pigeon",)),
        ("category", ()),
        ("float", (1.0,)),
        ("float", (2.0, 1.0)),
        ("float", (None, 1.0)),
        ("boolean", ()),
    ):
        features = list(content.features)
        features[kinds[kind]] = msgspec.structs.replace(features[kinds[kind]], trained_on=wrong)
        with pytest.raises(ArtifactRefused, match="features, encoding and golden rows disagree"):
            Scorer(msgspec.structs.replace(content, features=tuple(features)))
