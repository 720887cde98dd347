"""Numbers as they stand in files."""

import json
import math

import numpy as np
import pytest

from ulx.metrics.entries import as_json, mean, plus_minus


def test_infinite_ones_are_counted_and_left_out():
    found = mean([20.0, math.inf, 22.0, 27.0])
    assert found == {
        "value": 23.0,
        "standard_error": pytest.approx(np.std([20, 22, 27], ddof=1) / math.sqrt(3)),
        "n": 4,
        "infinite": 1,
    }
    assert plus_minus(found) == "23.0 ± 2.1 (and 1 infinite)"
    assert mean([math.inf, -math.inf, 1.0])["infinite"] == 2
    assert "infinite" not in mean([1.0, 2.0])


def test_of_nothing_but_infinite_ones_the_mean_is_infinite():
    found = mean([math.inf] * 3)
    assert (found["value"], found["n"]) == (math.inf, 3)
    assert math.isnan(found["standard_error"])
    assert plus_minus(found) == "inf"


def test_what_is_not_a_number_stays_that():
    assert math.isnan(mean([1.0, math.nan, math.inf])["value"])


def test_json_has_no_word_for_infinity_and_reading_knows_what_was_meant():
    metrics = {"all": mean([math.inf] * 2), "one": mean([3.0]), "listed": [1.5, math.nan], "n": 7, "text": "dB ±"}
    read = json.loads(as_json(metrics), parse_constant=pytest.fail)
    assert read == {
        "all": {"value": None, "standard_error": None, "n": 2},
        "one": {"value": 3.0, "standard_error": None, "n": 1},
        "listed": [1.5, None],
        "n": 7,
        "text": "dB ±",
    }
    assert plus_minus(read["all"]) == "inf"
    assert plus_minus(read["one"]) == "3.000"
