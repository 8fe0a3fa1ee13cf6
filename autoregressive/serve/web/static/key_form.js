// The form for the key of a server that asks for one.

import { announce, byId, onClick } from "./dom.js";
import { forgetKey, isRemembered, storeKey, storedKey } from "./key.js";
import { describe } from "./words.js";

export class KeyForm {
  /**
   * @param {Object} actions onKey() -> promise of whether the server has accepted the key;
   *     connected() -> whether the page has been let in
   */
  constructor(actions) {
    this.actions = actions;
    byId("key-form").addEventListener("submit", (event) => this.#use(event));
    byId("key").addEventListener("input", () => this.#complain(""));
    onClick("key-forget", () => {
      forgetKey();
      byId("key-remember").checked = false;
      announce("The key is forgotten");
      this.#hide();
      byId("key-button").hidden = true;
      byId("class").focus();
    });
    onClick("key-close", () => {
      this.#hide();
      byId("key-button").focus();
    });
    onClick("key-button", () => {
      const how = isRemembered() ? "remembered in this browser" : "until this tab is closed";
      if (this.isOpen) byId("key").focus();
      else this.#show("API key", `A key is in use, ${how}.`);
    });
  }

  get isOpen() {
    return !byId("key-form").hidden;
  }

  /** After the server has let the page in. */
  settle() {
    byId("key-button").hidden = storedKey() === null;
  }

  /** The server wants a key, or another one. */
  ask(failure) {
    const remembered = isRemembered();
    if (failure.keySent) forgetKey();
    const { title, detail } = describe(failure);
    this.#show(title, detail);
    if (remembered) byId("key-remember").checked = true;
    announce(`${title} ${detail}`);
  }

  #show(title, detail) {
    byId("key-title").textContent = title;
    byId("key-detail").textContent = detail;
    byId("key-remember").checked ||= isRemembered();
    byId("key-forget").hidden = storedKey() === null;
    byId("key-close").hidden = !this.actions.connected();
    byId("key-form").hidden = false;
    byId("key-button").hidden = false;
    byId("key").focus();
  }

  #hide() {
    byId("key-form").hidden = true;
  }

  #complain(words) {
    byId("key-error").textContent = words;
    byId("key-error").hidden = !words;
    byId("key").toggleAttribute("aria-invalid", Boolean(words));
    if (words) byId("key").focus();
  }

  async #use(event) {
    event.preventDefault();
    const key = byId("key").value.trim();
    const isKey = /^[\x21-\x7e]+$/.test(key);
    if (!isKey) {
      this.#complain(
        key ? "A key has letters, digits and signs only, no spaces." : "Enter the key.",
      );
      return;
    }
    storeKey(key, byId("key-remember").checked);
    this.#hide();
    byId("key").value = "";
    if (!(await this.actions.onKey())) return;
    // The focus stays where somebody types.
    if (document.activeElement === document.body) byId("generate").focus();
  }
}
