// The class picker: an editable combobox with a list that narrows, after the ARIA pattern.

import { element } from "./dom.js";

const PAGE = 8; // options that Page Up and Page Down jump

const folded = (text) =>
  text
    .normalize("NFKD")
    .replace(/[\u0300-\u036f]/g, "")
    .toLowerCase()
    .replace(/[\s_]+/g, " ")
    .trim();

/** How well an option fits, lower being better; null if it does not. */
function rank(option, query) {
  if (option.folded === query || option.digits === query) return 0;
  if (option.folded.startsWith(query)) return 1;
  if (option.folded.includes(` ${query}`)) return 2;
  if (option.folded.includes(query)) return 3;
  if (option.digits.startsWith(query)) return 4;
  return null;
}

export class ClassPicker {
  #options = [];
  #shown = [];
  #active = -1;
  #chosen = null;
  #typed = false; // what stands in the field was typed, not chosen

  constructor({ input, list, popup, empty, badge, opener, onChange }) {
    Object.assign(this, { input, list, popup, empty, badge, opener, onChange });
    input.addEventListener("input", () => this.#edited());
    input.addEventListener("keydown", (event) => this.#key(event));
    input.addEventListener("click", () => this.#open());
    input.addEventListener("focus", () => input.select());
    input.addEventListener("blur", () => this.#left());
    // The field keeps the focus.
    opener.addEventListener("pointerdown", (event) => event.preventDefault());
    opener.addEventListener("click", () => {
      const open = this.isOpen;
      input.focus();
      if (open) this.close();
      else this.#open(true);
    });
    popup.addEventListener("pointerdown", (event) => event.preventDefault());
    list.addEventListener("click", (event) => {
      const option = event.target.closest('[role="option"]');
      if (option) this.choose(Number(option.dataset.id));
    });
  }

  get isOpen() {
    return !this.popup.hidden;
  }

  /** @param {{id: number, name: string}[]} classes */
  setClasses(classes) {
    this.#options = classes.map(({ id, name }) => ({
      id,
      name,
      folded: folded(name),
      digits: String(id),
      node: element(
        "li",
        { id: `class-option-${id}`, role: "option", "aria-selected": "false", "data-id": id },
        element("span", { class: "option-name" }, name),
        element("span", { class: "option-id" }, String(id)),
      ),
    }));
    if (this.#chosen !== null && this.optionOf(this.#chosen.id)?.name !== this.#chosen.name)
      this.#chosen = null;
    if (this.isOpen) this.#filter();
  }

  get classes() {
    return this.#options;
  }

  optionOf(id) {
    return this.#options.find((option) => option.id === id);
  }

  /** What is chosen, by choice or by text that can mean one class only; null otherwise. */
  get value() {
    if (!this.#typed) return this.#chosen;
    const query = folded(this.input.value);
    if (!query) return null;
    const fitting = this.#options.filter((option) => rank(option, query) !== null);
    const exact = fitting.filter((option) => rank(option, query) === 0);
    if (exact.length) return exact.length === 1 ? exact[0] : null;
    return fitting.length === 1 ? fitting[0] : null;
  }

  /** Why there is no value. */
  get complaint() {
    const query = folded(this.input.value);
    if (!query) return "Choose a class.";
    const fitting = this.#options.filter((option) => rank(option, query) !== null);
    if (!fitting.length) return `There is no class like “${this.input.value.trim()}”.`;
    return `${fitting.length} classes fit “${this.input.value.trim()}”: choose one.`;
  }

  choose(id) {
    const option = this.optionOf(id);
    if (!option) return;
    this.#chosen = option;
    this.#typed = false;
    this.input.value = option.name;
    this.badge.textContent = `#${option.id}`;
    this.close();
    this.onChange();
  }

  /** Takes what is marked in the open list, or what the text means. */
  commit() {
    if (this.isOpen && this.#active >= 0) this.choose(this.#shown[this.#active].id);
    else if (this.#typed && this.value) this.choose(this.value.id);
    this.close();
  }

  close() {
    if (!this.isOpen) return;
    this.popup.hidden = true;
    this.input.setAttribute("aria-expanded", "false");
    this.opener.setAttribute("aria-expanded", "false");
    this.#mark(-1);
  }

  #open(all = false) {
    if (this.isOpen || !this.#options.length) return;
    this.popup.hidden = false;
    this.input.setAttribute("aria-expanded", "true");
    this.opener.setAttribute("aria-expanded", "true");
    this.#filter(all || !this.#typed);
  }

  #filter(all = !this.#typed) {
    const query = all ? "" : folded(this.input.value);
    const fitting = this.#options
      .map((option) => ({ option, fit: query ? rank(option, query) : 0 }))
      .filter(({ fit }) => fit !== null);
    fitting.sort((first, second) => first.fit - second.fit || first.option.id - second.option.id);
    this.#shown = fitting.map(({ option }) => option);
    this.list.replaceChildren(...this.#shown.map(({ node }) => node));
    this.list.hidden = !this.#shown.length;
    this.empty.hidden = this.#shown.length > 0;
    this.empty.textContent = `No class like “${this.input.value.trim()}”`;
    for (const { id, node } of this.#shown)
      node.setAttribute("aria-selected", String(!this.#typed && id === this.#chosen?.id));
    this.#mark(
      query
        ? this.#shown.length
          ? 0
          : -1
        : this.#shown.findIndex(({ id }) => !this.#typed && id === this.#chosen?.id),
    );
  }

  #mark(at) {
    this.#shown[this.#active]?.node.classList.remove("active");
    this.#active = at;
    const node = this.#shown[at]?.node;
    if (!node) {
      this.input.removeAttribute("aria-activedescendant");
      if (this.isOpen) this.list.scrollTop = 0;
      return;
    }
    node.classList.add("active");
    this.input.setAttribute("aria-activedescendant", node.id);
    node.scrollIntoView({ block: "nearest" });
  }

  #edited() {
    this.#typed = true;
    this.badge.textContent = "";
    if (this.isOpen) this.#filter();
    else this.#open();
    this.onChange();
  }

  #left() {
    if (this.#typed && this.value) this.choose(this.value.id);
    this.close();
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.isComposing) return;
    const last = this.#shown.length - 1;
    const move = (to) => {
      event.preventDefault();
      if (last >= 0) this.#mark(to);
    };
    switch (event.key) {
      case "ArrowDown":
      case "ArrowUp": {
        const down = event.key === "ArrowDown";
        if (!this.isOpen) {
          event.preventDefault();
          this.#open();
          if (this.#active < 0 && this.#shown.length && !event.altKey)
            this.#mark(down ? 0 : this.#shown.length - 1);
        } else if (event.altKey && !down) {
          event.preventDefault();
          this.close();
        } else if (down) move(this.#active >= last ? 0 : this.#active + 1);
        else move(this.#active <= 0 ? last : this.#active - 1);
        break;
      }
      case "PageDown":
        if (this.isOpen) move(Math.min(last, this.#active + PAGE));
        break;
      case "PageUp":
        if (this.isOpen) move(Math.max(0, this.#active - PAGE));
        break;
      case "Enter":
        if (this.isOpen) {
          event.preventDefault(); // chooses; the next Enter generates
          this.commit();
        }
        break;
      case "Tab":
        if (this.isOpen && this.#active >= 0 && !this.#typed) this.commit();
        break;
      case "Escape":
        if (this.isOpen) {
          event.preventDefault();
          event.stopPropagation(); // closes the list, and does not cancel a drawing too
          this.close();
        }
        break;
      default:
    }
  }
}
