// The RoI methods, as detector/roi computes them: for one RoI on one map, which cells every bin reads and how much.
//
// A map is {stride, width, height, channels, data}; a box is [x1, y1, x2, y2], in image pixels or, once located, in
// cells. Cell u covers [u, u + 1) of the map. Points have *index* positions, in which cell u lies at u: position p is
// drawn at p + 1/2. That half is what "aligned" is about.
//
// Every method becomes a reading: for each bin a list of points, for each point up to four cells with weights. A bin's
// value is the mean or the maximum over its points. Boxes are computed in float32, as there: whether a bin begins at
// cell 5 or 6 can hang on the last bit.

const f = Math.fround;

const METHODS = {
  pool_caffe: { name: "RoI Pool, Caffe", kind: "pool", quantization: "caffe" },
  pool_floor: { name: "RoI Pool, floor", kind: "pool", quantization: "floor" },
  pool_uniform: { name: "RoI Pool, uniform", kind: "pool", quantization: "uniform" },
  warp: { name: "RoI Warp", kind: "warp" },
  align_legacy: { name: "RoI Align, not aligned", kind: "align", aligned: false },
  align: { name: "RoI Align", kind: "align", aligned: true },
  align_bicubic: { name: "RoI Align, bicubic", kind: "align", aligned: true, kernel: "bicubic" },
  align_lanczos: { name: "RoI Align, Lanczos", kind: "align", aligned: true, kernel: "lanczos" },
  context: { name: "The RoI enlarged, for context", kind: "context", aligned: true },
  border: { name: "Border Align", kind: "border" },
  semantic: { name: "Semantic RoI Align's points", kind: "semantic" },
  rotated: { name: "Rotated RoI Align", kind: "rotated" },
  attention: { name: "Deformable attention's points", kind: "attention" },
  precise: { name: "Precise RoI Pool", kind: "precise", aligned: false },
  precise_aligned: { name: "Precise RoI Pool, aligned", kind: "precise", aligned: true },
  deformable: { name: "Deformable", kind: "deformable", modulated: false },
  modulated_deformable: { name: "Modulated deformable", kind: "deformable", modulated: true },
};

const SETTINGS = { size: [7, 7], ratio: 2, reduction: "avg", placement: "centre", kernel: "bilinear", scale: 2, sides: 10,
  samples: 64 };

/** Whether what a method reads is learned, so that it takes a checkpoint's layers to show it. */
const LEARNED = ["deformable", "rotated", "attention"];

// ------------------------------------------------------------------------------------------------------------ geometry

/** A box in pixels as cells of a map; one that is not finite goes where nothing is read. */
function locate(box, stride) {
  const scale = f(1 / stride);
  const known = box.every((v) => Math.abs(f(v)) < 1e18);
  return box.map((v) => (known ? f(f(v) * scale) : -9));
}

/** C's round: halves away from zero. */
function roundHalfAway(value) {
  return Math.sign(value) * Math.floor(Math.abs(value) + 0.5);
}

/** First cell and the one past the last of a rounded RoI along one axis, wherever the map ends. */
function quantise(start, end, quantization) {
  const round = quantization === "caffe" ? roundHalfAway : Math.floor;
  const [low, high] = [round(start), round(end)];
  return [low, quantization === "caffe" ? Math.max(high, low) + 1 : Math.max(high, low)];
}

/** The cells [low, high) of every bin of RoI pooling along one axis of a map of `limit` cells. */
function binRanges(start, end, bins, limit, quantization) {
  const [low, high] = quantise(start, end, quantization);
  const extent = high - low;
  const edges = {
    caffe: (i) => [Math.floor(f(i * f(extent / bins))), Math.ceil(f((i + 1) * f(extent / bins)))],
    floor: (i) => [i, i + 1].map((e) => Math.floor(f(f(e * extent) / bins))),
    uniform: (i) => [i, i + 1].map((e) => e * Math.floor(f(extent / bins))),
  }[quantization];
  const clip = (v) => Math.min(Math.max(low + v, 0), limit);
  return Array.from({ length: bins }, (_, i) => edges(i).map(clip));
}

