"""KerasTuner: batch size, learning rate and policy searched together.

```python
from keras_batchsize import tuner as kbt
```

Not part of `import keras_batchsize`, which does without KerasTuner.
"""

try:
    import keras_tuner  # noqa: F401
except ImportError as error:
    raise ImportError(
        "`keras_batchsize.tuner` needs KerasTuner: it searches through that. "
        "Received: no module named `keras_tuner`. Install it with: "
        'pip install "keras-tuner>=1.4.8"'
    ) from error

from keras_batchsize._tuner_hypermodel import AdaptiveHyperModel
from keras_batchsize._tuner_space import BatchSizeSpace
from keras_batchsize._tuner_space import hp_batch_size
from keras_batchsize._tuner_space import hp_learning_rate
from keras_batchsize._tuner_target import Target

__all__ = [
    "AdaptiveHyperModel",
    "BatchSizeSpace",
    "Target",
    "hp_batch_size",
    "hp_learning_rate",
]
