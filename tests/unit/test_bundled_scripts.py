"""The scripts that make the bundled models: tokenizer, schedule, resume, evaluation, inflation."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "src" / "outrider" / "bundled"


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


train_bundled = load_script("train_bundled")
inflate = load_script("inflate")

TINY = train_bundled.Shape(hidden=32, layers=2, heads=4, kv_heads=2, ffn=48)
TINY_DRAFT = train_bundled.Shape(hidden=16, layers=1, heads=2, kv_heads=1, ffn=32)
CONFIG = train_bundled.TrainConfig(tokens=6 * 1024, vocab=64, chunks_per_step=1, warmup_tokens=1024)


# ------------------------------------------------------------------------------------- tokenizer

ODD_TEXTS = [
    "",
    " ",
    "\n\n\n",
    "\t\tif x:\r\n\t\t\treturn\r\n",
    "    def f(self, x=1):\n        return  x  # two  spaces \n\n\n\tmixed \t tabs",
    "naïve café, ÅΩ, 日本語, עברית, e\u0301 not é",
    "👩‍👩‍👧 🏳️‍🌈 \U0010ffff \x00\x01\x7f \u2028 \ufeff",
    "'don\\'t' 1234567890 3.14e-10 __dunder__ CamelCase snake_case",
    "trailing spaces   \n   ",
]


@pytest.fixture(scope="module", params=["target", "draft"])
def tokenizer(request: pytest.FixtureRequest):
    transformers = pytest.importorskip("transformers")
    folder = BUNDLED / request.param
    if not folder.exists():
        pytest.skip(f"{folder} is not there; run scripts/train_bundled.py all")
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_tokenizer_gives_back_every_character(tokenizer, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert max(ids, default=0) < 4096


def test_tokenizer_settings(tokenizer) -> None:
    assert len(tokenizer) == 4096
    assert tokenizer.eos_token_id == 0
    assert tokenizer.convert_ids_to_tokens(0) == "<|endoftext|>"
    assert tokenizer("x")["input_ids"] == tokenizer("x", add_special_tokens=False)["input_ids"]
    assert tokenizer.is_fast
    assert tokenizer.model_max_length == 1024


def test_tokenizer_keeps_indentation_compact(tokenizer) -> None:
    assert len(tokenizer(" " * 11 + "return")["input_ids"]) <= 3


def test_bundled_files_are_small_and_alike() -> None:
    if not (BUNDLED / "target").exists():
        pytest.skip("no bundled models; run scripts/train_bundled.py all")
    files = [p for p in BUNDLED.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 24 * 2**20
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (BUNDLED / "target" / name).read_bytes() == (BUNDLED / "draft" / name).read_bytes()


# ---------------------------------------------------------------------------------------- corpus


def test_held_out_modules_are_whole() -> None:
    for path in ("argparse.py", "json/decoder.py", "json/__init__.py", "test/test_ast/test_ast.py"):
        assert train_bundled.is_held_out(path)
    for path in ("http/server.py", "test/test_asyncio/test_queues.py", "jsonish.py", "csvx/a.py"):
        assert not train_bundled.is_held_out(path)
    record = json.loads((BUNDLED / "held_out.json").read_text())
    assert record["modules"] == list(train_bundled.HELD_OUT_MODULES)
    assert all(map(train_bundled.is_held_out, record["files"]))


def test_corpus_keeps_held_out_files_and_their_copies_apart(tmp_path: Path) -> None:
    code = "def f(x):\n    return x\n"
    (tmp_path / "json").mkdir()
    (tmp_path / "encodings").mkdir()
    (tmp_path / "json" / "decoder.py").write_text(code)
    (tmp_path / "copy.py").write_text(code)
    (tmp_path / "other.py").write_text(code + "# other\n")
    (tmp_path / "encodings" / "table.py").write_text("x = 1\n")
    (tmp_path / "data.py").write_text('x = "\\x00"\n' * 9)
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    train, held_out = train_bundled.collect_corpus(tmp_path)
    assert list(train) == ["other.py"]
    assert list(held_out) == ["json/decoder.py"]


def synthetic_stream(seed: int = 0):
    random = np.random.default_rng(1)
    documents = [random.integers(1, 64, size=size).astype(np.uint16) for size in (3000, 900, 2500, 1700)]
    offsets = np.cumsum([0, *map(len, documents)])
    return train_bundled.ChunkStream(np.concatenate(documents), offsets, seed)


def test_stream_is_a_function_of_seed_and_position() -> None:
    one, other = synthetic_stream(), synthetic_stream()
    late = other.chunk(9).copy()  # in another epoch, asked for first
    for n in range(9):
        one.chunk(n)
    assert (one.chunk(9) == late).all()
    assert not (synthetic_stream(seed=1).chunk(9) == late).all()
    inputs, labels = one.batch(0, 2, 512)
    assert inputs.shape == labels.shape == (4, 512)
    assert (inputs[0, 1:] == labels[0, :-1]).all()
    assert inputs[1, 0] == labels[0, -1]


# -------------------------------------------------------------------------------------- training


def test_learning_rate_warms_up_stays_and_decays_to_zero() -> None:
    config = train_bundled.TrainConfig(tokens=1_000_000, lr=1.0, warmup_tokens=100_000, decay_share=0.5)
    rate = train_bundled.learning_rate
    assert 0 < rate(0, config) < 1e-4
    assert rate(50_000, config) == pytest.approx(0.5, abs=1e-3)
    assert rate(300_000, config) == 1.0
    assert rate(750_000, config) == pytest.approx(0.5)
    assert rate(1_000_000, config) == 0.0
    assert rate(750_000, replace(config, tokens=800_000)) == pytest.approx(0.125)  # a lowered total
    assert train_bundled.row_length(840_000, config) == 512
    assert train_bundled.row_length(850_000, config) == 1024


def tiny_trainer(config=CONFIG):
    return train_bundled.Trainer(config, synthetic_stream(), TINY, TINY_DRAFT)


def test_resumed_training_equals_uninterrupted(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    whole, first, second = tiny_trainer(), tiny_trainer(), tiny_trainer()
    losses = [whole.step() for _ in range(6)]
    for _ in range(3):
        first.step()
    first.save(tmp_path / "checkpoint.pt")
    second.load(tmp_path / "checkpoint.pt")
    assert [second.step() for _ in range(3)] == losses[3:]
    for name, tensor in whole.models.state_dict().items():
        assert torch.equal(tensor, second.models.state_dict()[name]), name
    assert whole.done
    assert second.done


def test_resume_takes_another_total_but_no_other_setting(tmp_path: Path) -> None:
    trainer = tiny_trainer()
    trainer.save(tmp_path / "checkpoint.pt")
    tiny_trainer(replace(CONFIG, tokens=2048)).load(tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="lr"):
        tiny_trainer(replace(CONFIG, lr=1e-5)).load(tmp_path / "checkpoint.pt")


def test_draft_loss_reaches_the_draft_only() -> None:
    target = torch.randn(1, 4, 8, requires_grad=True)
    draft = torch.randn(1, 4, 8, requires_grad=True)
    _, draft_loss = train_bundled.joint_loss(target, draft, torch.zeros(1, 4, dtype=torch.long))
    draft_loss.backward()
    assert target.grad is None
    expected = (draft.softmax(-1) - target.softmax(-1)) / 4
    torch.testing.assert_close(draft.grad, expected.detach())


def test_accepted_per_step_counts_chains() -> None:
    # chains of 2 over seven tokens: TT|T, TF, T and the text's end
    matches = [True, True, True, True, False, True, True]
    assert train_bundled.accepted_per_step(matches, 2) == (5, 3)
    assert train_bundled.accepted_per_step([False] * 3, 4) == (0, 3)
    assert train_bundled.accepted_per_step([True] * 10, 4) == (8, 2)


# --------------------------------------------------------------------------------------- inflate


def save_tiny_llama(folder: Path, *, tied: bool, dtype: torch.dtype) -> None:
    model = train_bundled.build_model(TINY, 64, seed=0)
    config = model.config
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    model = type(model)(config)
    for name, parameter in model.named_parameters():
        std = 0.3 if "norm" in name else 0.1  # norms that are not one, so that scaling them matters
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=std)
    model.to(dtype).save_pretrained(folder)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("hidden", "dtype"), [(32, "fp32"), (96, "fp32"), (128, "bf16"), (None, "bf16")])
def test_inflated_model_has_the_same_logits(
    tmp_path: Path, tied: bool, hidden: int | None, dtype: str
) -> None:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    save_tiny_llama(tmp_path / "small", tied=tied, dtype=inflate.DTYPES[dtype])
    wanted = 2_000_000
    count = inflate.inflate(
        tmp_path / "small", tmp_path / "large", wanted, 5, dtype=dtype, seed=1, hidden=hidden
    )
    large = AutoModelForCausalLM.from_pretrained(tmp_path / "large", dtype=torch.float32)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    assert sum(p.numel() for p in large.parameters()) == count
    assert abs(count - wanted) < 0.1 * wanted
    assert large.config.num_hidden_layers == 5
    ids = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        torch.testing.assert_close(large(ids).logits, small(ids).logits, rtol=1e-4, atol=1e-4)


def test_inflate_checks_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_llama(tmp_path / "small", tied=True, dtype=torch.float32)

    def random_writes(self, old, columns):
        return self._with_corner(torch.randn(self.large.hidden, columns, dtype=self.dtype), old)

    monkeypatch.setattr(inflate.Grower, "writes", random_writes)
    with pytest.raises(ArithmeticError, match="does not compute"):
        inflate.inflate(tmp_path / "small", tmp_path / "large", 1_000_000, 4, dtype="fp32")


def test_inflate_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "small", tied=True, dtype=torch.float32)
    with pytest.raises(ValueError, match="too few"):
        inflate.inflate(tmp_path / "small", tmp_path / "large", 10_000, 4)
    with pytest.raises(ValueError, match="layers 1"):
        inflate.inflate(tmp_path / "small", tmp_path / "large", 1_000_000, 1)
    with pytest.raises(ValueError, match="multiple"):
        inflate.inflate(tmp_path / "small", tmp_path / "large", 1_000_000, 4, hidden=40)
    with pytest.raises(ValueError, match="dtype"):
        inflate.inflate(tmp_path / "small", tmp_path / "large", 1_000_000, 4, dtype="int4")
