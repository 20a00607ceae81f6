"""The scrape config and the alerts: valid, and about metrics that there are."""

import asyncio
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from fedloom_client.config import SiteConfig
from fedloom_client.daemon import Daemon
from fedloom_client.web import Observed, SitePage
from fedloom_common.settings import load_settings
from fedloom_common.vitals import LoopLag
from fedloom_server.app import coordinator
from fedloom_server.config import CoordinatorConfig
from fedloom_server.console.kit import create_kit

FOLDER = Path(__file__).parents[2] / "deploy/prometheus"
GUIDE = Path(__file__).parents[2] / "docs/operations/monitoring.md"


def names(page):
    """The metrics of a page, by the names under which they are asked for."""
    families = text_string_to_metric_families(page.decode())
    return {family.name + ("_total" if family.type == "counter" else "") for family in families}


async def site_page(folder):
    """The page of a site that has not yet attached."""
    config = SiteConfig(coordinator="x:1", insecure="oslo", state_dir=folder, data={"a": {"files": ["x"]}})
    daemon = Daemon(config)
    observed = Observed(
        config=config, status=daemon._status, assignments=daemon._assignments, outbox=daemon._outbox
    )
    return await SitePage(observed, LoopLag()).render()


@pytest.fixture
def rules():
    groups = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed: it comes with Prometheus"
)
@pytest.mark.parametrize(
    "arguments",
    [("config", "--syntax-only", "prometheus.yml"), ("rules", "alerts.yml")],
    ids=["config", "rules"],
)
def test_prometheus_takes_it(arguments):
    done = subprocess.run(
        ["promtool", "check", *arguments], cwd=FOLDER, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_says_what_it_is_and_the_guide_what_to_do(rules):
    guide = GUIDE.read_text()

    assert len({rule["alert"] for rule in rules}) == len(rules) > 8
    for rule in rules:
        assert rule["labels"]["severity"] in ("critical", "warning"), rule["alert"]
        assert set(rule["annotations"]) == {"summary", "description"}, rule["alert"]
        assert f"`{rule['alert']}`" in guide, rule["alert"]


async def test_alerts_and_the_guide_speak_of_metrics_that_there_are(rules, tmp_path):
    create_kit(tmp_path / "kit", federation="clinic", hosts=["localhost"])
    flags = ("--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--http-tls", "false", "--drain-s", "0.1")
    config = load_settings(
        CoordinatorConfig, tmp_path / "kit/coordinator/coordinator.yaml", env_prefix="TEST_", flags=flags
    )
    async with coordinator(config) as running:
        url = f"http://127.0.0.1:{running.http_port}/metrics"
        theirs = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=60).read())
    there = names(theirs) | names(await site_page(tmp_path))

    told = {name for rule in rules for name in re.findall(r"fedloom_\w+", rule["expr"])}
    told |= set(re.findall(r"`(fedloom_\w+)", GUIDE.read_text()))
    assert len(told) > 15
    assert told - there == set()
    ours = {name for name in there if name.startswith("fedloom") and not name.endswith("_created")}
    assert ours - told == set(), "each stands in the guide"
