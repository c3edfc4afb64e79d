#!/usr/bin/env python3
"""Scores PIQA and LAMBADA with EleutherAI's lm-evaluation-harness twice: through `lacuna serve` (local-completions) and in
process by transformers (hf), and compares every summed log-likelihood and the accuracies.

    pip install "lm-eval[hf,api]"
    python3 tools/check_lm_eval.py target/release/lacuna --model ../shared/models/lacuna-stories --data ../shared/data

The weights are written once more in f32, which both sides read, and keys and values are f32: bf16 weights would be
multiplied with activations in bf16 by the one and in f32 by the other (`--as-is` shows how much that is). Both sides are
told to begin with BOS, as their own rules differ. No network is used: the tasks are local files.
"""
import argparse, json, os, re, subprocess, sys, tempfile, time

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OPENAI_API_KEY", "none")

PIQA = """task: local_piqa
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{goal}}\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{[sol1, sol2]}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
metadata: {version: 1}
"""
LAMBADA = """task: local_lambada
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' ' + text.split(' ')[-1]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
metadata: {version: 1}
"""


def tasks(folder, data, limit):
    """Writes the slices and the task files."""
    lines = lambda path: [line for line in open(path, encoding="utf-8").read().split("\n") if line][:limit]
    labels = lines(f"{data}/piqa/valid-labels.lst")
    piqa = [dict(json.loads(q), label=int(a)) for q, a in zip(lines(f"{data}/piqa/valid.jsonl"), labels)]
    lambada = [json.loads(line) for line in lines(f"{data}/lambada/lambada_test.jsonl")]
    for name, items, form in [("piqa", piqa, PIQA), ("lambada", lambada, LAMBADA)]:
        path = f"{folder}/{name}.jsonl"
        with open(path, "w", encoding="utf-8") as out:
            out.writelines(json.dumps(item) + "\n" for item in items)
        with open(f"{folder}/{name}.yaml", "w", encoding="utf-8") as out:
            out.write(form % json.dumps(path))


def widened(model, folder):
    """The model in f32, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


class Server:
    def __init__(self, program, model, threads):
        command = [program, "serve", model, "--port", "0", "--alias", "model", "-t", str(threads), "--kv", "f32"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        for line in self.process.stderr:
            found = re.search(r"http://([0-9.:]+)/", line)
            if found:
                self.address = found[1]
                return
        sys.exit("the server did not start")

    def stop(self):
        self.process.terminate()
        self.process.wait(60)


def run(kind, arguments, folder, batch):
    import lm_eval
    from lm_eval.tasks import TaskManager

    start = time.time()
    results = lm_eval.simple_evaluate(
        model=kind, model_args=arguments, tasks=["local_piqa", "local_lambada"], batch_size=batch, device="cpu",
        task_manager=TaskManager(include_path=folder, include_defaults=False), log_samples=True, bootstrap_iters=0,
    )
    sums, accuracy = {}, {}
    for task, samples in results["samples"].items():
        accuracy[task] = results["results"][task]["acc,none"]
        for sample in samples:
            for i, response in enumerate(sample["resps"]):
                likelihood, greedy = response[0][:2]
                sums[task, sample["doc_id"], i] = (float(likelihood), str(greedy) == "True")
    return sums, accuracy, time.time() - start


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("program")
    args.add_argument("--model", required=True)
    args.add_argument("--data", required=True)
    args.add_argument("--limit", type=int, default=100, help="items per task")
    args.add_argument("--threads", type=int, default=2)
    args.add_argument("--as-is", action="store_true", help="the model's own weights, not a copy in f32")
    args = args.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tasks(folder, os.path.abspath(args.data), args.limit)
        model = args.model if args.as_is else widened(args.model, f"{folder}/f32")
        context = json.load(open(f"{model}/config.json"))["max_position_embeddings"]
        want, accuracy, took = run("hf", {"pretrained": model, "dtype": "float32", "add_bos_token": True}, folder, 1)
        print(f"{len(want)} log-likelihoods by transformers in {took:.1f} s")
        print("| batch | concurrent | largest difference | greedy flags that differ | PIQA acc | LAMBADA acc | seconds |")
        print("|---:|---:|---:|---:|---:|---:|---:|")
        row = lambda *cells: print("| " + " | ".join(str(c) for c in cells) + " |", flush=True)
        row("-", "transformers", "-", "-", accuracy["local_piqa"], accuracy["local_lambada"], f"{took:.1f}")
        server, bad = Server(args.program, model, args.threads), False
        try:
            for batch, concurrent in [(1, 1), (8, 1), (1, 4), (8, 4)]:
                arguments = {
                    "model": "model", "base_url": f"http://{server.address}/v1/completions", "tokenizer": model,
                    "tokenizer_backend": "huggingface", "num_concurrent": concurrent, "max_length": context,
                    "max_retries": 3, "add_bos_token": True,
                }
                got, ours, took = run("local-completions", arguments, folder, batch)
                key = max(want, key=lambda key: abs(got[key][0] - want[key][0]))
                worst = abs(got[key][0] - want[key][0])
                flags = sum(got[key][1] != want[key][1] for key in want)
                bad |= worst > 1e-3 or ours != accuracy or got.keys() != want.keys()
                if worst > 1e-3:
                    print(f"{key}: {got[key][0]} is not {want[key][0]}", file=sys.stderr)
                row(batch, concurrent, f"{worst:.2e}", flags, ours["local_piqa"], ours["local_lambada"], f"{took:.1f}")
        finally:
            server.stop()
    sys.exit("the two disagree" if bad and not args.as_is else 0)


if __name__ == "__main__":
    main()
