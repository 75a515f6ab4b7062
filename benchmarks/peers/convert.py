"""Turn one Hugging Face Llama folder into the formats of the peer engines.

Runs in the peers' own environment (see README.md beside this file), never in outrider's. Sub-commands:

    python convert.py synthetic --out MODEL                  # random weights, when only speed matters
    python convert.py gguf      --model MODEL --out PEERS    # gguf/{bf16,q8_0,q4_0,q4_k}.gguf for llama.cpp
    python convert.py openvino  --model MODEL --out PEERS    # openvino/{bf16,int8,int4,int4_g128}/ for OpenVINO
    python convert.py onnx      --model MODEL --out PEERS    # onnx/{int8,int4}/ for ONNX Runtime

`--weights` picks some of the formats. Only plain Llama is covered: no rope scaling, no biases. The GGUF files carry
no tokenizer, for they are fed token ids.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GGUF_WEIGHTS = ("bf16", "q8_0", "q4_0", "q4_k")
OPENVINO_WEIGHTS = ("bf16", "int8", "int4", "int4_g128")
ONNX_WEIGHTS = ("int8", "int4")

HF_TO_GGUF_LAYER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
HF_TO_GGUF = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def make_synthetic(args: argparse.Namespace) -> None:
    """Writes a Llama of the given sizes with normal random bfloat16 weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    options: dict[str, Any] = {
        "hidden_size": args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.head_dim,
        "intermediate_size": args.ffn,
        "vocab_size": args.vocab,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
        "initializer_range": args.std,
        "dtype": torch.bfloat16,
    }
    torch.manual_seed(args.seed)
    LlamaForCausalLM(LlamaConfig(**options)).bfloat16().save_pretrained(args.out)


