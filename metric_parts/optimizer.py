"""AdamW and its learning rate: which weights decay, and the shape of the rate over the optimizer steps."""

from __future__ import annotations

from typing import Any

import torch

from metric_parts.model import JointModel
from metric_parts.settings import TrainerSettings


def make_optimizer(model: JointModel, *, settings: TrainerSettings) -> torch.optim.Optimizer:
    """AdamW; biases and norms do not decay, the head may have a learning rate of its own."""
    options = settings.optimizer
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.trained.named_parameters():
        groups.setdefault((name.startswith("head."), parameter.ndim > 1), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": (options.head_learning_rate or options.learning_rate) if in_head else options.learning_rate,
                "weight_decay": options.weight_decay if decays else 0.0,
            }
            for (in_head, decays), parameters in groups.items()
        ],
        lr=options.learning_rate,
        fused=True,
    )


def make_schedule(optimizer: torch.optim.Optimizer, *, settings: TrainerSettings, n_steps: int) -> Any:
    """transformers' schedule over `n_steps` optimizer steps, or over `scheduler.num_training_steps`."""
    from transformers import get_scheduler

    options = settings.scheduler
    total = options.num_training_steps or n_steps
    is_share = options.warmup_steps < 1
    warmup = round(options.warmup_steps * total) if is_share else int(options.warmup_steps)
    specific = {}
    if options.num_cycles is not None and options.name.startswith("cosine"):
        restarts = options.name == "cosine_with_restarts"
        specific["num_cycles"] = int(options.num_cycles) if restarts else options.num_cycles
    constant = options.name == "constant"
    return get_scheduler(
        options.name,
        optimizer,
        num_warmup_steps=None if constant else warmup,
        num_training_steps=None if constant else total,
        scheduler_specific_kwargs=specific or None,
    )
