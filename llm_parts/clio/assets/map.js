// The map: points painted pixel by pixel, because a hundred thousand arcs would take a quarter of a second each time.

const gridSide = 256;
const mapMargin = 26;
const deepestZoom = 400;
// Painted one over the other.
const [faintLayer, greyLayer, colorLayer, noLayer] = [0, 1, 2, 3];
const wheelStep = 1.0018; // zoom per pixel of the wheel

class PointMap {
  /** x and y are steps from 0 to `extent`; `onPoint(row, event)` and `onPick(row)` tell of hovering and clicking. */
  constructor(canvas, { x, y, extent, onPoint, onPick }) {
    Object.assign(this, { canvas, x, y, extent, onPoint, onPick });
    this.n = x.length;
    this.brush = canvas.getContext("2d");
    this.colors = new Uint8Array(3 * this.n);
    this.isGrey = new Uint8Array(this.n); // noise, or no value
    this.focus = null; // Uint8Array: points that stand out; null: all do
    this.labels = []; // {text, x, y, weight, rgb}
    this.marked = null;
    this.view = null; // {zoom, x, y}: the middle of what is seen; made when the size is known
    this.indexPoints();
    this.findMiddle();
    this.listen();
    new ResizeObserver(() => this.resize()).observe(canvas);
  }

  /** Points sorted by square of a grid (a counting sort), so that hovering looks at a few only. */
  indexPoints() {
    this.square = (Math.max(...this.extent) + 1) / gridSide;
    const cells = new Uint16Array(this.n);
    const starts = new Uint32Array(gridSide * gridSide + 1);
    for (let i = 0; i < this.n; i++) {
      if (this.x[i] === offMap) continue;
      cells[i] = Math.floor(this.y[i] / this.square) * gridSide + Math.floor(this.x[i] / this.square);
      starts[cells[i] + 1]++;
    }
    for (let cell = 0; cell < gridSide * gridSide; cell++) starts[cell + 1] += starts[cell];
    const next = starts.slice();
    this.order = new Uint32Array(starts[gridSide * gridSide]);
    for (let i = 0; i < this.n; i++) if (this.x[i] !== offMap) this.order[next[cells[i]]++] = i;
    this.starts = starts;
  }

  // --- what is shown -------------------------------------------------------------------------------------------------

  /** Colour each point by `colorOf(row)`, an [r, g, b] or null for grey. */
  paintBy(colorOf) {
    for (let i = 0; i < this.n; i++) {
      const rgb = colorOf(i);
      this.isGrey[i] = rgb ? 0 : 1;
      if (rgb) this.colors.set(rgb, 3 * i);
    }
    this.draw();
  }

  show({ focus = this.focus, labels = this.labels }) { Object.assign(this, { focus, labels }); this.draw(); }

  mark(row) { this.marked = row; this.paste(); }

  /** Turn the view to some rows: their middle nine tenths fill it. */
  lookAt(rows) {
    const places = rows.filter((row) => this.x[row] !== offMap);
    if (!places.length || !this.view) return;
    const span = (values) => { const sorted = values.sort((a, b) => a - b); return [sorted[Math.floor(0.05 * (sorted.length - 1))], sorted[Math.ceil(0.95 * (sorted.length - 1))]]; };
    const [[left, right], [bottom, top]] = [span(places.map((row) => this.x[row])), span(places.map((row) => this.y[row]))];
    const needed = Math.max((right - left) / this.size[0], (top - bottom) / this.size[1], 1e-9) * this.baseScale;
    this.view = { zoom: Math.min(24, Math.max(1, 0.6 / needed)), x: (left + right) / 2, y: (bottom + top) / 2 };
    this.draw();
  }

  reset() { if (this.size) { this.view = this.home(); this.draw(); } }

  /** The box that holds all but the outermost hundredth on each axis: a few stray points must not make the rest small. */
  findMiddle() {
    const inner = (values) => { const sorted = Float64Array.from(this.order, (row) => values[row]).sort(); return [sorted[Math.floor(0.005 * (sorted.length - 1))] ?? 0, sorted[Math.ceil(0.995 * (sorted.length - 1))] ?? 1]; };
    this.middle = [inner(this.x), inner(this.y)];
  }

  home() {
    const [[left, right], [bottom, top]] = this.middle;
    const fits = Math.min((this.size[0] - 2 * mapMargin) / Math.max(1, right - left), (this.size[1] - 2 * mapMargin) / Math.max(1, top - bottom)) / this.baseScale;
    return this.held(fits > 1.08 ? { zoom: Math.min(4, 0.96 * fits), x: (left + right) / 2, y: (bottom + top) / 2 } : { zoom: 1 });
  }

