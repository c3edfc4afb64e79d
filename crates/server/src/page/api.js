// Talking to the server: requests with the key, and server-sent events as an async iterator.

const KEY = "lacuna.key";

/** An answer that is not a success; `status` is the HTTP status, 0 where the server did not answer. */
export class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Keeps the API key in this tab only. */
export const key = {
  get: () => sessionStorage.getItem(KEY) || "",
  set: (value) => sessionStorage.setItem(KEY, value),
};

async function request(path, options = {}) {
  const headers = { ...(options.body ? { "Content-Type": "application/json" } : {}) };
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (e) {
    if (e.name === "AbortError") throw e;
    throw new Refusal(0, "The server does not answer.");
  }
  if (answer.ok) return answer;
  let message = `The server answered ${answer.status}.`;
  try {
    message = (await answer.json()).error.message || message;
  } catch { /* not the error shape: the status has to do */ }
  throw new Refusal(answer.status, message);
}

/** A JSON document. */
export const get = async (path) => (await request(path)).json();

/** The objects of a stream of events, until `[DONE]`. */
export async function* stream(path, body, signal) {
  const answer = await request(path, { method: "POST", body: JSON.stringify(body), signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    // An event ends at an empty line; a chunk may end anywhere, also between CR and LF.
    let end;
    while ((end = text.match(/\r\n\r\n|\n\n|\r\r/))) {
      const event = text.slice(0, end.index);
      text = text.slice(end.index + end[0].length);
      const data = event.split(/\r\n|\n|\r/).filter((l) => l.startsWith("data:")).map((l) => l.slice(5).replace(/^ /, ""));
      if (!data.length) continue;
      const joined = data.join("\n");
      if (joined === "[DONE]") return;
      const parsed = JSON.parse(joined);
      if (parsed.error) throw new Refusal(200, parsed.error.message || "The answer failed.");
      yield parsed;
    }
  }
}
