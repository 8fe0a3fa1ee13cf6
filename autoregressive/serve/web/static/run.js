// One request on its way: its cards, which fill up row by row, its progress, and how it ended.

import { Failure, bytesOf, drawing } from "./api.js";
import { announce, button, element } from "./dom.js";
import { describe, duration, plural, settingsInWords, took } from "./words.js";

const STEPS = 4; // shares of the progress that are said to screen readers

/** A picture while it is drawn: its drawn part is on a canvas, over the placeholder. */
class Card {
  #rows = 0;
  #stopped = false;
  // Rows of the newest preview that has arrived. An older one that is decoded later is not drawn.
  #asked = 0;

  constructor(index, { name, size, grid, onOpen, onDownload }) {
    Object.assign(this, { index, name, grid, onDownload, picture: null });
    this.canvas = element("canvas", {
      width: size,
      height: size,
      role: "img",
      "aria-label": `Picture ${index + 1} of ${name}, not drawn yet`,
    });
    this.frame = element(
      "div",
      { class: "frame" },
      element("div", { class: "undrawn" }),
      this.canvas,
      element("div", { class: "edge" }),
    );
    this.frame.style.setProperty("--grid", grid);
    this.state = element("span", { class: "card-state" }, "Waiting");
    this.download = button(`Download picture ${index + 1}`, {
      drawing: "download",
      bare: true,
      on: { click: () => this.onDownload(this.picture) },
    });
    this.node = element(
      "li",
      { class: "card", "data-state": "waiting", "data-rows": 0 },
      this.frame,
      element("div", { class: "card-foot" }, this.state, this.download),
    );
    this.onOpen = onOpen;
  }

