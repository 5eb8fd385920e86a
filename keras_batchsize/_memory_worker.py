"""The child process of `_memory_process.py`."""

import json
import math
import pathlib
import sys

import keras
import numpy as np
import tensorflow as tf

from keras_batchsize import exhaustion
from keras_batchsize import memory
from keras_batchsize._memory_examples import Examples
from keras_batchsize._memory_limits import Limits


def answer_to(folder):
    """Probes the model described in a folder.

    Args:
        folder: A `pathlib.Path` with `request.json` and `examples.npz`.

    Returns:
        Dict of JSON values, with "profile" or "error".
    """
    request = json.loads((folder / "request.json").read_text("utf-8"))
    intra, inter = request["threads"]
    tf.config.threading.set_intra_op_parallelism_threads(intra)
    tf.config.threading.set_inter_op_parallelism_threads(inter)
    keras.config.set_dtype_policy(request["global_policy"])
    try:
        model = keras.saving.deserialize_keras_object(request["model"])
        model.compile_from_config(request["compile"])
    except Exception as error:
        if not exhaustion.is_out_of_memory(error):
            raise
        limit = request["limits"]["memory_limit"]
        return {
            "error": (
                "No batch size fits: not even the weights do. Received: "
                f"memory_limit={limit}. Raise it, or use a smaller model."
            )
        }
    model.jit_compile = request["jit_compile"]
    examples = _examples(folder, request)
    try:
        profile = memory.probe(
            model,
            examples,
            Limits(**request["limits"]),
            request["accumulates"],
        )
    except ValueError as error:
        return {"error": str(error)}
    return {"profile": profile.to_dict()}


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
    count = math.inf if request["count"] is None else request["count"]
    batch = keras.utils.pack_x_y_sample_weight(*parts)
    return Examples(
        batch if isinstance(batch, tuple) else (batch,),
        count,
        request["data_bytes"],
    )


if __name__ == "__main__":
    place = pathlib.Path(sys.argv[1])
    text = json.dumps(answer_to(place))
    (place / "answer.json").write_text(text, encoding="utf-8")
