// One answer: its tokens as they come, their probabilities, and its line of figures.

import { bytes, percent, rate } from "./probe.js";

const REASONS = { length: "cut off", stopped: "stopped", failed: "failed", error: "failed", tool_calls: "called a tool", content_filter: "filtered" };

/** White space made visible, for the table of alternatives. */
const visible = (text) => (text === "" ? "(nothing)" : text.replace(/ /g, "\u00b7").replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5"));

class Token {
  constructor(text, logprob, others) {
    this.text = text;
    this.logprob = logprob;
    this.others = others;
    this.step = null;
  }

  get probability() {
    return this.logprob === null ? null : Math.exp(this.logprob);
  }

  /** Rows for the peek: this token, then what else was likely. */
  table() {
    const rows = this.others.map((o) => ({ text: o.text, p: Math.exp(o.logprob), own: o.text === this.text }));
    if (!rows.some((r) => r.own) && this.logprob !== null) rows.push({ text: this.text, p: this.probability, own: true });
    if (!rows.length) return ["no probabilities for this token"];
    rows.sort((a, b) => b.p - a.p);
    return rows.map((r) => {
      const row = document.createElement("div");
      row.className = r.own ? "alt own" : "alt";
      const name = document.createElement("code");
      name.textContent = visible(r.text);
      const bar = document.createElement("i");
      bar.style.setProperty("--p", r.p.toFixed(4));
      const share = document.createElement("span");
      share.textContent = percent(r.p);
      row.append(name, bar, share);
      return row;
    });
  }
}

export class Answer {
  constructor({ side, model, probe, onPeek, onAgain }) {
    this.probe = probe;
    this.onPeek = onPeek;
    this.text = "";
    this.tokens = [];
    this.pending = [];
    this.mean = null;
    this.speed = null;
    this.reason = null;
    this.at = null;
    const make = (tag, cls, text = "") => {
      const e = document.createElement(tag);
      e.className = cls;
      e.textContent = text;
      return e;
    };
    this.root = make("div", "answer");
    this.root.dataset.side = side;
    this.label = make("div", "who");
    this.label.append(make("span", "dot"), model);
    this.out = make("div", "out");
    this.out.tabIndex = 0;
    this.out.setAttribute("aria-label", `Answer of ${model}; arrow keys walk through its tokens`);
    this.foot = make("div", "foot");
    this.figures = make("span", "figures");
    const copy = make("button", "quiet", "Copy");
    copy.type = "button";
    copy.addEventListener("click", async () => {
      await navigator.clipboard.writeText(this.text);
      copy.textContent = "Copied";
      setTimeout(() => { copy.textContent = "Copy"; }, 1500);
    });
    const again = make("button", "quiet again", "Regenerate");
    again.type = "button";
    again.addEventListener("click", onAgain);
    this.foot.append(this.figures, copy, again);
    this.root.append(this.label, this.out, this.foot);
    this.listen();
  }

  listen() {
    const over = (e) => {
      const node = e.target.closest(".tok");
      if (node) this.peek(this.tokens.findIndex((t) => t.node === node));
    };
    this.out.addEventListener("pointerover", over);
    this.out.addEventListener("pointerleave", () => this.peek(null));
    this.out.addEventListener("blur", () => this.peek(null));
    this.out.addEventListener("keydown", (e) => {
      const to = { ArrowRight: (this.at ?? -1) + 1, ArrowLeft: (this.at ?? this.tokens.length) - 1, Home: 0, End: this.tokens.length - 1 }[e.key];
      if (to === undefined || !this.tokens.length || e.altKey || e.ctrlKey) return;
      e.preventDefault();
      this.peek(Math.max(0, Math.min(to, this.tokens.length - 1)));
    });
  }

  peek(index) {
    this.tokens[this.at]?.node.classList.remove("at");
    const token = this.tokens[index];
    this.at = token ? index : null;
    token?.node.classList.add("at");
    this.onPeek(token || null, token?.node);
    if (this.shown()) this.probe.pin(token ? token.step : null);
    // The other side of a pair shows what it did at the same place.
    const other = this.sibling;
    if (other?.shown()) other.probe.pin(token ? other.tokens[index]?.step ?? null : null);
  }

  /** Whether the pictures beside show this answer, and not a later one. */
  shown() {
    return this.probe.owner === this;
  }

  begin() {
    this.probe.clear();
    this.probe.owner = this;
    this.root.classList.add("live");
  }

  take(event) {
    const choice = event.choices && event.choices[0];
    if (event.usage) this.usage = event.usage;
    if (!choice) return;
    const text = choice.delta ? choice.delta.content || "" : choice.text || "";
    if (choice.finish_reason) this.reason = choice.finish_reason;
    const parts = shape(choice.logprobs);
    // What the server measured belongs to the last token of the chunk.
    const step = text || parts.length || event.lacuna ? this.probe.add(event.lacuna) : null;
    this.append(text, parts, event.lacuna ? step : null);
    this.figure();
  }

  append(text, parts, step) {
    this.text += text;
    this.pending.push(...parts);
    // Bytes of a character that is not complete yet come with no text: they wait for the token that completes it.
    if (!text) return;
    const joined = this.pending.map((p) => p.text).join("") === text;
    const pieces = joined && this.pending.length ? this.pending : [{ ...(this.pending.at(-1) || { logprob: null, others: [] }), text }];
    this.pending = [];
    for (const p of pieces) {
      const token = new Token(p.text, p.logprob, p.others);
      token.step = step;
      token.node = document.createElement("span");
      token.node.className = "tok";
      // The space that parts it from the prompt would look like an indentation.
      token.node.textContent = this.tokens.length ? p.text : p.text.trimStart();
      if (token.probability !== null) token.node.style.setProperty("--u", (1 - token.probability).toFixed(3));
      this.out.append(token.node);
      this.tokens.push(token);
    }
  }

  figure() {
    if (this.shown()) {
      this.mean = this.probe.perToken;
      this.speed = this.probe.speed;
    }
    const n = this.usage ? this.usage.completion_tokens : this.tokens.length;
    this.figures.textContent = [
      `${n} token${n === 1 ? "" : "s"}`, this.speed ? `${rate(this.speed)} tokens/s` : "",
      this.mean ? `${bytes(this.mean)} per token` : "", REASONS[this.reason] || "",
    ].filter(Boolean).join("  \u00b7  ");
  }

  end(reason, problem) {
    this.reason = reason || this.reason;
    this.root.classList.remove("live");
    this.root.classList.add("done");
    if (problem) {
      const p = document.createElement("p");
      p.className = "problem";
      p.textContent = problem;
      this.out.after(p);
    }
    this.figure();
  }
}

/** Both shapes of log-probabilities as one list. */
function shape(logprobs) {
  if (!logprobs) return [];
  if (Array.isArray(logprobs.content)) {
    return logprobs.content.map((c) => ({
      text: c.token, logprob: c.logprob, others: (c.top_logprobs || []).map((o) => ({ text: o.token, logprob: o.logprob })),
    }));
  }
  return (logprobs.tokens || []).map((text, i) => ({
    text, logprob: logprobs.token_logprobs?.[i] ?? null,
    others: Object.entries(logprobs.top_logprobs?.[i] || {}).map(([t, l]) => ({ text: t, logprob: l })),
  }));
}