  // --- places --------------------------------------------------------------------------------------------------------

  get baseScale() {
    const [width, height] = this.size;
    return Math.min(Math.max(1, width - 2 * mapMargin) / Math.max(1, this.extent[0]), Math.max(1, height - 2 * mapMargin) / Math.max(1, this.extent[1]));
  }

  get scale() { return this.view.zoom * this.baseScale; }

  place(x, y) { return [this.size[0] / 2 + (x - this.view.x) * this.scale, this.size[1] / 2 - (y - this.view.y) * this.scale]; }

  zoomBy(factor, left = this.size[0] / 2, top = this.size[1] / 2) {
    const zoom = Math.min(deepestZoom, Math.max(1, this.view.zoom * factor));
    // The place under the pointer stays under it.
    const [dx, dy] = [(left - this.size[0] / 2) / this.baseScale, (top - this.size[1] / 2) / this.baseScale];
    const change = 1 / this.view.zoom - 1 / zoom;
    this.view = this.held({ zoom, x: this.view.x + dx * change, y: this.view.y - dy * change });
    this.draw();
  }

  moveBy(left, top) {
    this.view = this.held({ zoom: this.view.zoom, x: this.view.x - left / this.scale, y: this.view.y + top / this.scale });
    this.draw();
  }

  /** The centre of the view stays over the points. */
  held({ zoom, x, y }) {
    if (zoom === 1) return { zoom, x: this.extent[0] / 2, y: this.extent[1] / 2 };
    return { zoom, x: Math.min(this.extent[0], Math.max(0, x)), y: Math.min(this.extent[1], Math.max(0, y)) };
  }

  // --- drawing -------------------------------------------------------------------------------------------------------

  resize() {
    this.size = [this.canvas.clientWidth, this.canvas.clientHeight];
    this.density = Math.min(2, window.devicePixelRatio || 1);
    this.canvas.width = Math.max(1, Math.round(this.size[0] * this.density));
    this.canvas.height = Math.max(1, Math.round(this.size[1] * this.density));
    this.image = null;
    this.view ??= this.home();
    this.render();
  }

  /** Draw with the next frame; many calls in one frame are one. */
  draw() {
    if (this.isDue || !this.view) return;
    this.isDue = true;
    requestAnimationFrame(() => { this.isDue = false; this.render(); });
  }

  get radius() {
    const alone = Math.min(6, Math.max(1.15, 105 / Math.sqrt(this.n + 250)));
    return Math.min(7, alone * this.view.zoom ** 0.3);
  }

  render() {
    const started = performance.now();
    const edge = Math.ceil(this.radius * this.density) + 2; // points may reach over the rim of the canvas
    const [width, height] = [this.canvas.width + 2 * edge, this.canvas.height + 2 * edge];
    if (this.image?.width !== width || this.image.height !== height) this.image = this.brush.createImageData(width, height);
    Object.assign(this, { edge, theme: mapTheme() });
    const [r, g, b] = this.theme.paper;
    new Uint32Array(this.image.data.buffer).fill((255 << 24) | (b << 16) | (g << 8) | r);
    this.sortIntoLayers();
    this.stamp(faintLayer, this.theme.faint, 0.85);
    this.stamp(greyLayer, this.theme.grey, 1);
    this.stamp(colorLayer, null, 1);
    this.paste();
    this.lastRender = performance.now() - started; // milliseconds
  }

  sortIntoLayers() {
    this.layers ??= new Uint8Array(this.n);
    for (let i = 0; i < this.n; i++) {
      if (this.x[i] === offMap) this.layers[i] = noLayer;
      else this.layers[i] = this.focus && !this.focus[i] ? faintLayer : this.isGrey[i] ? greyLayer : colorLayer;
    }
  }

