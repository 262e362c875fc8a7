# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""The text model of ``cpu_model.py`` for llama.cpp, with random weights, as GGUF.

    python benchmarks/llama_cpp_model.py f16.gguf
    llama-quantize --output-tensor-type Q8_0 f16.gguf q4_0.gguf Q4_0
    llama-bench -m q4_0.gguf -t 2 -p 256,1024 -n 17 -d 256

The same widths, layers and vocabulary, and a head of its own. llama.cpp is to be built on
the machine that runs it (``-DGGML_NATIVE=ON``), for the instructions that are there.
"""

import argparse

import gguf
import numpy as np

_HIDDEN, _INNER, _LAYERS, _HEADS, _KV_HEADS = 2048, 11008, 4, 16, 2
_WIDTH = _HIDDEN // _HEADS
#: As in ``cpu_model.py``: 151936 for 36 layers.
_VOCABULARY = 151936 * _LAYERS // 36


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("path")
    writer = gguf.GGUFWriter(parser.parse_args().path, "qwen2")
    writer.add_block_count(_LAYERS)
    writer.add_context_length(4096)
    writer.add_embedding_length(_HIDDEN)
    writer.add_feed_forward_length(_INNER)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_KV_HEADS)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    _add_tokenizer(writer)
    _add_weights(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    """One that llama.cpp loads; nothing is read by it."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"t{i}" for i in range(_VOCABULARY)])
    writer.add_token_types([1] * _VOCABULARY)
    writer.add_token_merges(["t1 t2"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def _add_weights(writer: gguf.GGUFWriter) -> None:
    draw = np.random.default_rng(0)

    def weight(name: str, n: int, k: int) -> None:
        values = draw.standard_normal((n, k), dtype=np.float32) * 0.02
        writer.add_tensor(f"{name}.weight", values.astype(np.float16))

    def ones(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(_HIDDEN, dtype=np.float32))

    weight("token_embd", _VOCABULARY, _HIDDEN)
    weight("output", _VOCABULARY, _HIDDEN)
    ones("output_norm")
    of_keys = _KV_HEADS * _WIDTH
    for layer in range(_LAYERS):
        block = f"blk.{layer}."
        ones(f"{block}attn_norm")
        ones(f"{block}ffn_norm")
        for name, rows in (("q", _HIDDEN), ("k", of_keys), ("v", of_keys)):
            weight(f"{block}attn_{name}", rows, _HIDDEN)
            writer.add_tensor(f"{block}attn_{name}.bias", np.zeros(rows, np.float32))
        weight(f"{block}attn_output", _HIDDEN, _HIDDEN)
        weight(f"{block}ffn_gate", _INNER, _HIDDEN)
        weight(f"{block}ffn_up", _INNER, _HIDDEN)
        weight(f"{block}ffn_down", _HIDDEN, _INNER)


if __name__ == "__main__":
    main()
