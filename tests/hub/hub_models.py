"""What the tests of the Hub roads and the processes they start share. Not a test module; imports nothing of ours."""

import torch
from transformers import PreTrainedModel


HEADS = {
    "AutoModel": "DiffLlamaModel",
    "AutoModelForCausalLM": "DiffLlamaForCausalLM",
    "AutoModelForSequenceClassification": "DiffLlamaForSequenceClassification",
    "AutoModelForTokenClassification": "DiffLlamaForTokenClassification",
    "AutoModelForQuestionAnswering": "DiffLlamaForQuestionAnswering",
}
VARIANTS = ("v1", "v2")
TOKENS = torch.tensor([[1, 5, 9, 13, 2], [1, 3, 3, 21, 30]])  # (B, T)
PROMPT = "w5 w9 w13"
LICENSE_TEXT = "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\nterms\n"


@torch.no_grad()
def head_output(model: PreTrainedModel) -> torch.Tensor:
    """The first tensor that a head is asked for: logits, start logits or hidden states."""
    return model.eval()(TOKENS, use_cache=False)[0]


def greedy_tokens(model: PreTrainedModel) -> torch.Tensor:
    return model.generate(TOKENS, max_new_tokens=6, do_sample=False, pad_token_id=0)
