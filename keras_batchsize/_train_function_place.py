"""The place of the train function in a model, taken for one `fit`."""


class Place:
    """Puts a train function into a model, and the former one back.

    Args:
        model: A Keras model.

    Attributes:
        replaced: The train function that was there before; None if Keras had
            made none.
    """

    def __init__(self, model):
        self.replaced = None
        self._model = model
        self._history = None
        self._epoch_list = None

    def take(self, function):
        """Puts a function in place of the model's train function."""
        self.replaced = self._model.train_function
        self._history = self._model.history
        self._model.train_function = function

    def give_back(self, function):
        """Puts the former one back, unless somebody else has taken over."""
        if self._model.train_function is function:
            self._model.train_function = self.replaced

    def start_epoch(self):
        """Is told that an epoch of the `fit` it was taken for begins."""
        self._epoch_list = self._model.history.epoch

    @property
    def is_current(self):
        """Whether the `fit` it was taken for is the latest one."""
        history = self._model.history
        return history is self._history and (
            # A `History` given to `fit` may be used again; this list is not.
            self._epoch_list is None
            or self._epoch_list is history.epoch
        )
