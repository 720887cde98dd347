"""What the report says in words and digits."""

import math

import pytest

from ulx.metrics.entries import number, plus_minus
from ulx.report import text as report_text

COPIES = {
    "threshold": 19.0,
    "median_distance_of_samples": 57.0,
    "median_distance_of_held_out_images": 51.0,
    "n_reference": 4098,
    "space": "grey levels",
}


@pytest.mark.parametrize(
    ("value", "error", "expected"),
    [
        (0.37214, 0.00431, "0.3721 ± 0.0043"),
        (21.336, 0.0962, "21.336 ± 0.096"),
        (1234.5, 17.0, "1234 ± 17"),
        (21.336, math.nan, "21.34"),
        (math.inf, 0.1, "inf"),
    ],
)
def test_plus_minus(value, error, expected):
    assert plus_minus({"value": value, "standard_error": error}) == expected


def test_solvers_in_words():
    sampler = {"latent": "heun", "latent_steps": 16, "latent_churn": 0.5, "latent_tolerance": 1e-3}
    sampler |= {"decoder": "tsit5", "decoder_steps": 12, "decoder_churn": 0.0, "decoder_tolerance": 0.01}
    assert report_text.solver_in_words(sampler, "latent") == "heun, 16 steps, churn 0.5"
    assert report_text.solver_in_words(sampler, "decoder") == "tsit5, tolerance 0.01"
    assert report_text.solver_in_words({"decoder": "one call", "decoder_nfe": 1}, "decoder") == "one call"
    before_there_was_churn = {"latent": "euler", "latent_steps": 8}
    assert report_text.solver_in_words(before_there_was_churn, "latent") == "euler, 8 steps"


def test_numbers():
    assert [number(x) for x in (0.0372149, 21.336, 12345.6, -1.5, 0.0)] == [
        "0.03721", "21.34", "12346", "-1.500", "0",
    ]  # fmt: skip
    assert [report_text.si(x) for x in (1234567, 2.5e15, 12.0)] == ["1.23 M", "2.5 P", "12 "]


@pytest.mark.parametrize(
    ("samples", "held_out", "verdict"),
    [
        (0.0, 0.02, "No sample is a copy."),
        (0.03, 0.02, "Nothing says that samples are copies"),
        (0.30, 0.02, "SOME SAMPLES MAY BE COPIES"),
        (0.30, 0.60, "The test is blind here"),
    ],
)
def test_verdict_on_copies(samples, held_out, verdict):
    found = COPIES | {"share_of_samples": samples, "share_of_held_out_images": held_out, "n": 500}
    said = report_text.copies(found, 400)
    assert said.startswith(verdict)
    assert f"{samples:.1%}" in said
    assert f"{held_out:.1%}" in said


def test_few_samples_prove_nothing():
    """2 of 8 against 0 of 5: by chance in a third of the cases, whatever the shares."""
    found = COPIES | {"share_of_samples": 0.25, "share_of_held_out_images": 0.0, "n": 8}
    assert report_text.copies(found, 5).startswith("Nothing says")
