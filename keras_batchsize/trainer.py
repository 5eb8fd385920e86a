"""`AdaptiveTrainer`: a Keras `fit` whose batch size follows the noise."""

from keras_batchsize import _superbatches_arrays as _arrays
from keras_batchsize import distributed
from keras_batchsize import keras_private
from keras_batchsize import learning_rate
from keras_batchsize import memory
from keras_batchsize import policies
from keras_batchsize import replicas
from keras_batchsize import requirements
from keras_batchsize import scaling
from keras_batchsize._callbacks_clock import LastOptimizer
from keras_batchsize._trainer_callbacks import TrainerBatchSize
from keras_batchsize._trainer_callbacks import board_of
from keras_batchsize._trainer_callbacks import callbacks_of
from keras_batchsize._trainer_model import KeptProfile
from keras_batchsize._trainer_model import check_last_batch
from keras_batchsize._trainer_model import check_state
from keras_batchsize._trainer_model import largest_by_default
from keras_batchsize._trainer_model import note_own_fit
from keras_batchsize._trainer_workers import check_workers
from keras_batchsize.controller import Controller
from keras_batchsize.measuring import checked_every
from keras_batchsize.noise import UNKNOWN
from keras_batchsize.plan import Ladder
from keras_batchsize.superbatches import make_superbatches
from keras_batchsize.train_function import VariablesFreed
from keras_batchsize.update_graphs import KeptSteps


def _split(data, share):
    """Returns what to train and what to validate on, as `Model.fit` does."""
    if _arrays.is_arrays(data[0]):
        _arrays.count(*data)  # Once cut alike they would not differ.
    return keras_private.train_validation_split(data, share)


