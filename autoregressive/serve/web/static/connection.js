// The server: is it there, is the model loaded, what does it draw.

import { getJson } from "./api.js";
import { byId } from "./dom.js";
import { limitsOf } from "./limits.js";
import { describe, sentence } from "./words.js";

const READY_AGAIN = 1000; // ms between two questions whether the model is loaded
const REACH_AGAIN = 2000; // and whether the server can be reached

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

export class Connection {
  #waiting = null;

  /**
   * @param {Object} actions onReady({model, classes, limits, described}); onAway(words): why
   *     nothing can be drawn; onKey(failure): the server wants a key, or another one
   */
  constructor(actions) {
    this.actions = actions;
  }

  /** Settles when a wait that is under way has ended. */
  get waiting() {
    return this.#waiting ?? Promise.resolve(true);
  }

  /** @returns {Promise<boolean>} whether the server is ready and has accepted the key */
  connect() {
    this.#waiting ??= this.#wait().finally(() => {
      this.#waiting = null;
    });
    return this.#waiting;
  }

  hideNotice() {
    byId("server-notice").hidden = true;
  }

  notice(title, detail = "", kind = "loading") {
    const box = byId("server-notice");
    box.classList.toggle("loading", kind === "loading");
    const [titleNode, detailNode] = box.children;
    // A live region reads a text aloud each time that it is set.
    if (titleNode.textContent !== title) titleNode.textContent = title;
    if (detailNode.textContent !== detail) detailNode.textContent = detail;
    detailNode.hidden = !detail;
    box.hidden = false;
  }

  #away(title, detail, kind) {
    this.notice(title, detail, kind);
    this.actions.onAway(title);
  }

  async #wait() {
    for (;;) {
      try {
        await this.#ask();
        return true;
      } catch (failure) {
        if (failure.status === 401) {
          this.hideNotice();
          this.actions.onKey(failure);
          return false;
        }
        if (failure.kind === undefined) throw failure;
        await pause(this.#tell(failure));
      }
    }
  }

  async #ask() {
    await getJson("ready");
    const [{ data: models }, { data: classes }, description] = await Promise.all([
      getJson("v1/models"),
      getJson("v1/classes?limit=100000"),
      getJson("openapi.json").catch(() => null), // the service may have been started without
    ]);
    this.hideNotice();
    this.actions.onReady({
      model: models[0],
      classes,
      limits: limitsOf(description),
      described: description !== null,
    });
  }

  /** @returns {number} ms until the next question */
  #tell(failure) {
    if (failure.status !== 503) {
      const network = failure.kind === "network" || failure.kind === "cut";
      const { title, detail } = describe(network ? { kind: "network" } : failure);
      this.#away(title, network ? "Trying again by itself." : detail, "trouble");
      return REACH_AGAIN;
    }
    if (/being loaded/.test(failure.message)) {
      const [, progress] = failure.message.match(/\((.*)\)/) ?? [];
      const done = progress ? `${sentence(progress)} ` : "";
      this.#away("The model is being loaded…", `${done}This page goes on by itself.`);
    } else this.#away("The server takes no work now.", sentence(failure.message));
    return READY_AGAIN;
  }
}
