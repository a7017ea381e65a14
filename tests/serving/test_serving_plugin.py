"""The vLLM plugin without vLLM: it is found, costs nothing, and refuses by name (.ci/serving runs vLLM itself)."""

import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from modeling_diff import DiffLlamaConfig
from modeling_diff.serving import register
from modeling_diff.serving.versions import TESTED_VLLM, unsupported_vllm, untested_vllm


# Names that vllm_registration.py imports from vLLM 0.32.
CONFIG_MODULE = "vllm.model_executor.models.config"
REGISTRY_MODULE = "vllm.model_executor.models.registry"
CONVERTOR_MODULE = "vllm.transformers_utils.model_arch_config_convertor"


class Registry:
    """As vLLM's ModelRegistry keeps classes by the name under "architectures"."""

    def __init__(self):
        self.models = {}

    def get_supported_archs(self):
        return self.models.keys()

    def register_model(self, architecture, model):
        self.models[architecture] = model


@pytest.fixture
def imitated_vllm(monkeypatch):
    """Sets up modules with the names that the plugin takes from vLLM, of any version."""

    def set_up(version=TESTED_VLLM):
        said = []
        registry = Registry()
        names = {
            "vllm": {"__version__": version},
            "vllm.logger": {"init_logger": lambda name: SimpleNamespace(warning_once=said.append)},
            CONFIG_MODULE: {"MODELS_CONFIG_MAP": {}, "VerifyAndUpdateConfig": object},
            REGISTRY_MODULE: {"ModelRegistry": registry},
            CONVERTOR_MODULE: {
                "MODEL_ARCH_CONFIG_CONVERTORS": {},
                "ModelArchConfigConvertorBase": type("ModelArchConfigConvertorBase", (), {}),
            },
        }
        for name in ("vllm.model_executor", "vllm.model_executor.models", "vllm.transformers_utils"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        for name, attributes in names.items():
            module = ModuleType(name)
            vars(module).update(attributes)
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.delitem(sys.modules, "modeling_diff.serving.vllm_registration", raising=False)
        return SimpleNamespace(said=said, models=registry.models, modules=sys.modules)

    yield set_up
    sys.modules.pop("modeling_diff.serving.vllm_registration", None)


def vllm_config(config, ranks=1):
    model_config = SimpleNamespace(hf_config=config)
    return SimpleNamespace(model_config=model_config, parallel_config=SimpleNamespace(tensor_parallel_size=ranks))


def test_vllm_finds_the_plugin_by_its_entry_point():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    ((name, value),) = project["project"]["entry-points"]["vllm.general_plugins"].items()
    assert EntryPoint(name, value, "vllm.general_plugins").load() is register
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
    assert any(fnmatch("modeling_diff.serving", pattern) for pattern in packages)


def test_importing_the_plugin_imports_no_vllm():
    code = "import sys, modeling_diff.serving; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_registration_names_model_heads_and_checks_once(imitated_vllm):
    engine = imitated_vllm()
    register()
    register()
    assert engine.models == {"DiffLlamaForCausalLM": "modeling_diff.serving.vllm_model:DiffLlamaForCausalLM"}
    assert list(engine.modules[CONVERTOR_MODULE].MODEL_ARCH_CONFIG_CONVERTORS) == ["diff_llama"]
    assert list(engine.modules[CONFIG_MODULE].MODELS_CONFIG_MAP) == ["DiffLlamaForCausalLM"]
    assert engine.said == []


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "1.0.0rc1"])
def test_untested_vllm_is_said_in_one_line(imitated_vllm, version):
    engine = imitated_vllm(version)
    register()
    (line,) = engine.said
    assert f"tested with vLLM {TESTED_VLLM}, found {version}" in line
    assert "\n" not in line


@pytest.mark.parametrize("version", [(0, 32), (0, 32, 0), (0, 32, 5)])
def test_tested_vllm_is_taken_silently(version):
    assert untested_vllm(version, "any") is None


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (CONFIG_MODULE, "MODELS_CONFIG_MAP"),
        (REGISTRY_MODULE, "ModelRegistry"),
        (CONVERTOR_MODULE, "MODEL_ARCH_CONFIG_CONVERTORS"),
    ],
)
def test_vllm_without_what_is_needed_is_refused_by_version(imitated_vllm, module, name):
    engine = imitated_vllm("9.9.9")
    delattr(engine.modules[module], name)
    with pytest.raises(ImportError, match=rf"does not know vLLM 9\.9\.9 .*{name}.*tested with {TESTED_VLLM}"):
        register()


def test_refusal_is_one_line():
    assert "\n" not in unsupported_vllm("9.9.9", ImportError("cannot import name 'x'"))


def checks_of(engine):
    register()
    return engine.modules[CONFIG_MODULE].MODELS_CONFIG_MAP["DiffLlamaForCausalLM"].verify_and_update_config


def test_ranks_that_split_key_value_heads_are_refused_before_workers_start(imitated_vllm):
    verify = checks_of(imitated_vllm())
    config = DiffLlamaConfig(num_attention_heads=8, num_key_value_heads=4, hidden_size=64)
    verify(vllm_config(config, ranks=2))
    with pytest.raises(ValueError, match="tp_size=3 does not divide num_key_value_heads=4"):
        verify(vllm_config(config, ranks=3))


def test_another_model_of_our_name_is_refused(imitated_vllm):
    verify = checks_of(imitated_vllm())
    with pytest.raises(ValueError, match="model_type='diffllama'"):
        verify(vllm_config(SimpleNamespace(model_type="diffllama")))
