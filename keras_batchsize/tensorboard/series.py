"""What the page shows, read back through TensorBoard's data provider.

Scalars are ordinary ones, so every other tab shows them, too; only settings
and changes are tensors of our own. All that is read here may come from another
version or be half written: what cannot be understood is left out.
"""

import bisect
import json
import math
import posixpath

from tensorboard.data import provider

from keras_batchsize.tensorboard import tags

_SCALARS = "scalars"  # Name of TensorBoard's plugin that shows scalars.
_ANCHOR = "batch_size/global"
_LOSSES = {"train": "loss", "validation": "validation_loss"}
_LOSS_TAG = "epoch_loss"


class Reader:
    """Reads one experiment.

    Args:
        data_provider: TensorBoard's `DataProvider`.
        context: Its `RequestContext`.
        experiment_id: String.
        downsample: Integer, points per series at most.
    """

    def __init__(self, data_provider, context, experiment_id, downsample):
        self._provider = data_provider
        self._context = context
        self._experiment = experiment_id
        self._downsample = downsample

    def runs(self):
        """Returns a list of dicts, one per run of ours, ordered by name.

        Each has `run`, its name; `version`, which differs when there is
        something new; `updated`, seconds since 1970; `info`, as written.
        """
        ours = self._ours()
        last = self._list_scalars([_ANCHOR])
        infos = self._tensors([run for run in ours], [tags.INFO], 10)
        result = []
        for run in sorted(ours):
            found = list(ours[run].values())
            found += last.get(run, {}).values()
            # None where a resumed training has made the reader forget all.
            times = [one.max_wall_time or 0.0 for one in found]
            result.append(
                {
                    "run": run,
                    "version": repr(max(times)),
                    "updated": max(times),
                    "info": _latest(infos.get(run, {}).get(tags.INFO)),
                }
            )
        return result

    def run(self, name):
        """Returns all that is known of a run as a dict, None if not ours.

        `steps` are examples seen, increasing; `times` seconds since 1970;
        each of `series` is a list of the same length with None where there is
        no number. `changes` are ordered; `loss` and `validation_loss` are
        pairs of steps and values, where Keras has logged them.
        """
        if name not in self._ours():
            return None
        read = self._scalars([name], list(tags.SCALARS)).get(name, {})
        anchor = read.get(_ANCHOR, [])
        steps = [datum.step for datum in anchor]
        tensors = self._tensors([name], None, 10).get(name, {})
        return {
            "run": name,
            "steps": steps,
            "times": [datum.wall_time for datum in anchor],
            "series": {
                tag: _aligned(steps, data) for tag, data in read.items()
            },
            "changes": _changes(tensors),
            **self._losses(name, anchor, tensors.get(tags.INFO, [])),
        }

    def _losses(self, name, anchor, infos):
        """Returns the losses that Keras wrote in the sibling runs.

        Keras counts epochs, or batches; what they share with us is the time.
        An epoch's loss is written after its last superbatch and before the
        first of the next: at the latest of our points by then.
        """
        folder = posixpath.dirname(name)
        runs = {
            posixpath.join(folder, sibling): key
            for sibling, key in _LOSSES.items()
        }
        read = self._scalars(list(runs), [_LOSS_TAG])
        times = [datum.wall_time for datum in anchor]
        end = self._end(name, infos)
        result = {}
        for run, key in runs.items():
            points = {}
            for datum in read.get(run, {}).get(_LOSS_TAG, []):
                index = bisect.bisect_right(times, datum.wall_time) - 1
                if index >= 0 and datum.wall_time <= end:
                    points[anchor[index].step] = _number(datum.value)
            if points:
                result[key] = [list(points), list(points.values())]
        return result

    def _end(self, name, infos):
        """Returns when another training may have begun in the same folder.

        One that was killed did not say that it has ended. Then the next one
        there tells.
        """
        if _is_closed(infos):
            return infos[-1].wall_time
        folder = posixpath.dirname(name)
        siblings = [
            run
            for run in self._ours()
            if run != name and posixpath.dirname(run) == folder
        ]
        if not siblings:
            return math.inf
        began = max((time for time, _ in _beginnings(infos)), default=0.0)
        later = [
            time
            for tensors in self._tensors(siblings, [tags.INFO], 10).values()
            for time, _ in _beginnings(tensors.get(tags.INFO, []))
            if time > began
        ]
        return min(later, default=math.inf)

    def _ours(self):
        return self._provider.list_tensors(
            self._context,
            experiment_id=self._experiment,
            plugin_name=tags.PLUGIN,
        )

    def _list_scalars(self, names):
        return self._provider.list_scalars(
            self._context,
            experiment_id=self._experiment,
            plugin_name=_SCALARS,
            run_tag_filter=provider.RunTagFilter(tags=names),
        )

    def _scalars(self, runs, names):
        return self._provider.read_scalars(
            self._context,
            experiment_id=self._experiment,
            plugin_name=_SCALARS,
            downsample=self._downsample,
            run_tag_filter=provider.RunTagFilter(runs=runs, tags=names),
        )

    def _tensors(self, runs, names, count):
        return self._provider.read_tensors(
            self._context,
            experiment_id=self._experiment,
            plugin_name=tags.PLUGIN,
            downsample=count,
            run_tag_filter=provider.RunTagFilter(runs=runs, tags=names),
        )


def dumps(value):
    """Returns compact JSON."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _number(value):
    """Returns a float in the digits that float32 has; None if not finite."""
    return float(f"{value:.7g}") if math.isfinite(value) else None


def _aligned(steps, data):
    """Returns the values at the steps, None where there is none."""
    values = {datum.step: _number(datum.value) for datum in data}
    return [values.get(step) for step in steps]


def _parsed(datum):
    """Returns the dict in a tensor of ours, empty if it is none."""
    try:
        value = json.loads(datum.numpy.item())
    except (TypeError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _latest(data):
    return _parsed(data[-1]) if data else {}


def _is_closed(infos):
    return _latest(infos).get("closed") is True


def _beginnings(data):
    """Returns when a training began, or went on, and at which step."""
    return {
        (info["began"], info["first_step"])
        for info in map(_parsed, data)
        if _are_numbers(info.get("began"), info.get("first_step"))
    }


def _are_numbers(*values):
    return all(isinstance(value, (int, float)) for value in values)


def _changes(tensors):
    """Returns the changes in the order of training.

    A training that was interrupted and resumed repeats a part. TensorBoard
    forgets what was there only where the same tag is written again; a change
    that did not happen again is known by being older than the resumption.
    """
    began = _beginnings(tensors.get(tags.INFO, []))
    prefix = tags.CHANGE.format("")
    changes = []
    for tag, data in tensors.items():
        change = _latest(data) if tag.startswith(prefix) else {}
        at = change.get("examples")
        if not isinstance(at, int):
            continue
        is_stale = any(
            data[-1].wall_time < time and at >= first_step
            for time, first_step in began
        )
        if not is_stale:
            changes.append(change)
    return sorted(changes, key=lambda change: change["examples"])
