import json
import time

import pytest

from fedloom.v1.runs_pb2 import SITE_STATE_BLOCKED, SITE_STATE_DRAINING, Site
from fedloom.v1.session_pb2 import DataSet, Device, Hello
from fedloom.v1.sites_pb2 import (
    BlockSiteRequest,
    DrainSiteRequest,
    ForgetSiteRequest,
    LabelSiteRequest,
    UnblockSiteRequest,
    UndrainSiteRequest,
)
from fedloom_common.errors import BadSpec


def test_sites_show_what_they_said_of_themselves(console, fake):
    hello = Hello(
        software="fedloom 0.1.0",
        devices=[Device(kind="cuda", name="H100", memory_bytes=80_000_000_000)] * 2,
        memory_bytes=128_000_000_000,
        data_sets=[DataSet(name="plays", size_bytes=1_200_000)],
    )
    fake.sites = [
        Site(name="bremen", connected=True, last_heard_at_s=time.time() - 90, hello=hello),
        Site(name="kiel"),
    ]
    lines = console("sites", "list").stdout.splitlines()
    bremen = next(line for line in lines if line.startswith("bremen"))
    for fact in ("connected", "1m 3", "2 × H100 80.0 GB", "128.0 GB", "plays (1.2 MB)", "fedloom 0.1.0"):
        assert fact in bremen
    kiel = next(line for line in lines if line.startswith("kiel"))
    assert kiel.split()[:3] == ["kiel", "away", "never"]


def test_no_sites_yet(console):
    assert "No site has attached yet" in console("sites", "list").stdout


def test_sites_as_json(console, fake):
    fake.sites = [Site(name="bremen", connected=True, last_heard_at_s=12.5)]
    (site,) = json.loads(console("sites", "list", "--json").stdout)
    assert (site["name"], site["connected"], site["last_heard_at_s"]) == ("bremen", True, 12.5)


BREMEN = Site(
    name="bremen",
    connected=True,
    state=SITE_STATE_DRAINING,
    reason="new disks",
    last_heard_at_s=12.5,
    labels={"ward": "icu", "disk": "ssd"},
    operator_labels={"ward": "icu", "old": ""},
    open_assignments=["r1.4.1.train.bremen"],
)


def test_the_list_says_who_drains_who_is_empty_and_who_is_blocked(console, fake):
    empty = Site(name="kiel", state=SITE_STATE_DRAINING, reason="new disks")
    blocked = Site(name="oslo", connected=False, state=SITE_STATE_BLOCKED, reason="its key was stolen")
    fake.sites = [BREMEN, empty, blocked]
    _, *lines = console("sites", "list").stdout.splitlines()
    for line, told in zip(
        lines,
        ("bremen  connected, draining (1 open)", "kiel    away, drained", "oslo    blocked"),
        strict=True,
    ):
        assert line.startswith(told)
    assert "disk=ssd, ward=icu" in lines[0]


def test_show_tells_all_of_a_site(console, fake):
    fake.sites = [BREMEN]
    shown = console("sites", "show", "bremen").stdout
    for fact in ("draining, 1 open (new disks)", "r1.4.1.train.bremen", "ward=icu", "old taken away"):
        assert fact in shown
    assert json.loads(console("sites", "show", "bremen", "--json").stdout)["state"] == "draining"


@pytest.mark.parametrize(
    ("command", "asked"),
    [
        (("drain", "--reason", "new disks"), DrainSiteRequest(name="bremen", reason="new disks")),
        (("undrain",), UndrainSiteRequest(name="bremen")),
        (("block", "--reason", "stolen"), BlockSiteRequest(name="bremen", reason="stolen")),
        (("unblock",), UnblockSiteRequest(name="bremen")),
        (
            ("label", "ward=icu", "disk=", "old-"),
            LabelSiteRequest(name="bremen", labels={"ward": "icu", "disk": ""}, dropped=["old"]),
        ),
    ],
)
def test_a_decision_is_sent_and_its_effect_told(console, fake, command, asked):
    fake.sites = [BREMEN]
    name, *rest = command
    told = console("sites", name, "bremen", *rest).stdout
    assert told == "bremen: draining, 1 open (new disks); labels disk=ssd, ward=icu\n"
    assert fake.asked == [asked]
    assert json.loads(console("sites", name, "bremen", *rest, "--json").stdout)["name"] == "bremen"


def test_forgetting_is_told(console, fake):
    assert console("sites", "forget", "bremen").stdout == "bremen is forgotten\n"
    assert fake.asked == [ForgetSiteRequest(name="bremen")]
    assert json.loads(console("sites", "forget", "bremen", "--json").stdout)["forgotten"] is True


@pytest.mark.parametrize("change", ["ward", "=icu", "-"])
def test_what_is_no_change_of_a_label_is_an_error(console, change):
    with pytest.raises(
        BadSpec, match=f"'{change}' is no change of a label; wanted NAME=VALUE, NAME= or NAME-"
    ):
        console("sites", "label", "bremen", "--", change)
