import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dataset import contract_with_contract_type, handmade_dataset
from test_training import BASELINE, fitted_on_real_january

from streamflow import scoring
from streamflow.errors import ArtifactRefused, TrainingRefused
from streamflow.scoring import Parity, Scorer, UnscorableFeatures, compile_pipeline, decide, parity, self_test, sha256
from streamflow.training import encoded_columns, fit

HEADER = 23 + 32


@pytest.fixture(scope="module")
def dataset():
    return handmade_dataset()


@pytest.fixture(scope="module")
def model(dataset):
    return fit(dataset, BASELINE)


@pytest.fixture(scope="module")
def artifact(model, dataset):
    return compile_pipeline(model, dataset)


@pytest.fixture(scope="module")
def scorer(artifact):
    return Scorer.from_bytes(artifact)


@pytest.fixture(scope="module")
def rows(dataset):
    return list(dataset.features.itertuples(index=False, name=None))


@pytest.fixture(scope="module")
def scores(scorer, rows):
    return scorer.score(rows)


def compared(model, scorer, frame):
    found = scorer.score_columns({feature.name: frame[feature.name] for feature in scorer.features})
    return parity(model.probabilities(frame), found, scorer.threshold)


def repacked(artifact, **changes):
    """The artifact with some fields changed and a checksum that fits."""
    content = msgspec.msgpack.decode(artifact[HEADER:]) | changes
    body = msgspec.msgpack.encode(content)
    return artifact[: HEADER - 32] + hashlib.sha256(body).digest() + body


# The same model


def test_scores_are_the_pipelines(model, dataset, scorer, scores):
    assert (scores == model.probabilities(dataset.features)).all()
    assert compared(model, scorer, dataset.frame) == Parity(0.0, 0, 400)


def test_scores_just_beside_the_forests_thresholds_are_the_pipelines(model, scorer, dataset):
    column = encoded_columns(dataset.service).index(("monthly_fee", None))
    trees = [tree.tree_ for tree in model.pipeline["classifier"].estimators_]
    thresholds = np.concatenate([tree.threshold[tree.feature == column] for tree in trees])[: len(dataset.frame)]
    for side in (-np.inf, np.inf):
        beside = dataset.frame[: len(thresholds)].assign(monthly_fee=np.nextafter(thresholds, side))
        assert compared(model, scorer, beside) == Parity(0.0, 0, len(thresholds))


def test_real_january_has_parity_on_every_row(real_data):
    dataset, model = fitted_on_real_january(real_data)
    scorer = Scorer.from_bytes(compile_pipeline(model, dataset))
    self_test(scorer)
    assert compared(model, scorer, dataset.frame) == Parity(0.0, 0, 7043)


def test_parity_notices_another_model(dataset, scorer):
    other = fit(handmade_dataset(seed=3), BASELINE)
    found = compared(other, scorer, dataset.frame)
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


def test_features_are_stated_in_the_services_order(scorer, dataset):
    assert scorer.service == "churn_v1"
    assert scorer.threshold == 0.5
    assert [(feature.name, feature.view) for feature in scorer.features] == [
        (column.name, view.name) for view in dataset.service.views for column in view.columns
    ]
    assert scorer.features[5].categories == ("DSL", "Fiber optic", "No")


def test_a_column_added_to_the_contract_reaches_the_scorer():
    dataset = handmade_dataset(120, contract=contract_with_contract_type())
    model = fit(dataset, BASELINE)
    scorer = Scorer.from_bytes(compile_pipeline(model, dataset))
    assert "contract_type" in {feature.name for feature in scorer.features}
    assert compared(model, scorer, dataset.frame).holds


def test_an_estimator_without_compiled_form_is_refused(model, dataset):
    from sklearn.pipeline import Pipeline
    from sklearn.tree import DecisionTreeClassifier

    tree = Pipeline([*model.pipeline.steps[:1], ("classifier", DecisionTreeClassifier())])
    with pytest.raises(TrainingRefused, match="DecisionTreeClassifier has no compiled form"):
        compile_pipeline(replace(model, pipeline=tree), dataset)


# A score depends on its row alone


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_a_score_does_not_depend_on_the_batch(data, scorer, rows, scores):
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=70))
    assert scorer.score([rows[index] for index in chosen]).tolist() == scores[chosen].tolist()


def test_single_rows_bulk_and_batch_agree_to_the_bit(scorer, rows, scores, dataset):
    assert [scorer.score([row])[0] for row in rows] == scores.tolist()
    bulk = scorer.score_columns({name: dataset.frame[name].to_numpy() for name in dataset.features})
    assert bulk.tolist() == scores.tolist()


def test_threads_score_alike(scorer, rows, scores):
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda row: scorer.score([row])[0], rows * 3))
    assert found == scores.tolist() * 3


