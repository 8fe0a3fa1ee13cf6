// The record that the program leaves in a picture's file: PNG, JPEG and WebP.

import { readExactly } from "./exact.js";

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

/** The request that a record is of; a grid's is that of its first picture. */
export function requestOf(record) {
  const { label, labels, class_name: name, class_names: names } = record;
  return {
    class_label: label ?? labels?.[0],
    class_name: name ?? names?.[0],
    n: Math.min(10, record.images ?? labels?.length ?? 1),
    seed: String(record.seed ?? ""),
    cfg_scale: record.cfg_scale,
    cfg_interval: record.cfg_interval,
    temperature: record.temperature,
    top_k: record.top_k,
    top_p: record.top_p,
  };
}
