// The tree to walk down: rows are made when they are opened, so that ten thousand clusters cost nothing before.

const examplesAtOnce = 5;
const childrenAtOnce = 200;

class TreeView {
  /** `onSelect(node)` is called when a row is chosen, `onExample(row)` when an example is, `colorOf(node)` gives css or null. */
  constructor(root, { texts, onSelect, onExample, onPointTo, colorOf }) {
    Object.assign(this, { root, texts, onSelect, onExample, onPointTo, colorOf });
    this.list = build("ul", { role: "tree", class: "tree" });
    root.append(this.list);
    this.list.addEventListener("keydown", (event) => this.press(event));
  }

  show(tree) {
    this.tree = tree;
    this.items = new Map(); // node -> {item, row, group, isOpen}
    this.selected = tree.root;
    this.list.setAttribute("aria-label", `Clusters, ${tree.title}`);
    this.list.replaceChildren();
    this.addChildren(this.list, tree.root, 0);
    this.list.querySelector(".row")?.setAttribute("tabindex", "0");
  }

  addChildren(list, node, first) {
    const part = node.children.slice(first, first + childrenAtOnce);
    list.append(...part.map((child) => this.buildItem(child)));
    const left = node.children.length - first - part.length;
    if (left <= 0) return;
    const more = build("button", { type: "button", class: "more", onclick: () => { more.parentNode.remove(); this.addChildren(list, node, first + part.length); } },
      `Show ${Math.min(left, childrenAtOnce)} of ${left.toLocaleString("en")} more`);
    list.append(build("li", { role: "none" }, more));
  }

  buildItem(node) {
    const canOpen = node.children.length > 0;
    const caret = build("span", { class: "caret", "aria-hidden": "true", onclick: (event) => { event.stopPropagation(); this.toggle(node); } });
    const swatch = build("i", { class: "swatch", "aria-hidden": "true" });
    const share = node.size / Math.max(1, this.tree.root.size);
    const bar = build("span", { class: "share", "aria-hidden": "true" });
    bar.append(build("i"));
    bar.firstChild.style.width = `${(100 * node.size) / Math.max(1, node.parent.children[0].size)}%`;
    const row = build("div", {
      class: `row${canOpen ? "" : " leaf"}`, role: "treeitem", tabindex: "-1", "aria-level": node.depth, "aria-selected": "false",
      "aria-expanded": canOpen ? "false" : null, "aria-label": `${node.name}, ${node.size.toLocaleString("en")} conversations`,
      onclick: () => this.choose(node),
    },
      caret, swatch,
      build("span", { class: "words" },
        build("b", { dir: "auto" }, node.name),
        node.summary ? build("span", { class: "summary", dir: "auto" }, node.summary) : null),
      build("span", { class: "size", title: `${formatPercent(share, share < 0.01 ? 2 : 1)} of all conversations in clusters` },
        node.size.toLocaleString("en"), bar));
    const item = build("li", { role: "none" }, row);
    this.items.set(node, { item, row, swatch, group: null });
    this.color(node);
    return item;
  }

  color(node) {
    const { swatch } = this.items.get(node);
    const css = this.colorOf(node);
    swatch.style.background = css ?? "transparent";
    swatch.classList.toggle("none", !css);
  }

  recolor() { for (const node of this.items.keys()) this.color(node); }

  isOpen(node) { return Boolean(this.items.get(node)?.group) && !this.items.get(node).group.hidden; }

  toggle(node, isOpen = !this.isOpen(node)) {
    const shown = this.items.get(node);
    if (!node.children.length || !shown) return;
    if (!shown.group && isOpen) {
      shown.group = build("ul", { role: "group", id: `${this.tree.kind}-${node.id}` });
      shown.row.setAttribute("aria-owns", shown.group.id);
      this.addChildren(shown.group, node, 0);
      shown.item.append(shown.group);
    }
    if (shown.group) shown.group.hidden = !isOpen;
    shown.row.setAttribute("aria-expanded", String(isOpen));
  }

