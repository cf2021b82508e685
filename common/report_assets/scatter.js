// Maps of points on a canvas: <div data-scatter="ID"> is filled from the JSON element with that id.

const inksOnLight = ["#3566c8", "#d9662b", "#2b8a57", "#b03a7c", "#8a6fd1", "#b38600", "#2190a8", "#c4423f", "#6b7a1f", "#7d5a44", "#4d55a8", "#c46aa8"];
const inksOnDark = ["#7aa2f5", "#f0935f", "#5fc48d", "#e57fb4", "#b5a1f2", "#dcb545", "#5cc4da", "#f08783", "#aebf56", "#c29b82", "#929af0", "#eaa3d3"];
const margin = 18;
const maxZoom = 64;

class ScatterMap {
  constructor(root) {
    Object.assign(this, readData(root.dataset.scatter));
    this.n = this.x.length;
    this.width = largest(this.x) || 1;
    this.height = largest(this.y) || 1;
    this.zoom = 1;
    this.centre = [this.width / 2, this.height / 2];
    this.chosen = null; // label that is highlighted
    this.hovered = null; // index of a point
    this.buildFrame(root);
    this.indexPoints();
    this.findLabelPlaces();
    this.listen();
    new ResizeObserver(() => this.resize()).observe(this.canvas);
  }

  buildFrame(root) {
    const shown = this.names.slice(0, 500);
    this.menu = build("select", {
      "aria-label": `Highlight in ${this.name}`,
      onchange: () => this.choose(this.menu.value === "" ? null : Number(this.menu.value)),
    }, build("option", { value: "" }, `All ${this.names.length.toLocaleString("en")} groups`),
      ...shown.map((name, index) => build("option", { value: index }, name)));
    const button = (text, label, action) => build("button", { type: "button", "aria-label": label, onclick: action }, text);
    this.canvas = build("canvas", {
      tabindex: "0", role: "img",
      "aria-label": `${this.name}: ${this.n.toLocaleString("en")} points in ${this.names.length.toLocaleString("en")} groups`,
    });
    root.append(
      build("div", { class: "toolbar" }, this.names.length > 1 ? this.menu : null,
        build("span", { class: "count" }, `${this.n.toLocaleString("en")} points`),
        button("−", "Zoom out", () => this.zoomBy(1 / 1.6)), button("+", "Zoom in", () => this.zoomBy(1.6)),
        button("Reset", "Show everything", () => this.reset())),
      this.canvas,
    );
    this.brush = this.canvas.getContext("2d");
  }

  /** Points by square of a coarse grid, so that hovering looks at a few only. */
  indexPoints() {
    this.square = Math.max(this.width, this.height) / 64;
    this.squares = new Map();
    for (let i = 0; i < this.n; i++) {
      const key = Math.floor(this.x[i] / this.square) * 1000 + Math.floor(this.y[i] / this.square);
      if (this.squares.has(key)) this.squares.get(key).push(i);
      else this.squares.set(key, [i]);
    }
  }

  /** The name of a group stands at the median of its points. */
  findLabelPlaces() {
    const members = this.names.map(() => []);
    for (let i = 0; i < this.n; i++) members[this.label[i]].push(i);
    const median = (values) => values.sort((a, b) => a - b)[values.length >> 1];
    this.members = members;
    this.places = members.slice(0, 200).map((points) => [median(points.map((i) => this.x[i])), median(points.map((i) => this.y[i]))]);
  }

