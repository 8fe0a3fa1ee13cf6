// The pictures that this browser keeps, run by run: keeping, selecting, saving and deleting them.

import { announce, button, byId, calm, onClick, save, toast } from "./dom.js";
import { joined, recordOf, withRecord } from "./records.js";
import { composeSheet } from "./sheet.js";
import { PictureStore } from "./store.js";
import { Strip } from "./strip.js";
import { Tile } from "./tile.js";
import { csvOf, factsOf, fileName, labelOf, plural, when } from "./words.js";
import { zip } from "./zip.js";

/** A picture as it is used here, whichever version of the page kept it. */
function upToDate(picture) {
  const { id, created, index, request } = picture;
  const words = request.n > 1 ? `${index + 1} of ${request.n}` : "";
  const seed = String(request.seed); // larger ones than JavaScript's numbers hold exactly
  return {
    run: String(created),
    order: index,
    words,
    ...picture,
    id,
    request: { ...request, seed },
  };
}

function planOf({ run, created, className, title, facts, columns = 0, request }) {
  return {
    id: run,
    created,
    name: title ?? className,
    facts: facts ?? factsOf(request),
    columns,
    request,
  };
}

export class Gallery {
  #store = new PictureStore();
  #strips = []; // newest first
  #kept = true;
  #written = Promise.resolve(); // settles once every picture so far was stored or failed to be
  #selected = new Set(); // tiles

  /** @param {Object} actions open(tile); compare(tiles); again(plan) */
  constructor(actions) {
    this.actions = actions;
    this.stripActions = {
      again: (strip) => actions.again(strip.plan),
      cancel: (strip) => strip.run.cancel(),
      sheet: (strip) => this.#saveSheet(strip),
      tile: {
        open: (tile) => (this.#selecting ? tile.box.click() : actions.open(tile)),
        download: (tile) => save(tile.picture.blob, fileName(tile.picture)),
        remove: (tile) => this.remove([tile]),
        select: (tile) => this.#select(tile),
      },
    };
    this.#listen();
  }

  /** Tiles with a picture, newest run first. */
  get tiles() {
    return this.#strips.flatMap(({ tiles }) => tiles.filter(({ picture }) => picture));
  }

  /** The address of a model's newest picture of a class, if there is one. */
  newest(model, label) {
    return this.tiles.find(
      ({ picture }) => picture.model === model.id && picture.request.class_label === label,
    )?.url;
  }

  async load() {
    try {
      const stored = (await this.#store.open()).map(upToDate);
      stored.sort((a, b) => b.created - a.created || a.order - b.order || (a.id < b.id ? -1 : 1));
      const known = new Set(this.tiles.map(({ picture }) => picture.id));
      const beyond = stored.splice(this.#store.limit); // of several tabs
      if (beyond.length) this.#write(this.#store.delete(beyond.map(({ id }) => id)), () => {});
      for (const picture of stored)
        if (!known.has(picture.id)) this.#insert(picture);
      const names = new Set(stored.map(({ id }) => id));
      for (const { picture } of this.tiles) if (!names.has(picture.id)) this.#keep(picture);
    } catch {
      this.#kept = false;
    }
    this.#count();
  }

  /** The strip of a run, which is made if there is none. */
  strip(plan) {
    const found = this.#strips.find((strip) => strip.plan.id === plan.id);
    if (found) return found;
    const strip = new Strip(plan, this.stripActions);
    const at = this.#strips.findIndex((other) => other.plan.created < plan.created);
    byId("runs").insertBefore(strip.node, at < 0 ? null : this.#strips[at].node);
    this.#strips.splice(at < 0 ? this.#strips.length : at, 0, strip);
    this.#count();
    return strip;
  }

  /** Removes a strip in which there is nothing to see. */
  settle(strip) {
    if (strip.active || strip.tiles.length || !strip.trouble.hidden) return;
    strip.node.remove();
    this.#strips = this.#strips.filter((other) => other !== strip);
    this.#count();
  }

  /** Shows a finished picture in its tile, and keeps it. */
  async add(picture, tile) {
    const shown = tile.complete(picture, URL.createObjectURL(picture.blob), labelOf(picture));
    this.#keep(picture);
    const beyond = this.tiles.slice(this.#store.limit);
    if (beyond.length) this.#drop(beyond);
    this.#count();
    await shown;
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
    const strip = this.strip(planOf(picture));
    const tile = new Tile(picture.order, picture.words, this.stripActions.tile);
    tile.strip = strip;
    tile.complete(picture, URL.createObjectURL(picture.blob), labelOf(picture));
    strip.insert(tile);
    if (!strip.active) strip.state.textContent ||= when(picture.created);
    return tile;
  }

  #drop(tiles) {
    for (const tile of tiles) {
      this.#selected.delete(tile);
      tile.strip.remove(tile);
      URL.revokeObjectURL(tile.url);
      this.settle(tile.strip);
    }
    this.#write(this.#store.delete(tiles.map(({ picture }) => picture.id)), () => {});
    this.#count();
  }

  /** Deletes pictures, which can be taken back for a while. */
  remove(tiles) {
    const at = this.tiles.indexOf(tiles[0]);
    const pictures = tiles.map(({ picture }) => picture);
    this.#drop(tiles);
    const left = this.tiles;
    (left[Math.min(at, left.length - 1)]?.opener ?? byId("gallery")).focus();
    const restore = () => {
      hide();
      const [first] = pictures.map((picture) => {
        this.#keep(picture);
        return this.#insert(picture);
      });
      this.#count();
      first.opener.focus();
      announce(pictures.length > 1 ? "The pictures are back" : "The picture is back");
    };
    const hide = toast(
      `${plural(pictures.length, "picture")} deleted`,
      button("Undo", { kind: "plain", "data-action": "undo", on: { click: restore } }),
    );
  }

  #count() {
    const count = this.tiles.length;
    const full = count >= this.#store.limit ? "; the oldest make room for new ones" : "";
    const facts = count ? `${plural(count, "picture")}${full}` : "";
    byId("gallery-facts").textContent = this.#kept
      ? facts
      : `${facts}${facts ? "; " : ""}this browser keeps them only until the page is closed`;
    byId("gallery").hidden = !this.#strips.length && this.#kept;
    byId("gallery-clear").hidden = byId("select-mode").hidden = count === 0;
    byId("welcome").hidden = this.#strips.length > 0;
    this.#showSelection();
  }

  #select(tile) {
    if (tile.box.checked) this.#selected.add(tile);
    else this.#selected.delete(tile);
    this.#showSelection();
  }

  get #selecting() {
    return byId("runs").classList.contains("selecting");
  }

  #setSelecting(selecting) {
    byId("runs").classList.toggle("selecting", selecting);
    byId("select-mode").setAttribute("aria-pressed", String(selecting));
    if (!selecting) {
      for (const tile of this.#selected) tile.box.checked = false;
      this.#selected.clear();
    }
    this.#showSelection();
  }

  #showSelection() {
    const count = this.#selected.size;
    byId("selection").hidden = !count && !this.#selecting;
    byId("selection-count").textContent = count ? `${count} selected` : "Select pictures";
    byId("selection-compare").disabled = count !== 2;
    byId("selection-zip").disabled = byId("selection-delete").disabled = !count;
  }

