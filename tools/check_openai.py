#!/usr/bin/env python3
"""The official `openai` client against `lacuna serve`: prints a transcript, exits 1 if anything is not as a client expects.

    pip install openai
    lacuna serve --port 8080 &
    tools/check_openai.py http://127.0.0.1:8080 [API_KEY]
"""

import json
import sys

import openai

base = sys.argv[1].rstrip("/") if len(sys.argv) > 1 else "http://127.0.0.1:8080"
key = sys.argv[2] if len(sys.argv) > 2 else "none"
client = openai.OpenAI(base_url=f"{base}/v1", api_key=key, max_retries=0, timeout=120)
failures = []


def check(name, good, shown=""):
    print(f"{'ok  ' if good else 'FAIL'} {name}{': ' if shown else ''}{shown}", flush=True)
    if not good:
        failures.append(name)


def refused(name, kind, call):
    try:
        call()
    except kind as e:
        body = e.body if isinstance(e.body, dict) else {}
        check(name, bool(body.get("message")), f"{e.status_code} {body.get('code')}: {body.get('message')}")
    else:
        check(name, False, "was answered")


models = [m.id for m in client.models.list()]
check("models", len(models) >= 1, ", ".join(models))
model = models[0]
check("one model", client.models.retrieve(model).id == model)
hello = [{"role": "user", "content": "Once upon a time"}]
common = {"model": model, "messages": hello, "max_tokens": 24, "temperature": 0, "seed": 1}

print("\n# Completions")
r = client.completions.create(model=model, prompt="Once upon a time", max_tokens=24, temperature=0)
check("text", len(r.choices[0].text) > 0 and r.usage.completion_tokens > 0, repr(r.choices[0].text))
whole = r.choices[0].text
parts = list(client.completions.create(model=model, prompt="Once upon a time", max_tokens=24, temperature=0, stream=True))
check("the stream is the same text", "".join(c.choices[0].text for c in parts if c.choices) == whole)
r = client.completions.create(model=model, prompt=["Tom had a", "Lily saw a"], max_tokens=4, n=2, seed=3)
check("two prompts, two answers each", [c.index for c in r.choices] == [0, 1, 2, 3])
r = client.completions.create(model=model, prompt="Tom had a dog", max_tokens=1, echo=True, logprobs=2, temperature=0)
lp = r.choices[0].logprobs
check("log-probabilities of the prompt", lp.token_logprobs[0] is None and len(lp.tokens) == len(lp.token_logprobs) > 2,
      f"{len(lp.tokens)} tokens")
r = client.completions.create(model=model, prompt="Once upon a time", max_tokens=60, temperature=0, stop=["."])
check("a stop string", "." not in r.choices[0].text and r.choices[0].finish_reason == "stop", repr(r.choices[0].text))

print("\n# Chat")
r = client.chat.completions.create(**common)
check("answer", r.choices[0].message.role == "assistant" and r.choices[0].message.content is not None,
      repr(r.choices[0].message.content))
whole = r.choices[0].message.content
chunks = list(client.chat.completions.create(**common, stream=True, stream_options={"include_usage": True}))
text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
check("the stream is the same text", text == whole, f"{len(chunks)} chunks")
check("the role comes first", chunks[0].choices[0].delta.role == "assistant")
check("a reason to end", any(c.choices and c.choices[0].finish_reason for c in chunks))
check("usage at the end", chunks[-1].usage is not None and chunks[-1].choices == [], str(chunks[-1].usage and chunks[-1].usage.completion_tokens))
r = client.chat.completions.create(**common, logprobs=True, top_logprobs=3)
lp = r.choices[0].logprobs.content
check("log-probabilities", len(lp) > 0 and all(len(t.top_logprobs) >= 3 for t in lp) and all(t.logprob <= 0 for t in lp),
      f"{lp[0].token!r} {lp[0].logprob:.3f}")
with client.chat.completions.create(**{**common, "max_tokens": 200}, stream=True) as stream:
    next(iter(stream))
check("leaving a stream early does no harm", client.models.list() is not None)

print("\n# Structured output")
schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 99},
          "kind": {"enum": ["cat", "dog"]}}, "required": ["name", "age", "kind"], "additionalProperties": False}
