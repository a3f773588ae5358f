// Values for a tensor of the signature: generated ones, typed ones, and the pixels of an image.

const INTEGER = /^U?INT\d+$/;

export const sizeOf = (shape) => shape.reduce((product, size) => product * size, 1);

/** The kinds of values that can be generated for a type, the one to begin with first. */
export function fillings({ name, datatype }) {
  if (datatype === "BYTES") return ["text"];
  const all = ["random", "ones", "zeros"];
  const first = /mask/i.test(name) ? "ones" : /type/i.test(name) ? "zeros" : "random";
  return [first, ...all.filter((kind) => kind !== first)];
}

/** Generates the flat values of a tensor. */
export function generate(datatype, count, filling) {
  const one = () => {
    if (datatype === "BYTES") return "hello";
    if (datatype === "BOOL") return filling === "random" ? Math.random() < 0.5 : filling === "ones";
    if (filling !== "random") return filling === "ones" ? 1 : 0;
    if (INTEGER.test(datatype)) return Math.floor(Math.random() * 100);
    return Number((Math.random() * 2 - 1).toFixed(4));
  };
  return Array.from({ length: count }, one);
}

/** Reads the values a person typed: JSON, or one text per line for BYTES. Throws an `Error` that says what is wrong. */
export function readValues(text, { name, datatype }, shape) {
  const values = datatype === "BYTES" ? text.split("\n") : parseArray(text, name);
  if (values.length !== sizeOf(shape)) {
    throw new Error(`${name} holds ${values.length} values; its shape [${shape.join(", ")}] takes ${sizeOf(shape)}`);
  }
  const wanted = { BYTES: "string", BOOL: "boolean" }[datatype] ?? "number";
  const bad = values.findIndex((value) => typeof value !== wanted);
  if (bad >= 0) throw new Error(`${name}: value ${bad} is ${JSON.stringify(values[bad])}; ${datatype} takes a ${wanted}`);
  return values;
}

function parseArray(text, name) {
  let values;
  try {
    values = JSON.parse(text);
  } catch (error) {
    throw new Error(`${name} is not JSON: ${error.message}`);
  }
  if (!Array.isArray(values)) throw new Error(`${name} must be a JSON array`);
  return values.flat(Infinity);
}

/** Where height, width and channels are in an input that looks like an image; `null` for any other. */
export function imageLayout({ datatype, shape }) {
  if (shape.length !== 4 || !(datatype.startsWith("FP") || datatype === "UINT8")) return null;
  if (shape[1] === 3 || shape[1] === 1) return { channels: shape[1], axes: ["row", "channel", "height", "width"] };
  if (shape[3] === 3 || shape[3] === 1) return { channels: shape[3], axes: ["row", "height", "width", "channel"] };
  return null;
}

/** How a byte of a pixel becomes a value. */
export const SCALES = {
  "0 to 1": (byte) => byte / 255,
  "-1 to 1": (byte) => byte / 127.5 - 1,
  "0 to 255": (byte) => byte,
  "ImageNet": (byte, channel) => (byte / 255 - [0.485, 0.456, 0.406][channel]) / [0.229, 0.224, 0.225][channel],
};

/** Scales an image to the height and width of `shape` and returns its flat values in the order of the layout. */
export async function imageValues(file, layout, shape, scale) {
  const [height, width] = ["height", "width"].map((axis) => shape[layout.axes.indexOf(axis)]);
  const bitmap = await createImageBitmap(file);
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d");
  context.drawImage(bitmap, 0, 0, width, height);
  const { data } = context.getImageData(0, 0, width, height);
  const pixel = (y, x, channel) => {
    const at = (y * width + x) * 4;
    const byte = layout.channels === 1 ? 0.299 * data[at] + 0.587 * data[at + 1] + 0.114 * data[at + 2] : data[at + channel];
    const value = scale(byte, channel);
    return Number(value.toFixed(4));
  };
  const sizes = { row: 1, channel: layout.channels, height, width };
  const values = [];
  const walk = (depth, place) => {
    const axis = layout.axes[depth];
    if (axis === undefined) values.push(pixel(place.height, place.width, place.channel));
    else for (let at = 0; at < sizes[axis]; at += 1) walk(depth + 1, { ...place, [axis]: at });
  };
  walk(0, {});
  return values;
}
