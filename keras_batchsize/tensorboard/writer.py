"""An event file of our own, beside those that Keras writes.

It lies in a sub-folder: a second writer in Keras's `train/` would make
TensorBoard's Python loader lose points. It is opened with the first event, and
whatever the file system says, training goes on.
"""

import itertools
import os
import socket
import time
import warnings

from keras_batchsize.tensorboard import events
from keras_batchsize.tensorboard import tags

# Names of files must differ within a second, and TensorBoard reads them in
# the order of their names.
_FILES = itertools.count()


class RunWriter:
    """Writes events to a run of its own.

    The run is `<log_dir>/batch_size`, or, where another training has left its
    events, `batch_size_2` and so on. The names of the files end in `identity`:
    this tells a training that goes on from another one.

    Args:
        log_dir: Folder that TensorBoard is given.
        io: The module `tf.io`, for its file systems and its writer of records.
        identity: String, the same for a training that goes on.
        first_step: Integer, the first step that will be written. What the
            same training has written there and later is superseded.

    Attributes:
        folder: Folder of the run; None before the first event and where it
            could not be made.
    """

    def __init__(self, log_dir, io, identity, first_step=0):
        self.folder = None
        # Keras, too, takes the empty path for the present folder.
        self._log_dir = str(log_dir) or "."
        self._io = io
        self._identity = identity
        self._first_step = first_step
        self._records = None
        self._failed = False
        self._described = set()

    def scalars(self, step, values, wall_time):
        """Writes scalars as one event.

        Args:
            step: Integer, examples seen.
            values: Dict from tags to floats.
            wall_time: Float, seconds since 1970 when they held.
        """
        seen = self._described
        self.write(
            step,
            [
                events.scalar(tag, value, tag not in seen)
                for tag, value in values.items()
            ],
            wall_time,
        )
        seen.update(values)

    def write(self, step, values, wall_time=None):
        """Writes one event.

        Args:
            step: Integer, examples seen.
            values: List of `Summary.Value`.
            wall_time: Float, seconds since 1970; None for now.
        """
        if not self._failed:
            self._attempt(self._write, step, values, wall_time or time.time())

    def flush(self):
        """Makes what was written visible to readers."""
        if self._records is not None:
            self._attempt(self._records.flush)

    def close(self):
        """Ends the file; a later event would begin another."""
        if self._records is not None:
            self._attempt(self._records.close)
        self._records, self._described = None, set()

    def _attempt(self, action, *arguments):
        """Does it, or gives up for good, with one warning."""
        try:
            action(*arguments)
        except Exception as error:  # TensorFlow's are of no common kind.
            self._records, self._failed = None, True
            warnings.warn(
                "TensorBoard will not show all of this training: writing to "
                f"{self._log_dir!r} failed ({error}). Training goes on. "
                "Make room there, or give another folder.",
                RuntimeWarning,
                stacklevel=4,
            )

    def _write(self, step, values, wall_time):
        if self._records is None:
            self._open()
        self._put(events.event(step, wall_time, values))

    def _put(self, event):
        self._records.write(event.SerializeToString())

    def _open(self):
        self._io.gfile.makedirs(self._log_dir)
        self.folder = self._claim()
        now = time.time()
        name = (
            f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}."
            f"{os.getpid()}.{next(_FILES):06d}.{self._identity}"
        )
        path = os.path.join(self.folder, name)
        self._records = self._io.TFRecordWriter(path)
        self._put(events.file_version(now))
        self._put(events.restart(self._first_step, now))
        self._put(events.event(self._first_step, now, [events.charts()]))

    def _claim(self):
        """Returns the first run that is free or belongs to this training."""
        for number in itertools.count(1):
            name = tags.RUN if number == 1 else f"{tags.RUN}_{number}"
            folder = os.path.join(self._log_dir, name)
            if self._is_free(folder) or self._is_ours(folder):
                return folder

    def _is_free(self, folder):
        """Makes the folder; of two trainings that try, one succeeds."""
        if self._io.gfile.exists(folder):
            return False
        if "://" in folder:  # Remote stores know no folders to race for.
            self._io.gfile.makedirs(folder)
            return True
        try:
            # Not `gfile.mkdir`, which does not mind an existing folder.
            os.mkdir(folder)
        except FileExistsError:
            return False
        return True

    def _is_ours(self, folder):
        files = [
            name
            for name in self._io.gfile.listdir(folder)
            if "tfevents" in name
        ]
        return bool(files) and all(
            name.endswith(f".{self._identity}") for name in files
        )
