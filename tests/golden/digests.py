#!/usr/bin/env python3
"""What is in the single-file transformer that make.py makes, without keeping the file (1 MB): shape and SHA-256 of each tensor.

    digests.py MADE/files/bfl-bf16.safetensors > files/bfl-bf16.json          and so for bfl-fp8, whose scales stand there as numbers

The tests make the same tensors from models/pocket: rounded, fused, divided by the scale and rounded to e4m3. Standard library only."""
import hashlib, json, pathlib, struct, sys

raw = pathlib.Path(sys.argv[1]).read_bytes()
size = struct.unpack("<Q", raw[:8])[0]
head = json.loads(raw[8:8 + size])
head.pop("__metadata__", None)
rows = {}
for name, entry in sorted(head.items()):
    first, end = entry["data_offsets"]
    if not entry["shape"]:
        rows[name] = {"dtype": entry["dtype"], "shape": [], "value": struct.unpack("<f", raw[8 + size + first:8 + size + end])[0]}
        continue
    rows[name] = {"dtype": entry["dtype"], "shape": entry["shape"], "sha256": hashlib.sha256(raw[8 + size + first:8 + size + end]).hexdigest()}
print("{\n" + ",\n".join(f"{json.dumps(n)}: {json.dumps(r)}" for n, r in rows.items()) + "\n}")
