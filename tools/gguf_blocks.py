#!/usr/bin/env python3
"""Writes crates/core/tests/fixtures/gguf-blocks.bin: random blocks of every type that Lacuna decodes, and what the `gguf`
package decodes them to. Needs `pip install gguf numpy`; run from the root of the repository.

Layout, little-endian, per type: u32 type number, u32 blocks, the blocks, then one f32 per number."""
import struct
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as T
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize

# Where the f16 scales of a block are: they get a size as in real files, some of them subnormal in f16.
SCALES = {
    T.BF16: [], T.F16: [], T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2], T.Q8_0: [0],
    T.Q2_K: [80, 82], T.Q3_K: [108], T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208],
}

rng = np.random.default_rng(20)
out = bytearray()
for kind, places in SCALES.items():
    block_len, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = 6 if block_len == 256 else 24 if block_len == 32 else 64
    data = rng.integers(0, 256, (blocks, block_bytes), dtype=np.uint8)
    if block_len == 1:
        values = rng.normal(0, 1, blocks).astype(np.float32)
        half = values.astype(np.float16).view(np.uint16) if kind == T.F16 else values.view(np.uint32) >> 16
        data = half.astype("<u2").view(np.uint8).reshape(blocks, 2)
    for at in places:
        scale = rng.normal(0, 1, blocks) * 10.0 ** rng.uniform(-6, 0, blocks)
        data[:, at : at + 2] = scale.astype("<f2").view(np.uint8).reshape(blocks, 2)
    if kind == T.F16:
        decoded = data.view("<f2").astype(np.float32)
    else:
        decoded = dequantize(data, kind)
    decoded = np.ascontiguousarray(decoded, dtype="<f4")
    assert decoded.size == blocks * block_len and np.isfinite(decoded).all(), kind
    out += struct.pack("<II", kind, blocks) + data.tobytes() + decoded.tobytes()

path = Path("crates/core/tests/fixtures/gguf-blocks.bin")
path.parent.mkdir(parents=True, exist_ok=True)
path.write_bytes(out)
print(path, len(out), "bytes")