  /** Blend a disc into the image for each point of a layer; in `rgb`, or in the colour of the point. */
  stamp(layer, rgb, size) {
    const disc = this.disc(size * this.radius * this.density);
    const { data, width } = this.image;
    const { layers, x: xs, y: ys, colors, n } = this;
    const scale = this.scale * this.density;
    const left = this.canvas.width / 2 - this.view.x * scale + this.edge;
    const top = this.canvas.height / 2 + this.view.y * scale + this.edge;
    const [rim, right, bottom] = [disc.reach, width - disc.reach - 1, this.image.height - disc.reach - 1];
    const offsets = disc.rows.map((dy, k) => 4 * (dy * width + disc.columns[k]));
    const { shares } = disc;
    let [r, g, b] = rgb ?? [0, 0, 0];
    for (let i = 0; i < n; i++) {
      if (layers[i] !== layer) continue;
      const x = (left + xs[i] * scale) | 0;
      const y = (top - ys[i] * scale) | 0;
      if (x < rim || y < rim || x > right || y > bottom) continue;
      if (!rgb) { r = colors[3 * i]; g = colors[3 * i + 1]; b = colors[3 * i + 2]; }
      const middle = 4 * (y * width + x);
      for (let k = 0; k < offsets.length; k++) {
        const at = middle + offsets[k];
        const share = shares[k];
        data[at] += ((r - data[at]) * share) >> 8;
        data[at + 1] += ((g - data[at + 1]) * share) >> 8;
        data[at + 2] += ((b - data[at + 2]) * share) >> 8;
      }
    }
  }

  /** The pixels of a disc with the share of each that it covers, of 256. */
  disc(radius) {
    const reach = Math.ceil(radius);
    const [rows, columns, shares] = [[], [], []];
    for (let dy = -reach; dy <= reach; dy++) {
      for (let dx = -reach; dx <= reach; dx++) {
        const covered = Math.min(1, Math.max(0, radius + 0.5 - Math.hypot(dx, dy)));
        if (covered < 0.06) continue;
        rows.push(dy);
        columns.push(dx);
        shares.push(Math.round(256 * covered * 0.82));
      }
    }
    return { reach, rows: Int32Array.from(rows), columns, shares: Int32Array.from(shares) };
  }

  /** Put the painted points on the canvas, then names and the ring around the marked point: quick enough to hover. */
  paste() {
    if (!this.image) return;
    const { brush } = this;
    brush.setTransform(1, 0, 0, 1, 0, 0);
    brush.putImageData(this.image, -this.edge, -this.edge);
    brush.setTransform(this.density, 0, 0, this.density, 0, 0);
    this.drawLabels();
    if (this.marked !== null && this.x[this.marked] !== offMap) this.drawRing(this.marked);
  }

  drawLabels() {
    const { brush } = this;
    const taken = [];
    brush.font = "600 12px system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'DejaVu Sans', sans-serif";
    brush.textAlign = "center";
    brush.textBaseline = "middle";
    brush.lineJoin = "round";
    for (const label of this.labels) {
      const [x, y] = this.place(label.x, label.y);
      if (x < 0 || y < 0 || x > this.size[0] || y > this.size[1]) continue;
      const lines = inTwoLines(label.text);
      const half = Math.max(...lines.map((line) => brush.measureText(line).width)) / 2 + 6;
      const rise = 7.5 * lines.length + 2;
      const box = [Math.min(Math.max(x, half), this.size[0] - half), Math.min(Math.max(y, rise), this.size[1] - rise), half, rise];
      if (taken.some((other) => Math.abs(other[0] - box[0]) < other[2] + half && Math.abs(other[1] - box[1]) < other[3] + rise)) continue;
      taken.push(box);
      lines.forEach((line, index) => this.drawText(line, box[0], box[1] + 15 * (index - (lines.length - 1) / 2)));
    }
  }

  drawText(text, x, y) {
    const { brush } = this;
    brush.strokeStyle = toCss(this.theme.paper);
    brush.lineWidth = 4;
    brush.globalAlpha = 0.88;
    brush.strokeText(text, x, y);
    brush.globalAlpha = 1;
    brush.fillStyle = this.theme.text;
    brush.fillText(text, x, y);
  }

  drawRing(row) {
    const { brush } = this;
    const [x, y] = this.place(this.x[row], this.y[row]);
    for (const [color, width] of [[toCss(this.theme.paper), 5], [this.theme.text, 2]]) {
      brush.beginPath();
      brush.arc(x, y, this.radius + 4, 0, 2 * Math.PI);
      brush.strokeStyle = color;
      brush.lineWidth = width;
      brush.stroke();
    }
  }

  // --- pointer and keys ----------------------------------------------------------------------------------------------

