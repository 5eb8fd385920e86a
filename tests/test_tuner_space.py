"""The search space: what is declared, and what the values stand for."""

import math

import keras
import keras_tuner
import pytest

import keras_batchsize as kb
from keras_batchsize import tuner as kbt


def names(hp):
    return [one.name for one in hp.space]


def declared(space, **values):
    hp = keras_tuner.HyperParameters()
    hp.values = {f"batch_size/{name}": one for name, one in values.items()}
    space.declare(hp)
    return hp


def test_sizes_are_the_smallest_times_powers_of_two():
    hp = declared(kbt.BatchSizeSpace(initial=(24, 400)))
    assert hp.space[0].values == [24, 48, 96, 192, 384]
    assert hp.space[0].default == 24
    assert declared(kbt.BatchSizeSpace()).get("batch_size/initial") == 32


def test_what_has_one_value_is_not_searched():
    space = kbt.BatchSizeSpace((64, 64), 64, ["fixed"], ["linear"])
    hp = declared(space)
    assert names(hp) == ["batch_size/initial", "batch_size/policy"]
    assert all(type(one) is keras_tuner.engine.hyperparameters.Fixed
               for one in hp.space)
    assert space.setting(hp).initial == 64


def test_declaring_again_changes_nothing():
    space = kbt.BatchSizeSpace(learning_rate=(1e-3, 1.0))
    hp = declared(space)
    before = hp.get_config()
    space.declare(hp)
    assert hp.get_config() == before


@pytest.mark.parametrize("policy", ["goodput", "fixed", "measure"])
def test_the_rule_is_searched_only_where_it_applies(policy):
    space = kbt.BatchSizeSpace(policies=["goodput", "fixed", "measure"])
    hp = declared(space, policy=policy)
    assert "batch_size/learning_rate_rule" in names(hp)
    assert ("batch_size/learning_rate_rule" in hp) == (policy == "goodput")

    # A rate that is searched is carried to the initial size by the rule.
    space = kbt.BatchSizeSpace(
        policies=["goodput", "fixed", "measure"], learning_rate=(0.01, 1.0)
    )
    assert "batch_size/learning_rate_rule" in declared(space, policy=policy)


def test_arguments_of_policies_are_searched_only_with_the_policy():
    space = kbt.BatchSizeSpace(policies=["noise_scale", "cosine", "fixed"])
    hp = declared(space, policy="cosine", **{"cosine/target": 0.6})
    assert "batch_size/cosine/target" in hp
    assert "batch_size/noise_scale/factor" in names(hp)
    assert "batch_size/noise_scale/factor" not in hp
    assert repr(space.setting(hp).policy) == "CosineSimilarity(target=0.6)"


def test_ranges_of_arguments_can_be_given():
    space = kbt.BatchSizeSpace(
        policies=["goodput", "noise_scale"],
        policy_arguments={"goodput": {"min_speedup": (1.01, 1.2)}},
    )
    hp = declared(space, policy="goodput")
    assert "batch_size/goodput/min_speedup" in hp
    assert "batch_size/noise_scale/factor" not in names(hp)
    policy = space.setting(hp).policy
    assert policy.min_speedup == pytest.approx(1.01)


def test_each_setting_has_a_policy_of_its_own():
    space = kbt.BatchSizeSpace(policies=["plateau"])
    hp = declared(space)
    assert space.setting(hp).policy is not space.setting(hp).policy


# The learning rate.


@pytest.mark.parametrize(
    ("rule", "expected"), [("linear", 0.025), ("sqrt", 0.1), ("none", 0.4)]
)
def test_helper_carries_the_rate_by_the_rule(rule, expected):
    hp = keras_tuner.HyperParameters()
    hp.values = {"learning_rate": 0.4}
    rate = kbt.hp_learning_rate(hp, 16, rule=rule)
    assert rate == pytest.approx(expected)
    assert kbt.hp_learning_rate(hp, 256, rule=rule) == pytest.approx(0.4)
    assert names(hp) == ["learning_rate"]


def built(space, optimizer, **values):
    """Returns the rate of a model built with given values."""

    def build(hp):
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        model.compile(optimizer, "mse")
        return model

    hp = declared(space, **values)
    model = kbt.AdaptiveHyperModel(build, space).build(hp)
    return float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))


@pytest.mark.parametrize(
    ("rule", "optimizer", "exponent"),
    [
        ("linear", "sgd", 1.0),
        ("sqrt", "sgd", 0.5),
        ("none", "sgd", 0.0),
        ("auto", "sgd", 1.0),
        ("auto", "adam", 0.5),
        # Without a measurement AdaScale's gain would be 1.
        ("adascale", "sgd", 1.0),
        ("adascale", "adam", 0.5),
    ],
)
@pytest.mark.parametrize("initial", [16, 64, 512])
def test_searched_rate_is_that_of_the_reference(
    rule, optimizer, exponent, initial
):
    space = kbt.BatchSizeSpace(
        learning_rate_rules=[rule],
        learning_rate=(0.01, 1.0),
        reference_batch_size=64,
    )
    rate = built(space, optimizer, initial=initial, learning_rate=0.1)
    assert rate == pytest.approx(0.1 * (initial / 64) ** exponent, rel=1e-6)


