"""Where a setting comes from, and what a mistake in one says."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, SecretStr, model_validator
from pydantic_settings import CliPositionalArg, SettingsConfigDict

from llorch import cli
from llorch.errors import SettingsError
from llorch.settings import ModelSettings, ReportSettings, StringList, parse


class DemoSettings(ModelSettings, ReportSettings):
    """Does nothing; 100 % of it is settings."""

    model_config = SettingsConfigDict(cli_shortcuts={"port": "p"})

    prompt: CliPositionalArg[str] = Field(description="what to say", examples=["'Hello'"])
    port: int = Field(8080, ge=1, le=65535, description="port")
    warmth: float = Field(1.0, gt=0, lt=2, description="a number")
    level: Literal["low", "high"] = Field("low", description="how much")
    secret: SecretStr | None = Field(None, min_length=8, description="a key")
    stop: StringList = Field([], description="where to stop")

    @model_validator(mode="after")
    def _cross(self) -> DemoSettings:
        if self.port == 9999 and self.level == "high":
            raise ValueError("--port 9999 does not go with --level high: choose another port")
        return self


@pytest.fixture(autouse=True)
def _no_settings_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.upper().startswith("LLORCH_"):
            monkeypatch.delenv(name)


def demo(*argv: str) -> DemoSettings:
    return parse(DemoSettings, ["hi", "--model", "m.gguf", *argv], "llorch demo")


def mistake(*argv: str) -> str:
    with pytest.raises(SettingsError) as caught:
        demo(*argv)
    return str(caught.value)


# ---- sources ----


def test_defaults() -> None:
    settings = demo()
    assert (settings.provider, settings.parallel, settings.chunk) == ("auto", 8, 512)
    assert (settings.device, settings.context, settings.cache_type, settings.threads) == (None, None, None, None)
    assert settings.model == Path("m.gguf")


def test_the_command_line_counts_more_than_the_environment_than_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("llorch.toml").write_text("port = 1001\n")
    assert demo().port == 1001
    monkeypatch.setenv("LLORCH_PORT", "1002")
    assert demo().port == 1002
    assert demo("--port", "1003").port == 1003


def test_flags_follow_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("llorch.toml").write_text("json = true\n")
    assert demo().as_json
    monkeypatch.setenv("LLORCH_JSON", "false")
    assert not demo().as_json
    assert demo("--json").as_json
    assert not demo("--no-json").as_json


def test_required_settings_may_come_from_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLORCH_MODEL", "env.gguf")
    Path("llorch.toml").write_text('prompt = "from the file"\n')
    settings = parse(DemoSettings, [], "llorch demo")
    assert (settings.model, settings.prompt) == (Path("env.gguf"), "from the file")


@pytest.mark.parametrize("key", ["cache-type", "cache_type"])
def test_options_are_kebab_case_and_file_keys_may_be(key: str) -> None:
    Path("llorch.toml").write_text(f'{key} = "f16"\n')
    assert demo().cache_type == "f16"
    assert demo("--cache-type", "f32").cache_type == "f32"


@pytest.mark.parametrize("prompt", ["null", "None", "", "[1]", "a, b", ' "quoted" \\n\n', "--port"])
def test_a_positional_is_taken_literally(prompt: str) -> None:
    assert parse(DemoSettings, ["--model", "m.gguf", "--", prompt], "llorch demo").prompt == prompt


def test_repeated_options_are_taken_literally() -> None:
    values = ["a,b", "\n\n", ' "', "[x", "\\n", "", "3"]
    assert demo(*(f"--stop={value}" for value in values)).stop == values


def test_lists_in_variables_and_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("llorch.toml").write_text('stop = ["a,b", "c"]\n')
    assert demo().stop == ["a,b", "c"]
    monkeypatch.setenv("LLORCH_STOP", "x,y")
    assert demo().stop == ["x", "y"]
    monkeypatch.setenv("LLORCH_STOP", '["x,y"]')
    assert demo().stop == ["x,y"]


def test_keys_of_other_commands_are_passed_over() -> None:
    Path("llorch.toml").write_text("max_tokens = 5\nport = 7\n")
    assert demo().port == 7


def test_debug_turns_tracebacks_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "tracebacks", False)
    demo()
    assert not cli.tracebacks
    Path("llorch.toml").write_text("debug = true\n")
    demo()
    assert cli.tracebacks


# ---- mistakes ----


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--port", "0"], "--port: expected a whole number, at least 1 and at most 65535, not '0'"),
        (["-p", "0"], "-p: expected a whole number, at least 1 and at most 65535, not '0'"),
        (["-p0"], "-p: expected a whole number, at least 1 and at most 65535, not '0'"),
        (["--port=many"], "--port: expected a whole number, at least 1 and at most 65535, not 'many'"),
        (["--context", "1.5"], "--context: expected a whole number, at least 2, not '1.5'"),
        (["--warmth", "2"], "--warmth: expected a number, above 0 and below 2, not '2'"),
        (["--level", "mid"], "--level: expected 'low' or 'high', not 'mid'"),
        (["--cache-type", "q8"], "--cache-type: expected 'f32' or 'f16', not 'q8'"),
        (["--prot", "1"], "unknown option --prot; did you mean --port? See llorch demo --help"),
        (["--prot=1"], "unknown option --prot; did you mean --port? See llorch demo --help"),
        (["--zzz"], "unknown option --zzz. See llorch demo --help"),
        (["there"], "unexpected argument 'there'. See llorch demo --help"),
        (["--port"], "--port/-p: expected one argument. See llorch demo --help"),
        (["--port", "9999", "--level", "high"], "--port 9999 does not go with --level high: choose another port"),
    ],
)
def test_a_mistake_on_the_command_line(argv: list[str], message: str) -> None:
    assert mistake(*argv) == message


def test_a_bad_secret_is_not_repeated() -> None:
    message = mistake("--secret", "hunter2")
    assert message.startswith("--secret: ")
    assert "hunter2" not in message


def test_a_mistake_in_the_environment_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLORCH_PORT", "many")
    assert mistake().startswith("LLORCH_PORT: expected a whole number")
    monkeypatch.setenv("LLORCH_PORT", "")  # a variable that was meant to hold something is not the default
    assert mistake().startswith("LLORCH_PORT: expected a whole number")
    monkeypatch.setenv("LLORCH_STOP", "[x")
    assert "LLORCH_STOP: expected values separated by commas, or a JSON list" in mistake("--port", "1")


def test_a_mistake_in_the_file_names_key_and_file() -> None:
    Path("llorch.toml").write_text('cache-type = "q8"\n')
    assert mistake() == "cache_type in llorch.toml: expected 'f32' or 'f16', not 'q8'"


def test_a_file_that_is_no_toml() -> None:
    Path("llorch.toml").write_text("port 8080\n")
    assert "llorch.toml cannot be read" in mistake()
    assert "line 1" in mistake()


def test_an_unknown_key_in_the_file_gives_a_suggestion() -> None:
    Path("llorch.toml").write_text("max-token = 5\n")
    assert mistake() == "llorch.toml: unknown key 'max-token'; did you mean max_tokens?"
    Path("llorch.toml").write_text("zzzzzz = 5\n")
    assert "llorch.toml: unknown key 'zzzzzz'; keys are the options of the commands" in mistake()


def test_a_missing_setting_gives_an_example() -> None:
    with pytest.raises(SettingsError) as caught:
        parse(DemoSettings, [], "llorch demo")
    expected = "PROMPT is missing, for example llorch demo 'Hello' (or set LLORCH_PROMPT, or prompt in llorch.toml)"
    assert str(caught.value) == expected


def test_where_no_model_is_named_it_is_the_demonstration() -> None:
    assert parse(DemoSettings, ["hi"], "llorch demo").is_demo
    assert not demo().is_demo


def test_many_mistakes_stay_short() -> None:
    lines = mistake("--port", "0", "--context", "x", "--threads", "0", "--level", "mid").splitlines()
    assert len(lines) == 3
    assert lines[-1] == "and 2 more"


def test_help_says_what_there_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        demo("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "100 % of it" in text
    assert re.search(r"--cache-type \{f32,f16\} +KV cache type", text)
    assert "(default: 8080)" in text
    assert "\0" not in text
    assert "default: None" not in text
    assert "llorch-demo.gguf" not in text
