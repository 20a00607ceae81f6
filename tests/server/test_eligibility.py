from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedloom_common.requirements import Require
from fedloom_common.runspec import Cohort
from fedloom_server.eligibility import Description, Device, Wanted, fits, lacks, shortfall

H100 = Device(kind="cuda", name="NVIDIA H100 80GB HBM3", memory_bytes=81559 << 20)
T4 = Device(kind="cuda", name="Tesla T4", memory_bytes=15360 << 20)
CPU = Device(kind="cpu", name="Xeon", memory_bytes=0)


def site(*devices, memory_gb=64, data=None, standstill="", **labels):
    described = Description(
        memory_bytes=int(memory_gb * 10**9), devices=devices or (CPU,), data_sets=data or {"plays": 1_000_000}
    )
    return SimpleNamespace(description=described, labels=labels, standstill=standstill)


def wanted(data="plays", **require):
    return Wanted(data=data, require=Require.model_validate(require))


CASES = [
    pytest.param(site(), {}, [], id="nothing-asked"),
    pytest.param(site(H100), {"gpu_memory_gb": 80}, [], id="an-80-GB-device-has-80-GB"),
    pytest.param(site(T4), {"gpu_memory_gb": 40}, ["gpu_memory_gb >= 40"], id="device-too-small"),
    pytest.param(site(), {"gpu_memory_gb": 0.1}, ["gpu_memory_gb >= 0.1"], id="a-cpu-is-no-gpu"),
    pytest.param(site(T4, H100), {"gpu_memory_gb": 40}, [], id="one-large-device-is-enough"),
    pytest.param(
        site(T4, H100), {"gpu_memory_gb": 40, "gpus": 2}, ["gpu_memory_gb >= 40 on 2 gpus"], id="of-that-size"
    ),
    pytest.param(site(H100, H100), {"gpu_memory_gb": 40, "gpus": 2}, [], id="two-large-devices"),
    pytest.param(site(T4), {"gpus": 2}, ["gpus >= 2"], id="too-few-devices"),
    pytest.param(site(memory_gb=16), {"memory_gb": 32}, ["memory_gb >= 32"], id="main-memory"),
    pytest.param(site(), {"data_bytes": 1_000_001}, ["data_bytes >= 1000001"], id="too-little-data"),
    pytest.param(site(), {"data_bytes": 1_000_000}, [], id="just-enough-data"),
    pytest.param(site(data={"notes": 5}), {"data_bytes": 9}, ["data 'plays'"], id="other-data"),
    pytest.param(site(data={"plays": 0}), {"data_bytes": 9}, ["files of data 'plays'"], id="no-file-yet"),
    pytest.param(site(ward="icu"), {"label": "icu"}, [], id="a-value"),
    pytest.param(site(icu="yes"), {"label": "icu"}, [], id="a-name"),
    pytest.param(site(ward="er"), {"label": "icu"}, ["label icu"], id="neither"),
    pytest.param(site(ward="icu"), {"label": ["icu", "gpu"]}, ["label gpu"], id="each-of-a-list"),
    pytest.param(site(ward="icu"), {"labels": {"ward": "icu"}}, [], id="exact"),
    pytest.param(site(unit="icu"), {"labels": {"ward": "icu"}}, ["label ward=icu"], id="under-another-name"),
    pytest.param(site(ward="er"), {"labels": {"ward": ["icu", "er"]}}, [], id="one-of-a-list"),
    pytest.param(
        site(ward="x"), {"labels": {"ward": ["icu", "er"]}}, ["label ward=icu|er"], id="none-of-a-list"
    ),
    pytest.param(
        site(T4),
        {"gpu_memory_gb": 40, "label": "icu"},
        ["gpu_memory_gb >= 40", "label icu"],
        id="both-lacking",
    ),
]


@pytest.mark.parametrize(("candidate", "require", "lacking"), CASES)
def test_a_site_fits_if_it_lacks_nothing_that_the_run_requires(candidate, require, lacking):
    assert list(lacks(candidate, wanted(**require))) == lacking
    assert fits(candidate, wanted(**require)) == (not lacking)


def test_a_draining_site_gets_no_work_whatever_it_has():
    assert not fits(site(H100, standstill="draining"), wanted())


def test_a_shortfall_tells_how_many_lack_what():
    sites = [site(T4), site(), site(H100), site(T4, data={"notes": 1}), site(H100, standstill="draining")]
    assert shortfall(sites, wanted(gpu_memory_gb=40), needed=2) == (
        "1 of 2 fit, 5 connected: 1 lacks data 'plays', 3 lack gpu_memory_gb >= 40, 1 draining"
    )
    assert shortfall([], wanted(), needed=2) == "0 of 2 fit, 0 connected"


def test_the_issues_own_example_is_a_spec():
    cohort = Cohort.model_validate({"require": {"gpu_memory_gb": 40, "label": "icu"}})
    assert (cohort.require.gpu_memory_gb, cohort.require.wanted_labels) == (40, ("icu",))


@pytest.mark.parametrize(
    ("require", "told"),
    [
        ({"gpu_memory": 40}, "gpu_memory"),
        ({"gpus": 0}, "gpus"),
        ({"label": "no spaces"}, "label"),
        ({"labels": {"ward": []}}, "labels.ward is an empty list"),
    ],
)
def test_a_requirement_that_means_nothing_is_refused(require, told):
    with pytest.raises(ValidationError, match=told):
        Require.model_validate(require)


def test_policy_all_takes_no_fraction():
    with pytest.raises(ValidationError, match=r"policy all picks every site, and fraction is 0\.5"):
        Cohort(policy="all", fraction=0.5)


@given(
    st.builds(
        Description,
        memory_bytes=st.integers(0),
        devices=st.lists(st.builds(Device, kind=st.text(), name=st.text(), memory_bytes=st.integers(0))).map(
            tuple
        ),
        data_sets=st.dictionaries(st.text(), st.integers(0)),
    )
)
def test_a_description_is_the_same_after_its_way_through_json(description):
    from dataclasses import asdict
    from json import dumps, loads

    assert Description.of(loads(dumps(asdict(description)))) == description
