"""Values as TensorBoard's protocol buffers.

Built by hand from the messages that tensorboard ships: `tf.summary` costs 50
times as much per value, is silenced by the `record_if` of Keras's callback, and
its ambient writer would collect what Keras writes.
"""

import json

from tensorboard.compat.proto import event_pb2
from tensorboard.compat.proto import summary_pb2
from tensorboard.compat.proto import tensor_pb2
from tensorboard.compat.proto import tensor_shape_pb2
from tensorboard.compat.proto import types_pb2
from tensorboard.plugins.custom_scalar import metadata as layout_metadata
from tensorboard.plugins.image import metadata as image_metadata
from tensorboard.plugins.text import metadata as text_metadata

from keras_batchsize.tensorboard import layout
from keras_batchsize.tensorboard import tags


def event(step, wall_time, values):
    """Returns one event.

    Args:
        step: Integer, examples seen.
        wall_time: Float, seconds since 1970.
        values: List of `Summary.Value`.
    """
    return event_pb2.Event(
        step=step,
        wall_time=wall_time,
        summary=summary_pb2.Summary(value=values),
    )


def file_version(wall_time):
    """Returns the event that an event file begins with."""
    return event_pb2.Event(wall_time=wall_time, file_version="brain.Event:2")


def restart(step, wall_time):
    """Returns the event that makes a reader forget what was at later steps.

    A training resumed from its last epoch repeats what came after it; without
    this the curves would run back and forth.

    Args:
        step: Integer, the first step to forget.
        wall_time: Float, seconds since 1970.
    """
    return event_pb2.Event(
        step=step,
        wall_time=wall_time,
        session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START),
    )


def scalar(tag, value, is_first=False):
    """Returns a scalar; the first one of a tag carries its description."""
    if not is_first:
        return summary_pb2.Summary.Value(tag=tag, simple_value=value)
    return summary_pb2.Summary.Value(
        tag=tag,
        simple_value=value,
        metadata=summary_pb2.SummaryMetadata(
            summary_description=tags.SCALARS.get(tag, "")
        ),
    )


def text(tag, markdown):
    """Returns a text in Markdown."""
    return _strings(
        tag, [markdown.encode()], text_metadata.create_summary_metadata("", "")
    )


def image(tag, png, width, height):
    """Returns a picture.

    Args:
        tag: String.
        png: Bytes of a PNG file.
        width: Pixels.
        height: Pixels.
    """
    parts = [str(width).encode(), str(height).encode(), png]
    metadata = image_metadata.create_summary_metadata("", "")
    return _strings(tag, parts, metadata)


def data(tag, value):
    """Returns JSON that only our own page reads."""
    metadata = summary_pb2.SummaryMetadata(
        data_class=summary_pb2.DATA_CLASS_TENSOR,
        plugin_data=summary_pb2.SummaryMetadata.PluginData(
            plugin_name=tags.PLUGIN
        ),
    )
    return _strings(tag, [json.dumps(value).encode()], metadata)


def charts():
    """Returns the layout of the tab "Custom Scalars"."""
    metadata = layout_metadata.create_summary_metadata()
    metadata.data_class = summary_pb2.DATA_CLASS_TENSOR
    return _strings(
        layout_metadata.CONFIG_SUMMARY_TAG,
        [layout.make().SerializeToString()],
        metadata,
        is_scalar=True,
    )


def _strings(tag, strings, metadata, is_scalar=False):
    """Returns a tensor of strings: a vector, or a scalar of the only one."""
    shape = tensor_shape_pb2.TensorShapeProto()
    if not is_scalar:
        shape.dim.add(size=len(strings))
    tensor = tensor_pb2.TensorProto(
        dtype=types_pb2.DT_STRING, string_val=strings, tensor_shape=shape
    )
    return summary_pb2.Summary.Value(tag=tag, metadata=metadata, tensor=tensor)
