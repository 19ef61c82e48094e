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
];
