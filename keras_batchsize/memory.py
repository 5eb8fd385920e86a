"""The probe: how much memory and time a training step takes, by running it.

Separation of concerns:

- Here: what a caller may ask for.
- `_memory_probing.py`, `_memory_peaks.py`: the course of a probe.
- `_memory_process.py`, `_memory_worker.py`: the same in a child process.
- `_memory_cache.py`: profiles kept in a folder.
- `_memory_workers.py`: what several workers settle before.
- `_memory_key.py`, `_memory_code.py`: what tells a model from all others.
- `_memory_compare.py`: dtype policies side by side.
- `size_search.py`: which size is tried next. Pure.
- `_memory_meters.py`, `_memory_host.py`: how memory is read.
- `_memory_workload.py`: the step, the same that training takes.
- `_memory_validation.py`: validation, where a model has one.
- `_memory_building.py`: variables are made as `fit` would make them.
- `_memory_scale.py`: gradients of half precision do not overflow.
- `_memory_snapshot.py`: everything is put back, bit for bit.
- `_memory_examples.py`: a few examples of any input.
- `_memory_data.py`: what the data themselves take.
- `batch_profile.py`: the result.
"""

import math
import warnings

import keras
import tensorflow as tf

from keras_batchsize import _keras_private_random
from keras_batchsize import exactness
from keras_batchsize import model_state
from keras_batchsize import out_of_memory
from keras_batchsize import replicas
from keras_batchsize import requirements
from keras_batchsize._batch_profile_text import megabytes
from keras_batchsize._memory_building import build_layers
from keras_batchsize._memory_cache import check_folder
from keras_batchsize._memory_cache import keep
from keras_batchsize._memory_cache import load
from keras_batchsize._memory_cache import path_of
from keras_batchsize._memory_cache import still_fits
from keras_batchsize._memory_compare import compared
from keras_batchsize._memory_data import bytes_beside_steps
from keras_batchsize._memory_examples import can_be_read_twice
from keras_batchsize._memory_examples import may_be_read_ahead
from keras_batchsize._memory_examples import read_examples
from keras_batchsize._memory_key import spec_of
from keras_batchsize._memory_limits import Limits
from keras_batchsize._memory_limits import NothingFits
from keras_batchsize._memory_limits import errors_of_fit
from keras_batchsize._memory_meters import devices_of
from keras_batchsize._memory_meters import meter_for
from keras_batchsize._memory_probing import Probing
from keras_batchsize._memory_process import probe_in_process
from keras_batchsize._memory_workers import check_alike
from keras_batchsize._memory_workers import least_limit
from keras_batchsize._memory_workers import shared_by_all
from keras_batchsize._memory_workload import Workload
from keras_batchsize.superbatches import base_batch_size_of

__all__ = [
    "can_be_read_twice",
    "check_alike",
    "compare_dtype_policies",
    "errors_of_fit",
    "find_max_batch_size",
    "may_be_read_ahead",
]


