// Settings under a name, kept in this browser.

import { announce, byId, element, onClick } from "./dom.js";
import { browser } from "./storage.js";

const NAME = "presets";

export class Presets {
  #presets = browser.read(NAME, {});

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

  #use(name) {
    if (name in this.#presets) this.actions.use(this.#presets[name]);
    this.#show(name);
  }

  /** Names no preset any more once the settings are others: it can be chosen again. */
  compare() {
    const settings = this.actions.settings();
    const preset = Object.entries(this.#presets[byId("preset").value] ?? {});
    if (preset.some(([name, value]) => settings[name] !== value)) this.#show("");
  }

  #save(name) {
    this.#presets = { ...this.#presets, [name]: this.actions.settings() };
    browser.set(NAME, JSON.stringify(this.#presets));
    byId("preset-dialog").close();
    this.#show(name);
    announce(`Saved as ${name}`);
  }

  #delete(name) {
    const { [name]: gone, ...others } = this.#presets;
    if (!gone) return;
    this.#presets = others;
    browser.set(NAME, JSON.stringify(this.#presets));
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
