// Server-sent events out of a fetch: EventSource can neither POST nor send headers.

/** The whole lines of a response as they arrive. A piece may end anywhere, also inside "\r\n". */
async function* linesOf(response, onBytes) {
  const decoder = new TextDecoder();
  const reader = response.body.getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      onBytes();
      const lines = (rest + decoder.decode(value, { stream: true })).split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      yield* lines;
    }
  } finally {
    reader.cancel().catch(() => {}); // whoever stops reading also lets go of the connection
  }
}

/**
 * The events of a response as they arrive. An event that was cut off is dropped, as the standard
 * says.
 * @param {Response} response
 * @param {() => void} onBytes called for whatever arrives, comments included
 * @yields {{name: string, data: string}}
 */
export async function* readEvents(response, onBytes = () => {}) {
  let name = "";
  let data = [];
  for await (const line of linesOf(response, onBytes)) {
    const [, field, value] = /^([^:]*):? ?(.*)/.exec(line);
    if (field === "event") name = value;
    else if (field === "data") data.push(value);
    else if (line === "") {
      if (data.length) yield { name: name || "message", data: data.join("\n") };
      [name, data] = ["", []];
    }
  }
}
