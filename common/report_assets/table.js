// Tables that sort, search, page and open: <div data-table="ID"> is filled from the JSON element with that id.

const pageSizes = [25, 100, 500];
const maxPrintedRows = 2000;
const isNumeric = (kind) => kind !== "text" && kind !== "image";

class DataTable {
  constructor(root) {
    const data = readData(root.dataset.table);
    this.columns = data.columns.map(([title, kind, digits, note]) => ({ title, kind, digits, note }));
    this.rows = data.rows.map((cells, index) => ({ cells, details: data.details?.[index] ?? null, isOpen: false }));
    this.hasDetails = this.rows.some((row) => row.details?.length);
    this.name = data.name;
    this.sort = data.sort;
    this.descending = data.descending;
    this.pageSize = data.pageSize;
    this.page = 0;
    this.words = [];
    for (const [index, column] of this.columns.entries()) {
      if (column.kind === "bar") column.max = largest(this.rows.map((row) => row.cells[index] ?? 0));
    }
    this.buildFrame(root);
    this.refresh();
    window.addEventListener("beforeprint", () => this.render(this.found.slice(0, maxPrintedRows)));
    window.addEventListener("afterprint", () => this.render());
  }

  buildFrame(root) {
    const search = build("input", {
      type: "search", placeholder: "Search", "aria-label": `Search in ${this.name}`,
      oninput: () => { this.words = search.value.toLowerCase().split(/\s+/).filter(Boolean); this.page = 0; this.refresh(); },
    });
    this.count = build("span", { class: "count", role: "status" });
    this.openAll = this.hasDetails ? build("button", { type: "button", onclick: () => this.toggleAll() }, "Open all") : null;
    this.head = build("tr");
    this.body = build("tbody");
    this.pager = build("div", { class: "pager" });
    root.append(
      build("div", { class: "toolbar" }, search, this.buildSortMenu(), this.count, this.openAll),
      build("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": this.name },
        build("table", { class: "data" }, build("thead", {}, this.head), this.body)),
      this.pager,
    );
    this.buildHead();
  }

  /** On a phone there is no heading to click on: a menu takes its place. */
  buildSortMenu() {
    const options = this.columns.flatMap((column, index) => [
      build("option", { value: `${index} up` }, `${column.title} ↑`),
      build("option", { value: `${index} down` }, `${column.title} ↓`),
    ]);
    this.sortMenu = build("select", {
      class: "sort-menu", "aria-label": `Sort ${this.name}`,
      onchange: () => {
        const [index, direction] = this.sortMenu.value.split(" ");
        this.sort = Number(index);
        this.descending = direction === "down";
        this.refresh();
      },
    }, build("option", { value: "", disabled: true, selected: true }, "Sort by"), ...options);
    return this.sortMenu;
  }

  buildHead() {
    if (this.hasDetails) this.head.append(build("th", { class: "opener" }, build("span", { class: "unseen" }, "Details")));
    this.heads = this.columns.map((column, index) => {
      const button = build("button", { type: "button", title: column.note || null, onclick: () => this.sortBy(index) }, column.title);
      const head = build("th", { scope: "col", class: isNumeric(column.kind) ? "number" : null }, button);
      this.head.append(head);
      return head;
    });
  }

  sortBy(index) {
    // A first click puts the largest number, or the first word, on top.
    this.descending = this.sort === index ? !this.descending : isNumeric(this.columns[index].kind);
    this.sort = index;
    this.page = 0;
    this.refresh();
  }

  refresh() {
    this.found = this.words.length ? this.rows.filter((row) => this.matches(row)) : [...this.rows];
    if (this.sort !== null) this.found.sort((a, b) => this.compare(a, b));
    for (const [index, head] of this.heads.entries()) {
      head.setAttribute("aria-sort", index !== this.sort ? "none" : this.descending ? "descending" : "ascending");
    }
    if (this.sort !== null) this.sortMenu.value = `${this.sort} ${this.descending ? "down" : "up"}`;
    const all = `${this.rows.length.toLocaleString("en")} ${this.rows.length === 1 ? "row" : "rows"}`;
    this.count.textContent = this.words.length ? `${this.found.length.toLocaleString("en")} of ${all}` : all;
    this.render();
  }

  matches(row) {
    row.text ??= this.searchText(row);
    return this.words.every((word) => row.text.includes(word));
  }

  searchText(row) {
    const cells = row.cells.filter((_, index) => this.columns[index].kind !== "image");
    const items = (row.details ?? []).flatMap(([heading, texts]) => [heading, ...texts.filter((item) => typeof item === "string")]);
    return [...cells, ...items].join(" ").toLowerCase();
  }

  /** Empty cells are last in both directions. */
  compare(a, b) {
    const [x, y] = [a.cells[this.sort], b.cells[this.sort]];
    if (x === null || y === null) return (x === null) - (y === null);
    const order = typeof x === "number" ? x - y : x.localeCompare(y, undefined, { numeric: true });
    return this.descending ? -order : order;
  }

  render(rows = null) {
    const first = this.page * this.pageSize;
    this.body.replaceChildren(...(rows ?? this.found.slice(first, first + this.pageSize)).flatMap((row) => this.renderRow(row)));
    if (!this.found.length) {
      this.body.append(build("tr", {}, build("td", { class: "nothing", colspan: this.columns.length + 1 }, "Nothing found.")));
    }
    this.renderPager();
  }

  renderRow(row) {
    const cells = this.columns.map((column, index) => this.renderCell(row.cells[index], column));
    const line = build("tr", {}, ...cells);
    if (!this.hasDetails) return [line];
    const canOpen = Boolean(row.details?.length);
    const button = build("button", { type: "button", "aria-expanded": String(row.isOpen), "aria-label": "Details" });
    line.prepend(build("td", { class: "opener" }, canOpen ? button : ""));
    if (canOpen) {
      line.classList.add("can-open");
      line.addEventListener("click", () => {
        if (!window.getSelection().isCollapsed) return; // the reader is copying a text
        row.isOpen = !row.isOpen;
        this.replaceRow(line, row);
      });
    }
    return row.isOpen && canOpen ? [line, this.renderDetails(row)] : [line];
  }

  replaceRow(line, row) {
    const hadFocus = line.contains(document.activeElement);
    if (line.nextSibling?.classList.contains("details")) line.nextSibling.remove();
    const fresh = this.renderRow(row);
    line.replaceWith(...fresh);
    if (hadFocus) fresh[0].querySelector("button").focus();
  }

  toggleAll() {
    const isOpen = !this.rows.some((row) => row.isOpen);
    for (const row of this.rows) row.isOpen = isOpen;
    this.openAll.textContent = isOpen ? "Close all" : "Open all";
    this.render();
  }

  renderCell(value, column) {
    const { kind, digits, title, max } = column;
    if (kind === "image") return build("td", { "data-title": title }, value ? build("img", { src: value, alt: "" }) : dash);
    if (kind === "text") return build("td", { "data-title": title, dir: "auto" }, this.marked(value ?? dash));
    const text = kind === "percent" || kind === "meter" ? formatPercent(value, digits) : formatNumber(value, digits);
    const cell = build("td", { class: `number ${kind}`, "data-title": title });
    if (kind === "number" || kind === "percent") {
      cell.append(text);
    } else {
      const fill = build("i");
      fill.style.width = `${100 * Math.min(1, Math.max(0, (value ?? 0) / (kind === "bar" ? max || 1 : 1)))}%`;
      cell.append(build("span", { class: "gauge" }, fill), build("span", {}, text));
    }
    return cell;
  }

  renderDetails(row) {
    const groups = row.details.flatMap(([heading, items]) => [
      heading ? build("h3", {}, heading) : null,
      build("ul", {}, ...items.map((item) => typeof item === "string"
        ? build("li", { dir: "auto" }, this.marked(item || "(empty)"))
        : build("li", { class: "image" }, build("img", { src: item.src, alt: "", loading: "lazy" })))),
    ]);
    return build("tr", { class: "details" }, build("td", { colspan: this.columns.length + 1 }, ...groups.filter(Boolean)));
  }

  /** The text with the words searched for marked; long_names_like_this may break after an underscore. */
  marked(value) {
    const text = String(value);
    if (!this.words.length) {
      const parts = text.length > 12 && !text.includes(" ") ? text.split(/(?<=_)/) : [text];
      return build("span", {}, ...parts.flatMap((part, index) => (index ? [build("wbr"), part] : [part])));
    }
    const pattern = this.words.map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|");
    const parts = text.split(new RegExp(`(${pattern})`, "gi"));
    return build("span", {}, ...parts.map((part, index) => (index % 2 ? build("mark", {}, part) : part)));
  }

  renderPager() {
    const pages = Math.ceil(this.found.length / this.pageSize);
    this.pager.hidden = this.found.length <= Math.min(this.pageSize, pageSizes[0]);
    const turn = (step) => () => { this.page += step; this.render(); };
    const size = build("select", {
      "aria-label": "Rows on a page",
      onchange: () => { this.pageSize = Number(size.value); this.page = 0; this.render(); },
    }, ...[...new Set([...pageSizes, this.pageSize])].sort((a, b) => a - b).map((count) => build("option", { value: count, selected: count === this.pageSize }, `${count} a page`)));
    this.pager.replaceChildren(
      build("button", { type: "button", disabled: this.page === 0, onclick: turn(-1) }, "Previous"),
      build("span", {}, `Page ${this.page + 1} of ${Math.max(1, pages)}`),
      build("button", { type: "button", disabled: this.page + 1 >= pages, onclick: turn(1) }, "Next"),
      size,
    );
  }
}

for (const root of document.querySelectorAll("[data-table]")) new DataTable(root);