/** Sampling points along one axis: `at(i, n, shift)` is point n of bin i, moved by `shift` cells. */
function grid(start, end, bins, { ratio, aligned, placement }) {
  const first = aligned ? f(start - 0.5) : start;
  const last = aligned ? f(end - 0.5) : end;
  const size = aligned ? f(last - first) : Math.max(f(last - first), 1);
  const step = f(size / bins);
  const count = ratio || Math.max(Math.ceil(step), 0);
  const far = placement === "edge" ? 1 : 0.5;
  const at = (i, n, shift = 0) => f(f(f(first + f(i * step)) + f(shift)) + f(f((n + far) * step) / count));
  return { first, size, step, count, at };
}

/** The two cells around an index position along one axis, with linear weights; none where the map is out of reach. */
function neighbours(position, size) {
  if (!(position >= -1 && position <= size)) return [];
  const inside = Math.min(Math.max(position, 0), size - 1);
  const low = Math.floor(inside);
  return [[low, 1 - (inside - low)], [Math.min(low + 1, size - 1), inside - low]];
}

const sinc = (t) => (t === 0 ? 1 : Math.sin(Math.PI * t) / (Math.PI * t));
const KERNELS = {
  bicubic: { reach: 2, at: (t) => (t < 1 ? (1.5 * t - 2.5) * t * t + 1 : ((2.5 - 0.5 * t) * t - 4) * t + 2) },
  lanczos: { reach: 3, at: (t) => (t < 3 ? sinc(t) * sinc(t / 3) : 0) },
};

/** `neighbours` of any kernel; cells beyond the map count as those at its edge. */
function taps(position, size, kernel) {
  if (kernel === "bilinear" || !(position >= -1 && position <= size)) return neighbours(position, size);
  const { reach, at } = KERNELS[kernel];
  const inside = Math.min(Math.max(position, 0), size - 1);
  const found = [];
  for (let u = Math.floor(inside) + 1 - reach; u <= Math.floor(inside) + reach; u++) {
    found.push([Math.min(Math.max(u, 0), size - 1), at(Math.abs(inside - u))]);
  }
  const total = kernel === "lanczos" ? found.reduce((sum, [, weight]) => sum + weight, 0) : 1;
  return found.map(([u, weight]) => [u, weight / total]);
}

/** The cells around a point, [{u, v, weight}], four of a bilinear kernel. */
function cellsAround(x, y, map, kernel = "bilinear") {
  const cells = [];
  for (const [v, down] of taps(y, map.height, kernel)) {
    for (const [u, right] of taps(x, map.width, kernel)) cells.push({ u, v, weight: down * right });
  }
  return cells;
}

/** Cells that a bin touches along one axis, weighted by the mean of their bilinear kernels over the bin. */
function kernelMeans(start, end, bins, limit) {
  if (!(end > start)) return Array.from({ length: bins }, () => []);
  const integral = (t) => {
    const c = Math.min(Math.max(t, -1), 1); // of max(0, 1 - |u|), from minus infinity to t
    return 0.5 + c - 0.5 * c * Math.abs(c);
  };
  const step = f(f(end - start) / bins);
  return Array.from({ length: bins }, (_, i) => {
    const low = f(start + f(i * step));
    const high = f(low + step);
    const cells = [];
    const [from, to] = [Math.floor(Math.min(Math.max(low, 0), limit)), Math.ceil(Math.min(high, limit))];
    for (let u = from; u <= Math.min(to, limit - 1); u++) {
      cells.push([u, (integral(high - u) - integral(low - u)) / step]);
    }
    return cells;
  });
}

// ------------------------------------------------------------------------------------------------------------ readings

