"""Everything that TensorBoard shows, and a tab of its own.

The way of the data: `_callbacks_tensorboard.py` hands over rows, changes and
the probe's profile; `tables.py`, `pictures.py` and `layout.py` turn them into
what the stock tabs show, `events.py` into protocol buffers, `writer.py` into
an event file. `plugin.py` reads it back, by `series.py`, for the page in
`static/`. `tags.py` is what both sides agree on.

Nothing here imports TensorFlow or Keras. `plugin.py` and what it needs import
only tensorboard and the standard library: a plugin that fails to import stops
all of TensorBoard.
"""
