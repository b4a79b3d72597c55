"""The optimizer and the learning rate of each epoch."""

from __future__ import annotations

import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn

from runtime import processes
from training.options import Options

BETAS, EPS = (0.9, 0.999), 1e-8
"""Adam's constants, which are PyTorch's defaults and DeiT's."""


def build_optimizer(
    options: Options,
    model: nn.Module,
    device: torch.device,
    optimizer_class: type[torch.optim.Optimizer] | None = None,
) -> torch.optim.Optimizer:
    """AdamW, or the class that a remedy needs, with --lr scaled linearly from 512 images to the global batch.

    1-d parameters and those that `model.no_weight_decay()` names (tokens, position embeddings) have no weight decay.
    """
    training = options.training
    no_decay = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups = param_groups_weight_decay(model, training.weight_decay, no_weight_decay_list=no_decay)
    lr = training.lr * training.batch_size * processes.world_size() / 512
    common = {"lr": lr, "betas": BETAS, "eps": EPS}
    if optimizer_class is not None:
        return optimizer_class(groups, **common)
    return torch.optim.AdamW(groups, **common, fused=device.type == "cuda")


def build_scheduler(options: Options, optimizer: torch.optim.Optimizer) -> CosineLRScheduler:
    """One learning rate per epoch: a linear warm-up, then a cosine.

    DeiT's cosine is as long as the run, and the warm-up replaces its beginning; Swin's begins after the warm-up.
    """
    training = options.training
    return CosineLRScheduler(
        optimizer,
        training.epochs - training.warmup_epochs if training.warmup_prefix else training.epochs,
        training.min_lr,
        warmup_t=training.warmup_epochs,
        warmup_lr_init=training.warmup_lr,
        warmup_prefix=training.warmup_prefix,
    )