def find_max_batch_size(
    model,
    x,
    y=None,
    sample_weight=None,
    start=1,
    maximum=None,
    memory_limit=None,
    safety_margin=0.05,
    time_budget=60.0,
    accumulates=False,
    isolation=False,
    cache=None,
):
    """Finds the largest batch size that fits memory, and how fast sizes are.

    The training step itself is run, under the dtype policy, the optimizer and
    the XLA setting that the model has: updates, the ragged last batch of an
    epoch, validation. Sizes are tried from below, in a few large
    steps; the size that is returned was run and stayed within the margin. The
    model, its optimizer, metrics, names and all random states are afterwards
    bit for bit as before, also after an error or Ctrl-C.

    ```python
    profile = kb.find_max_batch_size(model, x, y)
    profile.summary()
    model.fit(x, y, batch_size=profile.saturation_batch_size)
    ```

    Args:
        model: A compiled Keras model.
        x: As in `Model.fit`; of any kind that can be read more than once.
            The first examples are read, at most 64 or a batch; where they
            differ in length, the longest of them should be the longest of
            all. A pipeline keeps its order, unless it shuffles below a `zip`
            or something else that cannot be made anew without.
        y: As in `Model.fit`.
        sample_weight: As in `Model.fit`.
        start: First size to try, in examples. Smaller ones are tried only if
            it does not fit.
        maximum: Largest size to try, in examples. None for the number of
            examples in the data.
        memory_limit: Bytes that the device has. None for what the allocator
            may hand out, on a CPU half of what the host has free. Where no
            peak can be measured, what all tensors take together must fit;
            where that is not known either, a limit is warned of.
        safety_margin: Share of the limit that stays free, in (0, 1). What an
            allocator loses to fragmentation is left free besides.
        time_budget: Seconds after which no further size is tried.
        accumulates: Whether training will sum gradients of micro-batches, as
            `AdaptiveTrainer` does; then the sums must fit, too.
        isolation: Whether the trials run in a child process, for models that
            can be built again from their configuration.
        cache: Folder in which profiles are kept and looked up by model,
            compile settings, dtype policies, data, device and limits; None
            to probe always. A model that cannot be told from others for sure
            is always probed, with a warning. Several workers take a profile
            only if all of them have kept the same one.

    Returns:
        A `BatchProfile`.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If an argument has an impossible value, the model cannot
            be probed, not even the smallest batch fits, or workers differ.
    """
    limits = Limits(start, maximum, memory_limit, safety_margin, time_budget)
    check_folder(cache)
    check_probed(model)
    limits.check_replicas(replicas.count(model))
    with _keras_private_random.states_kept():
        examples = read_examples(model, x, y, sample_weight)
    asked = {"accumulates": bool(accumulates), "cache": cache is not None}
    check_alike(model, examples, limits, **asked)
    _check_weights(model, limits)
    path = None
    if cache is not None:
        device = ", ".join(devices_of(model))
        build_layers(model, examples.one)
        path = path_of(
            cache, model, examples, limits, isolation, device, accumulates
        )
        known = _known(path, model, limits)
        if known is not None:
            return known
    run = probe_in_process if isolation else probe
    profile = run(model, examples, limits, accumulates)
    if path is not None:
        keep(profile, path)
    return profile


def _known(path, model, limits):
    """Returns the profile in a file, None if it does not hold any more."""
    profile = path and load(path)
    if profile is not None:
        meter = meter_for(model)
        resident = out_of_memory.bytes_of(model_state.variables_of(model))
        if meter.is_shared:
            resident *= replicas.count(model) // replicas.workers(model)
        meter.reset(resident)
        own, _ = meter.limit()
        known = [one for one in (own, limits.memory_limit) if one is not None]
        least = min(known, default=None)
        if not still_fits(profile, least, limits.safety_margin):
            profile = None
    return shared_by_all(model, profile)


def compare_dtype_policies(
    build_fn,
    x,
    y=None,
    policies=("float32", "mixed_bfloat16", "mixed_float16"),
    **limits,
):
    """Probes several dtype policies and says which one pays, if any does.

    Under each policy a model is built and probed, and its first updates are
    made from the same weights on the same examples: rounding is no reason
    against a policy, another loss is.

    ```python
    kb.compare_dtype_policies(build_model, x, y).summary()
    ```

    Args:
        build_fn: Function without arguments that returns a compiled model,
            under whatever dtype policy is the global one.
        x: As in `find_max_batch_size`.
        y: As in `Model.fit`.
        policies: Names of dtype policies; the others are compared with the
            first.
        **limits: As in `find_max_batch_size`.

    Returns:
        A `DtypeComparison` with `results`, `recommended` and `summary()`.

    Raises:
        TypeError: If `build_fn` is not a function.
        ValueError: If there are fewer than two policies, or one is not known.
    """
    if not callable(build_fn) or isinstance(build_fn, keras.Model):
        raise TypeError(
            "`build_fn` must be a function: a model keeps the dtype policy it "
            f"was made under. Received: build_fn={build_fn!r}. Pass a function "
            "that builds and compiles the model."
        )
    if isinstance(policies, str) or len(policies) < 2:
        raise ValueError(
            "`policies` must name at least two dtype policies: they are "
            f"compared. Received: policies={policies!r}. Use "
            'policies=("float32", "mixed_bfloat16").'
        )
    # A name that Keras does not know is an error before anything is probed.
    policies = [keras.dtype_policies.get(one).name for one in policies]
    return compared(
        build_fn,
        x,
        y,
        policies,
        lambda model: find_max_batch_size(model, x, y, **limits),
    )


