"""Whether a model can be trained as planned. Part of `train_function.py`."""

from keras_batchsize import exactness
from keras_batchsize import policies
from keras_batchsize import requirements
from keras_batchsize import scaling
from keras_batchsize import slicing


def checked_graphs(team, model, controller, data, cuts=False):
    """Returns the graphs of a model, after the first check of its loss.

    Args:
        team: A `OneDevice` or a `Team`.
        model: The Keras model.
        controller: The `Controller` that decides.
        data: A superbatch.
        cuts: Whether batches are to be cut whatever the controller says.

    Raises:
        ValueError: If batches are to be cut, or to grow, and the model cannot
            take that.
    """
    sizes = _sizes_under(controller)
    accumulates = max(sizes) > controller.superbatch_size
    # The size may grow to what memory does not hold at once.
    cuts = cuts or max(sizes) > controller.speed.largest
    cuts = cuts or controller.plan.accumulation_steps > 1
    splits = controller.measures or accumulates or cuts
    causes = _causes(controller, team.replicated, accumulates, cuts)
    if causes:
        exactness.check_step(model, *_in_words(causes))
        requirements.check_parts(model)
    else:
        # A loss that can be cut into parts is no sum.
        reference_batch_size = _reference_batch_size(controller)
        requirements.check_growth(model, sizes, reference_batch_size)
        if controller.rule is not scaling.none:
            requirements.check_optimizers(model, sizes, reference_batch_size)
    requirements.check_sizes(model, sizes)
    team.warn_of_unequal_shares(controller.ladder.base)
    sample = team.sample(data)
    try:
        graphs = team.make_graphs(
            model, controller.clock.batch_size, splits, _size_varies(controller)
        )
        first = min(slicing.number_of_examples(sample), 1)
        graphs.build(slicing.examples(sample, 0, first))
        if causes:
            exactness.check_loss(model, graphs.normaliser, sample)
    except exactness.CannotBeCut as error:
        _, edits = _in_words(causes)
        raise ValueError(f"{error} Or {edits}: no batch is cut then.") from None
    if team.replicated:
        exactness.check_division(model, sample)
    controller.speed.know_communication(team.communication(model))
    return graphs


def _sizes_under(controller):
    """Returns the sizes that updates may have, the last of data apart."""
    policy, ladder = controller.policy, controller.ladder
    if isinstance(policy, policies.Fixed):
        return [ladder.nearest(policy.batch_size or ladder.base)]
    return ladder.sizes


def _size_varies(controller):
    """Whether the size of updates may change, the last of data apart."""
    if isinstance(controller.policy, policies.Measure):
        return False
    return len(_sizes_under(controller)) > 1


def _reference_batch_size(controller):
    """Returns the size at which the rate is as the user stated it."""
    if controller.rule is scaling.none:
        return controller.ladder.base
    return controller.clock.batch_size


def _causes(controller, replicated, accumulates, cuts):
    """Returns why batches are cut, a list of what asks for it and an edit."""
    if replicated:
        return [("a strategy", "train without a strategy")]
    policy, rule, found = controller.policy, controller.rule, []
    every, most = controller.measuring.every, controller.superbatch_size
    if controller.measures and policy.needs_noise:
        edit = 'use policy="plateau", "fixed" or a `BatchSizeSchedule`'
        found.append((f"policy={policy!r}", edit))
    if controller.measures and rule not in scaling.NEED_NO_NOISE:
        edit = 'scale the rate by "linear", "sqrt" or "none"'
        found.append((f"the rate scaled by {scaling.name_of(rule)}", edit))
    if controller.measures and not found:
        edit = 'leave measure_every="auto"'
        found.append((f"measure_every={every}", edit))
    if accumulates:
        edit = f"use max_batch_size={most}, the superbatch"
        found.append((f"max_batch_size={controller.ladder.maximum}", edit))
    elif cuts:
        size = controller.largest_micro_batch_size
        is_base = controller.ladder.base > size
        edit = f"use {'batch_size' if is_base else 'max_batch_size'}={size}"
        found.append((f"memory for {size} examples", edit))
    return found


def _in_words(causes):
    """Returns all that asks for cutting, and all edits, as two strings."""
    return tuple(" and ".join(parts) for parts in zip(*causes))
