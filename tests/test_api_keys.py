import hmac
from hashlib import sha256
from pathlib import Path

import pytest

from streamflow.api_keys import ApiKeys, make_key, request_headers
from streamflow.errors import ConfigurationError
from streamflow.settings import Settings

DIGEST = sha256(b"key of ada").hexdigest()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys" / "api_keys"


def _written(file: Path, text: str) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    file.chmod(0o600)
    return file


def test_a_key_is_kept_as_its_hash_and_found_again(file: Path) -> None:
    ada, ben = make_key(file, "ada"), make_key(file, "ben")
    assert file.read_text() == f"ada:{sha256(ada.encode()).hexdigest()}\nben:{sha256(ben.encode()).hexdigest()}\n"
    assert file.stat().st_mode & 0o777 == 0o600
    assert len(ada) == 43
    keys = ApiKeys.load(file)
    assert [keys.owner(key) for key in (ada, ben.encode(), "", ada[:-1], ada + "=", DIGEST)] == [
        *("ada", "ben"),
        *(None, None, None, None),
    ]
    assert keys.owner(sha256(ada.encode()).hexdigest()) is None, "a stolen file opens nothing"


def test_every_digest_is_compared_in_constant_time(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    keys = ApiKeys({"ada": DIGEST, "ben": "b" * 64, "eve": "e" * 64})
    assert keys.owner("key of ada") == "ada"
    assert compared == [(DIGEST, DIGEST), (DIGEST, "b" * 64), (DIGEST, "e" * 64)]


def test_a_name_has_one_key(file: Path) -> None:
    make_key(file, "ada")
    before = file.read_text()
    with pytest.raises(ConfigurationError, match=r"ada has an API key in .*api_keys; remove that line"):
        make_key(file, "ada")
    assert file.read_text() == before


@pytest.mark.parametrize("name", ["", "a b", "a:b", "a\n", "ä", "a" * 65])
def test_a_name_that_would_break_the_file_is_refused(file: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match="is no name for an API key"):
        make_key(file, name)
    assert not file.exists()


def test_a_line_without_its_end_is_not_run_into(file: Path) -> None:
    _written(file, f"ada:{DIGEST}")
    ben = make_key(file, "ben")
    assert ApiKeys.load(file).owner(ben) == "ben"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"ada:{DIGEST}\nben\n", "line 2 of .*api_keys is not NAME:SHA-256"),
        (f"ada:{DIGEST[:-1]}\n", "line 1"),
        (f"ada:{DIGEST.upper()}\n", "line 1"),
        (f"ada:{DIGEST}\n\n", "line 2"),
        (f"a da:{DIGEST}\n", "line 1"),
        (f"ada:{DIGEST}\nada:{'b' * 64}\n", "line 2 of .*api_keys gives ada a second"),
        (f"ada:{DIGEST}\nben:{DIGEST}\n", "line 2 of .*api_keys has the same"),
        ("", "there are no API keys in .*streamflow key NAME"),
        ("ä:0\n", "is not ASCII"),
    ],
)
def test_a_file_that_cannot_be_trusted_is_refused(file: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        ApiKeys.load(_written(file, text))


def test_a_file_that_is_not_there_says_how_to_make_it(file: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"No such file.*STREAMFLOW_API_KEYS_FILE=.*api_keys streamflow key"):
        ApiKeys.load(file)


def test_a_file_that_others_may_change_is_refused(file: Path) -> None:
    _written(file, f"ada:{DIGEST}\n").chmod(0o620)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        ApiKeys.load(file)


def test_a_file_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be added to"):
        make_key(tmp_path, "ada")


def test_commands_show_the_key_that_they_are_given() -> None:
    assert request_headers(Settings(api_key="secret")) == {"Authorization": "Bearer secret"}
    assert request_headers(Settings()) == {}
