"""Make a larger Llama that computes exactly the same function as a small one.

    python scripts/inflate.py src/outrider/bundled/target build/target-0.5b --params 0.5B

The text, the acceptance of every drafter and the tokenizer stay; only the cost of a forward grows. So
speed at a realistic size can be measured with the bundled pair where no large model is at hand.

How each part grows without adding anything:
- MLPs: new gate and up rows are random, their down_proj columns are zero.
- Layers: new ones are random except o_proj and down_proj, which are zero. They are spread evenly.
- Hidden size (h to H): the new residual channels stay zero, since embeddings, o_proj and down_proj
  are zero there. RMSNorm then sees a mean square that is h/H of the old one, so its weights take
  sqrt(h/H) and eps takes h/H. Powers of four keep that factor a power of two, hence exact in bf16.
- Heads: grow with the hidden size at the same head size and group size; new o_proj columns are zero.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MAX_PARAMS_CHECKED_IN_FP32 = 2_000_000_000
INIT_STD = 0.02


@dataclass(frozen=True)
class Sizes:
    """The sizes of a Llama model that matter here."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    vocab: int
    tied: bool

    @classmethod
    def of(cls, config: dict[str, Any]) -> Sizes:
        if config["model_type"] != "llama" or config.get("attention_bias") or config.get("mlp_bias"):
            raise ValueError(
                f"model_type {config['model_type']!r} with attention_bias={config.get('attention_bias')}, "
                f"mlp_bias={config.get('mlp_bias')}; expected a Llama without biases"
            )
        heads = config["num_attention_heads"]
        return cls(
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_size=config.get("head_dim") or config["hidden_size"] // heads,
            ffn=config["intermediate_size"],
            vocab=config["vocab_size"],
            tied=config["tie_word_embeddings"],
        )

    @property
    def outer_params(self) -> int:
        """Embeddings, output head and final norm."""
        return self.vocab * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def layer_params(self) -> int:
        attention = 2 * self.hidden * self.head_size * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.ffn + 2 * self.hidden

    @property
    def params(self) -> int:
        return self.outer_params + self.layers * self.layer_params

    def grown(self, hidden: int, layers: int, params: int) -> Sizes:
        """Sizes for `hidden` and `layers` whose MLPs bring the count to about `params`."""
        factor = hidden // self.hidden
        wide = Sizes(
            hidden=hidden,
            layers=layers,
            heads=self.heads * factor,
            kv_heads=self.kv_heads * factor,
            head_size=self.head_size,
            ffn=0,
            vocab=self.vocab,
            tied=self.tied,
        )
        ffn = (params - wide.params) / (layers * 3 * hidden)
        return Sizes(**{**wide.__dict__, "ffn": round(ffn / 64) * 64})


def choose_sizes(small: Sizes, params: int, layers: int, hidden: int | None) -> Sizes:
    """The wanted sizes; without `hidden`, the widest power-of-four multiple with MLPs at least as wide."""
    if layers < small.layers:
        raise ValueError(f"layers {layers} < the model's own {small.layers}; ask for at least as many")
    if hidden is not None:
        if hidden % small.hidden:
            raise ValueError(f"hidden {hidden} is not a multiple of the model's {small.hidden}")
        sizes = small.grown(hidden, layers, params)
    else:
        sizes = small.grown(small.hidden, layers, params)
        for power in range(1, 5):
            wider = small.grown(small.hidden * 4**power, layers, params)
            if wider.ffn >= max(small.ffn, wider.hidden):
                sizes = wider
    if sizes.ffn < small.ffn:
        least = small.grown(sizes.hidden, layers, 0)
        needed = least.params + layers * 3 * sizes.hidden * (small.ffn - least.ffn)
        raise ValueError(
            f"params {params:,} is too few for {layers} layers of hidden size {sizes.hidden}; "
            f"the least is {needed:,}: ask for more parameters or fewer layers"
        )
    return sizes


