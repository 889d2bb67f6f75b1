import re
import tomllib

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamflow.errors import ConfigurationError
from streamflow.settings import PROJECT_ROOT
from streamflow.training import ESTIMATORS
from streamflow.training_config import Threshold, TrainingConfig

FILE = PROJECT_ROOT / "training.toml"
TEXT = FILE.read_text()


@pytest.fixture
def load(tmp_path):
    """Loads a text as training.toml."""

    def loaded(text):
        path = tmp_path / "training.toml"
        path.write_text(text)
        return TrainingConfig.load(path)

    return loaded


RULE = r"^rule = .*?^capacity = \d+$"


def edited(pattern, replacement):
    """The repository's file with one place of it changed."""
    text, count = re.subn(pattern, replacement, TEXT, count=1, flags=re.MULTILINE | re.DOTALL)
    assert count, pattern
    return text


def test_the_file_in_the_repository_says_what_it_says():
    config = TrainingConfig.load(FILE)
    stated = tomllib.loads(TEXT)
    document = config.document
    assert document["threshold"] == {"capacity": None, "fixed": None} | stated["threshold"]
    for key in stated.keys() - {"threshold", "services", "candidates", "windows", "segments"}:
        assert document[key] == stated[key]
    assert list(config.services) == stated["services"]
    assert list(config.segments.attributes) == stated["segments"]["attributes"]
    assert config.segments.bands == {name: tuple(edges) for name, edges in stated["segments"]["bands"].items()}
    assert document["windows"] | {"names": list(config.windows.names)} == stated["windows"]
    assert list(config.candidates) == stated["candidates"] == list(ESTIMATORS)


def test_a_configuration_comes_back_from_its_document():
    config = TrainingConfig.load(FILE)
    recorded = msgspec.json.decode(msgspec.json.encode(config.document))
    assert TrainingConfig.of_document(recorded) == config
    assert TrainingConfig.of_document(recorded).digest == config.digest


def test_a_document_of_another_version_is_refused():
    document = TrainingConfig.load(FILE).document
    with pytest.raises(ConfigurationError, match=r"recorded training configuration cannot be used: .* `seed`"):
        TrainingConfig.of_document({name: value for name, value in document.items() if name != "seed"})
    with pytest.raises(ConfigurationError, match="unknown field `luck`"):
        TrainingConfig.of_document(document | {"luck": 7})


# The digest


@pytest.mark.parametrize(
    "text",
    [
        TEXT.replace("\n\n", "\n\n\n# Another remark.\n"),
        re.sub("^#.*\n", "", TEXT, flags=re.MULTILINE),
        TEXT.replace(" = ", "="),
        TEXT.replace("seed = 42", "seed = 0x2a"),
        edited(r"^(seed[^\n]*\n)(.*?)^(folds[^\n]*\n)", r"\3\2\1"),
    ],
    ids=["more comments", "no comments", "no spaces", "another notation", "another order of keys"],
)
def test_how_the_file_is_written_does_not_count(load, text):
    assert text != TEXT
    assert load(text).digest == TrainingConfig.load(FILE).digest


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        (r"^seed = \d+", "seed = 7"),
        (r"^folds = \d+", "folds = 7"),
        (r"^learning_rate = .*?$", "learning_rate = 0.051"),
        (r"^max_leaf_nodes = .*?$", ""),
        (r'(    "gradient_boosting",\n)(    "random_forest_leaf_limited",\n)', r"\2\1"),
        (r'^    "random_forest_baseline",\n', ""),
        (r'"churn_v1", "churn_v2"', '"churn_v2", "churn_v1"'),
        (r"^contact_cost = .*?$", "contact_cost = 20.5"),
        (RULE, 'rule = "fixed"\nfixed = 0.5'),
        (r"^months_active = \[6, ", "months_active = [5, "),
        (r"^minimum_positives = \d+", "minimum_positives = 31"),
    ],
)
def test_what_the_file_says_counts(load, pattern, replacement):
    assert load(edited(pattern, replacement)).digest != TrainingConfig.load(FILE).digest


@settings(deadline=None)
@given(st.permutations(TrainingConfig.load(FILE).candidates))
def test_each_order_of_the_candidates_has_its_own_digest_and_the_order_of_keys_none(order):
    config = TrainingConfig.load(FILE)
    other = msgspec.structs.replace(config, candidates=tuple(order))
    assert (other.digest == config.digest) == (tuple(order) == config.candidates)
    keys = {name: dict(reversed(config.estimators[name].items())) for name in order}
    assert msgspec.structs.replace(config, estimators=keys).digest == config.digest


# Refusals


