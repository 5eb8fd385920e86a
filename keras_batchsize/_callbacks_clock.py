"""Where optimizer and clock of schedules stood when a `fit` ended."""

from keras_batchsize._train_function_timing import number


class LastOptimizer:
    """Remembers the optimizer of a model from one `fit` to the next."""

    def __init__(self):
        self._optimizer = None
        self._steps = 0

    def note(self, model):
        """Remembers the optimizer that a model has now.

        Args:
            model: A compiled Keras model.
        """
        self._optimizer = model.optimizer
        self._steps = number(model.optimizer.iterations)

    def is_of(self, model):
        """Whether the model has not been compiled anew."""
        return self._optimizer is None or self._optimizer is model.optimizer

    def steps_since(self, model):
        """Updates that were made since, by a plain `fit`, say.

        Args:
            model: A compiled Keras model.

        Returns:
            Integer; 0 if another optimizer, or none, was noted.
        """
        if self._optimizer is not model.optimizer:
            return 0
        return number(model.optimizer.iterations) - self._steps

    def tell(self, model, clock):
        """Lets a clock go on from what a plain `fit` did since, say.

        Args:
            model: A compiled Keras model.
            clock: The `ExamplesClock` as it was when the optimizer was noted.
        """
        clock.steps += max(self.steps_since(model), 0)
        self.tell_if_earlier(model, clock)

    def tell_if_earlier(self, model, clock):
        """Sets a clock back where an earlier state of a model was loaded.

        Of that the optimizer tells more than the clock. It counts updates,
        which at sizes above B₀ are fewer than the steps of a schedule.

        Args:
            model: A compiled Keras model.
            clock: The `ExamplesClock` as it was when the optimizer was noted.
        """
        if self.steps_since(model) < 0:
            clock.steps, clock.examples = number(model.optimizer.iterations), 0


class LastClock:
    """Remembers a clock from one `fit` with a callback to the next.

    The optimizer counts updates, of which there are fewer than a schedule has
    steps where batches are larger than B₀.
    """

    def __init__(self):
        self._optimizer = LastOptimizer()
        self._steps = None

    def note(self, model, controller):
        """Remembers where a training has come to.

        Args:
            model: The compiled Keras model.
            controller: Its `Controller`, or None if it has not begun.
        """
        if controller is None:
            return
        self._optimizer.note(model)
        clock = controller.clock
        self._steps = clock.steps - (-clock.examples // clock.batch_size)

    def tell(self, model, controller):
        """Lets the clock of a new controller go on from there.

        Args:
            model: The compiled Keras model.
            controller: Its new `Controller`.
        """
        if self._steps is None or not self._optimizer.is_of(model):
            return
        # What a plain `fit` did in between; less than none if an earlier
        # state was loaded, of which the optimizer tells more.
        since = self._optimizer.steps_since(model)
        if since >= 0:
            controller.clock.steps = self._steps + since
