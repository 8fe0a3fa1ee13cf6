// Several pictures as one: with a title above, and what tells each from the others below it.

const GAP = 8;

/** @returns {Promise<Blob>} a PNG; columns 0: as square as it goes */
export async function composeSheet(pictures, columns, title) {
  const bitmaps = await Promise.all(pictures.map(({ blob }) => createImageBitmap(blob)));
  const side = Math.max(...bitmaps.map(({ width }) => width));
  const across = columns || Math.ceil(Math.sqrt(pictures.length));
  const letters = Math.max(11, Math.round(side / 16));
  const strip = letters * 2;
  const pitch = [side + GAP, side + strip + GAP];
  const places = pictures.map(({ order }, at) => (columns ? Math.floor(order / 100) : at));
  const canvas = document.createElement("canvas");
  canvas.width = across * pitch[0] + GAP;
  canvas.height = strip + Math.ceil((Math.max(...places) + 1) / across) * pitch[1] + GAP;
  const context = canvas.getContext("2d");
  context.fillStyle = "#ffffff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = "#211f1c";
  context.textBaseline = "middle";
  const write = (words, weight, x, y, width) => {
    context.font = `${weight} ${letters}px system-ui, sans-serif`;
    context.fillText(words, x, y, width);
  };
  write(title, 650, GAP, strip / 2, canvas.width - 2 * GAP);
  pictures.forEach(({ words }, at) => {
    const x = GAP + (places[at] % across) * pitch[0];
    const y = strip + Math.floor(places[at] / across) * pitch[1];
    context.drawImage(bitmaps[at], x, y, side, side);
    write(words, 400, x, y + side + strip / 2, side);
  });
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}
