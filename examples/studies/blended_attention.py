"""An exact start at parity, for compare_healing.py: attention that is LLaMA's at t = 0 and V1's at t = 1.

A head's output is (A1 v) a1 + (A2 v) a2, elementwise over the 2d columns, with a1 = [1, t] and
a2 = [-lambda t, 1 - t - lambda t]: at t = 0 two LLaMA heads side by side, at t = 1 A1 v - lambda A2 v. With a neutral
norm the model is the LLaMA at first. t rises during healing while the norm's epsilon falls (conversion/healing).

B batch, T queries, H heads, D = 2d head_dim.
"""

import torch
from transformers import TrainerCallback

from modeling_diff.diff_attention_modules import DiffLlamaAttention


class BlendedAttention(DiffLlamaAttention):
    """V1's attention on the way from LLaMA's; `blend` is t."""

    blend = 0.0

    def combine(self, attn_output, attn_weights, hidden_states):
        diff_lambda = self.compute_lambda(hidden_states)
        t = self.blend
        first, second = attn_output.unflatten(2, (-1, 2)).unbind(3)  # (B, T, H, D) each
        (left1, right1), (left2, right2) = (output.chunk(2, dim=-1) for output in (first, second))
        left = left1 - t * diff_lambda * left2
        right = t * right1 + (1 - t - t * diff_lambda) * right2
        return self.normalize(torch.cat((left, right), dim=-1)), None


class Blend(TrainerCallback):
    """Moves t from 0 to 1 in the first `share` of the steps; a function of the step alone, so a run can be resumed."""

    def __init__(self, model, share):
        self.attentions = [layer.self_attn for layer in model.model.layers]
        self.share = share
        model.set_attn_implementation("sdpa")
        for attention in self.attentions:
            attention.__class__ = BlendedAttention

    def move(self, done):
        for attention in self.attentions:
            attention.blend = min(1.0, done / self.share)

    def on_train_begin(self, args, state, control, **kwargs):
        self.move(state.global_step / state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        self.move((state.global_step + 1) / state.max_steps)

    def on_train_end(self, args, state, control, **kwargs):
        for attention in self.attentions:
            attention.__class__ = DiffLlamaAttention
