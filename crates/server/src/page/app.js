// The page: what the user says, what the models answer, and the pictures beside it.

import { get, key, Refusal, stream } from "./api.js";
import { Answer } from "./answer.js";
import { Probe, bytes, rate } from "./probe.js";
import { Settings } from "./settings.js";

const $ = (id) => document.getElementById(id);
const STARTERS = {
  chat: ["Why is the sky blue?", "Write a haiku about silence.", "Tell me a story about a small fox."],
  text: ["Once upon a time, there was a little girl named Lily.", "Tom and his dog went to the park.", "One day, a small fox"],
};

const settings = new Settings(() => { refreshForm(); for (const p of probes) p.queue(); });
const turns = []; // { prompt, answers: [Answer] }
let models = [];
let running = null; // AbortController of the answers under way
let layer = null; // layer of the strip; null: the server's choice
let forms = { template: true };

const probes = ["a", "b"].map((side) => {
  const root = $("probe").content.firstElementChild.cloneNode(true);
  $("probes").append(root);
  const probe = new Probe(root, { onLayer: (l) => { layer = l; for (const p of probes) p.setLayer(l); }, onPeek: peekText });
  probe.title("", side);
  return probe;
});

// One answer is side b; side a joins it in a pair.
const pair = () => document.querySelector("input[name=mode]:checked").value === "pair";
const sides = () => (pair() ? ["a", "b"] : ["b"]);
const probeOf = (side) => probes[side === "a" ? 0 : 1];
const modelOf = (side) => $(`model-${side}`).value;

// --- start ---------------------------------------------------------------------------------------------------------

async function start() {
  try {
    models = (await get("v1/models")).data.map((m) => m.id);
    forms.template = await hasTemplate();
  } catch (e) {
    if (e instanceof Refusal && e.status === 401) return askKey();
    return notice(e.message, start);
  }
  for (const side of ["a", "b"]) {
    $(`model-${side}`).replaceChildren(...models.map((m) => new Option(m, m)));
  }
  const kept = settings.values;
  const sparse = models.find((m) => m.includes(":")) || models[models.length - 1];
  $("model-a").value = models.includes(kept.a) ? kept.a : models[0];
  $("model-b").value = models.includes(kept.b) ? kept.b : sparse;
  document.querySelector("input[name=mode][value=pair]").disabled = models.length < 2;
  if (kept.form === null) settings.values.form = forms.template ? "chat" : "text";
  settings.show();
  mode();
  if (matchMedia("(pointer: fine)").matches) $("prompt").focus();
}

async function hasTemplate() {
  try {
    const props = await get("props");
    return Boolean(props.chat_template);
  } catch (e) {
    if (e.status === 401) throw e;
    return true;
  }
}

function askKey(wrong = Boolean(key.get())) {
  $("key-text").textContent = wrong
    ? "That key was not accepted."
    : "It was started with an API key. The key is kept in this tab only.";
  $("key-input").value = "";
  if (!$("key").open) $("key").showModal();
}

$("key-form").addEventListener("submit", () => {
  key.set($("key-input").value.trim());
  start();
});

// --- the bar -------------------------------------------------------------------------------------------------------

function mode() {
  document.body.classList.toggle("is-pair", pair());
  probes[0].root.hidden = !pair();
  for (const side of ["a", "b"]) {
    probeOf(side).title(modelOf(side) || "model", side);
    probeOf(side).queue();
  }
  refreshForm();
}

for (const radio of document.querySelectorAll("input[name=mode]")) {
  radio.addEventListener("change", () => {
    // A pair starts from the plain model and one of its plans.
    if (pair() && modelOf("a") === modelOf("b")) {
      const base = modelOf("b").split(":")[0];
      $("model-a").value = [base, ...models].find((m) => m !== modelOf("b") && models.includes(m));
    }
    mode();
  });
}
for (const side of ["a", "b"]) {
  $(`model-${side}`).addEventListener("change", () => {
    settings.values[side] = modelOf(side);
    settings.keep();
    mode();
  });
}

function refreshForm() {
  const text = settings.values.form === "text";
  $("prompt").placeholder = text ? "Begin a text; the model goes on" : "Write a message";
  $("s-form-note").textContent = forms.template
    ? "A conversation uses the model's chat template."
    : "This model has no chat template; it is made to continue text.";
  $("log").classList.toggle("tint", settings.values.tint);
  $("starters").replaceChildren(...STARTERS[text ? "text" : "chat"].map((s) => {
    const b = document.createElement("button");
    b.type = "button";
    b.textContent = s;
    b.addEventListener("click", () => { $("prompt").value = s; grow(); $("prompt").focus(); });
    return b;
  }));
}

