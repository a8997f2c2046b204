"""What `model.freeze_depth` means, once, for every architecture.

Depth 0 trains all. Depth d >= 1 freezes stage 0 (stem or embeddings) and the first d blocks.
"""

from collections.abc import Sequence

from torch import nn

from fer_dist.errors import UserError


def freeze_stages(model: nn.Module, stages: Sequence[Sequence[str]], depth: int) -> None:
    """Switch off the gradients of `stages[0..depth]`; depth 0 touches nothing.

    Nothing is ever switched on: what an architecture keeps fixed by design (the sine position
    embeddings of ViTMAE) stays fixed, and a smaller depth does not undo a larger one.

    Args:
        model: owner of the parameters.
        stages: names of parameters as in `model.named_parameters()`; 0 is the stem, i is block i.
        depth: number of blocks to freeze together with the stem.

    Raises:
        UserError: there are fewer blocks than `depth`.
    """
    blocks = len(stages) - 1
    if depth > blocks:
        raise UserError(
            f"model.freeze_depth is {depth}, but this network has {blocks} blocks",
            f"--model.freeze_depth 0..{blocks}",
        )
    if depth == 0:
        return
    parameters = dict(model.named_parameters())
    for stage in stages[: depth + 1]:
        for name in stage:
            parameters[name].requires_grad_(False)


def hold_frozen_norms(model: nn.Module) -> None:
    """Put every module that keeps running statistics and whose parameters are frozen into evaluation mode.

    A frozen batch-norm that still updated its mean and variance would drift away from the
    weights that were frozen with it. Looked up anew each time, because SyncBatchNorm replaces modules.
    """
    for module in model.modules():
        if getattr(module, "running_mean", None) is None:
            continue
        own = list(module.parameters(recurse=False))
        if own and not any(parameter.requires_grad for parameter in own):
            module.eval()
