"""Every config field that transformers' LLaMA reads has its place in `config_fields`: a new one fails here."""

import ast
import inspect

import pytest
from llama_config_reads import RELATIVES, config_reads, fields_in_a_run, fields_in_code
from random_llamas import random_llama, saved
from transformers import GenerationConfig, LlamaConfig

from conversion.source.architectures import ARCHITECTURES
from conversion.source.config_fields import ATTENTION_FIELDS, NEUTRAL_VALUES, RESTATED_FIELDS
from modeling_diff.diff_llama_fields import LLAMA_FIELDS


PLACED = {*LLAMA_FIELDS, *RESTATED_FIELDS, *ATTENTION_FIELDS, *NEUTRAL_VALUES}
# Checked by code of their own in source_config and rotary.
PLACED |= {"layer_types", "quantization_config", "original_max_position_embeddings"}
PLACED |= {field for row in ARCHITECTURES.values() for field in row.own_fields}
# Settings of `generate`, which are read from config.json only where there is no generation_config.json.
PLACED |= set(GenerationConfig().to_dict())

WITHOUT_EFFECT = {
    "keywords of the caller, taken out before the file's fields": """
        cache_dir commit_message force_download gguf_file local_files_only proxies repo_id return_unused_kwargs
        revision subfolder token trust_remote_code _commit_hash _configuration_file _from_auto _from_pipeline""",
    "attributes of other objects than a model's config": """
        config config_class fget get_config_class init_kwargs _config max_seq_len_cached original_inv_freq
        original_max_seq_len register_buffer rope_type""",
    "of the class, or read before a file's fields are set": """
        __class__ __dict__ _auto_class sub_configs sub_configs_defaults has_no_defaults_at_init default_theta
        ignore_keys_at_rope_validation _post_init_done""",
    "where and how a model is computed or trained, not what": """
        base_model_tp_plan base_model_pp_plan base_model_ep_plan distributed_config _is_quantized
        experts_implementation _experts_implementation_internal _attn_was_changed gradient_checkpointing""",
    "initial values, which the weights replace": "init_std initializer_factor",
    "only of other models, of tokens predicted ahead, or in a warning": """
        encoder qk_head_dim vision_config vision_aspect_ratio vision_feature_layer vision_feature_select_strategy
        num_heads embed_dim first_k_dense_replace mlp_layer_types mtp_layer_types mtp_mlp_layer_types
        mtp_per_layer_config num_mtp_layers number_of_conv_states audio_vocab_size output_vocab_size is_decoder
        sep_token_id""",
}


def without_place(fields):
    """Those that are neither in a list nor a method or property of the config's class."""
    reasons = {field for names in WITHOUT_EFFECT.values() for field in names.split()}
    return sorted(field for field in set(fields) - PLACED - reasons if not _is_method(field))


def _is_method(name):
    found = inspect.getattr_static(LlamaConfig, name, None)
    return callable(found) or isinstance(found, classmethod | staticmethod | property)


@pytest.mark.transformers(since="5.16", reason="its code reads fields under other names")
def test_every_field_in_the_code_has_a_place():
    found = fields_in_code()
    unplaced = {field: found[field] for field in without_place(found)}
    assert not unplaced, "decide in config_fields.py whether it is kept or refused, or say above why it has no effect"


def test_every_field_asked_for_in_a_run_has_a_place(tmp_path):
    """Finds what syntax hides, such as names that are computed."""
    assert not without_place(fields_in_a_run(saved(random_llama(), tmp_path)))


def test_what_changes_the_function_is_found(tmp_path):
    """The derivation itself: fields that are known to be read, each in another way or module."""
    run = fields_in_a_run(saved(random_llama(), tmp_path))
    assert {"is_causal", "rms_norm_eps", "pad_token_id", "return_dict", "output_hidden_states", "use_cache"} <= run
    known = {"is_causal", "rms_norm_eps", "hidden_act", "return_dict", "sliding_window", "attention_chunk_size"}
    assert known | {"configuration_files", "transformers_weights", "fusion_config", "dtype"} <= fields_in_code().keys()


def test_a_new_read_is_found_however_it_is_written():
    code = """
self.config.first
getattr(config, "second", 1)
hasattr(layer_config, "third")
model.config.fourth
kwargs.pop("fifth", None)
"sixth" in config_dict
self.seventh
config.not_read = 1
"""
    expected = {"first", "second", "third", "fourth", "fifth", "sixth", "seventh"}
    found = set(config_reads(ast.parse(code), of_config_class=True)) - {"config", "pop"}
    assert found == expected and set(without_place(found)) == expected


@pytest.mark.parametrize("name", RELATIVES)
def test_fields_of_the_config_class_are_all_kept_or_settled(name):
    """A field that upstream adds to the class would be in no list, and the note would call it unread."""
    assert set(ARCHITECTURES[name].config_class().to_dict()) <= PLACED