def read_config(model: Path) -> dict[str, Any]:
    """Reads config.json and refuses what the GGUF writer below would get wrong."""
    config = json.loads((model / "config.json").read_text())
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if config.get("model_type") != "llama" or rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"expected a llama without rope scaling, got {config.get('model_type')!r} with {rope!r}; "
            "use llama.cpp's own convert_hf_to_gguf.py for this model"
        )
    config["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    return config


def interleave_rope(weight: Any, num_heads: int) -> Any:
    """Reorders the rows of q or k from HF's half-split rotary layout to llama.cpp's pairwise one."""
    rows = weight.shape[0]
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def gguf_tensors(model: Path, config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields (GGUF name, torch tensor) for every weight of the checkpoint."""
    from safetensors import safe_open

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (a safe_open has no iterator)
                stem = name.removesuffix(".weight")
                if stem in HF_TO_GGUF:
                    yield f"{HF_TO_GGUF[stem]}.weight", shard.get_tensor(name)
                    continue
                layer, part = stem.removeprefix("model.layers.").split(".", 1)
                short = HF_TO_GGUF_LAYER[part]
                tensor = shard.get_tensor(name)
                if short in heads:
                    tensor = interleave_rope(tensor, heads[short])
                yield f"blk.{layer}.{short}.weight", tensor


def write_gguf(model: Path, path: Path) -> None:
    """Writes the checkpoint as a bfloat16 GGUF (vectors in float32, no tokenizer)."""
    import gguf
    import torch

    config = read_config(model)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(model.name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    for name, tensor in gguf_tensors(model, config):
        if tensor.dim() == 1:
            writer.add_tensor(name, tensor.float().numpy())
        else:
            raw = tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize_gguf(source: Path, path: Path, weights: str) -> None:
    """Quantises every matrix, embedding and output head included, to one type (llama.cpp's `--pure`)."""
    import ctypes

    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    ftypes = {
        "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
        "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
        "q4_k": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_S,
    }
    params.ftype = ftypes[weights]
    params.pure = True
    if code := llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.pointer(params)):
        raise RuntimeError(f"llama_model_quantize to {weights} returned {code}, expected 0")


def convert_gguf(args: argparse.Namespace) -> None:
    folder = args.out / "gguf"
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "bf16.gguf"
    if "bf16" in args.weights or not source.exists():
        write_gguf(args.model, source)
    for weights in args.weights:
        if weights != "bf16":
            quantize_gguf(source, folder / f"{weights}.gguf", weights)


def convert_openvino(args: argparse.Namespace) -> None:
    """Exports through optimum-intel: a stateful IR, its weights compressed by nncf without data."""
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    for weights in args.weights:
        folder = args.out / "openvino" / weights
        options: dict[str, Any] = {}
        if weights == "bf16":
            options["load_in_8bit"] = False
        elif weights == "int8":
            options["quantization_config"] = OVWeightQuantizationConfig(bits=8, sym=args.int8_sym)
        else:
            options["quantization_config"] = OVWeightQuantizationConfig(
                bits=4, sym=True, group_size=128 if weights == "int4_g128" else 64, ratio=1.0
            )
        model = OVModelForCausalLM.from_pretrained(args.model, export=True, compile=False, dtype="auto", **options)
        model.save_pretrained(folder)
        del model


def add_num_logits_input(path: Path) -> None:
    """Gives an ONNX model an input `num_logits` (int64 [1]): the head then reads only that many last rows."""
    import onnx
    from onnx import TensorProto, helper

    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    head = next(node for node in graph.node if "logits" in node.output)
    graph.input.append(helper.make_tensor_value_info("num_logits", TensorProto.INT64, [1]))
    graph.initializer.extend(
        [
            helper.make_tensor("num_logits/end", TensorProto.INT64, [1], [2**62]),
            helper.make_tensor("num_logits/axis", TensorProto.INT64, [1], [1]),
        ]
    )
    rows = head.input[0]
    start = helper.make_node("Neg", ["num_logits"], ["num_logits/start"])
    tail_inputs = [rows, "num_logits/start", "num_logits/end", "num_logits/axis"]
    tail = helper.make_node("Slice", tail_inputs, ["num_logits/rows"])
    head.input[0] = "num_logits/rows"
    position = list(graph.node).index(head)
    graph.node.insert(position, tail)
    graph.node.insert(position, start)
    onnx.save(model, path)


def convert_onnx(args: argparse.Namespace) -> None:
    """Runs onnxruntime-genai's model builder, then opens the head for a choice of rows."""
    for weights in args.weights:
        folder = args.out / "onnx" / weights
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        command += ["-i", str(args.model), "-o", str(folder), "-p", weights, "-e", "cpu"]
        command += ["-c", str(folder / "cache")]
        command += ["--extra_options", f"block_size={args.block_size}", "accuracy_level=4"]
        subprocess.run(command, check=True)
        add_num_logits_input(folder / "model.onnx")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Convert a Hugging Face Llama folder for the peer engines.")
    commands = parser.add_subparsers(dest="command", required=True)

    synthetic = commands.add_parser("synthetic", help="write a Llama with random weights")
    synthetic.add_argument("--out", type=Path, required=True, help="folder to write")
    sizes = {"hidden": 1280, "layers": 24, "heads": 20, "kv-heads": 4, "head-dim": 64, "ffn": 4096, "vocab": 32000}
    for name, default in {**sizes, "seed": 0}.items():
        synthetic.add_argument(f"--{name}", type=int, default=default)
    synthetic.add_argument("--std", type=float, default=0.02, help="standard deviation of the weights")
    synthetic.set_defaults(run=make_synthetic)

    engines = {
        "gguf": (GGUF_WEIGHTS, convert_gguf),
        "openvino": (OPENVINO_WEIGHTS, convert_openvino),
        "onnx": (ONNX_WEIGHTS, convert_onnx),
    }
    for name, (formats, run) in engines.items():
        command = commands.add_parser(name, help=f"weight formats: {', '.join(formats)}")
        command.add_argument("--model", type=Path, required=True, help="Hugging Face folder to read")
        command.add_argument("--out", type=Path, required=True, help=f"folder that gets {name}/")
        command.add_argument("--weights", nargs="+", choices=formats, default=list(formats))
        command.set_defaults(run=run)
        if name == "openvino":
            command.add_argument("--int8-sym", action="store_true", help="int8: symmetric (default asymmetric)")
        if name == "onnx":
            command.add_argument("--block-size", type=int, default=32, help="weights per scale (default 32)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