  listen() {
    const { canvas } = this;
    const fingers = new Map(); // pointer id -> [x, y]
    let travel = 0;
    const at = (event) => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
    canvas.addEventListener("pointerdown", (event) => {
      fingers.set(event.pointerId, at(event));
      travel = 0;
      if (event.isTrusted) canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!fingers.has(event.pointerId)) return this.point(event, at(event));
      const [before, now] = [fingers.get(event.pointerId), at(event)];
      travel += Math.hypot(now[0] - before[0], now[1] - before[1]);
      if (fingers.size === 2) this.pinch(fingers, event.pointerId, now);
      else if (travel > 3 && this.view.zoom > 1) this.moveBy(now[0] - before[0], now[1] - before[1]);
      fingers.set(event.pointerId, now);
      canvas.classList.toggle("dragging", travel > 3 && this.view.zoom > 1);
      if (travel > 3) this.onPoint(null);
    });
    for (const name of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(name, (event) => {
        if (name === "pointerup" && travel <= 3 && fingers.size === 1) this.pick(event, at(event));
        fingers.delete(event.pointerId);
        canvas.classList.remove("dragging");
      });
    }
    canvas.addEventListener("pointerleave", () => { this.mark(null); this.onPoint(null); });
    canvas.addEventListener("wheel", (event) => {
      // The wheel scrolls the page until the map is clicked: a page must not get stuck on a picture.
      if (document.activeElement !== canvas && !event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      this.zoomBy(wheelStep ** -(event.deltaY * (event.deltaMode ? 20 : 1)), ...at(event));
    }, { passive: false });
    canvas.addEventListener("dblclick", (event) => this.zoomBy(2, ...at(event)));
    canvas.addEventListener("keydown", (event) => this.press(event));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  press(event) {
    const moves = { ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60] };
    if (moves[event.key]) this.moveBy(...moves[event.key]);
    else if (event.key === "+" || event.key === "=") this.zoomBy(1.5);
    else if (event.key === "-") this.zoomBy(1 / 1.5);
    else if (event.key === "0") this.reset();
    else return;
    event.preventDefault();
  }

  pinch(fingers, id, now) {
    const [first, second] = [...fingers.values()];
    const other = fingers.get(id) === first ? second : first;
    const [before, after] = [fingers.get(id), now].map((place) => Math.hypot(place[0] - other[0], place[1] - other[1]));
    this.zoomBy(after / Math.max(1, before), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
  }

  point(event, [left, top]) {
    const row = this.nearest(left, top, event.pointerType === "touch" ? 24 : 12);
    if (row !== this.marked) this.mark(row);
    this.onPoint(row, event);
  }

  pick(event, [left, top]) {
    this.canvas.focus({ preventScroll: true });
    this.onPick(this.nearest(left, top, event.pointerType === "touch" ? 24 : 10));
  }

  /** The point nearest to a place of the canvas within so many pixels, or null; faint ones are not meant. */
  nearest(left, top, reach) {
    if (!this.view) return null;
    const x = this.view.x + (left - this.size[0] / 2) / this.scale;
    const y = this.view.y - (top - this.size[1] / 2) / this.scale;
    const span = reach / this.scale;
    const square = (value) => Math.min(gridSide - 1, Math.max(0, Math.floor(value / this.square)));
    let [best, distance] = [null, span * span];
    for (let row = square(y - span); row <= square(y + span); row++) {
      const end = this.starts[row * gridSide + square(x + span) + 1];
      for (let at = this.starts[row * gridSide + square(x - span)]; at < end; at++) {
        const i = this.order[at];
        if (this.focus && !this.focus[i]) continue;
        const d = (this.x[i] - x) ** 2 + (this.y[i] - y) ** 2;
        if (d <= distance) [best, distance] = [i, d];
      }
    }
    return best;
  }
}

function mapTheme() {
  const isDark = matchMedia("(prefers-color-scheme: dark)").matches;
  return isDark
    ? { paper: [23, 26, 32], text: "#e8eaee", grey: [92, 99, 111], faint: [46, 51, 60] }
    : { paper: [255, 255, 255], text: "#1b1f27", grey: [176, 181, 189], faint: [226, 228, 231] };
}

/** A name in one line or two of like length, cut where it is longer than both. */
function inTwoLines(text, most = 24) {
  const words = text.split(" ");
  if (text.length <= most) return [text];
  let first = words[0];
  let next = 1;
  while (next < words.length && first.length + words[next].length < Math.min(most, text.length / 2 + 4)) first += ` ${words[next++]}`;
  const second = words.slice(next).join(" ");
  const clip = (line) => (line.length > most ? `${line.slice(0, most - 1).trimEnd()}…` : line);
  return second ? [clip(first), clip(second)] : [clip(first)];
}
