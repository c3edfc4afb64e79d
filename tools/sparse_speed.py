#!/usr/bin/env python3
"""Decode speed of sparse plans against the ideal ratio of bytes, dense and sparse in turns.

For each file and plan it runs `lacuna bench` dense, sparse, dense, sparse, ... and reports the medians, the median of the
pairwise speed-ups, and what share that is of the ideal one: dense bytes over bytes read, everything counted.

    python3 tools/sparse_speed.py --models a.gguf,b.gguf --plans teal=0.4,teal=0.5 [--threads 2] [--rounds 3] [-n 32]

A plan that needs a calibration must have one beside the model (`lacuna calibrate`). Plans that do not fit a model are skipped.
"""
import argparse, json, os, statistics, subprocess, sys


def once(ours, file, threads, n, plan):
    args = [ours, "bench", "--no-probe", "-m", file, "-p", "0", "-n", str(n), "-t", str(threads), "-r", "1", "-o", "jsonl"]
    done = subprocess.run(args + (["--sparse", plan] if plan else []), capture_output=True, text=True)
    rows = [json.loads(l) for l in done.stdout.splitlines() if l.startswith("{")]
    if done.returncode or not rows:
        return None, done.stderr.strip().splitlines()[-1:]
    return rows[-1]["avg_ts"], rows[-1]["bytes_per_token"]


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--ours", default="target/release/lacuna")
    ap.add_argument("--models", required=True)
    ap.add_argument("--plans", required=True)
    ap.add_argument("--threads", default="2")
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("-n", type=int, default=32)
    a = ap.parse_args()
    print("| file | plan | threads | bytes read | dense t/s | sparse t/s | speed-up (min-max) | ideal | of ideal |")
    print("| --- | --- | ---: | ---: | ---: | ---: | --- | ---: | ---: |", flush=True)
    for file in a.models.split(","):
        for plan in a.plans.split(","):
            for threads in a.threads.split(","):
                dense, sparse, bytes_ = [], [], []
                for _ in range(a.rounds):
                    d, all_bytes = once(a.ours, file, threads, a.n, None)
                    s, read = once(a.ours, file, threads, a.n, plan)
                    if d is None or s is None:
                        print(f"{os.path.basename(file)} {plan}: {all_bytes if d is None else read}", file=sys.stderr)
                        break
                    dense.append(d), sparse.append(s), bytes_.append((all_bytes, read))
                if not sparse:
                    continue
                ratios = sorted(s / d for s, d in zip(sparse, dense))
                ideal = statistics.median(x / y for x, y in bytes_)
                gain = statistics.median(ratios)
                print(f"| {os.path.basename(file)} | `{plan}` | {threads} | {100 / ideal:.1f} % | {statistics.median(dense):.2f} "
                      f"| {statistics.median(sparse):.2f} | {gain:.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f}) | {ideal:.2f} "
                      f"| {gain / ideal:.2f} |", flush=True)


if __name__ == "__main__":
    main()
