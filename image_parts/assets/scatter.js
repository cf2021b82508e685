// The scatter page: points by Plotly, everything else here. Texts go in by textContent alone.

const data = JSON.parse(document.getElementById("data").textContent);
const n = data.x.length;
const clusterOf = new Map(data.clusters.map((cluster) => [cluster.label, cluster]));
const isDark = matchMedia("(prefers-color-scheme: dark)");
const maxSamples = 60;
const dotSize = Math.max(3.2, Math.min(9, 260 / Math.sqrt(n + 400)));
// As near as the extent of the cloud allows: 1.73 is the diagonal of a full cube.
const reach = Math.hypot(...data.extent) / Math.max(...data.extent) / 1.73;
const homeEye = { x: 1.16 * reach, y: 1.16 * reach, z: 0.68 * reach };
const state = { chosen: null, pinned: null, shown: null, turning: 0, wheel: 0, marking: 0 };
const ui = {};

function build(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

const count = (value) => value.toLocaleString("en");
const bytes = (value) => value < 1e6 ? `${count(Math.max(1, Math.round(value / 1e3)))} kB` : `${(value / 1e6).toFixed(1)} MB`;

// --- Thumbnails ------------------------------------------------------------------------------------------------------

const sheets = data.sprites.sheets.map((address) => {
  const image = new Image();
  image.src = address;
  return image;
});

/** Draw the thumbnail of a point as soon as its sheet is decoded. */
function drawThumbnail(canvas, point) {
  const { cell, size, columns, perSheet } = data.sprites;
  const place = point % perSheet, sheet = sheets[Math.floor(point / perSheet)];
  const draw = () => {
    if (canvas.dataset.point !== String(point)) return; // another image is shown by now
    const longer = Math.max(data.width[point], data.height[point]) || 1;
    const width = Math.max(1, Math.round(size * data.width[point] / longer));
    const height = Math.max(1, Math.round(size * data.height[point] / longer));
    const left = (place % columns) * cell + Math.floor((size - width) / 2);
    const top = Math.floor(place / columns) * cell + Math.floor((size - height) / 2);
    const scale = canvas.width / size, brush = canvas.getContext("2d");
    brush.clearRect(0, 0, canvas.width, canvas.height);
    brush.imageSmoothingQuality = "high";
    brush.drawImage(sheet, left, top, width, height,
      (canvas.width - width * scale) / 2, (canvas.height - height * scale) / 2, width * scale, height * scale);
    canvas.dataset.drawn = point;
  };
  canvas.dataset.point = point;
  if (sheet.complete) draw();
  else sheet.decode().then(draw, draw);
}

// --- The side panel --------------------------------------------------------------------------------------------------

function showCard(point) {
  state.shown = point;
  ui.card.replaceChildren();
  if (point === null) {
    ui.card.append(build("div", { class: "picture" },
      build("p", { class: "empty" }, "Point at a dot to see its image; click to keep it here.")),
      build("p", { class: "path" }), build("dl"));
    return;
  }
  const canvas = build("canvas", { width: 416, height: 416, role: "img", "aria-label": "Thumbnail" });
  const cluster = clusterOf.get(data.label[point]);
  const wasNoise = data.raw[point] < 0 && data.label[point] >= 0;
  const facts = [
    ["Cluster", build("span", {}, dot(cluster), wasNoise ? `${cluster.name}, joined from noise` : cluster.name)],
    ["Probability", data.probability[point].toFixed(3)],
    ["To centroid", data.distance[point] === null ? "–" : data.distance[point].toFixed(3)],
    ["Size", `${count(data.width[point])} × ${count(data.height[point])} px, ${bytes(data.bytes[point])}`],
  ];
  ui.card.append(build("div", { class: "picture" }, canvas), build("p", { class: "path" }, data.path[point]),
    build("dl", {}, ...facts.flatMap(([name, value]) => [build("dt", {}, name), build("dd", {}, value)])));
  drawThumbnail(canvas, point);
}

function dot(cluster) {
  const mark = build("span", { class: "dot" });
  mark.style.background = inkOf(cluster);
  return mark;
}

function listClusters() {
  const largest = Math.max(...data.clusters.map((cluster) => cluster.size), 1);
  ui.list.replaceChildren();
  for (const cluster of data.clusters) {
    const bar = build("i");
    bar.style.width = `${100 * cluster.size / largest}%`;
    bar.style.background = inkOf(cluster);
    const isChosen = state.chosen === cluster.label;
    const row = build("button", {
      type: "button", class: state.chosen === null || isChosen ? "row" : "row dimmed", "aria-pressed": isChosen,
      onclick: () => choose(isChosen ? null : cluster.label),
    }, dot(cluster), build("span", { class: "name" }, cluster.name), build("span", { class: "size" }, count(cluster.size)),
      build("span", { class: "share" }, bar));
    const item = build("li", {}, row);
    if (isChosen) item.append(buildSamples(cluster));
    ui.list.append(item);
    if (isChosen) row.focus({ preventScroll: true });
  }
  ui.all.hidden = state.chosen === null;
}

/** The images of a cluster, the most typical first. */
function buildSamples(cluster) {
  const far = (point) => data.distance[point] ?? Infinity;
  const points = [...Array(n).keys()].filter((point) => data.label[point] === cluster.label)
    .sort((a, b) => far(a) - far(b) || a - b).slice(0, maxSamples);
  const samples = build("div", { class: "samples" });
  for (const point of points) {
    const canvas = build("canvas", { width: 112, height: 112 });
    samples.append(build("button", {
      type: "button", title: data.path[point], "aria-label": data.path[point], onmouseenter: () => show(point), onclick: () => pin(point),
    }, canvas));
    drawThumbnail(canvas, point);
  }
  return samples;
}

function choose(label) {
  state.chosen = label;
  listClusters();
  repaint();
}

function show(point) {
  if (point === state.shown) return; // drawing the ring makes Plotly look for the point again
  showCard(point);
  cancelAnimationFrame(state.marking);
  state.marking = requestAnimationFrame(() => markPoint(point));
}

function pin(point) {
  state.pinned = point;
  show(point);
}

// --- The points ------------------------------------------------------------------------------------------------------

/** Lighter on dark, so that the darkest hues stay visible. */
function inkOf(cluster) {
  if (!isDark.matches) return cluster.color;
  const channels = [1, 3, 5].map((i) => parseInt(cluster.color.slice(i, i + 2), 16));
  return `rgb(${channels.map((value) => Math.round(value + (255 - value) * 0.3)).join(",")})`;
}

/** Colours and sizes of all points; those outside the chosen cluster become faint specks, which WebGL draws without fail. */
function paintedPoints() {
  const inks = new Map(data.clusters.map((cluster) => [cluster.label, inkOf(cluster)]));
  const isShown = (point) => state.chosen === null || data.label[point] === state.chosen;
  const faint = isDark.matches ? "#3a404b" : "#d3d4d0";
  return {
    colors: data.label.map((label, point) => isShown(point) ? inks.get(label) : faint),
    sizes: data.label.map((label, point) => isShown(point) ? dotSize : 0.5 * dotSize),
  };
}

function layout() {
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(name).trim();
  const longest = Math.max(...data.extent);
  const axis = {
    range: [-0.04 * longest, 1.04 * longest], autorange: false, showspikes: false, showbackground: false, zeroline: false,
    showticklabels: false, title: { text: "" }, gridcolor: color("--line"), gridwidth: 1, dtick: longest / 4, tick0: 0,
  };
  return {
    margin: { l: 0, r: 0, t: 0, b: 0 }, showlegend: false, uirevision: "kept", hovermode: "closest",
    paper_bgcolor: color("--page"),
    scene: {
      xaxis: axis, yaxis: axis, zaxis: axis, aspectmode: "cube", dragmode: "turntable",
      camera: { eye: homeEye, up: { x: 0, y: 0, z: 1 }, center: { x: 0, y: 0, z: 0 }, projection: { type: "perspective" } },
    },
  };
}

/** The cloud stands in the middle of its cube. */
function centred(values, axis) {
  const shift = (Math.max(...data.extent) - data.extent[axis]) / 2;
  return values.map((value) => value + shift);
}

function traces() {
  const { colors, sizes } = paintedPoints();
  const style = getComputedStyle(document.documentElement);
  const text = style.getPropertyValue("--text").trim(), page = style.getPropertyValue("--page").trim();
  return [
    {
      type: "scatter3d", mode: "markers", hoverinfo: "none",
      x: centred(data.x, 0), y: centred(data.y, 1), z: centred(data.z, 2),
      marker: { size: sizes, color: colors, line: { width: 0.7, color: page }, opacity: 1 },
    },
    { // a ring around the image in the panel
      type: "scatter3d", mode: "markers", hoverinfo: "skip", x: [null], y: [null], z: [null],
      marker: { size: dotSize + 13, symbol: "circle-open", color: text, line: { width: 3, color: text } },
    },
  ];
}

function markPoint(point) {
  if (!ui.plot.data) return;
  const at = (values, axis) => [[point === null ? null : centred([values[point]], axis)[0]]];
  Plotly.restyle(ui.plot, { x: at(data.x, 0), y: at(data.y, 1), z: at(data.z, 2) }, [1]);
}

function repaint() {
  if (!ui.plot.data) return;
  const { colors, sizes } = paintedPoints();
  Plotly.restyle(ui.plot, { "marker.color": [colors], "marker.size": [sizes] }, [0]);
}

function hasWebGL() {
  try {
    const canvas = document.createElement("canvas");
    return Boolean(canvas.getContext("webgl2") || canvas.getContext("webgl"));
  } catch {
    return false;
  }
}

function drawPoints() {
  if (!hasWebGL()) {
    ui.hint.hidden = true;
    for (const button of document.querySelectorAll("header button")) button.disabled = true;
    ui.stage.append(build("div", { class: "message", role: "alert" },
      build("h2", {}, "The points cannot be drawn here"),
      build("p", {}, "This browser has no WebGL, or it is switched off. The clusters and their images are in the list beside: "
        + "choose one to see them. For the points, open this file in a current Firefox, Chrome, Edge or Safari with "
        + "hardware acceleration on.")));
    document.body.dataset.ready = "without-webgl";
    return;
  }
  Plotly.newPlot(ui.plot, traces(), layout(), { displayModeBar: false, scrollZoom: true, responsive: true }).then(() => {
    const isPoint = (event) => event.points.length && event.points[0].curveNumber === 0;
    ui.plot.on("plotly_hover", (event) => { if (isPoint(event)) show(event.points[0].pointNumber); });
    ui.plot.on("plotly_unhover", () => { if (state.pinned !== null) show(state.pinned); });
    ui.plot.on("plotly_click", (event) => { if (isPoint(event)) pin(event.points[0].pointNumber); });
    document.body.dataset.ready = "yes";
  });
}

// --- The camera ------------------------------------------------------------------------------------------------------

function setDragMode(mode) {
  Plotly.relayout(ui.plot, { "scene.dragmode": mode });
  for (const [name, button] of Object.entries(ui.modes)) button.setAttribute("aria-pressed", name === mode);
}

function resetView() {
  stopTurning();
  Plotly.relayout(ui.plot, { "scene.camera": layout().scene.camera });
}

function startTurning() {
  ui.turn.setAttribute("aria-pressed", "true");
  let before = performance.now();
  const step = (now) => {
    if (!state.turning) return;
    const angle = (now - before) / 1000 * 0.35; // radians a second: once around in 18 s
    before = now;
    const camera = ui.plot.layout.scene.camera, eye = camera.eye;
    const turned = {
      x: eye.x * Math.cos(angle) - eye.y * Math.sin(angle), y: eye.x * Math.sin(angle) + eye.y * Math.cos(angle), z: eye.z,
    };
    Plotly.relayout(ui.plot, { "scene.camera": { ...camera, eye: turned } }).then(() => {
      if (state.turning) state.turning = requestAnimationFrame(step);
    });
  };
  state.turning = requestAnimationFrame(step);
}

/** Plotly tells the camera of a turn of the wheel only at the next one: a wheel event that turns nothing lets it catch up. */
function catchUpWithWheel(event) {
  if (!event.isTrusted) return;
  clearTimeout(state.wheel);
  state.wheel = setTimeout(() => event.target.dispatchEvent(new WheelEvent("wheel", { bubbles: true, deltaY: 0 })), 120);
}

function stopTurning() {
  cancelAnimationFrame(state.turning);
  state.turning = 0;
  ui.turn.setAttribute("aria-pressed", "false");
}

// --- The page --------------------------------------------------------------------------------------------------------

function buildPage() {
  const button = (text, title, action, pressed) => build("button", { type: "button", title, "aria-pressed": pressed, onclick: action }, text);
  const nClusters = data.clusters.filter((cluster) => cluster.label >= 0).length;
  const drawn = n < data.nImages ? `, ${count(n)} of them drawn` : "";
  ui.modes = {
    turntable: button("Rotate", "Drag to rotate", () => setDragMode("turntable"), "true"),
    pan: button("Pan", "Drag to move sideways", () => setDragMode("pan"), "false"),
    zoom: button("Zoom", "Drag up and down to zoom; the wheel always zooms", () => setDragMode("zoom"), "false"),
  };
  ui.turn = button("Auto-rotate", "Turn slowly", () => state.turning ? stopTurning() : startTurning(), "false");
  ui.plot = build("div", { id: "plot" });
  ui.hint = build("p", { id: "hint" }, "Drag to rotate · wheel to zoom · right button to pan · Esc to let go of an image");
  ui.stage = build("main", { id: "stage" }, ui.plot, ui.hint);
  ui.card = build("section", { id: "card", "aria-label": "Image", "aria-live": "polite" });
  ui.list = build("ul");
  ui.all = button("Show all", "Show all clusters again", () => choose(null));
  document.body.append(
    build("header", {}, build("h1", {}, data.title),
      build("span", { class: "counts" }, `${count(data.nImages)} images in ${count(nClusters)} clusters${drawn}`),
      build("span", { class: "group" }, ...Object.values(ui.modes)),
      build("span", { class: "group" }, button("Reset view", "Show everything from the front", resetView), ui.turn)),
    ui.stage,
    build("aside", {}, ui.card, build("section", { id: "groups", "aria-label": "Clusters" },
      build("div", { class: "head" }, build("h2", {}, "Clusters"), ui.all), ui.list)));
  ui.stage.addEventListener("pointerdown", stopTurning);
  ui.stage.addEventListener("wheel", catchUpWithWheel, { passive: true });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    state.pinned = null;
    show(null);
  });
  isDark.addEventListener("change", () => {
    listClusters();
    if (ui.plot.data) Plotly.react(ui.plot, traces(), layout());
  });
}

buildPage();
showCard(null);
listClusters();
drawPoints();
