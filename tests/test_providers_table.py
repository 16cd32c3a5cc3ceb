"""The table of providers, roles and prices: the file over what is built in, variables over the file, mistakes named."""

from pathlib import Path

import pytest

from sia_events import doctor
from sia_events.infra.providers.prices import built_in_prices, pricing
from sia_events.shared.providers import Price, Provider, cost
from sia_events.shared.settings import Settings, SettingsError, load_settings

BUILT_IN = {
    "anthropic",
    "openai",
    "google",
    "openrouter",
    "together",
    "nebius",
    "ollama",
    "vllm",
    "local",
    "instant",
}


def loaded(home: Path, toml: str = "", **variables: str) -> Settings:
    (home / "config.toml").write_text(toml)
    return load_settings({"SIA_HOME": str(home), **variables})


def test_without_a_file_the_usual_providers_are_there_and_no_role_is_cast(tmp_path: Path):
    found = load_settings({"SIA_HOME": str(tmp_path)})
    assert set(found.providers) == BUILT_IN
    assert found.providers["openai"] == Provider(
        kind="openai", base_url="https://api.openai.com/v1", key_env="OPENAI_API_KEY", concurrency=8, timeout_s=600
    )
    assert (found.roles.meta, found.roles.feedback, found.roles.target, found.prices) == (None, None, None, {})


def test_a_file_changes_fields_of_a_built_in_provider_and_adds_others(tmp_path: Path):
    found = loaded(
        tmp_path,
        """
        [providers.openai]
        concurrency = 2
        [providers.house]
        kind = "openai"
        base_url = "http://10.0.0.7:8000/v1"
        timeout_s = 60
        [roles]
        meta = "anthropic/claude-opus-5-5"
        [prices."house/big"]
        input = 0.5
        output = 1
        """,
    )
    own = found.providers["openai"]
    assert (own.concurrency, own.key_env) == (2, "OPENAI_API_KEY")
    house = found.providers["house"]
    assert (house.kind, house.key_env, house.timeout_s, house.concurrency) == ("openai", None, 60, 8)
    assert found.roles.meta == "anthropic/claude-opus-5-5"
    assert found.prices["house/big"] == Price(input=0.5, output=1)


def test_variables_win_over_the_file(tmp_path: Path):
    found = loaded(
        tmp_path,
        '[providers.my-house]\nkind = "openai"\nconcurrency = 2\n[roles]\nmeta = "a/b"\ntarget = "c/d"\n',
        SIA_PROVIDER_MY_HOUSE_CONCURRENCY="3",
        SIA_PROVIDER_MY_HOUSE_KEY_ENV="HOUSE_KEY",
        SIA_PROVIDER_OPENAI_BASE_URL="http://127.0.0.1:9/v1",
        SIA_META_MODEL="e/f",
        SIA_FEEDBACK_MODEL="",
    )
    assert (found.providers["my-house"].concurrency, found.providers["my-house"].key_env) == (3, "HOUSE_KEY")
    assert found.providers["openai"].base_url == "http://127.0.0.1:9/v1"
    assert (found.roles.meta, found.roles.feedback, found.roles.target) == ("e/f", None, "c/d")


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ('[providers.house]\nkind = "openai"\nkey = "x"', "config.toml: providers.house.key: Extra inputs"),
        ('[providers.house]\nkind = "bedrock"', "config.toml: providers.house.kind: Input should be"),
        ('[providers.house]\nbase_url = "http://x"', "config.toml: providers.house.kind: Field required"),
        ("[providers.openai]\nconcurrency = 0", "config.toml: providers.openai.concurrency: "),
        ('[providers.openai]\nbase_url = "api.openai.com"', "config.toml: providers.openai.base_url: "),
        ('[providers."My House"]\nkind = "openai"', "config.toml: providers.My House: "),
        ("providers = 3", "config.toml: providers: a table belongs there, not 3"),
        ("[providers]\nopenai = 3", "config.toml: providers.openai: a table belongs there, not 3"),
        ('[roles]\nmeta = "gpt-5"', "config.toml: roles.meta: "),
        ('[roles]\nmaster = "a/b"', "config.toml: roles.master: Extra inputs"),
        ('[prices."a/b"]\ninput = 1', "config.toml: prices.a/b.output: Field required"),
        ('[prices."a/b"]\ninput = -1\noutput = 1', "config.toml: prices.a/b.input: "),
    ],
)
def test_a_bad_row_is_named_with_file_and_key(toml: str, said: str, tmp_path: Path):
    with pytest.raises(SettingsError) as raised:
        loaded(tmp_path, toml)
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("SIA_PROVIDER_OPENAI_CONCURRENCY", "many", "SIA_PROVIDER_OPENAI_CONCURRENCY: "),
        ("SIA_PROVIDER_OPENAI_KEY", "sk-x", "SIA_PROVIDER_OPENAI_KEY: no such setting"),
        ("SIA_PROVIDER_NOBODY_BASE_URL", "http://x", "the providers are anthropic, openai"),
        ("SIA_META_MODEL", "gpt-5", "SIA_META_MODEL: "),
    ],
)
def test_a_bad_variable_of_the_table_is_named(variable: str, value: str, said: str, tmp_path: Path):
    with pytest.raises(SettingsError) as raised:
        loaded(tmp_path, **{variable: value})
    assert said in str(raised.value)
    assert "sk-x" not in str(raised.value)


