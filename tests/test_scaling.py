"""Laws of the learning-rate rules."""

import functools
import math

import pytest

from keras_batchsize import scaling

RATIOS = [1.0, 2.0, 8.0, 100.0]
NOISE_SCALES = [0.0, 0.1, 1.0, 30.0, 1e4]


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("noise_scale", NOISE_SCALES)
def test_adascale_lies_between_one_and_the_ratio(ratio, noise_scale):
    assert 1.0 <= scaling.adascale(ratio, noise_scale) <= ratio
    # Smaller batches than the base: the same the other way round.
    assert 1 / ratio <= scaling.adascale(1 / ratio, noise_scale) <= 1.0


@pytest.mark.parametrize("ratio", [0.25, *RATIOS])
def test_adascale_leaves_the_rate_alone_without_noise(ratio):
    for noise_scale in (0.0, None, math.nan):
        assert scaling.adascale(ratio, noise_scale) == 1.0
    # The limit, to first order in the noise scale.
    assert scaling.adascale(ratio, 1e-9) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("ratio", [0.25, *RATIOS])
def test_adascale_is_linear_where_all_is_noise(ratio):
    assert scaling.adascale(ratio, math.inf) == ratio
    assert scaling.adascale(ratio, 1e12) == pytest.approx(ratio, rel=1e-9)


def optimal_rate(batch_size, noise_scale):
    """McCandlish et al. 2018, eq. 2.6, in units of its largest value."""
    return 1.0 / (1.0 + noise_scale / batch_size)


@pytest.mark.parametrize("base", [16, 250])
@pytest.mark.parametrize("batch_size", [8, 250, 4096])
@pytest.mark.parametrize("noise_scale", [3.0, 1_000.0])
def test_adascale_is_the_ratio_of_optimal_rates(base, batch_size, noise_scale):
    gain = scaling.adascale(batch_size / base, noise_scale / base)
    assert gain == pytest.approx(
        optimal_rate(batch_size, noise_scale) / optimal_rate(base, noise_scale),
        rel=1e-12,
    )


@pytest.mark.parametrize("ratio", [0.25, *RATIOS])
def test_adascale_is_the_gain_of_the_moments(ratio):
    # Johnson et al. 2020, eq. 5, with the variance of a base batch's gradient
    # and the squared norm of its mean.
    variance, squared_norm = 7.0, 0.5
    gain = (variance + squared_norm) / (variance / ratio + squared_norm)
    assert scaling.adascale(ratio, variance / squared_norm) == pytest.approx(
        gain, rel=1e-12
    )


@pytest.mark.parametrize("ratio", [0.25, *RATIOS])
@pytest.mark.parametrize("noise_scale", [None, math.nan, 5.0])
def test_linear_sqrt_and_none_look_at_the_ratio_only(ratio, noise_scale):
    assert scaling.linear(ratio, noise_scale) == ratio
    assert scaling.sqrt(ratio, noise_scale) ** 2 == pytest.approx(
        ratio, rel=1e-12
    )
    assert scaling.none(ratio, noise_scale) == 1.0


@pytest.mark.parametrize("rule", scaling.RULES.values())
def test_every_rule_keeps_the_rate_at_the_base_size(rule):
    for noise_scale in (*NOISE_SCALES, None, math.nan, math.inf):
        assert rule(1.0, noise_scale) == 1.0


@pytest.mark.parametrize("name", scaling.RULES)
def test_rules_are_found_by_name(name):
    assert scaling.get(name, auto="none") is scaling.RULES[name]
    assert scaling.get("auto", auto=name) is scaling.RULES[name]


def test_functions_are_rules():
    def cube_root(ratio, noise_scale):
        return ratio ** (1 / 3)

    assert scaling.get(cube_root, auto="linear") is cube_root


class Root:
    """A rule that is an object."""

    def __init__(self, degree):
        self.degree = degree

    def __call__(self, ratio, noise_scale):
        return ratio ** (1 / self.degree)


def power(ratio, noise_scale, exponent):
    return ratio**exponent


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (scaling.adascale, "adascale"),
        (Root(3), "Root"),
        (functools.partial(power, exponent=0.5), "power"),
        (functools.partial(Root(2)), "Root"),
    ],
)
def test_every_rule_has_a_name(rule, name):
    assert scaling.get(rule, auto="linear") is rule
    assert scaling.name_of(rule) == name


def test_unknown_rule_is_told_the_known_ones():
    with pytest.raises(ValueError) as caught:
        scaling.get("liner", auto="linear")
    text = str(caught.value)
    for name in (*scaling.RULES, "auto"):
        assert f'"{name}"' in text
    assert "Received: learning_rate_scaling='liner'" in text


@pytest.mark.parametrize("rule", [None, 2, ["linear"]])
def test_rule_of_another_kind_is_told_what_works(rule):
    with pytest.raises(TypeError) as caught:
        scaling.get(rule, auto="linear")
    text = str(caught.value)
    received = f"learning_rate_scaling={rule!r} of type {type(rule).__name__}"
    assert f"Received: {received}" in text
    assert text.endswith('Use "auto".')


@pytest.mark.parametrize("factor", [0.5, 1.0, 16.0])
def test_warmup_goes_from_one_to_the_factor_in_a_straight_line(factor):
    assert scaling.warmed_up(factor, 0.0) == 1.0
    assert scaling.warmed_up(factor, 1.0) == factor
    assert scaling.warmed_up(factor, 0.5) == (1.0 + factor) / 2
    quarter = scaling.warmed_up(factor, 0.25)
    assert quarter == pytest.approx(0.75 + 0.25 * factor, rel=1e-12)