class AdaptiveTrainer:
    """Trains a Keras model with a batch size that follows the gradient noise.

    ```python
    trainer = kb.AdaptiveTrainer(model)
    history = trainer.fit(x, y, batch_size=32, epochs=20)
    trainer.report.summary()
    ```

    The model is left as it was, apart from being trained. A second `fit` with
    the same batch size and optimizer goes on from the size and statistics of
    the first; a model compiled anew starts anew.

    Args:
        model: A compiled Keras model.
        policy: Who decides the size: "goodput", "noise_scale", "norm_test",
            "cosine", "cabs", "diversity", "plateau", "fixed", "measure", or a
            `kb.policies.BatchSizePolicy`.
        learning_rate_scaling: "linear", "sqrt", "adascale", "none", "auto"
            (linear for SGD, sqrt for adaptive optimizers), or a function
            `factor(ratio, noise_scale) -> float` of B/B₀ and φ/B₀.
        min_batch_size: Smallest size, in examples. None for the base size.
        max_batch_size: Largest size, in examples. None for the largest that
            the memory probe finds on an accelerator, else a sixteenth of the
            examples in an epoch. Above the superbatch gradients are
            accumulated.
        superbatch_size: Examples per Keras step, the base batch size times a
            power of two (and a multiple of the replicas). None for a
            sixteenth of an epoch, or up to an eighth for 64 base batches, of
            small data 256 examples, and at most 256 MB where data are copied.
        measure_every: Measure once in so many updates, but no more than once
            per superbatch; "auto" for as often as 2 % of the time pay for.
        tensorboard: Folder to write to for TensorBoard, or the
            `keras.callbacks.TensorBoard` in use; see `BatchSizeTensorBoard`.
        backup_dir: Folder from which an interrupted `fit` resumes, as
            `keras.callbacks.BackupAndRestore` does.
        verbose: 1 to print a line at each change of the size.

    Raises:
        TypeError: If `model` is not a Keras model, or an argument of another
            kind than stated.
        ValueError: If the model is not compiled or cannot be trained this
            way, or an argument has an impossible value.
    """

    def __init__(
        self,
        model,
        policy="goodput",
        learning_rate_scaling="auto",
        min_batch_size=None,
        max_batch_size=None,
        superbatch_size=None,
        measure_every="auto",
        tensorboard=None,
        backup_dir=None,
        verbose=1,
    ):
        requirements.check_model(model)
        self.model = model
        self.policy = policies.get(policy)
        scaling.get(
            learning_rate_scaling, learning_rate.rule_for(model.optimizer)
        )
        self.learning_rate_scaling = learning_rate_scaling
        self.min_batch_size = min_batch_size
        self.max_batch_size = max_batch_size
        self.superbatch_size = superbatch_size
        self.measure_every = checked_every(measure_every)
        self.tensorboard = board_of(tensorboard)
        self.backup_dir = backup_dir
        self.verbose = verbose
        self._controller = None
        self._report = None
        self._prepared = distributed.Preparation()
        self._state = None
        self._profile = KeptProfile()
        self._last_optimizer = LastOptimizer()
        self._kept_steps = KeptSteps()

    def probe(self, x, y=None, sample_weight=None, **limits):
        """Finds out which batch sizes fit memory, and how fast they are.

        The next `fit` takes no more through the model at once, and starts from
        these step times, unless the model is compiled anew, or data differ.

        Args:
            x: As in `Model.fit`; of any kind that can be read more than once.
            y: Likewise.
            sample_weight: Likewise.
            **limits: As in `kb.find_max_batch_size`.

        Returns:
            A `BatchProfile`.
        """
        limits = {"accumulates": True, **limits}
        profile = memory.find_max_batch_size(
            self.model, x, y, sample_weight, **limits
        )
        memory.warn_of_early_end(profile)
        self._profile.keep(profile, self.model, (x, y, sample_weight))
        return profile

    def fit(
        self,
        x=None,
        y=None,
        batch_size=None,
        epochs=1,
        verbose="auto",
        callbacks=None,
        validation_split=0.0,
        validation_data=None,
        shuffle=True,
        class_weight=None,
        sample_weight=None,
        initial_epoch=0,
        steps_per_epoch=None,
        validation_steps=None,
        validation_batch_size=None,
        validation_freq=1,
    ):
        """Trains the model. All arguments mean what they do in `Model.fit`.

        Args:
            x: Input data, of any kind that `Model.fit` takes.
            y: Targets.
            batch_size: The base batch size B₀: the size that the learning rate
                was meant for. None for the batch size of a dataset, or 32.
            epochs: Number of the last epoch.
            verbose: 0, 1, 2 or "auto".
            callbacks: List of Keras callbacks.
            validation_split: Fraction of arrays to validate on.
            validation_data: Data to validate on.
            shuffle: Whether arrays are shuffled.
            class_weight: Dict from classes to weights.
            sample_weight: Weights of the examples.
            initial_epoch: Epoch to start at.
            steps_per_epoch: Base batches per epoch.
            validation_steps: Batches to validate on.
            validation_batch_size: Batch size of validation, None for
                `batch_size`.
            validation_freq: Epochs between validations.

        Returns:
            The Keras `History`, with `batch_size`, `noise_scale` and
            `examples_per_second` added for each epoch.
        """
        data = x, y, sample_weight
        if validation_split and validation_data is None:
            data, validation_data = _split(data, validation_split)
        self._probe_first(*data, batch_size, steps_per_epoch)
        superbatches = self._superbatches(
            *data,
            batch_size=batch_size,
            steps_per_epoch=steps_per_epoch,
            shuffle=shuffle,
            class_weight=class_weight,
        )
        return self._fit(
            superbatches, callbacks, verbose,
            # Keras validates arrays by it; what it trains on is batched.
            batch_size=batch_size,
            epochs=epochs,
            validation_data=validation_data,
            initial_epoch=initial_epoch,
            validation_steps=validation_steps,
            validation_batch_size=validation_batch_size,
            validation_freq=validation_freq,
        )

    def _probe_first(self, x, y, sample_weight, base=None, steps=None):
        """Looks for the largest size where that is the limit in force.

        From the base size on: it is trained with in any case, and tells more
        than a single example would where the time is short.
        """
        is_limit = self.max_batch_size is None and memory.on_accelerator()
        is_known = self._profile.of(self.model) is not None
        # Data are not touched without need: to ask a DataLoader whether it can
        # be read twice is to draw from its random numbers.
        if not (is_limit or is_known) or not memory.may_be_read_ahead(x):
            return
        self._profile.check(self.model, (x, y, sample_weight))
        if not is_limit or self._profile.of(self.model) is not None:
            return
        if not memory.can_be_probed(self.model):
            return
        if base is None:
            base = memory.base_batch_size(
                self.model, x, y, sample_weight, steps
            )
        with memory.errors_of_fit():
            self.probe(x, y, sample_weight, start=base)

    def _superbatches(self, *data, **how):
        requirements.check_model(self.model)
        superbatches = make_superbatches(
            self.model, *data, superbatch_size=self.superbatch_size, **how
        )
        check_last_batch(self.model, superbatches)
        return superbatches

    def _fit(self, superbatches, callbacks, verbose, **arguments):
        controller = self._controller_for(superbatches)
        shows = self.verbose and verbose != 0
        sizes = TrainerBatchSize(
            controller,
            superbatches,
            self._kept_steps,
            self._last_optimizer,
            shows,
        )
        callbacks = callbacks_of(self, callbacks, sizes, superbatches, verbose)
        check_workers(self, controller, superbatches, callbacks, arguments)
        may_be_read = True
        try:
            with self._prepared(self.model, superbatches.specs):
                return self.model.fit(
                    superbatches,
                    steps_per_epoch=superbatches.steps_per_epoch,
                    verbose=verbose,
                    callbacks=callbacks,
                    **arguments,
                )
        except VariablesFreed:
            may_be_read = False
            raise
        except (TypeError, ValueError) as error:
            note_own_fit(self.model, error)
            raise
        finally:
            sizes.close()
            if self.tensorboard is not None:
                self.tensorboard.close()
            self._report = sizes.report or self._report
            if may_be_read:
                self._last_optimizer.note(self.model)

    def _controller_for(self, superbatches):
        """Returns the controller of the last `fit`, or a new one."""
        base = superbatches.base_batch_size
        ladder = self._ladder(base, superbatches.examples_per_epoch)
        size = superbatches.superbatch_size
        measure = self.measure_every
        if measure == "auto" and not self._needs_noise():
            measure = None
        state, last = self._state, self._controller
        is_same = self._last_optimizer.is_of(self.model)
        goes_on = last is not None and is_same
        if goes_on and last.ladder.base == base:
            state = last.get_state()
        controller = Controller(
            self.policy,
            ladder,
            size,
            measure,
            replicas=replicas.count(self.model),
        )
        if state is not None:
            controller.set_state(state)
        elif goes_on:
            # Statistics are of one base size; a schedule just goes on.
            last.clock.start_epoch()
            controller.clock.steps = last.clock.steps
        # One that has not begun will ask the optimizer for its steps.
        if controller.examples or controller.clock.steps:
            self._last_optimizer.tell(self.model, controller.clock)
        self._last_optimizer.note(self.model)
        self._profile.tell(controller, self.model)
        self._controller, self._state = controller, None
        return controller

    def _needs_noise(self):
        """Whether the policy, or else the rule, looks at gradient noise."""
        rule = scaling.get(
            self.learning_rate_scaling,
            learning_rate.rule_for(self.model.optimizer),
        )
        return self.policy.needs_noise or rule not in scaling.NEED_NO_NOISE

    def _ladder(self, base, examples):
        maximum, minimum = self.max_batch_size, self.min_batch_size
        if maximum is None:
            maximum = largest_by_default(
                self.model, base, examples, self._profile.of(self.model)
            )
        return Ladder(
            base,
            base if minimum is None else minimum,
            maximum,
            replicas=replicas.count(self.model),
        )

    def evaluate(self, *args, **kwargs):
        """Calls `model.evaluate`."""
        with self._prepared(self.model):
            return self.model.evaluate(*args, **kwargs)

    def predict(self, *args, **kwargs):
        """Calls `model.predict`."""
        with self._prepared(self.model):
            return self.model.predict(*args, **kwargs)

    @property
    def batch_size(self):
        """Examples per update now; None before the first `fit`."""
        return self._controller and self._controller.batch_size

    @property
    def noise_scale(self):
        """The `NoiseScaleEstimate` of all measurements so far."""
        if self._controller is None:
            return UNKNOWN
        return self._controller.noise_scale

    @property
    def plan(self):
        """The `BatchPlan` in force; None before the first `fit`."""
        return self._controller and self._controller.plan

    @property
    def report(self):
        """The `Report` of the latest `fit`; None before the first."""
        return self._report

    def get_state(self):
        """Returns batch size, statistics and clocks as plain JSON types.

        Returns:
            Dict; empty before the first `fit`.
        """
        if self._controller is None:
            return self._state or {}
        return self._controller.get_state()

    def set_state(self, state):
        """Lets the next `fit` go on from what `get_state` returned.

        Args:
            state: Dict of plain JSON types; an empty one to start anew.
        """
        check_state(state)
        self._controller, self._state = None, dict(state) or None
        # Its clock holds, whatever the optimizer counted in between.
        self._last_optimizer = LastOptimizer()
