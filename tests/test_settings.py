from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError

from streamflow.errors import ConfigurationError
from streamflow.settings import PREFIX, PROJECT_ROOT, Settings

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)
PORT = st.integers(1, 65535)
ANY_SETTINGS = st.builds(
    Settings,
    home=TEXT.map(lambda name: Path("/", name.replace("~", "-"))),
    database_url=st.none() | TEXT,
    owner_database_url=st.none() | TEXT,
    mlflow_uri=st.none() | TEXT,
    host=TEXT,
    api_port=PORT,
    dagster_port=PORT,
    mlflow_port=PORT,
    code_port=PORT,
    policy=st.sampled_from([None, "manual", "auto"]),
    actor=TEXT,
    api_keys_file=st.none() | TEXT.map(lambda name: Path("/", name.replace("~", "-"))),
    api_key=st.none() | TEXT,
    workers=st.integers(1, 64),
    max_in_flight=st.integers(1, 10_000),
    access_log=st.booleans(),
)


def test_what_is_not_set_has_a_default_on_loopback() -> None:
    settings = Settings.load()
    assert settings.home == Path.cwd() / "var"
    assert settings.database_url is None
    assert (settings.host, settings.code_host) == ("127.0.0.1", "127.0.0.1")
    assert (settings.api_port, settings.dagster_port, settings.mlflow_port) == (8000, 3000, 5000)
    assert (settings.api_keys_file, settings.workers, settings.max_in_flight) == (None, 1, 512)
    assert settings.policy is None
    assert settings.policy_file == PROJECT_ROOT / "policy.toml"
    assert settings.policy_file.exists()
    assert settings.actor


def test_each_field_is_read_from_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMFLOW_HOME", "/srv/streamflow")
    monkeypatch.setenv("STREAMFLOW_DATABASE_URL", "postgresql://a:b@c:1/d")
    monkeypatch.setenv("STREAMFLOW_API_PORT", "8001")
    monkeypatch.setenv("STREAMFLOW_POLICY", "auto")
    monkeypatch.setenv("STREAMFLOW_OF_ANOTHER_VERSION", "ignored")
    settings = Settings.load()
    assert settings.home == Path("/srv/streamflow")
    assert settings.database_url == "postgresql://a:b@c:1/d"
    assert settings.api_port == 8001
    assert settings.policy == "auto"


def test_arguments_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMFLOW_API_PORT", "8001")
    assert Settings.load(api_port=8002).api_port == 8002


def test_paths_do_not_depend_on_where_a_process_goes_later(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/users/ada")
    assert Settings.load(home="state").home == tmp_path / "state"
    assert Settings.load(home="~/state").home == Path("/users/ada/state")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("API_PORT", "0"),
        ("API_PORT", "65536"),
        ("DAGSTER_PORT", "http"),
        ("MLFLOW_PORT", ""),
        ("HOME", ""),
        ("POLICY", "whatever"),
        ("API_KEYS_FILE", ""),
        ("WORKERS", "0"),
        ("MAX_IN_FLIGHT", "0"),
        ("ACCESS_LOG", "often"),
        ("ACTOR", ""),
    ],
)
def test_a_value_that_cannot_be_used_names_its_variable(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(PREFIX + name, value)
    with pytest.raises(ConfigurationError, match=f"^STREAMFLOW_{name}='{value}': "):
        Settings.load()


def test_every_bad_variable_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMFLOW_API_PORT", "many")
    monkeypatch.setenv("STREAMFLOW_POLICY", "whatever")
    with pytest.raises(ConfigurationError, match=r"STREAMFLOW_API_PORT='many'.*; STREAMFLOW_POLICY='whatever'"):
        Settings.load()


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().home = Path("/elsewhere")


@hypothesis_settings(max_examples=50, deadline=None)
@given(ANY_SETTINGS)
def test_another_process_reads_the_same_settings(settings: Settings) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.environment().items():
            patch.setenv(name, value)
        assert Settings.load() == settings


def test_what_is_not_set_is_not_handed_on() -> None:
    environment = Settings(home=Path("/srv")).environment()
    assert environment["STREAMFLOW_HOME"] == "/srv"
    assert "STREAMFLOW_DATABASE_URL" not in environment
    assert all(name.startswith(PREFIX) for name in environment)
