// The record that the program leaves in a picture's file: PNG, JPEG and WebP.

import { readExactly, writeExactly } from "./exact.js";
import { crc32 } from "./zip.js";

const NAME = "llamagen"; // PNG's text of that name; in the others {NAME: record} as EXIF
const IMAGE_DESCRIPTION = 0x010e;

const latin = (bytes) => Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");
const view = (bytes) => new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);

/** [kind, content] of each chunk of a PNG. */
function* pngChunks(bytes) {
  for (let at = 8; at + 12 <= bytes.length;) {
    const length = view(bytes).getUint32(at);
    yield [latin(bytes.subarray(at + 4, at + 8)), bytes.subarray(at + 8, at + 8 + length)];
    at += 12 + length;
  }
}

function pngText(bytes) {
  for (const [kind, content] of pngChunks(bytes)) {
    if (kind !== "tEXt") continue;
    const text = latin(content);
    if (text.startsWith(`${NAME}\0`)) return text.slice(NAME.length + 1);
  }
  return null;
}

function jpegExif(bytes) {
  for (let at = 2; at + 4 <= bytes.length && bytes[at] === 0xff;) {
    const length = view(bytes).getUint16(at + 2);
    const content = bytes.subarray(at + 4, at + 2 + length);
    if (bytes[at + 1] === 0xe1 && latin(content.subarray(0, 6)) === "Exif\0\0")
      return content.subarray(6);
    at += 2 + length;
  }
  return null;
}

function webpExif(bytes) {
  for (let at = 12; at + 8 <= bytes.length;) {
    const length = view(bytes).getUint32(at + 4, true);
    const content = bytes.subarray(at + 8, at + 8 + length);
    if (latin(bytes.subarray(at, at + 4)) === "EXIF")
      return latin(content.subarray(0, 6)) === "Exif\0\0" ? content.subarray(6) : content;
    at += 8 + length + (length % 2);
  }
  return null;
}

function description(exif) {
  if (!exif) return null;
  const data = view(exif);
  const little = latin(exif.subarray(0, 2)) === "II";
  const directory = data.getUint32(4, little);
  const count = data.getUint16(directory, little);
  for (let k = 0; k < count; k += 1) {
    const entry = directory + 2 + 12 * k;
    if (data.getUint16(entry, little) !== IMAGE_DESCRIPTION) continue;
    const length = data.getUint32(entry + 4, little);
    const start = length > 4 ? data.getUint32(entry + 8, little) : entry + 8;
    return latin(exif.subarray(start, start + length)).replace(/\0+$/, "");
  }
  return null;
}

/** @returns {Promise<Object|null>} the record of a picture's file; null if it has none */
export async function recordOf(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  try {
    const start = latin(bytes.subarray(0, 12));
    if (start.startsWith("\x89PNG")) return readExactly(pngText(bytes) ?? "null");
    if (start.startsWith("\xff\xd8"))
      return readExactly(description(jpegExif(bytes)) ?? "null")?.[NAME] ?? null;
    if (start.startsWith("RIFF") && start.endsWith("WEBP"))
      return readExactly(description(webpExif(bytes)) ?? "null")?.[NAME] ?? null;
  } catch {
    // the file is cut off, or another program's
  }
  return null;
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
