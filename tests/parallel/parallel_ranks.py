"""What the ranks of the parallel tests and their one-process references share. Not a test module."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import PreTrainedModel


TOKENS = torch.tensor([[1, 5, 9, 13, 2, 7], [1, 44, 3, 3, 21, 30]])  # (B, T): one row a rank in data parallelism
NUM_STEPS = 3
NUM_NEW_TOKENS = 6


def join_ranks(folder: Path) -> int:
    """This process's rank; the ranks meet through a file, so no port has to be free."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    return rank


def generate(model: PreTrainedModel, **kwargs) -> torch.Tensor:
    """Greedy continuations of both prompts, (B, T + NUM_NEW_TOKENS)."""
    return model.generate(TOKENS, max_new_tokens=NUM_NEW_TOKENS, do_sample=False, pad_token_id=0, **kwargs)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor or all shards of a distributed one, as a copy."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def gradients(model: PreTrainedModel, num_passes: int = 1) -> dict[str, torch.Tensor]:
    """Gradients by name after `num_passes` backward passes of the same loss."""
    model.zero_grad()
    for _ in range(num_passes):
        model(TOKENS, labels=TOKENS).loss.backward()
    return {name: whole(parameter.grad) for name, parameter in model.named_parameters()}


def build_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    # eps far above rounding noise: Adam would turn the noise of vanishing gradients into whole steps.
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)


def train(model: torch.nn.Module, tokens: torch.Tensor, optimizer: torch.optim.Optimizer) -> list[float]:
    """Losses before each of `NUM_STEPS` AdamW steps on the same tokens, averaged over the ranks if there are any."""
    losses = []
    for _ in range(NUM_STEPS):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        losses.append(mean.item())
    return losses


def pretend_to_be_accelerators() -> None:
    """accelerate keeps FSDP for accelerators and on a CPU quietly replicates the model: tell it there are some."""
    begin = PartialState.__init__

    def begin_with_accelerators(self, *arguments, **settings):
        begin(self, *arguments, **settings)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = begin_with_accelerators
