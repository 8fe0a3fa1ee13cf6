// The pictures that this browser keeps: tiles, the large view, deleting.

import { announce, button, byId, calm, element } from "./dom.js";
import { PictureStore } from "./store.js";
import { fileName, plural, settingsInWords } from "./words.js";

const UNDO = 10_000; // ms that a deletion can be taken back

const newestFirst = (first, second) =>
  second.created - first.created || first.index - second.index || (first.id < second.id ? -1 : 1);

const caption = ({ request, index }) =>
  request.n > 1 ? `${index + 1} of ${request.n} · seed ${request.seed}` : `seed ${request.seed}`;

export class Gallery {
  #store = new PictureStore();
  #entries = []; // {picture, url, node}, newest first
  #kept = true;
  #shown = null; // what the large view shows
  #undo = null;
  #written = Promise.resolve(); // settles once every picture so far was stored or failed to be

  /**
   * @param {{onAgain: (request: Object) => void, onSettings: (request: Object) => void}} actions
   */
  constructor(actions) {
    this.actions = actions;
    this.tiles = byId("tiles");
    this.viewer = byId("viewer");
    this.#listen();
  }

  async load() {
    try {
      const stored = await this.#store.open();
      for (const picture of stored.sort(newestFirst).slice(0, this.#store.limit)) {
        if (!this.#entries.some((entry) => entry.picture.id === picture.id)) this.#insert(picture);
      }
      await Promise.all(
        this.#entries.map(({ picture }) => (stored.includes(picture) ? null : this.#keep(picture))),
      );
    } catch {
      this.#kept = false;
    }
    this.#count();
  }

  /** Adds a picture. @returns {string} the address that shows it, valid while the page is open */
  add(picture) {
    const { url } = this.#insert(picture);
    this.#keep(picture);
    const beyond = this.#entries.slice(this.#store.limit).map((entry) => entry.picture);
    if (beyond.length) this.#remove(beyond);
    this.#count();
    return url;
  }

  /** When what was added is kept: a picture that is said to be drawn survives a reload. */
  settled() {
    return this.#written;
  }

  #write(promise, onFailure) {
    this.#written = Promise.all([this.#written, promise.catch(onFailure)]).then(() => {});
    return this.#written;
  }

  #keep(picture) {
    return this.#write(this.#store.put(picture), () => {
      this.#kept = false;
      this.#count();
    });
  }

  #insert(picture) {
    const url = URL.createObjectURL(picture.blob);
    const words = `${picture.className}, ${caption(picture)}`;
    const node = element(
      "li",
      { class: "tile", "data-id": picture.id },
      element(
        "button",
        {
          type: "button",
          class: "tile-open",
          "aria-label": `Show ${words}`,
          on: { click: () => this.show(picture) },
        },
        element("img", {
          src: url,
          alt: words,
          loading: "lazy",
          decoding: "async",
          width: picture.size,
          height: picture.size,
        }),
      ),
      element(
        "div",
        { class: "tile-foot" },
        element(
          "p",
          { class: "tile-words" },
          element("span", { class: "tile-name" }, picture.className),
          element("span", { class: "tile-facts" }, caption(picture)),
        ),
        button(`Delete ${words}`, {
          drawing: "bin",
          bare: true,
          on: { click: () => this.#delete(picture) },
        }),
      ),
    );
    const entry = { picture, url, node };
    const at = this.#entries.findIndex((other) => newestFirst(picture, other.picture) < 0);
    if (at < 0) {
      this.#entries.push(entry);
      this.tiles.append(node);
    } else {
      this.tiles.insertBefore(node, this.#entries[at].node);
      this.#entries.splice(at, 0, entry);
    }
    return entry;
  }

  #remove(pictures) {
    const gone = new Set(pictures.map(({ id }) => id));
    for (const entry of this.#entries) if (gone.has(entry.picture.id)) this.#discard(entry);
    this.#entries = this.#entries.filter(({ picture }) => !gone.has(picture.id));
    this.#write(this.#store.delete([...gone]), () => {});
    this.#count();
  }

  #discard({ url, node }) {
    node.remove();
    URL.revokeObjectURL(url); // a card of the stage that shows it has long loaded it
  }

  #delete(picture) {
    const at = this.#entries.findIndex((entry) => entry.picture.id === picture.id);
    if (at < 0) return;
    this.#remove([picture]);
    const next = this.#entries[Math.min(at, this.#entries.length - 1)];
    (next?.node.querySelector(".tile-open") ?? byId("gallery")).focus();
    this.#offerUndo(picture);
  }

  #offerUndo(picture) {
    const toast = byId("toast");
    const hide = () => toast.replaceChildren();
    clearTimeout(this.#undo);
    const undo = button("Undo", {
      kind: "plain",
      on: {
        click: () => {
          hide();
          const { node } = this.#insert(picture);
          this.#keep(picture);
          this.#count();
          node.querySelector(".tile-open").focus();
          announce("The picture is back");
        },
      },
    });
    toast.replaceChildren(
      element("div", { class: "toast-body" }, element("p", {}, "Picture deleted"), undo),
    );
    this.#undo = setTimeout(hide, UNDO);
  }

  #count() {
    const count = this.#entries.length;
    const full = count >= this.#store.limit ? "; the oldest make room for new ones" : "";
    const facts = count ? `${plural(count, "picture")}${full}` : "";
    byId("gallery-facts").textContent = this.#kept
      ? facts
      : `${facts}${facts ? "; " : ""}this browser keeps them only until the page is closed`;
    byId("gallery-empty").hidden = count > 0;
    byId("gallery-clear").hidden = count === 0;
  }

  /** The picture as a file: the server's bytes, which carry the settings. */
  download(picture) {
    const url = URL.createObjectURL(picture.blob);
    const link = element("a", { href: url, download: fileName(picture) });
    link.click();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
  }

  show(picture) {
    const at = this.#entries.findIndex((entry) => entry.picture.id === picture.id);
    const old = this.#shown?.url;
    this.#shown = { picture, url: URL.createObjectURL(picture.blob) };
    const image = byId("viewer-image");
    image.src = this.#shown.url;
    image.alt = `${picture.className}, ${caption(picture)}`;
    if (old) URL.revokeObjectURL(old);
    byId("viewer-title").textContent = picture.className;
    const facts = [
      ["Class", `${picture.request.class_label}`],
      ["Seed", String(picture.request.seed)],
      ...(picture.request.n > 1
        ? [["Picture", `${picture.index + 1} of ${picture.request.n}`]]
        : []),
      ...settingsInWords(picture.request),
      ["Model", picture.model],
      ["Size", `${picture.size} × ${picture.size}`],
      [
        "Drawn",
        new Date(picture.created).toLocaleString(undefined, {
          dateStyle: "medium",
          timeStyle: "short",
        }),
      ],
    ];
    byId("viewer-facts").replaceChildren(
      ...facts.map(([what, value]) =>
        element("div", {}, element("dt", {}, what), element("dd", {}, value)),
      ),
    );
    byId("viewer-previous").hidden = at <= 0;
    byId("viewer-next").hidden = at < 0 || at === this.#entries.length - 1;
    byId("viewer-delete").hidden = at < 0;
    if (!this.viewer.open) {
      this.viewer.showModal();
      byId("viewer-title").focus();
    } else if (document.activeElement?.hidden || document.activeElement === document.body) {
      byId("viewer-title").focus(); // the button that was pressed has gone
    }
  }

  #move(by) {
    const at = this.#entries.findIndex((entry) => entry.picture.id === this.#shown?.picture.id);
    const next = this.#entries[at + by];
    if (at < 0 || !next) return;
    this.show(next.picture);
    announce(`${next.picture.className}, ${caption(next.picture)}`);
  }

  #listen() {
    const { viewer } = this;
    const onClick = (id, action) => byId(id).addEventListener("click", action);
    onClick("viewer-close", () => viewer.close());
    onClick("viewer-previous", () => this.#move(-1));
    onClick("viewer-next", () => this.#move(1));
    onClick("viewer-download", () => this.download(this.#shown.picture));
    onClick("viewer-again", () => {
      const { request } = this.#shown.picture;
      viewer.close();
      this.actions.onAgain(request);
    });
    onClick("viewer-settings", () => {
      const { request } = this.#shown.picture;
      viewer.close();
      this.actions.onSettings(request);
    });
    onClick("viewer-delete", () => {
      const { picture } = this.#shown;
      viewer.close();
      this.#delete(picture);
    });
    viewer.addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft") this.#move(-1);
      else if (event.key === "ArrowRight") this.#move(1);
    });
    viewer.addEventListener("click", (event) => {
      if (event.target === viewer) viewer.close(); // beside it
    });

    const question = byId("clear-question");
    onClick("gallery-clear", () => {
      const count = this.#entries.length;
      byId("clear-text").textContent =
        `${plural(count, "picture")} will be deleted from this browser. This can't be undone.`;
      question.showModal();
      byId("clear-keep").focus();
    });
    onClick("clear-keep", () => question.close());
    onClick("clear-all", () => {
      question.close();
      byId("toast").replaceChildren();
      for (const entry of this.#entries) this.#discard(entry);
      this.#entries = [];
      this.#write(this.#store.clear(), () => {});
      this.#count();
      byId("gallery").focus({ preventScroll: calm() });
      announce("All pictures are deleted");
    });
  }
}
