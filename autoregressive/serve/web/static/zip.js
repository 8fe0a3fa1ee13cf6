// A zip archive whose files are stored as they are: pictures are compressed already.

const TABLE = Uint32Array.from({ length: 256 }, (_, byte) => {
  let value = byte;
  for (let bit = 0; bit < 8; bit += 1) value = value & 1 ? 0xedb88320 ^ (value >>> 1) : value >>> 1;
  return value;
});

export function crc32(bytes) {
  let crc = 0xffffffff;
  for (const byte of bytes) crc = TABLE[(crc ^ byte) & 255] ^ (crc >>> 8);
  return (crc ^ 0xffffffff) >>> 0;
}

/** Little-endian numbers, given as [bytes, value]. */
function record(...fields) {
  const length = fields.reduce((sum, [size]) => sum + size, 0);
  const view = new DataView(new ArrayBuffer(length));
  let at = 0;
  for (const [size, value] of fields) {
    if (size === 2) view.setUint16(at, value, true);
    else view.setUint32(at, value, true);
    at += size;
  }
  return new Uint8Array(view.buffer);
}

/** @param {{name: string, bytes: Uint8Array}[]} files @returns {Uint8Array} */
export function zip(files, now = new Date()) {
  const time = (now.getHours() << 11) | (now.getMinutes() << 5) | (now.getSeconds() >> 1);
  const date = ((now.getFullYear() - 1980) << 9) | ((now.getMonth() + 1) << 5) | now.getDate();
  const parts = [];
  const directory = [];
  let offset = 0;
  for (const { name, bytes } of files) {
    const letters = new TextEncoder().encode(name);
    const size = bytes.length;
    // version, flags (names are UTF-8), method (stored)
    const common = [
      [2, 20],
      [2, 0x800],
      [2, 0],
      [2, time],
      [2, date],
    ];
    common.push([4, crc32(bytes)], [4, size], [4, size], [2, letters.length], [2, 0]);
    const head = record([4, 0x04034b50], ...common);
    parts.push(head, letters, bytes);
    const rest = [
      [2, 0],
      [2, 0],
      [2, 0],
      [4, 0],
      [4, offset],
    ];
    directory.push(record([4, 0x02014b50], [2, 20], ...common, ...rest), letters);
    offset += head.length + letters.length + size;
  }
  const length = directory.reduce((sum, part) => sum + part.length, 0);
  const counts = [
    [2, 0],
    [2, 0],
    [2, files.length],
    [2, files.length],
  ];
  directory.push(record([4, 0x06054b50], ...counts, [4, length], [4, offset], [2, 0]));
  const archive = new Uint8Array(offset + length + 22);
  let at = 0;
  for (const part of [...parts, ...directory]) {
    archive.set(part, at);
    at += part.length;
  }
  return archive;
}
