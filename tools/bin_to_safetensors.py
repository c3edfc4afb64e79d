#!/usr/bin/env python3
"""Writes pytorch_model*.bin of a checkpoint as model.safetensors beside it, for checkpoints that come as pickles alone (BlockFFN).

    python tools/bin_to_safetensors.py DIR

Only tensors are unpickled (`weights_only`). Tensors that share their memory, such as a head tied to the embedding, are stored
once. Needs torch and safetensors.
"""

import pathlib
import sys

import torch
from safetensors.torch import save_file


def convert(folder):
    parts = sorted(folder.glob("pytorch_model*.bin"))
    if not parts:
        raise SystemExit(f"{folder}: no pytorch_model*.bin")
    tensors, seen = {}, {}
    for part in parts:
        for name, t in torch.load(part, map_location="cpu", weights_only=True).items():
            place = (t.data_ptr(), tuple(t.shape), t.stride())
            if place in seen:
                print(f"{name}: the same tensor as {seen[place]}, left out")
                continue
            seen[place], tensors[name] = name, t.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    print(f"{folder / 'model.safetensors'}: {len(tensors)} tensors")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    convert(pathlib.Path(sys.argv[1]))
