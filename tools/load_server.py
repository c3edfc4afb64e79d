#!/usr/bin/env python3
"""Sends the requests of many clients at once to `lacuna serve` and checks that each gets what it gets alone, and that the
server's memory stays where it is.

    python3 tools/load_server.py target/release/lacuna [--model MODEL] [--clients 200] [--rounds 5] [--tokens 16] [-t 2]

Clients are another process than the server; prompts differ from client to client and repeat from round to round.
"""
import argparse, asyncio, json, re, statistics, subprocess, sys, time


async def ask(address, body):
    """The text of a completion, and the seconds it took."""
    start = time.perf_counter()
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    answer = await reader.read()
    writer.close()
    head, text = answer.split(b"\r\n\r\n", 1)
    if b" 200 " not in head.split(b"\r\n")[0]:
        raise RuntimeError(answer[:300].decode(errors="replace"))
    return json.loads(text)["choices"][0]["text"], time.perf_counter() - start


def resident(pid):
    """Resident memory in MiB, and open files."""
    import os

    status = open(f"/proc/{pid}/status").read()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024, len(os.listdir(f"/proc/{pid}/fd"))


async def rounds(args, address, pid):
    word = lambda i: ["red", "small", "old", "happy", "brave"][i % 5]
    body = lambda i: {
        "prompt": f"Story {i}: the {word(i)} dog number {i * 37} went", "max_tokens": args.tokens, "seed": i,
        "temperature": 0 if i % 2 else 1, "ignore_eos": True,
    }
    alone = [(await ask(address, body(i)))[0] for i in range(args.clients)]
    print("| round | answers | different | tokens/s | median s | p99 s | resident MiB | open files |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    wrong, sizes = 0, []
    for n in range(args.rounds):
        start = time.perf_counter()
        answers = await asyncio.gather(*(ask(address, body(i)) for i in range(args.clients)))
        took = time.perf_counter() - start
        different = sum(text != want for (text, _), want in zip(answers, alone))
        wrong += different
        times = sorted(seconds for _, seconds in answers)
        size, files = resident(pid)
        sizes.append(size)
        rate = args.clients * args.tokens / took
        p99 = times[int(len(times) * 0.99)]
        print(f"| {n + 1} | {len(answers)} | {different} | {rate:.0f} | {statistics.median(times):.2f} | {p99:.2f} | {size:.1f} | {files} |", flush=True)
    growth = sizes[-1] / sizes[0] - 1
    print(f"memory from the first round to the last: {growth * 100:+.2f} %")
    return wrong == 0 and growth < 0.05


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("program")
    args.add_argument("--model")
    args.add_argument("--clients", type=int, default=200)
    args.add_argument("--rounds", type=int, default=5)
    args.add_argument("--tokens", type=int, default=16)
    args.add_argument("-t", "--threads", type=int, default=2)
    args.add_argument("--parallel", type=int, default=8)
    args = args.parse_args()
    command = [args.program, "serve", *([args.model] if args.model else []), "--port", "0", "-t", str(args.threads)]
    server = subprocess.Popen(command + ["--parallel", str(args.parallel)], stderr=subprocess.PIPE, text=True)
    address = next((found[1] for line in server.stderr if (found := re.search(r"http://([0-9.:]+)/", line))), None)
    if address is None:
        sys.exit("the server did not start")
    try:
        good = asyncio.run(rounds(args, address, server.pid))
    finally:
        server.terminate()
        server.wait(60)
    sys.exit(0 if good else "lost or mixed answers, or memory that grows")


if __name__ == "__main__":
    main()
