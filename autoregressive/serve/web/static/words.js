// What the page says: failures, times, settings, names of files.

/** A server's message as a sentence. */
export function sentence(message) {
  const trimmed = message.trim();
  if (!trimmed) return "";
  // A name such as `top_p` stays as it is.
  const capital = /^\w*_/.test(trimmed) ? trimmed : trimmed[0].toUpperCase() + trimmed.slice(1);
  return /[.!?…]$/.test(capital) ? capital : `${capital}.`;
}

export function plural(count, one, many = `${one}s`) {
  return `${count} ${count === 1 ? one : many}`;
}

/** A place in a row: 1st, 2nd, 3rd, 4th. */
export function place(number) {
  const ending = { one: "st", two: "nd", few: "rd", other: "th" };
  return `${number}${ending[new Intl.PluralRules("en", { type: "ordinal" }).select(number)]}`;
}

/** A time to wait for, no more exact than anyone wants it. */
export function duration(seconds) {
  if (seconds < 1) return "less than a second";
  if (seconds < 90) return plural(Math.round(seconds), "second");
  return plural(Math.round(seconds / 60), "minute");
}

/** What is left, in whole seconds, short. */
export const left = (seconds) =>
  seconds < 90 ? `${Math.max(1, Math.ceil(seconds))} s left` : `${duration(seconds)} left`;

export const took = (seconds) =>
  seconds < 10 ? `${seconds.toFixed(1)} s` : duration(seconds);

/** @returns {{title: string, detail: string}} what went wrong, and what can be done */
export function describe({ kind, status, code, keySent, message }) {
  const said = sentence(message ?? "");
  const told = (title, detail = said) => ({ title, detail });
  if (kind === "network") return told("The server can't be reached.");
  if (kind === "cut")
    return told(
      "The connection was lost while drawing.",
      "Pictures that were complete are in your gallery.",
    );
  if (kind === "stream") return told("The drawing failed.", said || "The server gave no reason.");
  switch (status) {
    case 400:
    case 422:
      return told("The server does not accept these settings.");
    case 401:
      return keySent
        ? told("The server does not accept this key.", "Check it, and enter it again.")
        : told("This server asks for a key.", "Enter the key that its operator gave you.");
    case 429:
      return code === "too_many_wrong_keys"
        ? told("Too many wrong keys came from your address.", "Try again in a few seconds.")
        : told("The queue is full.");
    case 503:
      return told("The server is not ready yet.");
    case undefined:
      return told(
        "Something went wrong in this page.",
        "Try again; reload the page if that does not help.",
      );
    default:
      return told(
        status >= 500 ? "The server failed." : "The server refused this.",
        said || `It gave no reason, only the number ${status}.`,
      );
  }
}

/** A moment, as the reader's language writes it. */
export const when = (milliseconds) =>
  new Date(milliseconds).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });

const number = (value) => String(Math.round(value * 1000) / 1000);

/** Settings in the order of the form: [what, value]. */
export function settingsInWords(request) {
  return [
    [
      "Guidance",
      request.cfg_scale <= 1 ? `${number(request.cfg_scale)} (none)` : number(request.cfg_scale),
    ],
    ["Guided tokens", request.cfg_interval < 0 ? "all" : `the first ${request.cfg_interval + 2}`],
    ["Temperature", number(request.temperature)],
    ["Top-k", request.top_k === 0 ? "all tokens" : String(request.top_k)],
    ["Top-p", number(request.top_p)],
  ];
}

/** What a run was asked for, in a line. A seed is never shortened: it is needed to draw again. */
export function factsOf(request) {
  return `guidance ${number(request.cfg_scale)} · seed ${request.seed}`;
}

/** What tells a picture from all others, in a line. */
export function labelOf({ className, words, columns, request }) {
  return [className, words, columns ? "" : `seed ${request.seed}`].filter(Boolean).join(", ");
}

const COLUMNS = "class_label n seed cfg_scale cfg_interval temperature top_k top_p".split(" ");

/** The parameters of pictures as a table of comma-separated values. */
export function csvOf(rows) {
  const quoted = (value) => {
    const text = String(value);
    return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const lines = rows.map(({ file, picture }) =>
    [
      file,
      picture.model,
      picture.className,
      picture.index,
      ...COLUMNS.map((name) => picture.request[name]),
    ].map(quoted),
  );
  const head = ["file", "model", "class", "image", ...COLUMNS];
  return [head, ...lines].map((line) => `${line.join(",")}\r\n`).join("");
}

/** A name for the file of a picture, which tells it from others of its class, seed and request. */
export function fileName(picture) {
  const slug = (text) =>
    text
      .normalize("NFKD")
      .replace(/[\u0300-\u036f]/g, "")
      .replace(/[^A-Za-z0-9.]+/g, "-")
      .replace(/^[-.]+|[-.]+$/g, "")
      .slice(0, 60);
  const { request, className, model, index, blob } = picture;
  const parts = [
    slug(model),
    slug(className) || "class",
    request.class_label,
    `seed-${request.seed}`,
    `guidance-${number(request.cfg_scale)}`,
  ];
  if (request.n > 1) parts.push(`${index + 1}-of-${request.n}`);
  const kind = blob.type.replace("image/", "");
  return `${parts.filter((part) => part !== "").join("_")}.${kind}`;
}