class Weights:
    """Reads tensors by name from a folder's safetensors files."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                self._files.update(dict.fromkeys(file.keys(), path))
        if not self._files:
            raise FileNotFoundError(f"no *.safetensors in {folder}; expected a Hugging Face model folder")

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)


class Grower:
    """Makes the large tensors: old values in the upper left corner, the rest random or zero."""

    def __init__(self, small: Sizes, large: Sizes, dtype: torch.dtype, seed: int) -> None:
        self.small, self.large, self.dtype = small, large, dtype
        self.random = torch.Generator().manual_seed(seed)
        self.norm_scale = math.sqrt(small.hidden / large.hidden)

    def reads(self, old: Tensor | None, rows: int) -> Tensor:
        """A matrix that reads the residual stream, [rows, hidden]: random where it is new."""
        new = torch.empty(rows, self.large.hidden, dtype=self.dtype)
        new.normal_(std=INIT_STD, generator=self.random)
        return self._with_corner(new, old)

    def writes(self, old: Tensor | None, columns: int) -> Tensor:
        """A matrix that writes to the residual stream, [hidden, columns]: zero where it is new."""
        return self._with_corner(torch.zeros(self.large.hidden, columns, dtype=self.dtype), old)

    def embedding(self, old: Tensor) -> Tensor:  # [vocab, hidden]
        return self._with_corner(torch.zeros(len(old), self.large.hidden, dtype=self.dtype), old)

    def norm(self, old: Tensor | None) -> Tensor:  # [hidden]
        new = torch.ones(self.large.hidden, dtype=self.dtype)
        if old is not None:
            new[: len(old)] = (old.float() * self.norm_scale).to(self.dtype)
        return new

    def layer(self, old: dict[str, Tensor]) -> dict[str, Tensor]:
        """One layer; `old` is empty for a new one."""
        s, large = self.large.head_size, self.large
        return {
            "input_layernorm.weight": self.norm(old.get("input_layernorm.weight")),
            "self_attn.q_proj.weight": self.reads(old.get("self_attn.q_proj.weight"), large.heads * s),
            "self_attn.k_proj.weight": self.reads(old.get("self_attn.k_proj.weight"), large.kv_heads * s),
            "self_attn.v_proj.weight": self.reads(old.get("self_attn.v_proj.weight"), large.kv_heads * s),
            "self_attn.o_proj.weight": self.writes(old.get("self_attn.o_proj.weight"), large.heads * s),
            "post_attention_layernorm.weight": self.norm(old.get("post_attention_layernorm.weight")),
            "mlp.gate_proj.weight": self.reads(old.get("mlp.gate_proj.weight"), large.ffn),
            "mlp.up_proj.weight": self.reads(old.get("mlp.up_proj.weight"), large.ffn),
            "mlp.down_proj.weight": self.writes(old.get("mlp.down_proj.weight"), large.ffn),
        }

    @staticmethod
    def _with_corner(new: Tensor, old: Tensor | None) -> Tensor:
        if old is not None:
            new[: old.shape[0], : old.shape[1]] = old.to(new.dtype)
        return new


LAYER_NAMES = (
    *("input_layernorm.weight", "post_attention_layernorm.weight"),
    *(f"self_attn.{p}_proj.weight" for p in "qkvo"),
    *(f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")),
)


def grow_weights(weights: Weights, grower: Grower) -> dict[str, Tensor]:
    """The large model's state; old layer i stands at place i * layers // old layers."""
    small, large = grower.small, grower.large
    places = {i * large.layers // small.layers: i for i in range(small.layers)}
    state = {
        "model.embed_tokens.weight": grower.embedding(weights["model.embed_tokens.weight"]),
        "model.norm.weight": grower.norm(weights["model.norm.weight"]),
    }
    if not small.tied:
        state["lm_head.weight"] = grower.reads(weights["lm_head.weight"], large.vocab)
    for place in range(large.layers):
        old: dict[str, Tensor] = {}
        if place in places:
            old = {name: weights[f"model.layers.{places[place]}.{name}"] for name in LAYER_NAMES}
        for name, tensor in grower.layer(old).items():
            state[f"model.layers.{place}.{name}"] = tensor
    return state


def grown_config(config: dict[str, Any], small: Sizes, large: Sizes, dtype: str) -> dict[str, Any]:
    return {
        **{k: v for k, v in config.items() if k != "torch_dtype"},
        "hidden_size": large.hidden,
        "num_hidden_layers": large.layers,
        "num_attention_heads": large.heads,
        "num_key_value_heads": large.kv_heads,
        "head_dim": large.head_size,
        "intermediate_size": large.ffn,
        "rms_norm_eps": config["rms_norm_eps"] * small.hidden / large.hidden,
        "dtype": {"bf16": "bfloat16", "fp32": "float32"}[dtype],
    }


def check_prompt(folder: Path, vocab: int) -> Tensor:  # [1, T]
    """The beginning of a file that the bundled models never saw; other models' tokens are random."""
    text = (Path(sysconfig.get_path("stdlib")) / "textwrap.py").read_text(encoding="utf-8")[:1000]
    if (folder / "tokenizer.json").exists():
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"][:, :128]
    return torch.randint(vocab, (1, 32), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def check_equal(src: Path, dst: Path, sizes: Sizes, dtype: torch.dtype, exact_norms: bool) -> float:
    """The largest difference of logits, relative to the largest logit; raises where it is not rounding.

    Both compute in fp32 from their stored weights, unless the large one would not fit well in memory.
    """
    from transformers import AutoModelForCausalLM

    compute = torch.float32 if sizes.params <= MAX_PARAMS_CHECKED_IN_FP32 else dtype
    prompt = check_prompt(src, sizes.vocab)
    small, large = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=compute)(prompt).logits.float() for folder in (src, dst)
    )
    difference = ((small - large).abs().max() / small.abs().max()).item()
    stored_exactly = dtype == torch.float32 or exact_norms
    tolerance = 1e-4 if compute == torch.float32 and stored_exactly else 5e-2
    if not difference <= tolerance:  # also catches NaN
        raise ArithmeticError(
            f"logits differ by {difference:.2e} of the largest, expected at most {tolerance:.0e}; "
            f"{dst} does not compute the function of {src}"
        )
    return difference


