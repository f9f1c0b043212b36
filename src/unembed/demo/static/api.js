// The server's API: JSON requests, and the events of a decoding as they happen.

/** The server answered, and said no. */
export class Refused extends Error {
  constructor(problem, status, seconds = problem.retry_after ?? null) {
    super(sentence(problem.detail || problem.title || `The server answered with status ${status}`));
    this.status = status;
    this.seconds = seconds; // until it is worth asking again; null where the server did not say
  }
}

/** A text with a capital letter first and one mark at its end. */
export const sentence = (text) => `${text[0].toUpperCase()}${text.slice(1)}`.replace(/([^.!?…])$/, "$1.");

/** No answer, or an answer that broke off. */
export class Lost extends Error {}

async function send(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Lost("The server cannot be reached.");
  }
  if (response.ok) return response;
  const problem = await response.json().catch(() => ({}));
  const after = response.headers.get("Retry-After");
  throw new Refused(problem, response.status, after && Number.isFinite(Number(after)) ? Number(after) : undefined);
}

const read = async (path) => (await send(path)).json();

export const models = () => read("models");
export const random = () => read("random");

export const isThere = () => send("health").then(() => true, () => false);

const post = (body, signal, accept = "application/json") => ({
  method: "POST",
  headers: { "Content-Type": "application/json", Accept: accept },
  body: JSON.stringify(body),
  signal,
});

/** The most probable words of one text or vector. */
export const words = async (body, signal) => (await send("words", post(body, signal))).json();

/** Decode one vector; yields `{ event, data }` until `done`. */
export async function* decode(body, signal) {
  const response = await send("decode", post(body, signal, "text/event-stream"));
  for await (const message of messages(response.body)) {
    if (message.event === "error") throw new Refused(message.data, message.data.status);
    yield message;
    if (message.event === "done") return;
  }
  throw new Lost("The connection broke off before the end.");
}

async function* messages(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) yield parse(block);
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Lost("The connection broke off before the end.");
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** One block of an event stream; without data, a comment, it is a sign of life. */
function parse(block) {
  let event = "message";
  const data = [];
  for (const line of block.split(/\r?\n/)) {
    const [, field, value] = /^([^:]*):? ?(.*)$/s.exec(line); // s: a value may hold U+2028
    if (field === "event") event = value;
    if (field === "data") data.push(value);
  }
  return data.length ? { event, data: JSON.parse(data.join("\n")) } : { event: "ping" };
}
