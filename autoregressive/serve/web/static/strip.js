// A run as it is seen: a head with what was asked for, how far it is, and its pictures.

import { button, element } from "./dom.js";

export class Strip {
  tiles = []; // in their order
  active = false;

  /**
   * @param {{id: string, created: number, name: string, facts: string, columns: number}} plan
   *     columns: of a grid; 0: the pictures flow
   * @param {{again, cancel, sheet: (strip: Strip) => void}} actions
   */
  constructor(plan, actions) {
    Object.assign(this, { plan, actions });
    const act = (action, words, drawing, bare = true) =>
      button(words, {
        drawing,
        bare,
        "data-action": action,
        "aria-label": `${words}: ${plan.name}`,
        on: { click: () => actions[action](this) },
      });
    this.cancel = act("cancel", "Cancel", "close");
    this.again = act("again", "Again with another seed", "again");
    this.sheet = plan.columns
      ? act("sheet", "Download the grid", "download", false)
      : act("sheet", "Download as one picture", "sheet");
    this.title = element("h3", { class: "run-title" }, plan.name);
    this.bar = element("progress", { max: 1, value: 0, "aria-label": `Progress of ${plan.name}` });
    this.state = element("p", { class: "run-state" });
    this.trouble = element("div", { class: "notice", role: "alert", hidden: true });
    this.list = element("ul", { class: "pictures", "data-columns": plan.columns || null });
    this.node = element(
      "article",
      { class: "run", "data-state": "kept", "aria-label": `${plan.name}, ${plan.facts}` },
      element(
        "header",
        { class: "run-head" },
        this.title,
        element("div", { class: "run-actions" }, this.cancel, this.sheet, this.again),
      ),
      element("p", { class: "run-facts" }, plan.facts),
      this.state,
      this.bar,
      this.trouble,
      this.list,
    );
    this.list.style.setProperty("--columns", plan.columns);
    this.setActive(false);
  }

  setActive(active) {
    this.active = active;
    this.cancel.hidden = !active;
    this.again.hidden = active || this.plan.columns > 0;
    this.bar.hidden = !active;
    this.#fit();
  }

  insert(tile) {
    const { columns } = this.plan;
    if (columns) {
      // A cell of a grid keeps its place when others are deleted.
      const place = Math.floor(tile.order / 100);
      tile.node.style.gridArea = `${Math.floor(place / columns) + 1} / ${(place % columns) + 1}`;
    }
    const at = this.tiles.findIndex(({ order }) => order > tile.order);
    this.list.insertBefore(tile.node, at < 0 ? null : this.tiles[at].node);
    this.tiles.splice(at < 0 ? this.tiles.length : at, 0, tile);
    this.#fit();
  }

  remove(tile) {
    tile.node.remove();
    this.tiles = this.tiles.filter((other) => other !== tile);
    this.#fit();
  }

  /** Frames that stay empty say nothing, so they go. */
  dropUndrawn() {
    for (const tile of this.tiles.filter(({ picture }) => !picture)) this.remove(tile);
  }

  #fit() {
    this.node.style.setProperty("--count", this.plan.columns || Math.max(1, this.tiles.length));
    this.sheet.hidden = this.active || this.tiles.length < 2;
  }

  fail(...children) {
    this.trouble.replaceChildren(...children);
    this.trouble.hidden = false;
  }
}
