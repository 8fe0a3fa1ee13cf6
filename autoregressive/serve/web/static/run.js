// One run on its way: sends its requests, fills its strip with what comes, tells how it ended.

import { Failure, bytesOf, cancelJob, drawing } from "./api.js";
import { announce, button, byId, element, toast } from "./dom.js";
import { Tile } from "./tile.js";
import { describe, left, plural, took } from "./words.js";

const STEPS = 4; // shares of the progress that are said to screen readers
const FOLLOW_AFTER = 500; // ms; a page that is being left breaks off its own connections
const TEMPORARY = new Set([401, 429, 503]);

/**
 * What is to be drawn.
 * @typedef {{id: string, created: number, name: string, facts: string, columns: number,
 *     cells: {request: Object, name: string, words: string, job: string?}[]}} Plan
 *     cells: requests, of which a grid has many; job: what the server knows a request by
 */

export class Run {
  #controller = null;
  #cancelled = false;
  #said = 0;
  #drawn = []; // [drawn, all] tokens of each cell
  #left = [];

  /**
   * @param {Plan} plan
   * @param {() => {id: string, image_size: number, grid: number}} model
   * @param {Object} actions strip(plan) -> Strip; keep(picture, tile) -> promise; kept() ->
   *     promise; onChange(); onEnd(strip); onFailure(run, failure) -> whether it was dealt with;
   *     retry(run); dismiss(run)
   */
  constructor(plan, model, actions) {
    Object.assign(this, { plan, model, actions });
    this.width = Math.min(4, plan.cells.length);
  }

  get share() {
    const sums = this.#drawn.reduce(([a, b], [drawn, all]) => [a + drawn, b + all], [0, 0]);
    return sums[1] ? sums[0] / sums[1] : 0;
  }

  /**
   * Draws what is not drawn yet.
   * @returns {Promise<boolean>} whether it has to wait and be drawn again
   */
  async draw(width) {
    const { plan } = this;
    this.#controller = new AbortController();
    this.#cancelled = false;
    this.started = Date.now();
    const strip = (this.strip = this.actions.strip(plan));
    strip.run = this;
    strip.trouble.hidden = true;
    strip.setActive(true);
    strip.node.dataset.state = "waiting";
    this.#tell("Sending…");
    const { image_size: size, grid } = this.model();
    const missing = [];
    plan.cells.forEach((cell, at) => {
      const { n } = cell.request;
      const tiles = Array.from({ length: n }, (_, index) => this.#tile(cell, at, index));
      for (const tile of tiles)
        if (!tile.picture && !tile.canvas) tile.expect(cell.name, size, grid);
      const whole = tiles.every(({ picture }) => picture);
      this.#drawn[at] = [whole ? n * grid ** 2 : 0, n * grid ** 2];
      if (!whole) missing.push({ cell, at, tiles });
    });
    if (!missing.length) return this.#end("done");
    this.actions.onChange();
    try {
      const next = async () => {
        while (missing.length && !this.#cancelled) await this.#cell(missing.shift());
      };
      await Promise.all(Array.from({ length: width }, next));
      await this.actions.kept();
      return this.#end(this.#cancelled ? "cancelled" : "done");
    } catch (error) {
      this.#controller.abort();
      if (this.#cancelled) return this.#end("cancelled");
      return this.#failed(error);
    }
  }

  #tile(cell, at, index) {
    const order = at * 100 + index;
    const { strip } = this;
    const found = strip.tiles.find((tile) => tile.order === order);
    if (found) return found;
    const words = cell.words || (cell.request.n > 1 ? `${index + 1} of ${cell.request.n}` : "");
    const tile = new Tile(order, words, strip.actions.tile);
    tile.strip = strip;
    strip.insert(tile);
    return tile;
  }

  async #cell(asked) {
    const { cell, at, tiles } = asked;
    try {
      for await (const event of drawing(cell.request, this.#controller, cell.job))
        await this.#take(event, cell, at, tiles);
      if (tiles.some(({ picture }) => !picture)) throw new Failure("cut"); // lost on its way
    } catch (error) {
      if (error.kind === "stream") delete cell.job; // it has ended
      // The server goes on for a while when the connection breaks off: the drawing is followed.
      if (error.kind !== "cut" || asked.again || this.#controller.signal.aborted) throw error;
      await new Promise((resolve) => setTimeout(resolve, FOLLOW_AFTER));
      await this.#cell({ ...asked, again: true });
      return;
    }
    this.#drawn[at][0] = this.#drawn[at][1];
    delete cell.job;
  }

  async #take(event, cell, at, tiles) {
    switch (event.type) {
      case "queued": {
        if (cell.job && event.id !== cell.job)
          toast(`${this.plan.name} is drawn again from its seed: the server had lost it`);
        cell.job = event.id;
        this.actions.onChange(); // what can be followed again is noted
        const words = event.ahead
          ? `Waiting: ${plural(event.ahead, "request")} ahead`
          : "Next in line";
        if (this.strip.node.dataset.state === "waiting") {
          this.#tell(words);
          announce(`${this.plan.name}: ${words}`);
        }
        break;
      }
      case "started":
        if (this.strip.node.dataset.state === "waiting")
          announce(`Drawing ${plural(this.strip.tiles.length, "picture")} of ${this.plan.name}`);
        this.strip.node.dataset.state = "drawing";
        this.#tell("Drawing");
        break;
      case "progress":
        this.#drawn[at] = [event.tokens_drawn, event.tokens];
        this.#left[at] = event.seconds_left;
        this.#progress();
        break;
      case "preview":
        // It is decoded beside the stream; a tile keeps its previews in order.
        tiles[event.image_index]?.preview(event, bytesOf).catch(() => {});
        break;
      case "image":
        await this.#picture(event, cell, at, tiles[event.image_index]);
        break;
      case "done":
        if (this.plan.cells.length === 1) this.seconds = event.seconds;
        break;
      default: // an event of a later server
    }
  }

  /** Every picture is as far as the tokens say, however few previews have come. */
  #progress() {
    const { grid } = this.model();
    const { share } = this;
    const pictures = this.strip.tiles.length;
    const whole = this.strip.tiles.filter(({ picture }) => picture).length;
    this.strip.node.dataset.state = "drawing";
    this.strip.bar.value = share;
    const percent = Math.floor(share * 100);
    const row = Math.floor((share * pictures - whole) * (grid / Math.max(1, pictures - whole)));
    const seconds = this.#left.reduce((most, one) => Math.max(most, one ?? 0), -1);
    // What the first tokens took says little.
    const guessed = this.plan.cells.length === 1 && share * grid >= 1 && seconds >= 0;
    const time = guessed ? left(seconds) : "";
    const apart = whole || this.plan.cells.length > 1; // not all at one row
    const rows = apart
      ? `${whole} of ${pictures} complete`
      : `Row ${Math.max(0, Math.min(row, grid))} of ${grid}`;
    this.#tell([rows, time].filter(Boolean).join(" · "));
    const step = Math.floor(share * STEPS);
    if (step > this.#said && step < STEPS) {
      this.#said = step;
      announce([`${this.plan.name}: ${percent} percent`, time].filter(Boolean).join(", "));
    }
    this.actions.onChange();
  }

  #tell(words) {
    this.strip.state.textContent = words;
  }

  async #picture({ image_index: index, b64_json: base64, output_format: format }, cell, at, tile) {
    if (!tile || tile.picture) return;
    const { plan } = this;
    const picture = {
      id: `${plan.id}-${String(tile.order).padStart(5, "0")}`,
      run: plan.id,
      created: plan.created,
      order: tile.order,
      index,
      className: cell.name,
      words: tile.words,
      model: this.model().id,
      size: this.model().image_size,
      request: cell.request,
      blob: new Blob([bytesOf(base64)], { type: `image/${format}` }),
      ...(plan.columns ? { columns: plan.columns, title: plan.name, facts: plan.facts } : {}),
    };
    await this.actions.keep(picture, tile);
  }

