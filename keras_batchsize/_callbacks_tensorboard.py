"""`BatchSizeTensorBoard`: what the batch size does, for TensorBoard."""

import pathlib
import re

import keras

from keras_batchsize._callbacks_base import train_function_of
from keras_batchsize._callbacks_recorder import Recorder


class BatchSizeTensorBoard(keras.callbacks.Callback):
    """Writes batch size, noise scale, rate, speed and memory for TensorBoard.

    It writes to a run of its own, `<log_dir>/batch_size`, beside those of
    `keras.callbacks.TensorBoard`, with the number of examples seen as the
    step: the only axis on which batch sizes can be compared. Values go into
    the tabs of TensorBoard (also "Custom Scalars", "Text" and "Images") and
    into its tab "Batch size", which comes with this package.

    ```python
    board = keras.callbacks.TensorBoard("logs")
    model.fit(x, y, batch_size=2048, callbacks=[
        kb.DynamicBatchSize(), board, kb.BatchSizeTensorBoard(tensorboard=board)
    ])
    ```

    A training that is resumed goes on in its run; any other one in the same
    folder gets a run of its own, `batch_size_2` and so on. Under a
    distribution strategy the chief writes. Where writing fails, one warning
    says so and training goes on.

    Args:
        log_dir: Folder that TensorBoard is given.
        tensorboard: The `keras.callbacks.TensorBoard` whose folder to use,
            instead of `log_dir`. KerasTuner gives it a folder for each trial.
        hparams: Whether to write the settings for the tab "HParams". Not
            where KerasTuner writes them.

    Raises:
        TypeError: If an argument is of another kind than stated.
        ValueError: If not exactly one of `log_dir` and `tensorboard` is given.
    """

    def __init__(self, log_dir=None, tensorboard=None, hparams=False):
        super().__init__()
        if (log_dir is None) == (tensorboard is None):
            raise ValueError(
                "Exactly one of `log_dir` and `tensorboard` must be given: "
                "it says where to write. Received: "
                f"log_dir={log_dir!r}, tensorboard={tensorboard!r}. Use "
                'kb.BatchSizeTensorBoard("logs").'
            )
        if log_dir is not None and not isinstance(log_dir, (str, pathlib.Path)):
            raise TypeError(
                "`log_dir` must be the path of a folder: TensorBoard reads "
                f"it from there. Received: log_dir={log_dir!r}. Use "
                'log_dir="logs", or tensorboard= for a callback.'
            )
        if tensorboard is not None and not isinstance(
            tensorboard, keras.callbacks.TensorBoard
        ):
            raise TypeError(
                "`tensorboard` must be the `keras.callbacks.TensorBoard` in "
                "use: its folder is written to. Received: "
                f"tensorboard={tensorboard!r}. Use log_dir= for a folder."
            )
        self.log_dir = log_dir
        self.tensorboard = tensorboard
        self.hparams = hparams
        self._given_log_dir = log_dir
        if log_dir is None:
            self._given_log_dir = tensorboard.log_dir
        self._recorder = None
        self._last = None

    def on_train_begin(self, logs=None):
        """Forgets an earlier training."""
        self.close()

    def on_train_batch_begin(self, batch, logs=None):
        """Attaches itself, once the train function is in place."""
        if self._recorder is None and _is_chief(self.model):
            self._recorder = self._attach()

    def on_epoch_end(self, epoch, logs=None):
        """Makes the epoch visible."""
        if self._recorder is not None:
            self._recorder.end_epoch()

    def on_train_end(self, logs=None):
        """Ends the file of a training that was not broken off."""
        self._end(finished=True)

    def close(self):
        """Ends the file, also after an error. May be called again."""
        self._end(finished=False)

    def _end(self, finished):
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            recorder.close(finished)
            self._last = recorder.end

    def __getstate__(self):
        """Leaves the open file out: a copy begins a run of its own."""
        return {**vars(self), "_recorder": None, "_last": None}

    def _attach(self):
        function = train_function_of(self.model)
        if function is None:
            raise ValueError(
                "`BatchSizeTensorBoard` needs a fit whose batch size is "
                "decided: it shows what was. Received: a fit without. Add "
                "kb.DynamicBatchSize() to `callbacks`, or use "
                "kb.AdaptiveTrainer(model, tensorboard=...)."
            )
        folder = self.log_dir
        if folder is None:
            # Only now: KerasTuner sets it for each trial.
            folder = self.tensorboard.log_dir
        recorder = Recorder(
            function,
            folder,
            self.params.get("steps"),
            self._last,
            self.hparams and not self._is_of_a_tuner(folder),
        )
        function.on_superbatch.append(recorder.add_row)
        function.on_decision.append(recorder.add_change)
        return recorder

    def _is_of_a_tuner(self, folder):
        """Whether KerasTuner has set the folder: then it writes hparams."""
        return folder != self._given_log_dir and bool(
            re.search(r"[/\\]execution\d+$", str(folder))
        )


def _is_chief(model):
    """Whether this process writes: one of several workers does."""
    return model.distribute_strategy.extended.should_save_summary
