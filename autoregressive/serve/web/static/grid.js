// A comparison: one setting from row to row, seeds from column to column.

import { byId, onClick } from "./dom.js";
import { plural } from "./words.js";

const MOST = 64; // pictures of a grid

/** "1, 2, 4-6" or "1..3 9": the numbers as texts; null if it is something else. */
export function listOf(text) {
  const values = [];
  for (const part of text.split(/[\s,;]+/).filter(Boolean)) {
    const range = /^(\d+)(?:-|\.\.|–)(\d+)$/.exec(part);
    if (!range) values.push(part);
    else {
      const [first, last] = range.slice(1).map(BigInt);
      if (last < first || last - first >= MOST) return null;
      for (let value = first; value <= last; value += 1n) values.push(String(value));
    }
  }
  return values.length ? values : null;
}

export class GridForm {
  /** @param {{onDraw: (plan) => void}} actions */
  constructor(form, picker, actions) {
    Object.assign(this, { form, picker, actions });
    const examples = {
      cfg_scale: "1, 2, 4, 8",
      temperature: "0.5, 0.8, 1",
      class_label: "fox, owl",
    };
    const axis = byId("grid-axis");
    axis.addEventListener("change", () => {
      byId("grid-values").value = examples[axis.value];
      form.clear(byId("grid-values"));
    });
    for (const id of ["grid-values", "grid-seeds"])
      byId(id).addEventListener("input", ({ target }) => form.clear(target));
    onClick("grid-draw", () => {
      const asked = this.#read();
      if (asked) actions.onDraw(asked);
    });
  }

  /** Fills in a grid. @returns {boolean} whether the form has such grids */
  fill({ axis, values, names, seeds }) {
    const choice = byId("grid-axis");
    if (![...choice.options].some(({ value }) => value === axis)) return false;
    choice.value = axis;
    const texts = names?.map((name, at) => {
      const option = this.picker.optionOf(values[at]);
      return option?.name === name ? this.picker.textOf(option) : name;
    });
    byId("grid-values").value = (texts ?? values).join(", ");
    byId("grid-seeds").value = seeds.join(", ");
    byId("grid").open = true;
    byId("grid-draw").focus();
    return true;
  }

  #values(axis) {
    const text = byId("grid-values").value;
    if (axis === "class_label") {
      const names = text
        .split(/[,;\n]+/)
        .map((name) => name.trim())
        .filter(Boolean);
      const found = names.map((name) => this.picker.find(name));
      const unknown = names.find((_, at) => !found[at]);
      if (unknown !== undefined) return { wrong: this.picker.complaintOf(unknown) };
      return { values: found.map(({ id, name }) => [id, name]) };
    }
    const values = listOf(text) ?? [];
    for (const value of values) {
      const wrong = this.form.complaintOf(axis, value);
      if (wrong) return { wrong: `${value}: ${wrong}` };
    }
    return { values: values.map((value) => [Number(value), value]) };
  }

  /** @returns {{name, facts, columns, cells}|null} */
  #read() {
    const axis = byId("grid-axis").value;
    const { values = [], wrong } = this.#values(axis);
    const seeds = listOf(byId("grid-seeds").value);
    const badSeed = seeds?.map((seed) => this.form.complaintOf("seed", seed)).find(Boolean);
    const many = values.length * (seeds?.length ?? 0);
    const complaints = [
      ["grid-seeds", seeds ? (badSeed ?? "") : "Seeds such as 1-4, or 7, 11."],
      ["grid-values", wrong ?? (values.length ? "" : "Values with commas between them.")],
    ];
    if (many > MOST) complaints[0][1] ||= `${many} pictures; a grid has at most ${MOST}.`;
    if (axis === "class_label" && values.length) this.picker.choose(values[0][0]);
    const base = this.form.read();
    for (const [id, words] of complaints) if (words) this.form.mark(id, words);
    if (!base || complaints.some(([, words]) => words)) return null;
    const what = byId("grid-axis").selectedOptions[0].textContent.toLowerCase();
    const isClass = axis === "class_label";
    const nameOf = (id) => this.picker.optionOf(id).name;
    const cells = values.flatMap(([value, words]) =>
      seeds.map((seed) => ({
        request: { ...base, [axis]: value, seed, n: 1 },
        name: isClass ? words : nameOf(base.class_label),
        words: `${isClass ? words : `${what} ${words}`} · seed ${seed}`,
      })),
    );
    const shown = values.map(([, words]) => words).join(", ");
    return {
      name: isClass ? "Classes" : nameOf(base.class_label),
      facts: `${isClass ? shown : `${what} ${shown}`} × ${plural(seeds.length, "seed")}`,
      columns: seeds.length,
      cells,
    };
  }
}
