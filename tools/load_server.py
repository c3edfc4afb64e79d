#!/usr/bin/env python3
"""Loads `lacuna serve` from another process, and checks that nobody gets a wrong answer and that memory stays where it is.

    python3 tools/load_server.py target/release/lacuna [MODE] [--model MODEL] [-t 2] [--parallel 8] ...

    clients  many requests at once, each compared with the answer it gets alone; refused ones (503) are sent again, and
             another process beside them times its own refusals [--clients 200] [--rounds 6] [--tokens 16]
    leave    clients that leave at random times, then the blocks and the memory that are still in use [--clients 3000]
    idle     open sockets, half of them with half a head, beside which requests are timed [--sockets 10000]
    overhead one stream beside `lacuna bench`, in turns: tokens/s, and CPU seconds per token of both programs
             [--rounds 6] [--tokens 16]
    soak     clients of all kinds that come, go and leave for some minutes: the curve of memory, files and answers
             [--minutes 5]
"""
import argparse, asyncio, json, multiprocessing, os, queue, random, re, resource, socket, statistics, subprocess, sys, time


class Refused(Exception):
    """503."""


async def send(address, body, path="/v1/completions"):
    """A connection that has sent its request."""
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    data = b"" if body is None else json.dumps(body).encode()
    method = "GET" if body is None else "POST"
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    return reader, writer


def joined(data):
    """A body that came in chunks."""
    whole = b""
    while data:
        size, data = data.split(b"\r\n", 1)
        whole, data = whole + data[:int(size, 16)], data[int(size, 16) + 2:]
    return whole


async def ask(address, body, path="/v1/completions"):
    """The text of an answer, and the seconds it took."""
    start = time.perf_counter()
    reader, writer = await send(address, body, path)
    answer = await reader.read()
    writer.close()
    head, text = answer.split(b"\r\n\r\n", 1)
    took = time.perf_counter() - start
    if b" 503 " in head.split(b"\r\n")[0]:
        if b"retry-after" not in head.lower():
            raise RuntimeError("a 503 without Retry-After")
        raise Refused(took)
    if b" 200 " not in head.split(b"\r\n")[0]:
        raise RuntimeError(answer[:300].decode(errors="replace"))
    if b"transfer-encoding: chunked" in head.lower():
        text = joined(text)
    return text.decode(), took


async def complete(address, body):
    """The text of a completion, and the seconds it took."""
    text, took = await ask(address, body)
    return json.loads(text)["choices"][0]["text"], took


async def metric(address, name):
    text, _ = await ask(address, None, "/metrics")
    return int(re.search(rf"^{name} (\d+)$", text, re.M)[1])


def resident(pid):
    """Resident memory in MiB, and open files."""
    status = open(f"/proc/{pid}/status").read()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024, len(os.listdir(f"/proc/{pid}/fd"))


def body(args, i):
    word = ["red", "small", "old", "happy", "brave"][i % 5]
    return {
        "prompt": f"Story {i}: the {word} dog number {i * 37} went", "max_tokens": args.tokens, "seed": i,
        "temperature": 0 if i % 2 else 1, "ignore_eos": True,
    }


def prober(address, stop, found):
    """Asks every 20 ms and notes how long refusals take. It has a process of its own: the clients keep theirs busy."""
    host, port = address.split(":")
    data = json.dumps({"prompt": "Once", "max_tokens": 1}).encode()
    request = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data
    while not stop.is_set():
        with socket.create_connection((host, int(port))) as s:
            s.sendall(request)
            start = time.perf_counter()
            if b" 503 " in s.recv(100).split(b"\r\n")[0]:
                found.put(time.perf_counter() - start)
        time.sleep(0.02)


