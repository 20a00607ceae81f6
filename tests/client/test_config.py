"""What a site's config says of its mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedloom_client.config import SiteConfig
from fedloom_client.doctor import examination
from fedloom_common.errors import BadSpec
from fedloom_common.settings import load_settings


def load(folder: Path, **changes: Any) -> SiteConfig:
    content = {"coordinator": "localhost:1", "insecure": "a", "state_dir": "state"}
    content |= {"data": {"plays": {"files": ["*.txt"]}}} | changes
    (folder / "site.yaml").write_text(json.dumps(content))
    return load_settings(SiteConfig, folder / "site.yaml", env_prefix="FEDTEST_")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        pytest.param(
            {"models": {"SmolLM2": "/srv/smollm2"}},
            "models.SmolLM2: wanted a name of up to 64 small letters, digits, dots, dashes and underscores, "
            "with a letter or digit at both ends, such as ward-7 (came: 'SmolLM2' in",
            id="name",
        ),
        pytest.param(
            {"policy": {"hours_utc": "8-18"}},
            "policy.hours_utc: wanted two times from 00:00 to 23:59, such as 20:00-06:00 (came: '8-18' in",
            id="window",
        ),
        pytest.param(
            {"policy": {"models": ["sha256:1f"]}},
            "policy.models.0: wanted blake3: and 64 hexadecimal digits, which `b3sum FILE` tells of a file",
            id="digest",
        ),
        pytest.param(
            {"data": {"plays": {"files": "data/*.txt"}}},
            "data.plays.files: wanted a list, such as [data/*.txt] (came: 'data/*.txt' in",
            id="list",
        ),
        pytest.param(
            {"models": ["x"]}, "models: wanted a mapping, such as {name: x} (came: ['x'] in", id="map"
        ),
        pytest.param(
            {"data": "data/*.txt"},
            "data: wanted a mapping, such as {name: {files: [data/*.txt]}} (came: 'data/*.txt' in",
            id="mapping-of-parts",
        ),
        pytest.param(
            {"policy": None},
            "policy: wanted a mapping with keys such as tasks, task_plugins, data_sets, model_types, models "
            "(came: None in",
            id="part",
        ),
        pytest.param(
            {"coordinator": "fed"},
            "coordinator: wanted host:port, such as fed.example.org:7443 (came",
            id="address",
        ),
        pytest.param(
            {"labels": {"ward!": "icu"}},
            "labels.ward!: wanted up to 63 letters, digits, dots, dashes",
            id="label",
        ),
    ],
)
def test_a_mistake_is_told_in_words_with_an_example(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(BadSpec) as caught:
        load(tmp_path, **changes)
    [line] = str(caught.value).splitlines()[1:]
    assert line.strip().startswith(told)


@pytest.mark.parametrize("hours", ["24:00-06:00", "20:60-06:00", "20:00-06:00\n", "٢٠:00-06:00"])
def test_a_window_has_times_that_a_clock_shows(tmp_path: Path, hours: str) -> None:
    with pytest.raises(BadSpec, match="wanted two times"):
        load(tmp_path, policy={"hours_utc": hours})


@pytest.mark.parametrize(
    "given",
    [
        {"insecure": None},
        {"insecure": "a", "tls": {"ca": "ca.crt", "certificate": "site.crt", "key": "site.key"}},
    ],
)
def test_neither_or_both_of_tls_and_insecure_is_a_mistake_wherever_the_config_is_read(
    tmp_path: Path, given: dict[str, Any]
) -> None:
    with pytest.raises(BadSpec, match=r"give tls: the folder that .* exactly one of both"):
        load(tmp_path, **given)
    found = [item for item in examination(tmp_path / "site.yaml", []) if item.part == "config"]
    assert [str(item.verdict) for item in found] == ["problem"]
    assert "exactly one of both" in found[0].told