/**
 * What a method reads for a RoI `box` in pixels:
 *   real, read    the RoI, and what the method makes of it before it cuts it into bins; in cells, as drawn
 *   bins          h * w boxes in cells, as drawn
 *   points        for each bin [{x, y, weight, cells}]; x and y are null where a point is no place
 *   reduction     "avg" (a weighted sum, for the weights say what share a point has) or "max"
 *   offsets       of the deformable methods: per bin [dx, dy] in cells, the mean where every point has its own
 * `learned` is what `predict` found, for the deformable methods.
 */
function readingOf(method, box, map, settings = {}, learned = null) {
  const { kind, ...own } = METHODS[method];
  const all = { ...SETTINGS, ...settings, ...own };
  const real = locate(box, map.stride);
  return { method, real, size: all.size, ...READERS[kind](real, map, all, learned) };
}

const READERS = {
  pool([x1, y1, x2, y2], map, { size: [h, w], quantization }) {
    const rows = binRanges(y1, y2, h, map.height, quantization);
    const columns = binRanges(x1, x2, w, map.width, quantization);
    const [left, right] = quantise(x1, x2, quantization);
    const [top, bottom] = quantise(y1, y2, quantization);
    const points = forBins(h, w, (i, j) => {
      const cells = [];
      for (let v = rows[i][0]; v < rows[i][1]; v++) {
        for (let u = columns[j][0]; u < columns[j][1]; u++) {
          cells.push({ x: u, y: v, weight: 1, cells: [{ u, v, weight: 1 }] });
        }
      }
      return cells;
    });
    const bins = forBins(h, w, (i, j) => [columns[j][0], rows[i][0], columns[j][1], rows[i][1]]);
    return { read: [left, top, right, bottom], bins, points, reduction: "max", whole: true };
  },

  warp([x1, y1, x2, y2], map, settings) {
    const [left, right] = quantise(x1, x2, "caffe");
    const [top, bottom] = quantise(y1, y2, "caffe");
    return READERS.align([left, top, right, bottom], map, { ...settings, aligned: true, placement: "centre" });
  },

  align([x1, y1, x2, y2], map, settings, shifts = null) {
    const [h, w] = settings.size;
    const ys = grid(y1, y2, h, settings);
    const xs = grid(x1, x2, w, settings);
    const share = 1 / (ys.count * xs.count);
    const points = forBins(h, w, (i, j) => {
      const found = [];
      for (let n = 0; n < ys.count; n++) {
        for (let m = 0; m < xs.count; m++) {
          const [dx, dy, modulation] = shifts ? shifts(i, j, n, m) : [0, 0, 1];
          const [x, y] = [xs.at(j, m, dx), ys.at(i, n, dy)];
          found.push({ x, y, weight: share * modulation, cells: cellsAround(x, y, map, settings.kernel) });
        }
      }
      return found;
    });
    const [left, top] = [xs.first + 0.5, ys.first + 0.5];
    const bins = forBins(h, w, (i, j) => [
      left + j * xs.step, top + i * ys.step, left + (j + 1) * xs.step, top + (i + 1) * ys.step,
    ]);
    const read = settings.aligned ? [x1, y1, x2, y2] : [left, top, left + xs.size, top + ys.size];
    return { read, bins, points, reduction: settings.reduction };
  },

  context([x1, y1, x2, y2], map, settings) {
    const [dx, dy] = [(x2 - x1) * (settings.scale - 1) / 2, (y2 - y1) * (settings.scale - 1) / 2];
    return READERS.align([x1 - dx, y1 - dy, x2 + dx, y2 + dy], map, { ...settings, reduction: "avg", placement: "centre" });
  },

  /** One output for each side: left, top, right, bottom. */
  border([x1, y1, x2, y2], map, { sides }) {
    const lines = [[x1, y1, x1, y2], [x1, y1, x2, y1], [x2, y1, x2, y2], [x1, y2, x2, y2]];
    const points = lines.map(([a, b, c, d]) => Array.from({ length: sides }, (_, k) => {
      const [x, y] = [a + (k / sides) * (c - a) - 0.5, b + (k / sides) * (d - b) - 0.5];
      return { x, y, weight: 1 / sides, cells: cellsAround(x, y, map) };
    }));
    return { read: [x1, y1, x2, y2], size: [4, 1], bins: lines, points, reduction: "max" };
  },

  /** The points that attention weighs, one a bin: as many rows to columns as the RoI is high to wide. */
  semantic([x1, y1, x2, y2], map, { samples }) {
    const [width, height] = [Math.abs(x2 - x1), Math.abs(y2 - y1)];
    const ratio = width || height ? height / width : 1;
    const rows = Math.min(Math.max(Math.round(Math.sqrt(samples * ratio)), 1), samples);
    const size = [rows, Math.floor(samples / rows)];
    const settings = { size, ratio: 1, aligned: true, placement: "centre", reduction: "avg" };
    return { ...READERS.align([x1, y1, x2, y2], map, settings), size };
  },

  rotated([x1, y1, x2, y2], map, settings, learned) {
    const [tx, ty, tw, th, turn] = learned.rotation;
    const limit = (t) => Math.exp(Math.min(t, Math.log(1000 / 16)));
    const [width, height] = [(x2 - x1) * limit(tw), (y2 - y1) * limit(th)];
    const [cx, cy] = [(x1 + x2) / 2 + tx * (x2 - x1), (y1 + y2) / 2 + ty * (y2 - y1)];
    const [cos, sin] = [Math.cos(2 * Math.PI * turn), Math.sin(2 * Math.PI * turn)];
    const { size, ratio } = learned;
    const upright = [cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2];
    const still = READERS.align(upright, map, { size, ratio, aligned: true, placement: "centre", reduction: "avg" });
    const points = still.points.map((bin) => bin.map(({ x, y, weight }) => {
      const [dx, dy] = [x + 0.5 - cx, y + 0.5 - cy];
      const [px, py] = [cx + dx * cos - dy * sin - 0.5, cy + dx * sin + dy * cos - 0.5];
      return { x: px, y: py, weight, cells: cellsAround(px, py, map) };
    }));
    const regular = READERS.align([x1, y1, x2, y2], map, { ...SETTINGS, size, aligned: true }).bins;
    const middle = (list, key) => list.reduce((sum, p) => sum + p[key] + 0.5, 0) / list.length;
    const offsets = points.map((bin, k) => {
      const [a, b, c, d] = regular[k];
      return [middle(bin, "x") - (a + c) / 2, middle(bin, "y") - (b + d) / 2, 1];
    });
    return { read: upright, size, bins: still.bins, regular, points, reduction: "avg", offsets, turn: 2 * Math.PI * turn };
  },

  /** The points of all heads on this level, with the weights that they have among those of all levels. */
  attention([x1, y1, x2, y2], map, settings, learned) {
    const { heads, levels, count, size: [h, w], queries, level } = learned;
    const [width, height] = [(x2 - x1) / w, (y2 - y1) / h];
    const points = forBins(h, w, (i, j) => {
      const { offsets, weights } = queries[i * w + j];
      const found = [];
      for (let m = 0; m < heads; m++) {
        for (let k = 0; k < count; k++) {
          const at = (m * levels + level) * count + k;
          const x = x1 + (j + 0.5 + (0.5 * offsets[2 * at]) / count) * width - 0.5;
          const y = y1 + (i + 0.5 + (0.5 * offsets[2 * at + 1]) / count) * height - 0.5;
          found.push({ x, y, weight: weights[at] / heads, cells: cellsAround(x, y, map) });
        }
      }
      return found;
    });
    const bins = forBins(h, w, (i, j) => [x1 + j * width, y1 + i * height, x1 + (j + 1) * width, y1 + (i + 1) * height]);
    return { read: [x1, y1, x2, y2], size: [h, w], bins, points, reduction: "avg" };
  },

  precise([x1, y1, x2, y2], map, { size: [h, w], aligned }) {
    const [left, top, right, bottom] = [x1, y1, x2, y2].map((v) => (aligned ? f(v - 0.5) : v));
    const rows = kernelMeans(top, bottom, h, map.height);
    const columns = kernelMeans(left, right, w, map.width);
    const points = forBins(h, w, (i, j) => {
      const cells = [];
      for (const [v, down] of rows[i]) for (const [u, along] of columns[j]) cells.push({ u, v, weight: down * along });
      return cells.length ? [{ x: null, y: null, weight: 1, cells }] : [];
    });
    const [stepX, stepY] = [(right - left) / w, (bottom - top) / h];
    const bins = forBins(h, w, (i, j) => [
      left + 0.5 + j * stepX, top + 0.5 + i * stepY, left + 0.5 + (j + 1) * stepX, top + 0.5 + (i + 1) * stepY,
    ]);
    const read = [x1, y1, x2, y2].map((v) => (aligned ? v : v + 0.5));
    return { read, bins, points, reduction: "avg" };
  },

  deformable(real, map, { modulated }, learned) {
    const { gamma, ratio, size, perPoint, offsets, modulation } = learned;
    const [h, w] = size;
    const [width, height] = [f(real[2] - real[0]), f(real[3] - real[1])];
    const [tall, wide] = perPoint ? [h * ratio, w * ratio] : [h, w]; // of the grid of offsets
    const shifts = (i, j, n, m) => {
      const at = perPoint ? (i * ratio + n) * wide + j * ratio + m : i * wide + j;
      const [dx, dy] = [gamma * offsets[at] * width, gamma * offsets[tall * wide + at] * height];
      return [dx, dy, modulated && modulation ? modulation[at] : 1];
    };
    const settings = { size, ratio, reduction: "avg", aligned: true, placement: "centre" };
    const found = READERS.align(real, map, settings, shifts);
    const each = forBins(h, w, (i, j) => {
      const [down, along] = perPoint ? [ratio, ratio] : [1, 1];
      const mean = [0, 0, 0];
      for (let n = 0; n < down; n++) {
        for (let m = 0; m < along; m++) shifts(i, j, n, m).forEach((v, k) => (mean[k] += v / (down * along)));
      }
      return mean;
    });
    const bins = found.bins.map(([a, b, c, d], k) => {
      const [dx, dy] = each[k];
      return [a + dx, b + dy, c + dx, d + dy];
    });
    return { ...found, size, bins, regular: found.bins, offsets: each };
  },
};