def inflate(
    src: Path,
    dst: Path,
    params: int,
    layers: int,
    *,
    dtype: str = "bf16",
    seed: int = 0,
    hidden: int | None = None,
) -> int:
    """Write to `dst` a model of about `params` parameters that equals `src`; returns the exact count.

    Without `hidden`, the hidden size grows by the largest power of four that leaves room for MLPs at
    least as wide as it is. Weights of `src` that `dtype` cannot hold are rounded to it.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
    if src.resolve() == dst.resolve():
        raise ValueError(f"source and destination are the same folder, {src}; choose another")
    config = json.loads((src / "config.json").read_text())
    small = Sizes.of(config)
    large = choose_sizes(small, params, layers, hidden)
    weights = Weights(src)
    state = grow_weights(weights, Grower(small, large, DTYPES[dtype], seed))
    dst.mkdir(parents=True, exist_ok=True)
    for path in src.iterdir():
        if path.is_file() and path.suffix in (".json", ".jinja", ".txt", ".model") and "index" not in path.name:
            shutil.copyfile(path, dst / path.name)
    (dst / "config.json").write_text(json.dumps(grown_config(config, small, large, dtype), indent=2) + "\n")
    save_file(state, dst / "model.safetensors", metadata={"format": "pt"})
    (dst / "model.safetensors").chmod(0o644)  # it comes readable by its owner alone
    count = sum(tensor.numel() for tensor in state.values())
    assert count == large.params, (count, large.params)
    source_fits = dtype == "fp32" or weights["model.norm.weight"].dtype == torch.bfloat16
    exact_norms = math.log2(large.hidden / small.hidden) % 2 == 0
    del state
    check_equal(src, dst, large, DTYPES[dtype], source_fits and exact_norms)
    return count


def parse_count(text: str) -> int:
    """'0.5B', '350M' or '500000000' as a number."""
    scale = {"B": 10**9, "M": 10**6, "K": 10**3}.get(text[-1:].upper(), 1)
    try:
        return round(float(text if scale == 1 else text[:-1]) * scale)
    except ValueError:
        raise typer.BadParameter(f"{text!r}; expected a count such as 0.5B, 350M or 500000000") from None


def main(
    src: Annotated[Path, typer.Argument(help="A Llama model folder.", exists=True, file_okay=False)],
    dst: Annotated[Path, typer.Argument(help="The folder to write.")],
    *,
    params: Annotated[str, typer.Option(help="Wanted size, such as 0.5B or 350M.")] = "0.5B",
    layers: Annotated[int, typer.Option(help="Layers of the large model.")] = 24,
    hidden: Annotated[int | None, typer.Option(help="Hidden size; chosen by default.")] = None,
    dtype: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    seed: Annotated[int, typer.Option(help="Of the new weights.")] = 0,
) -> None:
    """Make a larger Llama that computes exactly the same function as a small one."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    console = Console(stderr=True)
    try:
        with console.status("inflating"):
            count = inflate(src, dst, parse_count(params), layers, dtype=dtype, seed=seed, hidden=hidden)
    except (ValueError, OSError, ArithmeticError) as error:
        console.print(f"[red]error:[/red] {error}")
        sys.exit(1)
    config = json.loads((dst / "config.json").read_text())
    console.print(
        f"{dst}: {count:,} parameters, {config['num_hidden_layers']} layers, "
        f"hidden {config['hidden_size']}, FFN {config['intermediate_size']}; same logits as {src}"
    )


if __name__ == "__main__":
    typer.run(main)