async def clients(args, address, pid):
    alone = [(await complete(address, body(args, i)))[0] for i in range(args.clients)]
    refusals = []
    stop, found = multiprocessing.Event(), multiprocessing.Queue()
    beside = multiprocessing.Process(target=prober, args=(address, stop, found), daemon=True)
    beside.start()

    async def until_answered(i):
        while True:
            try:
                return await complete(address, body(args, i))
            except Refused as refusal:
                refusals.append(refusal.args[0])
                await asyncio.sleep(0.5 + random.random())

    print("| round | answers | different | refused first | tokens/s | median s | p99 s | resident MiB | open files |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    wrong, sizes = 0, []
    for n in range(args.rounds):
        start, before = time.perf_counter(), len(refusals)
        answers = await asyncio.gather(*(until_answered(i) for i in range(args.clients)))
        took = time.perf_counter() - start
        different = sum(text != want for (text, _), want in zip(answers, alone))
        wrong += different
        times = sorted(seconds for _, seconds in answers)
        size, files = resident(pid)
        sizes.append(size)
        rate = args.clients * args.tokens / took
        p99 = times[int(len(times) * 0.99)]
        print(f"| {n + 1} | {len(answers)} | {different} | {len(refusals) - before} | {rate:.0f} | {statistics.median(times):.2f} | "
              f"{p99:.2f} | {size:.1f} | {files} |", flush=True)
    stop.set()
    times = []
    while beside.is_alive() or not found.empty():
        try:
            times.append(found.get(timeout=0.1) * 1e3)
        except queue.Empty:
            pass
    times.sort()
    fast = True
    if times:
        p99 = times[int(len(times) * 0.99)]
        print(f"{len(times)} refusals of the process beside: median {statistics.median(times):.1f} ms, p99 {p99:.1f} ms, most {times[-1]:.1f} ms")
        fast = p99 < 50
    # In the first third every thread meets its largest load, of which the allocator keeps the room.
    third = len(sizes) // 3
    grown = max(sizes[-third:]) / max(sizes[-2 * third:-third]) - 1
    print(f"memory, the last third of the rounds against the one before: {grown * 100:+.2f} %")
    return wrong == 0 and grown < 0.03 and fast


async def leaver(args, address, i):
    """Sends a request and leaves before it is answered."""
    wanted = {**body(args, i), "prompt": "Once upon a time. " * (1 + i % 50), "max_tokens": 200, "stream": i % 2 == 0, "n": 1 + i % 3}
    reader, writer = await send(address, wanted)
    await asyncio.sleep(random.random() * 0.2)
    if i % 4 == 0:
        await reader.read(200)
    writer.close()


async def quiet(address):
    """Seconds until nothing runs and no block is in use."""
    start = time.perf_counter()
    while any([await metric(address, f"lacuna_{n}") for n in ("requests_running", "requests_waiting", "kv_blocks_used")]):
        if time.perf_counter() - start > 30:
            return None
        await asyncio.sleep(0.01)
    return time.perf_counter() - start


async def leave(args, address, pid):
    print("| clients that left | cancelled | seconds to zero blocks | resident MiB | open files |\n|---:|---:|---:|---:|---:|", flush=True)
    sizes = []
    for n in range(5):
        each = range(n * args.clients // 5, (n + 1) * args.clients // 5)
        for some in range(0, len(each), 50):
            await asyncio.gather(*(leaver(args, address, i) for i in each[some:some + 50]))
        took = await quiet(address)
        size, files = resident(pid)
        sizes.append(size)
        cancelled = await metric(address, "lacuna_requests_cancelled_total")
        print(f"| {each[-1] + 1} | {cancelled} | {took if took is None else round(took, 3)} | {size:.1f} | {files} |", flush=True)
        if took is None:
            return False
    return max(sizes[2:]) / max(sizes[:2]) < 1.05


async def idle(args, address, pid):
    async def times():
        all = sorted([(await complete(address, {**body(args, i), "max_tokens": 4}))[1] for i in range(200)])
        return statistics.median(all) * 1e3, all[int(len(all) * 0.99)] * 1e3

    host, port = address.split(":")
    print("| idle sockets | median ms | p99 ms | resident MiB | open files |\n|---:|---:|---:|---:|---:|", flush=True)
    await times()
    before = await times()
    print(f"| 0 | {before[0]:.1f} | {before[1]:.1f} | {resident(pid)[0]:.1f} | {resident(pid)[1]} |", flush=True)
    sockets = []
    for i in range(args.sockets):
        reader, writer = await asyncio.open_connection(host, int(port))
        if i % 2:
            writer.write(b"POST /v1/completions HTTP/1.1\r\nHo")
        sockets.append(writer)
    beside = await times()
    print(f"| {len(sockets)} | {beside[0]:.1f} | {beside[1]:.1f} | {resident(pid)[0]:.1f} | {resident(pid)[1]} |", flush=True)
    for writer in sockets:
        writer.close()
    return beside[1] < 2 * before[1]


def cpu_seconds(pid):
    fields = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def overhead(args, address, pid):
    bench = [args.program, "bench", *(["-m", args.model] if args.model else []), "-t", str(args.threads), "-p", "0", "-n", str(args.tokens)]
    wanted = {"prompt": "Once", "max_tokens": args.tokens, "temperature": 0, "ignore_eos": True, "stream": True}

    def benched(repetitions):
        before = os.times()
        out = subprocess.run([*bench, "-r", str(repetitions), "--no-probe", "-o", "jsonl"], capture_output=True, text=True, check=True)
        after = os.times()
        used = after.children_user + after.children_system - before.children_user - before.children_system
        return json.loads(out.stdout)["samples_ts"], used

    async def streamed():
        used = cpu_seconds(pid)
        reader, writer = await send(address, wanted)
        await reader.readuntil(b"data: ")
        start = time.perf_counter()
        rest = await reader.read()
        took = time.perf_counter() - start
        writer.close()
        if b"[DONE]" not in rest:
            raise RuntimeError(rest[:300].decode(errors="replace"))
        # The first token comes with the prompt's pass.
        return (args.tokens - 1) / took, (cpu_seconds(pid) - used) / args.tokens

    await streamed()
    print("| pair | bench tokens/s | server tokens/s | CPU ms per token: bench | server |\n|---:|---:|---:|---:|---:|", flush=True)
    speeds, costs = [], []
    for n in range(args.rounds):
        # The difference of two runs is without loading the model.
        (few, short), (many, long) = benched(1), benched(5)
        fast, cost = max(few + many), (long - short) / 4 / args.tokens
        rounds = [await streamed() for _ in range(6)]
        speed, ours = max(r[0] for r in rounds), sum(r[1] for r in rounds) / len(rounds)
        speeds.append(fast / speed - 1)
        costs.append(ours / cost - 1)
        print(f"| {n + 1} | {fast:.2f} | {speed:.2f} | {cost * 1e3:.3f} | {ours * 1e3:.3f} |", flush=True)
    print(f"median overhead: {statistics.median(speeds) * 100:+.1f} % of time, {statistics.median(costs) * 100:+.1f} % of CPU time")
    return statistics.median(speeds) < 0.03


def mixed(args, i):
    """The path and the body of one of many kinds of requests."""
    plain, said = body(args, i), [{"role": "user", "content": f"Tell me of dog number {i}."}]
    schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 9}}, "required": ["name"]}
    return [
        ("/v1/completions", plain),
        ("/v1/completions", {**plain, "stream": True, "n": 2, "stop": ["."]}),
        ("/v1/completions", {**plain, "echo": True, "logprobs": 2, "max_tokens": i % 3}),
        ("/v1/completions", {**plain, "prompt": "Once upon a time. " * (10 + i)}),
        ("/v1/chat/completions", {"messages": said, "max_tokens": args.tokens, "seed": i, "stream": i % 2 == 0}),
        ("/v1/chat/completions", {"messages": said, "max_tokens": args.tokens, "seed": i, "json_schema": schema}),
        ("/v1/embeddings", {"input": [f"dog {i}", "The sun was warm."]}),
        ("/tokenize", {"prompt": "The sun was warm. " * i}),
    ][i % 8]


