// The explorer puts tree, map and search side by side: <div data-explorer="ID"> is filled from the JSON element of that id.

const hitsAtOnce = 50;
const lettersInTip = 320;
const byAuto = "below"; // colour the clusters right below the chosen one

class Explorer {
  constructor(root) {
    const data = readData(root.dataset.explorer);
    this.data = data;
    this.base = unpack(data.base, Int32Array);
    this.texts = new Lines(data.texts);
    this.ids = new Lines(data.ids);
    this.facets = data.facets.map((facet) => ({ ...facet, codes: unpack(facet.codes, Uint8Array) }));
    this.trees = data.hierarchies.map((hierarchy) => new ClusterTree(hierarchy, data.baseClusters, this.base));
    this.colorBy = byAuto;
    this.hits = null; // rows that a search found, or those in no cluster
    this.buildFrame(root);
    this.map = new PointMap(this.canvas, {
      x: unpack(data.x, Uint16Array), y: unpack(data.y, Uint16Array), extent: data.extent,
      onPoint: (row, event) => this.pointAt(row, event), onPick: (row) => this.pick(row),
    });
    this.view = new TreeView(this.pane, {
      texts: this.texts, onSelect: (node) => this.select(node), onExample: (row) => this.visit(row),
      onPointTo: (row) => this.map.mark(row), colorOf: (node) => this.cssOf(node),
    });
    this.useTree(this.trees[0]);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.refresh());
  }

  // --- frame -----------------------------------------------------------------------------------------------------------

  buildFrame(root) {
    this.search = build("input", {
      type: "search", placeholder: "Search", "aria-label": "Search clusters and conversations",
      oninput: () => { clearTimeout(this.timer); this.timer = setTimeout(() => this.find(), this.texts.lower ? 60 : 200); },
    });
    this.switch = this.buildSwitch();
    this.pane = build("div", { class: "pane", tabindex: "-1" });
    this.found = build("div", { class: "pane found", hidden: true });
    this.crumbs = build("nav", { class: "crumbs", "aria-label": "Chosen cluster" });
    this.menu = build("select", { "aria-label": "Colour of the points", onchange: () => this.recolor(this.menu.value) });
    this.canvas = build("canvas", { tabindex: "0", role: "img", "aria-label": `Map of ${this.base.length.toLocaleString("en")} conversations` });
    this.legend = build("ul", { class: "key" });
    this.status = build("p", { class: "unseen", role: "status" });
    const button = (text, label, action) => build("button", { type: "button", "aria-label": label, title: label, onclick: action }, text);
    root.classList.add("explorer");
    root.append(
      build("div", { class: "side" }, build("div", { class: "head" }, this.search, this.switch), this.pane, this.found, this.buildNoise(), this.status),
      build("div", { class: "board" },
        build("div", { class: "head" },
          build("p", { class: "hint" }, "Point at a dot to read it, click it to find its cluster. Drag moves the map; once it was clicked, the wheel zooms."),
          build("label", { class: "by" }, "Colour ", this.menu),
          build("span", { class: "zoom" }, button("−", "Zoom out", () => this.map.zoomBy(1 / 1.6)), button("+", "Zoom in", () => this.map.zoomBy(1.6)),
            button("Fit", "Zoom to what is chosen", () => this.lookAtChosen()), button("Reset", "Show the whole map", () => this.map.reset()))),
        this.crumbs,
        build("div", { class: "sheet" }, this.canvas, this.legend),
      ),
    );
  }

  buildSwitch() {
    if (this.trees.length < 2) return null;
    const buttons = this.trees.map((tree) => build("button", { type: "button", title: tree.note || null, onclick: () => this.useTree(tree) }, tree.title));
    return build("div", { class: "switch", role: "group", "aria-label": "Hierarchy" }, ...buttons);
  }

  /** What is in no cluster has no place in the tree, but is told and can be shown. */
  buildNoise() {
    const rows = [];
    this.base.forEach((label, row) => { if (label < 0) rows.push(row); });
    if (!rows.length) return null;
    const share = formatPercent(this.data.noise / this.data.total, 1);
    return build("button", { type: "button", class: "noise", onclick: () => { this.leaveSearch(); this.showHits(rows, "in no cluster"); } },
      build("i", { class: "swatch" }), build("span", {}, "In no cluster"), build("span", { class: "size" }, `${this.data.noise.toLocaleString("en")} · ${share}`));
  }

  useTree(tree) {
    const chosen = this.tree === undefined ? null : this.chosen;
    this.tree = tree;
    this.chosen = tree.root;
    for (const [index, button] of [...(this.switch?.children ?? [])].entries()) {
      button.setAttribute("aria-pressed", String(this.trees[index] === tree));
    }
    this.fillMenu();
    this.view.show(tree);
    // A base cluster is the same in both hierarchies: it stays chosen.
    const stays = chosen && chosen.depth > 0 && !chosen.children.length;
    this.select(stays ? tree.byLevel[tree.depths][chosen.number] : tree.root);
    if (this.search.value.trim()) this.find();
  }

  fillMenu() {
    const levels = Array.from({ length: this.tree.depths - 1 }, (_, index) => [`level-${index + 1}`, `level ${index + 1}${index ? "" : ", the top"}`]);
    const facets = this.facets.map((facet, index) => [`facet-${index}`, facet.name]);
    const options = [[byAuto, "next level"], ...levels, [`level-${this.tree.depths}`, "base clusters"], ...facets];
    this.menu.replaceChildren(...options.map(([value, text]) => build("option", { value }, text)));
    if (!options.some(([value]) => value === this.colorBy)) this.colorBy = byAuto;
    this.menu.value = this.colorBy;
  }

  // --- choosing --------------------------------------------------------------------------------------------------------

  select(node) {
    this.chosen = node;
    this.hits = null;
    this.view.select(node);
    this.refresh();
  }

  /** Let some conversations stand out, whatever their clusters. */
  showHits(rows, title) {
    if (!this.hits) this.map.reset();
    this.chosen = this.tree.root;
    this.view.select(this.chosen);
    Object.assign(this, { hits: rows, hitsTitle: title });
    this.refresh();
  }

  recolor(value) { this.colorBy = value; this.refresh(); }

  /** Everything that follows from the tree, the chosen node, the hits and the way to colour. */
  refresh() {
    const isDark = matchMedia("(prefers-color-scheme: dark)").matches;
    this.inks = isDark ? inksOnDark : inksOnLight;
    this.facet = this.colorBy.startsWith("facet-") ? this.facets[Number(this.colorBy.slice(6))] : null;
    this.depth = this.colorBy.startsWith("level-") ? Number(this.colorBy.slice(6)) : Math.min(this.chosen.depth + 1, this.tree.depths);
    this.colors = new Map(); // node -> [r, g, b]
    if (!this.facet) for (const node of this.tree.byLevel[this.depth]) this.colors.set(node, nodeColor(this.tree, node, this.inks, this.colorBy !== byAuto));
    this.map.focus = this.findFocus();
    this.map.labels = this.findLabels();
    this.map.paintBy(this.painter());
    this.view.recolor();
    this.writeCrumbs();
    this.writeLegend();
  }

  painter() {
    if (this.facet) {
      const { codes } = this.facet;
      const colors = facetColors(this.facet, this.inks);
      return (row) => colors[codes[row]] ?? null;
    }
    const colors = this.tree.byLevel[this.depth].map((node) => this.colors.get(node));
    return (row) => colors[this.tree.at(row, this.depth)] ?? null;
  }

  findFocus() {
    if (!this.hits && this.chosen.depth === 0) return null;
    const focus = new Uint8Array(this.base.length);
    if (this.hits) for (const row of this.hits) focus[row] = 1;
    else for (let row = 0; row < focus.length; row++) if (this.base[row] >= 0 && this.tree.holds(this.chosen, row)) focus[row] = 1;
    return focus;
  }

  /** Names at the middles (medians) of the clusters that are coloured and stand out; the largest first. */
  findLabels() {
    if (this.facet || this.hits || (this.chosen.parent && this.chosen.depth >= this.depth)) return [];
    const meant = this.tree.byLevel[this.depth].filter((node) => node.size && (!this.chosen.parent || this.tree.pathTo(node).includes(this.chosen)));
    const largest = meant.sort((a, b) => b.size - a.size).slice(0, 150);
    const places = this.placesOf(this.depth);
    return largest.filter((node) => places[node.number]).map((node) => ({ text: node.name, x: places[node.number][0], y: places[node.number][1] }));
  }

  /** The median place of each cluster of a level, from the map's own points; reckoned once. */
  placesOf(depth) {
    this.tree.places ??= [];
    if (this.tree.places[depth]) return this.tree.places[depth];
    const members = this.tree.byLevel[depth].map(() => []);
    for (let row = 0; row < this.base.length; row++) if (this.base[row] >= 0 && this.map.x[row] !== offMap) members[this.tree.at(row, depth)].push(row);
    const median = (rows, values) => rows.map((row) => values[row]).sort((a, b) => a - b)[rows.length >> 1];
    this.tree.places[depth] = members.map((rows) => (rows.length ? [median(rows, this.map.x), median(rows, this.map.y)] : null));
    return this.tree.places[depth];
  }

  cssOf(node) {
    const rgb = this.colors?.get(node);
    return rgb && (this.colorBy !== byAuto || node.parent === this.chosen || node === this.chosen) ? toCss(rgb) : null;
  }

  writeCrumbs() {
    const path = [this.tree.root, ...this.tree.pathTo(this.chosen)];
    const parts = path.map((node, index) => build("button", {
      type: "button", dir: "auto", title: node.name, "aria-current": index === path.length - 1 ? "true" : null, onclick: () => this.select(node),
    }, index === 0 && path.length > 2 ? "All" : node.name));
    const shown = this.hits ? this.hits.length : this.chosen.depth === 0 ? this.data.total : this.chosen.size;
    const share = shown / Math.max(1, this.data.total);
    const count = this.hits ? `${shown.toLocaleString("en")} ${this.hitsTitle}` : `${shown.toLocaleString("en")} · ${formatPercent(share, share < 0.01 ? 2 : 1)}`;
    this.crumbs.replaceChildren(...parts, build("span", { class: "count" }, count));
  }

  writeLegend() {
    if (!this.facet) return this.legend.replaceChildren();
    const colors = facetColors(this.facet, this.inks);
    this.legend.replaceChildren(...this.facet.values.map((value, index) => {
      const swatch = build("i", { class: "swatch" });
      swatch.style.background = toCss(colors[index]);
      return build("li", {}, swatch, build("span", { dir: "auto" }, value), build("span", { class: "size" }, this.facet.counts[index].toLocaleString("en")));
    }));
  }

  lookAtChosen() {
    const rows = this.hits ?? (this.chosen.depth ? this.tree.members(this.chosen, Infinity) : []);
    if (rows.length) this.map.lookAt([...rows]);
    else this.map.reset();
  }

  // --- the map's points ------------------------------------------------------------------------------------------------

  pointAt(row, event) {
    if (row === null) return hideTip();
    const node = this.tree.nodeOf(row);
    const above = node ? this.tree.pathTo(node).slice(0, -1).map((one) => one.name).join(" › ") : "";
    const text = this.texts.get(row, lettersInTip) || (node ? "" : "What was said is withheld: it is like too few others.");
    showTip(event.clientX, event.clientY, text, node ? node.name : "In no cluster");
    const facets = this.facets.map((facet) => (facet.values[facet.codes[row]] === undefined ? null : `${facet.name}: ${facet.values[facet.codes[row]]}`));
    for (const line of [above, [this.ids.get(row), ...facets.filter(Boolean)].join(" · ")]) {
      if (line) tip.append(build("small", { dir: "auto" }, line));
    }
  }

  /** A click on a point chooses its cluster: of the coloured level first, of the base when that is chosen already. */
  pick(row) {
    if (row === null) return;
    const node = this.tree.nodeOf(row);
    if (!node) return;
    const path = this.tree.pathTo(node);
    const meant = path[Math.min(this.facet ? 1 : this.depth, path.length) - 1];
    this.leaveSearch();
    this.select(meant === this.chosen ? node : meant);
  }

  /** Show a conversation on the map: its base cluster is chosen, the map turned to it. */
  visit(row) {
    const node = this.tree.nodeOf(row);
    if (node && node !== this.chosen) this.select(node);
    if (this.map.view.zoom < 3) this.map.zoomBy(3 / this.map.view.zoom);
    if (this.map.x[row] !== offMap) Object.assign(this.map.view, { x: this.map.x[row], y: this.map.y[row] });
    this.map.marked = row;
    this.map.draw();
  }

  // --- search ----------------------------------------------------------------------------------------------------------

  find() {
    const words = this.search.value.toLowerCase().split(/\s+/).filter(Boolean);
    this.found.hidden = !words.length;
    this.pane.hidden = Boolean(words.length);
    if (!words.length) { this.hits = null; this.status.textContent = ""; return this.refresh(); }
    const nodes = this.tree.search(words);
    const rows = mergeRows(this.texts.search(words), this.ids.search(words));
    this.status.textContent = `${nodes.length} clusters and ${rows.length} conversations found`;
    this.found.replaceChildren(
      this.buildHits("Clusters", nodes, (node) => this.buildNodeHit(node, words)),
      this.buildHits("Conversations", rows, (row) => this.buildRowHit(row, words)),
    );
    this.found.scrollTop = 0;
    this.showHits(rows, "found");
  }

  leaveSearch() {
    if (!this.search.value) return;
    this.search.value = "";
    this.hits = null;
    this.found.hidden = true;
    this.pane.hidden = false;
  }

  /** A heading with the count, and the first hits; a button shows further ones. */
  buildHits(title, hits, buildHit) {
    const list = build("ul", { class: "hits" });
    const more = build("button", { type: "button", class: "more" });
    const add = () => {
      const first = list.children.length;
      list.append(...hits.slice(first, first + hitsAtOnce).map(buildHit));
      more.hidden = list.children.length >= hits.length;
      more.textContent = `Show more of ${hits.length.toLocaleString("en")}`;
    };
    more.addEventListener("click", add);
    add();
    return build("section", { class: "plain" }, build("h3", {}, `${title}: ${hits.length.toLocaleString("en")}`), list, more);
  }

  buildNodeHit(node, words) {
    const above = this.tree.pathTo(node).slice(0, -1).map((one) => one.name).join(" › ");
    return build("li", {}, build("button", { type: "button", onclick: () => { this.leaveSearch(); this.select(node); } },
      build("b", { dir: "auto" }, marked(node.name, words)),
      build("span", { class: "size" }, node.size.toLocaleString("en")),
      node.summary ? build("span", { class: "summary", dir: "auto" }, marked(node.summary, words)) : null,
      above ? build("small", { dir: "auto" }, above) : null));
  }

  buildRowHit(row, words) {
    const node = this.tree.nodeOf(row);
    return build("li", {}, build("button", {
      type: "button", onclick: () => { this.leaveSearch(); this.visit(row); },
      onpointerenter: () => this.map.mark(row), onpointerleave: () => this.map.mark(null),
    }, build("span", { dir: "auto" }, marked(this.texts.get(row, 2 * lettersInTip), words)), build("small", { dir: "auto" }, `${this.ids.get(row)} · ${node ? node.name : "in no cluster"}`)));
  }
}

/** Two ascending lists as one, each row once. */
function mergeRows(first, second) {
  if (!second.length) return first;
  return [...new Set([...first, ...second])].sort((a, b) => a - b);
}

/** Text with the found words marked. */
function marked(text, words) {
  const pattern = words.map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|");
  const parts = text.split(new RegExp(`(${pattern})`, "gi"));
  return build("span", {}, ...parts.map((part, index) => (index % 2 ? build("mark", {}, part) : part)));
}

for (const root of document.querySelectorAll("[data-explorer]")) root.explorer = new Explorer(root);
