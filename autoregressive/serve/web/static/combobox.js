// The class picker: an editable combobox with a list that narrows, after the ARIA pattern.

import { byId, element } from "./dom.js";

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

/** Letters to change, add, leave out or swap with a neighbour until one word is the other. */
export function distance(one, other) {
  let before = [];
  let last = Array.from({ length: other.length + 1 }, (_, at) => at);
  for (let i = 1; i <= one.length; i += 1) {
    const row = [i];
    for (let j = 1; j <= other.length; j += 1) {
      const same = one[i - 1] === other[j - 1];
      row[j] = Math.min(row[j - 1] + 1, last[j] + 1, last[j - 1] + (same ? 0 : 1));
      if (i > 1 && j > 1 && one[i - 1] === other[j - 2] && one[i - 2] === other[j - 1])
        row[j] = Math.min(row[j], before[j - 2] + 1);
    }
    [before, last] = [last, row];
  }
  return last[other.length];
}

export class ClassPicker {
  #options = [];
  #shown = [];
  #active = -1;
  #chosen = null;
  #typed = false; // what stands in the field was typed, not chosen

  /** @param {Object} actions thumbnail(node, id) shows a class; onChange() */
  constructor({ thumbnail, onChange }) {
    const [input, list, popup] = [byId("class"), byId("class-list"), byId("class-popup")];
    const [empty, badge, opener] = [byId("class-empty"), byId("class-id"), byId("class-open")];
    Object.assign(this, { input, list, popup, empty, badge, opener, thumbnail, onChange });
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
        element("span", { class: "option-picture" }),
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

  /** The class that a text can mean, by name or id; null if it is none, or several. */
  find(text) {
    const query = folded(text);
    if (!query) return null;
    const fitting = this.#options.filter((option) => rank(option, query) !== null);
    const exact = fitting.filter((option) => rank(option, query) === 0);
    if (exact.length) return exact.length === 1 ? exact[0] : null;
    return fitting.length === 1 ? fitting[0] : null;
  }

  /** What is chosen, by choice or by text that can mean one class only; null otherwise. */
  get value() {
    return this.#typed ? this.find(this.input.value) : this.#chosen;
  }

  /** What stands for the choice in an address: the name, or the id where several bear the name. */
  get text() {
    return this.value === null ? this.input.value.trim() : this.textOf(this.value);
  }

  textOf(option) {
    return this.find(option.name) === option ? option.name : option.digits;
  }

  /** Why a text means no class: that in the field, if no other is given. */
  complaintOf(text = this.input.value) {
    const query = folded(text);
    if (!query) return "Choose a class.";
    const fitting = this.#options.filter((option) => rank(option, query) !== null);
    if (fitting.length) return `${fitting.length} classes fit “${text.trim()}”: choose one.`;
    const near = this.#near(query).map(({ name }) => name);
    const hint = near.length ? ` Did you mean ${near.join(" or ")}?` : "";
    return `There is no class like “${text.trim()}”.${hint}`;
  }

  /** Classes of almost that name, the nearest first. */
  #near(query) {
    const most = query.length < 5 ? 1 : 2;
    const far = ({ folded: name }) =>
      Math.min(...[name, ...name.split(" ")].map((word) => distance(query, word)));
    return this.#options
      .map((option) => ({ option, by: far(option) }))
      .filter(({ by }) => by <= most)
      .sort((first, second) => first.by - second.by)
      .slice(0, 3)
      .map(({ option }) => option);
  }

  /** Fills in a text that nobody has chosen from the list. */
  type(text) {
    this.input.value = text;
    this.#typed = true;
    this.#chosen = null;
    this.badge.textContent = "";
    if (this.value) this.choose(this.value.id);
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
    this.#shown = fitting.length ? fitting.map(({ option }) => option) : this.#near(query);
    this.list.replaceChildren(...this.#shown.map(({ node }) => node));
    this.list.hidden = !this.#shown.length;
    this.empty.hidden = fitting.length > 0;
    const hint = this.#shown.length ? ". Did you mean one of these?" : "";
    this.empty.textContent = `No class like “${this.input.value.trim()}”${hint}`;
    for (const { id, node } of this.#shown) {
      this.thumbnail(node.firstChild, id);
      node.setAttribute("aria-selected", String(!this.#typed && id === this.#chosen?.id));
    }
    this.#mark(
      query
        ? fitting.length
          ? 0
          : -1
        : this.#shown.findIndex(({ id }) => !this.#typed && id === this.#chosen?.id),
    );
  }

  #mark(at) {
    this.#shown[this.#active]?.node.classList.remove("active");
    const node = this.#shown[at]?.node;
    this.#active = node ? at : -1;
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
    const { key, altKey } = event;
    if (event.ctrlKey || event.metaKey || event.isComposing) return;
    const last = this.#shown.length - 1;
    const by = { ArrowDown: 1, ArrowUp: -1 }[key];
    if (by && !this.isOpen) {
      this.#open();
      if (this.#active < 0 && !altKey) this.#mark(by > 0 ? 0 : this.#shown.length - 1);
    } else if (!this.isOpen) return;
    else if (by && altKey && by < 0) this.close();
    else if (by > 0) this.#mark(this.#active >= last ? 0 : this.#active + 1);
    else if (by) this.#mark(this.#active <= 0 ? last : this.#active - 1);
    else if (key === "Enter") this.commit(); // the next Enter generates
    else if (key === "Escape") this.close();
    else {
      if (key === "Tab" && this.#active >= 0 && !this.#typed) this.commit();
      return;
    }
    event.preventDefault();
    event.stopPropagation(); // Escape does not cancel a drawing, too
  }
}