  listen() {
    const { canvas } = this;
    let drag = null;
    canvas.addEventListener("pointerdown", (event) => {
      drag = [event.clientX, event.clientY];
      if (event.pointerType === "mouse" || this.zoom > 1) canvas.setPointerCapture(event.pointerId);
      this.point(event);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!drag || this.zoom === 1) return this.point(event);
      this.moveBy(drag[0] - event.clientX, drag[1] - event.clientY);
      drag = [event.clientX, event.clientY];
    });
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => { drag = null; });
    canvas.addEventListener("pointerleave", () => { this.hovered = null; hideTip(); this.draw(); });
    canvas.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return; // the wheel alone scrolls the page
      event.preventDefault();
      this.zoomBy(event.deltaY < 0 ? 1.25 : 0.8);
    }, { passive: false });
    canvas.addEventListener("dblclick", () => this.zoomBy(2));
    canvas.addEventListener("keydown", (event) => this.press(event));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    window.addEventListener("beforeprint", () => { this.isPrinting = true; this.draw(); });
    window.addEventListener("afterprint", () => { this.isPrinting = false; this.draw(); });
  }

  press(event) {
    const moves = { ArrowLeft: [-40, 0], ArrowRight: [40, 0], ArrowUp: [0, -40], ArrowDown: [0, 40] };
    if (moves[event.key]) this.moveBy(...moves[event.key]);
    else if (event.key === "+" || event.key === "=") this.zoomBy(1.6);
    else if (event.key === "-") this.zoomBy(1 / 1.6);
    else if (event.key === "0") this.reset();
    else return;
    event.preventDefault();
  }

  choose(label) { this.chosen = label; this.draw(); }

  reset() { this.zoom = 1; this.centre = [this.width / 2, this.height / 2]; this.draw(); }

  zoomBy(factor) {
    this.zoom = Math.min(maxZoom, Math.max(1, this.zoom * factor));
    if (this.zoom === 1) return this.reset();
    this.draw();
  }

  moveBy(x, y) {
    if (this.zoom === 1) return;
    this.centre[0] = Math.min(this.width, Math.max(0, this.centre[0] + x / this.scale));
    this.centre[1] = Math.min(this.height, Math.max(0, this.centre[1] - y / this.scale));
    this.draw();
  }

  resize() {
    const { clientWidth, clientHeight } = this.canvas;
    const density = window.devicePixelRatio || 1;
    this.canvas.width = clientWidth * density;
    this.canvas.height = clientHeight * density;
    this.brush.setTransform(density, 0, 0, density, 0, 0);
    this.size = [clientWidth, clientHeight];
    this.draw();
  }

  get scale() {
    const [width, height] = this.size;
    return this.zoom * Math.min((width - 2 * margin) / this.width, (height - 2 * margin) / this.height);
  }

  place(x, y) {
    return [this.size[0] / 2 + (x - this.centre[0]) * this.scale, this.size[1] / 2 - (y - this.centre[1]) * this.scale];
  }

  // --- drawing -----------------------------------------------------------------------------------------------------

  draw() {
    if (!this.size) return;
    const isDark = matchMedia("(prefers-color-scheme: dark)").matches && !this.isPrinting;
    this.inks = isDark ? inksOnDark : inksOnLight;
    this.grey = isDark ? "#6d7480" : "#a8adb5";
    this.paper = isDark ? "#171a20" : "#ffffff";
    this.text = isDark ? "#e8eaee" : "#1b1f27";
    this.brush.clearRect(0, 0, ...this.size);
    const radius = Math.min(7, Math.max(1.4, 60 / Math.sqrt(this.n + 200)) * Math.sqrt(Math.sqrt(this.zoom)));
    for (let label = this.names.length - 1; label >= 0; label--) if (label !== this.chosen) this.drawGroup(label, radius);
    if (this.chosen !== null) this.drawGroup(this.chosen, radius + 1);
    this.drawNames();
    if (this.hovered !== null) this.drawRing(radius);
  }

  ink(label) { return label === this.muted ? this.grey : this.inks[label % this.inks.length]; }

  drawGroup(label, radius) {
    const { brush } = this;
    const scale = this.scale;
    const [left, top] = [this.size[0] / 2 - this.centre[0] * scale, this.size[1] / 2 + this.centre[1] * scale];
    brush.beginPath();
    for (const i of this.members[label]) {
      const [x, y] = [left + this.x[i] * scale, top - this.y[i] * scale];
      if (x < -9 || y < -9 || x > this.size[0] + 9 || y > this.size[1] + 9) continue;
      brush.moveTo(x + radius, y);
      brush.arc(x, y, radius, 0, 2 * Math.PI);
    }
    const isFaint = this.chosen !== null && label !== this.chosen;
    brush.fillStyle = isFaint ? this.grey : this.ink(label);
    brush.globalAlpha = isFaint ? 0.22 : label === this.muted ? 0.45 : 0.78;
    brush.fill();
    brush.globalAlpha = 1;
  }

  /** Names of the largest groups, where they do not lie on one another. */
  drawNames() {
    const { brush } = this;
    const taken = [];
    brush.font = "600 11.5px system-ui, sans-serif";
    brush.textAlign = "center";
    brush.textBaseline = "middle";
    brush.lineJoin = "round";
    const order = this.chosen !== null && this.chosen < this.places.length ? [this.chosen] : this.places.keys();
    for (const label of order) {
      const name = this.names[label].length > 26 ? `${this.names[label].slice(0, 25)}…` : this.names[label];
      if (!name || label === this.muted) continue;
      const [x, y] = this.place(...this.places[label]);
      const half = brush.measureText(name).width / 2 + 5;
      const box = [Math.min(Math.max(x, half), this.size[0] - half), Math.min(Math.max(y, 12), this.size[1] - 12), half];
      if (x < 0 || y < 0 || x > this.size[0] || y > this.size[1]) continue;
      if (taken.some((other) => Math.abs(other[0] - box[0]) < other[2] + box[2] && Math.abs(other[1] - box[1]) < 19)) continue;
      taken.push(box);
      brush.strokeStyle = this.paper;
      brush.lineWidth = 4;
      brush.globalAlpha = 0.9;
      brush.strokeText(name, box[0], box[1]);
      brush.globalAlpha = 1;
      brush.fillStyle = this.text;
      brush.fillText(name, box[0], box[1]);
    }
  }

  drawRing(radius) {
    const { brush } = this;
    brush.beginPath();
    brush.arc(...this.place(this.x[this.hovered], this.y[this.hovered]), radius + 3, 0, 2 * Math.PI);
    brush.strokeStyle = this.text;
    brush.lineWidth = 2;
    brush.stroke();
  }

  // --- hovering ----------------------------------------------------------------------------------------------------

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    const found = this.nearest(event.clientX - box.left, event.clientY - box.top, event.pointerType === "touch" ? 24 : 12);
    if (found !== this.hovered) { this.hovered = found; this.draw(); }
    if (found === null) return hideTip();
    showTip(event.clientX, event.clientY, this.texts?.[found] ?? "", this.names[this.label[found]]);
  }

  /** Index of the point nearest to a place of the canvas within so many pixels, or null. */
  nearest(left, top, reach) {
    const x = this.centre[0] + (left - this.size[0] / 2) / this.scale;
    const y = this.centre[1] - (top - this.size[1] / 2) / this.scale;
    const span = reach / this.scale;
    let [best, distance] = [null, span * span];
    for (let column = Math.floor((x - span) / this.square); column <= Math.floor((x + span) / this.square); column++) {
      for (let row = Math.floor((y - span) / this.square); row <= Math.floor((y + span) / this.square); row++) {
        for (const i of this.squares.get(column * 1000 + row) ?? []) {
          if (this.chosen !== null && this.label[i] !== this.chosen) continue;
          const d = (this.x[i] - x) ** 2 + (this.y[i] - y) ** 2;
          if (d <= distance) [best, distance] = [i, d];
        }
      }
    }
    return best;
  }
}

for (const root of document.querySelectorAll("[data-scatter]")) new ScatterMap(root);
