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

function concatenated(parts) {
  const whole = new Uint8Array(parts.reduce((sum, { length }) => sum + length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}

/** Numbers in so many bytes each, the lowest byte first. */
function record(sizes, values) {
  const bytes = (value, size) => new Uint8Array(new Uint32Array([value]).buffer, 0, size);
  return concatenated(values.map((value, at) => bytes(value, Number(sizes[at]))));
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
    const { length } = bytes;
    // version, flags (names are UTF-8), method (stored), ...
    const facts = [20, 0x800, 0, time, date, crc32(bytes), length, length, letters.length, 0];
    const head = record("42222244422", [0x04034b50, ...facts]);
    parts.push(head, letters, bytes);
    const rest = [0, 0, 0, 0, offset];
    directory.push(record("42222224442222244", [0x02014b50, 20, ...facts, ...rest]), letters);
    offset += head.length + letters.length + length;
  }
  const size = directory.reduce((sum, { length }) => sum + length, 0);
  const count = files.length;
  const end = record("42222442", [0x06054b50, 0, 0, count, count, size, offset, 0]);
  return concatenated([...parts, ...directory, end]);
}
