"""The scripts that make the bundled models: tokenizer, schedule, resume, evaluation, inflation."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "src" / "outrider" / "bundled"
sys.path.insert(0, str(ROOT / "scripts"))

import inflate  # noqa: E402
import train_bundled  # noqa: E402
from bundled import corpus, distill, evaluate, generate, model, train  # noqa: E402

TINY = model.Shape(hidden=32, layers=2, heads=4, kv_heads=2, ffn=48)
TINY_DRAFT = model.Shape(hidden=16, layers=1, heads=2, kv_heads=1, ffn=32)
CONFIG = train.TrainConfig(tokens=6 * 1024, vocab=64, chunks_per_step=1, warmup_tokens=1024)


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
        assert corpus.is_held_out(path)
    for path in ("http/server.py", "test/test_asyncio/test_queues.py", "jsonish.py", "csvx/a.py"):
        assert not corpus.is_held_out(path)
    record = json.loads((BUNDLED / "held_out.json").read_text())
    assert record["modules"] == list(corpus.HELD_OUT_MODULES)
    assert all(map(corpus.is_held_out, record["files"]))


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
    seen, held_out = corpus.collect_corpus(tmp_path)
    assert list(seen) == ["other.py"]
    assert list(held_out) == ["json/decoder.py"]


def synthetic_stream(seed: int = 0):
    random = np.random.default_rng(1)
    documents = [random.integers(1, 64, size=size).astype(np.uint16) for size in (3000, 900, 2500, 1700)]
    offsets = np.cumsum([0, *map(len, documents)])
    return corpus.ChunkStream(np.concatenate(documents), offsets, seed)


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
    config = train.TrainConfig(tokens=1_000_000, lr=1.0, warmup_tokens=100_000, decay_share=0.5)
    rate = train.learning_rate
    assert 0 < rate(0, config) < 1e-4
    assert rate(50_000, config) == pytest.approx(0.5, abs=1e-3)
    assert rate(300_000, config) == 1.0
    assert rate(750_000, config) == pytest.approx(0.5)
    assert rate(1_000_000, config) == 0.0
    assert rate(750_000, replace(config, tokens=800_000)) == pytest.approx(0.125)  # a lowered total
    assert train.row_length(840_000, config) == 512
    assert train.row_length(850_000, config) == 1024


def tiny_trainer(config=CONFIG):
    return train.Trainer(config, synthetic_stream(), TINY, TINY_DRAFT)


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
    _, draft_loss = train.joint_loss(target, draft, torch.zeros(1, 4, dtype=torch.long))
    draft_loss.backward()
    assert target.grad is None
    expected = (draft.softmax(-1) - target.softmax(-1)) / 4
    torch.testing.assert_close(draft.grad, expected.detach())


# ------------------------------------------------------------------------------------ evaluation


def test_accepted_per_step_counts_chains() -> None:
    # chains of 2 over seven tokens: TT|T, TF, T and the text's end
    assert evaluate.accepted_per_step([0, 0, 0, 0, 2, 0, 0], evaluate.chain(2)) == (5, 3)
    assert evaluate.accepted_per_step([3] * 3, evaluate.chain(4)) == (0, 3)
    assert evaluate.accepted_per_step([0] * 10, evaluate.chain(4)) == (8, 2)


def test_accepted_per_step_counts_trees() -> None:
    tree = frozenset({(0,), (1,), (0, 1), (1, 0)})
    # (1, 0) then its bonus; (0) as (0, 2) is no path, with the 2 as bonus; (1) and the text's end
    assert evaluate.accepted_per_step([1, 0, 3, 0, 2, 1], tree) == (4, 3)
    for name, shape in evaluate.DRAFT_SHAPES.items():
        assert all(path[:-1] in shape for path in shape if len(path) > 1), name
    assert len(evaluate.DRAFT_SHAPES["tree_12"]) == 12


def test_repeated_share() -> None:
    assert evaluate.repeated_share(list(range(20)), 3) == 0
    assert evaluate.repeated_share([1, 2] * 10, 3) == pytest.approx(16 / 18)
    assert evaluate.repeated_share([1, 2], 3) == 0


# ---------------------------------------------------------------------------------- distillation

OWN_TEXT = generate.GenerateConfig(
    rows=6, row_length=256, min_prefix=8, max_prefix=64, rows_per_batch=4, greedy_share=0.5
)
DISTILL = distill.DistillConfig(tokens=8 * 1024, chunks_per_step=1, warmup_tokens=1024, own_text=OWN_TEXT)


def tiny_models() -> nn.ModuleDict:
    return nn.ModuleDict({"target": model.build_model(TINY, 64, 0), "draft": model.build_model(TINY_DRAFT, 64, 0)})


def tiny_distiller(config=DISTILL, **options):
    rows = np.random.default_rng(2).integers(1, 64, size=(6, 256)).astype(np.uint16)
    return distill.Distiller(config, tiny_models(), synthetic_stream(), rows, **options)


def test_continuations_are_what_the_model_would_write() -> None:
    target = model.build_model(TINY, 64, seed=0)
    prefix = torch.randint(64, (3, 9), generator=torch.Generator().manual_seed(3))
    random = torch.Generator().manual_seed(0)
    temperature = torch.tensor([0.0, 0.0, 1.0])
    fast = generate.generator_of(target).float()
    rows = generate.continue_rows(fast, prefix, 40, temperature, random)
    assert torch.equal(rows[:, :9], prefix)
    fast.set_attn_implementation("sdpa")
    with torch.inference_mode():
        logits = fast(input_ids=rows).logits
    assert torch.equal(logits[:2, 8:-1].argmax(-1), rows[:2, 9:])
    assert not torch.equal(logits[2, 8:-1].argmax(-1), rows[2, 9:])


def test_generation_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, stream = tiny_models()["target"], synthetic_stream()
    whole = generate.generate(target, stream, tmp_path / "whole", OWN_TEXT)
    assert whole is not None
    assert whole.shape == (6, 256)
    first = generate.generate(target, stream, tmp_path / "parts", replace(OWN_TEXT, rows=3))
    assert first is not None
    made: list[int] = []
    batch = generate.generate_batch
    monkeypatch.setattr(generate, "generate_batch", lambda *a: made.append(a[2]) or batch(*a))
    rest = generate.generate(target, stream, tmp_path / "parts", OWN_TEXT)
    assert made == [1]
    assert (rest == whole).all()
    generate.generate(target, stream, tmp_path / "parts", replace(OWN_TEXT, seed=1))
    assert made == [1, 0, 1]  # other settings: anew


def test_distillation_follows_the_target_and_leaves_it_alone() -> None:
    torch.set_num_threads(1)
    distiller = tiny_distiller(replace(DISTILL, lr=5e-3, tokens=40 * 1024, argmax_weight=0.0))
    with torch.no_grad():
        distiller.target.model.embed_tokens.weight.mul_(20)  # so that it is far from uniform
    before = {n: t.clone() for n, t in distiller.target.state_dict().items()}
    losses = [distiller.step() for _ in range(40)]
    assert losses[-1][0] < 0.8 * losses[0][0]
    assert distiller.done
    assert distiller.rate == 0
    for name, tensor in distiller.target.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_distillation_alternates_between_the_corpus_and_own_text() -> None:
    distiller = tiny_distiller(replace(DISTILL, own_share=0.25))
    kinds = []
    for distiller.steps in range(8):
        inputs, own = distiller.batch()
        kinds.append(own)
        assert inputs.shape == ((4, 256) if own else (1, 1024))
    assert kinds == [False, False, False, True] * 2


def test_resumed_distillation_equals_uninterrupted(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    path = tmp_path / "distill.pt"
    whole, first, second = tiny_distiller(), tiny_distiller(), tiny_distiller()
    for _ in range(8):
        whole.step()
    for _ in range(3):
        first.step()
    first.save(path)
    assert distill.load_distilled(path, {"target": "", "draft": ""}) is None
    loaded = distill.load_distilled(path, second.source)
    assert loaded is not None
    second.load(path)
    for _ in range(5):
        second.step()
    assert whole.done
    assert second.done
    for name, tensor in whole.draft.state_dict().items():
        assert torch.equal(tensor, second.draft.state_dict()[name]), name
        assert torch.equal(first.draft.state_dict()[name], loaded["draft"][name]), name
    with pytest.raises(ValueError, match="lr"):
        tiny_distiller(replace(DISTILL, lr=1e-5)).load(path)


def test_cosine_rate() -> None:
    config = replace(DISTILL, tokens=1_000_000, lr=1.0, warmup_tokens=100_000)
    assert 0 < distill.cosine_rate(0, config) < 1e-4
    assert distill.cosine_rate(500_000, config) == pytest.approx(0.5)
    assert distill.cosine_rate(1_000_000, config) == pytest.approx(0.0)


def test_export_takes_the_distilled_draft_of_this_target(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    work, out = tmp_path / "work", tmp_path / "out"
    (work / "tokenizer").mkdir(parents=True)

    def exported_norm() -> float:
        train_bundled.export_command(work, out)
        return load_file(out / "draft" / "model.safetensors")["model.norm.weight"].mean().item()

    trainer = tiny_trainer()
    trainer.save(work / "checkpoint.pt")
    assert exported_norm() == 1
    rows = np.ones((4, 256), dtype=np.uint16)
    distiller = distill.Distiller(DISTILL, trainer.models, synthetic_stream(), rows)
    with torch.no_grad():
        distiller.draft.model.norm.weight.fill_(2)
    distiller.save(work / "distill.pt")
    assert exported_norm() == 2
    assert json.loads((work / "export.json").read_text())["distill"]["progress"]["steps"] == 0
    with torch.no_grad():
        trainer.models["target"].model.norm.weight.fill_(3)
    trainer.save(work / "checkpoint.pt")  # another target: the distilled draft is not its own
    assert exported_norm() == 1
    assert json.loads((work / "export.json").read_text())["distill"] is None


# --------------------------------------------------------------------------------------- inflate


def save_tiny_llama(folder: Path, *, tied: bool, dtype: torch.dtype) -> None:
    template = model.build_model(TINY, 64, seed=0)
    template.config.tie_word_embeddings = tied
    torch.manual_seed(0)
    llama = type(template)(template.config)
    for name, parameter in llama.named_parameters():
        std = 0.3 if "norm" in name else 0.1  # norms that are not one, so that scaling them matters
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=std)
    llama.to(dtype).save_pretrained(folder)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("hidden", "dtype"), [(32, "fp32"), (96, "fp32"), (128, "bf16"), (None, "bf16")])
def test_inflated_model_has_the_same_logits(tmp_path: Path, tied: bool, hidden: int | None, dtype: str) -> None:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    save_tiny_llama(tmp_path / "small", tied=tied, dtype=inflate.DTYPES[dtype])
    wanted = 2_000_000
    count = inflate.inflate(tmp_path / "small", tmp_path / "large", wanted, 5, dtype=dtype, seed=1, hidden=hidden)
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
