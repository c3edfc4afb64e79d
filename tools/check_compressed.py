#!/usr/bin/env python3
"""Logits of a model directory by `transformers`, to compare with Lacuna's.

    check_compressed.py DIR LOGITS TOKEN TOKEN ...

Loads DIR (dense, or quantised in the compressed-tensors form), runs the tokens in float32 and writes the logits of every
position to LOGITS as little-endian float32. Exit code 3, and the package's name, where one is not installed.
`cargo test --release -p lacuna --test compressed` calls it; `LACUNA_PYTHON` names another interpreter.
"""

import json
import pathlib
import sys

try:
    import torch
    import transformers

    if "quantization_config" in json.loads(pathlib.Path(sys.argv[1], "config.json").read_text()):
        import compressed_tensors  # noqa: F401
except ImportError as error:
    print(f"not present: Python package {error.name}")
    sys.exit(3)

directory, out, tokens = sys.argv[1], sys.argv[2], [int(t) for t in sys.argv[3:]]
torch.set_num_threads(1)
model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
model.eval()
with torch.no_grad():
    logits = model(torch.tensor([tokens])).logits[0].float().contiguous()
pathlib.Path(out).write_bytes(logits.numpy().astype("<f4").tobytes())
print(f"{directory}: {tuple(logits.shape)}")
