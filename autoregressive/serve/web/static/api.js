// Talking to the server. Whatever goes wrong becomes a Failure, which words.js puts into words.

import { readEvents } from "./event_stream.js";
import { readExactly, writeExactly } from "./exact.js";
import { storedKey } from "./key.js";

// A stream that has sent no byte for so many milliseconds, keep-alives included, counts as dead.
const SILENCE = 60_000;

export class Failure extends Error {
  /**
   * @param {"network"|"cut"|"answer"|"stream"} kind "network": the server was not reached; "cut":
   *     the connection broke off; "answer": a status of 400 and above; "stream": an `error` event
   */
  constructor(kind, { message = "", ...facts } = {}) {
    super(message);
    const none = { status: 0, param: null, code: null, retryAfter: null, keySent: false };
    Object.assign(this, { kind, ...none, ...facts });
  }
}

function headers(more = {}) {
  const key = storedKey();
  return key === null ? more : { ...more, Authorization: `Bearer ${key}` };
}

const text = (value) => (typeof value === "string" ? value : "");

async function failureOf(response, keySent) {
  let error = {};
  try {
    error = (await response.json())?.error ?? {};
  } catch {
    // a proxy's page, not the server's answer: the status has to do
  }
  const seconds = Number.parseFloat(response.headers.get("Retry-After") ?? "");
  return new Failure("answer", {
    status: response.status,
    message: text(error.message),
    param: text(error.param) || null,
    code: text(error.code) || null,
    retryAfter: Number.isFinite(seconds) ? Math.max(0, Math.ceil(seconds)) : null,
    keySent,
  });
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, { cache: "no-store", ...options });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new Failure("network");
  }
  if (!response.ok) throw await failureOf(response, "Authorization" in options.headers);
  return response;
}

export async function getJson(path) {
  const response = await ask(path, { headers: headers() });
  try {
    return readExactly(await response.text(), "maximum");
  } catch {
    throw new Failure("cut");
  }
}

const STREAM = "v1/images/stream";
const KEEP_SECONDS = 30; // a drawing goes on for so long while the page is loaded again

/** Ends a drawing that the server would go on with. */
export function cancelJob(job) {
  const options = { method: "DELETE", headers: headers(), keepalive: true };
  ask(`${STREAM}/${job}`, options).catch(() => {}); // it has ended
}

async function begin(body, signal) {
  return ask(STREAM, {
    method: "POST",
    headers: headers({ "Content-Type": "application/json", Accept: "text/event-stream" }),
    body: writeExactly({ ...body, keep_seconds: KEEP_SECONDS }),
    signal,
  });
}

async function follow(job, body, signal) {
  try {
    return await ask(`${STREAM}/${job}`, { headers: headers(), signal });
  } catch (error) {
    if (error.status !== 404) throw error;
    return begin(body, signal); // the server knows it no more: the same seed draws the same
  }
}

/**
 * The events of a drawing, ending with `done`.
 * @param {Object} body the request
 * @param {AbortController} controller aborting it ends the answer
 * @param {string?} job what the server knows the drawing by, if it was begun before
 * @throws {Failure}
 */
export async function* drawing(body, controller, job) {
  const { signal } = controller;
  const response = await (job ? follow(job, body, signal) : begin(body, signal));
  let silent = false;
  let watch;
  const listen = () => {
    clearTimeout(watch);
    watch = setTimeout(() => {
      silent = true;
      controller.abort();
    }, SILENCE);
  };
  listen();
  try {
    for await (const { data } of readEvents(response, listen)) {
      const event = JSON.parse(data);
      if (event.type === "error") {
        const { message, param, code } = event.error ?? {};
        throw new Failure("stream", {
          message: text(message),
          param: text(param) || null,
          code: text(code) || null,
        });
      }
      yield event;
      if (event.type === "done") return;
    }
  } catch (error) {
    if (error instanceof Failure || (controller.signal.aborted && !silent)) throw error;
    throw new Failure("cut");
  } finally {
    clearTimeout(watch);
  }
  throw new Failure("cut");
}

/**
 * Bytes of base64 text. A fetch of a data: address does the same, but connect-src allows only this
 * server.
 */
export function bytesOf(base64) {
  return Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
}