  setGrid(size, grid) {
    this.grid = grid;
    this.frame.style.setProperty("--grid", grid);
    if (!this.#asked && this.canvas.width !== size) this.canvas.width = this.canvas.height = size;
  }

  async preview({ rows, grid, b64_json: base64, output_format: format }) {
    if (this.picture || rows <= this.#asked) return;
    this.#asked = rows;
    const bitmap = await createImageBitmap(
      new Blob([bytesOf(base64)], { type: `image/${format}` }),
    ).catch(() => null);
    if (bitmap && rows > this.#rows && !this.picture) this.#show(bitmap, rows, grid);
    bitmap?.close();
  }

  #show(bitmap, rows, grid) {
    const { canvas } = this;
    if (canvas.width !== bitmap.width || canvas.height !== bitmap.height)
      [canvas.width, canvas.height] = [bitmap.width, bitmap.height];
    const height = Math.round((bitmap.height * rows) / grid);
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (height) context.drawImage(bitmap, 0, 0, bitmap.width, height, 0, 0, bitmap.width, height);
    this.#rows = rows;
    this.node.dataset.rows = rows;
    this.frame.style.setProperty("--drawn", rows / grid);
    // A picture that is decoded after the end is shown; the card still says how it ended.
    if (this.#stopped) return;
    this.node.dataset.state = "drawing";
    this.state.textContent = `Row ${rows} of ${grid}`;
    canvas.setAttribute(
      "aria-label",
      `Picture ${this.index + 1} of ${this.name}, ${rows} of ${grid} rows drawn`,
    );
  }

  /** The whole picture replaces the canvas once it is decoded, so that nothing flickers. */
  async complete(picture, url) {
    this.picture = picture;
    const image = element("img", { alt: `${this.name}, picture ${this.index + 1}`, src: url });
    await image.decode().catch(() => {});
    const opener = element(
      "button",
      {
        type: "button",
        class: "card-open",
        "aria-label": `Show ${this.name}, picture ${this.index + 1}, large`,
        on: { click: () => this.onOpen(this.picture) },
      },
      image,
    );
    this.frame.append(opener);
    this.canvas.hidden = true;
    this.node.dataset.rows = this.grid;
    this.node.dataset.state = "done";
    this.state.textContent = `Picture ${this.index + 1}`;
  }

  start() {
    if (this.node.dataset.state !== "waiting") return;
    this.node.dataset.state = "drawing";
    this.state.textContent = "Starting";
  }

  /** Drawing has ended before the picture was whole: what there is of it stays. */
  stop(state, words) {
    if (this.picture) return;
    this.#stopped = true;
    this.node.dataset.state = state;
    this.state.textContent = words;
    this.canvas.setAttribute(
      "aria-label",
      `Picture ${this.index + 1} of ${this.name}, ${words.toLowerCase()}`,
    );
  }
}

export class Run {
  #controller = new AbortController();
  #said = 0;
  #ended = false;
  #countdown = null;

  /**
   * @param {Object} request what is sent
   * @param {{id: string, image_size: number, grid: number}} model
   * @param {string} name of the class
   * @param {Object} actions onPicture(picture) -> address; kept() -> promise; onAgain(request);
   *     onRetry(run); onOpen, onDownload(picture);
   *   onProgress(); onFailure(run, failure) -> whether it has been dealt with elsewhere
   */
  constructor(request, model, name, actions) {
    Object.assign(this, { request, model, name, actions, started: Date.now(), share: 0 });
    const cardActions = {
      name,
      size: model.image_size,
      grid: model.grid,
      onOpen: actions.onOpen,
      onDownload: actions.onDownload,
    };
    this.cards = Array.from({ length: request.n }, (_, index) => new Card(index, cardActions));
    this.title = element("h3", { class: "run-title" }, name);
    this.facts = element("p", { class: "run-facts" }, this.#factsInWords());
    this.cancelButton = button("Cancel", {
      drawing: "stop",
      kind: "quiet outlined",
      on: { click: () => this.cancel() },
    });
    this.controls = element("div", { class: "run-actions" }, this.cancelButton);
    this.bar = element("progress", { max: 1, value: 0, "aria-label": `Progress of ${name}` });
    this.state = element("p", { class: "run-state" }, "Sending…");
    this.progress = element("div", { class: "run-progress" }, this.bar, this.state);
    this.trouble = element("div", { class: "notice", role: "alert", hidden: true });
    this.pictures = element(
      "ul",
      { class: "pictures", "data-count": request.n },
      ...this.cards.map(({ node }) => node),
    );
    this.node = element(
      "article",
      { class: "run", "data-state": "waiting", "aria-label": `Drawing of ${name}` },
      element(
        "header",
        { class: "run-head" },
        element("div", { class: "run-words" }, this.title, this.facts),
        this.controls,
      ),
      this.progress,
      this.trouble,
      this.pictures,
    );
  }

  get active() {
    return !this.#ended;
  }

  #factsInWords() {
    const { request } = this;
    const guidance = settingsInWords(request)[0][1];
    return `${plural(request.n, "picture")} · guidance ${guidance} · seed ${request.seed}`;
  }

  async draw() {
    try {
      for await (const event of drawing(this.request, this.#controller)) await this.#take(event);
      await this.actions.kept();
      if (!this.#ended) this.#end("done");
    } catch (error) {
      if (this.#ended) return;
      if (this.#controller.signal.aborted && !(error instanceof Failure)) this.#cancelled();
      else this.#failed(error);
    }
  }

  async #take(event) {
    switch (event.type) {
      case "queued": {
        const size = Number.parseInt(event.size, 10) || this.model.image_size;
        for (const card of this.cards) card.setGrid(size, event.grid ?? this.model.grid);
        if (event.class_name) this.title.textContent = this.name = event.class_name;
        const words = event.ahead
          ? `Waiting: ${plural(event.ahead, "request")} ahead`
          : "Next in line";
        this.state.textContent = words;
        announce(`${this.name}: ${words}`);
        break;
      }
      case "started":
        this.node.dataset.state = "drawing";
        this.state.textContent = "Drawing";
        for (const card of this.cards) card.start();
        announce(`Drawing ${plural(this.request.n, "picture")} of ${this.name}`);
        break;
      case "progress":
        this.#progress(event);
        break;
      case "preview":
        // It is decoded beside the stream; a card keeps its previews in order.
        this.cards[event.image_index]?.preview(event).catch(() => {});
        break;
      case "image":
        await this.#picture(event);
        break;
      case "done":
        this.seconds = event.seconds;
        break;
      default: // an event of a later server
    }
  }

  #progress({ tokens_drawn: drawn, tokens, seconds_left: left }) {
    this.node.dataset.state = "drawing";
    this.share = tokens ? drawn / tokens : 0;
    this.bar.value = this.share;
    const percent = Math.floor(this.share * 100);
    const time = typeof left === "number" ? `${duration(left)} left` : null;
    this.state.textContent = ["Drawing", `${percent} %`, time].filter(Boolean).join(" · ");
    const step = Math.floor(this.share * STEPS);
    if (step > this.#said && step < STEPS) {
      this.#said = step;
      announce([`${percent} percent`, time].filter(Boolean).join(", "));
    }
    this.actions.onProgress();
  }

  async #picture({ image_index: index, b64_json: base64, output_format: format }) {
    const card = this.cards[index];
    if (!card || card.picture) return;
    const picture = {
      id: `${this.started}-${String(index).padStart(2, "0")}-${this.request.seed}`,
      created: this.started,
      index,
      className: this.name,
      model: this.model.id,
      size: card.canvas.width,
      request: this.request,
      blob: new Blob([bytesOf(base64)], { type: `image/${format}` }),
    };
    await card.complete(picture, this.actions.onPicture(picture));
  }

  cancel() {
    if (this.#ended) return;
    this.#cancelled();
    this.#controller.abort();
  }

  #cancelled() {
    for (const card of this.cards) card.stop("cancelled", "Cancelled");
    this.#end("cancelled");
  }

  #failed(error) {
    const failure = error instanceof Failure ? error : Object.assign(error, { status: undefined });
    if (!(error instanceof Failure)) console.error(error);
    for (const card of this.cards) card.stop("failed", "Not finished");
    this.#end("failed");
    if (this.actions.onFailure(this, failure)) return;
    const { title, detail } = describe(failure);
    const retry = button("Try again", {
      drawing: "again",
      kind: "quiet outlined",
      on: { click: () => this.actions.onRetry(this) },
    });
    this.trouble.replaceChildren(
      element("p", { class: "notice-title" }, title),
      element("p", { class: "notice-detail" }, detail),
      retry,
    );
    this.trouble.hidden = false;
    const nothing = this.cards.every(({ node }) => node.dataset.rows === "0");
    for (const node of [this.pictures, this.progress, this.controls]) node.hidden = nothing;
    if (failure.retryAfter) this.#waitFor(retry, failure.retryAfter);
  }

  /** The button counts down silently: a live region that speaks every second disturbs. */
  #waitFor(retry, seconds) {
    const words = retry.querySelector("span");
    const until = Date.now() + seconds * 1000;
    const tick = () => {
      const left = Math.ceil((until - Date.now()) / 1000);
      words.textContent = left > 0 ? `Try again (${left} s)` : "Try again";
      if (left <= 0 || !retry.isConnected) clearInterval(this.#countdown);
    };
    retry.setAttribute("aria-label", "Try again");
    tick();
    this.#countdown = setInterval(tick, 1000);
  }

  #end(state) {
    this.#ended = true;
    const focused = this.cancelButton === document.activeElement;
    const whole = this.cards.filter(({ picture }) => picture).length;
    this.node.dataset.state = state;
    if (state === "done") {
      this.bar.value = 1;
      const words = `Drawn in ${took(this.seconds ?? (Date.now() - this.started) / 1000)}`;
      this.state.textContent = words;
      announce(`${plural(whole, "picture")} of ${this.name}. ${words}`);
    } else if (state === "cancelled") {
      this.state.textContent = whole
        ? `Cancelled · ${plural(whole, "picture")} complete`
        : "Cancelled";
      announce("Cancelled");
    } else {
      this.state.textContent = whole
        ? `Not finished · ${plural(whole, "picture")} complete`
        : "Not finished";
    }
    const again = button("Again with another seed", {
      drawing: "again",
      kind: "quiet outlined",
      on: { click: () => this.actions.onAgain(this.request) },
    });
    this.controls.replaceChildren(again);
    if (focused) again.focus();
    this.actions.onProgress();
  }
}
