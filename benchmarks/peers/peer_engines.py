"""The peer engines behind one interface: a context, and a forward of new tokens on top of it.

Each engine imports its own package when it is opened, so that one can run without the others. `measure_peers.py`
beside this file times them; only `forward` is ever inside the timed region.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]
Logits = NDArray[np.float32]

LARGEST_FORWARD = 512
"""Tokens that one forward takes at most."""

LARGEST_CONTEXT = 1024
"""Tokens that an engine holds at most, context and new ones together."""


class Engine(Protocol):
    """One loaded model in one weight format."""

    name: str
    version: str
    vocab_size: int
    details: dict[str, Any]

    def start(self, context: Tokens) -> None:
        """Leaves exactly these tokens in the KV cache (untimed)."""
        ...

    def forward(self, tokens: Tokens, num_logits: int) -> Logits:
        """Runs [m] new tokens after what the cache holds; returns [num_logits, vocab] for the last of them."""
        ...


class LlamaCpp:
    """llama.cpp through llama-cpp-python's low-level bindings; options are fields of llama_context_params."""

    name = "llama.cpp"

    def __init__(self, folder: Path, weights: str, threads: int, options: dict[str, str]) -> None:
        import llama_cpp

        api: Any = llama_cpp  # its stubs make every handle optional
        path = folder / "gguf" / f"{weights}.gguf"
        self.api = api
        self.log = api.llama_log_callback(lambda *_: None)  # kept: the library calls it for as long as it lives
        api.llama_log_set(self.log, ctypes.c_void_p(0))
        api.llama_backend_init()
        self.model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
        if not self.model:
            raise ValueError(f"llama.cpp could not load {path}; run convert.py gguf first")
        params = api.llama_context_default_params()
        params.n_ctx = LARGEST_CONTEXT
        params.n_batch = params.n_ubatch = LARGEST_FORWARD
        params.n_threads = params.n_threads_batch = threads
        for name, value in options.items():
            if not hasattr(params, name):
                raise ValueError(f"llama.cpp: expected a field of llama_context_params, got {name!r}")
            setattr(params, name, int(value))
        self.context = api.llama_init_from_model(self.model, params)
        self.memory = api.llama_get_memory(self.context)
        self.batch = api.llama_batch_init(LARGEST_FORWARD, 0, 1)
        self.vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.held: list[int] = []
        self.num_held = 0
        self.version = f"llama-cpp-python {api.__version__}, llama.cpp {api.llama_version().decode()}"
        self.details = {"system": api.llama_print_system_info().decode().strip()}

    def start(self, context: Tokens) -> None:
        """Cuts the cache back to the context, or fills it anew if the context is another one."""
        wanted = context.tolist()
        if self.held == wanted:
            self.api.llama_memory_seq_rm(self.memory, 0, len(wanted), -1)
        else:
            self.api.llama_memory_clear(self.memory, True)
            self.num_held = 0
            if wanted:
                self.forward(context, 1)
            self.held = wanted
        self.num_held = len(wanted)

    def forward(self, tokens: Tokens, num_logits: int) -> Logits:
        batch, first = self.batch, len(tokens) - num_logits
        batch.n_tokens = len(tokens)
        for row, token in enumerate(tokens.tolist()):
            batch.token[row] = token
            batch.pos[row] = self.num_held + row
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = 0
            batch.logits[row] = row >= first
        if code := self.api.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode returned {code}, expected 0")
        self.num_held += len(tokens)
        logits = self.api.llama_get_logits(self.context)  # waits for the results
        return np.ctypeslib.as_array(logits, (num_logits, self.vocab_size))