const THEMES = { auto: "dark", dark: "light", light: "auto" };
function theme(value) {
  const root = document.documentElement;
  if (value === "auto") delete root.dataset.theme; else root.dataset.theme = value;
  $("theme").title = `Colours: ${value === "auto" ? "automatic" : value}`;
  for (const p of probes) p.queue();
}
$("theme").addEventListener("click", () => {
  settings.values.theme = THEMES[settings.values.theme] || "auto";
  settings.keep();
  theme(settings.values.theme);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => theme(settings.values.theme));
$("settings-open").addEventListener("click", () => { settings.show(); $("settings").showModal(); });
$("new").addEventListener("click", clear);
$("fold").addEventListener("click", () => {
  const open = $("lens").classList.toggle("open");
  $("fold").setAttribute("aria-expanded", String(open));
  for (const p of probes) p.queue();
});

function clear() {
  stop();
  turns.length = 0;
  for (const p of probes) p.clear();
  $("log").replaceChildren($("empty"));
  $("empty").hidden = false;
  $("fold-text").textContent = "What was read";
  $("prompt").focus();
}

// --- asking --------------------------------------------------------------------------------------------------------

function messages(side, prompt) {
  const list = settings.values.system ? [{ role: "system", content: settings.values.system }] : [];
  for (const turn of turns) {
    const said = turn.answers.find((a) => a.side === side) || turn.answers[0];
    list.push({ role: "user", content: turn.prompt });
    if (said && said.text) list.push({ role: "assistant", content: said.text });
  }
  return [...list, { role: "user", content: prompt }];
}

function body(side, prompt, seed) {
  const v = settings.values;
  const common = {
    model: modelOf(side), stream: true, stream_options: { include_usage: true }, temperature: v.temperature,
    top_p: v.top_p, max_tokens: v.max_tokens, seed, return_activity: true,
    ...(layer === null ? {} : { activity_layer: layer }),
  };
  return v.form === "text"
    ? ["v1/completions", { ...common, prompt, logprobs: 5 }]
    : ["v1/chat/completions", { ...common, messages: messages(side, prompt), logprobs: true, top_logprobs: 5 }];
}

async function ask(prompt) {
  stop();
  $("empty").hidden = true;
  const text = settings.values.form === "text";
  const seed = settings.values.seed ?? Math.floor(Math.random() * 2 ** 31);
  const block = document.createElement("article");
  block.className = "turn";
  const said = document.createElement("div");
  said.className = text ? "said text" : "said";
  said.textContent = prompt;
  const answersBox = document.createElement("div");
  answersBox.className = pair() ? "answers pair" : "answers";
  block.append(said, answersBox);
  const requests = sides().map((side) => body(side, prompt, seed));
  const answers = sides().map((side) => {
    const answer = new Answer({ side, model: modelOf(side), probe: probeOf(side), onPeek: peekToken, onAgain: again });
    answer.side = side;
    answersBox.append(answer.root);
    return answer;
  });
  if (answers.length === 2) [answers[0].sibling, answers[1].sibling] = [answers[1], answers[0]];
  const turn = { prompt, answers, block };
  $("log").append(block);
  turns.push(turn);
  scroll(true);
  const control = (running = new AbortController());
  busy(true);
  const tell = (i) => listen(answers[i], requests[i], control.signal);
  try {
    if (settings.values.together) await Promise.all(answers.map((_, i) => tell(i)));
    else for (let i = 0; i < answers.length; i++) await tell(i);
  } finally {
    if (running === control) {
      running = null;
      busy(false);
    }
    if (answers.length === 2) compare(turn);
  }
}

async function listen(answer, [path, request], signal) {
  if (signal.aborted) return answer.end("stopped");
  answer.begin();
  try {
    for await (const event of stream(path, request, signal)) {
      answer.take(event);
      scroll(false);
      fold();
    }
    answer.end(null);
  } catch (e) {
    if (e.name === "AbortError") answer.end("stopped");
    else {
      answer.end("failed", e.message);
      if (e.status === 401) askKey();
    }
  }
}

function stop() {
  if (running) running.abort();
}

function again() {
  const last = turns[turns.length - 1];
  if (!last) return;
  stop();
  turns.pop();
  last.block.remove();
  ask(last.prompt);
}

function busy(on) {
  document.body.classList.toggle("is-busy", on);
  $("send").textContent = on ? "Stop" : "Send";
  $("send").classList.toggle("stop", on);
}

/** One line under a pair: bytes, speed, and how long the two said the same. */
function compare(turn) {
  const [a, b] = turn.answers;
  const line = document.createElement("p");
  line.className = "compared";
  const parts = [];
  let words = "";
  if (a.mean && b.mean) parts.push(`B read ${Math.round((100 * b.mean) / a.mean)} % of what A read per token`);
  if (a.speed && b.speed && !settings.values.together) parts.push(`at ${(b.speed / a.speed).toFixed(2)} times its speed`);
  const n = a.tokens.findIndex((t, i) => !b.tokens[i] || b.tokens[i].text !== t.text);
  if (a.tokens.length && b.tokens.length) {
    words = (n < 0 || n >= Math.min(a.tokens.length, b.tokens.length) ? "The words are the same." : `The words part after ${n} token${n === 1 ? "" : "s"}.`);
    if (n >= 0) for (const x of [a, b]) x.tokens[n]?.node.classList.add("parts");
  }
  const redo = document.createElement("button");
  redo.type = "button";
  redo.className = "quiet again-pair";
  redo.textContent = "Regenerate both";
  redo.addEventListener("click", again);
  line.append([parts.length ? `${parts.join(", ")}.` : "", words].filter(Boolean).join(" "), redo);
  turn.block.append(line);
  scroll(false);
}

/** The line of the folded picture (phones). */
function fold() {
  const p = probeOf("b");
  $("fold-text").textContent = [
    p.speed ? `${rate(p.speed)} tokens/s` : "", p.perToken ? `${bytes(p.perToken)} per token` : "",
  ].filter(Boolean).join("  ·  ") || "What was read";
}

// --- composer ------------------------------------------------------------------------------------------------------

function grow() {
  const t = $("prompt");
  t.style.height = "auto";
  t.style.height = `${Math.min(t.scrollHeight, 220)}px`;
}

$("prompt").addEventListener("input", grow);
$("prompt").addEventListener("keydown", (e) => {
  if (e.key === "Enter" && !e.shiftKey && !e.isComposing) {
    e.preventDefault();
    if (!running) $("composer").requestSubmit();
  }
});
$("composer").addEventListener("submit", (e) => {
  e.preventDefault();
  if (running) return stop();
  const prompt = settings.values.form === "text" ? $("prompt").value : $("prompt").value.trim();
  if (!prompt.trim()) return;
  $("prompt").value = "";
  grow();
  ask(prompt);
});
document.addEventListener("keydown", (e) => {
  if (e.key === "Escape" && !document.querySelector("dialog[open]")) {
    if (running) stop();
    peekText(null);
  } else if (e.altKey && e.code === "KeyR") {
    e.preventDefault();
    again();
  } else if (e.altKey && e.code === "KeyN") {
    e.preventDefault();
    clear();
  } else if (e.key === "/" && e.target === document.body) {
    e.preventDefault();
    $("prompt").focus();
  }
});

let stick = true;
$("log").addEventListener("scroll", () => {
  const l = $("log");
  stick = l.scrollHeight - l.scrollTop - l.clientHeight < 60;
});
function scroll(force) {
  if (force) stick = true;
  if (stick) $("log").scrollTop = $("log").scrollHeight;
}

function notice(text, retry) {
  const p = document.createElement("p");
  p.className = "notice";
  p.textContent = `${text} `;
  const b = document.createElement("button");
  b.type = "button";
  b.textContent = "Try again";
  b.addEventListener("click", () => { p.remove(); retry(); });
  p.append(b);
  $("log").prepend(p);
}

// --- what shows on hover -------------------------------------------------------------------------------------------

function place(x, y, below) {
  const box = $("peek");
  box.hidden = false;
  const w = box.offsetWidth, h = box.offsetHeight;
  box.style.left = `${Math.max(8, Math.min(x - w / 2, innerWidth - w - 8))}px`;
  box.style.top = `${y - h - 10 > 8 ? y - h - 10 : below + 10}px`;
}

function peekText(what) {
  if (!what) { $("peek").hidden = true; return; }
  $("peek").replaceChildren(what.text);
  place(what.x, what.y, what.y + 8);
}

function peekToken(token, node) {
  if (!token) { $("peek").hidden = true; return; }
  $("peek").replaceChildren(...token.table());
  const box = node.getClientRects()[0] || node.getBoundingClientRect();
  place(box.left + box.width / 2, box.top, box.bottom);
}

// --- the empty page ------------------------------------------------------------------------------------------------

/** A field of neurons of which few are lit; other ones every time. */
function field() {
  const svg = document.querySelector(".field");
  const ns = "http://www.w3.org/2000/svg";
  for (let y = 0; y < 6; y++) {
    for (let x = 0; x < 17; x++) {
      const c = document.createElementNS(ns, "circle");
      c.setAttribute("cx", 10 + x * 20);
      c.setAttribute("cy", 10 + y * 20);
      c.setAttribute("r", 4.6);
      if (Math.random() < 0.13) c.setAttribute("class", "lit");
      svg.append(c);
    }
  }
}

field();
setInterval(() => {
  if ($("empty").hidden || document.hidden || matchMedia("(prefers-reduced-motion: reduce)").matches) return;
  const all = [...document.querySelectorAll(".field circle")];
  for (let i = 0; i < 5; i++) {
    const lit = all.filter((c) => c.classList.contains("lit"));
    lit[Math.floor(Math.random() * lit.length)]?.classList.remove("lit");
    all[Math.floor(Math.random() * all.length)].classList.add("lit");
  }
}, 420);
theme(settings.values.theme);
start();
