"""Where a setting comes from, and what a mistake in one says."""

from __future__ import annotations

import os
import re
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, SecretStr, model_validator
from pydantic_settings import CliPositionalArg, SettingsConfigDict

from llorch import cli
from llorch.errors import SettingsError
from llorch.http.settings import ServeSettings
from llorch.setting_sources import check_variables
from llorch.settings import ModelSettings, ReportSettings, StringList, parse
from tests.support import ROOT

SOURCES = {".py", ".md", ".mjs", ".sh"}


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
    monkeypatch.setenv("LLORCH_STOP", "[x")
    assert "LLORCH_STOP: expected values separated by commas, or a JSON list" in mistake("--port", "1")


@pytest.mark.parametrize("name", ["LLORCH_PORT", "LLORCH_MODEL", "LLORCH_SECRET", "LLORCH_STOP", "LLORCH_CONFIG"])
def test_an_empty_variable_is_not_the_default(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "")
    with pytest.raises(SettingsError, match=f"^{name} is empty: give it a value, or unset it$"):
        parse(DemoSettings, ["hi"], "llorch demo")


def test_an_empty_variable_is_overruled_by_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLORCH_PORT", "")
    assert demo("--port", "7").port == 7


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("LLORCH_SECRETS", "; did you mean LLORCH_SECRET?"),
        ("LLORCH_API_KEYS", "; did you mean LLORCH_API_KEY?"),  # of another command
        ("llorch_cache_typ", "; did you mean LLORCH_CACHE_TYPE?"),
        ("LLORCH_SERVER_PORT", "; unset it, or see --help of the command for what there is"),  # no service link
        ("LLORCH_ZZZZ", "; unset it, or see --help of the command for what there is"),
    ],
)
def test_a_variable_that_nothing_reads_is_a_typo(monkeypatch: pytest.MonkeyPatch, name: str, hint: str) -> None:
    monkeypatch.setenv(name, "1")
    assert mistake() == f"{name} is no setting{hint}"


@pytest.mark.parametrize(
    "variable",
    [
        "LLORCH_MAX_QUEUE=1",  # of another command
        "LLORCH_FAULTS=1",
        "LLORCH_URL=1",
        "LLORCH_NUMPY_ANYTHING=1",  # of the provider numpy-cpu
        "LLORCH_SERVICE_HOST=10.0.0.1",  # Kubernetes, beside a Service llorch
        "LLORCH_PORT_80_TCP_ADDR=10.0.0.1",
        "LLORCH_API_SERVICE_PORT_HTTP=80",  # beside a Service llorch-api
        "LLORCH_API_PORT=tcp://10.0.0.1:80",
    ],
)
def test_a_variable_of_another_reader_is_passed_over(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(*variable.split("="))
    demo()


def test_every_variable_that_the_repository_names_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [ROOT / name for name in ("llorch", "plugins", "examples", "benchmarks", "docs")]
    text = "".join(path.read_text() for folder in folders for path in folder.rglob("*") if path.suffix in SOURCES)
    named = set(re.findall(r"\bLLORCH_[A-Z0-9_]*[A-Z0-9]\b", text))
    assert {"LLORCH_API_KEY", "LLORCH_FAULTS", "LLORCH_NUMBA_ISA"} <= named
    installed = [EntryPoint(name, "", "llorch.providers") for name in ("numpy-cpu", "numba-cpu", "cupy-cuda")]
    monkeypatch.setattr("llorch.setting_sources.entry_points", lambda group: installed)
    for name in named:
        monkeypatch.setenv(name, "1")
    check_variables(DemoSettings, ())


def test_a_mistake_in_the_file_names_key_and_file() -> None:
    Path("llorch.toml").write_text('cache-type = "q8"\n')
    assert mistake() == "cache_type in llorch.toml: expected 'f32' or 'f16', not 'q8'"


def test_a_file_that_is_no_toml() -> None:
    Path("llorch.toml").write_text("port 8080\n")
    assert "llorch.toml cannot be read" in mistake()
    assert "line 1" in mistake()


def test_a_file_that_is_a_directory_is_not_passed_over() -> None:
    Path("llorch.toml").mkdir()
    assert mistake() == "llorch.toml cannot be read: Is a directory"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "parallel = true",
            "parallel in llorch.toml: expected a whole number, at least 1 and at most 4096, not 'true'",
        ),
        ("warmth = true", "warmth in llorch.toml: expected a number, above 0 and below 2, not 'true'"),
        ("threads = false", "threads in llorch.toml: expected a whole number, at least 1, not 'false'"),
        ("provider = 5", "provider in llorch.toml: expected a valid string, not 5"),
        ("model = 5", "model in llorch.toml: expected a path, not 5"),
        ('model = ""', "model in llorch.toml: expected a path, not ''"),
    ],
)
def test_a_value_of_another_type_in_the_file(line: str, message: str) -> None:
    Path("llorch.toml").write_text(line + "\n")
    with pytest.raises(SettingsError) as caught:
        parse(DemoSettings, ["hi"], "llorch demo")
    assert str(caught.value) == message


