// What the page asks of the server. What the server refuses is thrown with the sentence that it sent.

const BROKEN_OFF = "the answer broke off; the server may have been stopped";

/** A refusal: `status` of HTTP (0 where nobody answered), `retryAfterS` and `soonestMs` where the server knows them. */
export class RefusedError extends Error {
  constructor(status, error, retryAfterS = null) {
    super(error?.message ?? `the server answered ${status}, and does not say why`);
    this.status = status;
    this.retryAfterS = retryAfterS ?? error?.retry_after_s ?? null;
    this.soonestMs = error?.soonest_budget_ms ?? null;
  }
}

/** The server that the page came from. */
export class Server {
  key = "";

  /** The served model: its name `id`, and in `pacevlm` what its budgets, prices and knobs are chosen from. */
  async model() {
    return (await (await this.#fetch("v1/models")).json()).data[0];
  }

  /** Questions of the embedded data set: `question`, `references`, `task` and `image`, a data: URL. */
  async samples() {
    return (await this.#fetch("samples")).json();
  }

  /**
   * Ask a question about a picture, a data: URL; returns the `text` and how it was paced.
   * `fields` go beside the question; with `onText` the answer is streamed, and told as far as it has come.
   */
  async ask(picture, question, fields, { onText, signal } = {}) {
    const content = [{ type: "text", text: question }];
    if (picture) content.push({ type: "image_url", image_url: { url: picture } });
    const body = JSON.stringify({ messages: [{ role: "user", content }], ...fields, stream: Boolean(onText) });
    const headers = { "content-type": "application/json" };
    const response = await this.#fetch("v1/chat/completions", { method: "POST", headers, body, signal });
    try {
      if (onText) return await readStream(response, onText);
      const completion = await response.json();
      return { text: completion.choices[0].message.content, pacing: completion.pacevlm };
    } catch (error) {
      if (error instanceof RefusedError || error.name === "AbortError") throw error;
      throw new RefusedError(0, { message: BROKEN_OFF });
    }
  }

  async #fetch(path, options = {}) {
    const headers = { ...options.headers, ...(this.key && { authorization: `Bearer ${this.key}` }) };
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new RefusedError(0, { message: "nobody answers; the server may have been stopped" });
    }
    if (response.ok) return response;
    const retryAfter = response.headers.get("retry-after");
    const { error } = await response.json().catch(() => ({}));
    throw new RefusedError(response.status, error, retryAfter && Number(retryAfter));
  }
}

async function readStream(response, onText) {
  let [text, pacing, rest] = ["", null, ""];
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let read = await reader.read(); !read.done; read = await reader.read()) {
    const lines = (rest + read.value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new RefusedError(response.status, event.error);
      const piece = event.choices[0]?.delta.content;
      if (piece) onText((text += piece));
      pacing = event.pacevlm ?? pacing;
    }
  }
  if (!pacing) throw new RefusedError(0, { message: BROKEN_OFF });
  return { text, pacing };
}

/** Whether an answer is one of the references, but for case and spaces: the data set's own metric. */
export function isRight(answer, references) {
  const plain = (text) => text.normalize("NFC").toLowerCase().trim().replace(/\s+/g, " ");
  return references.some((reference) => plain(reference) === plain(answer));
}
