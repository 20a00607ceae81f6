import glob
import json
from pathlib import Path

import pytest
from pydantic import Field, TypeAdapter

from fedloom_common.errors import BadSpec
from fedloom_common.settings import Address, ConfigGlob, ConfigPath, load_settings, settings_help
from fedloom_common.strict import Name, Strict


class Source(Strict):
    files: tuple[ConfigGlob, ...] = Field(min_length=1)
    """Files of the data set."""
    share: float = 0.5
    """Part of it."""


class Keys(Strict):
    ca: ConfigPath
    """The CA."""
    key: ConfigPath
    """The key."""


class Config(Strict):
    listen: str = "127.0.0.1:7443"
    """Address to listen at."""
    keys: Keys | None = None
    """Certificates."""
    data: dict[Name, Source] = Field(default={})
    """Data sets."""
    ranks: int | None = Field(default=2, ge=1)
    """Processes."""
    tasks: tuple[str, ...] = ("causal_lm",)
    """Kinds of ``task``."""
    dry_run: bool = False
    """Whether nothing is done."""


def load(*flags: str, file: Path | None = None) -> Config:
    return load_settings(Config, file, env_prefix="FEDTEST_", flags=flags)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "etc" / "config.yaml"
    path.parent.mkdir()
    path.write_text(
        "listen: from-file:1\nkeys: {ca: ca.crt, key: /abs/own.key}\ndata: {texts: {files: ['*.txt']}}\n"
    )
    return path


def test_who_forgot_the_config_file_is_told_so(file: Path) -> None:
    with pytest.raises(BadSpec, match="has mistakes, and no --config FILE is given:\n  ranks: "):
        load("--ranks", "0")
    with pytest.raises(BadSpec, match="has mistakes:\n  ranks: "):
        load("--ranks", "0", file=file)


def test_flags_win_over_the_environment_and_the_environment_over_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(file=file).listen == "from-file:1"
    monkeypatch.setenv("FEDTEST_LISTEN", "from-env:1")
    assert load(file=file).listen == "from-env:1"
    assert load("--listen", "from-flag:1", file=file).listen == "from-flag:1"


