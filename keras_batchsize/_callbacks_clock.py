"""Where the clock of schedules stood when a `fit` with callbacks ended."""

import keras


class LastClock:
    """Remembers a clock from one `fit` with a callback to the next.

    The optimizer counts updates, of which there are fewer than a schedule has
    steps where batches are larger than B₀.
    """

    def __init__(self):
        self._optimizer = None
        self._iterations = self._steps = 0

    def note(self, model, controller):
        """Remembers where a training has come to.

        Args:
            model: The compiled Keras model.
            controller: Its `Controller`, or None if it has not begun.
        """
        if controller is None:
            return
        clock = controller.clock
        self._optimizer = model.optimizer
        self._iterations = _iterations_of(model)
        self._steps = clock.steps - (-clock.examples // clock.batch_size)

    def tell(self, model, controller):
        """Lets the clock of a new controller go on from there.

        Args:
            model: The compiled Keras model.
            controller: Its new `Controller`.
        """
        if self._optimizer is None or self._optimizer is not model.optimizer:
            return
        # What a plain `fit` did in between; less than none if an earlier
        # state was loaded, of which the optimizer tells more.
        since = _iterations_of(model) - self._iterations
        if since >= 0:
            controller.clock.steps = self._steps + since


def _iterations_of(model):
    return keras.ops.convert_to_numpy(model.optimizer.iterations).item()
