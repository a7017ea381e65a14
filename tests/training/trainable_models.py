"""Tiny models of both variants for training tests, with rows to train on; half of their layers may be LLaMA's."""

from functools import partial

import tiny_models
import torch
from tiny_models import random_ids
from transformers import TrainingArguments


tiny_model = partial(tiny_models.tiny_model, max_position_embeddings=64, pad_token_id=0)


def random_rows(num_rows=16, num_tokens=9):
    return [{"input_ids": row, "labels": row} for row in random_ids(num_rows, num_tokens)]


def train(model, steps=3, learning_rate=1e-2):
    """A few AdamW steps on two rows; the names of trainable parameters without a gradient at the last step."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trainable.values(), lr=learning_rate, weight_decay=0.0)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=random_ids(), labels=random_ids()).loss.backward()
        optimizer.step()
    model.eval()
    return [name for name, p in trainable.items() if p.grad is None or p.grad.abs().max() == 0]


def training_arguments(folder, **overrides):
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(**(settings | overrides))
