// The large view of a picture, and two pictures side by side.

import { announce, byId, copyText, element, save, toast } from "./dom.js";
import { fileName, labelOf, settingsInWords, when } from "./words.js";

const SWIPE = 50; // pixels

function factsOf(picture) {
  const { request } = picture;
  return [
    ["Class", `${picture.className} (${request.class_label})`],
    ["Seed", String(request.seed)],
    ...(request.n > 1 ? [["Picture", `${picture.index + 1} of ${request.n}`]] : []),
    ...settingsInWords(request),
    ["Model", picture.model],
    ["Size", `${picture.size} × ${picture.size}`],
    ["Drawn", when(picture.created)],
  ];
}

function list(facts, differs = () => false) {
  return facts.map(([what, value]) =>
    element(
      "div",
      { class: differs(what) ? "differs" : null },
      element("dt", {}, what),
      element("dd", {}, value),
    ),
  );
}

/** The picture as PNG: the one kind that every clipboard takes. */
async function asPng(blob) {
  if (blob.type === "image/png") return blob;
  const bitmap = await createImageBitmap(blob);
  const canvas = element("canvas", { width: bitmap.width, height: bitmap.height });
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

export class Viewer {
  #shown = null; // {picture, url}
  #swipe = null;

  /** @param {Object} actions tiles(); again(picture); use(picture); remove(tile); link(picture) */
  constructor(actions) {
    this.actions = actions;
    this.dialog = byId("viewer");
    this.#listen();
  }

  get #at() {
    return this.actions.tiles().findIndex(({ picture }) => picture.id === this.#shown?.picture.id);
  }

  show({ picture }) {
    const old = this.#shown?.url;
    this.#shown = { picture, url: URL.createObjectURL(picture.blob) };
    const image = byId("viewer-image");
    image.src = this.#shown.url;
    image.alt = labelOf(picture);
    image.style.setProperty("--pixels", `${picture.size / devicePixelRatio}px`);
    if (old) URL.revokeObjectURL(old);
    byId("viewer-title").textContent = picture.className;
    byId("viewer-facts").replaceChildren(...list(factsOf(picture)));
    byId("viewer-previous").hidden = this.#at <= 0;
    byId("viewer-next").hidden = this.#at < 0 || this.#at === this.actions.tiles().length - 1;
    if (!this.dialog.open) this.dialog.showModal();
    const { activeElement: focused } = document;
    if (!this.dialog.contains(focused) || focused.hidden || focused === this.dialog)
      byId("viewer-title").focus(); // the button that was pressed has gone
  }

  #move(by) {
    const next = this.#at < 0 ? null : this.actions.tiles()[this.#at + by];
    if (!next) return;
    this.show(next);
    announce(labelOf(next.picture));
  }

  /** Two pictures side by side; the facts in which they differ are marked. */
  compare(tiles) {
    const facts = tiles.map(({ picture }) => new Map(factsOf(picture)));
    const differs = (what) => facts[0].get(what) !== facts[1].get(what);
    byId("pair-pictures").replaceChildren(
      ...tiles.map(({ picture, url }, at) =>
        element(
          "figure",
          {},
          element("img", { src: url, alt: labelOf(picture) }),
          element("dl", {}, ...list([...facts[at]], differs)),
        ),
      ),
    );
    byId("pair").showModal();
    byId("pair-title").focus();
  }

  async #copyImage() {
    try {
      const item = new ClipboardItem({ "image/png": asPng(this.#shown.picture.blob) });
      await navigator.clipboard.write([item]);
      toast("The picture is copied");
    } catch {
      toast("This browser does not let the page copy pictures; download it instead");
    }
  }

  #zoom() {
    const actual = this.dialog.classList.toggle("actual");
    byId("viewer-zoom").setAttribute("aria-pressed", String(actual));
  }

  #listen() {
    const { dialog } = this;
    const closing = (action) => () => {
      dialog.close();
      action(this.#shown.picture);
    };
    const actions = {
      previous: () => this.#move(-1),
      next: () => this.#move(1),
      zoom: () => this.#zoom(),
      download: () => save(this.#shown.picture.blob, fileName(this.#shown.picture)),
      "copy-seed": () => copyText(this.#shown.picture.request.seed, "The seed is copied"),
      "copy-image": () => this.#copyImage(),
      "copy-link": () => copyText(this.actions.link(this.#shown.picture), "The link is copied"),
      again: closing(this.actions.again),
      use: closing(this.actions.use),
      remove: () => {
        const tile = this.actions.tiles()[this.#at];
        dialog.close();
        if (tile) this.actions.remove(tile);
      },
    };
    dialog.addEventListener("click", ({ target }) =>
      actions[target.closest("[data-action]")?.dataset.action]?.(),
    );
    const image = byId("viewer-image");
    image.addEventListener("click", actions.zoom);
    image.addEventListener("pointerdown", ({ clientX }) => {
      this.#swipe = clientX;
    });
    image.addEventListener("pointerup", ({ clientX, pointerType }) => {
      const by = clientX - (this.#swipe ?? clientX);
      this.#swipe = null;
      if (pointerType === "mouse" || Math.abs(by) < SWIPE) return;
      this.#move(by < 0 ? 1 : -1);
    });
  }
}
