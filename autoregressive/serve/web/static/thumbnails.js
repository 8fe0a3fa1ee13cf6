// Small pictures of classes: of the picture of all classes where the server has one, else the
// newest that was drawn.

const ACROSS = 16; // classes in a row of the picture of all

/**
 * Shows a class in an element, which is hidden where there is no picture of it.
 * @param {Element} node
 * @param {number} id of the class
 * @param {Object} model as the server describes it
 * @param {string} [drawn] address of the newest picture of the class
 */
export function showClass(node, id, { class_pictures: all, num_classes: count }, drawn) {
  node.hidden = !all && !drawn;
  const down = Math.ceil(count / ACROSS);
  const share = (at, of) => `${(at / Math.max(1, of - 1)) * 100}%`;
  const style = all
    ? {
        backgroundImage: `url(${all})`,
        backgroundSize: `${ACROSS * 100}% ${down * 100}%`,
        backgroundPosition: `${share(id % ACROSS, ACROSS)} ${share(Math.floor(id / ACROSS), down)}`,
      }
    : { backgroundImage: drawn ? `url(${drawn})` : "none" };
  Object.assign(node.style, style);
}