function forBins(h, w, make) {
  return Array.from({ length: h * w }, (_, k) => make(Math.floor(k / w), k % w));
}

/** |A_read - A_real| / A_real with its sign, as detector.comparison.alignment.area_error. */
function areaError({ real, read }) {
  const area = ([x1, y1, x2, y2]) => (x2 - x1) * (y2 - y1);
  return area(read) / area(real) - 1;
}

// ------------------------------------------------------------------------------------------------------------- pooling

/** Channel c of a map, row by row. */
function plane(map, c) {
  return map.data.subarray(c * map.width * map.height, (c + 1) * map.width * map.height);
}

function pointValue(point, values, width) {
  let sum = 0;
  for (const { u, v, weight } of point.cells) sum += weight * values[v * width + u];
  return sum;
}

/** The h * w outputs of a reading on one channel. */
function pooled(reading, values, width) {
  return Float64Array.from(reading.points, (points) => {
    if (points.length === 0) return 0;
    if (reading.reduction === "max") return pointValue(points[winner(points, values, width)], values, width);
    return points.reduce((sum, p) => sum + p.weight * pointValue(p, values, width), 0);
  });
}

/** Index of the point that a bin takes its maximum from. */
function winner(points, values, width) {
  let [best, most] = [0, -Infinity];
  points.forEach((p, k) => {
    const value = pointValue(p, values, width);
    if (value > most) [best, most] = [k, value];
  });
  return best;
}

