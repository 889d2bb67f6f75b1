import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from governed import GENDER

from streamflow.contract import CONTRACT
from streamflow.errors import ConfigurationError
from streamflow.policy import DecayPolicy, Gates, InvarianceRule, Policy, RetrainingPolicy
from streamflow.settings import Settings

SHIPPED = Settings().policy_file.read_text()


def load(folder: Path, content: str, **settings: Any) -> Policy:
    file = folder / "policy.toml"
    file.write_bytes(content.encode("latin-1"))
    return Policy.load(Settings(policy_file=file, **settings))


def test_a_policy_is_read_and_the_command_line_overrides_its_mode(tmp_path: Path) -> None:
    by = load(tmp_path, SHIPPED)

    assert (by.mode, by.first_model, by.protected_attributes, by.stage_set_by_hand) == (
        *("manual", "promote"),
        *("measure", "accept"),
    )
    assert by.gates.minimum_auc == 0.5
    assert by.invariances == (GENDER,)
    assert (by.decay.slide_months, by.retraining.on_drift) == (6, "large")
    assert load(tmp_path, SHIPPED, policy="auto") == msgspec.structs.replace(by, mode="auto")


def test_numbers_are_changed_by_what_the_policy_adds(tmp_path: Path) -> None:
    rule = '[[invariances]]\nfeature = "monthly_fee"\nadd = -0.5\nlargest_change = 0.1\n'
    by = load(tmp_path, f"{SHIPPED}\n{rule}")

    assert by.invariances == (GENDER, InvarianceRule("monthly_fee", 0.1, add=-0.5))
    assert [rule.change for rule in by.invariances] == ["every other value", "-0.5"]


KEYS = re.findall(r"(?m)^(\w+) = ", SHIPPED)


@pytest.mark.parametrize("key", KEYS)
def test_a_policy_without_a_key_is_refused_by_its_name_and_file(tmp_path: Path, key: str) -> None:
    without = re.sub(rf"(?m)^{key} = .*\n", "", SHIPPED)
    with pytest.raises(ConfigurationError, match=rf"policy\.toml cannot be used: .*`{key}`"):
        load(tmp_path, without)


def test_the_shipped_policy_has_every_key() -> None:
    tables = {*Gates.__struct_fields__, *DecayPolicy.__struct_fields__, *RetrainingPolicy.__struct_fields__}
    assert {*tables, "feature", "largest_change"} < set(KEYS)


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ("[gates]", "[gates]\nsurprise = 1", "surprise"),
        ('mode = "manual"', 'colour = 1\nmode = "manual"', "colour"),
        ('mode = "manual"', 'mode = "sometimes"', r"\$\.mode"),
        ('first_model = "promote"', 'first_model = "perhaps"', r"first_model"),
        ('attributes = "measure"', 'attributes = "ignore"', r"\$\.protected_attributes"),
        ('by_hand = "accept"', 'by_hand = "hide"', r"\$\.stage_set_by_hand"),
        ("minimum_auc = 0.5", 'minimum_auc = "high"', r"\$\.gates\.minimum_auc"),
        ("minimum_auc = 0.5", "minimum_auc = 0.49", r">= 0\.5 - at `\$\.gates\.minimum_auc"),
        ("minimum_auc = 0.5", "minimum_auc = nan", r"\$\.gates\.minimum_auc"),
        ("excess_ece = 0.03", "excess_ece = -0.1", r"\$\.gates\.maximum_excess_ece"),
        ("excess_ece = 0.03", "excess_ece = inf", r"\$\.gates\.maximum_excess_ece"),
        ("slide_versions = 4", "slide_versions = 1", r"\$\.gates\.slide_versions"),
        ("slide_versions = 4", "slide_versions = 2.5", r"\$\.gates\.slide_versions"),
        ("minimum_segment_users = 50", "minimum_segment_users = 0", r"\$\.gates\.minimum_segment_users"),
        ("microseconds = 2000", "microseconds = 0", r"\$\.gates\.maximum_scoring_microseconds"),
        ("better_by = 0.0", "better_by = -0.1", r"\$\.gates\.better_by"),
        ("largest_change = 0.0", "largest_change = 2.0", r"\$\.invariances\[0\]\.largest_change"),
        ('feature = "user_gender"', 'feature = "user_height"', "user_height, which is no feature of the contract"),
        ('feature = "user_gender"', 'feature = "monthly_fee"', "`invariances` of monthly_fee needs `add`"),
        ('feature = "user_gender"', 'feature = "monthly_fee"\nadd = 0.0', "`invariances` of monthly_fee needs `add`"),
        ('feature = "user_gender"', 'feature = "user_gender"\nadd = 1.0', "`invariances` of user_gender has `add`"),
        ("false_alarms = 0.01", "false_alarms = 0", r"\$\.decay\.maximum_false_alarms"),
        ("slide_months = 6", "slide_months = 3", r"\$\.decay\.slide_months"),
        ('on_drift = "large"', 'on_drift = "small"', r"\$\.retraining\.on_drift"),
        ("cooldown_months = 1", "cooldown_months = -1", r"\$\.retraining\.cooldown_months"),
        ("per_year = 6", "per_year = 0", r"\$\.retraining\.maximum_per_year"),
        ("[[invariances]]", "[invariances]", r"\$\.invariances"),
        ('mode = "manual"', "mode = ", r"policy\.toml"),
        ("[gates]", "# \xff\n[gates]", "utf-8"),
    ],
)
def test_a_policy_that_cannot_be_used_is_refused_with_its_key(
    tmp_path: Path, before: str, after: str, reason: str
) -> None:
    assert before in SHIPPED
    with pytest.raises(ConfigurationError, match=reason) as refused:
        load(tmp_path, SHIPPED.replace(before, after, 1))
    assert str(tmp_path / "policy.toml") in str(refused.value)


def test_a_missing_policy_file_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere.toml"
    with pytest.raises(ConfigurationError, match=f"{missing} cannot be read: No such file"):
        Policy.load(Settings(policy_file=missing))


def test_the_declared_invariances_are_of_features() -> None:
    names = {column.name for column in CONTRACT.features}
    assert {rule.feature for rule in Policy.load(Settings()).invariances} <= names