@pytest.mark.parametrize(
    ("pattern", "replacement", "message"),
    [
        (r"^seed = \d+", "", r"missing required field `seed`"),
        (r"^seed = \d+", "seed = -1", r"\$.seed"),
        (r"^seed = \d+", "seed = 4294967296", r"\$.seed"),
        (r"^seed = \d+", "sede = 42", r"unknown field `sede`|missing required field `seed`"),
        (r"^seed = \d+", "seed = 42\nluck = 7", r"unknown field `luck`"),
        (r"^seed = \d+", "seed 42", r"line 4"),
        (r"^folds = \d+", "folds = 1", r"\$.folds"),
        (r"^bootstrap_draws = \d+", "bootstrap_draws = 999", r"\$.bootstrap_draws"),
        (r"^importance_repeats = \d+", "importance_repeats = 1", r"\$.importance_repeats"),
        (r"^services = .*?$", "services = []", r"\$.services"),
        (r'"churn_v2"', '"churn_v3"', r"services has 'churn_v3'; known are churn_v1, churn_v2, churn_v2_protected"),
        (r'"churn_v2"', '"churn_v1"', r"services has churn_v1 more than once"),
        (r"^\[estimators\.logistic_regression\]$", "[estimators.oracle]", r"estimators has 'oracle'; known are logis"),
        (r'^    "gradient_boosting",', '    "oracle",', r"candidates has 'oracle'; known are logistic"),
        (r'^    "gradient_boosting",', '    "logistic_regression",', r"candidates has logistic_regression more"),
        (r"^names = .*?$", "names = []", r"\$.windows.names"),
        (r"^names = .*?$", 'names = ["week"]', r"\$.windows.names"),
        (r"^names = .*?$", 'names = ["last 1"]', r"\$.windows.names"),
        (r"^names = .*?$", 'names = ["month", "last 03"]', r"\$.windows.names"),
        (r"^names = .*?$", 'names = ["all", "all"]', r"windows.names has all more than once"),
        (r"^half_life_months = .*?$", "half_life_months = 0", r"\$.windows.half_life_months"),
        (r"^half_life_months = .*?$", "half_life_months = inf", r"windows.half_life_months is inf"),
        (r"^estimator = .*?$", 'estimator = "oracle"', r"windows.estimator has 'oracle'; known are logistic_regress"),
        (r"^C = .*?$", "C = inf", r"estimators.logistic_regression.C is inf, which is no finite number"),
        (r"^C = .*?$", "C = 1e16", r"estimators.logistic_regression.C is 1e\+16; floats must be below 1e\+16, write"),
        (r"^C = .*?$", "C = [1, nan]", r"estimators.logistic_regression.C is nan"),
        (r"\[estimators\..*(?=^# What acting)", "[estimators]\n", r"\$.estimators"),
        (r"^contact_cost = .*?$", "contact_cost = -1", r"\$.value.contact_cost"),
        (r"^contact_cost = .*?$", "contact_cost = inf", r"value.contact_cost is inf"),
        (r"^contact_cost = .*?$", "contact_cost = nan", r"value.contact_cost"),
        (r"^retained_share = .*?$", "retained_share = 1.01", r"\$.value.retained_share"),
        (r"^retained_share = .*?$", "retained_share = 0", r"\$.value.retained_share"),
        (r"^months_retained = .*?$", "months_retained = 0", r"\$.value.months_retained"),
        (r"^rule = .*?$", 'rule = "guess"', r"\$.threshold.rule"),
        (RULE, 'rule = "capacity"', r"threshold.capacity is needed for rule = \"capacity\""),
        (RULE, 'rule = "capacity"\ncapacity = 0', r"\$.threshold.capacity"),
        (RULE, 'rule = "fixed"', r"threshold.fixed is for rule = \"fixed\" and needed there; the rule is"),
        (RULE, 'rule = "fixed"\nfixed = 0', r"\$.threshold.fixed"),
        (RULE, 'rule = "fixed"\nfixed = 1', r"\$.threshold.fixed"),
        (RULE, 'rule = "fixed"\nfixed = nan', r"threshold.fixed"),
        (r'"net_service"', '"net_servis"', r"segments.attributes has 'net_servis'; known are .*net_service"),
        (r'"net_service"', '"monthly_fee"', r"segments.attributes has 'monthly_fee'"),
        (r"^months_active = .*?$", "tenure = [6]", r"segments.bands has 'tenure'; known are months_active,"),
        (r"^months_active = .*?$", "contract_type = [6]", r"segments.bands has 'contract_type'"),
        (r"^months_active = .*?$", "months_active = []", r"segments.bands.months_active needs edges"),
        (r"^months_active = .*?$", "months_active = [6, 6]", r"segments.bands.months_active needs edges, each above"),
        (r"^months_active = .*?$", "months_active = [12, 6]", r"segments.bands.months_active needs edges, each above"),
        (r"^minimum_positives = \d+", "minimum_positives = 1", r"\$.guards.minimum_positives"),
        (r"^suspicious_auc = .*?$", "suspicious_auc = 0.5", r"\$.guards.suspicious_auc"),
    ],
)
def test_what_cannot_be_used_is_refused_by_file_and_key(load, tmp_path, pattern, replacement, message):
    with pytest.raises(ConfigurationError, match=message) as refused:
        load(edited(pattern, replacement))
    assert str(refused.value).startswith(f"the training configuration {tmp_path / 'training.toml'} cannot be used: ")


def test_all_that_is_wrong_is_said_at_once(load):
    text = edited(r'"churn_v2"', '"churn_v3"').replace("[6, 12", "[6, 6")
    with pytest.raises(ConfigurationError, match=r"services has 'churn_v3'.*; segments.bands.months_active"):
        load(text)


@pytest.mark.parametrize(
    ("replacement", "threshold"),
    [
        ('rule = "value"', Threshold("value")),
        ('rule = "value"\ncapacity = 500', Threshold("value", capacity=500)),
        ('rule = "capacity"\ncapacity = 500', Threshold("capacity", capacity=500)),
        ('rule = "fixed"\nfixed = 0.3', Threshold("fixed", fixed=0.3)),
    ],
)
def test_each_rule_of_the_threshold_takes_its_own_key(load, replacement, threshold):
    assert load(edited(RULE, replacement)).threshold == threshold


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"nowhere.toml cannot be read: No such file"):
        TrainingConfig.load(tmp_path / "nowhere.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match=r"bytes.toml cannot be used"):
        TrainingConfig.load(tmp_path / "bytes.toml")
