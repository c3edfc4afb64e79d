#!/usr/bin/env python3
"""What each method of `lacuna compress` makes of each model: bytes, bits per byte, divergence, agreement, time.

    python3 tools/compress_table.py --models DIR,DIR --calibration TEXT --test TEXT [--specs "magnitude --sparsity 0.5;..."]

For every model and every line of flags it compresses into a folder that is removed again, scores the result against the model on
the test text (`eval kld`), and prints a row. Bytes are those of all weights in the form that Lacuna reads: bitmaps where zeros
make them smaller (computed from the counts of zeros in the lock), blocks for codes, the container for books. CPU time is user
time of `compress` alone. With --speed N every result is timed against the model in N runs of `bench` (each has both, one after the
other, `--new` tokens on `--threads` threads): tokens per second, and how much faster than the model, medians over the runs.
Models of some MB lie in the caches, so these say what arithmetic costs and little of what bytes save; on a busy machine only
the ratios are worth something. At the end it says, by model, in which order the methods of a kind stand, and for every result with
zeros the best one without in as many bytes or fewer.
"""
import argparse, json, os, pathlib, resource, statistics, subprocess, sys, tempfile

SPECS = """magnitude --sparsity 0.5
wanda --sparsity 0.5
sparsegpt --sparsity 0.5
sparsegpt --sparsity 0.5 --bits 4
rtn --bits 8
rtn --bits 4
gptq --bits 4
gptvq --bits 4
rtn --bits 3
gptq --bits 3
gptvq --bits 3
kmeans --bits 3
jlcm --bits 3
gptq --bits 2
gptvq --bits 2"""

ORDERS = [["sparsegpt --sparsity 0.5", "wanda --sparsity 0.5", "magnitude --sparsity 0.5"], ["gptq --bits 4", "rtn --bits 4"],
          ["gptq --bits 3", "rtn --bits 3"], ["gptvq --bits 3", "kmeans --bits 3"], ["jlcm --bits 3", "kmeans --bits 3"]]


def run(command):
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    return done, seconds


