"""The environment as the worker reads it."""

import pytest

from worker.settings import Settings, peer_access_is_allowed, secret_values

BUCKET = {
    "BUCKET_ENDPOINT_URL": "https://s3.example.com",
    "BUCKET_ACCESS_KEY_ID": "id",
    "BUCKET_SECRET_ACCESS_KEY": "the-secret",
}


def test_an_empty_environment_gives_a_production_worker_without_a_bucket() -> None:
    settings = Settings.from_env({})
    assert settings.avatar_model == "hunyuan-video-avatar"
    assert settings.bucket is None


def test_an_empty_variable_counts_as_not_set() -> None:
    assert Settings.from_env({"MAX_AUDIO_SECONDS": "", "BUCKET_NAME": ""}) == Settings()


def test_a_wrong_value_is_named_by_its_variable_and_never_shown() -> None:
    with pytest.raises(ValueError, match="MAX_AUDIO_SECONDS") as caught:
        Settings.from_env({"MAX_AUDIO_SECONDS": "a-secret-by-mistake"})
    assert "a-secret-by-mistake" not in str(caught.value)


@pytest.mark.parametrize("value", ["0", "604801", "-1", "1e9", "nan"])
def test_the_life_of_a_url_is_at_most_seven_days(value: str) -> None:
    with pytest.raises(ValueError, match="BUCKET_URL_EXPIRES_SECONDS"):
        Settings.from_env({"BUCKET_URL_EXPIRES_SECONDS": value})


@pytest.mark.parametrize("missing", list(BUCKET))
def test_a_bucket_needs_an_address_and_both_keys(missing: str) -> None:
    rest = {name: value for name, value in BUCKET.items() if name != missing}
    assert Settings.from_env(rest).bucket is None


def test_no_key_stands_in_the_settings_text() -> None:
    settings = Settings.from_env(BUCKET)
    assert settings.bucket is not None
    assert "the-secret" not in f"{settings!r} {settings} {settings.bucket!r}"
    assert settings.bucket.secret_access_key.get_secret_value() == "the-secret"


@pytest.mark.parametrize("key", ["too-short-a-key", "x" * 31 + " y", "é" * 40, "x" * 1025])
def test_a_signing_key_that_is_none_keeps_the_worker_from_starting_and_is_not_shown(
    key: str,
) -> None:
    with pytest.raises(ValueError, match=r"RESULT_SIGNING_KEY: .*openssl rand") as caught:
        Settings.from_env({"RESULT_SIGNING_KEY": key})
    assert key not in str(caught.value)


def test_a_signing_key_stands_in_no_text_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    key = "0123456789abcdef" * 2
    assert key not in repr(Settings.from_env({"RESULT_SIGNING_KEY": key}))
    monkeypatch.setenv("RESULT_SIGNING_KEY", key)
    assert key in secret_values()  # which no log shows


@pytest.mark.parametrize(
    ("given", "level"), [("info", "INFO"), ("Warn", "WARN"), (" error ", "ERROR")]
)
def test_a_choice_may_be_written_in_any_letters(given: str, level: str) -> None:
    settings = Settings.from_env({"RUNPOD_LOG_LEVEL": given, "AVATAR_MODEL": "Demo"})
    assert (settings.runpod_log_level, settings.avatar_model) == (level, "demo")


def test_a_choice_that_the_sdk_has_not_is_named_before_the_sdk_ends_the_process() -> None:
    with pytest.raises(ValueError, match=r"RUNPOD_LOG_LEVEL: .*'WARN'"):
        Settings.from_env({"RUNPOD_LOG_LEVEL": "warning"})


def test_the_variable_that_keeps_nccl_from_other_gpus_memory_keeps_the_worker_from_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    assert peer_access_is_allowed()
    for value, allowed in (("0", True), ("1", False)):
        monkeypatch.setenv("NCCL_P2P_DISABLE", value)
        assert peer_access_is_allowed() is allowed
