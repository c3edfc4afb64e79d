#!/usr/bin/env python3
"""Times Lacuna against llama.cpp's llama-bench on the same GGUF files, interleaved.

Shared machines drift within minutes, so one run of A and then one of B says nothing. This script runs A B A B ...
for each cell (file, test, threads) and reports the median of each and the median of the pairwise ratios; a
streaming-read probe runs before and after.

    python3 tools/compare.py --peer PATH/llama-bench --models a.gguf,b.gguf \
        --tests tg64,tg32@d4096,pp512 --threads 1,2 --rounds 5 [--peer-args "--repack 0"] [--ours-args "--sparse relu"] [--json OUT]
"""
import argparse, json, os, re, shlex, statistics, subprocess, sys

TEST = re.compile(r"^(pp|tg)(\d+)(?:@d(\d+))?$")


def once(cmd, env=None):
    """tokens/s of the only row that the command prints."""
    done = subprocess.run(cmd, capture_output=True, text=True, env=env)
    rows = [json.loads(l) for l in done.stdout.splitlines() if l.startswith("{")]
    if done.returncode or not rows:
        sys.exit(f"{shlex.join(cmd)} failed ({done.returncode}):\n{done.stderr[-2000:]}")
    return statistics.median(rows[-1]["samples_ts"])


def arguments(test, file, threads):
    kind, n, depth = TEST.match(test).groups()
    p, g = (n, "0") if kind == "pp" else ("0", n)
    return ["-m", file, "-p", p, "-n", g, "-d", depth or "0", "-t", str(threads), "-r", "1", "-o", "jsonl"]


def probe(ours):
    out = json.loads(subprocess.run([ours, "doctor", "--json"], capture_output=True, text=True, check=True).stdout)
    return {str(p["threads"]) + " threads": round(p["stream_gb_per_s"], 1) for p in out["probes"]}


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--ours", default="target/release/lacuna")
    ap.add_argument("--peer", required=True, help="llama-bench")
    ap.add_argument("--models", required=True)
    ap.add_argument("--tests", default="tg64,pp512")
    ap.add_argument("--threads", default="2")
    ap.add_argument("--rounds", type=int, default=5)
    ap.add_argument("--ours-args", default="")
    ap.add_argument("--peer-args", default="")
    ap.add_argument("--isa", help="LACUNA_ISA for our runs")
    ap.add_argument("--json", help="also write the cells here")
    a = ap.parse_args()
    env = dict(os.environ, **({"LACUNA_ISA": a.isa} if a.isa else {}))
    print("probe before:", json.dumps(probe(a.ours)), flush=True)
    print("| file | test | threads | Lacuna t/s | llama.cpp t/s | ratio (median of pairs) | min-max |")
    print("| --- | --- | ---: | ---: | ---: | ---: | --- |", flush=True)
    cells = []
    for file in a.models.split(","):
        for test in a.tests.split(","):
            for threads in map(int, a.threads.split(",")):
                args = arguments(test, file, threads)
                mine, theirs = [], []
                for _ in range(a.rounds):
                    mine.append(once([a.ours, "bench", "--no-probe", *args, *shlex.split(a.ours_args)], env))
                    theirs.append(once([a.peer, *args, *shlex.split(a.peer_args)]))
                ratios = [x / y for x, y in zip(mine, theirs)]
                cell = dict(file=os.path.basename(file), test=test, threads=threads, ours=mine, peer=theirs, ratio=statistics.median(ratios))
                cells.append(cell)
                print(f"| {cell['file']} | {test} | {threads} | {statistics.median(mine):.2f} | {statistics.median(theirs):.2f} "
                      f"| {cell['ratio']:.2f} | {min(ratios):.2f}-{max(ratios):.2f} |", flush=True)
    print("probe after:", json.dumps(probe(a.ours)), flush=True)
    if a.json:
        with open(a.json, "w") as f:
            json.dump(cells, f, indent=1)


if __name__ == "__main__":
    main()