def test_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("llorch.toml").write_text("port = 1\n")
    other = tmp_path / "other.toml"
    other.write_text("port = 2\n")
    assert (demo().port, demo().file) == (1, Path("llorch.toml"))
    assert (demo("--config", str(other)).port, demo("--config", str(other)).file) == (2, other)
    monkeypatch.setenv("LLORCH_CONFIG", str(other))
    assert demo().port == 2
    other.write_text("port = 0\n")
    assert mistake().startswith(f"port in {other}: expected a whole number")
    other.write_text('config = "llorch.toml"\n')
    assert "unknown key 'config'" in mistake()
    other.unlink()
    assert mistake() == f"{other} cannot be read: No such file or directory"


def test_a_late_mistake_says_where_the_setting_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*argv: str) -> str:
        with pytest.raises(SettingsError) as caught, demo(*argv).explaining():
            raise SettingsError("context 4096 is too long", setting="context")
        return str(caught.value)

    assert late() == "context 4096 is too long"
    Path("llorch.toml").write_text("context = 4096\n")
    assert late() == "context 4096 is too long (context in llorch.toml; --context counts more)"
    monkeypatch.setenv("LLORCH_CONTEXT", "4096")
    assert late() == "context 4096 is too long (LLORCH_CONTEXT; --context counts more)"
    assert late("--context", "4096") == "context 4096 is too long (--context)"


def test_an_unknown_key_in_the_file_gives_a_suggestion() -> None:
    Path("llorch.toml").write_text("max-token = 5\n")
    assert mistake() == "llorch.toml: unknown key 'max-token'; did you mean max_tokens?"
    Path("llorch.toml").write_text("zzzzzz = 5\n")
    assert "llorch.toml: unknown key 'zzzzzz'; keys are the options of the commands" in mistake()


def test_a_suggestion_is_of_the_running_command_first(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("llorch.toml").write_text("prot = 5\n")  # nearer to the `prompt` of `llorch run`
    with pytest.raises(SettingsError, match=r"unknown key .prot.; did you mean port\?"):
        parse(ServeSettings, [], "llorch serve")
    monkeypatch.setenv("LLORCH_PROT", "5")
    with pytest.raises(SettingsError, match=r"LLORCH_PROT is no setting; did you mean LLORCH_PORT\?"):
        parse(ServeSettings, [], "llorch serve")


# ---- keys ----


def keys(*argv: str) -> tuple[str, ...]:
    return parse(ServeSettings, argv, "llorch serve").api_keys


def test_keys_come_from_an_option_the_file_or_a_file_of_their_own() -> None:
    assert keys() == ()
    assert keys("--api-key", "a, b") == ("a", "b")
    Path("llorch.toml").write_text('api_key = ["a", "b"]\n')
    assert keys() == ("a", "b")
    Path("keys").write_text("# the first\nc\n\n  d  \n")
    assert keys("--api-key-file", "keys") == ("a", "b", "c", "d")


@pytest.mark.parametrize("values", ['["a", 5]', '["a,b"]', "[]"])
def test_a_list_of_keys_that_is_none(values: str) -> None:
    Path("llorch.toml").write_text(f"api_key = {values}\n")
    with pytest.raises(SettingsError, match=r"^api_key in llorch\.toml: expected (texts without commas|one key)"):
        keys()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "a file that can be read (No such file or directory)"),
        (b"# none\n", "a file with a key in it"),
        (b"\xff", "a file that can be read (it is no text)"),
    ],
)
def test_a_file_of_keys_that_holds_none(content: bytes | None, reason: str) -> None:
    if content is not None:
        Path("keys").write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        keys("--api-key-file", "keys")
    assert str(caught.value).startswith(f"--api-key-file: expected {reason}")


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