def test_the_rate_of_the_model_stays_where_none_is_searched():
    space = kbt.BatchSizeSpace()
    rate = built(space, keras.optimizers.SGD(0.123), initial=512)
    assert rate == pytest.approx(0.123)


def a_tenth():
    return 0.1


@pytest.mark.parametrize(
    "rate",
    [keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9), a_tenth],
)
@pytest.mark.parametrize("scales_loss", [False, True])
def test_a_schedule_or_function_is_not_replaced_by_a_number(rate, scales_loss):
    optimizer = keras.optimizers.SGD(rate)
    if scales_loss:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    space = kbt.BatchSizeSpace(learning_rate=(0.01, 1.0))
    with pytest.raises(
        keras_tuner.errors.FatalValueError, match="hp_learning_rate"
    ) as caught:
        built(space, optimizer)
    assert f"Received: learning_rate=[{rate!r}]" in str(caught.value)


# Errors.


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"initial": 32}, TypeError, "Use initial=(16, 512)"),
        ({"initial": (512, 16)}, ValueError, "Use initial=(16, 512)"),
        ({"initial": (0, 16)}, ValueError, "Received: initial=0"),
        ({"initial": ("16", 512)}, TypeError, "Received: initial='16'"),
        ({"max_batch_size": 256}, ValueError, "Use max_batch_size=512"),
        ({"max_batch_size": 1e3}, TypeError, "max_batch_size=1000.0"),
        ({"policies": "goodput"}, TypeError, "Received: policies='goodput'"),
        ({"policies": []}, TypeError, "Received: policies=[]"),
        ({"policies": ["best"]}, ValueError, "Received: policies='best'"),
        (
            {"policies": [kb.policies.NoiseScale()]},
            TypeError,
            "Received: policies=[NoiseScale(factor=1.0), ...]",
        ),
        (
            {"policies": [kb.policies.NormTest()]},
            TypeError,
            'Use policies=["norm_test"]',
        ),
        (
            {"policies": [kb.policies.BatchSizeSchedule({0: 8})]},
            TypeError,
            "It has no name. Use it with kb.AdaptiveTrainer.",
        ),
        ({"policies": 5}, TypeError, "Received: policies=5"),
        ({"policies": [["fixed"]]}, ValueError, "policies=['fixed']"),
        (
            {"learning_rate_rules": ["cubic"]},
            ValueError,
            "learning_rate_rules='cubic'",
        ),
        ({"learning_rate": (0.0, 1.0)}, ValueError, "learning_rate=0.0"),
        ({"learning_rate": 0.1}, TypeError, "Received: learning_rate=0.1"),
        ({"learning_rate": ("1e-3", 1.0)}, TypeError, "learning_rate='1e-3'"),
        (
            {"reference_batch_size": 0},
            ValueError,
            "Received: reference_batch_size=0",
        ),
        (
            {"policy_arguments": {"noise_scale": (0.25, 4)}},
            TypeError,
            "Received: policy_arguments={'noise_scale': (0.25, 4)}",
        ),
        ({"policy_arguments": "factor"}, TypeError, "must be a dict of dicts"),
        (
            {"policy_arguments": {"noise_scale": {"factor": ("1", 2)}}},
            TypeError,
            "noise_scale: factor='1'",
        ),
        (
            {"policy_arguments": {"noise_scale": {"scale": (1, 2)}}},
            ValueError,
            "kb.policies.NoiseScale has",
        ),
        (
            {"policy_arguments": {"cosine": {"target": (0.5, 2.0)}}},
            ValueError,
            "Received: target=2.0",
        ),
    ],
)
def test_errors_name_argument_and_remedy(arguments, kind, text):
    with pytest.raises(kind, match="Use ") as caught:
        kbt.BatchSizeSpace(**arguments)
    assert text in str(caught.value)


def test_helpers_name_argument_and_remedy():
    hp = keras_tuner.HyperParameters()
    with pytest.raises(ValueError, match="Received: rule='adascale'"):
        kbt.hp_learning_rate(hp, 32, rule="adascale")
    with pytest.raises(ValueError, match="begin with the smaller"):
        kbt.hp_batch_size(hp, 64, 32)
    with pytest.raises(ValueError, match="Received: min_value=0"):
        kbt.hp_batch_size(hp, 0, 512)
    with pytest.raises(TypeError, match="Received: min_value=16.0"):
        kbt.hp_batch_size(hp, 16.0)
    with pytest.raises(TypeError, match="Received: max_value='512'"):
        kbt.hp_batch_size(hp, 16, "512")
    assert math.isclose(kbt.hp_batch_size(hp, 8, 100), 32)