class OpenVino:
    """OpenVINO's CPU plug-in on a stateful model as optimum-intel exports it; options are its properties."""

    name = "openvino"

    def __init__(self, folder: Path, weights: str, threads: int, options: dict[str, str]) -> None:
        import openvino as ov

        path = folder / "openvino" / weights / "openvino_model.xml"
        if not path.exists():
            raise ValueError(f"expected {path}; run convert.py openvino first")
        core = ov.Core()
        properties: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads, **options}
        model = core.read_model(path)
        self._choose_logits(model)
        self.ov = ov
        self.compiled = core.compile_model(model, "CPU", properties)
        self.request = self.compiled.create_infer_request()
        self.vocab_size = int(self.compiled.output("logits").get_partial_shape()[2].get_length())
        self.num_held = 0
        self.version = f"openvino {ov.__version__}"
        asked = ("INFERENCE_PRECISION_HINT", "INFERENCE_NUM_THREADS", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
        asked += ("KV_CACHE_PRECISION", "ENABLE_CPU_PINNING")
        self.details = {name.lower(): str(self.compiled.get_property(name)) for name in asked}

    @staticmethod
    def _choose_logits(model: Any) -> None:
        """Adds an input `num_logits` (int64 [1]), so that the head reads that many last rows."""
        from openvino import opset13 as ops

        head = model.output("logits").get_node().input_value(0).get_node()
        while head.get_type_name() != "MatMul":
            head = head.input_value(0).get_node()
        num_logits = ops.parameter([1], np.int64, name="num_logits")
        num_logits.output(0).set_names({"num_logits"})
        one = ops.constant(np.array([1], np.int64))
        start, end = ops.negative(num_logits), ops.constant(np.array([2**31 - 1], np.int64))
        tail = ops.slice(head.input_value(0), start, end, one, one)
        head.input(0).replace_source_output(tail.output(0))
        model.add_parameters([num_logits])
        model.validate_nodes_and_infer_types()

    def start(self, context: Tokens) -> None:
        """Empties the state and runs the context: the plug-in's cache has its own layout and cannot be cut."""
        self.request.reset_state()
        self.num_held = 0
        if len(context):
            self.forward(context, 1)

    def forward(self, tokens: Tokens, num_logits: int) -> Logits:
        total = self.num_held + len(tokens)
        inputs = {
            "input_ids": tokens[None],
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(self.num_held, total, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
            "num_logits": np.array([num_logits], np.int64),
        }
        for name, value in inputs.items():
            self.request.set_tensor(name, self.ov.Tensor(value))
        self.request.infer()
        self.num_held = total
        return self.request.get_tensor("logits").data[0]


class OnnxRuntime:
    """ONNX Runtime's CPU provider on a model of onnxruntime-genai's builder; options are session config entries."""

    name = "onnxruntime"

    def __init__(self, folder: Path, weights: str, threads: int, options: dict[str, str]) -> None:
        import onnxruntime as ort

        path = folder / "onnx" / weights / "model.onnx"
        if not path.exists():
            raise ValueError(f"expected {path}; run convert.py onnx first")
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.inter_op_num_threads = 1
        for name, value in options.items():
            settings.add_session_config_entry(name, value)
        self.ort = ort
        self.session = ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        self.asked = {i.name for i in self.session.get_inputs()}
        self.past = [name for name in self.asked if name.startswith("past_key_values")]
        decoder = json.loads((path.parent / "genai_config.json").read_text())["model"]["decoder"]
        self.empty_shape = (1, decoder["num_key_value_heads"], 0, decoder["head_size"])
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.vocab_size = int(self.session.get_outputs()[0].shape[2])
        self.cache: dict[str, Any] = {}
        self.kept: tuple[list[int], dict[str, Any]] = ([], {})
        self.num_held = 0
        self.version = f"onnxruntime {ort.__version__}"
        self.details = {"inputs": sorted(self.asked - set(self.past))}

    def start(self, context: Tokens) -> None:
        """Goes back to the cache as it was after the context; each forward writes a new one."""
        if self.kept[0] != context.tolist() or not self.cache:
            empty = self.ort.OrtValue.ortvalue_from_numpy(np.zeros(self.empty_shape, np.float32))
            self.cache = dict.fromkeys(self.past, empty)
            self.num_held = 0
            if len(context):
                self.forward(context, 1)
            self.kept = (context.tolist(), self.cache)
        self.cache, self.num_held = self.kept[1], len(context)

    def forward(self, tokens: Tokens, num_logits: int) -> Logits:
        total = self.num_held + len(tokens)
        inputs = {
            "input_ids": tokens[None],
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(self.num_held, total, dtype=np.int64)[None],
            "num_logits": np.array([num_logits], np.int64),
        }
        binding = self.session.io_binding()
        for name in self.asked & set(inputs):
            binding.bind_cpu_input(name, inputs[name])
        for name, value in self.cache.items():
            binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        results = dict(zip(self.outputs, binding.get_outputs(), strict=True))
        self.cache = {name: results[name.replace("past_key_values", "present")] for name in self.past}
        self.num_held = total
        return results["logits"].numpy()[0]


ENGINES: dict[str, tuple[type[LlamaCpp] | type[OpenVino] | type[OnnxRuntime], tuple[str, ...]]] = {
    "llama.cpp": (LlamaCpp, ("bf16", "q8_0", "q4_0", "q4_k")),
    "openvino": (OpenVino, ("bf16", "int8", "int4", "int4_g128")),
    "onnxruntime": (OnnxRuntime, ("int8", "int4")),
}
"""Engine by name, with the weight formats that convert.py makes for it."""
