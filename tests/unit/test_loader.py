"""Everything that can be wrong with a model folder ends in an error that says what to do."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from outrider.errors import ConfigError, ModelLoadError, OutriderError, UnsupportedModelError
from outrider.models.loader import load_model, load_tokenizer
from tests.tiny_models import CONTEXT_LENGTH, build_tiny, make_tiny


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors (dots written as two underscores), or drop them where the new value is None."""
    path = folder / "model.safetensors"
    renamed = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    tensors = {name: tensor for name, tensor in {**load_file(path), **renamed}.items() if tensor is not None}
    save_file(tensors, path, metadata={"format": "pt"})


def test_loads_quietly(folder: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = load_model(folder)
        tokenizer = load_tokenizer(folder)
    assert (model.vocab_size, model.context_length, model.eos_token_ids) == (128, CONTEXT_LENGTH, (2,))
    assert len(model.layer_shapes) == 3
    assert model.dtype == torch.float32
    assert tokenizer.decode(tokenizer.encode("t5 t7")) == "t5 t7"
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_dtype(folder: Path) -> None:
    assert load_model(folder, dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="dtype: got 'int3'"):
        load_model(folder, dtype="int3")


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_unknown_device(folder: Path, device: str) -> None:
    with pytest.raises(ConfigError, match="device"):
        load_model(folder, device=device)


def test_generation_config_names_the_end(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 9]}))
    assert load_model(folder).eos_token_ids == (5, 9)


def test_sharded(tmp_path: Path) -> None:
    build_tiny("llama").save_pretrained(tmp_path, max_shard_size="50KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    load_model(tmp_path)
    shards[1].unlink()
    with pytest.raises(ModelLoadError, match=shards[1].name):
        load_model(tmp_path)


def test_tied_weights_may_be_absent(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)
    edit_weights(folder, lm_head__weight=None)
    load_model(folder)


def test_keys_that_transformers_ignores_are_accepted(folder: Path) -> None:
    edit_config(folder, some_training_setting=3)
    load_model(folder)


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama",')


def list_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def binary_config(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")


def invalid_value(folder: Path) -> None:
    edit_config(folder, hidden_size="wide")


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickled_weights(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def truncated_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def empty_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def garbage_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 1000)


def missing_tensor(folder: Path) -> None:
    edit_weights(folder, model__layers__1__mlp__up_proj__weight=None)


def missing_layer(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=4)


def narrower_tensor(folder: Path) -> None:
    edit_config(folder, intermediate_size=64)


def nan_weights(folder: Path) -> None:
    edit_weights(folder, model__norm__weight=torch.full((48,), float("nan")))


def broken_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")


def empty_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")


DAMAGES: dict[Callable[[Path], None], str] = {
    without_config: "no config.json",
    broken_config: "config.json cannot be read",
    list_config: "expected a JSON object",
    binary_config: "config.json cannot be read",
    invalid_value: "hidden_size",
    without_weights: "weights of .*: got none",
    pickled_weights: r"pickle files \(pytorch_model.bin\).*convert it",
    truncated_weights: "model.safetensors is damaged",
    empty_weights: "model.safetensors is damaged",
    garbage_weights: "model.safetensors is damaged",
    missing_tensor: r"1 tensors missing, such as model.layers.1.mlp.up_proj.weight",
    missing_layer: "9 tensors missing",
    narrower_tensor: "9 tensors of other shapes",
    nan_weights: "NaN or infinite",
    broken_index: "index.json cannot be read",
    empty_index: "no weight_map",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_folders(folder: Path, damage: Callable[[Path], None], capfd: pytest.CaptureFixture[str]) -> None:
    damage(folder)
    with pytest.raises(ModelLoadError, match=DAMAGES[damage]):
        load_model(folder)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama-of-tomorrow"}, "model_type 'llama-of-tomorrow'"),
        ({"model_type": None}, "model_type None"),
        ({"model_type": "mine", "auto_map": {"AutoModel": "mine.Mine"}}, "auto_map.*never runs"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "got LlamaForSequenceClassification"),
        ({"architectures": ["LlamaModel"]}, "got LlamaModel"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "got T5ForConditional"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "got BertForMaskedLM"),
        ({"model_type": "vit", "architectures": []}, "got vit"),
    ],
)
def test_models_that_cannot_run(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        load_model(folder)
    assert "Llama" in str(caught.value), "says what would run"


def test_bidirectional_models_are_found_by_the_probe(tmp_path: Path) -> None:
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    BertLMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError):
        load_model(tmp_path)


def test_code_of_a_known_type_is_not_run(folder: Path) -> None:
    """Many checkpoints carry old code for a type that transformers knows by now: its own class is used."""
    (folder / "evil.py").write_text("raise SystemExit('run')")
    edit_config(folder, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    load_model(folder)


@pytest.mark.parametrize("name", ["/does/not/exist", "./nothing", "../nothing", "~/nothing-at-all", "a/b/c", ""])
def test_missing_folders(name: str) -> None:
    with pytest.raises(ModelLoadError):
        load_model(name)


def test_file_instead_of_folder(folder: Path) -> None:
    with pytest.raises(ModelLoadError, match="got a file"):
        load_model(folder / "config.json")


def test_hub_ids_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelLoadError, match="no connection"):
        load_model("somebody/something")


def test_revision_is_for_the_hub(folder: Path) -> None:
    with pytest.raises(ConfigError, match="revision"):
        load_model(folder, revision="main")


def test_tokenizer_errors(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelLoadError, match="cannot be read"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelLoadError, match="no tokenizer file"):
        load_tokenizer(folder)


def test_errors_are_ours(folder: Path) -> None:
    """Any single value of the configuration may be nonsense without a traceback from inside transformers."""
    keys = json.loads((folder / "config.json").read_text()).keys()
    original = (folder / "config.json").read_text()
    for key in keys:
        for value in (-1, "x", [], None):
            (folder / "config.json").write_text(original)
            edit_config(folder, **{key: value})
            try:
                load_model(folder)
            except OutriderError:
                continue
