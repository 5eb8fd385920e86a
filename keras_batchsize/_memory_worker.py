"""The child process of `_memory_process.py`."""

import importlib
import json
import math
import operator
import pathlib
import sys

import keras
import numpy as np
import tensorflow as tf

from keras_batchsize import _memory_process
from keras_batchsize import memory
from keras_batchsize import out_of_memory
from keras_batchsize._memory_examples import Examples
from keras_batchsize._memory_limits import Limits
from keras_batchsize._memory_limits import NothingFits


def set_up(request):
    """Sets what holds for the whole process, as in the parent.

    Args:
        request: Dict of JSON values.
    """
    intra, inter = request["threads"]
    tf.config.threading.set_intra_op_parallelism_threads(intra)
    tf.config.threading.set_inter_op_parallelism_threads(inter)
    keras.config.set_floatx(request["floatx"])
    keras.config.set_image_data_format(request["image_data_format"])
    keras.config.set_dtype_policy(request["global_policy"])


def answer_to(request, folder):
    """Probes the model described in a folder.

    Args:
        request: Dict of JSON values.
        folder: A `pathlib.Path` with `examples.npz`.

    Returns:
        Dict of JSON values, with "profile" or "error".
    """
    try:
        model = _built(request)
        examples = _examples(folder, request)
        profile = memory.probe(
            model,
            examples,
            Limits(**request["limits"]),
            request["accumulates"],
        )
    except _memory_process.ERRORS as error:
        return _memory_process.answer_of(error)
    return {"profile": profile.to_dict()}


def _built(request):
    """Returns the model of a request, compiled."""
    try:
        own = {
            name: operator.attrgetter(path)(importlib.import_module(module))
            for name, (module, path) in request["objects"].items()
        }
        with keras.saving.custom_object_scope(own):
            model = keras.saving.deserialize_keras_object(request["model"])
            model.compile_from_config(request["compile"])
        # Keras says of any that it is compiled.
        if getattr(model, "optimizer", None) is None:
            raise ValueError("compile_from_config() does not compile it")
    except Exception as error:
        if out_of_memory.is_out_of_memory(error):
            limit = request["limits"]["memory_limit"]
            raise NothingFits(
                "No batch size fits: not even the weights do. Received: "
                f"memory_limit={limit}. Raise it, or use a smaller model."
            ) from error
        # Of the type it is not: it was built once, under the same policy.
        raise _memory_process.not_built_again(error) from error
    model.jit_compile = request["jit_compile"]
    model.run_eagerly = request["run_eagerly"]
    return model


def _examples(folder, request):
    """Reads the `Examples` of a request."""
    with np.load(folder / "examples.npz") as arrays:
        parts = [
            keras.tree.map_structure(
                lambda key: tf.constant(arrays[key]), part
            )
            if part is not None
            else None
            for part in request["data"]
        ]
    count, fewer = (
        math.inf if request[name] is None else request[name]
        for name in ("count", "fewer")
    )
    batch = keras.utils.pack_x_y_sample_weight(*parts)
    examples = Examples(
        batch if isinstance(batch, tuple) else (batch,),
        count,
        request["data_bytes"],
        fewer,
    )
    examples.superbatch_bytes = request["superbatch_bytes"]
    return examples


if __name__ == "__main__":
    place = pathlib.Path(sys.argv[1])
    asked = json.loads((place / "request.json").read_text("utf-8"))
    set_up(asked)
    text = json.dumps(answer_to(asked, place))
    (place / "answer.json").write_text(text, encoding="utf-8")