def stable(text):
    """What of an answer depends on the request alone."""
    if not text.startswith("data: "):
        return {k: v for k, v in json.loads(text).items() if k not in ("id", "created", "timings", "usage")}
    # How a text is cut into events depends on the clock.
    events, texts = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")], {}
    for choice in (c for event in events for c in event["choices"]):
        piece = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
        texts[choice["index"]] = texts.get(choice["index"], "") + piece
    return texts


async def refused(address, i):
    """Whether a bad body is refused as such."""
    bad = [{"prompt": 3}, {"prompt": "a", "n": 1000}, {"prompt": "word " * 100_000}, {"prompt": "a", "json_schema": {"type": "x"}}][i % 4]
    try:
        await ask(address, bad)
    except Refused:
        return True
    except RuntimeError as problem:
        return " 400 " in str(problem)
    return False


async def soak(args, address, pid):
    answered, left, bad, wrong = 0, 0, 0, 0
    alone = {}
    for i in range(48):
        path, wanted = mixed(args, i)
        alone[i] = stable((await ask(address, wanted, path))[0])
    stop = time.perf_counter() + args.minutes * 60

    async def client(which):
        nonlocal answered, left, bad, wrong
        draw = random.Random(which)
        while time.perf_counter() < stop:
            i, kind = draw.randrange(48), draw.random()
            if kind < 0.1:
                await leaver(args, address, i)
                left += 1
            elif kind < 0.15:
                wrong += not await refused(address, i)
                bad += 1
            else:
                try:
                    path, wanted = mixed(args, i)
                    wrong += stable((await ask(address, wanted, path))[0]) != alone[i]
                    answered += 1
                except Refused:
                    await asyncio.sleep(0.5)

    async def watch():
        print("| seconds | answered | refused as bad | different | left | resident MiB | open files |\n|---:|---:|---:|---:|---:|---:|---:|", flush=True)
        begin, sizes = time.perf_counter(), []
        while time.perf_counter() < stop - 1:
            await asyncio.sleep(args.minutes * 60 / 10 - 0.05)
            size, files = resident(pid)
            sizes.append(size)
            print(f"| {time.perf_counter() - begin:.0f} | {answered} | {bad} | {wrong} | {left} | {size:.1f} | {files} |", flush=True)
        return sizes

    sizes, *_ = await asyncio.gather(watch(), *(client(i) for i in range(args.at_once)))
    # The first three tenths are for caches and for what the allocator keeps of the busiest moment.
    growth = max(sizes[7:]) / max(sizes[3:7]) - 1
    print(f"memory, the last three tenths against the four before: {growth * 100:+.2f} %")
    return wrong == 0 and growth < 0.01


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("program")
    args.add_argument("mode", nargs="?", default="clients", choices=["clients", "leave", "idle", "overhead", "soak"])
    args.add_argument("--model")
    args.add_argument("--clients", type=int)
    args.add_argument("--rounds", type=int, default=6)
    args.add_argument("--tokens", type=int, default=16)
    args.add_argument("--sockets", type=int, default=10_000)
    args.add_argument("--minutes", type=float, default=5)
    args.add_argument("--at-once", type=int, default=24, help="clients of the soak")
    args.add_argument("-t", "--threads", type=int, default=2)
    args.add_argument("--parallel", type=int, default=8)
    args = args.parse_args()
    if args.mode == "clients" and args.rounds < 3:
        sys.exit("--rounds: at least 3, as memory is judged by thirds")
    args.clients = args.clients or {"leave": 3000}.get(args.mode, 200)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    command = [args.program, "serve", *([args.model] if args.model else []), "--port", "0", "-t", str(args.threads)]
    command += ["--parallel", str(args.parallel), *(["--prefix-cache", "0"] if args.mode == "leave" else [])]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    address = next((found[1] for line in server.stderr if (found := re.search(r"http://([0-9.:]+)/", line))), None)
    if address is None:
        sys.exit("the server did not start")
    try:
        good = asyncio.run({"clients": clients, "leave": leave, "idle": idle, "overhead": overhead, "soak": soak}[args.mode](args, address, server.pid))
    finally:
        server.terminate()
        server.wait(60)
    sys.exit(0 if good else f"{args.mode}: not as it should be")


if __name__ == "__main__":
    main()