r = client.chat.completions.create(**{**common, "max_tokens": 120, "temperature": 1}, response_format={
    "type": "json_schema", "json_schema": {"name": "pet", "strict": True, "schema": schema}})
said = r.choices[0].message.content
try:
    pet = json.loads(said)
    check("json_schema", set(pet) == {"name", "age", "kind"} and 0 <= pet["age"] <= 99 and pet["kind"] in ("cat", "dog"), said)
except ValueError:
    check("json_schema", False, repr(said))
r = client.chat.completions.create(**{**common, "max_tokens": 200}, response_format={"type": "json_object"})
said, reason = r.choices[0].message.content, r.choices[0].finish_reason
check("json_object", said.lstrip().startswith("{") and (reason == "length" or isinstance(json.loads(said), dict)), f"{said[:80]!r} ({reason})")
r = client.chat.completions.create(**common, extra_body={"grammar": 'root ::= "yes" | "no"'})
check("grammar", r.choices[0].message.content in ("yes", "no"), r.choices[0].message.content)

print("\n# Tools")
tool = {"type": "function", "function": {"name": "weather", "description": "The weather of a city.", "parameters": {
    "type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"], "additionalProperties": False}}}
other = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}}
for name, choice in [("required", "required"), ("a function", {"type": "function", "function": {"name": "weather"}})]:
    r = client.chat.completions.create(**{**common, "max_tokens": 80}, tools=[tool, other], tool_choice=choice)
    calls = r.choices[0].message.tool_calls or []
    good = len(calls) == 1 and calls[0].function.name in ("weather", "time") and isinstance(json.loads(calls[0].function.arguments), dict)
    check(f"tool_choice: {name}", good and r.choices[0].finish_reason == "tool_calls",
          ", ".join(f"{c.function.name}({c.function.arguments})" for c in calls))
    if name == "a function" and good:
        turn = [*hello, r.choices[0].message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": calls[0].id, "content": "sunny"}]
        r = client.chat.completions.create(**{**common, "messages": turn}, tools=[tool])
        check("the result goes back", r.choices[0].finish_reason is not None, repr(r.choices[0].message.content))
stream = client.chat.completions.create(**{**common, "max_tokens": 80}, tools=[tool], tool_choice="required", stream=True)
names, arguments, reason, parts = "", "", None, 0
for chunk in stream:
    for call in chunk.choices[0].delta.tool_calls or []:
        names += call.function.name or ""
        arguments += call.function.arguments or ""
        parts += bool(call.function.arguments)
    reason = chunk.choices[0].finish_reason or reason
check("streamed call", names == "weather" and json.loads(arguments)["city"] in ("Paris", "Rome") and reason == "tool_calls", f"{names}({arguments})")
check("its arguments come as they are written", parts > 2, f"{parts} deltas")
r = client.chat.completions.create(**common, tools=[tool], tool_choice="none")
check("tool_choice: none", not r.choices[0].message.tool_calls)

print("\n# Embeddings")
for form in ("float", "base64"):
    r = client.embeddings.create(model=model, input=["a small fox", "a little fox", "the bank of England"], encoding_format=form)
    v = r.data[0].embedding
    check(form, len(r.data) == 3 and len(v) > 0, f"{len(v)} numbers")

print("\n# Errors")
bad, ask = openai.BadRequestError, client.chat.completions.create
refused("temperature", bad, lambda: ask(**{**common, "temperature": -3}))
refused("n", bad, lambda: ask(**common, n=1000))
refused("no messages", bad, lambda: ask(model=model, messages=[]))
refused("too long", bad, lambda: ask(**{**common, "messages": [{"role": "user", "content": "word " * 100000}]}))
refused("unknown model", openai.NotFoundError, lambda: ask(**{**common, "model": "gpt-9"}))
refused("a schema that is none", bad, lambda: ask(**common, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strin"}}}))
refused("a tool that is not offered", bad, lambda: ask(**common, tools=[tool], tool_choice={"type": "function", "function": {"name": "gone"}}))
if key != "none":
    stranger = openai.OpenAI(base_url=f"{base}/v1", api_key="wrong", max_retries=0)
    refused("a wrong key", openai.AuthenticationError, lambda: stranger.models.list())

print(f"\n{len(failures)} failed" + "".join(f"\n  {f}" for f in failures))
sys.exit(bool(failures))
