// The runs that wait, in their order. As many are drawn at once as leave the browser a connection.

import { button, byId, element, onClick } from "./dom.js";
import { duration, place, plural } from "./words.js";

const AT_ONCE = 4; // a browser holds six connections to one server

export class Queue {
  #waiting = [];
  #active = new Set();
  #blocked = ""; // why nothing can be drawn now
  #hold = null; // {words, until}: the server wants us to try again later
  #timer = null;

  /** @param {{onChange: () => void}} actions */
  constructor(actions) {
    this.actions = actions;
    onClick("queue-clear", () => this.clear());
  }

  get runs() {
    return [...this.#active, ...this.#waiting];
  }

  get active() {
    return [...this.#active];
  }

  add(run) {
    this.#waiting.push(run);
    this.#pump();
  }

  /** Nothing begins until `unblock`, because of what the words say. */
  block(words) {
    this.#blocked = words;
    this.#pump();
  }

  unblock() {
    this.#blocked = "";
    this.#pump();
  }

  /** Nothing begins for so many seconds. */
  hold(words, seconds) {
    this.#hold = { words, until: Date.now() + seconds * 1000 };
    this.#pump();
  }

  cancel(run) {
    if (this.#waiting.includes(run)) {
      this.#waiting = this.#waiting.filter((other) => other !== run);
      this.#pump();
    }
    run.cancel(); // the server may be drawing a run that waits here
  }

  clear() {
    const dropped = this.#waiting;
    this.#waiting = [];
    this.#pump();
    for (const run of dropped) run.cancel();
  }

  #pump() {
    const left = this.#hold ? Math.ceil((this.#hold.until - Date.now()) / 1000) : 0;
    if (left <= 0) this.#hold = null;
    const free = () => AT_ONCE - this.active.reduce((sum, { width }) => sum + width, 0);
    while (!this.#blocked && !this.#hold && this.#waiting.length) {
      const [next] = this.#waiting;
      if (this.#active.size && next.width > free()) break;
      this.#waiting.shift();
      this.#begin(next);
    }
    this.#show(left);
    this.actions.onChange();
  }

  async #begin(run) {
    this.#active.add(run);
    const goesOn = await run.draw(AT_ONCE);
    this.#active.delete(run);
    if (goesOn) this.#waiting.unshift(run); // the server did not take it now
    this.#pump();
  }

  #show(left) {
    clearTimeout(this.#timer);
    const count = this.#waiting.length;
    byId("queue").hidden = !count;
    byId("queue-title").textContent = `${plural(count, "run")} ${count === 1 ? "waits" : "wait"}`;
    byId("queue-clear").hidden = count < 2;
    byId("queue-why").textContent = this.#blocked || (this.#hold?.words ?? "");
    byId("queue-next").textContent = left > 0 ? `The next try is in ${duration(left)}.` : "";
    byId("queue-list").replaceChildren(...this.#waiting.map((run, at) => this.#line(run, at)));
    if (left > 0) this.#timer = setTimeout(() => this.#pump(), 500);
  }

  #line(run, at) {
    const { name, facts } = run.plan;
    run.line ??= element(
      "li",
      { class: "queue-line" },
      element("span", { class: "queue-place" }),
      element("span", { class: "queue-words" }, element("b", {}, name), ` ${facts}`),
      button(`Cancel ${name}, ${facts}`, {
        drawing: "close",
        bare: true,
        on: {
          click: () => {
            this.cancel(run);
            (byId("queue-list").querySelector("button") ?? byId("generate")).focus();
          },
        },
      }),
    );
    run.line.firstChild.textContent = place(at + 1);
    return run.line;
  }
}
