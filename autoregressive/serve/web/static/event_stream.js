// Server-sent events out of a fetch: EventSource can neither POST nor send headers.

/** Cuts text into events. A piece of text may end anywhere, also between "\r" and "\n". */
export class EventParser {
  #rest = ""; // a line whose end has not come yet
  // The last piece ended in "\r", so a "\n" at the start of the next piece belongs to it.
  #afterReturn = false;
  #started = false;
  #name = "";
  #data = [];

  /** @returns {{name: string, data: string}[]} the events that this piece completes */
  push(piece) {
    const events = [];
    let text = piece;
    if (!this.#started && text) {
      this.#started = true;
      if (text.startsWith("\ufeff")) text = text.slice(1);
    }
    if (this.#afterReturn && text) {
      this.#afterReturn = false;
      if (text.startsWith("\n")) text = text.slice(1);
    }
    if (!text) return events;
    this.#afterReturn = text.endsWith("\r");
    const lines = text.split(/\r\n|\r|\n/);
    lines[0] = this.#rest + lines[0];
    this.#rest = lines.pop();
    for (const line of lines) this.#take(line, events);
    return events;
  }

  #take(line, events) {
    if (line === "") {
      if (this.#data.length)
        events.push({ name: this.#name || "message", data: this.#data.join("\n") });
      this.#name = "";
      this.#data = [];
      return;
    }
    const colon = line.indexOf(":");
    if (colon === 0) return; // a comment, which keeps the connection alive
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(line[colon + 1] === " " ? colon + 2 : colon + 1);
    if (field === "event") this.#name = value;
    else if (field === "data") this.#data.push(value);
  }
}

/**
 * The events of a response as they arrive. An event that was cut off is dropped, as the standard
 * says.
 * @param {Response} response
 * @param {() => void} onBytes called for whatever arrives, comments included
 */
export async function* readEvents(response, onBytes = () => {}) {
  const parser = new EventParser();
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  const reader = response.body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      onBytes();
      yield* parser.push(decoder.decode(value, { stream: true }));
    }
  } finally {
    reader.cancel().catch(() => {}); // whoever stops reading also lets go of the connection
  }
}
