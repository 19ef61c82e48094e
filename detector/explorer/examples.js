// Examples small enough to follow by hand, each on a map of its own with stride 1.

const MAP_8 = [
  [11, 19, 22, 48, 48, 68, 72, 86],
  [34, 48, 57, 51, 76, 71, 94, 104],
  [48, 54, 72, 70, 97, 102, 17, 13],
  [70, 82, 89, 103, 18, 14, 36, 34],
  [97, 109, 13, 25, 27, 36, 49, 56],
  [6, 21, 34, 44, 46, 60, 72, 72],
  [37, 31, 48, 70, 77, 81, 87, 105],
  [54, 54, 79, 83, 96, 101, 11, 26],
];
/** 16 x 16 cells; the four that example D works with, the others some pattern. */
const MAP_16 = Array.from({ length: 16 }, (_, v) => Array.from({ length: 16 }, (_, u) => ((7 * u + 3 * v) % 10) / 10));
[MAP_16[6][9], MAP_16[6][10], MAP_16[7][9], MAP_16[7][10]] = [0.1, 0.2, 1, 0.7];
const MAP_5 = [
  [10, 30, 50, 70, 90],
  [25, 45, 65, 85, 5],
  [40, 60, 80, 0, 20],
  [55, 75, 95, 15, 35],
  [70, 90, 10, 30, 50],
];

function example(name, rows, about, start) {
  const [width, height] = [rows[0].length, rows.length];
  const map = { stride: 1, width, height, channels: 1, data: Float32Array.from(rows.flat()) };
  const settings = { size: [2, 2], ratio: 2, reduction: "avg", placement: "centre", ...start };
  return { name, about, width, height, maps: [map], boxes: [], step: 0.1, start: settings };
}

const EXAMPLES = [
  example(
    "Example A: RoI Pool, uniform bins", MAP_8,
    "The RoI is floored to 3 × 3 cells. Two bins of floor(3 / 2) = 1 cell leave a row and a column unread.",
    { method: "pool_uniform", roi: [1.3, 0.8, 1.3 + 3.4, 0.8 + 2.6] },
  ),
  example(
    "Example B: RoI Pool, floor boundaries", MAP_8,
    "7 × 5 cells in 2 × 2 bins of unequal size: columns [0, 3) and [3, 7), rows [3, 5) and [5, 8). No cell is dropped.",
    { method: "pool_floor", roi: [0, 3, 7, 8] },
  ),
  example(
    "Example C: bilinear interpolation", MAP_5,
    "One point at (2.30, 1.70), where cell (2, 1) lies at (2, 1): 0.21 · 65 + 0.09 · 85 + 0.49 · 80 + 0.21 · 0 = 60.5.",
    { method: "align_legacy", size: [1, 1], ratio: 1, roi: [1.8, 1.2, 2.8, 2.2], point: [0, 0] },
  ),
  example(
    "Example D: RoI Align, 3 × 3 points per bin, maximum", MAP_16,
    "Points at the far ends of their sub-cells; a bin's output is the largest. The first lies at (9.94, 6.50), in the "
    + "source, whose y axis points up, at 9.50, where 0.56 · 0.1 + 0.44 · 0.2 = 0.144; not rounded it reads 0.147.",
    { method: "align", size: [3, 3], ratio: 3, reduction: "max", placement: "edge", roi: [9.25, 6, 15.5, 10.53], point: [0, 0] },
  ),
  bent(),
];

/**
 * A bent object, and a predictor whose offsets pull each bin towards its neighbours as far as they are bright:
 *   (dx, dy) of bin k = sum over bins j of w_jk (place j - place k) pooled j, places as parts of the RoI, w falling with
 *   their distance,
 * a linear layer like that of a trained one, small enough to follow.
 */
function bent() {
  const [size, pull, side] = [3, 4, 24];
  const [shoulder, elbow, hand] = [[5, 5], [17, 9], [8, 19]];
  const limb = (x, y, [ax, ay], [bx, by]) => {
    const t = Math.min(Math.max(((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / ((bx - ax) ** 2 + (by - ay) ** 2), 0), 1);
    return Math.hypot(x - ax - t * (bx - ax), y - ay - t * (by - ay));
  };
  const distance = (x, y) => Math.min(limb(x, y, shoulder, elbow), limb(x, y, elbow, hand));
  const rows = Array.from({ length: side }, (_, v) => Array.from({ length: side }, (_, u) => (
    Math.round(100 * Math.min(Math.max(2.5 - distance(u + 0.5, v + 0.5), 0), 1)) / 100
  )));
  const bins = size * size;
  const place = (k) => [(k % size + 0.5) / size, (Math.floor(k / size) + 0.5) / size];
  const weight = new Float32Array(2 * bins * bins);
  for (let k = 0; k < bins; k++) {
    for (let j = 0; j < bins; j++) {
      const near = Math.exp(-(((place(j)[0] - place(k)[0]) ** 2 + (place(j)[1] - place(k)[1]) ** 2) / 0.35 ** 2));
      place(j).forEach((p, axis) => (weight[(axis * bins + k) * bins + j] = pull * near * (p - place(k)[axis])));
    }
  }
  const layer = { inputs: bins, outputs: 2 * bins, weight, scale: null, bias: new Float32Array(2 * bins) };
  const settings = { size: [size, size], ratio: 2, reduction: "avg", placement: "centre" };
  return {
    ...example(
      "Example E: deformable RoI pooling of a bent object", rows,
      "The offsets, predicted from the pooled values by one linear layer, pull the bins onto the object: compare the shares "
      + "of the points inside its outline. With offsets of zero it would be RoI Align. Move the RoI, and they change.",
      { method: "deformable", size: [size, size], roi: [2.5, 2.5, 20.5, 21.5], point: [0, 0] },
    ),
    outlines: [contour(distance, 2, side)],
    own: { parameters: weight.length + 2 * bins },
    learned: {
      kind: "deformable", gamma: 0.1, ratio: 2, size: [size, size], perPoint: false, base: { method: "align", settings },
      predictors: [{ offsets: [layer], modulation: null }],
    },
  };
}

/** The closed curve at `level` of a distance from a bent line, as a walk around it in small steps. */
function contour(distance, level, side) {
  const found = [];
  let [x, y, heading] = [side / 2, 0, 0];
  while (y < side && distance(x, y) > level) y += 0.01; // onto the curve, from above
  const start = [x, y];
  do {
    found.push(Math.round(100 * x) / 100, Math.round(100 * y) / 100);
    const gradient = Math.atan2(distance(x, y + 0.01) - distance(x, y - 0.01), distance(x + 0.01, y) - distance(x - 0.01, y));
    heading = gradient + Math.PI / 2;
    [x, y] = [x + 0.2 * Math.cos(heading), y + 0.2 * Math.sin(heading)];
    const off = distance(x, y) - level;
    [x, y] = [x - off * Math.cos(gradient), y - off * Math.sin(gradient)];
  } while (found.length < 2000 && (found.length < 20 || Math.hypot(x - start[0], y - start[1]) > 0.25));
  return found;
}