def test_no_rows_have_no_scores(scorer, dataset):
    assert scorer.score([]).shape == (0,)
    assert scorer.score_columns({name: dataset.frame[name].to_numpy()[:0] for name in dataset.features}).shape == (0,)


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
        ("paperless_billing", [1.0, 0.0, 1.0, 0.0], 0),
    ],
)
def test_what_cannot_be_scored_in_bulk_is_named(scorer, dataset, feature, values, row):
    columns = {name: dataset.frame[name].to_numpy()[:4] for name in dataset.features}
    with pytest.raises(UnscorableFeatures) as refused:
        scorer.score_columns(columns | {feature: values})
    assert (refused.value.row, refused.value.feature) == (row, feature)


@pytest.mark.parametrize("row", range(6))
def test_a_missing_number_in_bulk_is_named_by_its_own_row(scorer, dataset, row):
    columns = {name: dataset.frame[name].to_numpy()[:6] for name in dataset.features}
    columns["skips_7d"] = np.where(np.arange(6) == row, np.nan, 1.0)
    with pytest.raises(UnscorableFeatures, match=f"row {row}: skips_7d is nan, not a known integer"):
        scorer.score_columns(columns)


def test_a_row_of_another_length_is_an_error(scorer, rows):
    for row in (rows[0][:-1], (*rows[0], 1)):
        with pytest.raises(ValueError, match="zip"):
            scorer.score([row])


# The file


def test_the_same_model_gives_the_same_bytes(model, dataset, artifact):
    assert compile_pipeline(fit(dataset, BASELINE, n_jobs=2), dataset) == artifact
    assert sha256(artifact) == hashlib.sha256(artifact).hexdigest()


def test_another_process_compiles_the_same_bytes(artifact):
    program = (
        "from test_dataset import handmade_dataset\n"
        "from streamflow.scoring import compile_pipeline, sha256\n"
        "from streamflow.training import encoded_columns, fit\n"
        f"dataset = handmade_dataset()\nprint(sha256(compile_pipeline(fit(dataset, {BASELINE!r}), dataset)))"
    )
    assert run(program) == sha256(artifact)


def test_loading_and_scoring_import_nothing_heavy(artifact, tmp_path):
    path = tmp_path / "scorer"
    path.write_bytes(artifact)
    program = (
        "import sys\nfrom pathlib import Path\nfrom streamflow.scoring import Scorer, self_test\n"
        "assert 'treelite' not in sys.modules\n"
        f"self_test(Scorer.from_bytes(Path({str(path)!r}).read_bytes()))\n"
        "print(*{'pandas', 'sklearn', 'pyarrow', 'mlflow', 'feast', 'dagster', 'matplotlib'} & set(sys.modules))"
    )
    assert run(program) == ""


def run(program):
    """What a program prints in a process of its own, with another hash seed, locale and time zone."""
    environment = {
        "PYTHONPATH": f"{Path(scoring.__file__).parent.parent}:{Path(__file__).parent}",
        "PYTHONHASHSEED": "7",
        "TZ": "Asia/Tokyo",
        "LC_ALL": "C",
    }
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_self_test_passes_and_holds_32_rows(scorer):
    self_test(scorer)
    assert len(scorer.golden_rows) == 32


def test_self_test_says_what_differs(artifact):
    stored = msgspec.msgpack.decode(artifact[HEADER:])["golden_probabilities"]
    stored[3] = float(np.nextafter(stored[3], 2))
    with pytest.raises(ArtifactRefused, match=rf"in 1 of 32 rows: row 3 scores .*, stored is {stored[3]!r}"):
        self_test(Scorer.from_bytes(repacked(artifact, golden_probabilities=stored)))


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
    later = artifact.replace(b"streamflow-scorer 0001", b"streamflow-scorer 0002", 1)
    with pytest.raises(ArtifactRefused, match="of another format; this program reads scorers of format 1"):
        Scorer.from_bytes(later)
    with pytest.raises(ArtifactRefused, match="no compiled scorer"):
        Scorer.from_bytes(b"\x80\x04\x95 a pickle")


def test_an_artifact_that_contradicts_itself_is_refused(artifact):
    content = msgspec.msgpack.decode(artifact[HEADER:])
    contradictions = [
        {"features": content["features"][:-1]},
        {"features": [content["features"][0], *content["features"][:-1]]},
        {"features": []},
        {"encoding": content["encoding"][:-1]},
        {"encoding": [{"feature": 0, "category": 0}, *content["encoding"][1:]]},
        {"encoding": [{"feature": 5, "category": 3}, *content["encoding"][1:]]},
        {"encoding": [{"feature": 5, "category": None}, *content["encoding"][1:]]},
        {"encoding": [{"feature": 99, "category": None}, *content["encoding"][1:]]},
        {"threshold": 0},
        {"threshold": 1.5},
        {"threshold": "half"},
        {"golden_rows": []},
        {"golden_rows": [row[:-1] for row in content["golden_rows"]]},
        {"golden_probabilities": content["golden_probabilities"][:-1]},
        {"estimator": content["estimator"] | {"type": "oracle"}},
        {"estimator": content["estimator"] | {"inputs": "float16"}},
        {"estimator": content["estimator"] | {"model": b"not deflated"}},
    ]
    Scorer.from_bytes(repacked(artifact))
    for changes in contradictions:
        with pytest.raises(ArtifactRefused):
            Scorer.from_bytes(repacked(artifact, **changes))
