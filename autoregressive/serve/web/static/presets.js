// Settings under a name, kept in this browser.

import { announce, byId, element, onClick } from "./dom.js";
import { browser } from "./storage.js";

const NAME = "presets";
const UNSAID = { n: "4", seed: "" }; // what is filled in where a preset does not say it

export class Presets {
  #presets = this.#stored;

  /** @param {{settings: () => Object, use: (settings: Object) => void}} actions */
  constructor(actions) {
    this.actions = actions;
    const dialog = byId("preset-dialog");
    const choice = byId("preset");
    choice.addEventListener("change", () => this.#use(choice.value));
    onClick("preset-save", () => {
      byId("preset-name").value = choice.value;
      dialog.showModal();
      byId("preset-name").select();
    });
    byId("preset-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#save(byId("preset-name").value.trim());
    });
    onClick("preset-delete", () => this.#delete(choice.value));
    this.#show("");
  }

  /** With those that another tab has saved meanwhile. */
  get #stored() {
    return browser.read(NAME, {});
  }

  #keep(presets) {
    this.#presets = presets;
    browser.set(NAME, JSON.stringify(presets));
  }

  #use(name) {
    if (name in this.#presets) this.actions.use({ ...UNSAID, ...this.#presets[name] });
    this.#show(name);
  }

  /** Names no preset any more once the settings are others: it can be chosen again. */
  compare() {
    if (!byId("preset").value) return;
    const settings = { ...UNSAID, ...this.actions.settings() };
    const preset = { ...UNSAID, ...this.#presets[byId("preset").value] };
    const names = Object.keys({ ...settings, ...preset });
    if (names.some((name) => settings[name] !== preset[name])) this.#show("");
  }

  #save(name) {
    this.#keep({ ...this.#stored, [name]: this.actions.settings() });
    byId("preset-dialog").close();
    this.#show(name);
    announce(`Saved as ${name}`);
  }

  #delete(name) {
    const { [name]: gone, ...others } = this.#stored;
    this.#keep(others);
    this.#show("");
    byId("preset").focus();
    announce(`${name} is deleted`);
  }

  #show(chosen) {
    const names = Object.keys(this.#presets).sort((a, b) => a.localeCompare(b));
    const first = element("option", { value: "" }, names.length ? "Choose" : "None saved yet");
    byId("preset").replaceChildren(
      first,
      ...names.map((name) => element("option", { value: name }, name)),
    );
    byId("preset").value = chosen;
    byId("preset-delete").hidden = !chosen;
  }
}
