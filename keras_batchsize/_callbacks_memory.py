"""`MemoryProbe`: finds out what fits, at the start of a training."""

import keras

from keras_batchsize import memory
from keras_batchsize._callbacks_base import train_function_of
from keras_batchsize._memory_examples import Examples
from keras_batchsize.memory import Limits


class MemoryProbe(keras.callbacks.Callback):
    """Probes memory on the first superbatch, and caps what is run at once.

    To be used beside a `DynamicBatchSize` or an `AdaptiveTrainer`. No pass
    through the model then holds more examples than the probe found to fit;
    larger batches are summed up from such passes. The policy starts from the
    step times that the probe measured. The base size is tried first. The
    ragged last batch of an epoch is run where the length of an epoch is known,
    which only a trainer tells.

    ```python
    model.fit(x, y, batch_size=2048, callbacks=[
        kb.DynamicBatchSize(initial_batch_size=32),
        kb.MemoryProbe(),
    ])
    ```

    Args:
        safety_margin: Share of the memory that stays free, in (0, 1).
        memory_limit: Bytes that the device has, None for all there are.
        time_budget: Seconds after which no further size is tried.

    Attributes:
        profile: The `BatchProfile`; None before the first superbatch.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If an argument has an impossible value, or no other
            callback decides the batch size.
    """

    def __init__(
        self, safety_margin=0.05, memory_limit=None, time_budget=60.0
    ):
        super().__init__()
        self.safety_margin = safety_margin
        self.memory_limit = memory_limit
        self.time_budget = time_budget
        self.profile = None
        self._limits()

    def _limits(self, start=1, maximum=None):
        return Limits(
            start=start,
            maximum=maximum,
            memory_limit=self.memory_limit,
            safety_margin=self.safety_margin,
            time_budget=self.time_budget,
        )

    def on_train_begin(self, logs=None):
        """Checks the model; what caps it comes with the first data."""
        memory.check_probed(self.model)
        self.profile = None

    def on_epoch_begin(self, epoch, logs=None):
        """Waits for the first superbatch, once every callback has begun."""
        function = train_function_of(self.model)
        if function is None:
            raise ValueError(
                "`MemoryProbe` must stand beside a `DynamicBatchSize`: it "
                "caps what that decides. Received: callbacks without one. Add "
                "kb.DynamicBatchSize(), or call kb.find_max_batch_size(model, "
                "x, y) before `fit`."
            )
        if self.profile is None:
            function.on_first_superbatch = self._probe

    def _probe(self, data, controller):
        base = controller.ladder.base
        limits = self._limits(base, max(controller.superbatch_size, base))
        examples = self._examples(data, limits.maximum)
        memory.check_alike(self.model, examples, limits)
        self.profile = memory.probe(self.model, examples, limits)
        memory.warn_of_early_end(self.profile)
        # Measured just now: it may raise the limit of an earlier `fit`.
        controller.expect(self.profile, is_new=True)

    def _examples(self, data, maximum):
        """Returns the `Examples`.

        Fewer than the largest size are taken for an unknown number: they are
        not what ends the probe, as batches may be larger than an epoch.
        """
        steps = train_function_of(self.model).steps
        if (steps.examples or 0) < maximum:
            return Examples(data)
        return Examples(data, steps.examples, fewer=steps.fewer)
