import json
import time

from fedloom.v1.runs_pb2 import Site
from fedloom.v1.session_pb2 import DataSet, Device, Hello


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