def test_cached_tokens_have_their_own_price_and_else_the_price_of_input():
    usage = {
        "prompt_tokens": 1_000_000,
        "completion_tokens": 500_000,
        "prompt_tokens_details": {"cached_tokens": 400_000, "cache_write_tokens": 100_000},
    }
    assert cost(Price(input=3, output=15, cached_input=0.3, cache_write=3.75), usage) == pytest.approx(
        0.5 * 3 + 0.4 * 0.3 + 0.1 * 3.75 + 0.5 * 15
    )
    assert cost(Price(input=3, output=15), usage) == pytest.approx(3 + 7.5)


def test_an_unknown_price_is_none_our_own_models_are_free_and_the_users_table_wins():
    settings = Settings()
    used = {"prompt_tokens": 1_000_000, "completion_tokens": 1_000_000}
    usd = pricing(settings.providers, {})
    assert usd("anthropic/claude-opus-5-5", used) == 24.0
    assert usd("local/smollm2-135m-instruct", used) == 0.0
    assert usd("instant/first", used) == 0.0
    assert usd("openai/a-model-of-tomorrow", used) is None
    assert usd("ollama/llama3", used) is None
    mine = {"anthropic/claude-opus-5-5": Price(input=1, output=1), "ollama/*": Price(input=0, output=0.5)}
    usd = pricing(settings.providers, mine)
    assert usd("anthropic/claude-opus-5-5", used) == 2.0
    assert usd("ollama/llama3", used) == 0.5


def test_every_built_in_price_is_of_a_built_in_provider_and_output_costs_no_less_than_input():
    for model, price in built_in_prices().items():
        assert model.partition("/")[0] in BUILT_IN
        assert price.output >= price.input > 0


def test_the_doctor_says_of_each_provider_whether_it_is_ready_and_shows_no_key(tmp_path: Path):
    settings = loaded(tmp_path, '[roles]\nmeta = "anthropic/m"\ntarget = "openai/m"\n')
    checks = doctor.provider_checks(settings, {"OPENAI_API_KEY": "sk-secret"})
    told = {check.detail.partition(":")[0]: check for check in checks if check.name == "provider"}
    assert set(told) == BUILT_IN - {"local", "instant"}
    assert (told["openai"].status, told["openai"].fix) == ("ok", None)
    assert told["openai"].detail == "openai: ready, key from OPENAI_API_KEY, at https://api.openai.com/v1"
    assert told["anthropic"].status == "warn", "a role wants it"
    assert "ANTHROPIC_API_KEY is not set" in told["anthropic"].detail
    assert "ANTHROPIC_API_KEY" in (told["anthropic"].fix or "")
    assert told["google"].status == "ok" and "GEMINI_API_KEY is not set" in told["google"].detail
    assert [check.detail for check in checks if check.name == "roles"] == ["meta anthropic/m, target openai/m"]
    assert not any("sk-secret" in f"{check.detail}{check.fix}" for check in checks)
