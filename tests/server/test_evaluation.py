import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom_common.errors import TooFewUpdates
from fedloom_server.evaluation import SiteMetrics, combine


def site(examples, tokens, **metrics):
    return SiteMetrics(examples=examples, tokens=tokens, metrics=metrics)


def test_loss_is_a_mean_over_tokens():
    assert combine([site(1, 300, loss=2.0), site(99, 100, loss=4.0)]) == {"loss": 2.5}


def test_other_metrics_are_means_over_examples():
    assert combine([site(1, 300, accuracy=0.5), site(3, 100, accuracy=0.25)]) == {"accuracy": 0.3125}


def test_perplexity_is_the_exponential_of_the_mean_loss_and_not_a_mean_of_perplexities():
    sites = [site(1, 100, loss=1.0, perplexity=math.e), site(1, 100, loss=3.0, perplexity=math.exp(3))]
    combined = combine(sites)
    assert combined["loss"] == 2.0
    assert combined["perplexity"] == pytest.approx(7.38905609893065)  # e squared; the mean would be 11.4


def test_a_hopeless_loss_has_infinite_perplexity():
    assert combine([site(1, 1, loss=1e4, perplexity=1e300)])["perplexity"] == math.inf


def test_a_metric_is_combined_over_the_sites_that_report_it():
    assert combine([site(1, 1, loss=2.0, accuracy=0.5), site(1, 1, loss=4.0)]) == {
        "accuracy": 0.5,
        "loss": 3.0,
    }


def test_a_metric_that_stands_for_no_data_is_left_out():
    assert combine([site(5, 0, loss=2.0, accuracy=0.5)]) == {"accuracy": 0.5}


def test_a_metric_that_is_not_a_number_at_one_site_is_not_a_number():
    assert math.isnan(combine([site(1, 1, loss=math.nan), site(1, 1, loss=1.0)])["loss"])


def test_nothing_to_combine_is_an_error():
    with pytest.raises(TooFewUpdates, match="no site has reported"):
        combine([])


@given(st.lists(st.tuples(st.integers(1, 10**9), st.floats(0, 1e3)), min_size=1, max_size=20))
def test_any_loss_equals_numpys_weighted_mean(measured):
    combined = combine(site(1, tokens, loss=loss) for tokens, loss in measured)
    tokens, values = zip(*measured, strict=True)
    assert combined["loss"] == pytest.approx(np.average(values, weights=tokens), rel=1e-12)