  get #chosen() {
    return this.tiles.filter((tile) => this.#selected.has(tile));
  }

  /** The selected pictures with a table of their parameters. */
  async #saveZip() {
    const pictures = this.#chosen.map(({ picture }) => picture);
    const names = new Set();
    const files = [];
    for (const picture of pictures) {
      let name = fileName(picture);
      for (let k = 2; names.has(name); k += 1) name = `${k}_${fileName(picture)}`;
      names.add(name);
      files.push({ name, bytes: new Uint8Array(await picture.blob.arrayBuffer()) });
    }
    const table = csvOf(pictures.map((picture, at) => ({ picture, file: files[at].name })));
    files.push({ name: "parameters.csv", bytes: new TextEncoder().encode(table) });
    save(new Blob([zip(files)], { type: "application/zip" }), "llamagen-pictures.zip");
  }

  async #saveSheet({ plan, tiles }) {
    const pictures = tiles.map(({ picture }) => picture);
    const title = `${plan.name} · ${plan.facts}`;
    const [cut, end] = plan.columns
      ? [/_seed-.*/, "_grid.png"]
      : [/(_\d+-of-\d+)?\.\w+$/, "_all.png"];
    const name = fileName(pictures[0]).replace(cut, end);
    const sheet = await composeSheet(pictures, plan.columns, title);
    const records = await Promise.all(pictures.map(({ blob }) => recordOf(blob)));
    save(records.every(Boolean) ? await withRecord(sheet, joined(records)) : sheet, name);
  }

  #listen() {
    onClick("select-mode", () => this.#setSelecting(!this.#selecting));
    onClick("selection-done", () => {
      this.#setSelecting(false);
      byId("select-mode").focus();
    });
    onClick("selection-compare", () => this.actions.compare(this.#chosen));
    onClick("selection-zip", () => this.#saveZip());
    onClick("selection-delete", () => this.remove(this.#chosen));

    const question = byId("clear-question");
    onClick("gallery-clear", () => {
      byId("clear-text").textContent =
        `${plural(this.tiles.length, "picture")} will be deleted from this browser. ` +
        "This can't be undone.";
      question.showModal();
      byId("clear-keep").focus();
    });
    onClick("clear-all", () => {
      question.close();
      byId("toast").replaceChildren();
      this.#drop(this.tiles);
      this.#write(this.#store.clear(), () => {});
      byId("generate").focus({ preventScroll: calm() });
      announce("All pictures are deleted");
    });
  }
}
