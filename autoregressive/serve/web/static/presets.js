// Settings under a name, kept in this browser.

import { announce, byId, element } from "./dom.js";

const NAME = "presets";

function stored() {
  try {
    const found = JSON.parse(localStorage.getItem(NAME) ?? "{}");
    return found && typeof found === "object" ? found : {};
  } catch {
    return {};
  }
}

export class Presets {
  #presets = stored();

  /** @param {{settings: () => Object, use: (settings: Object) => void}} actions */
  constructor(actions) {
    this.actions = actions;
    const dialog = byId("preset-dialog");
    const choice = byId("preset");
    choice.addEventListener("change", () => this.#use(choice.value));
    byId("preset-save").addEventListener("click", () => {
      byId("preset-name").value = choice.value;
      dialog.showModal();
      byId("preset-name").select();
    });
    byId("preset-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#save(byId("preset-name").value.trim());
    });
    byId("preset-cancel").addEventListener("click", () => dialog.close());
    byId("preset-delete").addEventListener("click", () => this.#delete(choice.value));
    this.#show("");
  }

  #use(name) {
    if (name in this.#presets) this.actions.use(this.#presets[name]);
    this.#show(name);
  }

  #save(name) {
    if (!name) return;
    this.#presets = { ...this.#presets, [name]: this.actions.settings() };
    this.#keep();
    byId("preset-dialog").close();
    this.#show(name);
    announce(`Saved as ${name}`);
  }

  #delete(name) {
    const { [name]: gone, ...others } = this.#presets;
    if (!gone) return;
    this.#presets = others;
    this.#keep();
    this.#show("");
    byId("preset").focus();
    announce(`${name} is deleted`);
  }

  #keep() {
    try {
      localStorage.setItem(NAME, JSON.stringify(this.#presets));
    } catch {
      // where storage is switched off they last as long as the page
    }
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
