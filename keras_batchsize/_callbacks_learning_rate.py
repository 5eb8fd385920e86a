"""`LearningRateScaling`: the rate follows the batch size."""

import keras

from keras_batchsize import _checks
from keras_batchsize import learning_rate
from keras_batchsize import policies
from keras_batchsize import replicas
from keras_batchsize import requirements
from keras_batchsize import scaling
from keras_batchsize._callbacks_base import train_function_of
from keras_batchsize._callbacks_clock import LastClock
from keras_batchsize.controller import Controller
from keras_batchsize.plan import Ladder
from keras_batchsize.train_function import AdaptiveTrainFunction


class LearningRateScaling(keras.callbacks.Callback):
    """Lets the learning rate follow the batch size.

    With a `DynamicBatchSize` in the same `fit`, in any order, it follows that.
    Alone, with `batch_size` given, it is the static rule of Goyal et al. 2017
    (arXiv:1706.02677): the rate is multiplied by the rule's factor for
    batch_size/base_batch_size, reached by a gradual warm-up. The optimizer's
    own `learning_rate` is not changed; the factor is applied around updates.

    ```python
    model.fit(x, y, batch_size=1024, callbacks=[kb.LearningRateScaling(
        base_batch_size=128, batch_size=1024, warmup_epochs=5)])
    ```

    Args:
        rule: "linear", "sqrt", "adascale", "none", "auto" (linear for SGD,
            sqrt for adaptive optimizers), or a function
            `factor(ratio, noise_scale) -> float` of B/B₀ and φ/B₀.
        base_batch_size: Batch size B₀ that the learning rate was meant for.
            None for the initial size of `DynamicBatchSize`.
        batch_size: The batch size given to `fit`, for the static use.
        warmup_epochs: Epochs over which the factor grows from 1; may be a
            fraction.
        momentum_correction: Whether momentum is rescaled when the factor
            changes.
    """

    def __init__(
        self,
        rule="auto",
        base_batch_size=None,
        batch_size=None,
        warmup_epochs=0,
        momentum_correction=True,
    ):
        super().__init__()
        scaling.get(rule, auto="sqrt", name="rule")
        why = "the rate is scaled by the ratio of the two sizes"
        for name, value in (
            ("base_batch_size", base_batch_size),
            ("batch_size", batch_size),
        ):
            if value is not None:
                _checks.positive_int(name, value, why, f"Use {name}=32.")
        self.rule = rule
        self.base_batch_size = base_batch_size
        self.batch_size = batch_size
        self.warmup_epochs = _checks.real(
            "warmup_epochs",
            warmup_epochs,
            0.0,
            1e6,
            "the factor grows from 1 during these epochs",
            "Use 5.",
        )
        self.momentum_correction = momentum_correction
        self._static = None
        self._attached = False
        self._last_clock = LastClock()

    def on_train_begin(self, logs=None):
        """Forgets an earlier training."""
        requirements.check_model(self.model)
        self._static, self._attached = None, False

    def on_epoch_begin(self, epoch, logs=None):
        """Attaches itself, once every callback has begun."""
        if not self._attached:
            self._attach()
        if self._static is not None:
            self._static.start_epoch(epoch)

    def _attach(self):
        function = train_function_of(self.model)
        if function is None:
            function = self._static = self._make_static()
        auto = learning_rate.rule_for(self.model.optimizer)
        function.rule = scaling.get(self.rule, auto)
        function.reference_batch_size = self.base_batch_size
        function.warmup_epochs = self.warmup_epochs
        function.corrects_momentum = self.momentum_correction
        self._attached = True

    def _make_static(self):
        if self.batch_size is None or self.base_batch_size is None:
            raise ValueError(
                "`base_batch_size` and `batch_size` must be given to "
                "`LearningRateScaling` where no `DynamicBatchSize` decides: "
                "the rate is scaled by their ratio. Received: "
                f"base_batch_size={self.base_batch_size}, "
                f"batch_size={self.batch_size}. Pass the size that the rate "
                "was meant for and the `batch_size` given to `fit`, or add "
                "kb.DynamicBatchSize()."
            )
        requirements.warn_of_lost_executions(self.model)
        function = AdaptiveTrainFunction(
            self.model,
            self._static_controller,
            steps=self.params.get("steps"),
            epochs=self.params.get("epochs", 1),
        )
        # For a backup that is called before us.
        function.on_epoch_end = lambda epoch, logs: _end_epoch(function)
        function.install()
        return function

    def _static_controller(self, examples):
        size = self.batch_size
        is_whole_epoch = self.params.get("steps") == 1 and examples < size
        if examples != size and not is_whole_epoch:
            raise ValueError(
                "`batch_size` of `LearningRateScaling` must be that of `fit`: "
                "the rate is scaled for it. Received: "
                f"batch_size={size}, and batches of {examples} examples. Use "
                f"LearningRateScaling(..., batch_size={examples})."
            )
        number = replicas.count(self.model)
        ladder = Ladder(size, size, size, replicas=number)
        controller = Controller(
            policies.Fixed(), ladder, size, None, replicas=number
        )
        self._last_clock.tell(self.model, controller)
        return controller

    def on_epoch_end(self, epoch, logs=None):
        """Gives the momentum back, for those who save it."""
        if self._static is not None:
            _end_epoch(self._static)

    def on_train_end(self, logs=None):
        """Gives the model back as it was."""
        if self._static is not None:
            self._static.uninstall()
            self._last_clock.note(self.model, self._static.controller)

    def __getstate__(self):
        """Leaves graphs out: a copy can train, but not go on with them."""
        left_out = {"_static": None, "_last_clock": LastClock()}
        return {**vars(self), **left_out, "_attached": False}


def _end_epoch(function):
    """Tells a train function that nobody else tells; once or more often."""
    function.restore_momentum()
    if function.controller is not None:
        function.controller.clock.end_epoch()
