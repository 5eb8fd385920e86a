"""`ExamplesProgbarLogger`: the progress bar, in examples."""

import keras

from keras_batchsize._callbacks_base import train_function_of


class ExamplesProgbarLogger(keras.callbacks.ProgbarLogger):
    """The progress bar, counting examples and showing the batch size.

    Keras uses it instead of its own bar when it is among the callbacks.

    Args:
        examples: Examples per epoch. None for Keras's count of steps times
            the superbatch size.
    """

    def __init__(self, examples=None):
        super().__init__()
        self.examples = examples
        self._steps = None

    def on_train_begin(self, logs=None):
        """Counts examples while training, and steps elsewhere, as Keras."""
        super().on_train_begin(logs)
        self._steps, self.target = self.target, self.examples

    def on_epoch_begin(self, epoch, logs=None):
        """Starts a bar."""
        super().on_epoch_begin(epoch, logs)
        self.progbar.unit_name = "example"

    def on_train_batch_end(self, batch, logs=None):
        """Moves the bar on by the examples of the superbatch."""
        function = train_function_of(self.model)
        if function is None:
            self.target = self.progbar.target = self._steps
            self.progbar.unit_name = "step"
            super().on_train_batch_end(batch, logs)
            return
        controller = function.controller
        if self.target is None and self._steps:
            self.target = self._steps * controller.superbatch_size
            self.progbar.target = self.target
        shown = {**(logs or {}), "batch_size": controller.batch_size}
        super().on_train_batch_end(function.epoch_examples - 1, shown)

    def on_epoch_end(self, epoch, logs=None):
        """Ends the bar at the number of examples that there were."""
        self.target = self.progbar.target = self.seen
        super().on_epoch_end(epoch, logs)
