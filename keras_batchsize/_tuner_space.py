"""What is searched: hyperparameters of batch size, policy and rate.

Nothing here needs KerasTuner: hyperparameters are asked for on the `hp` that
it hands over.
"""

import collections.abc
import dataclasses

from keras_batchsize import _checks
from keras_batchsize import learning_rate
from keras_batchsize import policies
from keras_batchsize import scaling
from keras_batchsize.plan import largest_on_ladder

INITIAL = "batch_size/initial"
POLICY = "batch_size/policy"
RULE = "batch_size/learning_rate_rule"
RATE = "batch_size/learning_rate"

# Policies under which the size never changes.
_CONSTANT = ("fixed", "measure")

# The argument that matters of each policy, and the range worth searching.
_ARGUMENTS = {
    "noise_scale": {"factor": (0.25, 4.0)},
    "norm_test": {"eta": (0.5, 2.0)},
    "cosine": {"target": (0.3, 0.7)},
    "cabs": {"constant": (0.1, 10.0)},
    "diversity": {"delta": (0.025, 0.4)},
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One point of a `BatchSizeSpace`.

    Attributes:
        initial: Initial batch size, in examples.
        policy: A new `BatchSizePolicy`.
        rule: Name of the learning-rate rule.
        reference_rate: Learning rate at the reference batch size. None where
            the space does not search it.
    """

    initial: int
    policy: policies.BatchSizePolicy
    rule: str
    reference_rate: float | None


class BatchSizeSpace:
    """The search space of batch size, policy and learning rate.

    Declares `batch_size/initial`, `batch_size/policy` and
    `batch_size/learning_rate_rule`; for policies with an argument worth
    searching that argument, such as `batch_size/noise_scale/factor`, where the
    policy is chosen; and, with `learning_rate` given,
    `batch_size/learning_rate`. Sizes are the smallest one times powers of two.

    The best learning rate moves with the batch size, so that a search over
    both sees a diagonal valley. Here the rate is searched for
    `reference_batch_size`, and carried to the initial size by the rule: what
    is left is what the rule gets wrong.

    Args:
        initial: Smallest and largest initial batch size, in examples.
        max_batch_size: Largest size that a policy may grow to. None for a
            sixteenth of the data.
        policies: Names of policies to choose among. "fixed" keeps the initial
            size; "measure" too, and measures the noise scale.
        learning_rate_rules: Names of rules to choose among: "linear", "sqrt",
            "adascale", "none", "auto". Where the rate is not searched here
            they apply to policies that change the size only.
        learning_rate: Smallest and largest learning rate at the reference
            batch size. None to leave the rate to the model; see also
            `hp_learning_rate`.
        reference_batch_size: Batch size that `learning_rate` is meant for.
        policy_arguments: Dict from policies to dicts from their arguments to
            the (smallest, largest) value to search, on a logarithmic scale,
            in place of the ranges known here. {} to search none.

    Raises:
        TypeError: If an argument is of another kind than stated.
        ValueError: If a range is empty, or a name is not known.
    """

    def __init__(
        self,
        initial=(16, 512),
        max_batch_size=1024,
        policies=("goodput", "fixed"),
        learning_rate_rules=("linear", "sqrt"),
        learning_rate=None,
        reference_batch_size=256,
        policy_arguments=None,
    ):
        self.initial = _pair("initial", initial, (16, 512), _checked_size)
        self.max_batch_size = _checked_maximum(max_batch_size, self.initial[1])
        self.policies = _checked_policies(policies)
        self.learning_rate_rules = _checked_rules(learning_rate_rules)
        self.learning_rate = learning_rate
        if learning_rate is not None:
            self.learning_rate = _rates("learning_rate", learning_rate)
        self.reference_batch_size = _checked_reference(reference_batch_size)
        if policy_arguments is None:
            policy_arguments = _ARGUMENTS
        self.policy_arguments = _checked_arguments(policy_arguments)

    def declare(self, hp):
        """Declares the hyperparameters, once or again.

        Args:
            hp: The `keras_tuner.HyperParameters`.
        """
        hp_batch_size(hp, *self.initial)
        _choice(hp, POLICY, self.policies)
        changing = [one for one in self.policies if one not in _CONSTANT]
        if self.learning_rate is not None:
            low, high = self.learning_rate
            hp.Float(RATE, low, high, sampling="log")
            _choice(hp, RULE, self.learning_rate_rules)
        elif changing:
            with hp.conditional_scope(POLICY, changing):
                _choice(hp, RULE, self.learning_rate_rules)
        for policy, name, (low, high) in self._searched_arguments():
            with hp.conditional_scope(POLICY, [policy]):
                hp.Float(name, low, high, sampling="log")

    def _searched_arguments(self):
        """Yields (policy, hyperparameter, range)."""
        for policy in self.policies:
            for argument, values in self.policy_arguments.get(
                policy, {}
            ).items():
                yield policy, f"batch_size/{policy}/{argument}", values

    def setting(self, hp):
        """Returns the `Setting` that the values of a trial stand for.

        Args:
            hp: The `keras_tuner.HyperParameters` of the trial.
        """
        chosen = hp.get(POLICY)
        arguments = {
            name.rsplit("/", 1)[1]: hp.get(name)
            for policy, name, _ in self._searched_arguments()
            if policy == chosen
        }
        rule = self.learning_rate_rules[0]
        if RULE in hp:
            rule = hp.get(RULE)
        return Setting(
            initial=hp.get(INITIAL),
            policy=policies.POLICIES[chosen](**arguments),
            rule=rule,
            reference_rate=hp.get(RATE) if self.learning_rate else None,
        )

    def __repr__(self):
        arguments = ", ".join(
            f"{name}={value!r}" for name, value in vars(self).items()
        )
        return f"BatchSizeSpace({arguments})"


def hp_batch_size(
    hp, min_value=16, max_value=512, default=None, name="batch_size/initial"
):
    """Asks for a batch size among `min_value` times powers of two.

    Args:
        hp: The `keras_tuner.HyperParameters`.
        min_value: Smallest size, in examples.
        max_value: Largest size.
        default: Size of the first trial of some tuners. None for 32, or the
            smallest.
        name: Name of the hyperparameter.

    Returns:
        Integer, in examples.
    """
    low = _checked_size("min_value", min_value)
    high = _checked_size("max_value", max_value)
    _pair("min_value, max_value", (low, high), (16, 512), _checked_size)
    largest = largest_on_ladder(low, high)
    # A choice and not an `hp.Int` with sampling="log": the same for every
    # tuner, but the domain that TensorBoard is told of is right.
    sizes = [low]
    while sizes[-1] < largest:
        sizes.append(sizes[-1] * 2)
    if default is None:
        default = 32 if 32 in sizes else sizes[0]
    return _choice(hp, name, sizes, default)


def hp_learning_rate(
    hp,
    batch_size,
    reference_batch_size=256,
    min_value=1e-3,
    max_value=1.0,
    rule="linear",
    name="learning_rate",
):
    """Asks for a rate at a reference batch size; returns it for another.

    For a model-building function that sets the rate itself:

    ```python
    batch_size = hp.get("batch_size/initial")
    rate = kbt.hp_learning_rate(hp, batch_size)
    ```

    Args:
        hp: The `keras_tuner.HyperParameters`.
        batch_size: Size that the rate is wanted for, in examples.
        reference_batch_size: Size that the rate is searched for.
        min_value: Smallest rate, at the reference batch size.
        max_value: Largest rate, at the reference batch size.
        rule: "linear", "sqrt" (for Adam and its family), "none", or a function
            `factor(ratio, noise_scale) -> float`.
        name: Name of the hyperparameter.

    Returns:
        Float, the rate for `batch_size`.
    """
    low, high = _rates("min_value, max_value", (min_value, max_value))
    _checked_reference(reference_batch_size)
    if not callable(rule):
        _checks.known(
            "rule",
            rule,
            ("linear", "sqrt", "none"),
            "it carries the rate from one batch size to another, before any "
            "noise is measured",
        )
    factor = scaling.get(rule, auto="linear", name="rule")
    rate = hp.Float(name, low, high, sampling="log")
    return rate * factor(batch_size / reference_batch_size, None)


def rate_factor(rule, ratio, optimizer):
    """Returns the factor between the rates of two sizes, before training.

    Args:
        rule: Name of a rule. AdaScale's gain depends on the noise, which is
            not known yet, so there "auto" stands in for it.
        ratio: Size wanted divided by the size that the rate is for.
        optimizer: The Keras optimizer.

    Returns:
        Float.
    """
    rule = "auto" if rule == "adascale" else rule
    return scaling.get(rule, learning_rate.rule_for(optimizer))(ratio, None)


def _choice(hp, name, values, default=None):
    values = list(values)
    if len(values) == 1:
        return hp.Fixed(name, values[0])
    return hp.Choice(name, values, default=default)


def _pair(name, value, example, checked):
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(
            f"`{name}` must be a pair, the smallest and the largest value: it "
            f"is a range to search. Received: {name}={value!r}. Use "
            f"{name}={example}."
        )
    low, high = (checked(name, one) for one in value)
    if low > high:
        raise ValueError(
            f"`{name}` must begin with the smaller value: nothing lies "
            f"between them. Received: {name}={value!r}. Use "
            f"{name}={(high, low)}."
        )
    return low, high


def _checked_size(name, size):
    return _checks.positive_int(
        name, size, "it bounds the batch sizes to search", "Use 16 and 512."
    )


def _checked_rate(name, rate):
    why = "it is searched on a logarithmic scale"
    return _checks.real(name, rate, 1e-12, 1e6, why, "Use 1e-3 and 1.0.")


def _rates(name, value):
    return _pair(name, value, (1e-3, 1.0), _checked_rate)


def _checked_maximum(maximum, initial):
    if maximum is None:
        return None
    _checks.positive_int(
        "max_batch_size",
        maximum,
        "it is the largest size that a policy may grow to",
        f"Use max_batch_size={initial}.",
    )
    if maximum < initial:
        raise ValueError(
            "`max_batch_size` must not be smaller than the largest initial "
            "size: training starts from that. Received: "
            f"max_batch_size={maximum}, initial=(..., {initial}). Use "
            f"max_batch_size={initial}."
        )
    return int(maximum)


def _names(name, value, example):
    is_list = isinstance(value, collections.abc.Iterable)
    if not is_list or isinstance(value, str) or not value:
        raise TypeError(
            f"`{name}` must be a list of names with at least one: the search "
            f"chooses among them. Received: {name}={value!r}. Use "
            f"{name}={example}."
        )
    return tuple(value)


def _checked_policies(names):
    names = _names("policies", names, ("goodput", "fixed"))
    for name in names:
        if isinstance(name, policies.BatchSizePolicy):
            raise TypeError(
                "`policies` of a search space must be names: KerasTuner "
                "stores what it chooses among as text. Received: "
                f"policies=[{name!r}, ...]. {_instead_of(name)}"
            )
        _checks.known(
            "policies", name, policies.POLICIES, "each decides the batch size"
        )
    return names


def _instead_of(policy):
    for name, kind in policies.POLICIES.items():
        if kind is type(policy):
            return f'Use policies=["{name}"], and `policy_arguments` for more.'
    return "It has no name. Use it with kb.AdaptiveTrainer."


def _checked_rules(names):
    names = _names("learning_rate_rules", names, ("linear", "sqrt"))
    for name in names:
        _checks.known(
            "learning_rate_rules",
            name,
            [*scaling.RULES, "auto"],
            "each names how the rate follows the batch size",
        )
    return names


def _checked_reference(size):
    return _checks.positive_int(
        "reference_batch_size",
        size,
        "it is the batch size that the learning rate is searched for",
        "Use reference_batch_size=256.",
    )


def _checked_arguments(arguments):
    """Checks that each policy takes both ends of each range."""
    if not isinstance(arguments, dict) or not all(
        isinstance(ranges, dict) for ranges in arguments.values()
    ):
        raise TypeError(
            "`policy_arguments` must be a dict of dicts: a policy may have "
            f"several arguments. Received: policy_arguments={arguments!r}. Use "
            'policy_arguments={"noise_scale": {"factor": (0.25, 4.0)}}.'
        )
    for policy, ranges in arguments.items():
        _checks.known(
            "policy_arguments",
            policy,
            policies.POLICIES,
            "its keys are policies",
        )
        for argument, values in ranges.items():
            for value in _rates(f"{policy}: {argument}", values):
                try:
                    policies.POLICIES[policy](**{argument: value})
                except TypeError as error:
                    raise ValueError(
                        "`policy_arguments` must name arguments of the "
                        f"policy: they are given to it. Received: {policy}="
                        f"{ranges!r}. Use one that kb.policies."
                        f"{policies.POLICIES[policy].__name__} has."
                    ) from error
    return arguments
