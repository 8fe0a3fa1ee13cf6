// A picture in its run: its rows while it is drawn, then the picture with what can be done to it.

import { button, element } from "./dom.js";

export class Tile {
  picture = null;
  #rows = 0;
  // Rows of the newest preview that has arrived. An older one that is decoded later is not drawn.
  #asked = 0;

  /**
   * @param {number} order its place among the pictures of its run
   * @param {string} words what tells it from the others of its run, or nothing
   * @param {{open, download, remove, select: (tile: Tile) => void}} actions
   */
  constructor(order, words, actions) {
    Object.assign(this, { order, words, actions });
    // A line may end at a dot only.
    this.caption = element("span", { class: "tile-words" }, words.replaceAll(/\b \b/g, "\u00a0"));
    this.frame = element("div", { class: "frame" });
    this.foot = element("div", { class: "tile-foot" });
    this.node = element(
      "li",
      { class: "tile", "data-state": "waiting", "data-rows": 0 },
      this.frame,
      this.foot,
    );
  }

  /** Shows what is not drawn yet: the grid of tokens, over which rows appear. */
  expect(name, size, grid) {
    Object.assign(this, { name, grid });
    this.canvas = element("canvas", { width: size, height: size, role: "img" });
    this.frame.replaceChildren(
      element("div", { class: "undrawn" }),
      this.canvas,
      element("div", { class: "edge" }),
    );
    this.frame.style.setProperty("--grid", grid);
    this.#label(0);
    this.foot.replaceChildren(this.caption);
  }

  #label(rows) {
    const drawn = rows ? `${rows} of ${this.grid} rows drawn` : "not drawn yet";
    const label = [this.name, this.words, drawn].filter(Boolean).join(", ");
    this.canvas.setAttribute("aria-label", label);
  }

  async preview({ rows, grid, b64_json: base64, output_format: format }, bytesOf) {
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
    this.node.dataset.state = "drawing";
    this.frame.style.setProperty("--drawn", rows / grid);
    this.#label(rows);
  }

  /** The whole picture replaces the canvas once it is decoded, so that nothing flickers. */
  async complete(picture, url, label) {
    Object.assign(this, { picture, url, label });
    const image = element("img", {
      src: url,
      alt: label,
      width: picture.size,
      height: picture.size,
      ...(this.canvas ? {} : { loading: "lazy", decoding: "async" }),
    });
    if (this.canvas) await image.decode().catch(() => {});
    this.box = element("input", {
      type: "checkbox",
      "aria-label": `Select ${label}`,
      "data-action": "select",
      on: { change: () => this.actions.select(this) },
    });
    this.opener = element(
      "button",
      {
        type: "button",
        class: "tile-open",
        "aria-label": `Show ${label}`,
        on: { click: () => this.actions.open(this) },
      },
      image,
    );
    this.frame.replaceChildren(this.opener, element("label", { class: "tile-select" }, this.box));
    const act = (words, drawing, action) =>
      button(`${words} ${label}`, {
        drawing,
        bare: true,
        "data-action": action,
        on: { click: () => this.actions[action](this) },
      });
    this.foot.replaceChildren(
      this.caption,
      act("Download", "download", "download"),
      act("Delete", "bin", "remove"),
    );
    this.canvas = null;
    this.node.dataset.state = "done";
    this.node.dataset.id = picture.id;
    delete this.node.dataset.rows;
  }
}
