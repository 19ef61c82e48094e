// The page: one state, and `render`, which shows all of it. Everything a test or a curious reader wants is in
// window.explorer.

const $ = (id) => document.getElementById(id);
const make = (tag, properties = {}) => Object.assign(document.createElement(tag), properties);
const STOPS = ["440154", "482878", "3e4989", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "b5de2b", "fde725"]
  .map((hex) => [0, 2, 4].map((k) => parseInt(hex.slice(k, k + 2), 16)));
const MOST_POINTS = 2500; // more are not drawn: they would be a grey cloth
const NUMBER_CELL = 34; // CSS pixels that a cell needs for its number

// ------------------------------------------------------------------------------------------------------------ decoding

function bytes(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer;
}

/** The float16 with these bits; all of them are finite. */
function half(bits) {
  const [sign, exponent, fraction] = [bits >> 15 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
}

function numbers({ type, data }) {
  const buffer = bytes(data);
  if (type === "float16") {
    const table = Float32Array.from({ length: 65536 }, (_, bits) => half(bits)); // quicker than millions of calls
    return Float32Array.from(new Uint16Array(buffer), (bits) => table[bits]);
  }
  return type === "int8" ? new Int8Array(buffer) : new Float32Array(buffer);
}

function readLayers(layers) {
  return layers && layers.map((layer) => ({
    inputs: layer.shape[1],
    outputs: layer.shape[0],
    weight: numbers(layer),
    scale: layer.scale && new Float32Array(bytes(layer.scale)),
    bias: new Float32Array(bytes(layer.bias)),
  }));
}

function readLearned(found) {
  return found && {
    ...found,
    ...Object.fromEntries(["learner", "offsets", "weights"].map((key) => [key, readLayers(found[key])])),
    predictors: found.predictors?.map((p) => ({
      offsets: readLayers(p.offsets),
      modulation: p.modulation.length ? readLayers(p.modulation) : null,
    })),
  };
}

function readScene(content) {
  const maps = content.maps.map(({ stride, shape: [channels, height, width], ...map }) => (
    { stride, channels, height, width, data: numbers(map) }
  ));
  const picture = new Image();
  picture.onload = () => render();
  picture.src = content.picture.source;
  const learned = readLearned(content.learned);
  const { width, height } = content.picture;
  const own = METHODS[content.own.method] ? content.own : { ...content.own, method: "align" };
  const roi = content.boxes.length ? content.boxes[0].box : [width / 4, height / 4, (3 * width) / 4, (3 * height) / 4];
  const start = { ...SETTINGS, ...own.settings, size: own.size.map((v) => Math.min(v, 14)), method: own.method, roi };
  return { ...content, maps, learned, picture, start, step: 1 };
}

// ---------------------------------------------------------------------------------------------------------- the state

const content = JSON.parse($("data").textContent);
const SCENES = [readScene(content), ...EXAMPLES];
const state = { scene: 0, level: "auto", channel: 0, opacity: 0.6, held: null };

function openScene(index) {
  const { start, step } = SCENES[index];
  const { roi, point = null, ...settings } = start;
  Object.assign(state, { scene: index, level: "auto", channel: 0, box: roi, step, chosen: null, held: null });
  Object.assign(state, settings);
  fillScene();
  state.channel = liveliest();
  state.chosen = point && { bin: point[0], point: point[1] };
}

const scene = () => SCENES[state.scene];

function levelOf(box, level = state.level) {
  if (level !== "auto") return level;
  return scene().levels ? assignLevel(box, scene().maps.map((m) => m.stride), scene().levels) : 0;
}

/** The channel that varies most inside the RoI, measured by how it varies on the whole map: a good one to begin with. */
function liveliest() {
  const map = scene().maps[levelOf(state.box)];
  const [x1, y1, x2, y2] = state.box.map((v) => v / map.stride);
  const spread = (values) => {
    const mean = values.reduce((a, b) => a + b, 0) / values.length;
    return Math.sqrt(values.reduce((a, b) => a + (b - mean) ** 2, 0) / values.length);
  };
  let [best, most] = [0, -1];
  for (let c = 0; c < map.channels; c++) {
    const values = plane(map, c);
    const inside = values.filter((_, k) => {
      const [u, v] = [(k % map.width) + 0.5, Math.floor(k / map.width) + 0.5];
      return u > x1 - 1 && u < x2 + 1 && v > y1 - 1 && v < y2 + 1;
    });
    const liveliness = inside.length ? spread(inside) / (spread(values) || 1) : 0;
    if (liveliness > most) [best, most] = [c, liveliness];
  }
  return best;
}

/** Why a method has nothing to show here, or null. */
function missing(method) {
  const { kind } = METHODS[method];
  if (!LEARNED.includes(kind)) return null;
  const { learned } = scene();
  if (!learned && state.scene) return "needs the predictor of a checkpoint";
  if ((learned?.kind ?? "deformable") !== kind || !learned) {
    return kind === "deformable" ? "this checkpoint predicts no offsets; train with roi=deformable"
      : `this checkpoint's method is another; train with roi=${method}`;
  }
  const without = METHODS[method].modulated && !learned.predictors[0].modulation;
  return without ? "this checkpoint predicts no modulation; train with roi=modulated_deformable" : null;
}

let remembered = { key: null, value: null }; // the predictor is the only slow part, and two methods ask for it
function learnedFor(box, level) {
  const key = [state.scene, level, ...box].join();
  const own = scene().learned.kind === "attention" ? levelOf(box, scene().levels ? "auto" : 0) : level; // the queries' level
  if (remembered.key !== key) remembered = { key, value: predict(scene().learned, box, scene().maps[own], level) };
  return remembered.value;
}

/** What a method reads, and its output for one channel; everything not given is as the page shows it. */
function compute(request = {}) {
  const { method, box, channel, ...settings } = { ...state, ...request };
  const level = levelOf(box, request.level ?? state.level);
  const map = scene().maps[level];
  const reason = missing(method);
  if (reason) throw new Error(`${METHODS[method].name}: ${reason}`);
  const learned = LEARNED.includes(METHODS[method].kind) ? learnedFor(box, level) : null;
  const reading = readingOf(method, box, map, settings, learned);
  const values = plane(map, channel);
  return { reading, level, map, values, learned, output: pooled(reading, values, map.width) };
}

// ------------------------------------------------------------------------------------------------------------ colours

const ranges = new Map();

/** Lowest and highest value of a channel on a level: what the colours span. */
function rangeOf(map, channel) {
  if (!ranges.has(map)) ranges.set(map, []);
  const extend = ([low, high], v) => [Math.min(low, v), Math.max(high, v)];
  return (ranges.get(map)[channel] ??= plane(map, channel).reduce(extend, [Infinity, -Infinity]));
}

function colour(value, [low, high]) {
  const t = Math.min(Math.max(high > low ? (value - low) / (high - low) : 0.5, 0), 1) * (STOPS.length - 1);
  const k = Math.min(Math.floor(t), STOPS.length - 2);
  return STOPS[k].map((v, c) => Math.round(v + (STOPS[k + 1][c] - v) * (t - k)));
}

const ink = ([r, g, b]) => (0.299 * r + 0.587 * g + 0.114 * b > 140 ? "#101215" : "#fff");

/** A channel in colours, one pixel for each cell. `veil`: usual values are clear, so that a picture below is seen. */
function colours(map, channel, veil = false) {
  const values = plane(map, channel);
  const mean = values.reduce((a, b) => a + b, 0) / values.length;
  const spread = Math.sqrt(values.reduce((a, b) => a + (b - mean) ** 2, 0) / values.length) || 1;
  const range = rangeOf(map, channel);
  const shades = Array.from({ length: 256 }, (_, k) => colour(k, [0, 255])); // `colour` itself is slow for whole maps
  const image = new ImageData(map.width, map.height);
  values.forEach((v, k) => {
    const [r, g, b] = shades[Math.round((255 * (v - range[0])) / (range[1] - range[0] || 1))];
    image.data[4 * k] = r;
    image.data[4 * k + 1] = g;
    image.data[4 * k + 2] = b;
    image.data[4 * k + 3] = veil ? 255 * Math.min(0.1 + (0.35 * Math.abs(v - mean)) / spread, 1) : 255;
  });
  return image;
}

const tints = {};

/** `colours` as a canvas that can be drawn enlarged; the last one of either kind is kept. */
function tint(map, channel, veil) {
  const key = [state.scene, scene().maps.indexOf(map), channel].join();
  if (tints[veil]?.key === key) return tints[veil].canvas;
  const canvas = make("canvas", { width: map.width, height: map.height });
  canvas.getContext("2d").putImageData(colours(map, channel, veil), 0, 0);
  tints[veil] = { key, canvas };
  return canvas;
}

/** Three significant digits, and a real minus sign. */
function short(value) {
  const text = Number.isInteger(value) || Math.abs(value) >= 1000 ? String(Math.round(value))
    : Number(value.toPrecision(3)).toString();
  return text.replaceAll("-", "−");
}

/** With so many decimals, a real minus sign, and no minus before zero. */
function fixed(value, digits = 2) {
  return (Math.abs(value) < 0.5 * 10 ** -digits ? 0 : value).toFixed(digits).replace("-", "−");
}

const signed = (value, digits) => (value > 0 && Number(value.toFixed(digits)) > 0 ? "+" : "") + fixed(value, digits);

// ------------------------------------------------------------------------------------------------------------- drawing

const act = {
  resize: (box) => set({ box: box.map((v) => Math.round(v * 100) / 100) }),
  drag: (on) => set({ held: on ? closeup.view : null }),
  step: () => state.step,
  pick,
};
const imagePanel = new Panel($("image-panel"), "Region of interest in the image", act);
const closeup = new Panel($("closeup-panel"), "Region of interest, close-up", act);
const mapPanel = new Panel($("map-panel"), null, act);

function drawMap(context, map, channel, veil = false) {
  context.drawImage(tint(map, channel, veil), 0, 0, map.width * map.stride, map.height * map.stride);
}

function drawImagePanel({ map }) {
  const { picture, width, height } = scene();
  imagePanel.look([0, 0, width, height]);
  imagePanel.paint((context) => {
    if (picture?.complete) {
      context.imageSmoothingEnabled = picture.naturalWidth >= imagePanel.figure.clientWidth;
      context.drawImage(picture, 0, 0);
      context.imageSmoothingEnabled = false;
      context.globalAlpha = state.opacity;
    }
    drawMap(context, map, state.channel, Boolean(picture?.complete));
    context.globalAlpha = 1;
  });
}

/** Around all that is read, in the panel's aspect. While the RoI is dragged the view stays. */
function closeView({ reading, map }) {
  const boxes = [reading.real, reading.read, ...reading.bins];
  const bound = (k, best) => best(...boxes.map((b) => b[k]));
  let [x1, y1, x2, y2] = [bound(0, Math.min), bound(1, Math.min), bound(2, Math.max), bound(3, Math.max)];
  const aspect = window.innerWidth < 600 ? 1 : 1.35;
  const margin = 1.2 + 0.06 * Math.max(x2 - x1, y2 - y1);
  [x1, y1, x2, y2] = [x1 - margin, y1 - margin, x2 + margin, y2 + margin];
  const missingWidth = Math.max(aspect * (y2 - y1) - (x2 - x1), 0) / 2;
  const missingHeight = Math.max((x2 - x1) / aspect - (y2 - y1), 0) / 2;
  return [x1 - missingWidth, y1 - missingHeight, x2 + missingWidth, y2 + missingHeight].map((v) => v * map.stride);
}

function drawCloseup(shown) {
  const { map, values } = shown;
  closeup.look(state.held ?? closeView(shown), 0.78);
  closeup.paint((context, unit) => {
    drawMap(context, map, state.channel);
    const cell = map.stride / unit; // in CSS pixels
    const [x1, y1, x2, y2] = closeup.view.map((v) => v / map.stride);
    const [left, top] = [Math.max(Math.floor(x1), 0), Math.max(Math.floor(y1), 0)];
    const [right, bottom] = [Math.min(Math.ceil(x2), map.width), Math.min(Math.ceil(y2), map.height)];
    if (cell >= 7) {
      context.strokeStyle = "#0005";
      context.lineWidth = unit;
      context.beginPath();
      const line = (...ends) => {
        const [a, b, c, d] = ends.map((v) => v * map.stride);
        context.moveTo(a, b);
        context.lineTo(c, d);
      };
      for (let u = left; u <= right; u++) line(u, top, u, bottom);
      for (let v = top; v <= bottom; v++) line(left, v, right, v);
      context.stroke();
    }
    if (cell >= NUMBER_CELL) {
      context.font = `${Math.min(cell / 3.8, 15) * unit}px system-ui, sans-serif`;
      context.textAlign = "center";
      for (let v = top; v < bottom; v++) {
        for (let u = left; u < right; u++) {
          const value = values[v * map.width + u];
          context.fillStyle = ink(colour(value, rangeOf(map, state.channel)));
          // at the foot of the cell: points lie around its middle
          context.fillText(compact(value), (u + 0.5) * map.stride, (v + 0.93) * map.stride);
        }
      }
    }
  });
}

function lines(group, boxes, name, width, stride, dash = null) {
  const path = boxes.map((b) => b.map((v) => v * stride)).map(([a, b, c, d]) => `M${a} ${b}H${c}V${d}H${a}Z`).join("");
  const element = svg("path", { class: name, d: path, "stroke-width": width }, group);
  if (dash) element.setAttribute("stroke-dasharray", dash);
}

/** The reading in the close-up; of a bin without places for its points, the cells that it reads. */
function drawReading({ reading, map, values }) {
  const { unit, marks, top } = closeup;
  const { stride } = map;
  marks.replaceChildren();
  top.replaceChildren();
  if (reading.regular) lines(marks, reading.regular, "regular", unit, stride);
  const full = reading.bins.filter(([a, b, c, d]) => c > a && d > b);
  lines(marks, full, "under", 3 * unit, stride);
  lines(marks, full, "bin", 1.4 * unit, stride);
  lines(marks, [reading.read], "under", 5 * unit, stride);
  lines(marks, [reading.read], "read", 3 * unit, stride, rounds(reading) ? `${8 * unit} ${5 * unit}` : null);
  drawOutline(unit);
  if (reading.offsets) drawOffsets(reading, unit, stride);
  const { bin = -1, point = -1 } = state.chosen ?? {};
  if (bin >= 0) {
    lines(marks, [reading.bins[bin]], "chosen", 2.5 * unit, stride);
    if (reading.points[bin].length) drawNeighbours(reading.points[bin], point, unit, stride);
  }

  const count = reading.points.reduce((sum, points) => sum + points.length, 0);
  const area = reading.bins.reduce((sum, [a, b, c, d]) => sum + (c - a) * (d - b), 0);
  const room = stride / unit * Math.sqrt(Math.max(area, 0.1) / count); // CSS pixels between points
  const radius = Math.min(Math.max(room / 5, 1.3), 4.5) * unit;
  reading.points.forEach((points, b) => {
    const best = reading.reduction === "max" && points.length ? winner(points, values, map.width) : -1;
    points.forEach(({ x, y }, k) => {
      const chosen = b === bin && k === point;
      if (x === null || (count > MOST_POINTS && b !== bin && k !== best)) return;
      const name = chosen ? "dot chosen-dot" : k === best ? "dot best" : "dot";
      svg("circle", {
        class: name, cx: (x + 0.5) * stride, cy: (y + 0.5) * stride, r: chosen || k === best ? radius * 1.35 : radius,
        "stroke-width": 0.8 * unit,
      }, chosen ? top : marks);
    });
  });
}

/** Whether a method reads whole cells, or a RoI made of them. */
const rounds = ({ method }) => ["pool", "warp"].includes(METHODS[method].kind);

/** The outline of the object that the RoI is about, as closed polygons [x, y, x, y, ...] in pixels; null without one. */
function outline() {
  const { outlines, boxes } = scene();
  if (outlines) return outlines;
  const [x1, y1, x2, y2] = state.box;
  const size = ([a, b, c, d]) => Math.max(c - a, 0) * Math.max(d - b, 0);
  const overlap = ({ box: [a, b, c, d] }) => {
    const both = size([Math.max(a, x1), Math.max(b, y1), Math.min(c, x2), Math.min(d, y2)]);
    return both / (size([a, b, c, d]) + size(state.box) - both || 1);
  };
  const best = boxes.reduce((found, box) => (overlap(box) > (found ? overlap(found) : 0.5) ? box : found), null);
  return best?.outlines?.length ? best.outlines : null;
}

function drawOutline(unit) {
  const path = (outline() ?? []).map((xy) => `M${xy.join(" ")}Z`).join("");
  for (const [name, width] of [["under", 4], ["outline", 2]]) {
    svg("path", { class: name, d: path, "stroke-width": width * unit }, closeup.marks);
  }
}

/** Whether a place in pixels lies inside closed polygons, by the even-odd rule. */
function isInside(x, y, polygons) {
  let inside = false;
  for (const xy of polygons) {
    for (let k = 0; k < xy.length; k += 2) {
      const [a, b, c, d] = [xy[k], xy[k + 1], xy[(k + 2) % xy.length], xy[(k + 3) % xy.length]];
      if (b > y !== d > y && x < a + ((y - b) / (d - b)) * (c - a)) inside = !inside;
    }
  }
  return inside;
}

/**
 * What can be counted of a reading: its points, the largest offset in pixels, the shares of its points and of those of
 * the regular grid that lie inside the object's outline, and the method's parameters; null what there is not.
 */
function counts({ reading, map, learned }) {
  const points = reading.points.flat().filter(({ x }) => x !== null);
  const { size, ratio } = learned ?? {};
  const grid = { ...SETTINGS, size, ratio, aligned: true };
  const regular = reading.offsets && READERS.align(reading.real, map, grid).points.flat();
  const moved = (p, k) => Math.hypot(p.x - regular[k].x, p.y - regular[k].y) * map.stride;
  const polygons = outline();
  const share = (list) => (polygons && list?.length
    ? list.filter(({ x, y }) => isInside((x + 0.5) * map.stride, (y + 0.5) * map.stride, polygons)).length / list.length
    : null);
  return {
    points: points.length,
    largest: regular ? points.reduce((most, p, k) => Math.max(most, moved(p, k)), 0) : null,
    inside: share(points),
    regularInside: share(regular),
    parameters: learned ? scene().own?.parameters ?? null : null,
  };
}

function drawOffsets({ regular, offsets }, unit, stride) {
  regular.forEach(([a, b, c, d], k) => {
    const [x, y] = [((a + c) / 2) * stride, ((b + d) / 2) * stride];
    const [dx, dy] = offsets[k].slice(0, 2).map((v) => v * stride);
    for (const [name, width] of [["under", 4], ["moved", 2]]) {
      svg("line", { class: name, x1: x, y1: y, x2: x + dx, y2: y + dy, "stroke-width": width * unit }, closeup.marks);
    }
    const end = { cx: x + dx, cy: y + dy, r: 2.2 * unit, "stroke-width": 0.5 * unit };
    svg("circle", { class: "moved-end", ...end }, closeup.marks);
  });
}

/** The cells of the chosen point with their weights; of a bin that has no points, all its cells. */
function drawNeighbours(points, point, unit, stride) {
  const chosen = points[point] ?? (points[0].x === null ? points[0] : null);
  if (!chosen) return;
  const size = Math.min(stride / unit / 4, 13);
  for (const { u, v, weight } of chosen.cells) {
    lines(closeup.top, [[u, v, u + 1, v + 1]], "neighbour", 2 * unit, stride);
    if (chosen.x !== null) {
      const [x1, y1, x2, y2] = [chosen.x, chosen.y, u, v].map((p) => (p + 0.5) * stride);
      svg("line", { class: "link", x1, y1, x2, y2, "stroke-width": 1.2 * unit }, closeup.top);
    }
    if (size < 7 || chosen.cells.length === 1) continue;
    const at = { x: (u + 0.5) * stride, y: (v + 0.02) * stride + size * unit, "font-size": size * unit };
    const tag = svg("text", { class: "tag", ...at, "stroke-width": 3 * unit }, closeup.top);
    tag.textContent = `× ${weight.toFixed(2)}`;
  }
}

function drawMapPanel({ map, reading }) {
  const { width, height } = scene();
  mapPanel.look([0, 0, Math.max(width, map.width * map.stride), Math.max(height, map.height * map.stride)], 0.5);
  mapPanel.paint((context) => drawMap(context, map, state.channel));
  mapPanel.marks.replaceChildren();
  lines(mapPanel.marks, [reading.read], "read", 1.5 * mapPanel.unit, map.stride);
}

/** k x k numbers as colours, with the numbers where there is room. */
function drawOutput(canvas, output, [h, w], range) {
  const ratio = window.devicePixelRatio || 1;
  const side = Math.max(Math.round(canvas.clientWidth * ratio), 1);
  if (canvas.width !== side) Object.assign(canvas, { width: side, height: side });
  const context = canvas.getContext("2d");
  const [cw, ch] = [side / w, side / h];
  const letters = Math.min(cw / 3.1, ch / 2.4, 17 * ratio);
  context.font = `${letters}px system-ui, sans-serif`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  output.forEach((value, k) => {
    const [i, j] = [Math.floor(k / w), k % w];
    const [left, top] = [Math.round(j * cw), Math.round(i * ch)];
    const rgb = colour(value, range);
    context.fillStyle = `rgb(${rgb})`;
    context.fillRect(left, top, Math.round((j + 1) * cw) - left, Math.round((i + 1) * ch) - top);
    if (letters >= 7.5 * ratio) {
      context.fillStyle = ink(rgb);
      context.fillText(compact(value), (j + 0.5) * cw, (i + 0.5) * ch);
    }
  });
  if (state.chosen && state.chosen.bin < output.length) {
    const [i, j] = [Math.floor(state.chosen.bin / w), state.chosen.bin % w];
    context.strokeStyle = "#ff5db8";
    context.lineWidth = 2.5 * ratio;
    context.strokeRect(j * cw + 1.5, i * ch + 1.5, cw - 3, ch - 3);
  }
}

/** At most four characters and a sign. */
function compact(value) {
  const size = Math.abs(value);
  if (size >= 99.95 || Number.isInteger(value)) return fixed(value, 0);
  return fixed(value, size >= 0.995 ? 1 : 2).replace("0.", ".");
}

// -------------------------------------------------------------------------------------------------------- the controls

function option(value, text) {
  return make("option", { value, textContent: text });
}

function fillScene() {
  const { maps, boxes } = scene();
  $("object").replaceChildren(
    option("", boxes.length ? "choose a detection" : "none"),
    ...boxes.map(({ name, score }, k) => option(k, `${name} ${score.toFixed(2)}`)),
  );
  $("object").disabled = boxes.length === 0;
  $("level").replaceChildren(
    ...(scene().levels ? [option("auto", "as the rule assigns")] : []),
    ...maps.map((m, k) => option(k, `stride ${m.stride}: ${m.width} × ${m.height} cells`)),
  );
  for (const id of ["channel", "channel-number"]) {
    $(id).max = maps[0].channels - 1;
    $(id).disabled = maps[0].channels === 1;
  }
  $("opacity").disabled = !scene().picture;
  $("image-note").textContent = scene().picture ? "with the chosen channel over it" : "the map itself";
  $("about").textContent = scene().about ?? aboutImage();
  $("small-print").textContent = smallPrint();
}

function aboutImage() {
  const { name, checkpoint, own, head, file_size: file, picture, boxes } = content;
  const size = `${picture.width} × ${picture.height} px`;
  const same = file[0] === picture.width && file[1] === picture.height;
  const sizes = same ? size : `${file.join(" × ")} px, ${size} for the network`;
  const method = `its ${head.replaceAll("_", " ")} pools with ${own.name}, ${own.size.join(" × ")} bins`;
  return `${name} (${sizes}), ${boxes.length} detections. ${checkpoint || "The model"}: ${method}.`;
}

function smallPrint() {
  const notes = [];
  const { maps, picture, usual_size: usual, learned, own } = content;
  notes.push(`Feature maps are stored as ${[...new Set(maps.map((m) => m.type))].join(" and ")}.`);
  if (picture.width !== usual[0]) {
    const sizes = `${picture.width} × ${picture.height} instead of ${usual.join(" × ")} pixels`;
    notes.push(`To keep the page small the network saw the image at ${sizes}.`);
  }
  if (learned?.predictors) {
    const types = [...new Set(learned.predictors.flatMap((p) => [...p.offsets, ...p.modulation]).map((l) => l.type))];
    const error = short(Math.max(learned.error_px, 1e-4));
    const stored = `The offset predictor is stored as ${types.join(" and ")}`;
    notes.push(`${stored}; its offsets are within ${error} px of the model's.`);
  }
  if (own.note) notes.push(own.note);
  if (!METHODS[own.method]) notes.push(`The checkpoint's own method, ${own.name}, is not among those shown here.`);
  return notes.join(" ");
}

const cards = Object.fromEntries(Object.entries(METHODS).map(([method, { name }]) => {
  const card = make("button", { className: "method", type: "button" });
  card.dataset.method = method;
  const title = make("b", { textContent: name });
  if (content.own.method === method) title.append(" ", make("em", { textContent: "the checkpoint's" }));
  card.append(title, document.createElement("canvas"), document.createElement("span"));
  card.addEventListener("click", (event) => chooseMethod(method, event));
  $("cards").append(card);
  $("method").append(option(method, name));
  return [method, card];
}));

/** A click on a card chooses the method, and on its output the bin under the pointer too. */
function chooseMethod(method, event) {
  const canvas = cards[method].querySelector("canvas");
  const place = canvas.getBoundingClientRect();
  const [x, y] = [(event.clientX - place.left) / place.width, (event.clientY - place.top) / place.height];
  const [h, w] = compute({ method }).reading.size;
  const bin = x >= 0 && x < 1 && y >= 0 && y < 1 ? Math.floor(y * h) * w + Math.floor(x * w) : null;
  set({ method, chosen: bin === null ? state.chosen : { bin, point: 0 } });
}

/** A click into a panel: the nearest point within reach, else the bin. */
function pick(x, y, unit) {
  const { reading, map } = compute();
  const [px, py] = [x / map.stride, y / map.stride];
  let [best, least] = [null, (12 * unit) / map.stride];
  reading.points.forEach((points, bin) => points.forEach((p, point) => {
    const distance = p.x === null ? Infinity : Math.hypot(p.x + 0.5 - px, p.y + 0.5 - py);
    if (distance < least) [best, least] = [{ bin, point }, distance];
  }));
  const inside = reading.bins.findIndex(([a, b, c, d]) => px >= a && px < c && py >= b && py < d);
  set({ chosen: best ?? (inside < 0 ? null : { bin: inside, point: 0 }) });
}

/** Step through all points of all bins. */
function stepPoint(by) {
  const places = compute().reading.points.flatMap((points, bin) => points.map((_, point) => ({ bin, point })));
  if (!places.length) return;
  const { bin = -1, point = -1 } = state.chosen ?? {};
  const now = places.findIndex((p) => p.bin === bin && p.point === point);
  const next = now < 0 ? (by > 0 ? 0 : places.length - 1) : (now + by + places.length) % places.length;
  set({ chosen: places[next] });
}

const on = (id, event, change) => $(id).addEventListener(event, () => change($(id).value));
const number = (text) => (text.trim() === "" || !Number.isFinite(Number(text)) ? null : Number(text));

on("scene", "change", (v) => { openScene(Number(v)); render(); });
on("object", "change", (v) => v !== "" && set({ box: scene().boxes[v].box }));
on("level", "change", (v) => set({ level: v === "auto" ? v : Number(v) }));
on("channel", "input", (v) => set({ channel: Number(v) }));
on("channel-number", "change", (v) => set({ channel: number(v) ?? state.channel }));
on("opacity", "input", (v) => set({ opacity: Number(v) / 100 }));
on("method", "change", (v) => set({ method: v }));
on("size", "change", (v) => set({ size: number(v) === null ? state.size : [number(v), number(v)] }));
on("ratio", "change", (v) => set({ ratio: Number(v) }));
on("reduction", "change", (v) => set({ reduction: v }));
on("placement", "change", (v) => set({ placement: v }));
on("step", "change", (v) => set({ step: number(v) ?? state.step }));
on("previous", "click", () => stepPoint(-1));
on("next", "click", () => stepPoint(1));
for (const id of ["roi-x", "roi-y", "roi-width", "roi-height"]) {
  on(id, "change", () => {
    const [x, y, width, height] = ["x", "y", "width", "height"].map((side) => number($(`roi-${side}`).value));
    if ([x, y, width, height].includes(null) || width < 0 || height < 0) return render();
    set({ box: [x, y, x + width, y + height] });
  });
}
$("sheet").addEventListener("toggle", () => render());
$("channels").addEventListener("click", (event) => {
  const map = compute().map;
  const place = $("channels").getBoundingClientRect();
  const columns = Number($("channels").dataset.columns);
  const rows = Math.ceil(map.channels / columns);
  const at = (v, length, count) => Math.min(Math.floor((v / length) * count), count - 1);
  const line = at(event.clientY - place.top, place.height, rows);
  const channel = line * columns + at(event.clientX - place.left, place.width, columns);
  if (channel < map.channels) set({ channel });
});

// ------------------------------------------------------------------------------------------------------------- showing

function row(kind, cells) {
  const line = document.createElement("tr");
  line.append(...cells.map((text) => make(kind, { textContent: text })));
  return line;
}

function showControls({ level, map }) {
  const { box } = state;
  $("scene").value = state.scene;
  $("level").value = state.level === "auto" && !scene().levels ? 0 : state.level;
  $("object").value = String(scene().boxes.findIndex((b) => b.box.every((v, k) => v === box[k]))).replace("-1", "");
  for (const id of ["channel", "channel-number"]) $(id).value = state.channel;
  $("method").value = state.method;
  for (const choice of $("method").options) choice.disabled = missing(choice.value) !== null;
  const { kind } = METHODS[state.method];
  $("size").value = state.size[0];
  $("ratio").value = state.ratio;
  $("reduction").value = state.reduction;
  $("placement").value = state.placement;
  $("size").disabled = [...LEARNED, "border", "semantic"].includes(kind);
  $("ratio").disabled = !["align", "warp", "context"].includes(kind);
  $("reduction").disabled = kind !== "align" && kind !== "warp";
  $("placement").disabled = kind !== "align";
  $("step").value = state.step;
  const values = { x: box[0], y: box[1], width: box[2] - box[0], height: box[3] - box[1] };
  for (const [side, value] of Object.entries(values)) {
    if (document.activeElement !== $(`roi-${side}`) || !state.held) $(`roi-${side}`).value = Number(value.toFixed(2));
  }
  const size = `stride ${map.stride}, ${map.width} × ${map.height} cells`;
  $("map-note").textContent = `level ${level + 1} of ${scene().maps.length}, ${size}, channel ${state.channel}`;
  return Object.entries(values).map(([side, value]) => `${side} ${Number(value.toFixed(2))}`).join(", ");
}

function showCards(shown) {
  const range = rangeOf(shown.map, state.channel);
  for (const [method, card] of Object.entries(cards)) {
    const [canvas, note] = [card.querySelector("canvas"), card.querySelector("span")];
    const reason = missing(method);
    card.disabled = reason !== null;
    card.setAttribute("aria-pressed", method === state.method);
    if (reason) {
      canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
      note.textContent = reason;
      continue;
    }
    const { reading, output, map } = method === state.method ? shown : compute({ method });
    drawOutput(canvas, output, reading.size, range);
    const error = areaError(reading);
    const empty = reading.points.filter((points) => points.length === 0).length;
    note.textContent = [
      `area ${Number.isFinite(error) ? signed(100 * error, 1) : "–"} %`,
      `off by ${fixed(away(reading) * map.stride, 1)} px`,
      ...(empty ? [`${empty} bins empty`] : []),
    ].join(", ");
  }
  $("methods-note").textContent = `channel ${state.channel}; the colours are those of the map`;
  [$("scale-low").textContent, $("scale-high").textContent] = range.map(short);
}

/** How far what is read lies from the RoI, in cells: the distance of the centres, or the mean length of the offsets. */
function away({ real, read, offsets }) {
  if (offsets) return offsets.reduce((sum, [dx, dy]) => sum + Math.hypot(dx, dy), 0) / offsets.length;
  return Math.hypot(read[0] + read[2] - real[0] - real[2], read[1] + read[3] - real[1] - real[3]) / 2;
}

function showFacts(shown) {
  const { reading, map } = shown;
  const entries = ([x1, y1, x2, y2], digits) =>
    [x1, y1, x2 - x1, y2 - y1, (x2 - x1) * (y2 - y1)].map((v) => fixed(v, digits));
  const rounded = rounds(reading);
  const [real, read] = [entries(reading.real, 2), entries(reading.read, rounded ? 0 : 2)];
  $("facts").replaceChildren(
    row("th", ["in cells", "the RoI", rounded ? "quantised" : "as read"]),
    ...["x", "y", "width", "height", "area"].map((name, k) => row("td", [name, real[k], read[k]])),
  );
  const error = areaError(reading);
  const dropped = reading.whole && new Set(reading.points.flat().map(({ x, y }) => `${x},${y}`)).size;
  const extent = (reading.read[2] - reading.read[0]) * (reading.read[3] - reading.read[1]);
  const share = Number.isFinite(error) ? `${signed(100 * error, 1)} %` : "–";
  const strong = make("b", { textContent: share });
  const distance = fixed(away(reading) * map.stride, 2);
  const words = reading.offsets ? `area error; the offsets move bins by ${distance} px on average`
    : `area error; its centre is ${distance} px from the RoI's`;
  $("area").replaceChildren(strong, `${words}.${reading.whole ? ` Its bins read ${dropped} of ${extent} cells.` : ""}`);
  const { points, largest, inside, regularInside, parameters } = counts(shown);
  const percent = (part) => `${fixed(100 * part, 0)} %`;
  $("counts").textContent = [
    `${points} points`,
    ...(largest === null ? [] : [`the largest offset is ${fixed(largest, 1)} px`]),
    ...(parameters === null ? [] : [`${parameters.toLocaleString("en")} parameters`]),
    ...(inside === null ? [] : [`${percent(inside)} of the points lie inside the object's outline`]),
    ...(regularInside === null ? [] : [`${percent(regularInside)} of those of the regular grid`]),
  ].join(", ");
  $("facts-note").textContent = METHODS[reading.method].name;
}

function showPoint({ reading, map, values, learned }) {
  const points = state.chosen && reading.points[state.chosen.bin];
  const point = points && points[state.chosen.point];
  const [table, note, title] = [$("neighbours"), $("point-note"), $("point-title")];
  table.replaceChildren();
  if (!points) {
    title.textContent = "";
    note.textContent = "Click a sampling point, a bin, or a number of an output above.";
    return;
  }
  const [i, j] = [Math.floor(state.chosen.bin / reading.size[1]), state.chosen.bin % reading.size[1]];
  title.textContent = `bin (row ${i + 1}, column ${j + 1})`;
  note.textContent = "";
  if (!point) {
    note.textContent = "No cell of the map lies in this bin: its output is 0.";
    return;
  }
  const whole = reading.whole || point.x === null;
  if (!whole) {
    const where = `x ${fixed(point.x)}, y ${fixed(point.y)}`;
    title.textContent += `, point ${state.chosen.point + 1} of ${points.length}: ${where}`;
  }
  const value = pointValue(point, values, map.width);
  if (reading.whole) {
    title.textContent += `, cell ${state.chosen.point + 1} of ${points.length}`;
    table.append(row("th", ["cell (x, y)", "value"]), row("td", [`(${point.x}, ${point.y})`, fixed(value, 4)]));
  } else {
    const cells = [...point.cells].sort((a, b) => (point.x === null ? b.weight - a.weight : 0)).slice(0, 16);
    table.append(row("th", ["cell (x, y)", "weight", "value", "product"]));
    for (const { u, v, weight } of cells) {
      const cell = values[v * map.width + u];
      table.append(row("td", [`(${u}, ${v})`, fixed(weight, 4), fixed(cell, 4), fixed(weight * cell, 4)]));
    }
    const more = point.cells.length - cells.length;
    if (more) table.append(row("td", [`and ${more} more`, "", "", ""]));
    const total = point.cells.reduce((s, c) => s + c.weight, 0);
    const sum = row("td", ["sum", fixed(total, 4), "", fixed(value, 4)]);
    sum.className = "sum";
    table.append(sum);
  }
  const output = pooled({ ...reading, points: [points] }, values, map.width)[0];
  const how = point.x === null ? "the mean of the interpolated map over the bin, from each cell's share"
    : reading.reduction === "max" ? `the largest of its ${points.length} ${reading.whole ? "cells" : "points"}`
    : `the mean of its ${points.length} points`;
  const convention = reading.whole ? "" : " Cell u lies at u here, its value in its middle.";
  const moved = reading.offsets ? movedText(reading.offsets[state.chosen.bin], learned, map.stride) : "";
  note.textContent = `The bin's output, ${fixed(output, 4)}, is ${how}.${moved}${convention}`;
  if (!point.cells.length) note.textContent += " This point is more than a cell off the map and counts as 0.";
}

function movedText([dx, dy, modulation], learned, stride) {
  if (learned.kind === "rotated") return ` The learner turned the RoI by ${fixed(360 * learned.rotation[4], 1)}°.`;
  const weighed = METHODS[state.method].modulated ? ` It counts ${fixed(modulation, 3)} times.` : "";
  const by = `(${fixed(dx * stride)}, ${fixed(dy * stride)}) px`;
  return ` The predictor moved it by ${by}, γ = ${learned.gamma}.${weighed}`;
}

function showNumbers({ output, reading }) {
  if (!$("numbers").open) return;
  const [h, w] = reading.size;
  const rows = Array.from({ length: h }, (_, i) => [...output.slice(i * w, (i + 1) * w)].map((v) => fixed(v, 4)));
  $("output").replaceChildren(...rows.map((texts) => row("td", texts)));
}

let sheetShown = null; // drawing it takes long on large maps
function showSheet({ map }) {
  $("sheet").hidden = map.channels === 1;
  if (!$("sheet").open || $("sheet").hidden) return;
  const canvas = $("channels");
  const aspect = canvas.clientWidth > 600 ? 2 : 1;
  const columns = Math.min(map.channels, Math.ceil(Math.sqrt((aspect * map.channels * map.height) / map.width)));
  const rows = Math.ceil(map.channels / columns);
  const gap = Math.max(1, Math.round(map.width / 24));
  const [tw, th] = [map.width + gap, map.height + gap];
  canvas.dataset.columns = columns;
  Object.assign($("sheet-mark").style, {
    left: `${(100 * (state.channel % columns)) / columns}%`,
    top: `${(100 * Math.floor(state.channel / columns)) / rows}%`,
    width: `${(100 * map.width) / tw / columns}%`, height: `${(100 * map.height) / th / rows}%`,
  });
  const key = [state.scene, scene().maps.indexOf(map), columns].join();
  if (sheetShown === key) return;
  sheetShown = key;
  Object.assign(canvas, { width: columns * tw, height: rows * th });
  canvas.style.imageRendering = columns * tw < canvas.clientWidth ? "pixelated" : "auto";
  const context = canvas.getContext("2d");
  for (let c = 0; c < map.channels; c++) {
    context.putImageData(colours(map, c), (c % columns) * tw, Math.floor(c / columns) * th);
  }
}

function render() {
  const shown = compute();
  const label = showControls(shown);
  drawImagePanel(shown);
  drawCloseup(shown);
  drawReading(shown);
  drawMapPanel(shown);
  for (const panel of [imagePanel, closeup, mapPanel]) panel.showBox(state.box, label);
  if (document.activeElement.closest(".frame")) $("said").textContent = label; // a changed name is not read out
  $("closeup-note").textContent = `${METHODS[state.method].name}, stride ${shown.map.stride}, channel ${state.channel}`;
  showCards(shown);
  showFacts(shown);
  showPoint(shown);
  showNumbers(shown);
  showSheet(shown);
}

/** Change the state and show it; values out of range are moved into it. */
function set(changes) {
  Object.assign(state, changes);
  const { maps } = scene();
  state.channel = Math.min(Math.max(Math.round(state.channel), 0), maps[0].channels - 1);
  state.size = state.size.map((v) => Math.min(Math.max(Math.round(v), 1), 14));
  if (state.step <= 0) state.step = 1;
  if (missing(state.method)) state.method = "align";
  const reading = compute().reading;
  const { bin = 0, point = 0 } = state.chosen ?? {};
  if (!reading.points[bin]) state.chosen = null;
  else if (point >= reading.points[bin].length && point > 0) state.chosen = { bin, point: 0 };
  render();
}

$("scene").append(...SCENES.map(({ name }, k) => option(k, name)));
$("numbers").addEventListener("toggle", () => render());
openScene(0);
window.addEventListener("resize", () => render());
render();

/**
 * For tests, and for the console:
 *   explorer.pool({method, roi, level, channel, size, ratio, reduction, placement})
 *     -> {output [h][w], read, real (cells), areaError, level, points, offsets, modulation, rotation}
 *   explorer.counts()
 *   explorer.set({method, box, ...}), explorer.state, explorer.open(scene), explorer.scenes
 */
window.explorer = {
  state,
  set,
  scenes: SCENES.map(({ name }) => name),
  open(index) {
    openScene(index);
    render();
  },
  pool({ roi = state.box, ...request } = {}) {
    const { reading, output, level, learned } = compute({ ...request, box: roi });
    const [h, w] = reading.size;
    return {
      output: Array.from({ length: h }, (_, i) => [...output.slice(i * w, (i + 1) * w)]),
      real: reading.real,
      read: reading.read,
      areaError: areaError(reading),
      level,
      points: reading.points,
      offsets: learned?.predictors ? [...learned.offsets] : null,
      rotation: learned?.rotation ? [...learned.rotation] : null,
      modulation: learned?.modulation ? [...learned.modulation] : null,
    };
  },
  counts: () => counts(compute()),
  /** Where a point of the close-up is on the screen. */
  whereIs(bin, point) {
    const { reading, map } = compute();
    const { x, y } = reading.points[bin][point];
    const place = closeup.figure.getBoundingClientRect();
    const onScreen = (v, k) => ((v + 0.5) * map.stride - closeup.view[k]) / closeup.unit;
    return { x: place.left + onScreen(x, 0), y: place.top + onScreen(y, 1) };
  },
};
