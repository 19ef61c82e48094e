// A panel shows part of the image plane: a canvas for what has colours, over it an SVG for the RoI and what is read.
// All coordinates are pixels of the image as the network sees it; `unit` is a CSS pixel in them.

const HANDLES = ["nw", "n", "ne", "e", "se", "s", "sw", "w"];
const SLACK = 4; // CSS pixels that a pointer may move and still click

function svg(name, attributes = {}, parent = null) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  place(element, attributes);
  if (parent) parent.append(element);
  return element;
}

function place(element, attributes) {
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
}

class Panel {
  /** `act` is {resize(box), pick(x, y), drag(on)}; `name` is what the RoI's frame is called, null if Tab passes it. */
  constructor(figure, name, act) {
    this.figure = figure;
    this.canvas = figure.querySelector("canvas");
    this.svg = figure.querySelector("svg");
    this.marks = svg("g", { "aria-hidden": "true" }, this.svg);
    this.name = name;
    this.act = act;
    this.box = [0, 0, 1, 1];
    this.makeFrame();
    this.top = svg("g", { class: "top", "aria-hidden": "true" }, this.svg); // seen over the frame's handles
    this.svg.addEventListener("pointerdown", (event) => this.press(event));
  }

  makeFrame() {
    this.frame = svg("g", { class: "frame" }, this.svg);
    if (this.name) {
      place(this.frame, { tabindex: 0, role: "application", "aria-roledescription": "movable region" });
      this.frame.setAttribute("aria-describedby", "hint");
      this.frame.addEventListener("keydown", (event) => this.key(event));
    } else {
      this.frame.setAttribute("aria-hidden", "true");
    }
    this.rects = ["hit", "under", "real"].map((name) => svg("rect", { class: name }, this.frame));
    this.handles = HANDLES.map((side) => [
      svg("rect", { class: `handle ${side}`, "data-side": side }, this.frame),
      svg("rect", { class: `grip ${side}`, "data-side": side }, this.frame), // larger than what is seen
    ]);
  }

  /** Show [x1, y1, x2, y2]; the figure takes its aspect, and no more than `most` of the window's height. */
  look([x1, y1, x2, y2], most = 0.72) {
    const aspect = (x2 - x1) / (y2 - y1);
    this.view = [x1, y1, x2, y2];
    this.figure.style.aspectRatio = aspect;
    this.figure.style.maxWidth = `${aspect * most * 100}vh`;
    this.svg.setAttribute("viewBox", `${x1} ${y1} ${x2 - x1} ${y2 - y1}`);
    this.unit = (x2 - x1) / Math.max(this.figure.clientWidth, 1);
  }

  /** Clear the canvas and let `draw(context, unit)` paint it. */
  paint(draw) {
    const ratio = window.devicePixelRatio || 1;
    const { clientWidth, clientHeight } = this.figure;
    const [width, height] = [clientWidth, clientHeight].map((v) => Math.max(1, Math.round(v * ratio)));
    if (this.canvas.width !== width || this.canvas.height !== height) Object.assign(this.canvas, { width, height });
    const context = this.canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, width, height);
    const scale = ratio / this.unit;
    context.setTransform(scale, 0, 0, scale, -this.view[0] * scale, -this.view[1] * scale);
    context.imageSmoothingEnabled = false;
    draw(context, this.unit);
  }

  /** Place the RoI's frame. */
  showBox(box, label) {
    this.box = box;
    const [x1, y1, x2, y2] = box;
    const [width, height] = [Math.max(x2 - x1, 0), Math.max(y2 - y1, 0)];
    this.rects.forEach((rect, k) => {
      place(rect, { x: x1, y: y1, width, height, "stroke-width": [0, 4, 2][k] * this.unit });
    });
    const room = Math.min(width, height) / this.unit; // in CSS pixels: the middle must stay free to drag
    this.handles.forEach((pair, k) => {
      const side = HANDLES[k];
      const [right, down] = [["w", "e"], ["n", "s"]].map(([low, high]) => side.includes(high) - side.includes(low));
      const [x, y] = [(x1 + x2 + right * (x2 - x1)) / 2, (y1 + y2 + down * (y2 - y1)) / 2];
      const seen = Math.min(Math.max(room / 6, 4), 8);
      const inward = Math.min(Math.max(room / 6, 2), 10);
      pair.forEach((rect, large) => {
        const length = (large ? 10 + inward : seen) * this.unit;
        const out = large ? (5 - inward / 2) * this.unit : 0; // what lacks inside is added outside
        const corner = { x: x + right * out - length / 2, y: y + down * out - length / 2 };
        place(rect, { ...corner, width: length, height: length, "stroke-width": this.unit });
        rect.style.display = side.length === 1 && room < 36 ? "none" : "";
      });
    });
    if (this.name) this.frame.setAttribute("aria-label", `${this.name}: ${label}`);
  }

  /** Where a pointer is, in pixels of the image. */
  at(event) {
    const figure = this.figure.getBoundingClientRect();
    const [left, top] = [event.clientX - figure.left, event.clientY - figure.top];
    return [this.view[0] + left * this.unit, this.view[1] + top * this.unit];
  }

  press(event) {
    if (event.button !== 0) return;
    const [x, y] = this.at(event);
    const [x1, y1, x2, y2] = this.box;
    const side = event.target.dataset.side ?? (x >= x1 && x <= x2 && y >= y1 && y <= y2 ? "nsew" : null);
    const from = this.box;
    let moving = false;
    const move = (next) => {
      if (side === null) return;
      const [dx, dy] = [(next.clientX - event.clientX) * this.unit, (next.clientY - event.clientY) * this.unit];
      if (!moving && Math.hypot(dx, dy) < SLACK * this.unit) return;
      if (!moving) this.act.drag(true);
      moving = true;
      this.act.resize(pulled(from, side, dx, dy));
    };
    const end = (next) => {
      for (const [name, listener] of listeners) this.svg.removeEventListener(name, listener);
      if (moving) this.act.drag(false);
      else if (next.type === "pointerup") this.act.pick(x, y, this.unit);
    };
    const listeners = [["pointermove", move], ["pointerup", end], ["pointercancel", end]];
    for (const [name, listener] of listeners) this.svg.addEventListener(name, listener);
    this.svg.setPointerCapture(event.pointerId);
    if (this.name && side !== null) this.frame.focus({ preventScroll: true, focusVisible: false });
  }

  key(event) {
    const direction = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!direction || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const [dx, dy] = direction.map((v) => v * this.act.step());
    this.act.resize(pulled(this.box, event.shiftKey ? "se" : "nsew", dx, dy));
  }
}

/** A box with some of its sides moved; a side stops at the one across. */
function pulled([x1, y1, x2, y2], sides, dx, dy) {
  const whole = sides === "nsew";
  return [
    sides.includes("w") ? (whole ? x1 + dx : Math.min(x1 + dx, x2)) : x1,
    sides.includes("n") ? (whole ? y1 + dy : Math.min(y1 + dy, y2)) : y1,
    sides.includes("e") ? (whole ? x2 + dx : Math.max(x2 + dx, x1)) : x2,
    sides.includes("s") ? (whole ? y2 + dy : Math.max(y2 + dy, y1)) : y2,
  ];
}