// ----------------------------------------------------------------------------------------------------- learned offsets

/** Fully connected layers with ReLU between them. A layer is {inputs, outputs, weight, scale, bias}. */
function fullyConnected(layers, input) {
  return layers.reduce((x, { inputs, outputs, weight, scale, bias }, depth) => {
    const y = new Float64Array(outputs);
    for (let o = 0; o < outputs; o++) {
      let sum = 0;
      for (let i = 0, w = o * inputs; i < inputs; i++, w++) sum += weight[w] * x[i];
      sum = sum * (scale ? scale[o] : 1) + bias[o];
      y[o] = depth < layers.length - 1 ? Math.max(sum, 0) : sum;
    }
    return y;
  }, input);
}

/** Of each head's logits, over its levels and points. */
function softmax(logits, { heads }) {
  const each = logits.length / heads;
  const exp = logits.map((v, k) => {
    const own = logits.subarray(Math.floor(k / each) * each, (Math.floor(k / each) + 1) * each);
    return Math.exp(v - Math.max(...own));
  });
  const total = (k) => exp.subarray(Math.floor(k / each) * each, (Math.floor(k / each) + 1) * each).reduce((a, b) => a + b);
  return exp.map((v, k) => v / total(k));
}

/**
 * The offsets (all dx, then all dy; normalised, before gamma) and the modulation that the checkpoint's predictor finds
 * for a RoI. `head` is {gamma, ratio, size, perPoint, base, predictors}. Or, by its `kind`, the five numbers that rotate a RoI
 * (rotated), and each bin's offsets and weights (attention); for a RoI of any level, its base reads that.
 */