def kind_of_data(model, x, y=None, sample_weight=None):
    """Returns what an example of data is, and how many of them there are.

    Args:
        model: A compiled Keras model.
        x: As in `Model.fit`; of any kind that can be read more than once.
        y: As in `Model.fit`.
        sample_weight: As in `Model.fit`.

    Returns:
        Pair of a string, alike for examples of the same shapes and types, and
        a number, infinity if it is not known.
    """
    with _keras_private_random.states_kept():
        examples = read_examples(model, x, y, sample_weight)
    x, y, _ = keras.utils.unpack_x_y_sample_weight(examples.one)
    kinds = [keras.tree.map_structure(spec_of, one) for one in (x, y)]
    return str(kinds), examples.count


def base_batch_size(model, *data):
    """Returns the base batch size of data where none is stated.

    Args:
        model: A compiled Keras model.
        *data: As in `superbatches.base_batch_size_of`.
    """
    with _keras_private_random.states_kept():
        return base_batch_size_of(model, *data)


def warn_of_early_end(profile):
    """Warns if a probe for a training ended before it found what fits.

    Args:
        profile: A `BatchProfile`.
    """
    if not profile.ended_early:
        return
    warnings.warn(
        f"The probe ended early, by {profile.reason}: training is not held to "
        "what it found, and where memory runs out goes on with half as many "
        f"examples at once. Received: {len(profile.rows)} sizes in "
        f"{profile.seconds:.0f} s, of which {profile.max_batch_size} is the "
        "largest that fits. State max_batch_size, or give a probe more time: "
        "time_budget=600, say.",
        RuntimeWarning,
        stacklevel=3,
    )


def on_accelerator():
    """Whether there is a device whose memory is not that of the host."""
    return bool(tf.config.list_logical_devices("GPU"))


def can_be_probed(model):
    """Whether the step of a model can be run at any batch size.

    Args:
        model: A compiled Keras model.
    """
    try:
        check_probed(model)
    except ValueError:
        return False
    return True


def check_probed(model):
    """Raises if the step of a model cannot be run at any batch size.

    Args:
        model: What the user passed as the model.

    Raises:
        TypeError: If it is not a Keras model.
        ValueError: If it is not compiled, only takes one batch size, or has
            its own `train_step` under a strategy, which runs another one.
    """
    requirements.check_model(model)
    requirements.check_any_size(model)
    if replicas.strategy_of(model) is not None:
        exactness.check_step(model, "a strategy", "probe without a strategy")


def _check_weights(model, limits):
    """Raises, before the model is touched, if its weights do not fit.

    Those of a model that is not built show when the probe has built it, which
    cannot be undone. On several workers all of them raise.
    """
    needed = out_of_memory.bytes_of(model_state.variables_of(model))
    least = least_limit(model, limits)
    usable = (least or math.inf) * (1.0 - limits.safety_margin)
    if needed >= usable:
        raise NothingFits(
            "`memory_limit` must leave room for a batch: weights, optimizer "
            f"slots and metrics alone take {megabytes(needed)} MB, of which "
            f"{megabytes(usable)} MB may be used. Received: "
            f"memory_limit={least}, safety_margin={limits.safety_margin}. "
            "Raise `memory_limit`, or use a smaller model."
        )


def probe(model, examples, limits, accumulates=True, meter=None):
    """Runs the search and returns what was found.

    Args:
        model: A compiled Keras model that `check_probed` lets pass.
        examples: An `Examples`.
        limits: A `Limits`.
        accumulates: Whether gradients may be summed over micro-batches.
        meter: A `Meter`; None for the best there is.

    Returns:
        A `BatchProfile`.
    """
    meter = meter_for(model) if meter is None else meter
    meter.settle(limits.memory_limit)
    beside = bytes_beside_steps(examples, meter, accumulates)
    with Workload(model, examples, meter, accumulates) as workload:
        return Probing(
            workload, examples, limits, meter, model, beside
        ).run()
