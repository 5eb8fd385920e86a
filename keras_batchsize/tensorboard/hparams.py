"""Settings and results of a training for the tab "HParams".

Written in our own run, so that trainings in one folder stay apart. TensorBoard
looks for results in that run only, not in those of Keras beside it.
"""

from tensorboard.compat.proto import summary_pb2
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams import plugin_data_pb2

# What is asked for first when trainings are compared: tag and title.
METRICS = {
    "progress/loss": "training loss",
    "progress/seconds": "seconds",
    "progress/updates": "updates",
    "batch_size/global": "final batch size",
    "throughput/examples_per_second": "examples/s",
}


def start(settings, began):
    """Returns what is written when a training begins.

    Args:
        settings: Dict of JSON values, the settings of the run.
        began: Float, seconds since 1970.

    Returns:
        List of `Summary.Value`.
    """
    experiment = api_pb2.Experiment(
        hparam_infos=[_setting(*item) for item in settings.items()],
        metric_infos=[
            api_pb2.MetricInfo(
                name=api_pb2.MetricName(tag=tag), display_name=title
            )
            for tag, title in METRICS.items()
        ],
    )
    session = plugin_data_pb2.SessionStartInfo(start_time_secs=began)
    for name, value in settings.items():
        if isinstance(value, str):
            session.hparams[name].string_value = value
        else:
            session.hparams[name].number_value = value
    return [
        _value(metadata.EXPERIMENT_TAG, experiment=experiment),
        _value(metadata.SESSION_START_INFO_TAG, session_start_info=session),
    ]


def end(ended):
    """Returns what is written when a training has ended.

    Args:
        ended: Float, seconds since 1970.

    Returns:
        List of `Summary.Value`.
    """
    session = plugin_data_pb2.SessionEndInfo(
        status=api_pb2.STATUS_SUCCESS, end_time_secs=ended
    )
    return [_value(metadata.SESSION_END_INFO_TAG, session_end_info=session)]


def _setting(name, value):
    is_text = isinstance(value, str)
    kind = api_pb2.DATA_TYPE_STRING if is_text else api_pb2.DATA_TYPE_FLOAT64
    title = name.replace("_", " ")
    return api_pb2.HParamInfo(name=name, display_name=title, type=kind)


def _value(tag, **content):
    content = plugin_data_pb2.HParamsPluginData(**content)
    return summary_pb2.Summary.Value(
        tag=tag,
        metadata=metadata.create_summary_metadata(content),
        tensor=metadata.NULL_TENSOR,
    )
