"""Python that README shows runs as it stands, one block after the other, with folders of today for its paths."""

import re
from pathlib import Path

import pytest
from transformers import TrainingArguments


README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


# peft 0.21 asks for it.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_readme_snippets_run(converted, tmp_path):
    pytest.importorskip("peft")
    names = {
        "args": TrainingArguments(
            str(tmp_path), max_steps=1, per_device_train_batch_size=1, report_to=[], use_cpu=True, save_strategy="no"
        ),
        "rows": [{"input_ids": [1, 5, 9, 13], "labels": [1, 5, 9, 13]}] * 2,
    }
    assert len(BLOCKS) >= 2
    for block in BLOCKS:
        exec(re.sub(r'"out/[^"]*"', repr(str(converted["v2"])), block), names)
    names["trainer"].train()
    trained = [name for name, value in names["model"].named_parameters() if value.requires_grad]
    assert any("lambda_proj" in name for name in trained) and any("lora_" in name for name in trained)
