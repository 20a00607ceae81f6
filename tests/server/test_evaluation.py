import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloom_common.errors import TooFewUpdates
from fedloom_server.evaluation import SiteMetrics, combine


def site(examples, tokens, **metrics):
    return SiteMetrics(examples=examples, tokens=tokens, metrics=metrics)


def labelled(hits, predicted, actual, **metrics):
    return SiteMetrics(
        examples=sum(actual), tokens=sum(actual), metrics=metrics,
        counts={"hits": hits, "predicted": predicted, "actual": actual},
    )  # fmt: skip


def test_macro_f1_is_that_of_the_pooled_data_and_not_a_mean_of_the_sites():
    # site a: actual 0 0 0 1, predicted 0 0 1 1; site b: actual 1 1, predicted 0 1
    first = labelled([2, 1], [2, 2], [3, 1], macro_f1=(4 / 5 + 2 / 3) / 2, accuracy=3 / 4)
    second = labelled([0, 1], [1, 1], [0, 2], macro_f1=(0 + 2 / 3) / 2, accuracy=1 / 2)
    combined = combine([first, second])
    # pooled: label 0 has 2 hits, 3 predicted, 3 actual; label 1 has 2, 3, 3
    assert combined["macro_f1"] == pytest.approx(4 / 6)
    assert combined["accuracy"] == pytest.approx(4 / 6)


@pytest.mark.parametrize("lacking", [site(2, 2, macro_f1=1.0), labelled([1], [1], [1], macro_f1=1.0)])
def test_macro_f1_of_sites_that_do_not_tell_the_same_counts_is_a_mean_over_examples(lacking):
    whole = labelled([0, 1], [1, 1], [0, 2], macro_f1=0.25)
    expected = np.average([0.25, 1.0], weights=[2, lacking.examples])
    assert combine([whole, lacking])["macro_f1"] == pytest.approx(expected)


def test_a_metric_is_weighted_by_what_its_site_says_it_is_a_mean_of():
    def measured(bits, size):
        metrics, weights = {"bits_per_byte": bits}, {"bits_per_byte": size}
        return SiteMetrics(examples=1, tokens=10, metrics=metrics, weights=weights)

    assert combine([measured(2.0, 300), measured(4.0, 100)]) == {"bits_per_byte": 2.5}


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