  /** A click chooses and opens; a second one on the chosen row folds it up again. */
  choose(node) {
    if (!window.getSelection().isCollapsed) return; // the reader is copying a text
    if (node === this.selected && node.children.length) this.toggle(node);
    else { this.toggle(node, true); this.onSelect(node); }
  }

  /** Mark a node as chosen, open the way to it and bring it into sight. */
  select(node) {
    const before = this.items.get(this.selected);
    before?.row.setAttribute("aria-selected", "false");
    before?.examples?.remove();
    this.selected = node;
    if (!node.parent) { this.root.scrollTop = 0; return; }
    for (const above of this.tree.pathTo(node).slice(0, -1)) this.reveal(above);
    this.reveal(node);
    const shown = this.items.get(node);
    if (!shown) return;
    shown.row.setAttribute("aria-selected", "true");
    this.makeFocusable(shown.row);
    if (!node.children.length) this.addExamples(node, shown);
    this.scrollTo(shown.row);
  }

  /** Open a node; one beyond the first rows of a long list is put in front of what is not shown yet. */
  reveal(node) {
    const above = this.items.get(node.parent);
    if (!this.items.has(node) && (above?.group || !node.parent.parent)) {
      const list = above?.group ?? this.list;
      list.insertBefore(this.buildItem(node), list.querySelector(":scope > li > .more")?.parentNode ?? null);
    }
    if (node.children.length) this.toggle(node, true);
  }

  scrollTo(row) {
    const [box, frame] = [row.getBoundingClientRect(), this.root.getBoundingClientRect()];
    if (box.top < frame.top || box.bottom > frame.bottom) this.root.scrollTop += box.top - frame.top - frame.height / 3;
  }

  addExamples(node, shown) {
    const list = build("ul", { class: "examples", "aria-label": "Conversations" });
    shown.examples = build("div", {}, list);
    shown.item.append(shown.examples);
    let last = -1;
    let n = 0;
    const more = build("button", { type: "button", class: "more" }, "Show more");
    const add = (count) => {
      const rows = this.tree.members(node, count, last);
      for (const row of rows) list.append(this.buildExample(row));
      n += rows.length;
      last = rows.at(-1) ?? last;
      more.hidden = n >= node.size || !rows.length;
      more.textContent = `Show more of ${node.size.toLocaleString("en")}`;
    };
    more.addEventListener("click", () => add(4 * examplesAtOnce));
    shown.examples.append(more);
    add(examplesAtOnce);
  }

  buildExample(row) {
    const text = this.texts.get(row) || "(nothing is said of it)";
    const button = build("button", {
      type: "button", dir: "auto", onclick: () => { button.classList.add("open"); this.onExample(row); },
      onpointerenter: () => this.onPointTo(row), onpointerleave: () => this.onPointTo(null),
    }, build("span", {}, text));
    return build("li", {}, button);
  }

  // --- keys, as trees have them ----------------------------------------------------------------------------------------

  makeFocusable(row) {
    for (const other of this.list.querySelectorAll('.row[tabindex="0"]')) other.setAttribute("tabindex", "-1");
    row.setAttribute("tabindex", "0");
  }

  press(event) {
    const row = event.target.closest(".row");
    if (!row) return;
    const rows = [...this.list.querySelectorAll(".row")].filter((one) => one.offsetParent);
    const node = [...this.items].find(([, shown]) => shown.row === row)[0];
    const steps = { ArrowDown: rows.indexOf(row) + 1, ArrowUp: rows.indexOf(row) - 1, Home: 0, End: rows.length - 1 };
    if (event.key in steps) this.focus(rows[steps[event.key]]);
    else if (event.key === "ArrowRight") this.isOpen(node) ? this.focus(rows[rows.indexOf(row) + 1]) : this.toggle(node, true);
    else if (event.key === "ArrowLeft") this.isOpen(node) ? this.toggle(node, false) : this.focus(this.items.get(node.parent)?.row);
    else if (event.key === "Enter" || event.key === " ") this.choose(node);
    else return;
    event.preventDefault();
  }

  focus(row) {
    if (!row) return;
    this.makeFocusable(row);
    row.focus();
  }
}
