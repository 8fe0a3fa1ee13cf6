// Texts that this tab or this browser keeps. Where storage is switched off, they last as long as the
// page.

class Texts {
  #held = new Map();
  #kind;

  constructor(kind) {
    this.#kind = kind;
  }

  get(name) {
    try {
      return window[this.#kind].getItem(name);
    } catch {
      return this.#held.get(name) ?? null;
    }
  }

  /** @param {string?} text null: nothing is kept any more */
  set(name, text) {
    this.#held.set(name, text);
    try {
      if (text === null) window[this.#kind].removeItem(name);
      else window[this.#kind].setItem(name, text);
    } catch {
      // it is held here
    }
  }

  /** What was kept as JSON, if it is of the kind of `none`; else `none`. */
  read(name, none) {
    try {
      const found = JSON.parse(this.get(name));
      return found && Array.isArray(found) === Array.isArray(none) ? found : none;
    } catch {
      return none;
    }
  }
}

export const tab = new Texts("sessionStorage");
export const browser = new Texts("localStorage");
