// What the explorer shows: conversations in typed arrays, the clusters of each hierarchy as one numbered tree.

const noCluster = -1;
const offMap = 0xffff; // coordinate of a conversation that has no place

/** Numbers from base64 of their little-endian bytes. */
function unpack(text, Type) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Type(bytes.buffer);
}

/** Lines of one long text, cut out when they are asked for; lower case is made once, for searching. */
class Lines {
  constructor(text) {
    this.text = text;
    const starts = [0];
    for (let at = text.indexOf("\n"); at >= 0; at = text.indexOf("\n", at + 1)) starts.push(at + 1);
    this.starts = Uint32Array.from([...starts, text.length + 1]);
  }

  /** A text with its line breaks, cut after so many letters. */
  get(row, most = Infinity) {
    const text = this.text.slice(this.starts[row], this.starts[row + 1] - 1).replaceAll("\u2028", "\n");
    return text.length > most ? `${text.slice(0, most).trimEnd()}…` : text;
  }

  /** Number of the line that holds a place of the text. */
  rowAt(place) {
    let [low, high] = [0, this.starts.length - 1];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (this.starts[middle] <= place) low = middle;
      else high = middle;
    }
    return low;
  }

  /** Rows that hold all words (in lower case), ascending: jumps from find to find of the longest word. */
  search(words) {
    this.lower ??= lowerOfSameLength(this.text);
    const [longest, ...others] = [...words].sort((a, b) => b.length - a.length);
    const rows = [];
    for (let at = this.lower.indexOf(longest); at >= 0;) {
      const row = this.rowAt(at);
      const [start, end] = [this.starts[row], this.starts[row + 1]];
      const line = others.length ? this.lower.slice(start, end) : "";
      if (others.every((word) => line.includes(word))) rows.push(row);
      at = this.lower.indexOf(longest, end);
    }
    return rows;
  }
}

/** Lower case in which every letter keeps its place: a few letters (İ) become two, and those stay as they are. */
function lowerOfSameLength(text) {
  const lower = text.toLowerCase();
  if (lower.length === text.length) return lower;
  return Array.from(text, (letter) => (letter.toLowerCase().length === letter.length ? letter.toLowerCase() : letter)).join("");
}

/**
 * One hierarchy as nodes: 0 is the root with all conversations, depth 1 the top level, the deepest are base clusters.
 * Conversations under any node are found by the path of their base cluster.
 */
class ClusterTree {
  constructor(hierarchy, baseClusters, base) {
    this.kind = hierarchy.kind;
    this.title = hierarchy.title;
    this.note = hierarchy.note;
    this.depths = hierarchy.levels.length + 1; // of the base clusters
    this.base = base; // [n] base cluster of each conversation
    this.nodes = [{ id: 0, name: "All conversations", summary: "", depth: 0, number: 0, parent: null, children: [], size: 0 }];
    this.paths = this.findPaths(hierarchy.levels, baseClusters.length);
    this.byLevel = [[this.nodes[0]]];
    hierarchy.levels.forEach((level, index) => this.addLevel(level.names, index + 1));
    this.addLevel(baseClusters, this.depths);
    this.join(baseClusters);
  }

  /** For each level, top first, the cluster that each base cluster is under; the last level is the base itself. */
  findPaths(levels, nBase) {
    const paths = [Int32Array.from({ length: nBase }, (_, number) => number)];
    for (const level of [...levels].reverse()) paths.unshift(paths[0].map((child) => level.parents[child]));
    return [new Int32Array(nBase), ...paths];
  }

  addLevel(names, depth) {
    this.byLevel[depth] = names.map(([name, summary], number) => {
      const node = { id: this.nodes.length, name, summary, depth, number, parent: null, children: [], size: 0 };
      this.nodes.push(node);
      return node;
    });
  }

  /** Parents, sizes and ranks; children stand by size. */
  join(baseClusters) {
    baseClusters.forEach(([, , size], number) => {
      let node = null;
      for (let depth = this.depths; depth >= 0; depth--) {
        const above = this.byLevel[depth][this.paths[depth][number]];
        above.size += size;
        if (node && !node.parent) { node.parent = above; above.children.push(node); }
        node = above;
      }
    });
    for (const node of this.nodes) {
      node.children.sort((a, b) => b.size - a.size || a.number - b.number);
      node.children.forEach((child, rank) => { child.rank = rank; });
    }
  }

  get root() { return this.nodes[0]; }

  /** Number of a conversation's cluster at a depth, or noCluster. */
  at(row, depth) { return this.base[row] < 0 ? noCluster : this.paths[depth][this.base[row]]; }

  nodeOf(row, depth = this.depths) { return this.base[row] < 0 ? null : this.byLevel[depth][this.at(row, depth)]; }

  holds(node, row) { return node.depth === 0 || this.at(row, node.depth) === node.number; }

  /** From the top level down to a node, the root left out. */
  pathTo(node) {
    const path = [];
    for (let above = node; above?.parent; above = above.parent) path.unshift(above);
    return path;
  }

  /** The first so many conversations under a node, from the one after `after`. */
  members(node, count, after = -1) {
    const rows = [];
    for (let row = after + 1; row < this.base.length && rows.length < count; row++) {
      if (this.base[row] >= 0 && this.holds(node, row)) rows.push(row);
    }
    return rows;
  }

  search(words) {
    const fits = (node) => words.every((word) => `${node.name} ${node.summary}`.toLowerCase().includes(word));
    return this.nodes.slice(1).filter(fits).sort((a, b) => a.depth - b.depth || b.size - a.size);
  }
}

// --- colours ---------------------------------------------------------------------------------------------------------

const toRgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
const mix = (from, to, share) => from.map((value, index) => Math.round(value + (to[index] - value) * share));
const toCss = (rgb) => `rgb(${rgb.join(" ")})`;
const shades = [0, 0.42, -0.34, 0.22, -0.18, 0.58, -0.5]; // towards white, or towards black

/** The so-manieth of many colours: twelve hues, then the same lighter and darker. */
function inkOf(rank, inks) { return shade(toRgb(inks[rank % inks.length]), Math.floor(rank / inks.length)); }

function shade(rgb, turn) {
  const share = shades[turn % shades.length];
  return mix(rgb, share < 0 ? [0, 0, 0] : [255, 255, 255], Math.abs(share));
}

/** The colour of a node: among its siblings, or as a shade of the top-level cluster that it is under. */
function nodeColor(tree, node, inks, isFamily) {
  if (!isFamily || node.depth <= 1) return inkOf(node.rank, inks);
  const top = tree.pathTo(node)[0];
  return shade(inkOf(top.rank, inks), node.rank + (node.depth > 2 ? node.parent.rank : 0));
}

/** Colours of the values of a facet: a ramp where they are numbers, else colours apart. */
function facetColors(facet, inks) {
  if (!facet.isNumeric) return facet.values.map((_, rank) => inkOf(rank, inks));
  const last = Math.max(1, facet.values.length - 1);
  const [low, middle, high] = [inks[6], inks[5], inks[7]].map(toRgb);
  return facet.values.map((_, rank) => (rank <= last / 2 ? mix(low, middle, (2 * rank) / last) : mix(middle, high, (2 * rank) / last - 1)));
}