  cancel() {
    for (const cell of this.plan.cells) {
      if (cell.job) cancelJob(cell.job);
      delete cell.job;
    }
    if (this.#cancelled || !this.strip?.active) return;
    this.#cancelled = true;
    this.#controller.abort();
  }

  #failed(error) {
    const failure = error instanceof Failure ? error : Object.assign(error, { status: undefined });
    if (!(error instanceof Failure)) console.error(error);
    const handled = this.actions.onFailure(this, failure);
    if (TEMPORARY.has(failure.status) || failure.kind === "network") {
      this.strip.setActive(false);
      this.strip.dropUndrawn();
      this.actions.onEnd(this.strip);
      return true;
    }
    if (!handled) this.#explain(failure);
    return this.#end("failed");
  }

  #explain(failure) {
    const { title, detail } = describe(failure);
    const retry = button("Try again", {
      drawing: "again",
      kind: "outlined",
      "data-action": "retry",
      on: { click: () => this.actions.retry(this) },
    });
    const dismiss = button("Dismiss", {
      "data-action": "dismiss",
      on: { click: () => this.actions.dismiss(this) },
    });
    this.strip.fail(
      element("p", { class: "notice-title" }, title),
      element("p", {}, detail),
      element("div", { class: "row" }, retry, dismiss),
    );
  }

  #end(state) {
    const { strip, plan } = this;
    const focused = strip.cancel === document.activeElement;
    strip.dropUndrawn();
    strip.node.dataset.state = state;
    strip.setActive(false);
    const whole = strip.tiles.length;
    const complete = whole ? ` · ${plural(whole, "picture")} complete` : "";
    if (state === "done") {
      const words = `Drawn in ${took(this.seconds ?? (Date.now() - this.started) / 1000)}`;
      this.#tell(words);
      announce(`${plural(whole, "picture")} of ${plan.name}. ${words}`);
    } else {
      this.#tell(`${state === "cancelled" ? "Cancelled" : "Not finished"}${complete}`);
      announce(strip.state.textContent);
    }
    if (focused) (whole && !plan.columns ? strip.again : byId("generate")).focus();
    this.actions.onEnd(strip);
    return false;
  }
}
