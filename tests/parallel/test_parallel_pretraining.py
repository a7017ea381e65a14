"""continue_pretraining.py under FSDP2 in two processes: losses of one process, sharded checkpoints, resume."""

import os
import subprocess
import sys

import pytest
import torch
from ranks_pretraining import EXAMPLES, LAMBDAS, LOSSES, MODELS, arguments_for
from transformers import AutoTokenizer

from conversion.hub.bundle import called_code
from modeling_diff import DiffLlamaForCausalLM
from modeling_diff.training.pretraining_data import PackedRows, text_files


# fp32 sums in another order, over four steps of Adam, which makes whole steps of the noise in vanishing gradients.
RELATIVE = 1e-4


@pytest.fixture(scope="module")
def ranks(run_ranks):
    return run_ranks("ranks_pretraining.py")


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def test_fsdp_shards_every_parameter_of_the_layers(ranks, name):
    for results in ranks[1]:
        assert results[name]["whole_parameters"] == []


def test_losses_equal_one_process(ranks, name, tmp_path):
    """Rows of both ranks in one batch, in a process that knows nothing of ranks."""
    folder, results, _ = ranks
    arguments = arguments_for(folder / f"{name}-with-tokenizer", folder / "texts", tmp_path / "one", 2)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    code = (
        f"import sys, torch; sys.path[:0] = [{str(EXAMPLES / 'scripts')!r}, {os.path.dirname(__file__)!r}]\n"
        "import continue_pretraining as example, ranks_pretraining as ranks\n"
        f"result = example.continue_pretraining(example.parse({arguments!r}))\n"
        f"torch.save(ranks.figures(result['log']), {str(tmp_path / 'one.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=200, capture_output=True)
    expected = torch.load(tmp_path / "one.pt")
    assert len(expected["loss"]) == 4 and len(expected["eval_loss"]) == 3
    for rank in results:
        for what in LOSSES:
            assert rank[name]["whole"][what] == pytest.approx(expected[what], rel=RELATIVE), what


@pytest.mark.accelerate(since="1.13", reason="it begins again with an empty optimizer under FSDP2")
def test_resumed_from_a_sharded_checkpoint_equals_uninterrupted(ranks, name):
    folder, results, _ = ranks
    assert list((folder / f"continued-{name}" / "checkpoint-2").glob("pytorch_model_fsdp_0/*.distcp"))
    for rank in results:
        for what in LOSSES:
            assert rank[name]["resumed"][what] == rank[name]["whole"][what]
        for what in LAMBDAS:  # before the checkpoint the log is the first rank's, and lambda is of a rank's own tokens
            assert rank[name]["resumed"][what][-2:] == rank[name]["whole"][what][-2:]
    models = [DiffLlamaForCausalLM.from_pretrained(folder / f"{kind}-{name}") for kind in ("continued", "resumed")]
    for parameter, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[parameter]), parameter


def test_consolidated_model_loads_whole_and_has_the_loss_that_was_logged(ranks, name):
    folder, results, _ = ranks
    saved = folder / f"continued-{name}"
    model, info = DiffLlamaForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.architectures == ["DiffLlamaForCausalLM"]
    assert sorted(path.name for path in saved.glob("*.py")) == called_code(saved)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    rows = PackedRows(text_files([f"{folder}/texts/eval/*.txt"]), tokenizer, max_length=16).first_pass(4)
    losses = []
    for pair in (rows[:2], rows[2:]):  # one of each rank: a loss is the mean over the tokens of both
        batch = {key: torch.tensor([row[key] for row in pair]) for key in pair[0]}
        with torch.no_grad():
            losses.append(model(**batch, use_cache=False).loss.item())
    logged = results[0][name]["whole"]["eval_loss"]
    assert sum(losses) / len(losses) == pytest.approx(logged[-1], rel=RELATIVE)
    assert logged[-1] != logged[0]