def packed(directory):
    """Bytes of the pieces of a container, by the places of their matrices."""
    path = pathlib.Path(directory, "model.lacuna")
    if not path.exists():
        return {}
    with open(path, "rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    return {n: t["data_offsets"][1] - t["data_offsets"][0] for n, t in header.items() if n != "__metadata__"}


def read_bytes(layer, pieces):
    """Bytes of one matrix in the smallest form that Lacuna reads it in."""
    n, zeros, bits = layer["outputs"] * layer["inputs"], layer["zeros"], layer["bits"]
    kept = n - zeros
    own = pieces.get(f"layers.{layer['layer']}.{layer['proj']}")
    if own is not None:
        return min(own, layer["bytes"][0])
    if bits is None:
        return min(layer["bytes"][1], n / 8 + layer["bytes"][1] / n * kept)
    if bits <= 4:
        return min(0.5625 * n, 0.1875 * n + 0.518 * kept)
    return min(1.0625 * n, 0.1875 * n + kept)


def weights(directory):
    files = sorted(pathlib.Path(directory).glob("*.safetensors"))
    total = 0
    for file in files:
        with open(file, "rb") as f:
            header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        total += sum(t["data_offsets"][1] - t["data_offsets"][0] for n, t in header.items() if n != "__metadata__")
    return total


def speeds(a, model, out):
    """Tokens per second, and those over the model's: medians of runs that have both."""
    found = []
    for _ in range(a.speed):
        command = [a.ours, "bench", "-m", f"{model},{out}", "-p", "0", "-n", str(a.new), "-r", "3", "-t", str(a.threads), "-o", "json", "--no-probe"]
        done, _ = run(command)
        if done.returncode:
            return None
        base, own = [r["avg_ts"] for r in json.loads(done.stdout)]
        found.append((own, own / base))
    return [statistics.median(f[i] for f in found) for i in range(2)]


def row(a, model, spec):
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "out")
        command = [a.ours, "compress", model, "--method", *spec.split(), "-f", a.calibration, "-n", str(a.tokens), "-t", str(a.threads), "-o", out]
        done, seconds = run(command)
        if done.returncode:
            return None, (done.stderr.strip().splitlines() or ["failed"])[-1]
        lock = json.load(open(os.path.join(out, "lacuna.lock.json")))
        pieces = packed(out)
        fixed = weights(model) - sum(l["bytes"][0] for l in lock["layers"])
        size = fixed + sum(read_bytes(l, pieces) for l in lock["layers"])
        if "lacuna_norm_width" in json.load(open(os.path.join(out, "config.json"))):
            # Shortcuts and a head of their own come on top of the matrices.
            size = weights(out)
        done, _ = run([a.ours, "eval", "kld", "-m", out, "--base", model, "-f", a.test, "-t", str(a.threads), "--json"])
        if done.returncode:
            return None, (done.stderr.strip().splitlines() or ["failed"])[-1]
        result = json.loads(done.stdout)
        speed = speeds(a, model, out) if a.speed else None
        sparse = any(2 * l["dropped"] > 0 for l in lock["layers"])
        return {"spec": spec, "bytes": round(size), "bits": result["test"]["bits_per_byte"], "base": result["base"]["bits_per_byte"],
                "kl": result["kld_mean"], "top": result["same_top"], "seconds": seconds, "sparse": sparse, "speed": speed}, None


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--ours", default="target/release/lacuna")
    ap.add_argument("--models", required=True)
    ap.add_argument("--calibration", required=True)
    ap.add_argument("--test", required=True)
    ap.add_argument("--specs", default=SPECS.replace("\n", ";"))
    ap.add_argument("--tokens", type=int, default=16384)
    ap.add_argument("--threads", type=int, default=1)
    ap.add_argument("--speed", type=int, default=0, metavar="N", help="runs of bench per result; 0: none")
    ap.add_argument("--new", type=int, default=128, help="tokens per test of bench")
    a = ap.parse_args()
    for model in a.models.split(","):
        rows = []
        name = pathlib.Path(model).name
        print(f"\n{name}: {weights(model):,} bytes", flush=True)
        more = [" tokens/s | x dense |", "---:|---:|"] if a.speed else ["", ""]
        print(f"| method | bytes read | bits/byte | KL | same top-1 | CPU time |{more[0]}\n|---|---:|---:|---:|---:|---:|{more[1]}", flush=True)
        for spec in a.specs.split(";"):
            found, problem = row(a, model, spec.strip())
            if not found:
                print(f"| `{spec}` | {problem} | | | | |", flush=True)
                continue
            rows.append(found)
            timed = " - | - |" if a.speed else ""
            if found["speed"]:
                timed = f" {found['speed'][0]:.0f} | {found['speed'][1]:.2f} |"
            print(f"| `{spec}` | {found['bytes']:,} | {found['bits']:.4f} | {found['kl']:.4f} | {100 * found['top']:.1f} % | {found['seconds']:.1f} s |" + timed, flush=True)
        if rows:
            print(f"without compression: {rows[0]['base']:.4f} bits/byte")
        by = {r["spec"]: r for r in rows}
        for order in ORDERS:
            there = [by[s] for s in order if s in by]
            holds = all(x["kl"] <= y["kl"] for x, y in zip(there, there[1:]))
            if len(there) > 1:
                print(f"{' <= '.join(r['spec'] for r in there)}: {'holds' if holds else 'DOES NOT HOLD'}")
        for r in (r for r in rows if r["sparse"]):
            dense = [d for d in rows if not d["sparse"] and d["bytes"] <= r["bytes"]]
            if dense:
                best = min(dense, key=lambda d: d["kl"])
                word = "beats it" if best["kl"] < r["kl"] else "does not"
                print(f"{r['spec']} (KL {r['kl']:.4f} in {r['bytes']:,}): dense {best['spec']} {word} (KL {best['kl']:.4f} in {best['bytes']:,})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
