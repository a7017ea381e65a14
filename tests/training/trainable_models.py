"""Tiny models of both variants for training tests, with rows to train on; half of their layers may be LLaMA's."""

import torch
from transformers import TrainingArguments

from modeling_diff import DiffLlamaConfig, DiffLlamaForCausalLM


VOCAB_SIZE = 96


def tiny_model(variant, model_class=DiffLlamaForCausalLM, **overrides):
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    return model_class(DiffLlamaConfig(variant=variant, **(settings | overrides)))


def random_ids(batch_size=2, num_tokens=9, seed=0):
    return torch.randint(3, VOCAB_SIZE, (batch_size, num_tokens), generator=torch.Generator().manual_seed(seed))


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