def test_a_part_of_a_mapping_is_replaced_alone(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTEST_KEYS__KEY", "/env/own.key")
    config = load("--data.more.files=/x/a.txt", file=file)
    assert config.keys == Keys(ca=file.parent / "ca.crt", key=Path("/env/own.key"))
    assert sorted(config.data) == ["more", "texts"]


def test_relative_paths_start_at_the_file_or_where_they_were_typed(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDTEST_DATA__ENV__FILES", json.dumps(["b/*.txt"]))
    config = load("--keys.key", "typed.key", file=Path("etc/config.yaml"))
    assert config.keys == Keys(ca=tmp_path / "etc/ca.crt", key=tmp_path / "typed.key")
    assert config.data["texts"].files == (str(tmp_path / "etc/*.txt"),)
    assert config.data["env"].files == (str(tmp_path / "b/*.txt"),)


def test_a_linked_config_keeps_its_paths_beside_the_link(file: Path, tmp_path: Path) -> None:
    link = tmp_path / "config.yaml"
    link.symlink_to(file)
    assert load(file=link).keys == Keys(ca=tmp_path / "ca.crt", key=Path("/abs/own.key"))


def test_a_folder_whose_name_looks_like_a_pattern_is_no_pattern(tmp_path: Path) -> None:
    file = tmp_path / "kit[1]" / "config.yaml"
    file.parent.mkdir()
    file.write_text("data: {texts: {files: ['*.txt']}}")
    (file.parent / "a.txt").touch()
    assert glob.glob(load(file=file).data["texts"].files[0]) == [str(file.parent / "a.txt")]  # noqa: PTH207


def test_the_home_folder_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    config = load("--keys", '{"ca": "~/ca.crt", "key": "~/own.key"}')
    assert config.keys == Keys(ca=Path("/home/ann/ca.crt"), key=Path("/home/ann/own.key"))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--tasks", "a", "--tasks=b"], {"tasks": ("a", "b")}),
        (["--tasks", '["a", "b"]'], {"tasks": ("a", "b")}),
        (["--ranks", "4"], {"ranks": 4}),
        (["--ranks", "4", "--ranks", "5"], {"ranks": 5}),
        (["--ranks", "null"], {"ranks": None}),
        (["--dry-run"], {"dry_run": True}),
        (["--dry-run", "--ranks=1"], {"dry_run": True, "ranks": 1}),
        (["--dry_run", "false"], {"dry_run": False}),
        (
            ["--data", '{"t": {"files": ["/a"], "share": 0.1}}'],
            {"data": {"t": Source(files=("/a",), share=0.1)}},
        ),
        (["--listen=--odd"], {"listen": "--odd"}),
    ],
)
def test_values_are_read_from_flags(flags: list[str], expected: dict[str, object]) -> None:
    assert load(*flags) == Config(**expected)


def test_a_mapping_from_the_environment_takes_single_parts_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTEST_KEYS__KEY", "/new.key")
    monkeypatch.setenv("FEDTEST_KEYS", '{"ca": "/ca.crt", "key": "/old.key"}')
    assert load().keys == Keys(ca=Path("/ca.crt"), key=Path("/new.key"))


@pytest.mark.parametrize(
    "variable",
    [
        "FEDTEST_CONFIG",
        "FEDTEST_SERVICE_HOST",
        "FEDTEST_PORT",
        "FEDTEST_PORT_7443_TCP_ADDR",
        "FEDTEST_SERVICE_PORT_GRPC",
    ],
)
def test_variables_that_are_no_settings_are_left_alone(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "tcp://10.0.0.1:7443")
    assert load() == Config()


def test_an_empty_variable_counts_as_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTEST_LISTEN", "")
    assert load() == Config()


def test_every_mistake_has_a_line_with_path_value_and_source(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text("listn: x\nkeys: {ca: ca.crt}\ndata: {Bad Name: {files: [a]}, t: {files: []}}\n")
    monkeypatch.setenv("FEDTEST_RANKS", "many")
    with pytest.raises(BadSpec) as caught:
        load("--dry-run", "perhaps", file=file)
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 6
    text = "\n".join(lines)
    assert "listn: no such key; did you mean listen?" in text
    assert f"keys.key: required, but not given in {file}" in text
    assert "'many' in FEDTEST_RANKS" in text
    assert "'perhaps' in --dry-run" in text
    assert "data.Bad Name" in text
    assert "data.t.files: Tuple should have at least 1 item" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--listne", "x"], "--listne: no such key as 'listne'; did you mean listen?"),
        (["--keys.kye", "x"], "--keys.kye: no such key as 'kye'; did you mean key?"),
        (["--listen.port", "x"], "--listen.port: listen is a single value, it has no part 'port'"),
        (["--listen"], "--listen needs a value"),
        (["--listen", "--dry-run"], "--listen needs a value"),
        (["--keys.ca", "~nobody-here/ca.crt"], "no such home folder"),
        (["listen"], "'listen' is not a flag; settings are given as --key value, such as --listen TEXT"),
        (["--keys", "ca.crt"], "--keys: JSON is wanted"),
        (["--keys", '{"ca": "a", "ca": "b"}'], "--keys has the key 'ca' twice"),
        (["--keys", "null", "--keys.ca", ""], "a path may not be empty"),
    ],
)
def test_a_wrong_flag_says_what_is_wanted(flags: list[str], message: str) -> None:
    with pytest.raises(BadSpec) as caught:
        load(*flags)
    assert message in str(caught.value)


def test_an_unknown_variable_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTEST_LISTNE", "x")
    with pytest.raises(BadSpec, match="FEDTEST_LISTNE: no such key as 'listne'; did you mean listen"):
        load()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n- b\n", "must be a mapping of keys to values, not list"),
        (b"a: [", "is not YAML"),
        (b"ranks: 1\nranks: 2\n", "has the key 'ranks' twice, in lines 1 and 2"),
        (b"\xff\xfe\x00", "it is not UTF-8 text"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_a_file_that_is_no_config_is_named(content: bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(BadSpec) as caught:
        load(file=file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("# nothing yet\n")
    assert load(file=file) == Config()


def test_help_lists_every_setting_with_its_description_and_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = settings_help(Config, env_prefix="FEDTEST_")
    assert "--a.b is FEDTEST_A__B" in text
    for flag, description in [
        ("--listen TEXT", "Address to listen at. (default: 127.0.0.1:7443)"),
        ("--keys.key PATH", "The key. (required in keys)"),
        ("--data JSON", "Data sets. (default: {})"),
        ("--data.NAME.files TEXT (repeat for more)", "Files of the data set. (required in data.NAME)"),
        ("--ranks INTEGER", "Processes. (default: 2)"),
        ("--tasks TEXT (repeat for more)", 'Kinds of `task`. (default: ["causal_lm"])'),
    ]:
        assert f"  {flag}\n      {description}\n" in text + "\n"


@pytest.mark.parametrize("address", ["127.0.0.1:65536", "127.0.0.1", "127.0.0.1:http"])
def test_an_address_whose_port_cannot_be_is_refused(address):
    with pytest.raises(ValueError, match=r"ports go up to 65535|wanted host:port"):
        TypeAdapter(Address).validate_python(address)
    assert TypeAdapter(Address).validate_python("[::1]:65535") == "[::1]:65535"
