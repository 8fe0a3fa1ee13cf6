// The record that the program leaves in a picture's file: PNG, JPEG and WebP.

import { readExactly, writeExactly } from "./exact.js";
import { crc32 } from "./zip.js";

const NAME = "llamagen"; // of a PNG's text; in the EXIF data of the others: {NAME: record}

/** @returns {Promise<Object|null>} the record of a picture's file; null if it has none */
export async function recordOf(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  const text = new TextDecoder("latin1").decode(bytes); // a letter for each byte
  const chunk = text.indexOf(`tEXt${NAME}\0`);
  const description = text.indexOf(`{"${NAME}":`);
  try {
    if (chunk > 0) {
      const end = chunk + 4 + new DataView(bytes.buffer).getUint32(chunk - 4);
      return readExactly(text.slice(text.indexOf("\0", chunk) + 1, end));
    }
    // EXIF ends a text with a zero.
    return readExactly(text.slice(description, text.indexOf("\0", description)))[NAME];
  } catch {
    return null; // the file is cut off, or another program's
  }
}

/** A PNG with a record in it, behind the chunk that every PNG begins with. */
export async function withRecord(png, record) {
  const ascii = writeExactly(record).replace(
    /[\u0080-\uffff]/g,
    (letter) => `\\u${letter.charCodeAt(0).toString(16).padStart(4, "0")}`,
  );
  const content = new TextEncoder().encode(`tEXt${NAME}\0${ascii}`);
  const number = (value) => new Uint8Array(new Uint32Array([value]).buffer).reverse();
  const chunk = [number(content.length - 4), content, number(crc32(content))];
  const start = 33; // the signature and the header
  return new Blob([png.slice(0, start), ...chunk, png.slice(start)], { type: png.type });
}

/** What varies in a grid: lists of values by name. */
function variedOf({ axes }) {
  return Array.isArray(axes) ? Object.assign({}, ...axes) : {};
}

/** The request that a record is of; a grid's is that of its first picture. */
export function requestOf(record) {
  const firsts = Object.entries(variedOf(record)).map(([name, [value]]) => [name, value]);
  const { label, labels, class_name: name, class_names: names, images, seed, ...settings } = {
    ...record,
    ...Object.fromEntries(firsts),
  };
  return {
    ...settings,
    class_label: label ?? labels?.[0],
    class_name: name ?? names?.[0],
    n: Math.min(10, images ?? labels?.length ?? 1),
    seed: String(seed ?? ""),
  };
}

/**
 * The grid that a record is of; null if it is none, or one with two settings against each other.
 * @returns {{axis: string, values: Array, names: string[]?, seeds: string[]}|null}
 */
export function gridOf(record) {
  const { seed: seeds = [record.seed], label, class_name: names, ...rest } = variedOf(record);
  const others = Object.entries(label ? { ...rest, class_label: label } : rest);
  const [[axis, values] = ["cfg_scale", [record.cfg_scale]]] = others;
  return record.axes && others.length < 2 ? { axis, values, names, seeds } : null;
}

/** One record of several pictures: what varies is in `axes`, as a grid's record has it. */
export function joined(records) {
  const axes = [{}, {}];
  const same = {};
  for (const name of Object.keys(records[0]).filter((key) => key !== "image")) {
    const values = [...new Set(records.map((record) => record[name]))];
    if (values.length === 1) [same[name]] = values;
    else axes[name === "seed" ? 0 : 1][name] = values;
  }
  const varied = axes.filter((axis) => Object.keys(axis).length);
  return varied.length ? { ...same, axes: varied } : same;
}
