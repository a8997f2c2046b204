"""One optimizer step: gradients of this rank's share, one message between the ranks, one decision."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fer_dist.config import Config
from fer_dist.data.feed import Batch
from fer_dist.engine.state import TrainState
from fer_dist.world import World

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Told(NamedTuple):
    """What the ranks told each other in a step; the same on every rank, but for `mine`.

    Attributes:
        loss: mean loss of the global batch [nats].
        fine: loss, gradients and running statistics are finite on every rank; else the step was skipped.
        overflow: it was skipped because float16's loss scale was too high, which lowers it.
        stop: a rank was asked to stop.
        mine: the mean loss of this rank's own share [nats].
    """

    loss: float
    fine: bool
    overflow: bool
    stop: bool
    mine: float


def train_step(
    config: Config, state: TrainState, batch: Batch, world: World, asked: Callable[[], bool] = lambda: False
) -> Told:
    """One optimizer step on this rank's share of the global batch.

    All that the ranks must agree on travels in one message, behind the gradients and before the
    weights move: batch-norm statistics, loss, norm of the gradient, and whether to stop. Where
    anything in it is not finite, no rank moves anything.

    Args:
        asked: whether this rank was asked to stop; looked at as late as can be.
    """
    torch.manual_seed(((config.seed * 1_000_003 + state.step) * 65_537 + world.rank) % 2**63)  # for dropout
    before = [x.clone() for x in state.running_stats]
    mine = backward(config, state, batch, world)
    state.scaler.unscale_(state.optimizer)
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    told = torch.stack([mine, norm.double(), torch.tensor(float(asked()), dtype=torch.float64, device=mine.device)])
    if state.running_stats:
        told = told.to(state.running_stats[0].dtype)
    world.mean_([*state.running_stats, told])
    spread = get_total_norm(state.running_stats) if state.running_stats else torch.zeros_like(norm)
    loss, norm_, stops, spread_, mine_ = torch.cat([told.double(), torch.stack([spread.double(), mine])]).tolist()
    fine = math.isfinite(loss + norm_ + spread_)
    overflow = not fine and math.isfinite(loss) and state.scaler.is_enabled() and state.scaler.get_scale() > 1
    if fine:
        if config.optim.clip_norm:
            clip_grads_with_norm_(parameters, config.optim.clip_norm, norm)
        state.scaler.step(state.optimizer)
        if state.ema:
            state.ema.update(state.step)
    else:
        for x, old in zip(state.running_stats, before, strict=True):
            x.copy_(old)
    state.scaler.update()
    state.optimizer.zero_grad()
    _account(state, loss, fine=fine, overflow=overflow)
    return Told(loss=loss, fine=fine, overflow=overflow, stop=stops > 0, mine=mine_)


def _account(state: TrainState, loss: float, *, fine: bool, overflow: bool) -> None:
    """Count a step, whether it moved the weights or not."""
    state.step += 1
    state.epoch_losses.append(loss if fine else None)
    if fine:
        state.losses.append(loss)
    state.overflows += overflow
    spoilt = not fine and not overflow
    state.skipped += spoilt
    # An overflow says nothing about the data or the rate: it neither adds to the row nor ends it.
    state.skipped_in_row = state.skipped_in_row + 1 if spoilt else state.skipped_in_row * overflow


def backward(config: Config, state: TrainState, batch: Batch, world: World) -> Tensor:
    """The gradients of a batch, averaged over the ranks; returns this rank's mean loss (float64, detached).

    The loss is a sum over pictures divided by the rank's share, and DDP averages over ranks: the
    gradient is that of the mean over the global batch, however it is cut into ranks and micro-batches.
    """
    half = HALF.get(config.train.precision)
    total = torch.zeros((), device=world.device, dtype=torch.float64)
    pieces = batch.split(config.train.micro_batch or len(batch))
    for piece in pieces:
        with world.sync(state.wrapped, last=piece is pieces[-1]):
            with torch.autocast(world.device.type, dtype=half) if half else nullcontext():
                logits_NK = state.wrapped(piece.images_N1SS)
            log_p_NK = (logits_NK.float() if half else logits_NK).log_softmax(1)
            loss = -(piece.targets_NK.to(log_p_NK.dtype) * log_p_NK).sum() / len(batch)
            state.scaler.scale(loss).backward()
        total += loss.detach()
    return total


def settle(config: Config, state: TrainState, batch: Batch, world: World) -> None:
    """A backward pass whose gradients are thrown away, at every start before any state is loaded.

    DDP groups the gradients anew by the order of the first backward pass, and with three ranks or
    more another grouping adds the same numbers in another order: a resumed run would differ from
    the unbroken one in its last bits. After this, both have the same groups from their first step on.
    """
    if world.size == 1:
        return
    before = [x.clone() for x in state.model.buffers()]
    state.wrapped.train()
    backward(config, state, batch, world)
    state.optimizer.zero_grad()
    for x, old in zip(state.model.buffers(), before, strict=True):
        x.copy_(old)
