"""A saved model with a tokenizer, used through pipelines, and by tools that would take another class for it."""

import json

import pytest
import transformers
from tiny_tokenizers import word_tokenizer
from transformers import pipeline

from modeling_diff import DiffLlamaForCausalLM, DiffLlamaForSequenceClassification


CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' ' }}{% endfor %}"
MESSAGES = [{"role": "user", "content": "w5 w6 w7"}]
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def tokenizer():
    """One word, one token: 96 of them, as many as the tiny models know."""
    words = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", *(f"w{index}" for index in range(90))]
    return word_tokenizer(
        words,
        "<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )


@pytest.fixture
def saved_model(tiny_model, variant, tokenizer, tmp_path):
    model = tiny_model(variant)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return model, tmp_path


def greedy_text(model, tokenizer, text):
    input_ids = tokenizer(text, return_tensors="pt").input_ids
    generated = model.generate(input_ids, **GREEDY)[0, input_ids.shape[1] :]
    return tokenizer.decode(generated, skip_special_tokens=True)


def test_text_generation_pipeline_continues_as_generate_does(saved_model, tokenizer):
    model, folder = saved_model
    generate = pipeline("text-generation", model=str(folder), device="cpu")
    assert type(generate.model) is DiffLlamaForCausalLM
    prompts = ["w1 w2 w3", "w4"]
    batch = generate(prompts, batch_size=2, return_full_text=False, **GREEDY)
    assert [outputs[0]["generated_text"].strip() for outputs in batch] == [
        greedy_text(model, tokenizer, prompt) for prompt in prompts
    ]


def test_chat_pipeline_answers_as_the_assistant(saved_model, tokenizer):
    model, folder = saved_model
    generate = pipeline("text-generation", model=str(folder), device="cpu")
    answer = generate([MESSAGES], **GREEDY)[0][0]["generated_text"][-1]
    assert answer["role"] == "assistant"
    assert answer["content"].strip() == greedy_text(model, tokenizer, "user w5 w6 w7")


def test_text_classification_pipeline_scores_every_label(tiny_model, variant, tokenizer, tmp_path):
    model = tiny_model(variant, model_class=DiffLlamaForSequenceClassification, num_labels=3)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    scores = pipeline("text-classification", model=str(tmp_path), top_k=None, device="cpu")("w1 w2 w3")[0]
    expected = model(tokenizer("w1 w2 w3", return_tensors="pt").input_ids).logits.softmax(-1)[0]
    for score in scores:
        index = model.config.label2id[score["label"]]
        # float32 probabilities.
        assert score["score"] == pytest.approx(expected[index].item(), abs=1e-5)


def test_a_tool_that_takes_transformers_class_by_its_name_stops_and_says_why(saved_model):
    """`transformers serve` does this, and a V1 checkpoint fits the shapes of transformers' own DiffLlama."""
    _, folder = saved_model
    assert json.loads((folder / "config.json").read_text())["architectures"] == [
        transformers.DiffLlamaForCausalLM.__name__
    ]
    with pytest.raises(Exception, match=r"not a checkpoint of transformers' own DiffLlama.*trust_remote_code"):
        transformers.DiffLlamaForCausalLM.from_pretrained(folder)