function predict(head, box, map, level) {
  const base = readingOf(head.base.method, box, map, { ...head.base.settings, size: head.size });
  const bins = base.points.length;
  const input = new Float64Array(map.channels * bins);
  for (let c = 0; c < map.channels; c++) input.set(pooled(base, plane(map, c), map.width), c * bins);
  const predictor = head.predictors?.[head.predictors.length === 1 ? 0 : level];
  if (head.kind === "rotated") return { ...head, rotation: fullyConnected(head.learner, input) };
  if (head.kind === "attention") {
    const queries = Array.from({ length: bins }, (_, bin) => {
      const query = Float64Array.from({ length: map.channels }, (_, c) => input[c * bins + bin]);
      return { offsets: fullyConnected(head.offsets, query), weights: softmax(fullyConnected(head.weights, query), head) };
    });
    return { ...head, queries, level };
  }
  const sigmoid = (v) => 1 / (1 + Math.exp(-v));
  const modulation = predictor.modulation && fullyConnected(predictor.modulation, input).map(sigmoid);
  return { ...head, offsets: fullyConnected(predictor.offsets, input), modulation };
}

// -------------------------------------------------------------------------------------------------------------- levels

/** FPN's equation 1, with the guard of each framework, as detector.roi.assign_levels. */
function assignLevel([x1, y1, x2, y2], strides, { rule, canonical_level: k0, canonical_size: s0 }) {
  const size = f(Math.sqrt(f(f(f(x2) - f(x1)) * f(f(y2) - f(y1)))));
  const finest = Math.log2(strides[0]);
  const log2 = (v) => f(Math.log2(f(v)));
  const level = {
    detectron2: () => Math.floor(f(k0 + log2(f(size / s0) + 2 ** -52))) - finest,
    torchvision: () => Math.floor(f(f(k0 + log2(size / s0)) + f(1e-6))) - finest,
    mmdetection: () => Math.floor(log2(f(size / (s0 / 2 ** (k0 - finest))) + f(1e-6))),
  }[rule]();
  return Number.isNaN(level) ? 0 : Math.min(Math.max(level, 0), strides.length - 1);
}
